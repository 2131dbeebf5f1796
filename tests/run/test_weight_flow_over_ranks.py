"""Weights that flow while ranks share steps: the bits of the same run whose weights stay, whatever ranks do."""

from __future__ import annotations

import itertools
import re

import lightning as L
import pytest
import torch

import lightning_superscale as lss
from lightning_superscale.config import OffloadConfig, ZeroConfig
from lightning_superscale.offload.weight_flow.schedule import BLOCKS_AHEAD
from lightning_superscale.run import weight_flow
from tests.helpers.extent import IS_ALL, only_in_test_all
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import loader, trainer
from tests.run import test_weight_flow as single

FLAGS = single.FLAGS
STAGES = (1, 2)
PRECISIONS = ("32-true", "bf16-true", "bf16-mixed")
ALL = list(itertools.product(STAGES, single.ENGINES, PRECISIONS, FLAGS))
# Every value of each beside every value of each other one.
PAIRWISE = [
    (1, "cpu", "32-true", "plain"),
    (2, "superoffload", "32-true", "clip"),
    (2, "cpu", "32-true", "accumulate and clip by value"),
    (1, "superoffload", "32-true", "validate"),
    (2, "superoffload", "bf16-true", "plain"),
    (1, "cpu", "bf16-true", "clip"),
    (1, "superoffload", "bf16-true", "accumulate and clip by value"),
    (2, "cpu", "bf16-true", "validate"),
    (1, "cpu", "bf16-mixed", "accumulate and clip by value"),
    (2, "superoffload", "bf16-mixed", "validate"),
    (2, "superoffload", "bf16-mixed", "plain"),
    (1, "cpu", "bf16-mixed", "clip"),
]


def strategy(stage: int, engine: str, weights: str = "flow", shard_size: int | None = None) -> lss.SuperScaleStrategy:
    zero = ZeroConfig(stage=stage, shard_size=shard_size)
    return lss.SuperScaleStrategy(zero=zero, offload=OffloadConfig(engine=engine, weights=weights, bucket_mb=1))


def changed(expected, found) -> list[str]:
    """Names of what two modules have not alike."""
    pairs = zip(expected.state_dict().items(), found.state_dict().values(), strict=True)
    return [name for (name, value), other in pairs if not torch.equal(value, other)]


def differing(make, stage, engine, world_size, *, shard_size=None, **flags) -> list[str]:
    """Names of what flowing changed."""
    stays, flows = make(), make()
    single.fit(stays, strategy(stage, engine, "stationary", shard_size), devices=world_size, **flags)
    single.fit(flows, strategy(stage, engine, "flow", shard_size), devices=world_size, **flags)
    assert flows.most_device_bytes > 0
    assert not torch.equal(flows.out.weight, make().out.weight.to(flows.out.weight.dtype))
    return changed(stays, flows)


def _matrix(rank: int, world_size: int, cases):
    return [
        (case, names)
        for case in cases
        if (names := differing(single.Deep, *case[:2], world_size, precision=case[2], **FLAGS[case[3]]))
    ]


def test_fit_equals_the_run_whose_weights_stay():
    assert {frozenset(pair) for case in PAIRWISE for pair in itertools.combinations(enumerate(case), 2)} == {
        frozenset(pair) for case in ALL for pair in itertools.combinations(enumerate(case), 2)
    }
    cases = ALL if IS_ALL else PAIRWISE
    assert run_ranks(2, _matrix, cases, limit_s=400.0) == [[], []]


def _of_several(rank: int, world_size: int, shard_size):
    return [
        (engine, names)
        for engine in single.ENGINES
        if (names := differing(single.Deep, 2, engine, world_size, shard_size=shard_size, gradient_clip_val=0.05))
    ]


@pytest.mark.parametrize(
    ("world_size", "shard_size"),
    [
        pytest.param(3, None, id="rows that don't divide evenly"),
        pytest.param(4, 2, id="replicated shards", marks=only_in_test_all),
    ],
)
def test_more_ranks(world_size, shard_size):
    assert run_ranks(world_size, _of_several, shard_size) == [[]] * world_size


class Parted(single.Deep):
    """Each rank leaves out other blocks in other steps, so that their gathers are needed at other times."""

    def forward(self, x):
        h = self.inp(x)
        step, rank = self.trainer.global_step, self.trainer.global_rank
        for i, block in enumerate(self.blocks):
            if (i + step + rank) % 3:
                h = block(h)
            self.most_device_bytes = max(self.most_device_bytes, single.device_bytes(self))
        return self.out(h)


class Unused(single.Deep):
    """No rank uses a layer in every other step: its weights stay as they were while others of its unit change."""

    def training_step(self, batch, batch_idx):
        first = self.blocks[0]
        for param in first.up.parameters():
            param.requires_grad_(batch_idx % 2 == 0)
        return self.loss(batch)


class Reversed(single.Backwards):
    """Uses blocks in another order than it registered them, so that gathers are needed in another than published."""

    def forward(self, x):
        h = self.inp(x)
        for block in self.used:
            h = block(h)
            self.most_device_bytes = max(self.most_device_bytes, single.device_bytes(self))
        return self.out(h)

    def on_train_batch_start(self, *_):
        return


class Thawed(single.OfTrained):
    def configure_callbacks(self):
        return [single.Thaw()]


PROGRAMS = [
    Parted,
    Unused,
    Thawed,
    single.Clamped,
    single.Summed,
    single.Looking,
    single.Manual,
    single.Alternating,
    single.Foreign,
    Reversed,
]


def _programs(rank: int, world_size: int):
    found = []
    for i, make in enumerate(PROGRAMS):
        ways = ((1 + i % 2, "superoffload"), (2 - i % 2, "cpu"))
        for stage, engine in ways if IS_ALL else ways[i // 2 % 2 :][:1]:
            names = differing(make, stage, engine, world_size, max_epochs=3)
            if names:
                found.append((make.__name__, stage, engine, names))
    return found


def test_what_users_read_change_and_leave_out():
    assert run_ranks(2, _programs, limit_s=300.0) == [[], []]


def _resume(rank: int, world_size: int, path: str):
    found = []
    for stage, engine in ((1, "cpu"), (2, "superoffload")):
        straight, first, resumed = single.Deep(), single.Deep(), single.Deep()
        half = f"{path}/{engine}.ckpt"
        flags = {"devices": world_size, "precision": "bf16-true"}
        single.fit(straight, strategy(stage, engine, "stationary"), max_epochs=4, **flags)
        single.fit(first, strategy(stage, engine), max_epochs=2, **flags).save_checkpoint(half)
        trainer(strategy(stage, engine), max_epochs=4, **flags).fit(resumed, loader(), ckpt_path=half)
        # Buffers are saved as rank 0 has them, as DDP does.
        found += [(engine, name) for name in changed(straight, resumed) if "running" not in name]
    return found


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    assert run_ranks(2, _resume, str(tmp_path)) == [[], []]


class Counted(single.Deep):
    """All trained. Counts what crosses the link in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(True)
        self.steps: list[tuple[int, int]] = []

    def on_train_batch_start(self, *_):
        self.trainer.strategy.assembly.wait_all_published()
        self.plan = self.trainer.strategy.plan
        engine = next(iter(self.trainer.strategy.assembly.engines.values()))
        self.units = [(unit.shard, unit.full, unit.is_streamed) for unit in engine.transport.units]
        self.before = self.crossed()

    def on_train_batch_end(self, *_):
        self.trainer.strategy.assembly.wait_all_published()
        assert single.device_bytes(self) == 0
        self.steps.append(tuple(now - before for now, before in zip(self.crossed(), self.before, strict=True)))

    def crossed(self) -> tuple[int, int]:
        link = self.trainer.strategy.assembly.link
        return link.bytes.d2h, link.bytes.h2d


def _bytes(rank: int, world_size: int):
    module = Counted()
    single.fit(module, strategy(2, "superoffload"), devices=world_size, precision="bf16-true")
    rows = {row.name: row for row in module.plan.bytes}
    flowing = [full.shard_numel for _, full, is_streamed in module.units if is_streamed]
    own = sum(piece.numel for shard, _, _ in module.units for piece in shard.slices)
    packed = sum(shard.shard_numel for shard, _, _ in module.units)
    # Out: this rank's gradients, and whole new weights on their way home. In: this rank's new rows, each block for
    # forward, because everything was awaited, and those for backward that were not there any more.
    blocks = 5
    came = sum(flowing) // blocks * (blocks + blocks - (1 + BLOCKS_AHEAD))
    expected = (2 * (own + sum(flowing)), 2 * (packed + came))
    assert module.steps[2:] == [expected] * len(module.steps[2:])
    states = rows["optimizer states"].host_bytes
    return rows["weights (host copy)"].host_bytes, 2 * sum(flowing), states, 8 * packed, module.most_device_bytes


def test_bytes_over_the_link_and_in_memory_are_those_of_the_plan():
    for copies, flowing, states, expected, most in run_ranks(2, _bytes):
        assert copies == flowing
        assert states == expected
        assert most == flowing // 5 * (1 + BLOCKS_AHEAD)


class Timely(single.Deep):
    """All trained, and no hook of its own between steps, which would wait for new weights."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(True)

    def on_train_end(self):
        self.trainer.strategy.assembly.wait_all_published()
        self.came = self.trainer.strategy.assembly.link.bytes.h2d


class Awaiting(Timely):
    def on_train_batch_end(self, *_):
        self.trainer.strategy.assembly.wait_all_published()


def _came(rank: int, world_size: int):
    """Bytes that came to the device in one run, with new weights awaited after each step and not."""
    came = []
    for module in (Awaiting(), Timely()):
        run = single.fit(module, strategy(2, "superoffload"), devices=world_size, precision="bf16-true")
        came.append(module.came)
    flowing = 2 * sum(-(-p.numel() // 64) * 64 for p in module.blocks.parameters())
    return came, flowing, run.global_step


def test_a_gathered_block_does_not_cross_the_link_again_for_its_forward():
    for (awaited, in_time), flowing, num_steps in run_ranks(2, _came):
        assert awaited - in_time == (num_steps - 1) * flowing  # the first step has nothing to gather


def _chooses(rank: int, world_size: int):
    """Whether weights flow on this rank, and why, where one rank's device has more memory free than the other's."""
    module, said = single.Deep(), []
    needed = sum(p.nbytes for p in module.parameters())

    class Tells(L.Callback):
        def on_train_end(self, trainer, pl_module):
            said.append((trainer.strategy.run.flow is not None, trainer.strategy.explain()))

    weight_flow.free_device_bytes = lambda device: 10 * needed if rank == 0 else needed // 5
    single.fit(module, strategy(2, "superoffload", "auto"), devices=world_size, max_epochs=1, callbacks=[Tells()])
    return said[0]


def test_all_ranks_choose_what_fits_the_fullest_device():
    first, second = run_ranks(2, _chooses)
    assert first[0]
    assert second[0]
    why = [re.search(r"they take .* that are free there", explained).group() for _, explained in (first, second)]
    assert why[0] == why[1]
