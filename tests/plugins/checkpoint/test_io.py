"""UniversalCheckpointIO in a Trainer: ModelCheckpoint, resuming, renaming, refusing, saving in the background."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import SingleDeviceStrategy
from omegaconf import OmegaConf
from safetensors.torch import save_model
from torch import nn

import lightning_superscale as lss
from lightning_superscale.checkpoint.load.reader import SavedState, is_checkpoint, open_checkpoint
from lightning_superscale.checkpoint.state import TensorKey
from lightning_superscale.errors import CheckpointError, SuperScaleError
from lightning_superscale.plugins import binder
from tests.helpers.trainers import Regressor, assert_same_weights, loader, trainer
from tests.helpers.universal import Mixed, content

ENGINES = ("auto", "superscale", "superoffload")


def run(module, strategy="auto", ckpt_path=None, *, checkpoint=None, **flags) -> L.Trainer:
    runner = trainer(strategy, **{"plugins": [lss.UniversalCheckpointIO(checkpoint)], **flags})
    runner.fit(module, loader(), loader(), ckpt_path=ckpt_path)
    return runner


def saved(tmp_path, module=None, strategy="auto", **flags) -> str:
    path = str(tmp_path / "one.ckpt")
    run(module or Mixed(), strategy, **flags).save_checkpoint(path)
    return path


def trained(strategy, epochs) -> Mixed:
    module = Mixed()
    trainer(strategy, max_epochs=epochs).fit(module, loader(), loader())
    return module


@pytest.mark.parametrize("is_asynchronous", [False, True], ids=["at once", "in the background"])
@pytest.mark.parametrize("strategy", ENGINES)
def test_model_checkpoint_keeps_the_best_and_the_last_and_resumes(tmp_path, strategy, is_asynchronous):
    flags = {"enable_checkpointing": True, "checkpoint": {"asynchronous": is_asynchronous}}
    keeper = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2, save_last=True, every_n_train_steps=None)
    run(Mixed(), strategy, max_epochs=3, callbacks=[keeper], **flags)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert len(kept) == 3
    assert "last.ckpt" in kept
    assert all(is_checkpoint(str(tmp_path / name)) for name in kept)
    assert Path(keeper.best_model_path).is_dir()
    module = Mixed()
    again = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2, save_last=True)
    run(module, strategy, "last", max_epochs=5, callbacks=[again], **flags)
    assert_same_weights(module, trained(strategy, 5))
    assert content(tmp_path / "last.ckpt")["step"] == 30


@pytest.mark.parametrize("strategy", ENGINES)
def test_a_run_goes_on_in_the_middle_of_an_epoch_as_with_lightnings_own_checkpoints(tmp_path, strategy):
    ends = []
    for plugins in ([], [lss.UniversalCheckpointIO()]):
        folder = tmp_path / str(len(plugins))
        keeper = ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1, filename="{step}")
        flags = {"enable_checkpointing": True, "plugins": plugins}
        trainer(strategy, max_steps=4, callbacks=[keeper], **flags).fit(Mixed(), loader())
        module = Mixed()
        runner = trainer(strategy, max_epochs=2, enable_checkpointing=True, callbacks=[keeper], plugins=plugins)
        runner.fit(module, loader(), ckpt_path=str(folder / "step=4.ckpt"))
        ends.append((module, runner.global_step, runner.lr_scheduler_configs[0].scheduler.last_epoch))
    assert_same_weights(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


def test_last_is_a_link_and_weights_alone_are_few(tmp_path):
    keeper = ModelCheckpoint(tmp_path, save_last="link", save_weights_only=True)
    run(Mixed(), enable_checkpointing=True, callbacks=[keeper])
    assert (tmp_path / "last.ckpt").is_symlink()
    found = content(tmp_path / "last.ckpt")
    assert {key.section for key in found["tensors"]} == {"model"}
    module = Mixed()
    trainer("auto", plugins=[lss.UniversalCheckpointIO()]).validate(
        module, loader(), ckpt_path=str(tmp_path / "last.ckpt")
    )
    assert_same_weights(module, trained("auto", 2))


def test_an_old_name_is_renamed_on_load_without_reading_anything(tmp_path, monkeypatch):
    class Renamed(Mixed):
        def __init__(self):
            super().__init__()
            self.body = self.net
            del self.net

        def loss(self, batch):
            return self.body(batch[0]).sum()

        def on_load_checkpoint(self, checkpoint):
            weights = checkpoint["state_dict"]
            for name in [name for name in weights if name.startswith("net.")]:
                weights[name.replace("net.", "body.", 1)] = weights.pop(name)
            assert weights["body.0.weight"].shape == (33, 17)
            assert read == []

    path = saved(tmp_path)
    read = []
    reading = SavedState.read
    monkeypatch.setattr(
        SavedState, "read", lambda self, requests: read.append(len(requests)) or reading(self, requests)
    )
    module = Renamed()
    trainer("superscale", plugins=[lss.UniversalCheckpointIO()]).validate(module, loader(), ckpt_path=path)
    assert torch.equal(module.body[0].weight, trained("auto", 2).net[0].weight)
    assert len(read) == 1  # weights, and no optimizer state


@pytest.mark.parametrize("strategy", ENGINES)
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_changes(tmp_path, strategy):
    class Wider(Mixed):
        def __init__(self):
            super().__init__()
            self.few = nn.Parameter(torch.zeros(2, 4))
            self.extra = nn.Linear(2, 2)

    path = saved(tmp_path)
    module = Wider()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        run(module, strategy, path)
    said = str(caught.value)
    assert "it lacks extra.bias, extra.weight" in said
    assert "few is (2, 3) there and (2, 4) here" in said
    assert "nothing was changed" in said
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_what_may_be_missing_is_named(tmp_path):
    class Longer(Mixed):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(2, 2)

    path = saved(tmp_path)
    module = Longer()
    runner = trainer("superscale", plugins=[lss.UniversalCheckpointIO({"allow": ["extra.*"]})])
    runner.validate(module, loader(), ckpt_path=path)
    assert torch.equal(module.net[0].weight, trained("auto", 2).net[0].weight)


@pytest.mark.parametrize("strategy", ENGINES)
def test_other_parameter_groups_are_refused(tmp_path, strategy):
    class Regrouped(Mixed):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    with pytest.raises(CheckpointError, match=r"parameter groups of AdamW differ: \[2, 8, 3\] parameters in the"):
        run(Regrouped(), strategy, saved(tmp_path))


class Large(Mixed):
    """With a weight of more than one block."""

    def __init__(self):
        super().__init__()
        self.large = nn.Parameter(torch.zeros(600, 600))

    def loss(self, batch):
        return super().loss(batch) + self.large.mean()

    def configure_optimizers(self):
        configured = super().configure_optimizers()
        configured["optimizer"].param_groups[0]["params"].append(self.large)
        return configured


@pytest.mark.parametrize("strategy", ENGINES)
def test_a_flipped_byte_of_an_optimizer_state_is_named_and_the_model_untouched(tmp_path, strategy):
    """States are read when weights have been loaded already."""
    path = saved(tmp_path, Large())
    key = TensorKey("optimizer.0", "large", "exp_avg_sq")
    [piece] = open_checkpoint(path).manifest.tensors[key].chunks
    data = Path(path, piece.file)
    damaged = bytearray(data.read_bytes())
    damaged[piece.start + 2**20] ^= 1
    data.write_bytes(damaged)
    module = Large()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(CheckpointError, match="large .exp_avg_sq"):
        run(module, strategy, path)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_what_cannot_be_saved_is_named_before_anything_is_written(tmp_path):
    class Stateful(L.Callback):
        def state_dict(self):
            return {"kept": [1, {"bad": object()}]}

    with pytest.raises(CheckpointError, match="Stateful.*kept"):
        run(Mixed(), callbacks=[Stateful()]).save_checkpoint(tmp_path / "x.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_in_the_background_is_heard_of(tmp_path):
    runner = run(Mixed(), checkpoint={"asynchronous": True})
    target = tmp_path / "folder"
    target.write_text("in the way")
    runner.save_checkpoint(target / "x.ckpt")
    with pytest.raises(CheckpointError, match="earlier save failed"):
        runner.strategy.checkpoint_io.wait()


def test_training_ends_at_the_step_after_a_save_that_failed(tmp_path):
    class Saves(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 2:
                trainer.save_checkpoint(target / "x.ckpt")
                trainer.strategy.checkpoint_io._saver._thread.join()

    target = tmp_path / "folder"
    target.write_text("in the way")
    module = Mixed()
    for strategy in ("auto", "superoffload"):
        with pytest.raises(CheckpointError, match="earlier save failed"):
            run(module, strategy, checkpoint={"asynchronous": True}, callbacks=[Saves()], max_steps=9)
        assert module.trainer.global_step == 2


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_checkpoints_go_to_any_file_system_that_fsspec_reaches():
    path = "memory://runs/one.ckpt"
    keeper = ModelCheckpoint("memory://runs/kept", save_last=True, save_top_k=1, monitor="val_loss")
    run(Mixed(), "superoffload", enable_checkpointing=True, callbacks=[keeper]).save_checkpoint(path)
    for name in (path, "memory://runs/kept/last.ckpt", keeper.best_model_path):
        module = Mixed()
        run(module, "superscale", name, max_epochs=4)
        assert_same_weights(module, trained("superscale", 4))


def test_a_strategy_that_would_write_past_it_is_refused_at_the_start():
    class Own(SingleDeviceStrategy):
        def save_checkpoint(self, checkpoint, filepath, storage_options=None):
            raise AssertionError("never asked")

    with pytest.raises(CheckpointError, match=r"Own writes checkpoints by itself \(Own.save_checkpoint\)"):
        run(Mixed(), Own(torch.device("cpu"), accelerator=L.pytorch.accelerators.CPUAccelerator()), accelerator="auto")


def test_an_unbound_io_refuses_to_write():
    with pytest.raises(CheckpointError, match="not bound to"):
        lss.UniversalCheckpointIO().save_checkpoint({}, "x.ckpt")


def test_lightnings_own_files_are_read(tmp_path):
    runner = trainer("auto")
    runner.fit(Mixed(), loader(), loader())
    runner.save_checkpoint(tmp_path / "plain.ckpt")
    for strategy in ENGINES:
        module = Mixed()
        run(module, strategy, str(tmp_path / "plain.ckpt"), max_epochs=4)
        assert_same_weights(module, trained(strategy, 4))


def weights_alone(folder: Path) -> dict[str, str]:
    """The weights of two epochs, and nothing else of the run, by kind of checkpoint."""
    module, paths = trained("auto", 2), {}
    paths["state_dict"] = str(folder / "weights.pt")
    torch.save(module.state_dict(), paths["state_dict"])
    paths["safetensors"] = str(folder / "model.safetensors")
    save_model(module, paths["safetensors"])
    paths["universal"] = str(folder / "universal.ckpt")
    run(Mixed()).save_checkpoint(paths["universal"], weights_only=True)
    return paths


@pytest.mark.parametrize("strategy", ENGINES)
def test_weights_alone_are_no_run_to_go_on_with(tmp_path, strategy):
    for path in weights_alone(tmp_path).values():
        module = Mixed()
        before = {name: value.clone() for name, value in module.state_dict().items()}
        with pytest.raises(CheckpointError) as caught:
            run(module, strategy, path)
        assert "has weights, but no optimizer_states" in str(caught.value)
        assert "load_from_checkpoint" in str(caught.value)
        assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_weights_alone_are_validated_and_built_from(tmp_path):
    expected = trained("auto", 2)
    for kind, path in weights_alone(tmp_path).items():
        module = Mixed()
        # A .safetensors file has one name of two that are tied.
        plugins = [lss.UniversalCheckpointIO({"allow": ["again.*", "head.*"]})]
        trainer("superoffload", plugins=plugins).validate(module, loader(), ckpt_path=path)
        assert_same_weights(module, expected)
        if kind != "safetensors":
            assert_same_weights(lss.load_from_checkpoint(Mixed, path), expected)


def test_a_file_without_weights_is_refused_before_anything_changes(tmp_path):
    torch.save({"step": 3}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match='has no "state_dict" of a module, and is not one itself'):
        run(Mixed(), "superoffload", str(tmp_path / "x.pt"))


def test_a_hook_may_give_a_run_what_weights_alone_lack(tmp_path):
    class Begins(Mixed):
        def on_load_checkpoint(self, checkpoint):
            checkpoint.setdefault("optimizer_states", [])
            checkpoint.setdefault("lr_schedulers", [])

    module = Begins()
    run(module, "superoffload", weights_alone(tmp_path)["state_dict"], max_steps=1)
    assert not torch.equal(module.net[0].weight, trained("auto", 2).net[0].weight)


@pytest.mark.parametrize("strategy", ["superscale", "superoffload"])
def test_formats_that_lightnings_io_cannot_read_are_named_without_ours(tmp_path, strategy):
    paths = weights_alone(tmp_path)
    for kind, found in (("universal", "universal checkpoint"), ("safetensors", "safetensors")):
        with pytest.raises(CheckpointError, match=rf"another format \({found}\).*UniversalCheckpointIO"):
            trainer(strategy).fit(Mixed(), loader(), ckpt_path=paths[kind])
    with pytest.raises(CheckpointError, match="has weights, but no optimizer_states"):
        trainer(strategy).fit(Mixed(), loader(), ckpt_path=paths["state_dict"])


def test_masters_survive_a_change_of_precision(tmp_path):
    """bf16 weights have fp32 masters in the checkpoint, and an fp32 run takes those."""
    path = saved(tmp_path, strategy="superoffload", precision="bf16-true")
    masters = {key.name: t for key, t in content(path)["tensors"].items() if key.state == "master_param"}
    module = Mixed()
    trainer("auto", plugins=[lss.UniversalCheckpointIO()]).validate(module, loader(), ckpt_path=path)
    weights = dict(module.named_parameters())
    assert masters
    assert all(torch.equal(weights[name], master) for name, master in masters.items())
    assert not torch.equal(weights["net.0.weight"].bfloat16().float(), weights["net.0.weight"])


def test_a_module_is_built_from_any_checkpoint(tmp_path):
    class Sized(Mixed):
        def __init__(self, width: int = 3, name: str = "x"):
            super().__init__()
            self.save_hyperparameters()
            self.sized = nn.Linear(width, 1)

        def loss(self, batch):
            return super().loss(batch) + self.sized.weight.sum()

    module = Sized(width=7)
    path = saved(tmp_path, module, "superoffload")
    built = lss.load_from_checkpoint(Sized, path)
    assert built.hparams.width == 7
    assert_same_weights(built, module)
    assert lss.load_from_checkpoint(Sized, path, hparams={"name": "y"}).hparams.name == "y"
    with pytest.raises(CheckpointError, match="no LightningModule"):
        lss.load_from_checkpoint(nn.Linear, path)


@pytest.mark.parametrize(
    "hparams", [OmegaConf.create({"a": 1, "b": {"c": "${a}"}}), Namespace(x=1), {"q": [2.5, (1, "x")]}]
)
def test_hyperparameters_of_every_kind_come_back(tmp_path, hparams):
    class Configured(Mixed):
        def __init__(self, conf):
            super().__init__()
            self.save_hyperparameters(conf)

    path = saved(tmp_path, Configured(hparams))
    expected = Configured(hparams).hparams
    built = lss.load_from_checkpoint(Configured, path)
    assert type(built.hparams) is type(expected)
    assert built.hparams == expected
    run(Configured(hparams), "superoffload", path, max_epochs=3)


def test_it_is_chosen_by_the_strategy_or_in_yaml(tmp_path, monkeypatch):
    strategy = lss.SuperScaleStrategy(checkpoint={"asynchronous": True})
    assert isinstance(strategy.checkpoint_io, lss.UniversalCheckpointIO)
    assert strategy.checkpoint_io.config == lss.CheckpointConfig(asynchronous=True)
    with pytest.raises(SuperScaleError, match="either checkpoint"):
        lss.SuperScaleStrategy(checkpoint={}, checkpoint_io=lss.UniversalCheckpointIO())
    with pytest.raises(SuperScaleError, match="checkpoint has no key 'asynchronus'"):
        lss.UniversalCheckpointIO({"asynchronus": True})
    (tmp_path / "run.yaml").write_text(
        "trainer:\n  accelerator: cpu\n  max_steps: 1\n  logger: false\n  enable_checkpointing: false\n"
        "  plugins:\n  - class_path: lightning_superscale.UniversalCheckpointIO\n"
        "    init_args: {config: {asynchronous: false, allow: [head.*]}}\n"
    )
    monkeypatch.setattr(sys, "argv", ["run", "--config", str(tmp_path / "run.yaml")])
    cli = LightningCLI(Regressor, run=False, save_config_callback=None, seed_everything_default=False)
    assert cli.trainer.strategy.checkpoint_io.config.allow == ("head.*",)


def test_lightning_binds_it_without_an_import_of_ours(tmp_path):
    """The installed package's entry point does; nobody names the callback."""
    script = (
        "import torch, lightning as L\n"
        "from lightning.pytorch.demos.boring_classes import BoringModel\n"
        "from lightning_superscale import UniversalCheckpointIO\n"
        "t = L.Trainer(plugins=[UniversalCheckpointIO()], accelerator='cpu', max_steps=1, logger=False,\n"
        "    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)\n"
        "t.fit(BoringModel())\n"
        "assert type(t.strategy).__name__ == 'UniversalSingleDeviceStrategy', type(t.strategy)\n"
        "t.save_checkpoint('x.ckpt')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "x.ckpt" / "MANIFEST.json").exists()


@pytest.mark.parametrize("callbacks", [binder.lightning_callbacks, binder.pytorch_lightning_callbacks])
def test_every_trainer_can_still_be_sent_to_spawned_ranks(callbacks):
    io = lss.UniversalCheckpointIO()
    [made] = callbacks()
    assert isinstance(io, lss.UniversalCheckpointIO)  # it lives until here
    sent = pickle.loads(pickle.dumps(made))
    assert [base.__qualname__ for base in type(sent).__mro__] == [base.__qualname__ for base in type(made).__mro__]
    assert type(sent).__mro__[2:] == type(made).__mro__[2:]


TRAINER = (
    "import logging, lightning as L\n"
    "logging.getLogger('lightning').setLevel(logging.INFO)\n"
    "{}\n"
    "t = L.Trainer(accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False{})\n"
    "print([type(one).__name__ for one in t.callbacks])\n"
)


@pytest.mark.parametrize(
    ("before", "plugins", "is_bound"),
    [
        ("", "", False),
        ("import lightning_superscale", ", strategy='superoffload'", False),
        ("from lightning_superscale import UniversalCheckpointIO", ", plugins=[UniversalCheckpointIO()]", True),
    ],
    ids=["not ours", "our strategy", "our checkpoint IO"],
)
def test_only_a_trainer_that_needs_it_is_given_the_callback(before, plugins, is_bound, tmp_path):
    script = TRAINER.format(before, plugins)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert ("CheckpointBinder" in done.stdout) is is_bound
    assert ("lightning_superscale" in done.stderr) is is_bound  # Lightning's line about added callbacks


def test_a_broken_package_breaks_no_trainer(monkeypatch):
    io = lss.UniversalCheckpointIO()

    def broken(name):
        raise ImportError("no kernel")

    monkeypatch.setattr(binder.importlib, "import_module", broken)
    for callbacks in (binder.lightning_callbacks, binder.pytorch_lightning_callbacks):
        with pytest.warns(UserWarning, match="could not be imported .ImportError: no kernel."):
            assert callbacks() == []
    assert io is not None  # it lives until here
