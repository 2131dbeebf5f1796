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


PAIRS = [(name, *workload) for name in STRATEGIES for workload in WORKLOADS]
# Each strategy with one workload, each workload with two strategies.
FEW = [(name, *WORKLOADS[i % len(WORKLOADS)]) for i, name in enumerate(STRATEGIES)]


@pytest.mark.parametrize(("name", "kind", "precision"), PAIRS if IS_ALL else FEW)
def test_one_rank(name, kind, precision):
    model, sizes = MODELS[kind]
    setup = setup_of(*STRATEGIES[name], precision)
    for size in sizes if IS_ALL else sizes[1:]:
        assert predicted(model, size, setup) == pytest.approx(measured(model, size, setup), rel=TOLERANCE), size


@pytest.mark.parametrize("name", STRATEGIES if IS_ALL else ["superoffload", "zenflow"])
def test_gradients_of_several_micro_batches(name):
    model, sizes = MODELS["language"]
    setup = setup_of(*STRATEGIES[name], "bf16-true", micro_batches=2)
    for size in sizes if IS_ALL else sizes[1:]:
        assert predicted(model, size, setup) == pytest.approx(measured(model, size, setup), rel=TOLERANCE), size


KEEPING_LESS = {
    "recomputed": SequenceConfig(checkpoint_blocks=True, tile_loss=False),
    "recomputed, without logits": SequenceConfig(checkpoint_blocks=True, tile_loss=True),
    "without logits": SequenceConfig(tile_loss=True),
    "eight bits": SequenceConfig(checkpoint_blocks=True, boundary_bits=8),
}


BOTH = [(strategy, name) for strategy in ("resident", "superoffload") for name in KEEPING_LESS]


@pytest.mark.parametrize(("strategy", "name"), BOTH if IS_ALL else BOTH[1::3])
def test_what_a_rank_keeps_of_long_sequences(strategy, name):
    model, sizes = MODELS["language"]
    setup = replace(setup_of(*STRATEGIES[strategy], "bf16-true"), sequence=KEEPING_LESS[name])
    for size in sizes if IS_ALL else sizes[1:]:
        assert predicted(model, size, setup) == pytest.approx(measured(model, size, setup), rel=TOLERANCE), size


@pytest.mark.parametrize("strategy", ["resident", "superoffload"])
def test_inputs_of_blocks_in_host_memory(strategy):
    """What is kept for copies under way is counted, which are done at once here: the inputs of two blocks at most."""
    model, sizes = MODELS["language"]
    config = SequenceConfig(checkpoint_blocks=True, tile_loss=True, offload_activations=True)
    setup = replace(setup_of(*STRATEGIES[strategy], "bf16-true"), sequence=config)
    found, bound = measured(model, sizes[1], setup), predicted(model, sizes[1], setup)
    under_way = NUM_IN_FLIGHT * sizes[1] * model.sequence * SHAPE.width * 2
    assert bound - under_way * 1.01 <= found <= bound * (1 + TOLERANCE)


SHARED = [SequenceConfig(size=2, mode=mode, check_batches=0) for mode in ("auto", "ring", "allgather")]
SHARED.append(SequenceConfig(size=2, checkpoint_blocks=True, tile_loss=True))


def peaks(rank: int, world_size: int, setups: list[Setup]) -> list[int]:
    model, sizes = MODELS["language"]
    return [measured(model, sizes[1], setup) for setup in setups]


def test_ranks_that_share_sequences():
    model, sizes = MODELS["language"]
    setups = [
        replace(setup_of(0, None, "bf16-true"), sequence=config, num_ranks=2, ranks_per_node=2) for config in SHARED
    ]
    for rank in run_ranks(2, peaks, setups):
        for setup, found in zip(setups, rank, strict=True):
            # What is under way is freed when the other rank has it, sooner or later: 6 % under to 9 % over, measured.
            assert 0.85 < found / predicted(model, sizes[1], setup) < 1.15, setup.sequence


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
