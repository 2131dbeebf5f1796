"""Seconds of collectives by closed forms."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_superscale.estimation.devices import PROFILES, Reach
from lightning_superscale.estimation.links import GroupShape, Latencies, Links

PROFILE = replace(PROFILES["H100 SXM"], rank_link=4e9, node_link=1e9, reach=Reach(links=0.5))
LATENCIES = Latencies(rank=1e-6, node=1e-5)
LINKS = Links(PROFILE, LATENCIES)
BYTES = 10**9


def seconds(kind, shape, nbytes=BYTES, links=LINKS):
    return sum(hop.latency + hop.seconds for hop in links.hops(kind, nbytes, shape))


@pytest.mark.parametrize("size", [2, 3, 8])
def test_a_ring_in_a_node(size):
    one_way = (size - 1) / size * BYTES / 2e9 + (size - 1) * 1e-6
    for kind in ("reduce_scatter", "all_gather"):
        assert seconds(kind, GroupShape(1, size)) == pytest.approx(one_way, rel=1e-12)
    assert seconds("all_reduce", GroupShape(1, size)) == pytest.approx(2 * one_way, rel=1e-12)


def test_a_ring_of_nodes_is_as_fast_as_the_links_between_them():
    expected = 3 / 4 * BYTES / 0.5e9 + 3 * 1e-5
    assert seconds("all_gather", GroupShape(4, 1)) == pytest.approx(expected, rel=1e-12)


def test_several_ranks_of_a_node_share_what_goes_between_nodes():
    inside = 7 / 8 * BYTES / 2e9 + 7e-6
    between = 3 / 4 * BYTES / 8 / 0.5e9 + 3e-5
    assert seconds("reduce_scatter", GroupShape(4, 8)) == pytest.approx(inside + between, rel=1e-12)
    assert [hop.port for hop in LINKS.hops("all_reduce", BYTES, GroupShape(4, 8))] == ["rank", "node", "node", "rank"]


def test_both_levels_together_send_what_one_ring_would():
    links = Links(replace(PROFILE, rank_link=1e9, node_link=1e9), Latencies(0.0, 0.0))
    assert seconds("all_gather", GroupShape(3, 5), links=links) == pytest.approx(14 / 15 * BYTES / 0.5e9, rel=1e-12)


def test_an_exchange_in_pairs():
    inside, outside = 3 / 8 * BYTES / 2e9 + 3e-6, 4 / 8 * BYTES / 0.5e9 + 4e-5
    assert seconds("all_to_all", GroupShape(2, 4)) == pytest.approx(inside + outside, rel=1e-12)
    assert seconds("all_to_all", GroupShape(1, 4)) == pytest.approx(3 / 4 * BYTES / 2e9 + 3e-6, rel=1e-12)


def test_one_rank_exchanges_nothing():
    assert LINKS.hops("all_reduce", BYTES, GroupShape(1, 1)) == []


def test_a_faster_link_is_never_slower():
    faster = Links(replace(PROFILE, node_link=2e9), LATENCIES)
    for shape in (GroupShape(1, 8), GroupShape(2, 1), GroupShape(16, 8), GroupShape(1250, 8)):
        for kind in ("reduce_scatter", "all_gather", "all_reduce", "all_to_all"):
            assert seconds(kind, shape, links=faster) <= seconds(kind, shape)
