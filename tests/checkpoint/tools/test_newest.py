"""The checkpoint that a run goes on from."""

from __future__ import annotations

import os
import shutil
import warnings

import pytest
import torch

import lightning_superscale as lss
from tests.helpers.trainers import Regressor, loader, trainer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for steps in (1, 2, 10):
        run = trainer("superscale", max_steps=steps, max_epochs=-1, plugins=[lss.UniversalCheckpointIO()])
        run.fit(Regressor(), loader(16))
        run.save_checkpoint(folder / f"step={steps}.ckpt")
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "checkpoints")


def quietly(folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return lss.last_checkpoint(folder, **options)


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("reads_all", [True, False])
def test_the_newest_is_that_of_the_most_steps(folder, reads_all):
    os.utime(folder / "step=1.ckpt" / "MANIFEST.json")  # not the one that was touched last
    assert quietly(folder, reads_all=reads_all) == str(folder / "step=10.ckpt")
    assert quietly(f"local://{folder}") == f"local://{folder}/step=10.ckpt"


@pytest.mark.parametrize("content", ["nothing", "no folder"])
def test_there_may_be_none(tmp_path, content):
    assert quietly(tmp_path if content == "nothing" else tmp_path / "new") is None


def test_a_damaged_one_is_passed_over_by_name(folder):
    flip(next((folder / "step=10.ckpt").rglob("*.safetensors")))
    with pytest.warns(UserWarning, match=r"step=10.ckpt is passed over: data/.*block 0"):
        assert lss.last_checkpoint(folder) == str(folder / "step=2.ckpt")
    assert quietly(folder, reads_all=False) == str(folder / "step=10.ckpt")  # whose damage loading finds


@pytest.mark.parametrize("reads_all", [True, False])
def test_one_that_lacks_a_file_is_passed_over(folder, reads_all):
    next((folder / "step=10.ckpt").rglob("*.safetensors")).unlink()
    (folder / "step=2.ckpt" / "MANIFEST.json").write_text("{}")
    with pytest.warns(UserWarning, match="passed over") as said:
        assert lss.last_checkpoint(folder, reads_all=reads_all) == str(folder / "step=1.ckpt")
    texts = [str(one.message) for one in said]
    assert any("step=10.ckpt is passed over" in text and "is missing" in text for text in texts)
    assert any("step=2.ckpt is passed over: its MANIFEST.json can't be read" in text for text in texts)


def test_the_newest_is_named_whose_manifest_is_damaged(folder):
    flip(folder / "step=10.ckpt" / "MANIFEST.json")
    with pytest.warns(UserWarning, match="step=10.ckpt is passed over: its MANIFEST.json can't be read"):
        assert lss.last_checkpoint(folder) == str(folder / "step=2.ckpt")


def test_a_checkpoint_of_another_format_is_named(folder):
    torch.save({}, folder / "plain.ckpt")
    with pytest.warns(UserWarning, match=r"plain.ckpt is passed over: it is no universal checkpoint"):
        assert lss.last_checkpoint(folder) == str(folder / "step=10.ckpt")


def test_what_a_crash_left_of_a_save_is_no_checkpoint(folder):
    shutil.copytree(folder / "step=10.ckpt", folder / ".ucp-staging-0123")
    shutil.rmtree(folder / "step=10.ckpt")
    assert quietly(folder) == str(folder / "step=2.ckpt")
