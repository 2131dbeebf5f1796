"""Seconds of a step, by closed forms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_superscale.config import OffloadConfig, ZeroConfig
from lightning_superscale.estimation.devices import PROFILES, Reach
from lightning_superscale.estimation.links import Latencies
from lightning_superscale.estimation.memory import params_of
from lightning_superscale.estimation.setup import Setup
from lightning_superscale.estimation.step_time import phase_seconds, roofline, step_time
from lightning_superscale.estimation.tracing.step import HostActivations, trace_step
from lightning_superscale.offload.planner.forecast import StepTimes, best_plan, exposed_seconds
from lightning_superscale.run.precision import choose

WIDTH, LAYERS = 1024, 4
REACH = Reach(products=0.5, memory=0.5, links=0.5, host=0.5, call=0.0)
PROFILE = replace(PROFILES["H100 SXM"], reach=REACH)
NUMEL = LAYERS * WIDTH * WIDTH


# Seconds of copies in a step of stage 3: weights of 16 bits twice, gradients of 16 bits once.
COPIED = NUMEL * (2 * 4 + 4) / (PROFILE.memory_rate * 0.5)


def build() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))


def timed(
    batch: int, *, zero=0, offload=None, num_ranks=1, per_node=None, profile=PROFILE, flows=False, micro_batches=1
):
    module = build()
    setup = Setup(
        zero=ZeroConfig(stage=zero),
        offload=offload,
        precision=choose("bf16-true"),
        num_ranks=num_ranks,
        ranks_per_node=per_node or num_ranks,
        flows=flows,
        micro_batches=micro_batches,
    )
    trace = trace_step(
        module, torch.empty(batch, WIDTH, device="meta"), lambda m, b: m(b).sum(), weights=torch.bfloat16
    )
    return step_time(trace, params_of(module, setup), setup, profile, roofline(profile))


def test_a_large_batch_is_bound_by_products():
    batch = 2**16
    time = timed(batch)
    products = 2 * batch * NUMEL / (PROFILE.flops16 * 0.5)
    summed = 2 * batch * WIDTH / (PROFILE.memory_rate * 0.5)  # what makes a loss of the outputs
    assert time.forward == pytest.approx(products + summed, rel=0.001)
    assert time.backward == pytest.approx(2 * products * (1 - 1 / (2 * LAYERS)), rel=0.1)  # no gradient of the input


def test_a_small_batch_is_bound_by_memory():
    assert timed(1).forward == pytest.approx(2 * NUMEL / (PROFILE.memory_rate * 0.5), rel=0.02)


def test_an_operation_takes_at_least_a_call():
    slow = replace(PROFILE, reach=replace(REACH, call=1.0))
    trace = trace_step(build(), torch.empty(1, WIDTH, device="meta"), lambda m, b: m(b).sum())
    assert phase_seconds(trace, "forward", roofline(slow)) == pytest.approx(LAYERS + 1)


def test_a_step_on_the_device_moves_states_gradients_and_weights():
    assert timed(1).optimizer == pytest.approx(NUMEL * (2 * 12 + 3 * 2) / (PROFILE.memory_rate * 0.5))
    assert timed(1, zero=1, num_ranks=4).optimizer == pytest.approx(timed(1).optimizer / 4)


def host_times(batch: int) -> StepTimes:
    link, plain = PROFILE.host_link * 0.5, timed(batch)
    return StepTimes(
        forward=plain.forward,
        backward=plain.backward,
        d2h=2 * NUMEL / link,
        host=30 * NUMEL / (PROFILE.host_rate * 0.5),
        h2d=2 * NUMEL / link,
        num_buckets=LAYERS,
    )


@pytest.mark.parametrize("batch", [1, 2**12, 2**17])
def test_superoffload_hides_as_its_planner_says(batch):
    offload = OffloadConfig(bucket_mb=2, gpu_fraction=0.0)
    times = host_times(batch)
    hidden = exposed_seconds(times, best_plan(times, 1.0), 1.0)  # as if every step were clipped
    assert timed(batch, offload=offload).optimizer == pytest.approx(hidden, rel=1e-6)


def test_the_cpu_engine_waits_for_the_host():
    offload = OffloadConfig(engine="cpu", bucket_mb=2, gpu_fraction=0.0)
    times = host_times(2**17)
    found = timed(2**17, offload=offload).optimizer
    assert found >= times.host
    assert found == pytest.approx((times.d2h + times.h2d) / LAYERS + times.host, rel=0.2)


def test_zenflow_hides_what_a_window_takes():
    offload = OffloadConfig(engine="zenflow", bucket_mb=2, gpu_fraction=0.0)
    cpu = OffloadConfig(engine="cpu", bucket_mb=2, gpu_fraction=0.0)
    assert timed(2**17, offload=offload).optimizer < 0.1 * timed(2**17, offload=cpu).optimizer


def test_activations_that_the_link_has_no_time_for_make_a_step_longer():
    module, batch = build(), 2**12
    setup = Setup(zero=ZeroConfig(), offload=None, precision=choose("bf16-true"), micro_batches=3)
    tokens = torch.empty(batch, WIDTH, device="meta")
    trace = trace_step(module, tokens, lambda m, b: m(b).sum(), weights=torch.bfloat16)

    def late(nbytes, profile=PROFILE, **changed):
        moved = replace(trace, on_host=HostActivations(nbytes, nbytes, nbytes))
        changed_setup = replace(setup, **changed)
        params = params_of(module, changed_setup)
        return step_time(moved, params, changed_setup, profile, roofline(profile)).activations / 3

    link, plain = PROFILE.host_link * 0.5, timed(batch)
    assert late(0) == late(int(plain.forward * link * 0.99)) == 0
    more = int(10 * (plain.forward + plain.backward) * link)
    assert late(more) == pytest.approx(2 * more / link - plain.forward - plain.backward)
    # Weights that stream back for backward take the link first.
    flowing = {"offload": OffloadConfig(weights="flow", bucket_mb=2), "flows": True}
    streamed = 2 * NUMEL / link
    behind = max(0.0, streamed - plain.backward)
    both = 2 * more / link + streamed - plain.forward - plain.backward - behind
    assert late(more, **flowing) == pytest.approx(both)
    shared = replace(PROFILE, shares_cores=True)
    assert late(1000, shared) == pytest.approx(4 * 1000 / (PROFILE.memory_rate * 0.5))


def test_nothing_is_hidden_from_cores_that_do_both():
    shared = replace(PROFILE, shares_cores=True)
    times = host_times(2**17)
    found = timed(2**17, offload=OffloadConfig(gpu_fraction=0.0), profile=shared).optimizer
    assert found == pytest.approx(times.d2h + times.host + times.h2d)


@pytest.mark.parametrize("home", ["host", "device"])
def test_on_cores_that_do_both_zenflow_takes_what_its_windows_move(home):
    """Of nine tenths of the columns the gradient is added up, 10 of the step's 30 bytes, and a fourth of their steps
    and copies; a tenth is stepped at every step, and all are divided by owner.
    """
    shared, times = replace(PROFILE, shares_cores=True), host_times(2**17)
    windows = {"topk": 0.1, "update_interval": 4, "accumulate_on": home}
    offload = OffloadConfig(engine="zenflow", bucket_mb=2, gpu_fraction=0.0, zenflow=windows)
    found = timed(2**17, offload=offload, profile=shared).optimizer
    sums = times.host * 10 / 30 + times.d2h if home == "host" else times.d2h / 4
    selected = 102 / WIDTH  # of 1024 columns
    # Divided: a copy that is transposed, one that is not, and weights that are put in place; then states of 12 bytes.
    each = 2 * (4 + 2 + 2 + (8 + 2 * (1 - selected)) / 4) + selected * (2 * 12 + 2 * 2)
    each += (1 - selected) * (2 + 24) if home == "device" else 0
    on_device = NUMEL * each / (PROFILE.memory_rate * 0.5)
    assert found == pytest.approx(on_device + 0.9 * (sums + (times.host + times.h2d) / 4))


def test_weights_stream_in_every_micro_batch():
    offload = OffloadConfig(weights="flow", bucket_mb=2)
    slow, shared = replace(PROFILE, host_link=1e6), replace(PROFILE, shares_cores=True)
    for profile, waits in ((slow, True), (shared, False)):
        one, four = (timed(1, offload=offload, flows=True, profile=profile, micro_batches=n) for n in (1, 4))
        streamed = 2 * NUMEL * 2 / (profile.host_link * 0.5) - waits * (one.forward + one.backward)
        assert four.optimizer - one.optimizer == pytest.approx(3 * streamed, rel=1e-6)


def test_what_fsdp2_exchanges_is_copied_by_the_device():
    """Weights come out of their buffer in both passes, gradients go into theirs: each byte is read and written."""
    no_links = replace(PROFILE, rank_link=1e30)
    hops = 2 * 3 * Latencies().rank  # of the last reduction and the last gather, which nothing hides
    assert timed(2**17, zero=3, num_ranks=4, profile=no_links).ranks == pytest.approx(COPIED + hops, rel=1e-6)
    assert timed(2**17, zero=2, num_ranks=4, profile=no_links).ranks == pytest.approx(hops, rel=1e-6)
    assert timed(1, zero=3).ranks == 0.0, "one rank exchanges nothing"


def test_ranks_add_what_does_not_hide():
    rate, share = PROFILE.rank_link * 0.5, 3 / 4
    exchanged = 2 * NUMEL * share / rate + 3 * Latencies().rank
    assert timed(1).ranks == 0.0
    long, short = timed(2**17, zero=2, num_ranks=4), timed(1, zero=2, num_ranks=4)
    assert long.ranks == pytest.approx(2 * exchanged)  # one bucket, whose hops nothing hides
    assert short.ranks > long.ranks
    assert timed(2**17, zero=3, num_ranks=4).ranks <= long.ranks + COPIED
    assert timed(2**17, zero=0, num_ranks=4).ranks == pytest.approx(2 * exchanged)


def test_nodes_exchange_each_ranks_part():
    """Rings within both nodes, then two rings between them, each with half of the bytes."""
    reach = 0.5
    within = 2 * NUMEL * (1 / 2) / (PROFILE.rank_link * reach) + Latencies().rank
    between = NUMEL * (1 / 2) / (PROFILE.node_link * reach) + Latencies().node
    found = timed(2**17, zero=2, num_ranks=4, per_node=2).ranks
    assert found == pytest.approx(2 * (within + between))


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_micro_batches_repeat_the_passes_and_not_the_step(zero):
    """Nothing hides behind passes that are this short, so that each exchange counts whole."""
    one, four = (timed(1, zero=zero, num_ranks=4, micro_batches=n) for n in (1, 4))
    assert (four.forward, four.backward, four.optimizer) == (4 * one.forward, 4 * one.backward, one.optimizer)
    num_units = LAYERS if zero == 3 else 1
    exchange = NUMEL * 2 * (3 / 4) / (PROFILE.rank_link * 0.5) + num_units * 3 * Latencies().rank
    repeated = {1: 0, 2: 3 * max(0.0, exchange - one.backward)}
    repeated[3] = 3 * (exchange - one.forward) + 3 * (2 * exchange - one.backward) + 3 * COPIED
    assert four.ranks == pytest.approx(one.ranks + repeated[zero], rel=0.02)


def test_weights_that_stream_slower_than_a_pass_are_waited_for():
    offload = OffloadConfig(weights="flow")
    link = 2 * NUMEL / (PROFILE.host_link * 0.5)
    stays, flows = (timed(1, offload=offload, flows=flows) for flows in (False, True))
    assert flows.optimizer > stays.optimizer + link
