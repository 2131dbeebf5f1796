"""A Trainer never deletes what is not a checkpoint, and its own flows go on over checkpoints of every kind."""

from __future__ import annotations

import os

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_superscale as lss
from lightning_superscale.checkpoint.load.reader import is_checkpoint
from lightning_superscale.errors import CheckpointError
from tests.checkpoint.storage.test_contents import project, snapshot
from tests.helpers.trainers import loader, trainer
from tests.helpers.universal import Mixed


def run(callback, ckpt_path=None, *, epochs: int, plugins=(), strategy="auto"):
    runner = trainer(
        strategy,
        plugins=list(plugins),
        callbacks=[callback],
        enable_checkpointing=True,
        max_epochs=epochs,
        max_steps=-1,
        limit_train_batches=2,
    )
    runner.fit(Mixed(), loader(), loader(), ckpt_path=ckpt_path)
    return runner


@pytest.mark.parametrize("strategy", ["auto", "superscale"])
@pytest.mark.parametrize("is_asynchronous", [False, True])
def test_a_folder_of_the_users_is_refused_by_the_trainer(tmp_path, monkeypatch, strategy, is_asynchronous):
    monkeypatch.chdir(tmp_path)
    project(tmp_path / "project")
    io = lss.UniversalCheckpointIO({"asynchronous": is_asynchronous})
    runner = trainer(strategy, plugins=[io])
    runner.fit(Mixed(), loader())
    before = snapshot(tmp_path)
    for path in (tmp_path / "project", "project", ".", "..", "", "~", tmp_path / "project/src/train.py"):
        with pytest.raises(CheckpointError, match="so it is not replaced"):
            runner.save_checkpoint(path)
        with pytest.raises(CheckpointError, match="so it is not removed"):
            io.remove_checkpoint(path)
    io.teardown()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("save_last", [True, "link"])
def test_a_run_goes_on_over_the_checkpoints_of_stock_lightning(tmp_path, save_last):
    """From .ckpt files, top-k removal and a `last` link of Lightning's own IO to ours, at the same names."""

    def callback() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, "{epoch}", save_top_k=1, monitor="epoch", mode="max", save_last=save_last)

    run(callback(), epochs=1)
    assert (tmp_path / "last.ckpt").is_file()
    with torch.serialization.safe_globals([]):
        run(callback(), str(tmp_path / "last.ckpt"), epochs=3, plugins=[lss.UniversalCheckpointIO()])
    found = {name for name in os.listdir(tmp_path) if not name.startswith(".")}
    assert "last.ckpt" in found
    assert is_checkpoint(str(tmp_path / "last.ckpt"))
    assert {name for name in found if name != "last.ckpt"} <= {"epoch=0.ckpt", "epoch=2.ckpt"}
    run(callback(), str(tmp_path / "last.ckpt"), epochs=4, plugins=[lss.UniversalCheckpointIO()])
    assert is_checkpoint(str(tmp_path / "last.ckpt"))
    assert is_checkpoint(str(tmp_path / "epoch=3.ckpt"))
