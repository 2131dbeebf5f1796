"""When gradients leave: what backward makes now, and what ends a step."""

from __future__ import annotations

import contextlib

import pytest

from lightning_superscale.zero.grad_schedule import Departure, GradSchedule, NewGrad


def schedule(*, is_streamed: bool, no_sync: bool = True) -> GradSchedule:
    made = GradSchedule(no_sync=no_sync)
    if is_streamed:
        made.stream()
    return made


def test_gradients_wait_for_the_step_unless_they_are_streamed():
    assert schedule(is_streamed=False).new_grad is NewGrad.WAITS
    assert schedule(is_streamed=True).new_grad is NewGrad.LEAVES


def test_micro_batches_before_the_last_accumulate_and_may_be_nested():
    streamed, reduced = schedule(is_streamed=True), []
    with streamed.blocked(lambda: reduced.append(1)):
        with streamed.blocked(lambda: reduced.append(2)):
            assert streamed.new_grad is NewGrad.ACCUMULATES
        assert streamed.new_grad is NewGrad.ACCUMULATES
    assert streamed.new_grad is NewGrad.LEAVES
    assert reduced == []


def test_without_no_sync_each_micro_batch_leaves_and_is_reduced_at_its_end():
    streamed, reduced = schedule(is_streamed=True, no_sync=False), []
    with streamed.blocked(lambda: reduced.append(1)):
        assert streamed.new_grad is NewGrad.LEAVES
    assert reduced == [1]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_nothing_is_reduced_where_nothing_leaves_or_backward_failed(is_streamed):
    made, reduced = schedule(is_streamed=is_streamed, no_sync=False), []
    with contextlib.suppress(RuntimeError), made.blocked(lambda: reduced.append(1)):
        if is_streamed:
            raise RuntimeError
    assert reduced == []


def test_holding_goes_before_everything_else():
    streamed = schedule(is_streamed=True)
    with streamed.blocked(lambda: None), streamed.holding():
        assert streamed.new_grad is NewGrad.WAITS
    assert streamed.new_grad is NewGrad.LEAVES


def test_averages_last_for_one_step():
    kept = schedule(is_streamed=False)
    kept.mark_averaged()
    assert kept.departure is Departure.AVERAGED
    assert kept.new_grad is NewGrad.WAITS
    kept.end_step()
    assert kept.departure is Departure.AT_STEP


def test_the_end_of_a_step_changes_nothing_for_streamed_gradients():
    streamed = schedule(is_streamed=True)
    streamed.end_step()
    assert streamed.is_streamed
