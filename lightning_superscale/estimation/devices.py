"""Machines to estimate for: rates from data sheets, and those of this machine, measured.

A data sheet names what a device can't exceed. What kernels and copies reach of it is assumed, in `Reach`, and printed
with every estimate; it is no measurement. Rates of `this machine` are measured, and nothing of them is taken off.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lightning_superscale.errors import SettingError, did_you_mean

GB, GIB = 10**9, 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """Shares of data-sheet rates that a step reaches.

    Attributes:
        products: of floating-point operations, in matrix products and attention.
        memory: of the rate of device memory, in other operations and in an optimizer on the device.
        links: of the rate between device and host, and between ranks.
        host: of the rate of host memory, in the optimizer's kernel.
        call: seconds that an operation takes at least.
    """

    products: float = 0.6
    memory: float = 0.8
    links: float = 0.8
    host: float = 0.6
    call: float = 4e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """One kind of device with its host.

    Attributes:
        memory: bytes of the device's memory.
        flops16, flops32: dense floating-point operations per second in bf16 and fp16, and in fp32 (TF32 where the
            device has it).
        memory_rate: bytes per second of the device's memory.
        host_link: bytes per second between device and host, each way.
        rank_link: bytes per second from one rank to the others of its node, each way.
        node_link: bytes per second of one rank's share of the network between nodes, each way.
        host_memory: bytes of host memory per device.
        host_rate: bytes per second of one socket's memory.
        per_socket: devices whose optimizers share a socket's memory, in a full node.
        shares_cores: whether the device is the host's own cores, so that nothing of the host's work is hidden.
    """

    name: str
    memory: int
    flops16: float
    flops32: float
    memory_rate: float
    host_link: float
    rank_link: float
    node_link: float
    host_memory: int
    host_rate: float
    per_socket: int = 4
    reach: Reach = Reach()
    shares_cores: bool = False

    def host_rate_of(self, ranks_per_node: int) -> float:
        """Bytes per second of host memory for each of these ranks."""
        return self.host_rate / min(self.per_socket, ranks_per_node)

    def flops(self, dtype: torch.dtype | None) -> float:
        """Operations per second in one dtype."""
        return self.flops16 if dtype in (torch.bfloat16, torch.float16) else self.flops32


_PCIE4, _PCIE5 = 32 * GB, 64 * GB  # 16 lanes, each way
_NDR, _HDR = 50 * GB, 25 * GB  # InfiniBand, one port per device
_DDR4, _DDR5 = 8 * 25.6 * GB, 8 * 38.4 * GB  # a socket's eight channels of DDR4-3200 and of DDR5-4800
# Grace's LPDDR5X: sheets say "up to 512 GB/s", which 120 GB reach. NVIDIA's Grace CPU Benchmarking Guide, STREAM,
# expects at least 80 % of the peak from TRIAD: 307 GB/s with 480 GB, of 384.
_GRACE_480 = 384 * GB

# Sizes are GiB: the GB of a sheet's device memory are 2**30 bytes, of which a device keeps up to 0.5 % (`nvidia-smi`
# shows 81920 MiB of an A100's 80 GB and 81559 MiB of an H100's).

PROFILES = {
    profile.name: profile
    for profile in (
        # NVIDIA A100 80GB SXM data sheet (2022); DGX A100: up to 2 TB of host memory for eight.
        DeviceProfile(
            name="A100",
            memory=80 * GIB,
            flops16=312e12,
            flops32=156e12,
            memory_rate=2039 * GB,
            host_link=_PCIE4,
            rank_link=300 * GB,
            node_link=_HDR,
            host_memory=256 * GIB,
            host_rate=_DDR4,
        ),
        # NVIDIA H100 Tensor Core GPU data sheet (2023), dense rates; PCIe with an NVLink bridge of 600 GB/s in all.
        DeviceProfile(
            name="H100 PCIe",
            memory=80 * GIB,
            flops16=756e12,
            flops32=378e12,
            memory_rate=2000 * GB,
            host_link=_PCIE5,
            rank_link=_PCIE5,
            node_link=_NDR,
            host_memory=256 * GIB,
            host_rate=_DDR5,
        ),
        # The same data sheet; DGX H100: 2 TB of host memory for eight.
        DeviceProfile(
            name="H100 SXM",
            memory=80 * GIB,
            flops16=989e12,
            flops32=494e12,
            memory_rate=3350 * GB,
            host_link=_PCIE5,
            rank_link=450 * GB,
            node_link=_NDR,
            host_memory=256 * GIB,
            host_rate=_DDR5,
        ),
        # NVIDIA H200 data sheet (2024).
        DeviceProfile(
            name="H200",
            memory=141 * GIB,
            flops16=989e12,
            flops32=494e12,
            memory_rate=4800 * GB,
            host_link=_PCIE5,
            rank_link=450 * GB,
            node_link=_NDR,
            host_memory=256 * GIB,
            host_rate=_DDR5,
        ),
        # NVIDIA GH200 data sheet (2023), 96 GB of HBM3, 480 GB of LPDDR5X, NVLink-C2C of 900 GB/s in all.
        DeviceProfile(
            name="GH200",
            memory=96 * GIB,
            flops16=989e12,
            flops32=494e12,
            memory_rate=4000 * GB,
            host_link=450 * GB,
            rank_link=450 * GB,
            node_link=_NDR,
            host_memory=480 * GB,
            host_rate=_GRACE_480,
            per_socket=1,
        ),
        # NVIDIA GB200 NVL72 data sheet (2024), per GPU: two share one Grace with 480 GB and its C2C of 900 GB/s in all.
        # That each has half of the link while both use it is assumed.
        DeviceProfile(
            name="GB200",
            memory=186 * GIB,
            flops16=2500e12,
            flops32=1250e12,
            memory_rate=8000 * GB,
            host_link=225 * GB,
            rank_link=900 * GB,
            node_link=_NDR,
            host_memory=240 * GB,
            host_rate=_GRACE_480,
            per_socket=2,
        ),
        # NVIDIA Ada GPU architecture white paper (2022), products accumulated in fp32. Not from a sheet: a desktop
        # with two channels of DDR5-4800, 128 GiB and 10-gigabit Ethernet.
        DeviceProfile(
            name="RTX 4090",
            memory=24 * GIB,
            flops16=165e12,
            flops32=82.6e12,
            memory_rate=1008 * GB,
            host_link=_PCIE4,
            rank_link=_PCIE4,
            node_link=1.25 * GB,
            host_memory=128 * GIB,
            host_rate=2 * 38.4 * GB,
        ),
    )
}
THIS_MACHINE = "this machine"


def profile_named(name: str) -> DeviceProfile:
    """The data-sheet profile of a name, in any case.

    Raises:
        SettingError: there is none; names those that there are.
    """
    by_name = {known.lower(): profile for known, profile in PROFILES.items()}
    if name.lower() not in by_name:
        kinds = [known for known in PROFILES if known.lower().startswith(f"{name.lower()} ")]
        if kinds:
            raise SettingError(f"device={name!r} is there as {' and '.join(map(repr, kinds))}: name one")
        names = ", ".join(map(repr, [*PROFILES, THIS_MACHINE]))
        raise SettingError(f"device={name!r} is not one of {names}{did_you_mean(name, [*PROFILES, THIS_MACHINE])}")
    return by_name[name.lower()]


def profile_of_device(torch_name: str) -> DeviceProfile | None:
    """The profile with the rates of a device that torch names so, such as "NVIDIA H100 80GB HBM3"; None for others."""
    words = set(torch_name.upper().replace("-", " ").split())
    if words & _OTHER_RATES:
        return None
    found = [profile for profile in PROFILES.values() if set(profile.name.upper().split()) - {"SXM"} <= words]
    return max(found, key=lambda profile: len(profile.name.split()) if "SXM" not in profile.name else 1, default=None)


# Words in the names of devices that are slower, or faster, than the ones that they are named after.
_OTHER_RATES = {"D", "LAPTOP", "NVL", "MIG"}


def with_memory(profile: DeviceProfile, device: int | None, host: int | None) -> DeviceProfile:
    """The profile with other sizes of memory, in bytes; None keeps one."""
    return replace(profile, memory=device or profile.memory, host_memory=host or profile.host_memory)
