"""The memory limits of containers, read from fake trees of both versions of control groups."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.offload.link import arena
from lightning_superscale.offload.link.cgroup import cgroup_free_bytes, memory_domain

MIB = 2**20


class Tree:
    """A fake /proc/self and a fake hierarchy of control groups."""

    def __init__(self, folder: Path, membership: str, mount: str) -> None:
        self.process, self.mounted = folder / "self", folder / "cgroup"
        self.process.mkdir()
        self.mounted.mkdir()
        other = "22 1 0:20 / /proc rw,nosuid - proc proc rw"
        (self.process / "mountinfo").write_text(f"{other}\n{mount.format(self.mounted)}\n")
        (self.process / "cgroup").write_text(membership)

    def group(self, path: str, files: Mapping[str, object]) -> None:
        folder = self.mounted / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_text(f"{content}\n")

    @property
    def free(self) -> int | None:
        return cgroup_free_bytes(self.process)


V2_MOUNT = "31 23 0:27 / {} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "33 32 0:29 / {} rw,nosuid shared:15 - cgroup cgroup rw,memory"


def v2(limit: object, used: int, **stat: int) -> dict[str, object]:
    text = "\n".join(f"{name} {value}" for name, value in {"anon": 7, **stat}.items())
    return {"memory.max": limit, "memory.current": used, "memory.stat": text}


def v1(limit: object, used: int, **stat: int) -> dict[str, object]:
    text = "\n".join(f"{name} {value}" for name, value in {"cache": 7, **stat}.items())
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": text}


def test_version_2_leaves_its_limit_less_what_the_kernel_cannot_take_back(tmp_path):
    tree = Tree(tmp_path, "0::/pod/box\n", V2_MOUNT)
    tree.group("pod", v2("max", 90 * MIB))
    tree.group("pod/box", v2(100 * MIB, 80 * MIB))
    assert tree.free == 20 * MIB
    tree.group("pod/box", v2(100 * MIB, 80 * MIB, active_file=10 * MIB, inactive_file=5 * MIB, slab_reclaimable=MIB))
    assert tree.free == 36 * MIB
    tree.group("pod/box", v2(100 * MIB, 120 * MIB))
    assert tree.free == 0
    tree.group("pod/box", v2("max", 80 * MIB))
    assert tree.free is None


def test_the_smallest_of_all_parents_counts(tmp_path):
    tree = Tree(tmp_path, "0::/a/b/c\n", V2_MOUNT)
    tree.group("a", v2(100 * MIB, 95 * MIB))
    tree.group("a/b", v2("max", 0))
    tree.group("a/b/c", v2(50 * MIB, 10 * MIB))
    assert tree.free == 5 * MIB


def test_version_1_with_the_memory_controller_of_its_own(tmp_path):
    tree = Tree(tmp_path, "9:name=systemd:/x\n4:memory:/box/job\n1:cpu,cpuacct:/y\n0::/\n", V1_MOUNT)
    tree.group("box", v1(9223372036854771712, 3 * MIB))
    tree.group("box/job", v1(100 * MIB, 60 * MIB, total_active_file=4 * MIB, total_inactive_file=6 * MIB))
    assert tree.free == 50 * MIB
    tree.group("box", v1(70 * MIB, 65 * MIB))
    assert tree.free == 5 * MIB


@pytest.mark.parametrize("membership", ["0::/docker/abc\n", "0::/\n", "0::/../..\n", "0::/elsewhere\n"])
def test_a_container_sees_its_own_group_at_the_top(tmp_path, membership):
    """Whether the path is told from the host's top or the container's, and where the mount hides the rest."""
    mount = V2_MOUNT if membership == "0::/\n" else V2_MOUNT.replace(" / {}", " /docker/abc {}")
    tree = Tree(tmp_path, membership, mount)
    tree.group(".", v2(100 * MIB, 30 * MIB))
    assert tree.free == 70 * MIB


@pytest.mark.parametrize("broken", ["", "no number", "-", "\x00"])
def test_what_cannot_be_read_is_no_limit(tmp_path, broken):
    tree = Tree(tmp_path, "0::/box\nnonsense\n::\n", V2_MOUNT)
    assert tree.free is None
    tree.group("box", {**v2(100 * MIB, MIB), "memory.max": broken})
    assert tree.free is None
    tree.group("box", {"memory.max": 100 * MIB, "memory.current": MIB})
    (tree.mounted / "box" / "memory.stat").unlink()
    assert tree.free == 99 * MIB
    (tree.process / "cgroup").unlink()
    assert tree.free is None
    assert cgroup_free_bytes(tmp_path / "nowhere") is None


def test_this_machine_can_be_asked():
    free = cgroup_free_bytes()
    assert free is None or free >= 0


def test_the_check_before_work_takes_the_smaller_of_host_and_limit(monkeypatch):
    host = arena.available_host_bytes()
    monkeypatch.setattr(arena, "cgroup_free_bytes", lambda: 64 * MIB)
    assert arena.available_host_bytes() == 64 * MIB
    assert arena.fits_host_memory(64 * MIB)
    assert not arena.fits_host_memory(64 * MIB + 1)
    with pytest.raises(
        SuperScaleError, match=r"0.07 GiB are available under the memory limit of this process's cgroup"
    ):
        arena.check_host_memory(65 * MIB)
    monkeypatch.setattr(arena, "cgroup_free_bytes", lambda: 1 << 60)
    assert arena.available_host_bytes() == pytest.approx(host, rel=0.5)
    with pytest.raises(SuperScaleError, match=r"GiB are available\. Use a smaller model"):
        arena.check_host_memory(1 << 50)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(arena, "available_host_bytes", lambda: 13 * MIB)
    with pytest.raises(SuperScaleError, match=r"on the GPU from the start, with OffloadConfig\(gpu_fraction=0.35\)"):
        arena.check_host_memory(20 * MIB)


def test_what_several_processes_of_one_host_need_is_told_as_theirs(monkeypatch):
    monkeypatch.setattr(arena, "available_host_bytes", lambda: 3 << 30)
    arena.check_host_memory(3 << 30, 2)
    with pytest.raises(SuperScaleError, match=r"needs 4.0 GiB of .* of 2 processes on this host, and 3.0 GiB are"):
        arena.check_host_memory(4 << 30, 2)


def test_processes_share_memory_where_host_and_groups_are_the_same(tmp_path, monkeypatch):
    for name, groups in {"a": "0::/job/task_0\n", "b": "0::/job/task_1\n", "c": "0::/job/task_0\n"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "cgroup").write_text(groups)
    here, elsewhere, same = (memory_domain(tmp_path / name) for name in "abc")
    assert here == same != elsewhere
    assert memory_domain(tmp_path / "nowhere") == ""
    assert arena.sharing_host_memory() == memory_domain() != ""
    monkeypatch.setenv("LSS_HOST_MEMORY_GIB", "1.5")  # of this process alone
    assert arena.sharing_host_memory() == ""


def test_memory_that_a_machine_gets_as_it_is_used_can_be_said(monkeypatch):
    monkeypatch.setenv("LSS_HOST_MEMORY_GIB", "1.5")
    assert arena.available_host_bytes() == 3 << 29
    for wrong in ("much", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("LSS_HOST_MEMORY_GIB", wrong)
        with pytest.raises(SuperScaleError, match="LSS_HOST_MEMORY_GIB is '.*'; expected the GiB of host memory"):
            arena.available_host_bytes()
