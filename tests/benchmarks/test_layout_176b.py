"""A 176B-parameter checkpoint by names and shapes: saved, resharded and loaded by the product's own plans."""

from __future__ import annotations

import pytest

from benchmarks.layout_176b import NUM_PARAMS, Clock, check, load, save, shapes, tensors
from lightning_superscale.checkpoint.format.manifest import Manifest
from lightning_superscale.layout.rows import ParamSpec


@pytest.fixture(scope="module")
def manifest():
    return Manifest.from_bytes(save(tensors(), num_ranks=24, num_shards=12, clock=Clock()), "plan")


def test_it_is_bloom():
    assert sum(ParamSpec(name, shape).numel for name, shape in shapes().items()) == NUM_PARAMS


@pytest.mark.parametrize(("num_ranks", "num_shards"), [(8, 8), (50, 25)])
def test_every_element_of_every_state_is_read_once(manifest, num_ranks, num_shards):
    found = load(manifest, num_ranks, num_shards, Clock())
    # Weights in bf16; masters and two moments in fp32; a step of 4 bytes for each parameter.
    assert check(manifest, found) == NUM_PARAMS * (2 + 3 * 4) + 4 * len(shapes())
    readers = {segment.reader for segment in found.segments}
    assert readers == set(range(num_ranks)), "all ranks read"
    loads = [0] * num_ranks
    for segment in found.segments:
        loads[segment.reader] += segment.stop - segment.first
    # A rank reads of what it wants. Rows are dealt in full chunks, so the last ranks have fewer, or none beyond rows.
    assert max(loads) <= 1.3 * sum(loads) / num_ranks


def test_what_is_missing_or_read_twice_is_found():
    manifest = Manifest.from_bytes(save(tensors(num_blocks=2), num_ranks=6, num_shards=3, clock=Clock()), "plan")

    def loaded():
        return load(manifest, 4, 4, Clock())

    found = loaded()
    found.items[2].pop()
    with pytest.raises(AssertionError, match="elements of Box"):
        check(manifest, found)
    found = loaded()
    del found.requests[3], found.items[3]
    with pytest.raises(AssertionError, match="elements are read, expected"):
        check(manifest, found)
    found = loaded()
    found.segments.append(found.segments[0])
    with pytest.raises(AssertionError, match="are read twice"):
        check(manifest, found)
    found = loaded()
    found.segments.pop()
    with pytest.raises(AssertionError, match="wanted and not read"):
        check(manifest, found)
