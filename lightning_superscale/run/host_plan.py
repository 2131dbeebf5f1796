"""Plans the host of one `fit()`: bucket size, threads, the CPUs they run on, and the dtype that crosses the link."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from lightning_superscale.comm.agreement import raise_together
from lightning_superscale.comm.collectives import gather_objects
from lightning_superscale.comm.mesh import DataMesh
from lightning_superscale.config import OffloadConfig
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.offload.link.arena import check_host_memory, fits_host_memory, sharing_host_memory
from lightning_superscale.offload.link.dtype import LinkDtype
from lightning_superscale.offload.planner.choices import (
    MIB,
    LinkChoice,
    choose_bucket_mb,
    choose_link_dtype,
    choose_threads,
)
from lightning_superscale.offload.planner.numa import (
    RankPlace,
    available_cpus,
    node_of_pci_device,
    read_topology,
    share_of_cpus,
    worker_cpus,
)
from lightning_superscale.offload.planner.profile import HardwareProfile
from lightning_superscale.offload.planner.profile_cache import cached_profile, is_switched_off
from lightning_superscale.ops.cpu.pool import Pool, default_pool
from lightning_superscale.run.settings import RunSettings


@dataclass(frozen=True, slots=True)
class HostPlan:
    """Resolved choices of one rank.

    Attributes:
        unit_bytes: upper bound of a unit's weights; the same on every rank.
        pool: runs the host optimizer.
        profile: rank 0's hardware profile, on every rank; None where nothing is offloaded or nothing was measured.
        reasons: one sentence per choice, for `explain()`.
        link_dtype: dtype of gradients and new weights that cross the link; the same on every rank.
    """

    unit_bytes: int
    pool: Pool
    profile: HardwareProfile | None = None
    reasons: tuple[str, ...] = ()
    link_dtype: LinkDtype = "weights"


def plan_host(
    optimizers: Sequence[Optimizer], settings: RunSettings, host_bytes: Callable[[LinkDtype], int]
) -> HostPlan:
    """Plan the host of one run. Every rank calls it.

    All ranks take rank 0's hardware profile, and each binds threads to CPUs of its own.

    Args:
        host_bytes: bytes that this rank will need of its host, by the dtype that crosses the link.

    Raises:
        SuperScaleError: on every rank, when one could not look at its machine, has too little host memory, or
            LSS_CPU_THREADS is no number.
    """
    offload, mesh = settings.offload, settings.mesh
    if offload is None:
        return HostPlan(settings.zero.bucket_mb * MIB, default_pool())
    place = RankPlace(platform.node(), available_cpus(), _node_of(settings.device))
    places = gather_objects(mesh, place)
    topology = read_topology(place.cpus)
    share = share_of_cpus(places, mesh.world.rank, topology)
    own: HardwareProfile | None = None
    variable: int | None = None
    error: Exception | None = None
    try:
        own = cached_profile(settings.device, share)
        variable = default_pool().num_threads if os.environ.get("LSS_CPU_THREADS") else None
    except Exception as found:
        error = found  # the other ranks are on their way into the gather
    raise_together(mesh, error)
    profile, is_off = gather_objects(mesh, (own, is_switched_off()))[0]
    trained = _trained(optimizers)
    weight_bytes = sum(param.nbytes for param in trained)
    bucket_mb = choose_bucket_mb(offload.bucket_mb, weight_bytes)
    bound_to = worker_cpus(share, topology)
    why_no_profile = "LSS_PROFILE=off skips measuring" if is_off else "rank 0 could not measure its speed"
    threads = choose_threads(
        offload.cpu_threads,
        variable,
        num_cpus=len(share),
        most=len(bound_to) or max(1, len(share) - 1),
        profile=profile,
        why_no_profile=why_no_profile,
    )
    link = choose_link_dtype(
        offload.link_dtype, profile, why_weights=_why_weights(settings, trained), why_no_profile=why_no_profile
    )
    link = _fitting(link, offload, mesh, host_bytes)
    # Threads that outnumber the CPUs to bind them to run unbound, on the launching thread's CPU too.
    cpus = bound_to if threads.value <= len(bound_to) else ()
    reasons = [bucket_mb.reason, threads.reason, _where_threads_run(cpus, place), link.reason]
    if profile is not None:
        reasons.append(f"hardware profile{' of rank 0' if not mesh.is_single else ''}: {profile.summary()}")
    elif is_off:
        reasons.append("no hardware profile: LSS_PROFILE=off skips measuring, and nothing is forecast")
    pool = _pool(threads.value, cpus, offload)
    return HostPlan(bucket_mb.value * MIB, pool, profile, tuple(reasons), link.value)


def _fitting(
    link: LinkChoice, offload: OffloadConfig, mesh: DataMesh, host_bytes: Callable[[LinkDtype], int]
) -> LinkChoice:
    """The choice of link dtype, or the weights' dtype where fp32 was chosen by itself and some host lacks room for it.

    Every rank calls it.

    Raises:
        SuperScaleError: on every rank, when one host has too little memory.
    """
    if offload.link_dtype == "auto" and link.value == "fp32":
        fits = fits_host_memory(sum(_needed_here(mesh, host_bytes("fp32"))))
        if not all(gather_objects(mesh, fits)):
            why = "fp32 would be faster, and takes more host memory than there is (link_dtype='auto')"
            link = LinkChoice("weights", f"gradients and new weights travel in the weights' dtype: {why}")
    error: SuperScaleError | None = None
    needed = _needed_here(mesh, host_bytes(link.value))
    try:
        check_host_memory(sum(needed), len(needed))
    except SuperScaleError as found:
        error = found  # the other ranks are on their way into the agreement
    raise_together(mesh, error)
    return link


def _needed_here(mesh: DataMesh, host_bytes: int) -> list[int]:
    """Bytes that each rank needs that takes memory from where this one does, itself among them. Every rank calls it."""
    own = sharing_host_memory()
    places = gather_objects(mesh, (own, host_bytes))
    return [needed for where, needed in places if where == own] if own else [host_bytes]


def _why_weights(settings: RunSettings, trained: Sequence[torch.Tensor]) -> str | None:
    """Why nothing but the weights' dtype can cross the link; None where fp32 could."""
    if settings.flow is not None:
        return "weights flow from host memory as they are"
    if settings.precision.states.is_low_precision:
        return "the host keeps 16-bit states, and rounds them where it steps"
    if all(param.dtype == torch.float32 for param in trained):
        return "trainable weights are fp32"
    return None


def _trained(optimizers: Sequence[Optimizer]) -> list[torch.Tensor]:
    params = {param for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]}
    return [param for param in params if param.requires_grad]


def _node_of(device: torch.device) -> int | None:
    """NUMA node of a CUDA device; None for others, and where torch or the system does not say."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    parts = [getattr(found, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    if None in parts:
        return None
    domain, bus, number = parts
    return node_of_pci_device(f"{domain:04x}:{bus:02x}:{number:02x}.0")


def _where_threads_run(cpus: Sequence[int], place: RankPlace) -> str:
    if not cpus:
        return "those threads run on any CPU of this process: with one each, the launching thread would have none"
    near = "" if place.node is None else f", on the device's NUMA node {place.node} where it may"
    return f"those threads run on CPUs {_ranges(cpus)}{near}, and leave the rest to the launching thread"


def _ranges(cpus: Sequence[int]) -> str:
    """CPUs as the kernel lists them, such as `1-3,8`."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][-1] + 1:
            runs[-1].append(cpu)
        else:
            runs.append([cpu])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _pool(threads: int, cpus: Sequence[int], offload: OffloadConfig) -> Pool:
    if not cpus and offload.cpu_threads == "auto" and threads == default_pool().num_threads:
        return default_pool()
    return Pool(threads, cpus=cpus)
