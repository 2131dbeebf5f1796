"""Which plan superoffload's steps take, from clips, times and cores."""

from __future__ import annotations

import dataclasses

import pytest

from lightning_superscale.offload.planner.forecast import best_plan, exposed_seconds
from lightning_superscale.offload.superoffload import plan as plans
from lightning_superscale.offload.superoffload.plan import PlanChooser
from lightning_superscale.offload.superoffload.trial import FIRST_TRIAL_STEPS
from lightning_superscale.ops.cpu.pool import Pool
from lightning_superscale.ops.update import UpdatePath
from tests.offload.planner.test_choices import H100

NUM_PARAMS = 10**9
HOST_S = NUM_PARAMS * H100.adamw_ns_per_param * 1e-9


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def chooser(speculate="auto", *, clock=None, num_buckets=40, **options) -> PlanChooser:
    made = PlanChooser(speculate, **{"streams": True, "profile": H100, "clock": clock or Clock(), **options})
    for _ in range(num_buckets):
        made.add_work(NUM_PARAMS // num_buckets, 2 * NUM_PARAMS // num_buckets)
    return made


def run(made: PlanChooser, clock: Clock, step_s: float, clips) -> list[str]:
    """Steps of so many seconds, of which backward takes two thirds; the plan of each."""
    taken = []
    for is_clipped in clips:
        taken.append(made.plan)
        clock.now += step_s / 3
        made.note_gradient()
        made.note_gradient()
        clock.now += 2 * step_s / 3
        made.end_step(missed=is_clipped, may_miss=True)
    return [*taken, made.plan]


@pytest.mark.parametrize("clips", [[False] * 8, [True] * 8, [True, False] * 4])
def test_a_forward_that_hides_the_shortest_plan_gets_it_at_every_clip_rate(clips):
    clock = Clock()
    assert set(run(chooser(clock=clock), clock, 6 * HOST_S, clips)) == {"direct"}


def test_a_short_forward_looks_ahead_unless_steps_clip():
    """Forward is half as long as the host's work, so that only what is done before the verdict hides."""
    clock = Clock()
    made = chooser(clock=clock)
    step_s = 1.6 * HOST_S
    rare = run(made, clock, step_s, [True] + 20 * [False])
    assert rare[:2] == ["direct", "direct"]
    assert rare[-1] == "ahead"
    often = run(made, clock, step_s, 20 * [True])
    assert often[-1] == "early commit"
    assert often.count("ahead") <= 8


def test_the_choice_is_the_forecasts_at_the_clip_rate_that_was_seen():
    clock = Clock()
    made = chooser(clock=clock)
    for step_s in (0.2 * HOST_S, HOST_S, 1.5 * HOST_S, 3 * HOST_S):
        run(made, clock, step_s, [True, False, False] * 3)
        times = made.times()
        assert (times.forward, times.backward) == pytest.approx((step_s / 3, 2 * step_s / 3))
        assert times.host == pytest.approx(HOST_S)
        assert made.plan == best_plan(times, made.clip_rate)
        exposed = {plan: exposed_seconds(times, plan, made.clip_rate) for plan in ("ahead", "early commit", "direct")}
        assert exposed[made.plan] <= min(exposed.values()) + 0.005 * step_s


def test_the_clip_rate_is_a_mean_that_starts_with_one_clipped_step():
    made = chooser()
    rates = []
    for is_clipped in (False, False, True, True):
        made.end_step(missed=is_clipped, may_miss=True)
        rates.append(made.clip_rate)
    assert rates == pytest.approx([1 / 2, 1 / 3, 2 / 4, 3 / 5])
    for _ in range(50):
        made.end_step(missed=False, may_miss=True)
    assert made.clip_rate < 0.01
    made.end_step(missed=True, may_miss=True)
    assert made.clip_rate == pytest.approx(0.2, abs=0.01)


def test_without_any_clip_the_next_verdict_is_known():
    made = chooser()
    made.end_step(missed=False, may_miss=False)
    assert made.clip_rate == 0


def test_shared_memory_gets_the_shortest_plan_whatever_the_times():
    clock = Clock()
    made = chooser(clock=clock, has_own_memory=False)
    assert set(run(made, clock, 0.2 * HOST_S, [False] * 5)) == {"direct"}
    assert "the model is in the same memory" in made.reasons()[0]


@pytest.mark.parametrize(("deferred_s", "awaited_s"), [(1.0, 1.1), (1.1, 1.0)])
def test_in_shared_memory_steps_are_awaited_where_that_was_faster(deferred_s, awaited_s):
    clock = Clock()
    made = chooser(clock=clock, has_own_memory=False)
    awaited = []
    for _ in range(FIRST_TRIAL_STEPS + 20):
        awaited.append(made.awaits)
        run(made, clock, awaited_s if made.awaits else deferred_s, [True])
    assert set(awaited[:FIRST_TRIAL_STEPS]) == {False, True}
    assert set(awaited[FIRST_TRIAL_STEPS:]) == {awaited_s < deferred_s}
    (said,) = made.reasons()
    assert "1000.0 ms where" in said
    assert "1100.0 ms where" in said
    assert ("before the next forward" in said) is (awaited_s < deferred_s)


def test_steps_in_memory_of_their_own_are_never_awaited():
    clock = Clock()
    made = chooser(clock=clock)
    for _ in range(FIRST_TRIAL_STEPS + 20):
        assert not made.awaits
        run(made, clock, 6 * HOST_S, [True])


def test_steps_that_look_ahead_are_not_awaited():
    clock = Clock()
    made = chooser(True, clock=clock, has_own_memory=False)
    for _ in range(FIRST_TRIAL_STEPS + 20):
        assert (made.plan, made.awaits) == ("ahead", False)
        run(made, clock, HOST_S, [True])


def test_without_a_profile_the_clip_rate_alone_decides():
    clock = Clock()
    made = chooser(clock=clock, profile=None)
    taken = run(made, clock, 1.0, [False] * 6 + [True] * 3)
    # Rates 1/2, 1/3, 1/4: the third step that is not clipped is enough.
    assert taken[:4] == ["direct"] * 3 + ["ahead"]
    assert taken[-1] == "direct"


@pytest.mark.parametrize(("speculate", "streams", "never"), [(False, True, "ahead"), ("auto", False, "ahead")])
def test_what_may_not_look_ahead_does_not(speculate, streams, never):
    clock = Clock()
    made = chooser(speculate, clock=clock, streams=streams)
    assert never not in run(made, clock, 1.6 * HOST_S, [False] * 9)


def test_true_always_looks_ahead_if_gradients_leave_in_backward():
    clock = Clock()
    assert set(run(chooser(True, clock=clock), clock, 6 * HOST_S, [True] * 5)) == {"ahead"}
    assert "ahead" not in run(chooser(True, clock=clock, streams=False), clock, 6 * HOST_S, [False] * 5)


def test_the_hosts_speed_is_the_profiles_until_it_was_seen_at_work():
    clock = Clock()
    made = chooser(clock=clock)
    run(made, clock, 6 * HOST_S, [False] * 2)
    assert made.times().host == pytest.approx(HOST_S)
    made.note_work(2 * HOST_S, NUM_PARAMS / 2)
    assert made.times().host == pytest.approx(4 * HOST_S)
    for _ in range(2000):  # forty buckets of a step each
        made.note_work(HOST_S / 40, NUM_PARAMS / 40)
    assert made.times().host == pytest.approx(HOST_S, rel=0.01)


def test_an_interrupted_step_does_not_lengthen_backward():
    clock = Clock()
    made = chooser(clock=clock)
    run(made, clock, 3.0, [False])
    made.note_gradient()
    made.drop_step()
    clock.now += 2.0
    made.note_gradient()
    clock.now += 1.0
    made.end_step(missed=False, may_miss=True)
    assert made.times().backward == pytest.approx(1.0)


def test_figures_are_shares_of_all_units():
    made = chooser()
    assert [figure.measured for figure in made.figures()] == [None] * 3
    made.counts.ahead, made.counts.redone, made.counts.late, made.counts.direct = 5, 2, 4, 11
    assert {figure.name: figure.measured for figure in made.figures()} == {
        "ahead_share": 5 / 20,
        "redone_share": 2 / 20,
        "direct_share": 11 / 20,
    }


def test_reasons_tell_choice_and_counts():
    clock = Clock()
    made = chooser(clock=clock)
    run(made, clock, 6 * HOST_S, [True] * 3)
    made.counts.ahead, made.counts.redone, made.counts.late, made.counts.direct = 5, 2, 7, 11
    (said,) = made.reasons()
    assert "steps after the verdict" in said
    assert "100% of the last steps were clipped" in said
    assert f"takes {HOST_S * 1e3:.1f} ms of a step of {6 * HOST_S * 1e3:.1f} ms" in said
    assert "5 were looked at ahead, 2 of these again, 7 after the verdict, and 11 were stepped directly" in said


@pytest.mark.parametrize(("model", "own", "cpus", "expected"), [(1, 1, 2, True), (2, 1, 2, False), (4, 4, 8, True)])
def test_cores_are_the_optimizers_own_where_there_are_enough_of_them(monkeypatch, model, own, cpus, expected):
    monkeypatch.setattr(plans.torch, "get_num_threads", lambda: model)
    monkeypatch.setattr(plans, "available_cpus", lambda: tuple(range(cpus)))
    host = UpdatePath("native", lambda segments: None, own)
    pool = Pool(own)
    try:
        assert plans.has_own_cores(host, pool) is expected
        assert plans.has_own_cores(dataclasses.replace(host, num_threads=0), pool)  # a GPU's
    finally:
        pool.close()
