"""Ports that transfers share, collectives that wait for their ranks, and queues."""

from __future__ import annotations

import importlib

import pytest

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.estimation.devices import PROFILES
from lightning_superscale.estimation.links import GroupShape, Latencies, Links
from lightning_superscale.simulation import machine
from lightning_superscale.simulation.machine import Collectives, Queue, SharedPorts, Traffic, new_environment
from lightning_superscale.simulation.symmetry import GroupClass

pytest.importorskip("simpy")

PORT, OTHER = (0, "rank"), (1, "rank")


def ends(transfers: list[tuple[float, list, float]]) -> list[float]:
    """When transfers end, given when each begins, its ports, and its seconds alone."""
    env = new_environment()
    ports, found = SharedPorts(env), [0.0] * len(transfers)

    def one(i, start, of, seconds):
        yield env.timeout(start)
        yield ports.transfer(of, seconds)
        found[i] = env.now

    for i, transfer in enumerate(transfers):
        env.process(one(i, *transfer))
    env.run()
    return found


def test_a_port_of_its_own_and_a_shared_one():
    assert ends([(0.0, [PORT], 3.0)]) == [3.0]
    assert ends([(0.0, [PORT], 3.0), (0.0, [OTHER], 3.0)]) == [3.0, 3.0]
    assert ends([(0.0, [PORT], 3.0), (0.0, [PORT], 3.0)]) == [6.0, 6.0], "each has half of the rate"


def test_shares_change_as_transfers_come_and_go():
    # One alone for 1 s; then half the rate until the short one has moved its second, at 3 s; then alone for its last.
    assert ends([(0.0, [PORT], 3.0), (1.0, [PORT], 1.0)]) == pytest.approx([4.0, 3.0])


def test_a_transfer_is_as_slow_as_its_fullest_port():
    assert ends([(0.0, [PORT, OTHER], 2.0), (0.0, [PORT], 1.0)]) == pytest.approx([3.0, 2.0])
    assert ends([(0.0, [PORT], 0.0)]) == [0.0]


def test_a_collective_begins_with_its_last_rank():
    env = new_environment()
    links = Links(PROFILES["H100 SXM"], Latencies(rank=1.0, node=5.0))
    collectives = Collectives(env, SharedPorts(env), links)
    group = GroupClass("shard", (0, 1), GroupShape(1, 4))
    seen = []

    def rank(own, start):
        yield env.timeout(start)
        for _ in range(2):
            yield from collectives.run(own, group, "gathers", "all_gather", 0)
            seen.append((own, env.now))

    env.process(rank(0, 0.0))
    env.process(rank(1, 10.0))
    env.run()
    assert sorted(seen) == [(0, 13.0), (0, 16.0), (1, 13.0), (1, 16.0)]  # three rounds of a second, twice


def test_a_queue_keeps_its_order():
    env = new_environment()
    queue, seen = Queue(env), []

    def work(name, seconds):
        yield env.timeout(seconds)
        seen.append((name, env.now))

    last = [queue.submit(work("slow", 3.0)), queue.submit(work("fast", 1.0))][-1]
    env.run(until=last)
    assert seen == [("slow", 3.0), ("fast", 4.0)]


def test_traffic_counts_a_ranks_inputs():
    traffic = Traffic()
    traffic.add("all_gather", 400, 4)
    traffic.add("reduce_scatter", 400, 4)
    traffic.add("reduce_scatter", 40, 4)
    assert traffic.calls == {"all_gather": 1, "reduce_scatter": 2}
    assert traffic.nbytes == {"all_gather": 100, "reduce_scatter": 440}


def test_without_simpy_the_extra_is_named(monkeypatch):
    def lacking(name):
        raise ImportError(name)

    monkeypatch.setattr(machine.importlib, "import_module", lacking)
    with pytest.raises(SuperScaleError, match=r"pip install 'lightning-superscale\[simulation\]'"):
        new_environment()
    assert importlib.import_module is lacking
