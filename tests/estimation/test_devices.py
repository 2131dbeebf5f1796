"""Profiles of devices."""

from __future__ import annotations

import pytest
import torch

from lightning_superscale.errors import SettingError
from lightning_superscale.estimation.devices import PROFILES, profile_named, profile_of_device, with_memory


def test_the_named_machines_are_there():
    assert set(PROFILES) == {"A100", "H100 PCIe", "H100 SXM", "H200", "GH200", "GB200", "RTX 4090"}
    for profile in PROFILES.values():
        assert profile.flops16 > profile.flops32 > 1e13
        assert profile.memory_rate > profile.rank_link >= profile.node_link
        assert profile.memory < profile.host_memory * 2


def test_sizes_are_what_the_driver_shows():
    """`nvidia-smi`, in MiB (https://github.com/modal-labs/modal-client/pull/2797): a sheet's GB are 2**30 bytes."""
    shown = {"A100": 81920, "H100 SXM": 81559}
    for name, mib in shown.items():
        assert 0.99 < mib * 2**20 / PROFILES[name].memory <= 1
    assert all(profile.memory % 2**30 == 0 for profile in PROFILES.values())


def test_grace_with_480_gb_is_slower_than_its_sheet_says_at_most():
    """The guide's least TRIAD is 80 % of the peak: 307 GB/s (nvidia.github.io/grace-cpu-benchmarking-guide, STREAM)."""
    for name in ("GH200", "GB200"):
        assert 0.8 * PROFILES[name].host_rate == pytest.approx(307e9, rel=0.001)  # both are printed to a GB/s


def test_a_name_is_found_in_any_case_and_another_is_refused():
    assert profile_named("h100 sxm").flops(torch.float16) == 989e12
    with pytest.raises(SettingError, match="device='H100 SMX' is not one of .*did you mean 'H100 SXM'"):
        profile_named("H100 SMX")
    with pytest.raises(SettingError, match="device='H100' is there as 'H100 PCIe' and 'H100 SXM': name one"):
        profile_named("H100")


def test_memory_may_be_another():
    found = with_memory(PROFILES["A100"], 40 * 2**30, None)
    assert (found.memory, found.host_memory) == (40 * 2**30, PROFILES["A100"].host_memory)


def test_ranks_of_a_socket_share_its_memory():
    assert PROFILES["A100"].host_rate_of(8) == PROFILES["A100"].host_rate_of(1) / 4
    assert PROFILES["GH200"].host_rate_of(8) == PROFILES["GH200"].host_rate_of(1)


@pytest.mark.parametrize(
    ("torch_name", "profile"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ],
)
def test_devices_are_known_by_the_names_that_torch_gives_them(torch_name, profile):
    assert profile_of_device(torch_name) is PROFILES[profile]


@pytest.mark.parametrize(
    "torch_name",
    ["NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090", "Tesla T4"]
    + ["NVIDIA H100 NVL", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "AMD Instinct MI300X"],
)
def test_a_device_with_other_rates_is_not_taken_for_one_that_is_known(torch_name):
    assert profile_of_device(torch_name) is None
