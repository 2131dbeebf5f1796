"""`superscale doctor`: checks the environment, and tells how to get the parts that are missing."""

from __future__ import annotations

import importlib
import os
import platform
import resource
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from typing import Literal

import psutil
import torch
from rich.table import Table

from lightning_superscale.offload.link.cgroup import cgroup_free_bytes
from lightning_superscale.offload.planner.numa import available_cpus, read_topology
from lightning_superscale.offload.planner.profile import key_of
from lightning_superscale.offload.planner.profile_cache import is_switched_off, profile_path, stored_profile
from lightning_superscale.ops.cpu.pool import default_pool
from lightning_superscale.ops.cuda import kernels, runtime
from lightning_superscale.ops.native import loader, torch_root
from lightning_superscale.plugins.registry import BINDINGS, STRATEGY_NAMES
from lightning_superscale.run.report.plan import format_bytes

Status = Literal["ok", "note", "error"]


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check of the environment.

    Attributes:
        name: name of the checked part.
        status: "ok", "note" for a part that works less well, or "error" for a missing part.
        found: the state of the part, in words.
        remedy: the action that mends or changes it; "" for none.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""


def examine() -> list[Check]:
    """Run all checks once. A check that fails to run becomes a result with the status "error", not an exception."""
    rows: list[Check] = []
    for name, look in _CHECKS:
        try:
            rows.append(look(name))
        except Exception as error:
            rows.append(Check(name, "error", f"{type(error).__name__}: {error}"))
    return rows


def table(checks: list[Check]) -> Table:
    """The checks as a table for a terminal."""
    out = Table(title="superscale doctor", title_justify="left")
    out.add_column("what")
    out.add_column("", justify="center")
    out.add_column("found", overflow="fold")
    out.add_column("what to do", overflow="fold")
    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "error": "[red]missing[/]"}
    for check in checks:
        out.add_row(check.name, marks[check.status], check.found, check.remedy)
    return out


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _versions(name: str) -> Check:
    own = _installed("lightning-superscale")
    found = f"lightning-superscale {own or 'not installed'}, Python {platform.python_version()}"
    return Check(name, "ok" if own else "error", found, "" if own else "pip install lightning-superscale")


def _package(distribution: str, module: str, *, is_needed: bool, remedy: str) -> Callable[[str], Check]:
    def look(name: str) -> Check:
        found = _installed(distribution)
        if found is None or find_spec(module) is None:
            return Check(name, "error" if is_needed else "note", "not installed", remedy)
        return Check(name, "ok", found)

    return look


def _native(name: str) -> Check:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lib = loader.native()
    if lib is None:
        where = "run `python -m lightning_superscale.ops.native.build`, or reinstall with a C++17 compiler on the PATH"
        return Check(name, "note", "none: optimizer steps use slower PyTorch code with the same results", where)
    isas = ", ".join(loader.supported_isas())
    return Check(name, "ok", f"runs {loader.isa_name()} code (this processor can run {isas}; LSS_ISA chooses)")


def _root(name: str) -> Check:
    if torch_root.is_ieee():
        return Check(name, "ok", "torch's CPU square root is correctly rounded")
    return Check(name, "ok", "torch's CPU square root is not correctly rounded; steps take torch's own, to equal AdamW")


def _cores(name: str) -> Check:
    cpus = available_cpus()
    num_nodes = len(set(read_topology(cpus).node_of.values()))
    threads = default_pool().num_threads
    found = f"{len(cpus)} usable cores, {num_nodes} NUMA node{'s' if num_nodes > 1 else ''}; {threads} step threads"
    return Check(name, "ok", found, "LSS_CPU_THREADS, or OffloadConfig(cpu_threads=...), changes the step threads")


def _profile(name: str) -> Check:
    if is_switched_off():
        return Check(name, "note", "switched off by LSS_PROFILE", "unset it, so that offloading can choose by it")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    key = key_of(device, available_cpus())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stored = stored_profile(key)
    if caught:
        return Check(name, "note", str(caught[0].message))
    if stored is None:
        return Check(name, "note", f"none for one rank on {key.device}", "the first run that offloads measures it")
    if not stored.is_quiet:
        return Check(name, "note", stored.summary(), "the next run that offloads measures it again")
    return Check(name, "ok", stored.summary(), f"delete {profile_path(key)} to measure again")


def _memory(name: str) -> Check:
    memory = psutil.virtual_memory()
    found = f"{format_bytes(memory.available)} of {format_bytes(memory.total)} available"
    free = cgroup_free_bytes()
    if free is None or free >= memory.available:
        return Check(name, "ok", found)
    remedy = "offloading is held to it; raise it (docker --memory, a pod's resources, Slurm's --mem) for larger models"
    return Check(name, "note", f"{found}, {format_bytes(free)} within the limit of this process's cgroup", remedy)


def _pinned(name: str) -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Check(name, "ok", "no limit on locked memory")
    remedy = "CUDA pins past this limit on most systems; if pinning fails, raise `ulimit -l`"
    return Check(name, "note", f"locked memory is limited to {format_bytes(soft)}", remedy)


def _cuda_devices(name: str) -> Check:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Check(
            name, "ok", f"{', '.join(names)} (torch {torch.version.cuda}; driver sees {runtime.device_count()})"
        )
    why = "torch is a CPU build" if torch.version.cuda is None else "torch sees no device"
    return Check(name, "note", f"none: {why}; training runs on the CPU")


def _cuda_library(name: str) -> Check:
    reason = kernels.unavailable_reason()
    if reason is None:
        return Check(name, "ok", "loaded")
    return Check(name, "note", reason, "" if not torch.cuda.is_available() else "rebuild where nvcc is on the PATH")


def _strategies(name: str) -> Check:
    found = []
    for lightning_name in BINDINGS:
        if find_spec(lightning_name.split(".")[0]) is None:
            continue
        registry = importlib.import_module(f"{lightning_name}.strategies").StrategyRegistry
        names = [n for n in STRATEGY_NAMES if n in registry]
        found.append(f"{lightning_name}: {', '.join(names) or 'none'}")
    has_all = all("none" not in row for row in found) and bool(found)
    return Check(name, "ok" if has_all else "error", "; ".join(found), "" if has_all else "import lightning_superscale")


def _autoload(name: str) -> Check:
    remedy = "import lightning_superscale before the Trainer is built"
    if os.environ.get("LSS_AUTOLOAD", "1") == "0" or os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "0":
        return Check(name, "note", "switched off by an environment variable", remedy)
    if not any(point.name == "lightning_superscale" for point in entry_points(group="torch.backends")):
        return Check(name, "note", "the package's entry point is not installed", remedy)
    return Check(name, "ok", "names are known without an import of ours", "LSS_AUTOLOAD=0 switches it off")


_CHECKS: tuple[tuple[str, Callable[[str], Check]], ...] = (
    ("versions", _versions),
    ("torch", _package("torch", "torch", is_needed=True, remedy="pip install 'torch>=2.11'")),
    ("lightning", _package("lightning", "lightning", is_needed=True, remedy="pip install 'lightning>=2.6'")),
    ("native CPU library", _native),
    ("square root", _root),
    ("cores", _cores),
    ("hardware profile", _profile),
    ("host memory", _memory),
    ("pinned memory", _pinned),
    ("CUDA devices", _cuda_devices),
    ("CUDA library", _cuda_library),
    ("Triton", _package("triton", "triton", is_needed=False, remedy="pip install triton (used on CUDA devices only)")),
    ("strategy names", _strategies),
    ("autoload", _autoload),
)
