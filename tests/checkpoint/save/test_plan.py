"""Who writes what."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_superscale.checkpoint.format.coverage import uncovered
from lightning_superscale.checkpoint.save import plan
from lightning_superscale.checkpoint.save.plan import divide, fill_files, plan_file, plan_files
from lightning_superscale.checkpoint.state import TensorInfo, TensorKey
from lightning_superscale.errors import CheckpointError
from lightning_superscale.layout.box import Box, row_box, whole_box
from tests.helpers.checkpoints import LAYOUTS, boxes_of, infos, state_tensors

TENSORS = infos(state_tensors(0))


def held_by(layout: str, world_size: int):
    boxes = {key: boxes_of(key, info.shape, layout, world_size) for key, info in TENSORS.items()}
    return [{key: boxes[key][rank] for key in TENSORS} for rank in range(world_size)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_every_element_is_written_once_by_a_rank_that_holds_it(layout, world_size, monkeypatch):
    monkeypatch.setattr(plan, "_MIN_PART_BYTES", 16)
    held = held_by(layout, world_size)
    items = divide(TENSORS, held)
    for key, info in TENSORS.items():
        boxes = [item.box for own in items for item in own if item.key == key]
        assert uncovered(info.shape, boxes) is None
        assert all(box.numel for box in boxes)
    for rank, own in enumerate(items):
        for item in own:
            assert item.shard in held[rank][item.key]
            assert item.box.intersect(item.shard) == item.box


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 40)), min_size=1, max_size=8), st.integers(2, 5))
def test_replicas_share_the_bytes_evenly(shapes, world_size):
    tensors = {TensorKey("model", str(i)): TensorInfo(torch.float32, s, "model") for i, s in enumerate(shapes)}
    held = [{key: (whole_box(info.shape),) for key, info in tensors.items()}] * world_size
    least = plan._MIN_PART_BYTES
    plan._MIN_PART_BYTES = 64
    try:
        items = divide(tensors, held)
    finally:
        plan._MIN_PART_BYTES = least
    loads = [sum(item.box.numel * 4 for item in own) for own in items]
    # A cut falls on a row, of at most 160 bytes, and leaves no part below 64 bytes; each rank has two ends.
    assert max(loads) - sum(loads) / world_size <= 2 * (160 + 64)


def test_who_holds_more_of_his_own_takes_less_of_what_is_shared():
    own, shared = TensorKey("model", "own"), TensorKey("model", "shared")
    tensors = {key: TensorInfo(torch.uint8, (2**23,), "model") for key in (own, shared)}
    whole = whole_box((2**23,))
    items = divide(tensors, [{own: (whole,), shared: (whole,)}, {shared: (whole,)}])
    assert [sum(item.box.numel for item in those) for those in items] == [2**23, 2**23]


def test_tensors_that_are_cut_alike_are_proved_whole_once(monkeypatch):
    proofs = []
    monkeypatch.setattr(plan, "uncovered", lambda shape, boxes: proofs.append(shape))
    tensors = {TensorKey("model", str(i)): TensorInfo(torch.float32, (8, 2), "model") for i in range(5)}
    cuts = [(row_box((8, 2), 0, 4),), (row_box((8, 2), 4, 8),)]
    shared = divide(tensors, [dict.fromkeys(tensors, cut) for cut in cuts])
    assert proofs == [(8, 2)]
    own = divide(tensors, [{key: [cut[0]] for key in tensors} for cut in cuts])
    assert [*shared] == [*own]
    assert own[:1] == [own[0]]
    assert len(proofs) == 6


def test_a_file_is_planned_without_values():
    key = TensorKey("optimizer.0", "w", "exp_avg")
    tensors = {key: TensorInfo(torch.float32, (64, 16), "state")}
    items = divide(tensors, [{key: (row_box((64, 16), 0, 32), row_box((64, 16), 32, 64))}])[0]
    assert plan_files(3, items, tensors) == {"data/w00003-0.safetensors": [0, 1]}
    file = plan_file("f", items, tensors, "id")
    assert [chunk.entry for _, chunk in file.chunks] == ["optimizer.0/w[exp_avg]#0", "optimizer.0/w[exp_avg]#1"]
    assert [chunk.start - len(file.header) for _, chunk in file.chunks] == [0, 2048]
    assert file.size == len(file.header) + 4096


@pytest.mark.parametrize(
    ("boxes", "why"),
    [
        ([row_box((4, 2), 0, 2), row_box((4, 2), 3, 4)], "6 of the 8 elements"),
        ([row_box((4, 2), 0, 3), row_box((4, 2), 2, 4)], "overlap"),
        ([row_box((4, 2), 0, 2), row_box((4, 2), 2, 5)], "not within"),
    ],
)
def test_a_gap_and_an_overlap_are_refused_by_name(boxes, why):
    key = TensorKey("optimizer.0", "layer.weight", "exp_avg")
    held = [{key: (box,)} for box in boxes]
    with pytest.raises(CheckpointError, match=rf"optimizer.0: layer.weight \[exp_avg\] can't be saved.*{why}"):
        divide({key: TensorInfo(torch.float32, (4, 2), "state")}, held)


def test_large_tensors_come_in_chunks_of_whole_rows(monkeypatch):
    monkeypatch.setattr(plan, "MAX_CHUNK_BYTES", 100)
    key = TensorKey("model", "w")
    for shape in ((10, 7), (2, 60), (300,)):
        items = divide({key: TensorInfo(torch.float32, shape, "model")}, [{key: (whole_box(shape),)}])[0]
        assert uncovered(shape, [item.box for item in items]) is None
        assert max(item.box.numel * 4 for item in items) <= 100
    items = divide({key: TensorInfo(torch.float32, (10, 7), "model")}, [{key: (whole_box((10, 7)),)}])[0]
    assert items[0].box == Box((0, 0), (3, 7))


@given(st.lists(st.integers(0, 100), max_size=30), st.integers(1, 4))
def test_files_are_consecutive_and_below_the_limit(sizes, num_files):
    limits = plan.MAX_FILE_BYTES, plan.MAX_CHUNK_BYTES
    plan.MAX_FILE_BYTES, plan.MAX_CHUNK_BYTES = 250, 100
    try:
        files = fill_files(sizes, num_files)
    finally:
        plan.MAX_FILE_BYTES, plan.MAX_CHUNK_BYTES = limits
    assert [i for file in files for i in file] == list(range(len(sizes)))
    assert all(file and sum(sizes[i] for i in file) <= 250 for file in files)
