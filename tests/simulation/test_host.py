"""The host's optimizer in simulated time, against hand-made schedules."""

from __future__ import annotations

import pytest

from lightning_superscale.offload.planner.forecast import HostSchedule, Passes
from lightning_superscale.simulation.host import HostOptimizer
from lightning_superscale.simulation.machine import SharedPorts, new_environment
from lightning_superscale.simulation.program import Unit

pytest.importorskip("simpy")

PASSES = Passes(commit=0.75, look=0.5, direct=0.9)
UNITS = [Unit(reduced_bytes=0, gathered_bytes=0, link=1.0, host=10.0) for _ in range(2)]


def arrivals(plan: str, pauses: list[float]) -> list[float]:
    """Per step, the seconds from its verdict to the last new weight; a pause comes before each next verdict."""
    env = new_environment()
    host = HostOptimizer(env, SharedPorts(env), 0, UNITS, HostSchedule(plan=plan, passes=PASSES))
    found = []

    def steps():
        for pause in pauses:
            yield env.timeout(pause)
            start = env.now
            at_once = env.timeout(0)
            yield from host.step([1, 0], {0: at_once, 1: at_once}).values()
            found.append(env.now - start)

    env.run(until=env.process(steps()))
    return found


def test_direct_works_after_the_verdict():
    # Two passes of 9 s one after the other; the last upload of 1 s follows.
    assert arrivals("direct", [0.0, 100.0]) == pytest.approx([19.0, 19.0])


def test_early_commit_leaves_the_looks():
    # With time for both commits of 7.5 s before the next verdict, only two looks of 5 s follow it.
    assert arrivals("early commit", [0.0, 100.0]) == pytest.approx([11.0, 11.0])


def test_what_was_not_committed_is_committed_with_its_look():
    # No time: the first commit began with the last look's upload, and is not interrupted: 6.5 s of it are left. That
    # unit's look is 5 s, the other one's pass of both 10 s.
    assert arrivals("early commit", [0.0, 0.0])[1] == pytest.approx(6.5 + 5 + 10 + 1)


def test_gradients_share_the_way_down_with_nothing_but_one_another():
    env = new_environment()
    host = HostOptimizer(env, SharedPorts(env), 0, UNITS, HostSchedule(passes=PASSES))
    env.run(until=[host.send(0), host.send(1)][-1])
    assert env.now == 2.0
    assert host.hosted == [0, 1]


def test_a_unit_whose_gradient_is_late_is_passed_by():
    env = new_environment()
    host = HostOptimizer(env, SharedPorts(env), 0, UNITS, HostSchedule(passes=PASSES))
    arrived = host.step([1, 0], {1: env.timeout(2.0), 0: env.timeout(0.0)})
    env.run(until=arrived[0])
    assert env.now == 10.0
    env.run(until=arrived[1])
    assert env.now == 19.0
