"""`superscale migrate --checkpoint`: what is told of an old run's checkpoint, and that the command does it."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

import lightning_superscale as lss
from lightning_superscale.checkpoint.tools.summary import summarize
from lightning_superscale.cli import main
from lightning_superscale.cli.migrate.old_checkpoint import describe
from tests.cli.migrate.test_command import DATA, QUIET
from tests.helpers.foreign import truth, unpack
from tests.helpers.trainers import Regressor, fit, trainer
from tests.peers.deepspeed_ranks import Tiny, groups


class Wrapped(Tiny, L.LightningModule):
    def training_step(self, batch, batch_idx):
        return self(batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(groups(self))


def test_deepspeeds_checkpoint_resumes_with_the_printed_lines(tmp_path, capsys, monkeypatch):
    folder = unpack("zero1", tmp_path)
    assert main(["migrate", str(DATA / "zero1.json"), "--checkpoint", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "is DeepSpeed's ZeRO checkpoint, after 3 optimizer steps" in out
    assert "Loaded: weights and buffers; fp32 masters; optimizer states; the number of steps; options" in out
    assert "Not loaded: epoch, batch, callbacks" in out
    assert "checkpoint={}" in out
    convert, line = (line.strip() for line in out.splitlines() if "migrated.ckpt" in line)
    monkeypatch.chdir(tmp_path)
    assert main(convert.split()[1:]) == 0
    module, held, seen = Wrapped(), truth(folder), {}
    run = L.Trainer(
        strategy=lss.SuperScaleStrategy(zero=1, checkpoint={}), precision="bf16-true", **{**QUIET, "max_steps": 4}
    )
    module.on_train_start = lambda: seen.update(
        {name: value.clone() for name, value in module.state_dict().items()}, step=run.global_step
    )
    data = DataLoader(torch.randint(0, 11, (2, 6)), batch_size=2)
    exec(line, {"trainer": run, "module": module, "datamodule": data})
    assert seen["step"] == 3
    assert torch.equal(seen["inner.weight"], held["model/inner.weight"])


def test_what_lightnings_deepspeed_strategy_saved_resumes_as_it_is(tmp_path):
    folder = unpack("zero3", tmp_path)
    lines = describe(str(folder))
    assert f"    trainer.fit(module, datamodule, ckpt_path={str(folder)!r})" in lines
    module, held, seen = Wrapped(), truth(folder), {}
    run = L.Trainer(
        strategy=lss.SuperScaleStrategy(zero=1, checkpoint={}), precision="bf16-true", **{**QUIET, "max_steps": 1}
    )
    module.on_train_start = lambda: seen.update(
        {name: value.clone() for name, value in run.optimizers[0].state[module.inner.weight].items()}
    )
    run.fit(module, DataLoader(torch.randint(0, 11, (2, 6)), batch_size=2), ckpt_path=str(folder))
    assert torch.equal(seen["exp_avg"].reshape(-1), held["exp_avg/inner.weight"].reshape(-1))


@pytest.mark.parametrize("case", ["zero2/universal", "zero3", "zero2"])
def test_what_is_told_of_deepspeeds_other_checkpoints_and_the_conversion(case, tmp_path, capsys):
    name, _, kind = case.partition("/")
    path = str(unpack(name, tmp_path) / kind)
    lines = describe(path)
    assert any("DeepSpeed's" in line for line in lines)
    command = lines[-1].split()
    assert command[:3] == ["superscale", "checkpoint", "convert"]
    target = str(tmp_path / command[-1])
    assert main([*command[1:-1], target]) == 0
    assert summarize(target).classes().keys() == summarize(path).classes().keys()


def test_a_plain_file_and_ours(tmp_path):
    fit(Regressor(), max_epochs=1).save_checkpoint(tmp_path / "plain.ckpt")
    text = "\n".join(describe(str(tmp_path / "plain.ckpt")))
    assert "is a Lightning file" in text
    assert "loops, callbacks and schedulers" in text
    assert "convert --names names.json" in text
    run = trainer("superscale", plugins=[lss.UniversalCheckpointIO()], max_epochs=1)
    run.fit(
        Regressor(), DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 17), torch.randn(8, 5)), batch_size=8)
    )
    run.save_checkpoint(tmp_path / "ours.ckpt")
    text = "\n".join(describe(str(tmp_path / "ours.ckpt")))
    assert "is a checkpoint of lightning-superscale" in text
    assert "convert" not in text


def test_what_is_no_checkpoint_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["migrate", str(DATA / "zero1.json"), "--checkpoint", str(tmp_path / "empty")]) == 2
    assert "is no checkpoint that is known" in capsys.readouterr().err
