"""Ranks that are stopped, die, or do something alone: the others end in time, and say which rank it was and why."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

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

# Ranks apart are told later than a rank can seem to wait that is stopped: `_PAUSED_AFTER_S` and a beat.
PATIENCE_S, APART_S, GRACE_S = 2.5, 3.0, 0.5
# Far below any timeout of a collective (30 minutes), and enough for a machine that has other things to do.
SECONDS = 80.0
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

    def on_train_epoch_end(self, trainer, pl_module):
        self._at("on_train_epoch_end", trainer)


def fit_with_signal(rank, world_size, strategy, number, who, hook):
    fit(rank, world_size, strategy, Signals(number, who, hook))


HOOKS = (
    "on_fit_start",
    "on_train_batch_start",
    "on_before_optimizer_step",
    "on_validation_batch_start",
    "on_train_epoch_end",
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
    # A rank that never reached the store left nothing there to look its process up by.
    reasons = (
        "died: its process",
        "is gone, or the network to it",
        "ended, or the network to it, while ranks connected",
        "since it connected",
    )
    assert any(reason in other.said for reason in reasons), other.said
    assert f"rank {who}" in other.said
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
    "log": "which every rank must call",  # at the operation, or where its result is read
    "penalty before": "full_tensor on a sharded tensor, which every rank must call",
    "penalty after": "full_tensor on a sharded tensor, which every rank must call",
    "redistribute": "redistribute of the sharded weight 'net.3.weight', which every rank must call",
}


@pytest.mark.parametrize("what", ["plot", *(pytest.param(what, marks=only_in_test_all) for what in list(ALONE)[1:])])
def test_what_one_rank_does_alone_with_a_sharded_weight_is_named_on_all(what):
    for end in ends_of(2, fit_alone, what):
        assert end.code not in (0, None), end.said
        assert "ranks went apart and wait for each other: rank 0 at " in end.said
        assert ALONE[what] in end.said
        assert what == "log" or "strategy.full_params()" in end.said
        assert what == "log" or "test_ranks.py:" in end.said
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


class Large(Regressor):
    """16 MiB of weights in four layers."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(4)))

    def loss(self, batch):
        x, _ = batch
        return super().loss(batch) + 1e-3 * self.wide(x.repeat(1, 61)[:, :1024]).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Limits(L.Callback):
    """Leaves rank 1 some MiB of memory from a hook on."""

    def __init__(self, hook: str, mib: int) -> None:
        self.hook, self.mib = hook, mib

    def _at(self, hook, trainer):
        if hook == self.hook and trainer.global_rank == 1:
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + self.mib * 2**20, resource.RLIM_INFINITY))

    def setup(self, trainer, pl_module, stage):
        self._at("setup", trainer)

    def on_before_backward(self, trainer, pl_module, loss):
        self._at("on_before_backward", trainer)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self._at("on_before_optimizer_step", trainer)


def fit_with_little_memory(rank, world_size, strategy, hook, mib):
    fit(rank, world_size, strategy, Limits(hook, mib), Large())


SCARCE = [
    (strategy, hook, mib)
    for strategy in ("zero1", "zero2", "zero3", "superoffload")
    for hook in ("setup", "on_before_backward", "on_before_optimizer_step")
    for mib in (0, 3, 9)
]


@only_in_test_all
@pytest.mark.parametrize(("strategy", "hook", "mib"), SCARCE)
def test_a_rank_that_can_not_allocate_is_named(strategy, hook, mib):
    other, scarce = ends_of(2, fit_with_little_memory, strategy, hook, mib)
    if scarce.code == 0 and hook != "setup":  # what it had sufficed
        assert other.code == 0, other.said
        return
    assert scarce.code not in (0, None), scarce.said
    assert other.code not in (0, None), other.said
    assert "rank 1 failed: " in other.said or "rank 1 died: " in other.said or "rank 1: " in other.said
    assert other.seconds < SECONDS


class Forks(L.Callback):
    """Rank 0 forks at its third step; the child goes on as if it were the rank, and the parent waits for it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx != 2 or trainer.global_rank != 0:
            return
        child = os.fork()
        if child == 0:
            return
        _, status = os.waitpid(child, 0)
        Path(self.folder, "status").write_text(str(status))


def fit_that_forks(rank, world_size, strategy, folder):
    parent = os.getpid()
    try:
        fit(rank, world_size, strategy, Forks(folder))
    except BaseException as error:
        if os.getpid() != parent:
            Path(folder, "child").write_text(f"{type(error).__name__}: {error}")
        raise
    Path(folder, f"fitted {rank} {os.getpid() == parent}").touch()


@pytest.mark.parametrize(
    ("strategy", "world_size"),
    [
        ("superoffload", 2),
        *(pytest.param(name, size, marks=only_in_test_all) for name in STRATEGIES for size in (1, 2)),
    ],
)
def test_a_forked_child_that_trains_is_told_and_its_parent_goes_on(strategy, world_size, tmp_path):
    ends = ends_of(world_size, fit_that_forks, strategy, str(tmp_path))
    assert [end.code for end in ends] == [0] * world_size, ends[0].said
    said = (tmp_path / "child").read_text()
    assert "was forked from process" in said
    assert "os.fork()" in said
    assert int((tmp_path / "status").read_text()) != 0
    assert sorted(path.name for path in tmp_path.glob("fitted*")) == [f"fitted {r} True" for r in range(world_size)]


SCRIPT = """
import os, sys, time
from tests.helpers.trainers import Regressor, loader, trainer
import lightning_superscale as lss
from tests.adversarial.test_ranks import STRATEGIES

class Slow(Regressor):
    def _at(self, place):
        if self.trainer.global_step > 3 and place == sys.argv[2] and not hasattr(self, "told"):
            self.told = os.write(1, b"here\\n")  # whole, also where the other rank writes

    def training_step(self, batch, batch_idx):
        self._at("training")
        time.sleep(0.02 * (1 + 2 * self.global_rank))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self._at("validation")
        time.sleep(0.02 * (1 + 2 * self.global_rank))
        super().validation_step(batch, batch_idx)

strategy = lss.SuperScaleStrategy(**STRATEGIES[sys.argv[1]])
trainer(strategy, devices=2, max_epochs=500).fit(Slow(), loader(64), loader(320))
"""


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("strategy", "place", "number"),
    [
        *(
            pytest.param(strategy, place, number, marks=only_in_test_all)
            for strategy in ("zero2", "zero3", "superoffload")
            for place in ("training", "validation")
            for number in (signal.SIGTERM, signal.SIGKILL)
        ),
    ],
)
def test_a_signal_to_the_main_process_of_two_ends_both(strategy, place, number, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), strategy, place]
    with (
        open(tmp_path / "said", "w") as said,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=said, text=True) as main,
    ):
        try:
            assert [main.stdout.readline(), main.stdout.readline()] == ["here\n"] * 2
            children = Path(f"/proc/{main.pid}/task/{main.pid}/children").read_text().split()
            assert children
            main.send_signal(number)
            began = time.monotonic()
            while (main.poll() is None or any(map(is_running, children))) and time.monotonic() - began < SECONDS:
                time.sleep(0.05)
            assert time.monotonic() - began < SECONDS / 2, (tmp_path / "said").read_text()
        finally:
            main.kill()
    if number == signal.SIGTERM:
        assert "ends, because" not in (tmp_path / "said").read_text()
    else:
        assert "rank 0" in (tmp_path / "said").read_text()
