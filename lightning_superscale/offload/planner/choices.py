"""Chooses the settings of offloading that are "auto", each with its reason, and forecasts the parts of a step.

Pure arithmetic on a hardware profile and a few sizes: it touches no device and asks no other rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_superscale.offload.link.dtype import LinkDtype
from lightning_superscale.offload.planner.forecast import Passes, StepTimes
from lightning_superscale.offload.planner.profile import HardwareProfile

MIB = 2**20
# Sizes of a bucket above which a link is not faster, and below which it is slower; and the number of buckets that keeps
# link, host and device busy at once: one bucket's three hops are always exposed ([Note: Exposed time] in forecast.py).
MOST_MIB, LEAST_MIB, ENOUGH_BUCKETS = 64, 1, 16
# fp32 on the link takes host memory, and measurements vary by several percent: it must save more than that.
_WORTH_IT = 0.9


@dataclass(frozen=True, slots=True)
class Choice:
    """A number, and the sentence that `explain()` prints for it."""

    value: int
    reason: str


def choose_bucket_mb(asked: int | Literal["auto"], weight_bytes: int) -> Choice:
    """Choose the size of a bucket, in MiB of weights, which move and step together.

    Args:
        asked: `OffloadConfig.bucket_mb`.
        weight_bytes: bytes of the whole weights of all trainable parameters; the same on every rank.
    """
    if asked != "auto":
        return Choice(asked, f"buckets hold at most {asked} MiB of weights: bucket_mb={asked}")
    fitting = weight_bytes // (ENOUGH_BUCKETS * MIB)
    value = max(LEAST_MIB, min(MOST_MIB, fitting))
    if fitting > MOST_MIB:
        why = "larger ones make no copy faster"
    elif fitting < LEAST_MIB:
        why = "smaller ones make copies slower"
    else:
        why = f"about {ENOUGH_BUCKETS} of them keep link, host and device busy at once"
    return Choice(value, f"buckets hold at most {value} MiB of weights: {why} (bucket_mb='auto')")


def choose_threads(
    asked: int | Literal["auto"],
    variable: int | None,
    *,
    num_cpus: int,
    most: int,
    profile: HardwareProfile | None,
    why_no_profile: str,
) -> Choice:
    """Choose the number of threads of the host optimizer.

    Args:
        asked: `OffloadConfig.cpu_threads`.
        variable: value of LSS_CPU_THREADS; None when it is not set.
        num_cpus: number of CPUs in this rank's share.
        most: number of threads that leaves one core of the share to the launching thread.
        profile: the measured speeds; None without any.
        why_no_profile: the reason for that, in the words of `explain()`.
    """
    if asked != "auto":
        return Choice(asked, f"{_threads(asked)} on the host: cpu_threads={asked}")
    if variable is not None:
        return Choice(variable, f"{_threads(variable)} on the host: LSS_CPU_THREADS={variable}")
    left = f"this rank's share is {num_cpus} CPU{'s' if num_cpus > 1 else ''}, with one core for the launching thread"
    if profile is None or profile.adamw_threads >= most:
        why = f", and {why_no_profile}" if profile is None else ""
        return Choice(most, f"{_threads(most)} on the host: {left}{why} (cpu_threads='auto')")
    value = profile.adamw_threads
    return Choice(value, f"{_threads(value)} on the host: more step hardly faster here; {left} (cpu_threads='auto')")


def _threads(number: int) -> str:
    return f"{number} thread{'s step' if number > 1 else ' steps'}"


@dataclass(frozen=True, slots=True)
class LinkChoice:
    """The dtype on the link, and the sentence that `explain()` prints for it."""

    value: LinkDtype
    reason: str


def choose_link_dtype(
    asked: Literal["auto", "weights", "fp32"],
    profile: HardwareProfile | None,
    *,
    why_weights: str | None,
    why_no_profile: str,
) -> LinkChoice:
    """Choose the dtype on the link, and so whether the host's kernel casts or the device does.

    Gradients, kernel and weights of different buckets are under way at once, so the slowest of the three bounds a step
    ([Note: Exposed time] in forecast.py). The dtype with the smaller bound is chosen. A device that is the host itself
    casts on the cores that step: whoever casts, fp32 moves twice the bytes, so that it is never chosen there.

    Args:
        asked: `OffloadConfig.link_dtype`.
        profile: the measured speeds; None without any.
        why_weights: why "fp32" is impossible or makes no difference; None where there is a choice.
        why_no_profile: the reason why nothing was measured, in the words of `explain()`.
    """
    of_weights, of_fp32 = "travel in the weights' dtype, and the host casts", "travel in fp32, and the device casts"
    if why_weights is not None:
        return LinkChoice("weights", f"gradients and new weights travel in the weights' dtype: {why_weights}")
    if asked != "auto":
        how = of_fp32 if asked == "fp32" else of_weights
        return LinkChoice(asked, f"gradients and new weights {how}: link_dtype={asked!r}")
    if profile is None:
        return LinkChoice("weights", f"gradients and new weights {of_weights}: {why_no_profile} (link_dtype='auto')")
    if profile.key.device == "cpu":
        why = "the device is the host itself, whose cores would move more"
        return LinkChoice("weights", f"gradients and new weights {of_weights}: {why} (link_dtype='auto')")
    narrow = _bound_ns(profile, profile.adamw_ns_per_param, 2)
    wide = _bound_ns(profile, profile.adamw_fp32_ns_per_param, 4)
    is_wide = wide < _WORTH_IT * narrow
    return LinkChoice(
        "fp32" if is_wide else "weights",
        f"gradients and new weights {of_fp32 if is_wide else of_weights}: the slowest of link and kernel takes "
        f"{narrow:.2f} ns per parameter when 16 bits travel (kernel {profile.adamw_ns_per_param:.2f} ns) and "
        f"{wide:.2f} ns when fp32 does (kernel {profile.adamw_fp32_ns_per_param:.2f} ns) (link_dtype='auto')",
    )


def _bound_ns(profile: HardwareProfile, kernel_ns: float, bytes_each_way: int) -> float:
    """Nanoseconds that one parameter takes in the slowest of gradients, kernel and weights."""
    return max(1e9 * bytes_each_way / profile.d2h_both, kernel_ns, 1e9 * bytes_each_way / profile.h2d_both)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostWork:
    """The work of one rank's host in a step.

    Attributes:
        num_params: number of this rank's parameters whose states are on the host.
        link_bytes: bytes of their gradients on the link, 2 or 4 each, and equally of their weights on the way back.
        num_buckets: number of buckets that they are in.
        device_share: share of the model whose states stay on the device.
    """

    num_params: int
    link_bytes: int
    num_buckets: int
    device_share: float = 0.0


def step_times(profile: HardwareProfile, work: HostWork, *, forward: float, backward: float) -> StepTimes:
    """Forecast the seconds of one step's parts by themselves, for `forecast.exposed_seconds`.

    Args:
        forward, backward: seconds of the model without offloading.
    """
    num_wide = work.link_bytes / 2 - work.num_params  # parameters that take 4 bytes instead of 2
    kernel_ns = (work.num_params - num_wide) * profile.adamw_ns_per_param + num_wide * profile.adamw_fp32_ns_per_param
    return StepTimes(
        forward=forward,
        backward=backward,
        d2h=work.link_bytes / profile.d2h_both,
        host=kernel_ns * 1e-9,
        h2d=work.link_bytes / profile.h2d_both,
        num_buckets=work.num_buckets,
        device_share=work.device_share,
        passes=Passes.of_width(work.link_bytes / max(1, work.num_params)),
    )
