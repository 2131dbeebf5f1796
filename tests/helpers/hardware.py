"""One hardware profile for every test, whatever machine they run on and however busy it is.

Runs choose by the profile that the user's cache folder keeps: the dtype on the link, what a step does ahead, what is
forecast. One that another test measured on busy cores made tests choose, and fail, in ways that no other machine could
repeat; and tests left such a profile behind for the user's own runs.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from lightning_superscale.offload.planner import profile_cache
from lightning_superscale.offload.planner.numa import available_cpus
from lightning_superscale.offload.planner.profile import HardwareKey, HardwareProfile, key_of
from lightning_superscale.ops.native.own_files import user_cache


def quiet_cpu(key: HardwareKey) -> HardwareProfile:
    """A CPU as its own host: fp32 on the link gains nothing, so what "auto" chooses is the weights' dtype."""
    return HardwareProfile(
        key=key,
        d2h=1e10,
        h2d=1e10,
        d2h_both=5e9,
        h2d_both=5e9,
        memory=((1, 1.6e10), (2, 2e10)),
        adamw_ns_per_param=1.2,
        adamw_fp32_ns_per_param=1.3,
        accumulate_ns_per_param=0.3,
        adamw_threads=1,
    )


def keep_profiles_in(folder: Path) -> None:
    """Make `folder` the cache folder of this process and its children, with a profile of this CPU for any core count.

    The native library and matplotlib's fonts stay where they are.
    """
    before = user_cache()
    os.environ.setdefault("LSS_BUILD_CACHE", str(before))
    os.environ.setdefault("MPLCONFIGDIR", str(before.parent / "matplotlib"))
    os.environ["XDG_CACHE_HOME"] = str(folder)
    key = key_of(torch.device("cpu"), available_cpus())
    for num_cpus in range(1, key.num_cpus + 1):
        profile = quiet_cpu(replace(key, num_cpus=num_cpus))
        profile_cache._write(profile_cache.profile_path(profile.key), profile)
