"""How much memory the control groups of this process leave it: a container's limit, below which the host may have more.

Past that limit the kernel kills the process without a word, whatever the host has free. Linux knows two versions, with
other names for the same numbers; `memory` may be in either, and each group's limit holds for the groups within it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lightning_superscale.comm.processes import this_machine

_SELF = Path("/proc/self")
# Version 1 writes the largest multiple of a page for "no limit".
_NO_LIMIT = 2**60


@dataclass(frozen=True, slots=True)
class _Version:
    """Names of one version's files and of what the kernel takes back before it kills."""

    filesystem: str
    limit: str
    usage: str
    reclaimable: tuple[str, ...]


_V1 = _Version("cgroup", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))
_V2 = _Version("cgroup2", "memory.max", "memory.current", ("active_file", "inactive_file", "slab_reclaimable"))


def cgroup_free_bytes(process: Path = _SELF) -> int | None:
    """Bytes that this process may still take before a limit of its control groups is reached; None without a limit.

    Args:
        process: the folder of the process under /proc.
    """
    found = [free for version, folder in _groups(process) if (free := _free(version, folder)) is not None]
    return min(found, default=None)


def memory_domain(process: Path = _SELF) -> str:
    """A text that two processes share if they take memory from one host and one group; "" where that can't be known."""
    try:
        return f"{this_machine()} {(process / 'cgroup').read_text()}" if this_machine() else ""
    except OSError:
        return ""


def _free(version: _Version, folder: Path) -> int | None:
    """What one group leaves; None without a limit, or where it can't be read."""
    try:
        limit = (folder / version.limit).read_text().strip()
        if limit == "max" or int(limit) >= _NO_LIMIT:
            return None
        used = int((folder / version.usage).read_text())
        reclaimable = 0
        with contextlib.suppress(OSError):  # a limit without statistics is a limit still
            pairs = [line.split() for line in (folder / "memory.stat").read_text().splitlines()]
            reclaimable = sum(int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] in version.reclaimable)
    except (OSError, ValueError):
        return None
    return max(0, int(limit) - max(0, used - reclaimable))


def _groups(process: Path) -> Iterator[tuple[_Version, Path]]:
    """The folders of the process's groups, each from its own up to the topmost that is mounted."""
    try:
        mounts = (process / "mountinfo").read_text().splitlines()
        memberships = (process / "cgroup").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for membership in memberships:
        number, controllers, path = (membership.split(":", 2) + ["", ""])[:3]
        if number != "0" and "memory" not in controllers.split(","):
            continue
        version = _V2 if number == "0" else _V1
        for root, mounted in _mounts(mounts, version):
            folder = _below(root, mounted, path)
            for group in (folder, *folder.parents):
                if not group.is_relative_to(mounted):
                    break
                yield version, group


def _mounts(lines: list[str], version: _Version) -> Iterator[tuple[str, Path]]:
    """(root within the hierarchy, where it is mounted) of each mount that has the memory controller."""
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or not kind or kind[0] != version.filesystem:
            continue
        if version is _V1 and "memory" not in kind[-1].split(","):
            continue
        yield fields[3], Path(fields[4].replace("\\040", " "))


def _below(root: str, mounted: Path, path: str) -> Path:
    """The folder of a group, whose path is told from the top, or from a container's own top."""
    base = root.rstrip("/")
    if base and path != base and not path.startswith(f"{base}/"):
        return mounted
    inside = path.removeprefix(base).strip("/")
    return mounted if ".." in inside.split("/") else mounted / inside
