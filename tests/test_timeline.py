"""What is recorded, and when nothing is."""

from __future__ import annotations

import contextlib
import threading
import time

import torch

from lightning_superscale.timeline import Timeline, chrome_trace
from tests.helpers.played_device import Device

CPU = torch.device("cpu")


def test_nothing_is_recorded_while_it_is_closed():
    timeline = Timeline(CPU)
    with timeline.host("forward", "before"):
        pass
    timeline.open()
    assert timeline.close() == []
    with timeline.device("forward", "after"):
        pass
    timeline.open()
    assert timeline.close() == []


def test_spans_of_all_threads_come_in_order_of_their_start():
    timeline = Timeline(CPU)
    timeline.open()

    def work(name: str) -> None:
        with timeline.host("host optimizer", name, nbytes=3):
            time.sleep(0.002)

    with timeline.device("backward", "outer"):
        for name in ("first", "second"):
            thread = threading.Thread(target=work, args=(name,))
            thread.start()
            thread.join()
    spans = timeline.close()
    assert [span.name for span in spans] == ["outer", "first", "second"]
    outer, first, second = spans
    assert outer.start <= first.start < first.end <= second.start < second.end <= outer.end
    assert first.nbytes == 3


def test_what_raises_is_recorded_too():
    timeline = Timeline(CPU)
    timeline.open()
    try:
        with timeline.host("verdict", "fails"):
            raise ValueError("no")
    except ValueError:
        pass
    assert [span.name for span in timeline.close()] == ["fails"]


def test_a_stall_is_counted_always_and_recorded_while_it_is_open():
    timeline = Timeline(CPU)
    with timeline.stalled("before"):
        time.sleep(0.002)
    before = timeline.stalled_seconds
    assert before >= 0.002
    timeline.open()
    with contextlib.suppress(ValueError), timeline.stalled("fails"):
        time.sleep(0.002)
        raise ValueError("no")
    (span,) = timeline.close()
    assert (span.lane, span.name) == ("wait for host", "fails")
    assert timeline.stalled_seconds - before >= span.end - span.start >= 0.002


def test_a_chrome_trace_has_a_named_row_per_lane():
    timeline = Timeline(CPU)
    timeline.open()
    with timeline.host("forward", "step"), timeline.host("host to device", "weights", 7):
        pass
    events = chrome_trace(timeline.close(), rank=2, facts={"engine": "x"})["traceEvents"]
    rows = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    work = [event for event in events if event["ph"] == "X"]
    assert {(rows[event["tid"]], event["name"]) for event in work} == {
        ("forward", "step"),
        ("host to device", "weights"),
    }
    assert all(event["pid"] == 2 and event["dur"] >= 0 for event in work)
    assert [event["args"] for event in work if event["name"] == "weights"] == [{"bytes": 7}]


def pass_gate(device, waits, seconds):
    with waits.gate():
        device.now += seconds


def test_waits_of_a_device_are_those_between_steps_and_at_gates():
    device = Device()
    waits = device.waits()
    waits.ask()
    waits.begin_forward(0)  # no backward has ended yet
    pass_gate(device, waits, 100)
    waits.end_forward()
    waits.end_backward(0)
    device.now += 1
    waits.begin_forward(0)  # another micro-batch of the same step
    device.now += 100
    waits.end_forward()
    waits.end_backward(0)
    device.now += 2
    waits.begin_forward(1)
    device.now += 100  # forward itself
    pass_gate(device, waits, 4)
    assert waits.take() is None  # this forward is not over
    waits.end_forward()
    pass_gate(device, waits, 100)  # of an evaluation
    device.has_run = False
    assert waits.take() is None
    device.has_run = True
    assert waits.take() == 6
    assert waits.take() is None


def test_a_device_is_measured_only_when_asked():
    device = Device()
    waits = device.waits()
    for step in range(3):
        waits.end_backward(step)
        waits.begin_forward(step + 1)
        pass_gate(device, waits, 1)
        waits.end_forward()
    assert waits.take() is None


def test_what_was_not_taken_yet_is_not_measured_over():
    device = Device()
    waits = device.waits()
    for seconds in (3, 5):
        waits.ask()
        waits.end_backward(0)
        device.now += seconds
        waits.begin_forward(1)
        waits.end_forward()
    assert waits.take() == 3


def test_a_cpu_has_no_waits_of_a_device():
    waits = Timeline(CPU).waits
    waits.ask()
    waits.end_backward(0)
    waits.begin_forward(1)
    with waits.gate():
        pass
    assert waits.take() is None
