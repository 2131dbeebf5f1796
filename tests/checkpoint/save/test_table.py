"""What ranks say they wrote becomes the records that a manifest has, whoever wrote how much."""

from __future__ import annotations

import random

import pytest
import torch

from lightning_superscale.checkpoint.format import manifest as manifest_module
from lightning_superscale.checkpoint.format.chunks import Chunk, ChunkColumns
from lightning_superscale.checkpoint.format.manifest import Manifest
from lightning_superscale.checkpoint.load.reader import open_checkpoint
from lightning_superscale.checkpoint.save import table
from lightning_superscale.checkpoint.save.plan import entry_prefix
from lightning_superscale.checkpoint.save.table import records_of, table_of
from lightning_superscale.checkpoint.save.writer import save
from lightning_superscale.checkpoint.state import LocalShard, LocalState, ReadRequest, TensorInfo, TensorKey
from lightning_superscale.checkpoint.tools.verify import verify
from lightning_superscale.comm.mesh import single_mesh
from lightning_superscale.layout.box import row_box, whole_box
from tests.helpers.checkpoints import infos, state_tensors

TENSORS = infos(state_tensors(0))


@pytest.mark.parametrize("many", [1, 3, 64])
def test_each_tensor_gets_the_chunks_that_any_rank_wrote(many, monkeypatch):
    monkeypatch.setattr(table, "MANY_CHUNKS", many)
    chance = random.Random(many)
    written: list[list[tuple[TensorKey, Chunk]]] = [[] for _ in range(4)]
    for key, info in TENSORS.items():
        for rank in chance.sample(range(3), 2):  # the last rank writes nothing
            for number in range(chance.choice((1, 3))):
                chunk = Chunk(f"data/w{rank}-{number}", f"{entry_prefix(key)}{number}", 64, whole_box(info.shape))
                written[rank].append((key, chunk))
    files = {chunk.file for own in written for _, chunk in own}
    records = records_of([table_of(own, TENSORS) for own in written], TENSORS, [*files, "rest.json"])
    assert [*records] == sorted(TENSORS)
    for key, record in records.items():
        expected = [chunk for own in written for of, chunk in own if of == key]
        assert [*record.chunks] == expected
        assert record.info == TENSORS[key]
        assert isinstance(record.chunks, ChunkColumns) == (len(expected) >= many)


def test_a_checkpoint_without_tensors_has_no_records():
    assert records_of([table_of([], {})], {}, []) == {}


@pytest.mark.parametrize("num_rows", [table.MANY_CHUNKS - 1, 3 * table.MANY_CHUNKS])
def test_a_tensor_in_many_parts_is_saved_verified_and_read(tmp_path, num_rows, monkeypatch):
    one_by_one = []
    monkeypatch.setattr(manifest_module, "uncovered", lambda shape, boxes: one_by_one.append(shape))
    weight = torch.arange(num_rows * 5, dtype=torch.float32).view(num_rows, 5)
    key = TensorKey("model", "w")
    boxes = [row_box(weight.shape, i, i + 1) for i in range(num_rows)]
    shards = tuple(LocalShard(box, weight[i : i + 1]) for i, box in enumerate(boxes))
    state = LocalState({key: TensorInfo(weight.dtype, tuple(weight.shape), "model")}, {key: shards})
    path = str(tmp_path / "a")
    save(path, state, single_mesh())
    assert bool(one_by_one) == (num_rows < table.MANY_CHUNKS), "columns are proven at once, as they are written"
    monkeypatch.undo()
    assert verify(path) == []
    source = open_checkpoint(path)
    manifest: Manifest = source.manifest
    assert manifest.min_reader == ("lucp/1.1" if num_rows >= table.MANY_CHUNKS else "lucp/1.0")
    whole, part = torch.zeros_like(weight), torch.zeros(7, 5)
    source.read(
        [ReadRequest(key, whole_box(weight.shape), whole), ReadRequest(key, row_box((num_rows, 5), 9, 16), part)]
    )
    assert torch.equal(whole, weight)
    assert torch.equal(part, weight[9:16])
    file = next(name for name in manifest.files if name.startswith("data/"))
    damaged = tmp_path / "a" / file
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)
    assert [str(finding.holds) for finding in verify(path)] == [str(key)], "named once, in however many parts"
