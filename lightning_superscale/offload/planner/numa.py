"""Chooses the CPUs of one rank's host optimizer: near its device, and shared with no other rank.

[Note: Share of the cores] Ranks of one host that may all run on the same CPUs divide them among themselves; ranks whose
devices are on one NUMA node divide the CPUs of that node. Ranks that a launcher bound to different CPUs keep theirs.
Hardware threads of one core stay together, because two ranks on one core would halve each other's speed. Of its share
a rank leaves the first core to the thread that launches the model's work.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_SYS = Path("/sys")


@dataclass(frozen=True, slots=True)
class Topology:
    """The NUMA node and the core of each CPU.

    Attributes:
        node_of: NUMA node of each CPU; 0 where the system does not say.
        core_of: the first hardware thread of each CPU's core; the CPU itself where the system does not say.
    """

    node_of: Mapping[int, int]
    core_of: Mapping[int, int]

    def in_order(self, cpus: Iterable[int]) -> tuple[int, ...]:
        """CPUs by node, then by core: a contiguous piece is as near together as can be."""
        return tuple(sorted(cpus, key=lambda cpu: (self.node_of.get(cpu, 0), self.core_of.get(cpu, cpu), cpu)))


def parse_cpulist(text: str) -> tuple[int, ...]:
    """The CPUs of a list as Linux writes it, such as `0-3,8,10-11`; none for an empty one.

    Raises:
        ValueError: the text is no such list.
    """
    cpus: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.extend(range(int(first), int(last or first) + 1))
    return tuple(cpus)


def read_topology(cpus: Iterable[int], root: Path = _SYS) -> Topology:
    """The nodes and cores of some CPUs, as far as the files under `root` (/sys) tell."""
    wanted = set(cpus)
    node_of, core_of = dict.fromkeys(wanted, 0), {cpu: cpu for cpu in wanted}
    for folder in sorted((root / "devices/system/node").glob("node[0-9]*")):
        for cpu in wanted.intersection(_cpulist_in(folder / "cpulist")):
            node_of[cpu] = int(folder.name.removeprefix("node"))
    for cpu in wanted:
        siblings = _cpulist_in(root / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        core_of[cpu] = min(siblings, default=cpu)
    return Topology(node_of, core_of)


def _cpulist_in(path: Path) -> tuple[int, ...]:
    try:
        return parse_cpulist(path.read_text())
    except (OSError, ValueError):
        return ()  # not Linux, or a container that hides the file: nothing is known


def node_of_pci_device(address: str, root: Path = _SYS) -> int | None:
    """NUMA node of a PCI device such as `0000:65:00.0`; None where it has none or the system does not tell."""
    try:
        node = int((root / "bus/pci/devices" / address.lower() / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return None if node < 0 else node


def available_cpus() -> tuple[int, ...]:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


@dataclass(frozen=True, slots=True)
class RankPlace:
    """The host, the CPUs and the NUMA node of one rank.

    Attributes:
        host: the machine's name.
        cpus: CPUs that the rank may run on.
        node: NUMA node of its device; None where that has none.
    """

    host: str
    cpus: tuple[int, ...]
    node: int | None


def share_of_cpus(places: Sequence[RankPlace], rank: int, topology: Topology) -> tuple[int, ...]:
    """The CPUs that one rank should use, at least one ([Note: Share of the cores]).

    Args:
        places: places of all ranks, by rank.
        topology: topology of this rank's CPUs.
    """
    own = places[rank]
    peers = [other for other, place in enumerate(places) if (place.host, place.cpus) == (own.host, own.cpus)]
    near = topology.in_order(cpu for cpu in own.cpus if topology.node_of.get(cpu) == own.node)
    if near:
        peers = [other for other in peers if places[other].node == own.node]
    cpus = near or topology.in_order(own.cpus)
    cores = list(dict.fromkeys(topology.core_of.get(cpu, cpu) for cpu in cpus))
    if len(cores) < len(peers):
        return cpus  # too few for a core each
    mine = peers.index(rank)
    first, end = (len(cores) * place // len(peers) for place in (mine, mine + 1))
    kept = set(cores[first:end])
    return tuple(cpu for cpu in cpus if topology.core_of.get(cpu, cpu) in kept)


def worker_cpus(share: Sequence[int], topology: Topology) -> tuple[int, ...]:
    """The CPUs to bind the host optimizer's threads to: the share without its first core.

    Empty with fewer than three cores: a thread bound to the only core left could not move away from other work there.
    """
    cores = list(dict.fromkeys(topology.core_of.get(cpu, cpu) for cpu in share))
    if len(cores) < 3:
        return ()
    return tuple(cpu for cpu in share if topology.core_of.get(cpu, cpu) != cores[0])
