"""Trials of two ways of a step: what they choose, how often, and what disturbs them."""

from __future__ import annotations

import random

import pytest

from lightning_superscale.offload.superoffload.trial import FIRST_TRIAL_STEPS, Trial


def run(trial: Trial, num_steps: int, seconds) -> list[bool]:
    """The way of each step; `seconds(step, way)` says how long it takes."""
    ways = []
    for step in range(num_steps):
        ways.append(trial.takes_second)
        trial.end_step(seconds(step, ways[-1]))
    return ways


@pytest.mark.parametrize("second_is_faster", [False, True])
def test_the_faster_way_is_kept_until_the_next_trial(second_is_faster):
    trial = Trial()
    times = {second_is_faster: 1.0, not second_is_faster: 1.02}
    ways = run(trial, FIRST_TRIAL_STEPS + 200, lambda step, way: times[way])
    assert set(ways[FIRST_TRIAL_STEPS:]) == {second_is_faster}
    assert trial.medians == (times[False], times[True])


def test_both_ways_take_as_many_steps_of_a_trial_in_turns():
    ways = run(Trial(), FIRST_TRIAL_STEPS - 1, lambda step, way: 1.0)  # a run's first step has no time
    tried = ways[-30:]
    assert tried.count(True) == tried.count(False)
    assert sum(a != b for a, b in zip(tried, tried[1:], strict=False)) == 5


def test_trials_become_rare_while_the_same_way_wins():
    trial = Trial()
    ways = run(trial, 20_000, lambda step, way: 1.0 if way else 2.0)
    first = [step for step in range(1, len(ways)) if ways[step - 1] and not ways[step]]
    # Of each trial's slow turns the starts; a trial comes after ever longer rests.
    trials = [step for step, before in zip(first, [-100, *first], strict=False) if step - before > 20]
    rests = [b - a for a, b in zip(trials, trials[1:], strict=False)]
    assert rests == sorted(rests)
    assert rests[0] < 600 < 4000 < rests[-1] < 4100
    assert ways.count(False) < 200


def test_a_way_that_has_become_slower_is_left_and_watched_again():
    trial = Trial()
    ways = run(trial, 3000, lambda step, way: 1.0 if way == (step < 800) else 1.2)
    assert ways[700:750] == [True] * 50 or ways[650:700] == [True] * 50
    assert ways[-100:] == [False] * 100


def test_steps_that_something_else_made_long_do_not_decide():
    """Validation, a checkpoint, or another process: one step of four takes ten times as long."""
    chooser = random.Random(0)
    for _ in range(50):
        trial = Trial()
        run(
            trial,
            FIRST_TRIAL_STEPS,
            lambda step, way: (1.0 if way else 1.05) * (10 if step % 4 == 0 else chooser.uniform(0.98, 1.02)),
        )
        assert trial.takes_second


def test_the_first_step_of_a_turn_which_ends_the_work_of_the_one_before_is_not_counted():
    trial, last = Trial(), []

    def seconds(step, way):
        changes = bool(last) and last[-1] != way
        last.append(way)
        return 100.0 if changes else 1.0 if way else 1.1

    run(trial, FIRST_TRIAL_STEPS, seconds)
    assert trial.medians == (1.1, 1.0)
