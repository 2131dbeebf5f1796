"""Acceptance of the CPU ops: `python benchmarks/ops.py [--numel 48000000] [--output ops.json]`.

Every case is timed in slices of 2M elements swept over arrays much larger than the last-level cache, the cases
interleaved slice by slice, so that a disturbance meets all of them. A slice counts when its CPU time is at least
0.9 of its wall time; medians of CPU time over those slices are compared. One thread: the native ops run in the
calling thread, torch is held to one. Exits with 1 when a limit is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lightning_superscale.ops.cpu import adamw, flat
from lightning_superscale.ops.cpu.pool import Pool
from lightning_superscale.ops.native import loader
from lightning_superscale.ops.types import AdamWHyper, AdamWSegment

SLICE_NUMEL = 2_000_000


class Limit(NamedTuple):
    number: int
    check: str
    at_least: bool
    limit: float
    measured: float

    @property
    def met(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


class Arrays:
    """Master weights, moments and gradients of one model, sliced by element range."""

    def __init__(self, numel: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.numel = numel
        self.p = torch.randn(numel, generator=generator)
        self.m = torch.randn(numel, generator=generator).mul_(1e-3)
        self.v = torch.rand(numel, generator=generator).mul_(1e-6)
        self.g = torch.randn(numel, generator=generator).mul_(1e-3)
        self.g16 = self.g.bfloat16()
        self.next16 = self.g16.flip(0)
        self.w16 = self.p.bfloat16()
        self.m16 = self.m.bfloat16()
        self.v16 = self.v.bfloat16()
        self.scratch = torch.empty(numel)


HYPER = AdamWHyper(lr=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=10, grad_scale=0.5, ieee_sqrt=True)


class NativeCall:
    """One prebuilt `lss_adamw` call in the calling thread: what a hot path pays."""

    def __init__(self, mode: adamw._Mode, segment: AdamWSegment, *, stats: bool) -> None:
        self._lib = loader.native_or_raise("benchmarks/ops.py")
        self._segment = segment  # keeps the tensors alive
        self._structs = adamw._structs(mode, [segment])
        self._mode, self._stats = mode.code, int(stats)

    def __call__(self) -> None:
        loader.check(self._lib, self._lib.lss_adamw(None, self._mode, self._structs, 1, self._stats, None, None))


def slice_cases(a: Arrays, start: int) -> dict[str, Callable[[], object]]:
    """The timed calls over one slice."""
    s = slice(start, start + SLICE_NUMEL)
    lib = loader.native_or_raise("benchmarks/ops.py")
    step = torch.tensor(float(HYPER.step))
    none: list[Tensor] = []

    def segment(grad: Tensor, weight_out: Tensor | None, *, m: Tensor = a.m, v: Tensor = a.v) -> AdamWSegment:
        return AdamWSegment(
            param=a.p[s],
            exp_avg=m[s],
            exp_avg_sq=v[s],
            grad=grad[s],
            hyper=HYPER,
            weight_out=None if weight_out is None else weight_out[s],
            next_grad=a.next16[s],
            next_hyper=HYPER,
        )

    def torch_fused(grad: Tensor) -> None:
        torch._fused_adamw_(
            [a.p[s]], [grad], [a.m[s]], [a.v[s]], none, [step], lr=HYPER.lr, beta1=HYPER.beta1, beta2=HYPER.beta2,
            weight_decay=HYPER.weight_decay, eps=HYPER.eps, amsgrad=False, maximize=False,
        )  # fmt: skip

    def torch_chain() -> None:
        g = a.scratch[s]
        g.copy_(a.g16[s])
        torch.linalg.vector_norm(g)
        g.mul_(HYPER.grad_scale)
        torch_fused(g)
        a.w16[s].copy_(a.p[s])

    fused = NativeCall(adamw._COMMIT, segment(a.g16, a.w16), stats=False)

    def our_chain() -> None:
        flat_sumsq()
        fused()

    roof_pointers = [t[s].data_ptr() for t in (a.p, a.m, a.v, a.g)]
    total = torch.empty(1, dtype=torch.float64)
    result = loader.c_double()
    g16 = a.g16[s].data_ptr()

    def flat_sumsq() -> None:
        loader.check(lib, lib.lss_sumsq(None, g16, 1, SLICE_NUMEL, result, None, None))
        total[0] = result.value

    return {
        "roof": lambda: lib.lss_bench_roof(*roof_pointers, SLICE_NUMEL),
        "fp32": NativeCall(adamw._COMMIT, segment(a.g, None), stats=False),
        "torch_fused": lambda: torch_fused(a.g[s]),
        "fused": fused,
        "fused_stats": NativeCall(adamw._COMMIT, segment(a.g16, a.w16), stats=True),
        "our_chain": our_chain,
        "torch_chain": torch_chain,
        "peek": NativeCall(adamw._PEEK, segment(a.g16, a.w16), stats=False),
        "commit_peek": NativeCall(adamw._COMMIT_PEEK, segment(a.g16, a.w16), stats=False),
        "moments_fp32": NativeCall(adamw._COMMIT, segment(a.g, None), stats=False),
        "moments_bf16": NativeCall(adamw._COMMIT, segment(a.g, None, m=a.m16, v=a.v16), stats=False),
        "moments_fp32_fused": NativeCall(adamw._COMMIT, segment(a.g16, a.w16), stats=True),
        "moments_bf16_fused": NativeCall(adamw._COMMIT, segment(a.g16, a.w16, m=a.m16, v=a.v16), stats=True),
    }


def time_cases(a: Arrays, sweeps: int) -> dict[str, float]:
    """Median CPU nanoseconds per parameter of each case's undisturbed slices."""
    starts = range(0, a.numel - SLICE_NUMEL + 1, SLICE_NUMEL)
    cases = [slice_cases(a, start) for start in starts]
    names = list(cases[0])
    samples: dict[str, list[float]] = {name: [] for name in names}
    for sweep in range(sweeps + 1):
        for position in range(len(cases)):
            for offset in range(len(names)):
                # A case's slice is half the array away from the one its neighbour has just left in the cache.
                name = names[offset]
                call = cases[(position + offset * (len(cases) // 2 + 1)) % len(cases)][name]
                wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
                call()
                cpu, wall = time.thread_time_ns() - cpu, time.perf_counter_ns() - wall
                if sweep > 0 and cpu >= 0.9 * wall:
                    samples[name].append(cpu / SLICE_NUMEL)
    missing = [name for name, kept in samples.items() if len(kept) < 5]
    if missing:
        raise RuntimeError(f"too few undisturbed slices of {missing}: the machine is too busy to measure")
    return {name: statistics.median(kept) for name, kept in samples.items()}


def main_thread_ops(background: Callable[[], object]) -> float:
    """Small torch ops per second in this thread while `background` runs in another."""
    x = torch.randn(64, 64)
    finished = threading.Event()

    def run() -> None:
        background()
        finished.set()

    thread = threading.Thread(target=run)
    start = time.perf_counter()
    thread.start()
    count = 0
    while not finished.is_set():
        torch.add(x, x)
        count += 1
    elapsed = time.perf_counter() - start
    thread.join()
    return count / elapsed


def overlap_ratio(a: Arrays) -> float:
    """Main-thread ops during our background step, as a share of those during torch's fused step."""
    segment = AdamWSegment(param=a.p, exp_avg=a.m, exp_avg_sq=a.v, grad=a.g, hyper=HYPER)
    call = NativeCall(adamw._COMMIT, segment, stats=False)
    step = torch.tensor(float(HYPER.step))

    def torch_fused() -> None:
        torch._fused_adamw_(
            [a.p], [a.g], [a.m], [a.v], [], [step], lr=HYPER.lr, beta1=HYPER.beta1, beta2=HYPER.beta2,
            weight_decay=HYPER.weight_decay, eps=HYPER.eps, amsgrad=False, maximize=False,
        )  # fmt: skip

    pairs = [(main_thread_ops(call), main_thread_ops(torch_fused)) for _ in range(11)]
    return statistics.median(ours for ours, _ in pairs) / statistics.median(theirs for _, theirs in pairs)


def pool_round_trip_us() -> float:
    """Median microseconds from submission to the end of the wait, with parked workers."""
    pool = Pool(1)
    dst, src = torch.empty(16), torch.empty(16)
    samples = []
    for _ in range(2000):
        start = time.perf_counter_ns()
        flat.submit_copy(dst, src, pool=pool).wait()
        samples.append((time.perf_counter_ns() - start) / 1e3)
        time.sleep(1e-4)
    return statistics.median(samples)


def hardware() -> dict[str, object]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = models[0] if models else cpu
    return {
        "cpu": cpu,
        "cpus": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "isa": loader.isa_name(),
        "isas": loader.supported_isas(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def limits(ns: dict[str, float], overlap: float, round_trip_us: float) -> list[Limit]:
    return [
        Limit(1, "fused step (bf16 in and out, sumsq) / roof", False, 1.15, ns["fused_stats"] / ns["roof"]),
        Limit(2, "torch chain / our chain", True, 1.6, ns["torch_chain"] / ns["our_chain"]),
        Limit(3, "ours fp32 / torch fused", False, 1.10, ns["fp32"] / ns["torch_fused"]),
        Limit(4, "fused sumsq on / off", False, 1.05, ns["fused_stats"] / ns["fused"]),
        Limit(5, "commit_peek / commit", False, 1.25, ns["commit_peek"] / ns["fused"]),
        Limit(6, "bf16 moments / fp32 moments", False, 0.92, ns["moments_bf16"] / ns["moments_fp32"]),
        Limit(8, "main-thread ops during our step / during torch fused", True, 0.5, overlap),
        Limit(9, "pool round trip, microseconds", False, 50.0, round_trip_us),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=48_000_000)
    parser.add_argument("--sweeps", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    arrays = Arrays(options.numel)
    ns = time_cases(arrays, options.sweeps)
    checks = limits(ns, overlap_ratio(arrays), pool_round_trip_us())
    report = {
        "hardware": hardware(),
        "numel": options.numel,
        "ns_per_param": {name: round(value, 4) for name, value in ns.items()},
        "checks": [{**check._asdict(), "measured": round(check.measured, 3), "met": check.met} for check in checks],
    }
    text = json.dumps(report, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")
    return 0 if all(check.met for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
