"""The device's waits are measured from the passes that are recorded; what a trace has, see tests/cli/test_trace.py."""

from __future__ import annotations

import pytest
import torch

from lightning_superscale.run.report.phases import PhaseSeconds
from lightning_superscale.run.report.recorder import StepRecorder
from tests.helpers.played_device import Device


def test_passes_tell_where_a_device_may_wait():
    device, phases = Device(), PhaseSeconds()
    recorder = StepRecorder(torch.device("cpu"), None, 0, 0)
    waits = recorder.timeline.waits = device.waits()
    waits.ask()
    for seconds in (1, 2):
        with recorder.phase("forward", phases):
            device.now += 100
        with recorder.phase("backward", phases):
            device.now += 100
        phases.end_step()
        device.now += seconds
    assert waits.take() == 1


def test_a_pass_that_fails_is_over():
    device, phases = Device(), PhaseSeconds()
    recorder = StepRecorder(torch.device("cpu"), None, 0, 0)
    waits = recorder.timeline.waits = device.waits()
    waits.ask()
    waits.end_backward(0)
    phases.end_step()
    with pytest.raises(RuntimeError), recorder.phase("forward", phases):
        raise RuntimeError
    assert waits.take() == 0
