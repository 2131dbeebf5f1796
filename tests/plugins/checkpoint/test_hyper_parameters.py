"""Nothing that a checkpoint's hyperparameters name is imported or called, unless the caller listed it."""

from __future__ import annotations

import calendar
import json
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, Union

import lightning as L
import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.cli import LightningCLI
from omegaconf import OmegaConf
from torch import nn

import lightning_superscale as lss
from lightning_superscale.checkpoint.save.writer import save
from lightning_superscale.checkpoint.state import LocalShard, LocalState, TensorInfo, TensorKey
from lightning_superscale.comm.mesh import single_mesh
from lightning_superscale.errors import CheckpointError
from lightning_superscale.layout.box import whole_box
from lightning_superscale.run.state.restore import open_any
from tests.helpers.trainers import loader, trainer
from tests.helpers.universal import Mixed

FIXTURES = Path(__file__).parents[2] / "checkpoint/foreign/fixtures/deepspeed"
CLI = "lightning.pytorch.cli.instantiate_module"


class Typed(L.LightningModule):
    """A parameter of every kind that strings and mappings mean something else for."""

    def __init__(
        self,
        name: str = "x",
        names: Optional[list[Union[str, Path]]] = None,
        anything: Any = None,
        untyped=None,
        function: Optional[Callable] = None,
        kind: Optional[type] = None,
        of_class: Union[calendar.Calendar, None] = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(2, 2)


class Other(Typed):
    pass


class DataModule(L.LightningDataModule):
    def __init__(self, anything: Any = None) -> None:
        super().__init__()
        self.anything = anything


@pytest.fixture(params=["ours", "lightning", "lightning-sharded", "deepspeed"])
def written(request, tmp_path, monkeypatch):
    """A function that writes hyperparameters into a checkpoint of a format, and returns its path."""
    weights = {f"net.{name}": tensor for name, tensor in nn.Linear(2, 2).state_dict().items()}

    def write(checkpoint: dict[str, Any]) -> Path:
        path = tmp_path / "a.ckpt"
        beside = {"pytorch-lightning_version": "2.6.0", "global_step": 1, "epoch": 0, **checkpoint}
        if request.param == "ours":
            keys = {TensorKey("model", name): tensor for name, tensor in weights.items()}
            infos = {key: TensorInfo(t.dtype, tuple(t.shape), "model") for key, t in keys.items()}
            shards = {key: (LocalShard(whole_box(tuple(t.shape)), t),) for key, t in keys.items()}
            save(str(path), LocalState(infos, shards, (), {}, beside), single_mesh())
        elif request.param == "lightning":
            torch.save({**beside, "state_dict": weights}, path)
        elif request.param == "lightning-sharded":
            monkeypatch.setattr(warnings, "warn", lambda *args, **kwargs: None)  # that there is one process
            dcp.save({"state_dict": weights}, checkpoint_id=path, no_dist=True)
            torch.save(beside, path / "meta.pt")
        else:
            with zipfile.ZipFile(FIXTURES / "zero1.zip") as archive:
                archive.extractall(path)
            for file in path.rglob("*_model_states.pt"):
                torch.save({**torch.load(file, weights_only=True), **beside}, file)
        return path

    return write


@pytest.fixture
def marked(tmp_path, monkeypatch):
    """A module that lies on the path, whose code leaves a file; yields that file."""
    mark = tmp_path / "ran"
    (tmp_path / "lies_on_the_path.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
        "class Evil:\n    pass\ndef call(*args):\n    pathlib.Path(__file__).with_name('called').touch()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield mark
    assert not mark.exists()
    assert "lies_on_the_path" not in sys.modules


EVIL = {"class_path": "lies_on_the_path.Evil"}
NAMED = {
    "an instantiator": {"_instantiator": "lies_on_the_path.call"},
    "an instantiator that is imported": {"_instantiator": "os.system"},
    "no string": {"_instantiator": ["os", "system"]},
    "a class": {"_class_path": "lies_on_the_path.Evil", "_instantiator": CLI},
    "a subclass that the caller did not name": {"_class_path": f"{__name__}.Other", "_instantiator": CLI},
    "any": {"anything": EVIL, "_instantiator": CLI},
    "untyped": {"untyped": EVIL, "_instantiator": CLI},
    "within": {"anything": {"a": [{"b": EVIL}]}, "_instantiator": CLI},
    "as text": {"anything": json.dumps(EVIL), "_instantiator": CLI},
    "as escaped text": {"untyped": '{"class\\u005fpath": "lies_on_the_path.Evil"}', "_instantiator": CLI},
    "a function": {"function": "os.system", "_instantiator": CLI},
    "a function on the path": {"function": "lies_on_the_path.call", "_instantiator": CLI},
    "a type": {"kind": "lies_on_the_path.Evil", "_instantiator": CLI},
    "a class by its short name": {"of_class": "TextCalendar", "_instantiator": CLI},
    "the other distribution's": {"anything": EVIL, "_instantiator": "pytorch_lightning.cli.instantiate_module"},
}


@pytest.mark.parametrize("hparams", NAMED.values(), ids=NAMED)
def test_code_that_hyperparameters_name_is_refused(tmp_path, marked, hparams):
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": Typed().state_dict(), "hyper_parameters": hparams}, path)
    with pytest.raises(CheckpointError, match=r"names .*add_safe_globals"):
        lss.load_from_checkpoint(Typed, path)


@pytest.mark.parametrize("key", ["hyper_parameters", "hparams", "module_arguments"])
def test_in_every_format_and_under_every_key(written, marked, key):
    path = written({key: {"anything": EVIL, "_instantiator": CLI}})
    assert open_any(str(path))[key]["anything"] == EVIL  # reading it runs nothing
    with pytest.raises(CheckpointError, match=rf"{key}/anything/class_path names 'lies_on_the_path.Evil'"):
        lss.load_from_checkpoint(Typed, path)


def test_data_modules_and_containers(tmp_path, marked):
    path = tmp_path / "a.ckpt"
    torch.save({"datamodule_hyper_parameters": {"anything": EVIL, "_instantiator": CLI}}, path)
    with pytest.raises(CheckpointError, match="anything/class_path names 'lies_on_the_path.Evil'"):
        lss.load_from_checkpoint(DataModule, path)
    torch.save({"hyper_parameters": {"name": "y"}, "hparams_type": torch._utils._rebuild_tensor_v2}, path)
    with pytest.raises(CheckpointError, match="the type of its hyperparameters names 'torch._utils"):
        lss.load_from_checkpoint(Typed, path)
    config = OmegaConf.create({"anything": {"a": [EVIL]}, "_instantiator": CLI})
    key = TensorKey("model", "x")
    shard = LocalShard(whole_box((1,)), torch.ones(1))
    info = TensorInfo(torch.float32, (1,), "model")
    save(
        str(tmp_path / "b"),
        LocalState({key: info}, {key: (shard,)}, (), {}, {"hyper_parameters": config}),
        single_mesh(),
    )
    with pytest.raises(CheckpointError, match=r"a\[0\]/class_path names 'lies_on_the_path.Evil'"):
        lss.load_from_checkpoint(Typed, tmp_path / "b")


def test_what_the_caller_listed_or_passes_is_built(tmp_path):
    path = tmp_path / "a.ckpt"
    calendars = {"class_path": "calendar.Calendar", "init_args": {"firstweekday": 1}}
    hparams = {"anything": calendars, "function": "os.system", "name": "os.system", "names": ["a.b", "sys.path"]}
    torch.save({"state_dict": Typed().state_dict(), "hyper_parameters": {**hparams, "_instantiator": CLI}}, path)
    with torch.serialization.safe_globals([calendar.Calendar]):
        with pytest.raises(CheckpointError, match="function names 'os.system'"):
            lss.load_from_checkpoint(Typed, path)
        built = lss.load_from_checkpoint(Typed, path, hparams={"function": None})
    assert built.hparams.anything.firstweekday == 1
    assert built.hparams.name == "os.system"  # of a string, a string
    as_they_are = lss.load_from_checkpoint(Typed, path, hparams={"_instantiator": None})
    assert as_they_are.hparams.anything == calendars
    torch.save(
        {"state_dict": Typed().state_dict(), "hyper_parameters": {"function": "os.system", "anything": EVIL}}, path
    )
    assert lss.load_from_checkpoint(Typed, path).hparams.anything == EVIL  # nothing would import it


class Configured(Mixed):
    def __init__(self, name: str = "x", width: int = 3, when: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_a_checkpoint_of_lightning_cli_builds_its_own_class(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train"])
    for subclass in ("", "model."):
        head = ["--model", f"{__name__}.Configured"] if subclass else []
        args = [*head, "--model.width", "7", "--model.name", "os.path"]
        cli = LightningCLI(
            L.LightningModule if subclass else Configured,
            subclass_mode_model=bool(subclass),
            args=args,
            run=False,
            seed_everything_default=False,
            save_config_callback=None,
            trainer_defaults={"logger": False, "enable_checkpointing": False, "accelerator": "cpu"},
        )
        runner = trainer("auto", plugins=[lss.UniversalCheckpointIO()])
        runner.fit(cli.model, loader())
        path = tmp_path / f"{subclass}ckpt"
        runner.save_checkpoint(path)
        built = lss.load_from_checkpoint(Configured, path)
        assert (type(built), built.hparams.width, built.hparams.name) == (Configured, 7, "os.path")
