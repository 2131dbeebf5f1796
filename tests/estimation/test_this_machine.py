"""Rates of this machine."""

from __future__ import annotations

import pytest
import torch

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.estimation import this_machine
from lightning_superscale.estimation.this_machine import MeasuredOperations, measure_profile
from lightning_superscale.estimation.tracing.operations import traced


def operation(op, *args, **kwargs):
    return traced("forward", op, args, kwargs, op(*args, **kwargs))


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def test_an_operation_is_measured_once(monkeypatch):
    seconds = MeasuredOperations(lambda one: pytest.fail("it can run"))
    small = operation(torch.ops.aten.mm.default, meta(64, 64), meta(64, 64))
    assert seconds(small) > 0
    monkeypatch.setattr(seconds, "_measure", lambda sample: pytest.fail("it was measured"))
    assert seconds(operation(torch.ops.aten.mm.default, meta(64, 64), meta(64, 64))) == seconds(small)


def test_an_operation_that_can_not_run_by_itself_has_other_seconds():
    seconds = MeasuredOperations(lambda one: 42.0)
    broken = operation(torch.ops.aten.mm.default, meta(4, 5), meta(5, 6))
    sample = broken.sample
    object.__setattr__(sample, "args", (sample.args[0], sample.args[0]))
    assert seconds(broken) == 42.0


def test_measuring_may_be_forbidden(monkeypatch):
    monkeypatch.setenv("LSS_PROFILE", "off")
    with pytest.raises(SuperScaleError, match="LSS_PROFILE=off forbids that"):
        measure_profile()


def test_a_profile_that_is_kept_is_not_trusted(monkeypatch):
    """It may be of a time when the machine was busy, and an optimizer's step would take twice as long as it does."""
    asked = []

    def measured(device, **options):
        asked.append(options)

    monkeypatch.setattr(this_machine, "cached_profile", measured)
    with pytest.raises(SuperScaleError, match="could|failed"):
        measure_profile()
    assert asked == [{"measures_again": True}]


def test_a_cpu_is_its_own_host():
    found = measure_profile()
    if not torch.cuda.is_available():
        assert found.shares_cores
        assert found.memory == found.host_memory
    assert found.reach.products == 1.0
    assert found.flops32 > 1e8
    assert found.host_rate > 1e8
