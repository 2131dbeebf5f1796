"""Hardware profiles on disk: one small JSON file for each machine, device and version, under the user's cache folder.

Ranks that write the same profile at once each write a file of their own and rename it into place; the last one stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from lightning_superscale.offload.planner.numa import available_cpus
from lightning_superscale.offload.planner.profile import HardwareKey, HardwareProfile, key_of, measure
from lightning_superscale.ops.native.own_files import make_own_folder, own_folder, read_own_file, user_cache

# The version of the format, in every file and its name: files of other versions are neither read nor overwritten.
# Version 2 added the kernel's time with fp32 gradients and weights, version 3 that of adding gradients up, version 4
# the share of CPU time.
_FORMAT = 4
# A file of ours has some hundred bytes; Python's parser of JSON ends a run that gives it some thousand brackets.
_MOST_BYTES = 64 * 2**10
_MOST_THREADS = 4096


def is_switched_off() -> bool:
    """Whether the environment variable LSS_PROFILE switches measuring off."""
    return os.environ.get("LSS_PROFILE", "").lower() in ("off", "0")


def profile_path(key: HardwareKey) -> Path:
    """The file that keeps the profile of a key, whether it exists or not."""
    filed_under = {"format": _FORMAT, **asdict(key)}
    digest = hashlib.sha256(json.dumps(filed_under, sort_keys=True).encode()).hexdigest()[:16]
    return user_cache() / f"hardware-{digest}.json"


def stored_profile(key: HardwareKey) -> HardwareProfile | None:
    """The profile that was filed under a key; None when there is none.

    Warns:
        UserWarning: the file is damaged, or belongs to another key.
    """
    path = profile_path(key)
    try:
        with own_folder(path.parent):
            pass
    except OSError:
        return None  # whoever files a profile is told why the folder is not used
    try:
        text = read_own_file(path, _MOST_BYTES).decode()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        warnings.warn(f"the hardware profile {path} can't be read and is measured again: {error}", stacklevel=2)
        return None
    try:
        content = json.loads(text)
        if content.pop("format") != _FORMAT:
            raise ValueError(f"expected format {_FORMAT}")
        profile = _from_json(content)
        if profile.key != key:
            raise ValueError(f"expected the profile of {key}, found one of {profile.key}")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        warnings.warn(f"the hardware profile {path} is damaged and is measured again: {error!r}", stacklevel=2)
        return None
    return profile


def cached_profile(
    device: torch.device, cpus: Sequence[int] = (), *, measures_again: bool = False
) -> HardwareProfile | None:
    """This rank's profile: from its file, else measured now and filed; None where LSS_PROFILE=off.

    One that was measured while other work had its cores is measured again, and the quieter of both stays in the file.
    Any rank may call it alone. The profiles of two ranks differ.

    Args:
        device: the rank's device.
        cpus: CPUs that the rank may use; empty for those of the process.
        measures_again: whether to measure it now also where a quiet one is filed.

    Warns:
        UserWarning: the file was damaged, could not be written, or measuring failed (then the result is None).
    """
    if is_switched_off():
        return None
    cpus = tuple(cpus) or available_cpus()
    key = key_of(device, cpus)
    stored = stored_profile(key)
    if stored is not None and stored.is_quiet and not measures_again:
        return stored
    try:
        profile = measure(device, cpus)
    except (RuntimeError, MemoryError, ValueError) as error:
        # A run can train without a profile, so a failure to measure must not end it; other ranks wait for this one.
        warnings.warn(f"this machine's speed could not be measured (LSS_PROFILE=off skips it): {error}", stacklevel=2)
        return None
    if stored is not None and not profile.is_quiet and profile.cpu_share <= stored.cpu_share:
        return profile if measures_again else stored
    try:
        _write(profile_path(key), profile)
    except OSError as error:
        warnings.warn(
            f"the hardware profile could not be kept in {user_cache()}, so that every run measures again: {error}. "
            "Make the folder writable, or set XDG_CACHE_HOME or LSS_PROFILE=off.",
            stacklevel=2,
        )
    return profile


def _from_json(content: dict[str, object]) -> HardwareProfile:
    key, memory, threads = content.pop("key"), content.pop("memory"), content.pop("adamw_threads")
    if not isinstance(key, dict) or not isinstance(memory, list):
        raise TypeError("expected a mapping 'key' and a list 'memory'")
    pairs = tuple((_threads(number), _rate(rate)) for number, rate in memory)
    rates = {name: _rate(rate) for name, rate in content.items()}
    return HardwareProfile(key=HardwareKey(**key), memory=pairs, adamw_threads=_threads(threads), **rates)


def _threads(value: object) -> int:
    if not isinstance(value, int) or not 0 < value <= _MOST_THREADS:
        raise ValueError(f"expected a number of threads from 1 to {_MOST_THREADS}, found {value!r}")
    return value


def _rate(value: object) -> float:
    if not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, found {value!r}")
    return float(value)  # an OverflowError where it has no place in 64 bits


def _write(path: Path, profile: HardwareProfile) -> None:
    make_own_folder(path.parent)
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump({"format": _FORMAT, **asdict(profile)}, file, indent=1)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
