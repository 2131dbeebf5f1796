"""What is exported reads back as the same state, and where another tool is here, loads there."""

import copy
import json
import os

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch.utils.data import DataLoader

from lightning_superscale.checkpoint.foreign.deepspeed_export import export_deepspeed_universal
from lightning_superscale.checkpoint.foreign.hf_export import export_hf
from lightning_superscale.checkpoint.foreign.lightning_export import export_lightning
from lightning_superscale.checkpoint.foreign.registry import detect, open_foreign
from lightning_superscale.checkpoint.foreign.torch_optimizer import parameter_names
from lightning_superscale.checkpoint.state import MODEL, TensorKey, optimizer_section
from lightning_superscale.errors import CheckpointError
from tests.checkpoint.foreign.test_lightning import Tied, fit
from tests.helpers.foreign import read_all, truth, unpack

CASES = ["zero1", "zero2", "zero2-cpu-adam", "zero3", "zero3-fp32", "zero3/universal"]
NAMES = [["embed.weight", "inner.weight", "inner.bias", "norm.weight", "norm.bias"]]


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    name, _, kind = request.param.partition("/")
    return open_foreign(unpack(name, tmp_path) / kind)


def equal(one, other):
    found, wanted = read_all(one), read_all(other)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), str(key)
    assert one.aliases == other.aliases
    assert one.step == other.step
    assert [record.names for record in one.optimizers] == [record.names for record in other.optimizers]
    assert [record.groups for record in one.optimizers] == [record.groups for record in other.optimizers]


def test_lightning_file_is_the_same_state(case, tmp_path):
    export_lightning(case, tmp_path / "out.ckpt")
    back = open_foreign(tmp_path / "out.ckpt", NAMES)
    equal(open_foreign(tmp_path / "out.ckpt"), case)  # the names are in the file, too
    assert detect(tmp_path / "out.ckpt") == "lightning"
    equal(back, case)
    for key, value in case.rest.items():
        assert back.rest[key] == value
    assert sorted(os.listdir(tmp_path)) == sorted(["out.ckpt", *(p.name for p in tmp_path.iterdir() if p.is_dir())])
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("dialect", ["zero12", "zero3"])
@pytest.mark.parametrize("optimizer", ["torch", "deepspeed"])
def test_universal_is_the_same_state_in_both_dialects(case, tmp_path, dialect, optimizer):
    export_deepspeed_universal(case, tmp_path / "out", dialect, optimizer=optimizer)
    assert detect(tmp_path / "out") == "deepspeed-universal"
    back = open_foreign(tmp_path / "out")
    equal(back, case)
    assert back.tensors == case.tensors  # roles too
    assert {k: v for k, v in back.rest.items() if k != "deepspeed"} == {
        k: v for k, v in case.rest.items() if k != "deepspeed"
    }


def test_weights_are_the_same_as_safetensors(case, tmp_path):
    export_hf(case, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    wanted = {key.name: value for key, value in read_all(case).items() if key.section == MODEL}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in wanted.items())
    back = open_foreign(tmp_path / "out")
    assert back.aliases == case.aliases
    assert back.optimizers == ()


@pytest.mark.parametrize("max_bytes", [1, 150, 300])
def test_shards_hold_no_more_than_they_may(case, tmp_path, max_bytes):
    export_hf(case, tmp_path / "out", max_shard_bytes=max_bytes)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert set(index["weight_map"].values()) == set(files)
    total = 0
    for file in files:
        sizes = [t.numel() * t.itemsize for t in load_file(tmp_path / "out" / file).values()]
        assert sum(sizes) <= max_bytes or len(sizes) == 1
        total += sum(sizes)
    assert index["metadata"]["total_size"] == total
    back = open_foreign(tmp_path / "out")
    assert back.aliases == case.aliases
    wanted = {key: value for key, value in read_all(case).items() if key.section == MODEL}
    found = read_all(back)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


def test_a_module_loads_what_was_exported_and_prefixes_go(tmp_path):
    from torch import nn

    path, _ = fit(Tied(), tmp_path)
    export_hf(open_foreign(path, [["mid.bias", "mid.weight"], ["embed.weight"]]), tmp_path / "out")
    fresh = Tied()
    load_model(fresh, tmp_path / "out" / "model.safetensors")
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in fresh.state_dict().items())
    wrapped = nn.ModuleDict({"model": nn.Linear(2, 2)})
    torch.save({"state_dict": wrapped.state_dict()}, tmp_path / "y.ckpt")
    export_hf(open_foreign(tmp_path / "y.ckpt"), tmp_path / "stripped", strip_prefix="model.")
    with safe_open(tmp_path / "stripped" / "model.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["bias", "weight"]
        assert file.metadata() == {"format": "pt"}
    torch.save({"state_dict": {**wrapped.state_dict(), "bias": torch.zeros(1)}}, tmp_path / "z.ckpt")
    with pytest.raises(CheckpointError, match="are both 'bias'"):
        export_hf(open_foreign(tmp_path / "z.ckpt"), tmp_path / "clash", strip_prefix="model.")


def test_every_dtype_survives(tmp_path):
    state = {str(d): torch.zeros(3, 2).to(d) for d in (torch.float64, torch.bfloat16, torch.float8_e5m2, torch.int8)}
    state |= {"bool": torch.tensor([True, False]), "scalar": torch.tensor(3), "none": torch.zeros(0, 4)}
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    source = open_foreign(tmp_path / "x.ckpt")
    export_hf(source, tmp_path / "out")
    export_lightning(source, tmp_path / "out.ckpt")
    for back in (load_file(tmp_path / "out" / "model.safetensors"), torch.load(tmp_path / "out.ckpt")["state_dict"]):
        assert back.keys() == state.keys()
        assert all(back[name].dtype == value.dtype and back[name].shape == value.shape for name, value in state.items())
    torch.save({"state_dict": {"x": torch.zeros(2, dtype=torch.complex128)}}, tmp_path / "y.ckpt")
    with pytest.raises(CheckpointError, match="complex128, which safetensors does not have"):
        export_hf(open_foreign(tmp_path / "y.ckpt"), tmp_path / "other")


def test_what_a_module_saves_beside_tensors_comes_back(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(2), "_extra_state": {"a": 1}}}, tmp_path / "x.ckpt")
    source = open_foreign(tmp_path / "x.ckpt")
    assert source.rest == {"extra_state": {"_extra_state": {"a": 1}}}
    export_lightning(source, tmp_path / "out.ckpt")
    assert torch.load(tmp_path / "out.ckpt")["state_dict"]["_extra_state"] == {"a": 1}
    assert "extra_state" not in torch.load(tmp_path / "out.ckpt")


# A plain Trainer


def resume(path, folder, max_steps):
    torch.manual_seed(0)
    module = Tied(num_optimizers=1)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=max_steps, logger=False, enable_checkpointing=False,
        default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = torch.randint(0, 6, (8, 2), generator=torch.Generator().manual_seed(3))
    trainer.fit(module, DataLoader(data, batch_size=2), ckpt_path=path)
    return module, trainer


def test_a_plain_trainer_continues_as_from_its_own_file(tmp_path):
    module, trainer = resume(None, tmp_path, 4)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    whole, _ = resume(tmp_path / "x.ckpt", tmp_path, 8)
    source = open_foreign(tmp_path / "x.ckpt", parameter_names(module, trainer.optimizers))
    export_lightning(source, tmp_path / "one.ckpt")
    export_deepspeed_universal(source, tmp_path / "two", "zero12")
    export_deepspeed_universal(open_foreign(tmp_path / "two"), tmp_path / "three", "zero3")
    export_lightning(open_foreign(tmp_path / "three"), tmp_path / "four.ckpt")
    for name in ("one.ckpt", "four.ckpt"):
        again, _ = resume(tmp_path / name, tmp_path, 8)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
        assert again.seen == whole.seen == 8
        assert not torch.equal(again.mid.weight, module.mid.weight)


def test_a_plain_trainer_starts_from_a_state_that_was_not_lightnings(tmp_path):
    """DeepSpeed alone saves neither loops nor Lightning's version."""
    from lightning.pytorch import LightningModule

    from tests.peers.deepspeed_ranks import Tiny, groups

    class Wrapped(Tiny, LightningModule):
        def training_step(self, batch, batch_idx):
            return self(batch)

        def configure_optimizers(self):
            return torch.optim.AdamW(groups(self))

    folder = unpack("zero1", tmp_path)
    source, held = open_foreign(folder), truth(folder)
    export_lightning(source, tmp_path / "out.ckpt")
    module = Wrapped()
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=4, logger=False, enable_checkpointing=False, precision="bf16-true",
        default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    seen = {}
    module.on_train_start = lambda: seen.update(
        {name: value.clone() for name, value in module.state_dict().items()},
        step=trainer.global_step, moments=copy.deepcopy(trainer.optimizers[0].state_dict()["state"]),
        rates=[group["lr"] for group in trainer.optimizers[0].param_groups],
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.randint(0, 11, (2, 6)), batch_size=2), ckpt_path=tmp_path / "out.ckpt")
    assert seen["step"] == 3
    assert seen["rates"] == [held["group/0/lr"], held["group/1/lr"]]
    for label, value in held.items():
        kind, _, name = label.partition("/")
        if kind in ("model", "buffer"):
            assert torch.equal(seen[name], value.to(seen[name].dtype))  # precision casts float buffers
    for number, name in enumerate(NAMES[0]):
        assert torch.equal(seen["moments"][number]["exp_avg"], held[f"exp_avg/{name}"].bfloat16())


# What can't be said, and what goes wrong


def test_deepspeed_is_not_given_what_it_can_not_hold(tmp_path):
    path, trainer = fit(Tied(), tmp_path)
    with pytest.raises(CheckpointError, match="has 2 optimizers, DeepSpeed has one"):
        export_deepspeed_universal(open_foreign(path, parameter_names(trainer.lightning_module, trainer.optimizers)),
                                   tmp_path / "out", "zero12")  # fmt: skip
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["optimizer_states"] = checkpoint["optimizer_states"][1:]  # SGD
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match="momentum_buffer.*knows Adam's"):
        export_deepspeed_universal(open_foreign(path, [["embed.weight"]]), tmp_path / "out", "zero12")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("parameter", "dialect", "is_refused"), [(1, "zero12", True), (4, "zero3", True)])
def test_different_steps_are_refused(tmp_path, parameter, dialect, is_refused):
    source = open_foreign(unpack("zero2", tmp_path))
    export_lightning(source, tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt")
    for number in range(parameter, 5 if parameter == 1 else parameter + 1):
        checkpoint["optimizer_states"][0]["state"][number]["step"] += 1
    torch.save(checkpoint, tmp_path / "y.ckpt")
    with pytest.raises(CheckpointError, match="different numbers of steps"):
        export_deepspeed_universal(open_foreign(tmp_path / "y.ckpt", NAMES), tmp_path / "out", dialect)
    del checkpoint["optimizer_states"][0]["state"][2]
    torch.save(checkpoint, tmp_path / "z.ckpt")
    with pytest.raises(CheckpointError, match=r"no Adam states of \['inner.bias'\]"):
        export_deepspeed_universal(open_foreign(tmp_path / "z.ckpt", NAMES), tmp_path / "out", dialect)


def test_stage_3s_first_group_has_no_options_that_deepspeed_would_give_to_all(tmp_path):
    source = open_foreign(unpack("zero3", tmp_path))
    export_deepspeed_universal(source, tmp_path / "out", "zero3")
    saved = torch.load(tmp_path / "out" / "universal" / "zero" / "optimizer_state.pt", weights_only=True)
    first = saved["optimizer_state_dict"]["param_groups"][0]
    assert "lr" not in first
    assert "weight_decay" not in first
    assert first["betas"] == (0.9, 0.999)


EXPORTS = {
    "ckpt": export_lightning,
    "hf": export_hf,
    "universal": lambda source, path: export_deepspeed_universal(source, path, "zero12"),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_what_is_there_stays(tmp_path, name):
    source = open_foreign(unpack("zero2", tmp_path))
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CheckpointError, match="out exists already"):
        EXPORTS[name](source, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_that_fails_leaves_nothing(tmp_path, name, monkeypatch):
    source = open_foreign(unpack("zero2", tmp_path))
    before = sorted(os.listdir(tmp_path))
    reads = []
    original = type(source).read

    def failing(self, requests):
        reads.append(requests)
        if len(reads) > 8:
            raise OSError(28, "No space left on device")
        original(self, requests)

    monkeypatch.setattr(type(source), "read", failing)
    with pytest.raises(OSError, match="No space"):
        EXPORTS[name](source, tmp_path / "out")
    assert len(reads) == 9
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("name", EXPORTS)
def test_the_target_appears_whole(tmp_path, name, monkeypatch):
    source = open_foreign(unpack("zero2", tmp_path))
    seen = []
    original = type(source).read

    def watching(self, requests):
        seen.append((tmp_path / "target").exists())
        assert not [entry for entry in os.listdir(tmp_path) if "target" in entry]  # not even as a part of a name
        original(self, requests)

    monkeypatch.setattr(type(source), "read", watching)
    EXPORTS[name](source, tmp_path / "target")
    assert seen
    assert not any(seen)
    assert (tmp_path / "target").exists()


def test_sections_are_those_of_the_vocabulary(tmp_path):
    source = open_foreign(unpack("zero3", tmp_path))
    assert {key.section for key in source.tensors} == {MODEL, optimizer_section(0)}
    assert TensorKey(MODEL, "counter") in source.tensors
