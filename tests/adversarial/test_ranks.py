"""Ranks that are stopped, die, or do something alone: the others end in time, and say which rank it was and why."""

from __future__ import annotations

import os
import signal

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate

import lightning_superscale as lss
from lightning_superscale.comm import watch
from tests.helpers.ends import ends_of
from tests.helpers.extent import only_in_test_all
from tests.helpers.trainers import Regressor, loader, trainer

PATIENCE_S, APART_S, GRACE_S = 3.0, 2.0, 1.0
# To start and reach the fault, to miss a rank, to end one that is stuck, and to let it leave.
SECONDS = 20.0 + PATIENCE_S + GRACE_S + PATIENCE_S
STRATEGIES = {
    "zero1": {"zero": 1},
    "zero2": {"zero": 2},
    "zero3": {"zero": 3},
    "superoffload": {"zero": 2, "offload": "superoffload"},
}


def fit(rank, world_size, strategy, callback=None, module=None):
    watch._APART_AFTER_S, watch._GRACE_S = APART_S, GRACE_S
    flags = {"devices": world_size, "callbacks": [callback] if callback is not None else []}
    strategy = lss.SuperScaleStrategy(**STRATEGIES[strategy], patience=PATIENCE_S)
    trainer(strategy, **flags).fit(module or Regressor(), loader(64), loader(32))


def send(number):
    os.kill(os.getpid(), number)


class Signals(L.Callback):
    """Sends one rank's process a signal at a hook."""

    def __init__(self, number: int, who: int, hook: str) -> None:
        self.number, self.who, self.hook = number, who, hook

    def _at(self, hook, trainer):
        if hook == self.hook and trainer.global_rank == self.who:
            send(self.number)

    def on_fit_start(self, trainer, pl_module):
        self._at("on_fit_start", trainer)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2:
            self._at("on_train_batch_start", trainer)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self._at("on_before_optimizer_step", trainer)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self._at("on_validation_batch_start", trainer)

    def on_train_end(self, trainer, pl_module):
        self._at("on_train_end", trainer)


def fit_with_signal(rank, world_size, strategy, number, who, hook):
    fit(rank, world_size, strategy, Signals(number, who, hook))


HOOKS = (
    "on_fit_start",
    "on_train_batch_start",
    "on_before_optimizer_step",
    "on_validation_batch_start",
    "on_train_end",
)
STOPS = [
    (strategy, who, hook)
    for strategy in ("zero2", "superoffload", "zero3")
    for who in (0, 1)
    for hook in HOOKS
    if (strategy, who, hook) != ("zero2", 0, "on_train_batch_start")
]


@pytest.mark.parametrize(
    ("strategy", "who", "hook"),
    [
        ("zero2", 0, "on_train_batch_start"),
        *(pytest.param(*stop, marks=only_in_test_all) for stop in STOPS),
    ],
)
def test_a_rank_that_is_stopped_for_good_is_named(strategy, who, hook):
    ends = ends_of(2, fit_with_signal, strategy, signal.SIGSTOP, who, hook)
    assert ends[who].code is None
    other = ends[1 - who]
    assert other.code not in (0, None), other.said
    assert f"rank {who}" in other.said
    assert f"gave no sign of life for {PATIENCE_S:g} s" in other.said
    assert "is stopped by a signal" in other.said
    assert other.seconds < SECONDS


DEATHS = [(strategy, who, hook) for strategy in ("zero2", "superoffload", "zero3") for who in (0, 1) for hook in HOOKS]


@only_in_test_all
@pytest.mark.parametrize(("strategy", "who", "hook"), DEATHS)
def test_a_rank_that_is_killed_is_named(strategy, who, hook):
    ends = ends_of(2, fit_with_signal, strategy, signal.SIGKILL, who, hook)
    assert ends[who].code == -signal.SIGKILL
    other = ends[1 - who]
    assert other.code not in (0, None), other.said
    assert f"rank {who} died: its process" in other.said
    assert "was killed by SIGKILL" in other.said or "is gone" in other.said
    assert other.seconds < SECONDS


PHASES = {
    "before it connects its groups": ("lightning_superscale.run.environment", "build_mesh"),
    "before its watch": ("lightning_superscale.run.environment", "open_store"),
    "while its first group is made": ("torch.distributed.distributed_c10d", "_new_process_group_helper"),
}


def fit_that_dies(rank, world_size, strategy, phase, who):
    import importlib

    module, name = PHASES[phase]
    if rank == who:
        setattr(importlib.import_module(module), name, lambda *args, **kwargs: send(signal.SIGKILL))
    fit(rank, world_size, strategy)


@pytest.mark.parametrize(
    ("phase", "who"),
    [
        ("while its first group is made", 1),
        *(
            pytest.param(phase, who, marks=only_in_test_all)
            for phase in PHASES
            for who in (0, 1)
            if (phase, who) != ("while its first group is made", 1)
        ),
    ],
)
def test_a_rank_that_dies_while_process_groups_are_made_is_named(phase, who):
    ends = ends_of(2, fit_that_dies, "zero2", phase, who)
    assert ends[who].code == -signal.SIGKILL
    other = ends[1 - who]
    assert other.code not in (0, None), other.said
    assert f"rank {who} died: its process" in other.said
    assert other.seconds < SECONDS


class Alone(Regressor):
    """Rank 0 does something with a sharded weight at its third step, which no other rank does."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def _is_at(self, place: str, batch_idx: int) -> bool:
        return self.what == place and batch_idx == 2 and self.global_rank == 0

    def training_step(self, batch, batch_idx):
        weight = self.net[3].weight
        penalty = 0.0
        if self._is_at("penalty before", batch_idx):
            penalty = weight.pow(2).sum().full_tensor()
        if self._is_at("redistribute", batch_idx):
            weight.redistribute(placements=[Replicate()])
        loss = super().training_step(batch, batch_idx) + penalty
        if self._is_at("penalty after", batch_idx):
            loss = loss + weight.pow(2).sum().full_tensor()
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self._is_at("plot", batch_idx):
            self.net[3].weight.full_tensor()
        if self._is_at("log", batch_idx):
            torch.linalg.vector_norm(self.net[3].weight).full_tensor()


def fit_alone(rank, world_size, what):
    fit(rank, world_size, "zero3", module=Alone(what))


ALONE = {
    "plot": "full_tensor of the sharded weight 'net.3.weight', which every rank must call",
    "log": "full_tensor on a sharded tensor, which every rank must call",
    "penalty before": "full_tensor on a sharded tensor, which every rank must call",
    "penalty after": "full_tensor on a sharded tensor, which every rank must call",
    "redistribute": "redistribute of the sharded weight 'net.3.weight', which every rank must call",
}


@pytest.mark.parametrize("what", ["plot", *(pytest.param(what, marks=only_in_test_all) for what in list(ALONE)[1:])])
def test_what_one_rank_does_alone_with_a_sharded_weight_is_named_on_all(what):
    for end in ends_of(2, fit_alone, what):
        assert end.code not in (0, None), end.said
        assert f"ranks went apart and wait for each other: rank 0 at {ALONE[what]}" in end.said
        assert "strategy.full_params()" in end.said
        assert "test_ranks.py:" in end.said
        assert end.seconds < SECONDS


def gather_alone_and_together(rank, world_size):
    """An operation of user code on a sharded weight, on one process group, never meets a gather of modules."""
    from lightning_superscale.zero.fsdp2 import shard

    meshes = []
    mesh_of_gathers = shard._mesh_of_gathers

    def spied(mesh, device):
        made = mesh_of_gathers(mesh, device)
        meshes.append((mesh, made))
        return made

    shard._mesh_of_gathers = spied
    fit(rank, world_size, "zero3")
    mesh, made = meshes[0]
    groups = {id(group) for group in (mesh.gather.group, mesh.shard.group, mesh.control, made.get_group())}
    assert len(groups) == 4
    assert dist.get_process_group_ranks(made.get_group()) == [0, 1]


@only_in_test_all
def test_user_code_has_a_process_group_of_its_own():
    for end in ends_of(2, gather_alone_and_together):
        assert end.code == 0, end.said
