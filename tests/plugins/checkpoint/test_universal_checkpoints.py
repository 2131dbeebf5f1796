"""Universal checkpoints under Trainers: any strategy at any number of ranks writes, any other reads, bit for bit."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from torch.distributed.fsdp import fully_shard

import lightning_superscale as lss
from lightning_superscale.errors import CheckpointError
from lightning_superscale.run.state.restore import check_fits
from tests.helpers.extent import IS_ALL, only_in_test_all
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import loader
from tests.helpers.universal import (
    OURS,
    STRATEGIES,
    assert_same_content,
    content,
    differing_after_resume,
    load_and_save,
    train_and_save,
    universal_trainer,
)

WORLDS = (1, 2, 3, 4) if IS_ALL else (1, 3)
LIMIT_S = 600 if IS_ALL else 240


def everywhere(folder, worlds, precision, names):
    """A checkpoint of every strategy at every number of ranks; two that follow each other hold other values."""
    for world_size in worlds:
        run_ranks(world_size, train_and_save, names, str(folder), precision, world_size, limit_s=LIMIT_S)
    return [f"{folder}/{name}-{world_size}.ckpt" for name in names for world_size in worlds]


def pairs_for(world_size, written, names):
    """What is read at this number of ranks: everything by everyone, or by each reader one of them."""
    if IS_ALL:
        return list(itertools.product(written, names))
    start = world_size
    return [(written[(start + 5 * i) % len(written)], names[i % len(names)]) for i in range(len(names))]


@pytest.mark.slow
@pytest.mark.timeout(3000 if IS_ALL else 240)
@pytest.mark.parametrize(
    ("precision", "names"),
    [("32-true", list(STRATEGIES)), pytest.param("bf16-true", OURS, marks=only_in_test_all)],
)
def test_what_any_strategy_writes_any_other_reads_at_any_number_of_ranks(tmp_path, precision, names):
    worlds = WORLDS if precision == "32-true" or IS_ALL else (1, 2)
    written = everywhere(tmp_path, worlds, precision, names)
    expected = {path: content(path) for path in written}
    for found in expected.values():
        states = {key.state for key in found["tensors"]}
        assert {"exp_avg", "exp_avg_sq", "step"} <= states
        assert ("master_param" in states) == (precision == "bf16-true")
        assert found["aliases"] == {"again.weight": "head.weight"}
        roles = {info.role for info in found["infos"].values()}
        assert {"model", "buffer", "state", "scalar"} <= roles
    for world_size in worlds:
        pairs = pairs_for(world_size, written, names)
        run_ranks(world_size, load_and_save, pairs, str(tmp_path), precision, limit_s=LIMIT_S)
        for path, name in pairs:
            stem = os.path.basename(path).removesuffix(".ckpt")
            found = content(tmp_path / f"{stem}--{name}-{world_size}.ckpt")
            assert_same_content(found, expected[path], name=f"{stem} read by {name} at {world_size}")


def test_one_state_is_one_checkpoint_whatever_wrote_it(tmp_path):
    """Ranks that hold the same values write the same ones: stages differ in who holds what, not in what there is."""
    run_ranks(2, train_and_save, ["ddp", "zero1", "zero2", "zero3", "superoffload"], str(tmp_path), limit_s=120)
    first = content(tmp_path / "ddp-2.ckpt")
    for name in ("zero1", "zero2", "zero3", "superoffload"):
        found = content(tmp_path / f"{name}-2.ckpt")
        assert found["tensors"].keys() == first["tensors"].keys()
        for key, tensor in first["tensors"].items():
            if "running" not in key.name:
                assert torch.equal(found["tensors"][key], tensor), f"{name}: {key}"


@pytest.mark.slow
def test_a_run_that_goes_on_ends_as_one_that_never_stopped(tmp_path):
    assert run_ranks(2, differing_after_resume, list(STRATEGIES), str(tmp_path), limit_s=240) == [[], []]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the first steps overflow
@pytest.mark.parametrize("precision", ["16-mixed", "16-true"])
def test_the_loss_scale_goes_on_too(tmp_path, precision):
    """Some steps overflow, so the scale that a run ends with is another than that it begins with."""

    def plugin():
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)
        return lss.SuperScalePrecision(precision, scaler=scaler)

    ends = []
    for epochs, ckpt_path in ((4, None), (2, None), (4, str(tmp_path / "half.ckpt"))):
        precise = plugin()
        flags = {"max_epochs": epochs, "plugins": [lss.UniversalCheckpointIO(), precise]}
        run, module = universal_trainer("superoffload", 1, **flags)
        run.fit(module, loader(), ckpt_path=ckpt_path)
        run.save_checkpoint(tmp_path / "half.ckpt")
        ends.append((module.state_dict(), precise.scaler.state_dict()))
    assert ends[0][1] == ends[2][1]
    assert ends[0][1]["scale"] != 2.0**20
    assert all(torch.equal(ends[0][0][name], weight) for name, weight in ends[2][0].items())


def _misfits_of_sharded_norms(rank, world_size):
    """What is said of a checkpoint that lacks a weight of modules that FSDP2 has sharded, and has run."""
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    said = []
    whole = {name: value.clone() for name, value in module.state_dict().items()}
    for part in module:
        fully_shard(part)
    for _ in range(2):
        lacking = {name: value for name, value in whole.items() if name != "0.weight"}
        try:
            check_fits(module, lacking, module.state_dict(), strict=True, allow=())
            said.append("nothing")
        except CheckpointError as error:
            said.append(str(error))
        for part in module:
            part(torch.ones(2, 4))  # FSDP2 adds hooks of its own
    return said


def test_modules_that_fsdp2_shards_are_checked_too():
    for said in run_ranks(2, _misfits_of_sharded_norms):
        assert len(said) == 2
        assert all("it lacks 0.weight" in one for one in said)
