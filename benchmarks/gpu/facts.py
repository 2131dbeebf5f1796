"""What this machine is and what it can do: `python -m benchmarks.gpu.facts` prints one JSON object a line.

These come first in every run, since no other figure means anything without them.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import mmap
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.gpu.timing import Timing, measure
from lightning_superscale.offload.link.cgroup import cgroup_free_bytes
from lightning_superscale.offload.planner.numa import available_cpus, node_of_pci_device, read_topology
from lightning_superscale.ops.cpu.memory import HostBuffer

GIB = 2**30
_PACKAGES = ("lightning", "triton", "deepspeed", "torchao", "omegaconf", "jsonargparse")
_TOOLS = ("nvcc", "nvidia-smi", "compute-sanitizer", "numactl")


def software() -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {name: _version_of(name) for name in _PACKAGES},
        "tools": [name for name in _TOOLS if shutil.which(name)],
    }


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> dict[str, Any]:
    """The host's cores and their NUMA nodes."""
    cpus = available_cpus()
    topology = read_topology(cpus)
    return {
        "cpu": _cpu_name(),
        "kernel": platform.release(),
        "cpus": len(cpus),
        "cores": len(set(topology.core_of.values())),
        "cpus_per_node": {str(node): sum(n == node for n in topology.node_of.values()) for node in _nodes(topology)},
    }


def _nodes(topology: Any) -> list[int]:
    return sorted(set(topology.node_of.values()))


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def card(device: str) -> dict[str, Any]:
    """The GPU, its driver and its NUMA node."""
    if device != "cuda":
        return {"gpu": None}
    found = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    query = "driver_version,pci.bus_id,pcie.link.gen.max,pcie.link.width.max,clocks.max.sm,power.limit"
    answers = _said(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]).split(", ")
    told = dict(zip(query.split(","), answers, strict=False))
    # nvidia-smi writes eight digits of the PCI domain, Linux four.
    address = told.get("pci.bus_id", "")[-12:]
    return {
        "gpu": found.name,
        "gpus": torch.cuda.device_count(),
        "capability": f"{found.major}.{found.minor}",
        "memory_gib": round(total / GIB, 2),
        "free_gib": round(free / GIB, 2),
        "numa_node": node_of_pci_device(address) if address else None,
        **told,
    }


def _said(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()


def memory() -> dict[str, Any]:
    """The host's memory and what limits it."""
    now, limit = psutil.virtual_memory(), cgroup_free_bytes()
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    return {
        "total_gib": round(now.total / GIB, 2),
        "available_gib": round(now.available / GIB, 2),
        "free_gib": round(now.free / GIB, 2),
        "cgroup_leaves_gib": None if limit is None else round(limit / GIB, 2),
        "locked_limit_gib": None if locked == resource.RLIM_INFINITY else round(locked / GIB, 2),
        "dev_shm_gib": round(shared / GIB, 2),
        "huge_pages": _huge_pages(),
    }


def _huge_pages() -> str:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return path.read_text().strip() if path.is_file() else "unknown"


def touch(nbytes: int) -> dict[str, Any]:
    """How fast fresh memory comes: by one thread, and by one for each CPU."""
    threads = len(available_cpus())
    row: dict[str, Any] = {"gib": nbytes / GIB, "threads": threads}
    for name, workers in (("one_thread_gib_s", 1), ("all_threads_gib_s", threads)):
        with mmap.mmap(-1, nbytes) as fresh, ThreadPoolExecutor(workers) as pool:
            first = (ctypes.c_char * nbytes).from_buffer(fresh)
            address, part = ctypes.addressof(first), nbytes // workers
            start = time.perf_counter()
            # ctypes lets go of the interpreter's lock meanwhile.
            list(pool.map(lambda i, a=address, p=part: ctypes.memset(a + i * p, 1, p), range(workers)))
            row[name] = round(workers * part / GIB / (time.perf_counter() - start), 2)
            del first
    return row


def registration(nbytes: int, device: str) -> dict[str, Any]:
    """Page-locking memory, as the host's ends of transfers are: whether it is allowed, and how long it takes."""
    start = time.perf_counter()
    buffer = HostBuffer(nbytes, pin=device == "cuda")
    took = time.perf_counter() - start
    return {"gib": nbytes / GIB, "took_s": round(took, 4), "is_pinned": buffer.is_pinned}


def link(nbytes: int, device: str, *, is_pinned: bool) -> dict[str, Any]:
    """Copies between host and device: each way alone, then both at once, in GB/s."""
    place, numel = torch.device(device), nbytes // 4
    host_in, host_out = (torch.ones(numel, pin_memory=is_pinned and device == "cuda") for _ in range(2))
    device_in, device_out = (torch.ones(numel, device=place) for _ in range(2))

    def up() -> None:
        device_in.copy_(host_in, non_blocking=True)

    def down() -> None:
        host_out.copy_(device_out, non_blocking=True)

    ways = {"h2d_gb_s": (up, 1), "d2h_gb_s": (down, 1), "both_gb_s": (_both(up, down, place), 2)}
    timings = {name: (measure(way, place, repetitions=5), times) for name, (way, times) in ways.items()}
    return {"gib": nbytes / GIB, **{name: _gb_s(timing, times * nbytes) for name, (timing, times) in timings.items()}}


def _both(up: Callable[[], None], down: Callable[[], None], device: torch.device) -> Callable[[], None]:
    if device.type != "cuda":
        return lambda: (up(), down())[0]
    streams = [torch.cuda.Stream() for _ in range(2)]  # type: ignore[no-untyped-call]

    def run() -> None:
        current = torch.cuda.current_stream()
        for stream, way in zip(streams, (up, down), strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                way()
        for stream in streams:
            current.wait_stream(stream)

    return run


def _gb_s(timing: Timing, nbytes: int) -> float:
    return round(nbytes / timing.median_ms / 1e6, 2)


def facts(device: str, is_tiny: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is looked at, in order."""
    size = 2**22 if is_tiny else 2**31
    return {
        "software": software,
        "processor": processor,
        "card": lambda: card(device),
        "memory": memory,
        "touch": lambda: touch(size),
        "registration": lambda: registration(size, device),
        "link, pinned": lambda: link(size // 2, device, is_pinned=True),
        "link, pageable": lambda: link(size // 2, device, is_pinned=False),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    for name, look in facts(options.device, options.tiny).items():
        try:
            found = {"row": f"fact: {name}", "ok": True, **look()}
        except Exception as error:  # each is worth having without the others
            found = {"row": f"fact: {name}", "ok": False, "error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
