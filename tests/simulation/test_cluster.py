"""Steps of clusters by closed forms: one rank, perfect overlap, none, offload, a slow rank, ten thousand ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_superscale.config import OffloadConfig, ZeroConfig
from lightning_superscale.estimation.devices import PROFILES, Reach
from lightning_superscale.estimation.links import GroupShape, Latencies, Links
from lightning_superscale.estimation.memory import params_of
from lightning_superscale.estimation.setup import Setup
from lightning_superscale.estimation.step_time import (
    CopySeconds,
    host_times,
    phase_seconds,
    roofline,
    step_time,
)
from lightning_superscale.estimation.tracing.step import trace_step
from lightning_superscale.offload.engine import engine_of
from lightning_superscale.offload.planner.forecast import HostSchedule, exposed_seconds
from lightning_superscale.run.precision import choose
from lightning_superscale.simulation.cluster import simulate_cluster
from lightning_superscale.simulation.program import Piece, Program, Unit, program_of

pytest.importorskip("simpy")

WIDTH, LAYERS = 1024, 8
PROFILE = replace(PROFILES["H100 SXM"], reach=Reach(products=0.5, memory=0.5, links=0.5, host=0.5, call=0.0))
AT_ONCE = Latencies(0.0, 0.0)
BYTES = 2**24


def setup(num_ranks: int = 4, *, stage: int = 2, per_node: int = 4, **options) -> Setup:
    zero = ZeroConfig(stage=stage, bucket_mb=2, **options)
    return Setup(zero=zero, offload=None, precision=choose("bf16-true"), num_ranks=num_ranks, ranks_per_node=per_node)


def program(num_units: int, forward: float, backward: float, *, stage: int = 2, **unit) -> Program:
    """Layers of equal seconds, each a unit; the last one's gradient comes first."""
    units = [
        Unit(reduced_bytes=BYTES, gathered_bytes=BYTES if stage else 0, is_gathered=stage == 3, **unit)
        for _ in range(num_units)
    ]
    order = range(num_units)
    return Program(
        units,
        [Piece(forward / num_units, needs=[i]) for i in reversed(order)],
        [Piece(backward / num_units, needs=[i] if stage == 3 else [], completes=[i]) for i in order],
    )


def step(which: Program, of: Setup, *, profile=PROFILE, latencies=AT_ONCE, plan=None, slow=1.0):
    return simulate_cluster(which, of, profile, latencies, plan or HostSchedule(), slow)


def one_way(num_ranks: int = 4, latencies: Latencies = AT_ONCE) -> float:
    """Seconds of one unit's reduce-scatter or all-gather."""
    hops = Links(PROFILE, latencies).hops("all_gather", BYTES, GroupShape(1, num_ranks))
    return sum(hop.latency + hop.seconds for hop in hops)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rank_takes_what_an_estimate_says(stage):
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    alone = setup(1, stage=stage, per_node=1)
    trace = trace_step(module, torch.empty(64, WIDTH, device="meta"), lambda m, b: m(b).sum(), weights=torch.bfloat16)
    params = params_of(module, alone)
    predicted = step_time(trace, params, alone, PROFILE, roofline(PROFILE))
    found = step(program_of(trace, params, alone, PROFILE, roofline(PROFILE)), alone)
    # Sums of the same numbers in another order: some hundred roundings of 2^-53 each.
    assert found.seconds == pytest.approx(predicted.total, rel=1e-12)
    assert found.record.model == pytest.approx(predicted.forward + predicted.backward, rel=1e-12)
    assert not found.waited


@pytest.mark.parametrize(("num_ranks", "latency"), [(2, 0.0), (4, 1e-3), (4, 0.0)])
def test_without_compute_an_all_reduce_takes_its_rings(num_ranks, latency):
    latencies = Latencies(latency, latency)
    found = step(program(1, 0.0, 0.0, stage=0), setup(num_ranks, stage=0), latencies=latencies)
    rate = PROFILE.rank_link * 0.5
    expected = 2 * (num_ranks - 1) / num_ranks * BYTES / rate + 2 * (num_ranks - 1) * latency
    assert found.seconds == pytest.approx(expected, rel=1e-12)
    assert found.waited == {"reductions": pytest.approx(expected, rel=1e-12)}


def test_what_hides_hides_but_for_the_last_bucket():
    """With passes longer than exchanges, only the last reduction is late, and the first gather after the step."""
    num_units, hop = 8, one_way()
    found = step(program(num_units, 100 * hop, 100 * hop), setup())
    assert found.waited["reductions"] == pytest.approx(hop, rel=1e-9)
    assert found.waited["gathers"] == pytest.approx(hop, rel=1e-9)
    assert found.seconds == pytest.approx(202 * hop, rel=1e-9)


def test_what_is_longer_than_passes_bounds_the_step():
    """Reductions fill all of backward but its first piece, gathers all of forward but its last one."""
    num_units, hop = 8, one_way()
    found = step(program(num_units, hop, hop), setup())
    assert found.seconds == pytest.approx((2 * num_units + 2 / num_units) * hop, rel=1e-9)


def test_cores_that_do_both_hide_nothing():
    num_units, hop = 8, one_way()
    shared = replace(PROFILE, shares_cores=True)
    found = step(program(num_units, 100 * hop, 100 * hop), setup(), profile=shared)
    assert found.seconds == pytest.approx((200 + 2 * num_units) * hop, rel=1e-9)
    gathered = step(program(num_units, 100 * hop, 100 * hop, stage=3), setup(stage=3), profile=shared)
    assert gathered.seconds == pytest.approx((200 + 3 * num_units) * hop, rel=1e-9)


def test_stage_3_gathers_ahead_and_again_in_backward():
    num_units, hop = 8, one_way()
    found = step(program(num_units, 100 * hop, 100 * hop, stage=3), setup(stage=3))
    assert found.record.traffic.calls == {"all_gather": 2 * num_units, "reduce_scatter": num_units}
    # The first gather of forward, the last reduction; backward's first unit is gathered again, as all are.
    assert found.seconds == pytest.approx(203 * hop, rel=1e-9)


def test_the_device_copies_what_stage_3_gathers_and_reduces():
    num_units, hop = 8, one_way()
    plain = program(num_units, 100 * hop, 100 * hop, stage=3)
    copying = replace(plain, units=[replace(unit, copies=CopySeconds(3 * hop, 2 * hop)) for unit in plain.units])
    before, found = step(plain, setup(stage=3)), step(copying, setup(stage=3))
    # In both passes weights, in backward gradients too; the first gather and the last reduction are waited for as ever.
    assert found.seconds - before.seconds == pytest.approx(num_units * (2 * 3 + 2) * hop, rel=1e-9)
    assert found.waited["gathers"] - before.waited["gathers"] == pytest.approx(num_units * 2 * 3 * hop, rel=1e-9)
    assert found.record.model == before.record.model


def test_gathers_and_reductions_share_a_link():
    """In stage 3's backward both go on at once: together they take as long as one after the other."""
    num_units, hop = 64, one_way()
    found = step(program(num_units, 0.0, 0.0, stage=3), setup(stage=3))
    assert found.seconds == pytest.approx(3 * num_units * hop, rel=1e-9)


def test_replicas_sum_the_shards():
    hybrid = setup(8, per_node=8, shard_size=4)
    found = step(program(1, 0.0, 0.0), hybrid)
    assert found.record.traffic.nbytes == {"reduce_scatter": BYTES, "all_reduce": BYTES // 4, "all_gather": BYTES // 4}


@pytest.mark.parametrize("engine", ["cpu", "superoffload"])
@pytest.mark.parametrize("tokens", [1, 2**12, 2**15, 2**17])
def test_offload_leaves_exposed_what_its_engine_predicts(engine, tokens):
    offload = OffloadConfig(engine=engine, bucket_mb=2, gpu_fraction=0.0)
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(32)))
    alone = replace(setup(1, stage=0, per_node=1), offload=offload)
    trace = trace_step(
        module, torch.empty(tokens, WIDTH, device="meta"), lambda m, b: m(b).sum(), weights=torch.bfloat16
    )
    params, rates = params_of(module, alone), roofline(PROFILE)
    forward, backward = (phase_seconds(trace, phase, rates) for phase in ("forward", "backward"))
    times = host_times(trace, params, alone, PROFILE, forward, backward)
    plan = engine_of(engine).host_schedule(times, offload)
    predicted = step_time(trace, params, alone, PROFILE, rates).optimizer
    if engine == "superoffload":
        predicted = exposed_seconds(times, plan.plan, 1.0)
    found = step(program_of(trace, params, alone, PROFILE, rates), alone, plan=plan)
    # The closed form takes buckets of equal size and passes of even pace. Backward of the first layer is shorter than
    # the others' (no gradient of the input), and the sum at the end is no layer's: so a bucket's three hops, and its
    # share of the passes, may be there or not.
    tolerance = (times.d2h + times.host + times.h2d + forward + backward) / times.num_buckets
    assert found.seconds - forward - backward == pytest.approx(predicted, abs=tolerance)
    assert predicted > 0


def test_one_slow_rank_slows_all():
    hop = one_way()
    hidden = program(8, 100 * hop, 100 * hop)
    even, slow = (step(hidden, setup(10_000, per_node=8), slow=factor) for factor in (1.0, 1.5))
    assert (even.num_classes, slow.num_classes) == (1, 2)
    # Every reduction ends with the slow rank: all take its passes of 1.5 times, but what they had to wait for anyway.
    assert 60 * hop < slow.seconds - even.seconds <= 100 * hop * (1 + 1e-9)
    alone = step(hidden, setup(1, per_node=1), slow=1.5)
    assert alone.seconds == pytest.approx(300 * hop, rel=1e-9)


def test_a_slow_rank_of_one_group_is_waited_for_by_the_others():
    hop = one_way()
    hybrid = setup(16, per_node=4, shard_size=4)
    even, slow = (step(program(8, 100 * hop, 100 * hop), hybrid, slow=factor) for factor in (1.0, 1.5))
    assert slow.num_classes == 4
    assert slow.seconds - even.seconds == pytest.approx(100 * hop, rel=0.05)


def test_more_speed_is_never_slower():
    plain = program(8, 1e-3, 2e-3)
    cluster = setup(64, per_node=8)
    seconds = [
        step(plain, cluster, profile=replace(PROFILE, node_link=rate * 10**9, rank_link=10 * rate * 10**9)).seconds
        for rate in (1, 2, 8, 64, 512)
    ]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > 2 * seconds[-1]


def test_events_do_not_grow_with_ranks():
    """Ten thousand ranks are as many events as sixteen: one class of each, on several nodes."""
    few, many = (step(program(100, 1.0, 2.0), setup(num, per_node=8), slow=1.1) for num in (16, 10_000))
    assert few.num_events == many.num_events
    assert many.num_events < 100_000
