"""Which CPUs a rank's host optimizer runs on, from a /sys tree that a test writes."""

from __future__ import annotations

import pytest

from lightning_superscale.offload.planner.numa import (
    RankPlace,
    Topology,
    node_of_pci_device,
    parse_cpulist,
    read_topology,
    share_of_cpus,
    worker_cpus,
)

GPU_OF_NODE = {0: "0000:17:00.0", 1: "0000:ca:00.0"}


@pytest.fixture
def sys_root(tmp_path):
    """Two nodes of four cores with two hardware threads each, numbered as Linux does: second threads come last."""
    for node in (0, 1):
        folder = tmp_path / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{4 * node}-{4 * node + 3},{8 + 4 * node}-{8 + 4 * node + 3}\n")
    for cpu in range(16):
        folder = tmp_path / f"devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 8},{cpu % 8 + 8}\n")
    for node, address in GPU_OF_NODE.items():
        folder = tmp_path / "bus/pci/devices" / address
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(f"{node}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "cpus"), [("0-3,8,10-11\n", (0, 1, 2, 3, 8, 10, 11)), ("5", (5,)), ("\n", ()), ("", ())]
)
def test_cpulists_read_as_the_kernel_writes_them(text, cpus):
    assert parse_cpulist(text) == cpus


def test_topology_is_what_the_files_say(sys_root):
    topology = read_topology(range(16), sys_root)
    assert [topology.node_of[cpu] for cpu in (0, 3, 4, 7, 8, 11, 12, 15)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert topology.core_of[13] == topology.core_of[5] == 5
    assert topology.in_order(range(16)) == (0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15)


def test_without_files_every_cpu_is_a_core_of_node_0(tmp_path):
    topology = read_topology((2, 5), tmp_path)
    assert topology == Topology({2: 0, 5: 0}, {2: 2, 5: 5})


def test_node_of_a_device(sys_root):
    assert node_of_pci_device("0000:CA:00.0", sys_root) == 1
    assert node_of_pci_device("0000:ff:00.0", sys_root) is None
    (sys_root / "bus/pci/devices" / GPU_OF_NODE[0] / "numa_node").write_text("-1\n")
    assert node_of_pci_device(GPU_OF_NODE[0], sys_root) is None


def shares(places, topology):
    return [share_of_cpus(places, rank, topology) for rank in range(len(places))]


def test_a_rank_alone_takes_the_node_of_its_device_and_leaves_one_core(sys_root):
    topology = read_topology(range(16), sys_root)
    share = share_of_cpus([RankPlace("a", tuple(range(16)), 1)], 0, topology)
    assert share == (4, 12, 5, 13, 6, 14, 7, 15)
    assert worker_cpus(share, topology) == (5, 13, 6, 14, 7, 15)


@pytest.mark.parametrize("nodes", [(None,) * 4, (0, 0, 1, 1), (1, 0, 1, 0), (None,) * 3, (1, 1, 1)])
def test_unbound_ranks_of_one_host_get_whole_cores_that_no_other_has(sys_root, nodes):
    topology = read_topology(range(16), sys_root)
    found = shares([RankPlace("a", tuple(range(16)), node) for node in nodes], topology)
    assert len(set().union(*found)) == sum(map(len, found))
    for share, node in zip(found, nodes, strict=True):
        assert share
        assert {(cpu + 8) % 16 for cpu in share} == set(share)
        assert node is None or {topology.node_of[cpu] for cpu in share} == {node}


def test_ranks_of_other_hosts_do_not_count(sys_root):
    topology = read_topology(range(16), sys_root)
    places = [RankPlace(host, tuple(range(16)), None) for host in "ab"]
    assert [set(share) for share in shares(places, topology)] == [set(range(16))] * 2


def test_ranks_that_a_launcher_has_bound_keep_their_cpus(sys_root):
    topology = read_topology(range(16), sys_root)
    places = [RankPlace("a", (0, 1, 2), None), RankPlace("a", (4, 5), None)]
    assert [set(share) for share in shares(places, topology)] == [{0, 1, 2}, {4, 5}]


def test_a_device_whose_node_the_rank_may_not_run_on_changes_nothing(sys_root):
    topology = read_topology((0, 1, 2), sys_root)
    assert share_of_cpus([RankPlace("a", (0, 1, 2), 1)], 0, topology) == (0, 1, 2)


def test_more_ranks_than_cores_share_them_all(sys_root):
    topology = read_topology((0, 8), sys_root)
    assert shares([RankPlace("a", (0, 8), None)] * 2, topology) == [(0, 8)] * 2


@pytest.mark.parametrize(("share", "bound_to"), [((0,), ()), ((0, 8, 1, 9), ()), ((0, 1, 2), (1, 2))])
def test_workers_are_bound_only_where_cores_are_left(sys_root, share, bound_to):
    assert worker_cpus(share, read_topology(range(16), sys_root)) == bound_to
