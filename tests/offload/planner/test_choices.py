"""What the planner chooses, from numbers alone, and what it says of its reasons."""

from __future__ import annotations

import dataclasses

import pytest

from lightning_superscale.offload.planner.choices import (
    MIB,
    HostWork,
    choose_bucket_mb,
    choose_link_dtype,
    choose_threads,
    step_times,
)
from lightning_superscale.offload.planner.forecast import exposed_seconds
from lightning_superscale.offload.planner.profile import HardwareKey, HardwareProfile

# A PCIe H100 with 16 cores and 150 GB/s of host memory: 1B parameters take its AdamW 0.2 s and each way over the link
# 0.04 s.
H100 = HardwareProfile(
    key=HardwareKey("a CPU", 16, "H100", "native AdamW", "2.13", "0.1"),
    d2h=55e9,
    h2d=55e9,
    d2h_both=50e9,
    h2d_both=50e9,
    memory=((1, 20e9), (2, 40e9), (4, 80e9), (8, 145e9), (15, 150e9), (16, 150e9)),
    adamw_ns_per_param=0.2,
    adamw_fp32_ns_per_param=0.24,
    accumulate_ns_per_param=0.07,
    adamw_threads=8,
)


@pytest.mark.parametrize(
    ("asked", "weight_bytes", "bucket_mb", "why"),
    [
        ("auto", 0, 1, "smaller ones make copies slower"),
        ("auto", 15 * MIB, 1, "smaller ones make copies slower"),
        ("auto", 16 * MIB, 1, "about 16 of them"),
        ("auto", 250 * MIB, 15, "about 16 of them"),
        ("auto", 1024 * MIB, 64, "about 16 of them"),
        ("auto", 14 * 1024 * MIB, 64, "larger ones make no copy faster"),
        (5, 14 * 1024 * MIB, 5, "bucket_mb=5"),
    ],
)
def test_bucket_sizes(asked, weight_bytes, bucket_mb, why):
    choice = choose_bucket_mb(asked, weight_bytes)
    assert choice.value == bucket_mb
    assert f"at most {bucket_mb} MiB" in choice.reason
    assert why in choice.reason


@pytest.mark.parametrize("weight_mib", range(16, 5000, 37))
def test_auto_gives_at_least_16_buckets_where_they_are_large_enough(weight_mib):
    assert weight_mib * MIB / (choose_bucket_mb("auto", weight_mib * MIB).value * MIB) >= 16


@pytest.mark.parametrize(
    ("asked", "variable", "most", "profile", "threads", "why"),
    [
        (
            "auto",
            None,
            15,
            H100,
            8,
            "8 threads step on the host: more step hardly faster here; this rank's share is 16",
        ),
        ("auto", None, 7, H100, 7, "one core for the launching thread (cpu_threads='auto')"),
        ("auto", None, 15, None, 15, "launching thread, and nobody measured (cpu_threads='auto')"),
        ("auto", None, 1, None, 1, "1 thread steps on the host"),
        ("auto", 3, 15, H100, 3, "LSS_CPU_THREADS=3"),
        (12, 3, 7, H100, 12, "cpu_threads=12"),
    ],
)
def test_threads(asked, variable, most, profile, threads, why):
    choice = choose_threads(asked, variable, num_cpus=16, most=most, profile=profile, why_no_profile="nobody measured")
    assert choice.value == threads
    assert why in choice.reason


# A superchip: a link of 400 GB/s, and cores whose conversions cost more than the bytes that they save.
SUPERCHIP = dataclasses.replace(
    H100, d2h=400e9, h2d=400e9, d2h_both=380e9, h2d_both=380e9, adamw_ns_per_param=0.15, adamw_fp32_ns_per_param=0.1
)


@pytest.mark.parametrize(
    ("asked", "profile", "value", "why"),
    [
        ("auto", H100, "weights", "0.20 ns per parameter when 16 bits travel (kernel 0.20 ns) and 0.24 ns when fp32"),
        # The kernel is the faster with fp32, but on this link fp32 takes longer than the kernel saves.
        (
            "auto",
            dataclasses.replace(H100, adamw_ns_per_param=0.07, adamw_fp32_ns_per_param=0.05),
            "weights",
            "takes 0.07 ns per parameter when 16 bits travel (kernel 0.07 ns) and 0.08 ns when fp32 does (kernel 0.05",
        ),
        ("auto", dataclasses.replace(H100, adamw_ns_per_param=0.4), "fp32", "the device casts: the slowest"),
        ("auto", SUPERCHIP, "fp32", "0.15 ns per parameter when 16 bits travel (kernel 0.15 ns) and 0.10 ns when fp32"),
        ("auto", dataclasses.replace(SUPERCHIP, d2h_both=20e9), "weights", "and 0.20 ns when fp32 does (kernel 0.10"),
        ("auto", dataclasses.replace(SUPERCHIP, h2d_both=20e9), "weights", "and 0.20 ns when fp32 does (kernel 0.10"),
        ("auto", dataclasses.replace(SUPERCHIP, adamw_fp32_ns_per_param=0.15), "weights", "and 0.15 ns when fp32 does"),
        ("auto", dataclasses.replace(SUPERCHIP, adamw_fp32_ns_per_param=0.147), "weights", "and 0.15 ns when fp32"),
        ("auto", None, "weights", "nobody measured (link_dtype='auto')"),
        ("fp32", H100, "fp32", "travel in fp32, and the device casts: link_dtype='fp32'"),
        ("weights", SUPERCHIP, "weights", "in the weights' dtype, and the host casts: link_dtype='weights'"),
    ],
)
def test_what_crosses_the_link(asked, profile, value, why):
    choice = choose_link_dtype(asked, profile, why_weights=None, why_no_profile="nobody measured")
    assert choice.value == value
    assert why in choice.reason


def test_a_device_that_is_the_host_never_has_more_to_move_by_itself():
    """Measured while its cores were busy, one kernel may look far faster than the other."""
    on_cpu = dataclasses.replace(SUPERCHIP, key=dataclasses.replace(SUPERCHIP.key, device="cpu"))
    for asked, value in (("auto", "weights"), ("fp32", "fp32")):
        choice = choose_link_dtype(asked, on_cpu, why_weights=None, why_no_profile="nobody measured")
        assert choice.value == value
        assert ("the device is the host itself, whose cores would move more" in choice.reason) == (asked == "auto")


@pytest.mark.parametrize("asked", ["auto", "weights", "fp32"])
def test_what_allows_no_fp32_on_the_link_is_the_reason(asked):
    choice = choose_link_dtype(asked, SUPERCHIP, why_weights="weights flow", why_no_profile="nobody measured")
    assert (choice.value, choice.reason.endswith("in the weights' dtype: weights flow")) == ("weights", True)


def work(**changed) -> HostWork:
    return HostWork(**{"num_params": 10**9, "link_bytes": 2 * 10**9, "num_buckets": 30, **changed})


def test_times_of_a_step_are_sizes_over_rates():
    times = step_times(H100, work(), forward=0.1, backward=0.2)
    assert (times.forward, times.backward, times.num_buckets) == (0.1, 0.2, 30)
    assert times.host == pytest.approx(0.2)
    assert times.d2h == times.h2d == pytest.approx(0.04)
    wide = step_times(H100, work(link_bytes=4 * 10**9), forward=0.1, backward=0.2)
    assert wide.host == pytest.approx(0.24)
    assert wide.d2h == wide.h2d == pytest.approx(0.08)
    mixed = step_times(H100, work(link_bytes=3 * 10**9), forward=0.1, backward=0.2)  # half of the parameters are fp32
    assert mixed.host == pytest.approx(0.22)


def test_a_long_step_hides_the_host_and_a_short_one_does_not():
    long = exposed_seconds(step_times(H100, work(), forward=0.2, backward=0.4))
    short = exposed_seconds(step_times(H100, work(), forward=0.02, backward=0.04))
    assert long < 0.05 * 0.6
    assert short >= 0.2 - 0.06
    half = work(num_params=5 * 10**8, link_bytes=10**9, num_buckets=15, device_share=0.5)
    assert exposed_seconds(step_times(H100, half, forward=0.02, backward=0.04)) < short
