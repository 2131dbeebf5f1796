"""Every way of calling backward gives the gradients of one plain process, or is refused by name."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils.data import DataLoader

import lightning_superscale as lss
from tests.helpers.backward_patterns import AUTOMATIC, TwoTowers, loss_of
from tests.helpers.backward_runs import PATTERNS, Batches, Module, Run, outcome, outcomes, plain
from tests.helpers.extent import IS_ALL, only_in_test_all
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import trainer

# The oracle says so, too, once per process.
pytestmark = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")

OFFLOADED = "superoffload"
STRATEGIES = {
    "superscale": {"zero": 0},
    "zero1": {"zero": 1},
    "zero2": {"zero": 2},
    "zero3": {"zero": 3},
    "zero3 superoffload": {"zero": 3, "offload": OFFLOADED},
    "superoffload": {"zero": 2, "offload": OFFLOADED},
}
if IS_ALL:
    STRATEGIES["zero2, weights that flow"] = {"zero": 2, "offload": {"engine": OFFLOADED, "weights": "flow"}}
ON_ONE_RANK = {
    "superscale": {"zero": 0},
    "superoffload": {"zero": 0, "offload": OFFLOADED},
    "cpu": {"zero": 0, "offload": "cpu"},
    "weights that flow": {"zero": 0, "offload": {"engine": OFFLOADED, "weights": "flow"}},
}
CLIPS = (None, ("norm", 0.05), ("value", 0.01))

OF_SECOND_ORDER = {
    "penalty_on_inputs", "penalty_on_weights", "backward_with_create_graph", "accumulated_with_penalty",
    "checkpointed_penalty", "loss_with_penalty", "loss_with_penalty_on_weights",
}  # fmt: skip
REFUSED_WITH_SHARDED_WEIGHTS = {
    "penalty_on_weights": "SuperScaleError: torch.autograd.grad was given tensors that are in no graph.*or use ZeRO-2",
    "loss_with_penalty_on_weights": "SuperScaleError: torch.autograd.grad was given tensors that are in no graph",
    "gradients_put_by_hand": r"SuperScaleError: step\(\) found no gradient .* though 'net.vision.*' ran forward",
    "backward_into_some": r"SuperScaleError: backward\(inputs=...\) was given parameters, which are shards",
    "model_of_one_rank": "ranks went apart: rank . is at .*or use ZeRO-2, which allows it",
    "backward_of_one_rank": "ranks went apart: rank . is at .*or use ZeRO-2, which allows it",
    "loss_of_model_of_one_rank": "ranks went apart: rank . is at module .*or use ZeRO-2, which allows it",
}
# What comes after its unit was reduced is reduced apart and added: (a + b) / n against a / n + b / n.
SEVERAL_DELTAS = {"loss_of_checkpointed_reentrant", "loss_after_a_backward"}


def refusal(run: Run, strategy: dict, world_size: int) -> str | None:
    """What a run is refused with, as a pattern; None for one that trains."""
    if run.pattern == "graph_kept_over_a_step":
        return "RuntimeError: one of the variables needed for gradient computation has been modified by an inplace"
    if isinstance(strategy.get("offload"), dict) and run.pattern in OF_SECOND_ORDER:
        return (
            "SuperScaleError: a backward with create_graph=True went through 'net.vision.blocks.1', whose weights flow"
        )
    if strategy["zero"] == 3 and world_size > 1:
        return REFUSED_WITH_SHARDED_WEIGHTS.get(run.pattern)
    return None


def is_exact(run: Run, strategy: dict, world_size: int) -> bool:
    """Whether sums are made in the oracle's order; else they may differ by roundoff."""
    if world_size == 1:
        return True
    if run.clip is not None and run.clip[0] == "norm":
        return False  # torch adds its norm in fp32, shards theirs in double precision
    is_streamed = run.is_automatic and not (run.is_watched or run.is_twice)
    # Stage 2 adds averages of micro-batches, the oracle averages their sum.
    is_each_averaged = run.num_micro > 1 and strategy["zero"] >= 2
    return not (is_streamed and (is_each_averaged or run.pattern in SEVERAL_DELTAS))


def assert_same(found, run: Run, strategy: dict, world_size: int, *, name: str) -> None:
    """Equal bits, or equal up to the order of summation.

    Adding k terms in another order changes a gradient by at most k units of roundoff of their magnitudes, k < 8
    here; AdamW carries a relative error of the gradient over to the weight's change.
    """
    message = refusal(run, strategy, world_size)
    if message is not None:
        assert isinstance(found, str), f"{name}: was not refused"
        assert re.match(f".*{message}", found), f"{name}: {found}"
        return
    assert not isinstance(found, str), f"{name}: {found}"
    start = {key: param.detach() for key, param in TwoTowers().named_parameters()}
    for key, expected in plain(run, world_size, is_sharded=strategy["zero"] == 3).items():
        if is_exact(run, strategy, world_size):
            assert torch.equal(found[key], expected), f"{name}: {key}"
        else:
            change = float((expected.double() - start[key].double()).norm())
            error = float((found[key].double() - expected.double()).norm())
            assert error <= 16 * torch.finfo(torch.float32).eps * max(change, 1e-12), f"{name}: {key}"


def runs_of(pattern: str, clip) -> list[Run]:
    if PATTERNS[pattern] not in AUTOMATIC:
        return [Run(pattern, clip=clip)]
    return [Run(pattern, clip=clip), Run(pattern, num_micro=2, clip=clip)]


def all_runs(name: str, *, is_halved: bool = False) -> list[Run]:
    """Every pattern, or every other one; each clipped in every way, or in one, in turn."""
    found, j = [], [*STRATEGIES, *ON_ONE_RANK].index(name)
    for k, pattern in enumerate(PATTERNS):
        if is_halved and (k + j) % 2:
            continue
        for clip in CLIPS if IS_ALL else CLIPS[(k // 2 + j) % 3 :][:1]:
            found += runs_of(pattern, clip)
            if pattern in ("plain_loss", "loss_after_a_backward"):
                found.append(Run(pattern, 2, clip, is_watched=True))
            if pattern in ("plain_loss", "one_loss"):
                found.append(Run(pattern, 1, clip, is_hooked=True))
            if pattern == "plain_loss":
                found.append(Run(pattern, 1, clip, is_twice=True))
    return found


@pytest.mark.parametrize("name", ON_ONE_RANK)
def test_one_rank_equals_plain_pytorch_bit_for_bit(name):
    strategy = ON_ONE_RANK[name]
    for run in all_runs(name):
        assert_same(outcome(run, strategy, 0, 1), run, strategy, 1, name=f"{name}: {run}")


# What stage 1 does in backward, stage 2 does too.
@pytest.mark.parametrize("name", STRATEGIES if IS_ALL else [name for name in STRATEGIES if name != "zero1"])
def test_two_ranks_equal_one_process(name):
    """By default every other pattern: each runs under two strategies or three, once of them with sharded weights."""
    strategy = STRATEGIES[name]
    runs = [run for run in all_runs(name, is_halved=not IS_ALL) if refusal(run, strategy, 2) is None]
    results = run_ranks(2, outcomes, [(run, strategy) for run in runs], limit_s=220)
    for rank, found in enumerate(results):
        for run, weights in zip(runs, found, strict=True):
            assert_same(weights, run, strategy, 2, name=f"rank {rank}, {name}: {run}")


@pytest.mark.parametrize("name", ["zero3", pytest.param("zero3 superoffload", marks=only_in_test_all), "zero2"])
def test_refusals_at_two_ranks_are_heard_on_both_and_training_goes_on(name):
    strategy = STRATEGIES[name]
    runs = [run for run in all_runs(name) if refusal(run, strategy, 2) is not None and run.num_micro == 1]
    runs.append(Run("several_losses"))
    results = run_ranks(2, outcomes, [(run, strategy) for run in runs], limit_s=220)
    for rank, found in enumerate(results):
        for run, weights in zip(runs, found, strict=True):
            assert_same(weights, run, strategy, 2, name=f"rank {rank}, {name}: {run}")


class Filled(Module):
    """Puts a gradient into `param.grad` between backward and step, or hooks into where gradients never are."""

    is_hooked = False

    def __init__(self) -> None:
        super().__init__(Run("one_loss"))
        if self.is_hooked:
            self.net.vision.first.weight.register_post_accumulate_grad_hook(lambda param: None)

    def training_step(self, x, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(loss_of(self.net.vision(x)))
        weight = self.net.text.first.weight
        weight.grad = torch.ones_like(weight)
        optimizer.step()


class Hooked(Filled):
    is_hooked = True


def _refused_by_sharded_weights(rank: int, world_size: int) -> list[str]:
    said = []
    for module_class in (Filled, Hooked):
        run = trainer(lss.SuperScaleStrategy(zero=3), devices=world_size, max_epochs=1, use_distributed_sampler=False)
        with pytest.raises(lss.SuperScaleError) as caught:
            run.fit(module_class(), DataLoader(Batches(2, rank), batch_size=None))
        said.append(str(caught.value))
    return said


def test_what_sharded_parameters_have_no_place_for_is_refused_by_name():
    for by_hand, hook in run_ranks(2, _refused_by_sharded_weights):
        assert "the gradient of 'net.text.first.weight' was put into param.grad by hand" in by_hand
        assert "'net.vision.first.weight' has a hook of register_post_accumulate_grad_hook()" in hook
