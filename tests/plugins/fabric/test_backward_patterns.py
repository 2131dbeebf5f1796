"""Ways of calling backward under Fabric: weights are those of one plain process, or the call is refused by name."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor, nn

from lightning_superscale import OffloadConfig, SuperScaleError
from lightning_superscale.plugins.fabric.lightning import SuperScaleStrategy
from lightning_superscale.zero.buckets.all_gather import GatherThread
from tests.helpers.backward_patterns import Step, TwoTowers, loss_of
from tests.helpers.backward_runs import NUM_STEPS, Run, batch, plain
from tests.helpers.ranks import run_ranks
from tests.plugins.fabric.loops import assert_equal, launched

STRATEGIES = ("superscale", "zero2", "zero3", "superoffload")
SERVED = (
    "one_loss",
    "backward_into_some",
    "thrown_away",
    "reused_block",
    "branch_of_one_rank",
    "backward_with_create_graph",
    "two_models_two_optimizers",
    "in_turns",
    # Fabric forbids these under strategies with a backward of their own, but for this package's.
    "raw_backward",
    "gradient_from_outside",
    "several_tensors_at_once",
    "penalty_on_inputs",
)
CLIPPED = Run("two_models_two_optimizers", clip=("value", 1e-3))
RUNS = (*map(Run, SERVED), CLIPPED)
SHARDED_INPUTS = "SuperScaleError: backward(inputs=...) was given parameters, which are shards"


class Towers(nn.Module):
    """The patterns' model with a forward, by which Fabric's loops call a module."""

    def __init__(self, net: TwoTowers) -> None:
        super().__init__()
        self.net = net

    def forward(self, name: str, x: Tensor, **options: Any) -> Tensor:
        return getattr(self.net, name)(x, **options)


class Called:
    """A tower whose calls are those of the module that Fabric gave back."""

    def __init__(self, module: nn.Module, tower: nn.Module, name: str) -> None:
        self._module, self._tower, self._name = module, tower, name

    def __call__(self, x: Tensor, **options: Any) -> Tensor:
        return self._module(self._name, x, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tower, name)


class CalledTowers:
    def __init__(self, module: nn.Module, net: TwoTowers) -> None:
        self.vision, self.text = Called(module, net.vision, "vision"), Called(module, net.text, "text")


def weights(run: Run, strategy: str, rank: int, world_size: int) -> dict[str, Tensor]:
    fabric, net = launched(strategy, devices=world_size), run.make()
    module, *optimizers = fabric.setup(Towers(net), *run.optimizers_of(net))

    @contextmanager
    def toggled(number: int) -> Iterator[None]:
        others = [p for i, o in enumerate(optimizers) if i != number for g in o.param_groups for p in g["params"]]
        for param in others:
            param.requires_grad_(False)
        yield
        for param in others:
            param.requires_grad_(True)

    def zero_grad(number: int = 0, set_to_none: bool = True) -> None:
        optimizers[number].zero_grad(set_to_none)

    try:
        for index in range(NUM_STEPS):
            step = Step(CalledTowers(module, net), batch(index, rank), rank, fabric.backward, zero_grad, toggled)
            for number in run.go(step):
                if run.clip is not None:
                    limit = {"max_norm": run.clip[1]} if run.clip[0] == "norm" else {"clip_val": run.clip[1]}
                    fabric.clip_gradients(module, optimizers[number], **limit)
                optimizers[number].step()
    finally:
        fabric.strategy.teardown()
    return {name: param.detach().clone() for name, param in net.named_parameters()}


def outcomes(rank: int, world_size: int) -> list[dict[str, dict[str, Tensor] | str]]:
    """What each run came to under each strategy: weights, or the error's text."""

    def outcome(run: Run, strategy: str) -> dict[str, Tensor] | str:
        try:
            return weights(run, strategy, rank, world_size)
        except (SuperScaleError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using backward.. with create_graph=True")
        return [{strategy: outcome(run, strategy) for strategy in STRATEGIES} for run in RUNS]


@pytest.fixture(scope="module", params=[1, 2])
def found(request):
    world_size = request.param
    ranks = [outcomes(0, 1)] if world_size == 1 else run_ranks(world_size, outcomes)
    return world_size, [dict(zip(RUNS, rank, strict=True)) for rank in ranks]


@pytest.mark.parametrize("run", [*map(Run, SERVED), CLIPPED], ids=[*SERVED, "clipped"])
def test_weights_are_those_of_one_plain_process(found, run):
    world_size, ranks = found
    warnings.filterwarnings("ignore", "Using backward.. with create_graph=True")  # of the oracle too
    for strategy in STRATEGIES:
        is_sharded = strategy == "zero3" and world_size > 1
        for rank in ranks:
            if is_sharded and run.pattern == "backward_into_some":
                assert rank[run][strategy].startswith(SHARDED_INPUTS)
                continue
            expected = plain(run, world_size, is_sharded=is_sharded)
            assert_equal(rank[run][strategy], {name: param.detach() for name, param in expected.items()})


class Crossing(Run):
    """Every other rank runs the towers in the other order, so that it needs their new weights in another one too."""

    def go(self, step: Step) -> Iterator[int]:
        towers = {"vision": step.x, "text": step.x.flip(1)}
        order = [*towers] if step.rank == 0 else [*reversed(towers)]
        out = {name: getattr(step, name)(towers[name]) for name in order}
        step.zero_grad(0)
        step.zero_grad(1)
        y, z = out["vision"], out["text"]
        step.backward((y * z).mean() + loss_of(y - z))
        yield 0
        yield 1


def crossed(rank: int, world_size: int) -> dict[str, dict[str, Tensor]]:
    """Weights, where each rank's host takes long for another optimizer's rows."""
    issue = GatherThread._issue

    def slowly(self, unit, event):
        is_vision = unit.full.slices[0].fqn.startswith("net.vision")
        time.sleep(0.03 * (is_vision == (rank == 0)))
        return issue(self, unit, event)

    run = Crossing("two_models_two_optimizers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GatherThread, "_issue", slowly)
        return {name: weights(run, make(), rank, world_size) for name, make in HOSTED.items()}


HOSTED = {
    "superoffload": lambda: "superoffload",
    "cpu": lambda: SuperScaleStrategy(zero=1, offload="cpu"),
    "flow": lambda: SuperScaleStrategy(zero=2, offload=OffloadConfig(weights="flow")),
}


def test_two_optimizers_new_weights_come_in_one_order_whatever_ranks_do_meanwhile():
    expected = plain(Run("two_models_two_optimizers"), 2, is_sharded=False)
    for rank in run_ranks(2, crossed):
        for found in rank.values():
            assert_equal(found, {name: param.detach() for name, param in expected.items()})
