"""Predicted peaks of device memory against the allocator's: every strategy, two models, two batch sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

import lightning_superscale as lss
from lightning_superscale.config import OffloadConfig, SequenceConfig, ZeroConfig
from lightning_superscale.estimation.memory import byte_classes, params_of
from lightning_superscale.estimation.peak import device_peak, units_of
from lightning_superscale.estimation.setup import Setup
from lightning_superscale.estimation.tracing.step import trace_step
from lightning_superscale.estimation.tracing.techniques import techniques_of
from lightning_superscale.run.precision import choose
from lightning_superscale.sequence.memory.activation_offload import NUM_IN_FLIGHT
from tests.estimation.models import MODELS, SHAPE
from tests.helpers.allocations import Allocations, SpanOfSteps
from tests.helpers.extent import IS_ALL
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import trainer

# `estimate()` promises 5 %. What was found above the prediction: 200 bytes of scalars; a generator's state of 5,056
# bytes for each recomputed block; 84 kB under zenflow, which is 1.2 % of the smallest case.
TOLERANCE = 0.02
STRATEGIES = {
    "resident": (0, None),
    "cpu": (0, {"engine": "cpu"}),
    "superoffload": (2, {}),
    "superoffload, 40 % on the device": (2, {"gpu_fraction": 0.4}),
    "zenflow": (2, {"engine": "zenflow"}),
    "flow": (0, {"weights": "flow"}),
}
WORKLOADS = [("language", "bf16-true"), ("language", "32-true"), ("images", "32-true"), ("images", "bf16-true")]


# A CPU without instructions for bf16 multiplies two matrices a hundred times slower than in fp32. So the default run
# takes small batches in it, and fp32 where what is tried does not depend on the precision.
ANY_PRECISION = "bf16-true" if IS_ALL else "32-true"
# Whoever is first waits for the measurement of all.
LIMIT_S = 3000 if IS_ALL else 500
pytestmark = pytest.mark.timeout(LIMIT_S + 100)


def sizes_of(kind: str, setup: Setup, is_all: bool) -> tuple[int, ...]:
    """The batches that are measured, of the two that the model has."""
    small, large = MODELS[kind][1]
    if is_all:
        return small, large
    return (small,) if setup.precision.name.startswith("bf16") else (large,)


def setup_of(stage, offload, precision, micro_batches=1) -> Setup:
    how = None if offload is None else OffloadConfig(**offload)
    flows = how is not None and how.weights == "flow"
    on_device = 0.0 if how is None or how.gpu_fraction == "auto" else how.gpu_fraction
    return Setup(
        zero=ZeroConfig(stage=stage),
        offload=how,
        precision=choose(precision),
        flows=flows,
        on_device=on_device,
        micro_batches=micro_batches,
    )


def predicted(model, size: int, setup: Setup) -> int:
    with torch.device("meta"):
        module, batch = model(), model.batch(size)
    params = params_of(module, setup)
    weights = setup.precision.weights if setup.precision.name.endswith("-true") else None
    with techniques_of(module, setup.sequence, setup.zero) as techniques:
        loss = techniques.around(lambda m, b: m.training_step(b, 0))
        trace = trace_step(module, batch, loss, weights=weights, autocast=setup.precision.autocast)
    return device_peak(trace, params, byte_classes(module, params, setup), setup).total


def measured(model, size: int, setup: Setup) -> int:
    data = DataLoader(torch.cat([model.batch(size)] * 4 * setup.micro_batches), size)
    strategy = lss.SuperScaleStrategy(zero=setup.zero, offload=setup.offload, sequence=setup.sequence)
    run = trainer(
        strategy,
        plugins=[lss.SuperScalePrecision(setup.precision.name)],
        max_epochs=1,
        devices=setup.num_ranks,
        accumulate_grad_batches=setup.micro_batches,
        callbacks=[SpanOfSteps(2 * setup.micro_batches, 4 * setup.micro_batches - 1)],
    )
    with Allocations() as seen:
        run.fit(model(), data)
    return seen.peak


KEEPING_LESS = {
    "recomputed": SequenceConfig(checkpoint_blocks=True, tile_loss=False),
    "recomputed, without logits": SequenceConfig(checkpoint_blocks=True, tile_loss=True),
    "without logits": SequenceConfig(tile_loss=True),
    "eight bits": SequenceConfig(checkpoint_blocks=True, boundary_bits=8),
}
AWAY = SequenceConfig(checkpoint_blocks=True, tile_loss=True, offload_activations=True)


def _cases() -> dict[str, tuple[str, Setup]]:
    """By what is tried, the model and the setup: all of them, or each strategy with one workload."""
    plain = [(name, *workload) for name in STRATEGIES for workload in WORKLOADS]
    micro = list(STRATEGIES)
    less = [(strategy, name) for strategy in ("resident", "superoffload") for name in KEEPING_LESS]
    if not IS_ALL:
        plain = [(name, *WORKLOADS[i % len(WORKLOADS)]) for i, name in enumerate(STRATEGIES)]
        micro, less = ["superoffload", "zenflow"], less[1::3]
    cases = {
        f"{name}, {kind}, {precision}": (kind, setup_of(*STRATEGIES[name], precision))
        for name, kind, precision in plain
    }
    for name in micro:
        cases[f"{name}, two micro-batches"] = ("language", setup_of(*STRATEGIES[name], ANY_PRECISION, micro_batches=2))
    for strategy, name in less:
        setup = setup_of(*STRATEGIES[strategy], ANY_PRECISION)
        cases[f"{strategy}, {name}"] = ("language", replace(setup, sequence=KEEPING_LESS[name]))
    return cases


CASES = _cases()
INPUTS_AWAY = {
    f"{name}, inputs away": ("language", replace(setup_of(*STRATEGIES[name], ANY_PRECISION), sequence=AWAY))
    for name in ("resident", "superoffload")
}


def peaks(rank: int, world_size: int, setups: list[tuple[str, Setup]], is_all: bool) -> list[list[tuple[int, int]]]:
    """What is predicted and measured at each size of a batch."""
    found = []
    for kind, setup in setups:
        model, _ = MODELS[kind]
        sizes = sizes_of(kind, setup, is_all)
        found.append([(predicted(model, size, setup), measured(model, size, setup)) for size in sizes])
    return found


@pytest.fixture(scope="module")
def one_rank():
    """In a process of its own: after thousands of other tests, tensors lived longer in some runs and not in others."""
    cases = CASES | INPUTS_AWAY
    return dict(zip(cases, run_ranks(1, peaks, [*cases.values()], IS_ALL, limit_s=LIMIT_S)[0], strict=True))


@pytest.mark.parametrize("case", CASES)
def test_one_rank(one_rank, case):
    for expected, found in one_rank[case]:
        assert expected == pytest.approx(found, rel=TOLERANCE)


@pytest.mark.parametrize("case", INPUTS_AWAY)
def test_inputs_of_blocks_in_host_memory(one_rank, case):
    """What is kept for copies under way is counted, which are done at once here: the inputs of two blocks at most."""
    kind, setup = INPUTS_AWAY[case]
    model, (_, size) = MODELS[kind]
    bound, found = one_rank[case][-1]
    under_way = NUM_IN_FLIGHT * size * model.sequence * SHAPE.width * setup.precision.weights.itemsize
    assert bound - under_way * 1.01 <= found <= bound * (1 + TOLERANCE)


SHARED = [SequenceConfig(size=2, mode=mode, check_batches=0) for mode in ("auto", "ring", "allgather")]
SHARED.append(SequenceConfig(size=2, checkpoint_blocks=True, tile_loss=True))


def test_ranks_that_share_sequences():
    shared = replace(setup_of(0, None, "bf16-true"), num_ranks=2, ranks_per_node=2)
    setups = [("language", replace(shared, sequence=config)) for config in SHARED]
    for rank in run_ranks(2, peaks, setups, False, limit_s=LIMIT_S):
        for (_, setup), [(expected, found)] in zip(setups, rank, strict=True):
            # What is under way is freed when the other rank has it, sooner or later: 6 % under to 9 % over, measured.
            assert 0.85 < found / expected < 1.15, setup.sequence


@pytest.mark.parametrize("offload", [None, {}])
def test_weights_outside_of_the_blocks_travel_last(offload):
    """Under ZeRO-3 units leave in their order; the embedding's gradient is complete last, and must not hold others."""
    setup = replace(setup_of(3, offload, "bf16-true"), num_ranks=2)
    with torch.device("meta"):
        module = MODELS["language"][0]()
        batch = module.batch(2)
    params = params_of(module, setup)
    trace = trace_step(module, batch, lambda m, b: m.training_step(b, 0), weights=torch.bfloat16)
    place_of = {grad.fqn: grad.place for grad in trace.gradients}
    units = units_of(params, setup, {grad.fqn: i for i, grad in enumerate(trace.gradients)})
    complete = [max(place_of[param.spec.fqn] for param in unit) for unit in units]
    assert len(units) > 4
    assert complete == sorted(complete)
