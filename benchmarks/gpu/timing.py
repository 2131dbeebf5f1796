"""Medians of repeated runs, by CUDA events on a GPU and by the clock elsewhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one run.

    Attributes:
        median_ms, min_ms, max_ms: over the repetitions.
        repetitions: how many were timed, after the warm-up.
    """

    median_ms: float
    min_ms: float
    max_ms: float
    repetitions: int

    def as_row(self, moved_bytes: int, roof_gb_s: float | None = None) -> dict[str, float | int]:
        """With the rate at which `moved_bytes` (read and written) went, and its share of a roof."""
        gb_s = moved_bytes / self.median_ms / 1e6
        row: dict[str, float | int] = {**asdict(self), "moved_bytes": moved_bytes, "gb_s": gb_s}
        return row if roof_gb_s is None else {**row, "ratio_to_copy_roof": gb_s / roof_gb_s}


def _one_ms(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def measure(run: Callable[[], object], device: torch.device, repetitions: int) -> Timing:
    """Time `run` after three warm-up runs (compilation, allocation, clocks)."""
    for _ in range(3):
        run()
    times = [_one_ms(run, device) for _ in range(repetitions)]
    return Timing(statistics.median(times), min(times), max(times), repetitions)
