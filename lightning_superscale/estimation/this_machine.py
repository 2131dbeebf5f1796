"""Rates of the machine that this process runs on: its hardware profile, and every operation of a step, timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.estimation.devices import THIS_MACHINE, DeviceProfile, Reach
from lightning_superscale.estimation.tracing.operations import Sample, TensorSpec, TracedOperation
from lightning_superscale.offload.planner.profile import BYTES_PER_PARAM
from lightning_superscale.offload.planner.profile_cache import cached_profile
from lightning_superscale.torch_private import tree_map

_MEASURED = Reach(products=1.0, memory=1.0, links=1.0, host=1.0, call=0.0)
_PRODUCT = 1024  # rows and columns of the product whose rate stands for operations that can't be timed
_ROUNDS, _LEAST_S = 5, 2e-3


def this_device() -> torch.device:
    """The device that training here would use."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def measure_profile() -> DeviceProfile:
    """Measure this machine, in a few seconds; the profile of link and host is kept for later runs.

    One that is kept already is measured again: it may be of a time when the machine was busy.

    Raises:
        SuperScaleError: its speed could not be measured.
    """
    device = this_device()
    profile = cached_profile(device, measures_again=True)
    if profile is None:
        raise SuperScaleError(
            'device="this machine" measures it, and LSS_PROFILE=off forbids that, or it failed. Unset LSS_PROFILE, or '
            "name a device."
        )
    is_cpu = device.type == "cpu"
    memory = psutil.virtual_memory().total
    host_rate = BYTES_PER_PARAM / (profile.adamw_ns_per_param * 1e-9)
    return DeviceProfile(
        name=THIS_MACHINE,
        memory=memory if is_cpu else torch.cuda.get_device_properties(device).total_memory,
        flops16=_product_rate(torch.bfloat16, device),
        flops32=_product_rate(torch.float32, device),
        memory_rate=host_rate if is_cpu else _copy_rate(device),
        host_link=min(profile.d2h_both, profile.h2d_both),
        rank_link=profile.d2h_both,
        node_link=profile.d2h_both,
        host_memory=memory,
        host_rate=host_rate,
        reach=_MEASURED,
        shares_cores=is_cpu,
    )


def _product_rate(dtype: torch.dtype, device: torch.device) -> float:
    left, right = (torch.ones(_PRODUCT, _PRODUCT, dtype=dtype, device=device) for _ in range(2))
    return 2 * _PRODUCT**3 / _seconds(lambda: left @ right, device)


def _copy_rate(device: torch.device) -> float:
    source = torch.zeros(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)


class MeasuredOperations:
    """Seconds of each operation of a step by running it here, once for all alike.

    Args:
        otherwise: gives the seconds of an operation that can't run by itself.
    """

    def __init__(self, otherwise: Callable[[TracedOperation], float]) -> None:
        self._otherwise = otherwise
        self._device = this_device()
        self._seconds: dict[Sample, float | None] = {}

    def __call__(self, one: TracedOperation) -> float:
        if one.sample not in self._seconds:
            self._seconds[one.sample] = self._measure(one.sample)
        seconds = self._seconds[one.sample]
        return self._otherwise(one) if seconds is None else seconds

    def _measure(self, sample: Sample) -> float | None:
        try:
            args, kwargs = tree_map(self._filled, (sample.args, dict(sample.kwargs)))
            with torch.no_grad():
                return _seconds(lambda: sample.op(*args, **kwargs), self._device)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
            return None  # its arguments have to be values of a kind, or it needs more memory than there is

    def _filled(self, leaf: Any) -> Any:
        if isinstance(leaf, TensorSpec):
            tensor = torch.empty_strided(leaf.shape, leaf.strides, dtype=leaf.dtype, device=self._device)
            return tensor.fill_(0.125) if leaf.dtype.is_floating_point else tensor.zero_()
        return self._device if isinstance(leaf, torch.device) else leaf


def _seconds(run: Callable[[], Tensor | object], device: torch.device) -> float:
    """Seconds of one call: the median of a few rounds, after one to warm up."""

    def once(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / calls

    once(1)
    calls = max(1, round(_LEAST_S / max(once(1), 1e-7)))
    return statistics.median(once(calls) for _ in range(_ROUNDS))
