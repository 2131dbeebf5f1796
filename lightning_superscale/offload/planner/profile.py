"""Measures the speeds of link, host memory and optimizer kernel that offloading depends on, in about two seconds.

The copies go through the real link and the step through the real kernel, so the figures are those that training can
reach, not those of a data sheet. Ranks of one host that measure at the same time disturb one another, as they do
when they train.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_superscale.offload.link.link import Link, link_for
from lightning_superscale.offload.planner.numa import available_cpus
from lightning_superscale.ops.cpu.adamw import kernel_name, submit_adamw_commit_peek
from lightning_superscale.ops.cpu.flat import accumulate, submit_copy
from lightning_superscale.ops.cpu.memory import HostBuffer
from lightning_superscale.ops.cpu.pool import Pool
from lightning_superscale.ops.native import loader
from lightning_superscale.ops.types import AdamWHyper, AdamWSegment

# Number of parameters in the measured step: more than the last cache of most processors holds. Fewer without the native
# library, since the PyTorch operations take ten times as long.
_NUMEL, _NUMEL_UNFUSED = 8 * 2**20, 2**20
_COPY_BYTES = 32 * 2**20
# Bytes that commit_peek moves with 16-bit weights: master and moments read and written, two gradients read, one weight
# written.
BYTES_PER_PARAM = 24 + 3 * 2
_ROUNDS = 3
# The share of the best rate at which a number of threads is enough.
_ENOUGH = 0.95
# The share of CPU time below which figures say more about other work on the machine than about the machine.
_QUIET = 0.9


@dataclass(frozen=True, slots=True)
class HardwareKey:
    """The hardware that a profile was measured on. Another key has another profile.

    Attributes:
        num_cpus: number of CPUs that the measuring rank may use.
    """

    cpu: str
    num_cpus: int
    device: str
    kernel: str
    torch_version: str
    version: str


@dataclass(frozen=True, slots=True)
class HardwareProfile:
    """Rates of one rank's hardware.

    Attributes:
        d2h, h2d: bytes per second over the link, one direction at a time.
        d2h_both, h2d_both: bytes per second of each direction while the other is busy.
        memory: (threads, bytes read and written per second) of copies within host memory, by rising threads.
        adamw_ns_per_param: nanoseconds per parameter of the native AdamW's commit_peek, with 16-bit gradients and
            weights and `adamw_threads` threads.
        adamw_fp32_ns_per_param: nanoseconds per parameter with fp32 gradients and new weights, which the device casts.
        accumulate_ns_per_param: nanoseconds per parameter in which gradients of 16 bits are added to sums in fp32.
        adamw_threads: fewest threads that come near the kernel's best rate, with a CPU left for the launching thread;
            what the three figures above were measured with.
        cpu_share: CPU time that the kernel's threads got of the time they ran for, 1 at most. Other work had the rest.
    """

    key: HardwareKey
    d2h: float
    h2d: float
    d2h_both: float
    h2d_both: float
    memory: tuple[tuple[int, float], ...]
    adamw_ns_per_param: float
    adamw_fp32_ns_per_param: float
    accumulate_ns_per_param: float
    adamw_threads: int
    cpu_share: float = 1.0

    def __post_init__(self) -> None:
        rates = [self.d2h, self.h2d, self.d2h_both, self.h2d_both, *(rate for _, rate in self.memory)]
        rates += [self.adamw_ns_per_param, self.adamw_fp32_ns_per_param, self.accumulate_ns_per_param]
        if not self.memory or not all(0 < rate < float("inf") for rate in rates) or self.adamw_threads < 1:
            raise ValueError(f"expected positive, finite rates, found {self}")
        if not 0 <= self.cpu_share <= 1:
            raise ValueError(f"expected a share of CPU time between 0 and 1, found {self.cpu_share}")

    @property
    def is_quiet(self) -> bool:
        """Whether the kernel's threads had their cores nearly to themselves."""
        return self.cpu_share >= _QUIET

    def summary(self) -> str:
        """The measured speeds in one line."""
        gb = 1e9
        best = max(rate for _, rate in self.memory)
        busy = (
            "" if self.is_quiet else f"; other work took {1 - self.cpu_share:.0%} of their CPU time: runs measure anew"
        )
        return (
            f"link {self.d2h / gb:.1f} GB/s to the host and {self.h2d / gb:.1f} GB/s back "
            f"({self.d2h_both / gb:.1f} and {self.h2d_both / gb:.1f} at once), host memory "
            f"{self.memory[0][1] / gb:.1f} GB/s with one thread and {best / gb:.1f} GB/s at best, AdamW "
            f"{self.adamw_ns_per_param:.2f} ns per parameter with 16-bit gradients and weights and "
            f"{self.adamw_fp32_ns_per_param:.2f} ns with fp32 ones, adding gradients up "
            f"{self.accumulate_ns_per_param:.2f} ns, with {self.adamw_threads} "
            f"thread{'s' if self.adamw_threads > 1 else ''}{busy}"
        )


def enough_threads(rates: Sequence[tuple[int, float]], at_most: int) -> int:
    """The fewest threads of at most `at_most` whose measured rate comes near the best of these.

    Args:
        rates: measured (threads, rate), by rising threads.
    """
    allowed = [(threads, rate) for threads, rate in rates if threads <= at_most] or list(rates[:1])
    best = max(rate for _, rate in allowed)
    return min(threads for threads, rate in allowed if rate >= _ENOUGH * best)


def key_of(device: torch.device, cpus: Sequence[int]) -> HardwareKey:
    """The key under which a profile of this process, device and version is filed."""
    from lightning_superscale import __version__

    return HardwareKey(
        cpu=_cpu_name(),
        num_cpus=len(cpus),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        kernel=kernel_name(),
        torch_version=str(torch.__version__),
        version=__version__,
    )


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith(("model name", "Hardware", "CPU part")):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def measure(device: torch.device, cpus: Sequence[int] = ()) -> HardwareProfile:
    """Measure this rank's link, host memory and optimizer kernel, in about two seconds.

    Allocates 64 MiB on the device and 304 MiB on the host, and frees them.

    Args:
        device: the rank's device.
        cpus: CPUs that the rank may use; empty for those of the process.

    Raises:
        RuntimeError: a copy over the link failed.
        MemoryError: the system refused the memory.
    """
    cpus = tuple(cpus) or available_cpus()
    is_native = loader.native() is not None
    numel = _NUMEL if is_native else _NUMEL_UNFUSED
    # Without the native library, work runs in the thread that submits it.
    counts = _thread_counts(len(cpus)) if is_native else [1]
    link = _measure_link(link_for(device), device)
    with contextlib.closing(Pool(counts[-1], cpus=cpus)) as pool:
        host = HostBuffer(numel * BYTES_PER_PARAM, pool=pool)
    half = host.nbytes // 2
    dst, src = (host.tensor(torch.uint8, half, offset_bytes=start) for start in (0, half))
    copies = []
    for threads in counts:
        with contextlib.closing(Pool(threads, cpus=cpus)) as pool:
            copy = functools.partial(submit_copy, dst, src, pool=pool)
            copies.append((threads, 2 * half / _best(lambda: copy().wait())))  # noqa: B023
    is_ieee = device.type == "cuda"
    segment = _segment(host, numel, torch.bfloat16, is_ieee=is_ieee)
    shares = {threads: _CpuShare(threads) for threads in counts}
    seconds = {threads: _step_seconds(segment, cpus, shares[threads]) for threads in counts}
    threads = enough_threads([(n, numel / seconds[n]) for n in counts], max(1, len(cpus) - 1))
    narrow, wide = seconds[threads], float("inf")
    for _ in range(_ROUNDS):  # in turns, so that other work on this machine slows both
        segment = _segment(host, numel, torch.float32, is_ieee=is_ieee)
        wide = min(wide, _step_seconds(segment, cpus, shares[threads]))
        segment = _segment(host, numel, torch.bfloat16, is_ieee=is_ieee)
        narrow = min(narrow, _step_seconds(segment, cpus, shares[threads]))
    with contextlib.closing(Pool(threads, cpus=cpus)) as pool:
        adding = _best(functools.partial(accumulate, segment.param, segment.grad, pool=pool))
    return HardwareProfile(
        key_of(device, cpus),
        *link,
        memory=tuple(copies),
        adamw_ns_per_param=1e9 * narrow / numel,
        adamw_fp32_ns_per_param=1e9 * wide / numel,
        accumulate_ns_per_param=1e9 * adding / numel,
        adamw_threads=threads,
        cpu_share=shares[threads].value,
    )


class _CpuShare:
    """The CPU time that threads get of the time they run for: what is missing, other work on their cores had.

    Args:
        num_threads: number of threads that are busy all the time.
    """

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._seconds = self._cpu_seconds = 0.0

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count this time."""
        start, cpu_start = time.perf_counter(), time.process_time()
        yield
        self._cpu_seconds += time.process_time() - cpu_start
        self._seconds += time.perf_counter() - start

    @property
    def value(self) -> float:
        """Of all time that was counted, 1 at most; 1 of none."""
        return min(1.0, self._cpu_seconds / (self.num_threads * self._seconds)) if self._seconds else 1.0


def _step_seconds(segment: AdamWSegment, cpus: Sequence[int], share: _CpuShare) -> float:
    with contextlib.closing(Pool(share.num_threads, cpus=cpus)) as pool:

        def step() -> None:
            with share.counted():
                submit_adamw_commit_peek([segment], stats=True, pool=pool).wait()

        return _best(step)


def _thread_counts(num_cpus: int) -> list[int]:
    """The numbers of threads to measure: powers of two, all CPUs, and all but one for the launching thread."""
    powers = {2**i for i in range(num_cpus.bit_length())}
    return sorted(powers | {max(1, num_cpus - 1), num_cpus})


def _best(run: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs, after one to warm up: other work on the machine only adds time."""
    run()
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _measure_link(link: Link, device: torch.device) -> tuple[float, float, float, float]:
    """Bytes per second to the host, back, to the host while both ways are busy, and back meanwhile."""
    index = (device.index or 0) if device.type == "cuda" else 0
    hosts: list[Tensor] = []
    for _ in range(2):
        buffer = HostBuffer(_COPY_BYTES, pin=link.needs_pinned_host(), device=index)
        hosts.append(buffer.tensor(torch.uint8, _COPY_BYTES))
    devices = [torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2)]

    def both() -> None:
        # The link to a CPU copies to the host in the calling thread, so the other way starts first.
        back = link.h2d(devices[1], hosts[1])
        link.d2h(hosts[0], devices[0]).synchronize()
        back.synchronize()

    d2h = _COPY_BYTES / _best(lambda: link.d2h(hosts[0], devices[0]).synchronize())
    h2d = _COPY_BYTES / _best(lambda: link.h2d(devices[1], hosts[1]).synchronize())
    each = _COPY_BYTES / _best(both)
    return d2h, h2d, each, each


def _segment(host: HostBuffer, numel: int, dtype: torch.dtype, *, is_ieee: bool) -> AdamWSegment:
    """A step to measure: masters and moments, two gradients and the new weights, one after the other in a buffer.

    Args:
        dtype: of gradients and new weights.
        is_ieee: take the square root that training takes: that of a GPU, or torch's own on this CPU, which may cost
            several times as much ([Note: Square root] in ops/reference.py).
    """
    host.tensor(torch.uint8, host.nbytes).zero_()
    states = [host.tensor(torch.float32, numel, offset_bytes=4 * numel * place) for place in range(3)]
    width = dtype.itemsize
    ends = [host.tensor(dtype, numel, offset_bytes=numel * (12 + width * place)) for place in range(3)]
    for grad in ends[:2]:
        grad.fill_(0.125)  # not denormal, not zero
    first = AdamWHyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, step=1, ieee_sqrt=is_ieee)
    return AdamWSegment(
        param=states[0],
        exp_avg=states[1],
        exp_avg_sq=states[2],
        grad=ends[0],
        hyper=first,
        weight_out=ends[2],
        next_grad=ends[1],
        next_hyper=replace(first, step=2),
    )
