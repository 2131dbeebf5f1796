"""Payload files: what any safetensors reader finds in them, and what was promised besides."""

import json
import struct

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file

from lightning_superscale.checkpoint.format import payload
from lightning_superscale.checkpoint.format.blocks import BLOCK_BYTES, BlockHasher, BlockSums
from lightning_superscale.checkpoint.format.dtypes import _NAMES, dtype_name, dtype_of
from lightning_superscale.checkpoint.format.payload import FileEntry, PayloadWriter, host_chunks, layout, sort_entries
from lightning_superscale.checkpoint.storage.files import LocalFile
from lightning_superscale.errors import CheckpointError


def values(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def write(path, tensors):
    names = list(tensors)
    entries = [FileEntry(name, tensors[name].dtype, tuple(tensors[name].shape)) for name in names]
    order = sort_entries(entries)
    place = layout([entries[i] for i in order], "some uuid")
    writer = PayloadWriter(LocalFile(str(path)))
    writer.write(place.header)
    for i in order:
        writer.write_tensor(tensors[names[i]])
    return writer.finish(), {names[i]: start for i, start in zip(order, place.starts, strict=True)}


def test_the_stock_reader_reads_every_dtype_bit_for_bit(tmp_path):
    tensors = {f"odd {dtype}": values(dtype, 3, 5) for dtype in _NAMES}
    tensors |= {f"even/{dtype}#0": values(dtype, 64) for dtype in _NAMES}
    tensors |= {"nothing": torch.empty(0, 3), "scalar": torch.tensor(3.5), 'name with " and \u00e9': torch.ones(2)}
    digest, starts = write(tmp_path / "a.safetensors", tensors)
    found = load_file(tmp_path / "a.safetensors")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
        assert starts[name] % (64 if tensor.nbytes % 64 == 0 else tensor.element_size()) == 0
    data = (tmp_path / "a.safetensors").read_bytes()
    assert digest.size == len(data)
    assert digest.xxh3 == xxhash.xxh3_64_hexdigest(data)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata()["lucp"] == "some uuid"


def test_the_header_is_sorted_and_has_no_gaps(tmp_path):
    _, starts = write(
        tmp_path / "a", {"b": torch.ones(16), "c": torch.ones(3), "a": torch.ones(32), "d": values(torch.int8, 5)}
    )
    data = (tmp_path / "a").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8 : 8 + length])
    del entries["__metadata__"]
    assert list(entries) == ["a", "b", "c", "d"]
    assert (8 + length) % 64 == 0
    ends = [0, *(entry["data_offsets"][1] for entry in entries.values())]
    assert [entry["data_offsets"][0] for entry in entries.values()] == ends[:-1]
    assert starts["a"] == 8 + length


@pytest.mark.parametrize("chunk_bytes", [16, 40, 2**20])
def test_chunks_are_a_tensors_bytes_in_order_whatever_its_strides(chunk_bytes, monkeypatch):
    monkeypatch.setattr(payload, "_CHUNK_BYTES", chunk_bytes)
    base = torch.arange(5 * 6 * 7).view(5, 6, 7).float()
    for tensor in (base, base.transpose(0, 2), base[1:4, ::2, 3], base[:0], torch.tensor(2.0), base[2, 3, 4]):
        chunks = list(host_chunks(tensor))
        assert all(chunk.numel() <= chunk_bytes for chunk in chunks)
        joined = torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.uint8)
        assert torch.equal(joined, tensor.contiguous().view(-1).view(torch.uint8))
    conjugate = torch.tensor([1 + 2j, 3 - 4j]).conj()
    assert torch.equal(torch.cat(list(host_chunks(conjugate))).view(torch.complex64), conjugate.resolve_conj())


def test_a_large_tensor_is_never_copied_whole(monkeypatch):
    largest = []
    monkeypatch.setattr(payload, "_CHUNK_BYTES", 1024)
    tensor = torch.ones(1000, 100).t()
    for chunk in host_chunks(tensor):
        largest.append(chunk.untyped_storage().nbytes())
    assert max(largest) <= 1024


def test_dtypes_that_safetensors_lacks_are_refused_by_name():
    for dtype in _NAMES:
        assert dtype_of(dtype_name(dtype, "x"), "x") is dtype
    with pytest.raises(CheckpointError, match=r"model: w has dtype torch.complex128"):
        dtype_name(torch.complex128, "model: w")
    with pytest.raises(CheckpointError, match="'F4'"):
        dtype_of("F4", "model: w")


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, 3 * BLOCK_BYTES + 5])
def test_blocks_have_the_checksums_of_their_bytes_however_they_were_written(size):
    data = torch.randint(0, 256, (size,), dtype=torch.uint8).numpy().tobytes()
    hasher = BlockHasher()
    for start in range(0, size, 700_001):
        hasher.update(memoryview(data)[start : start + 700_001])
    digest = hasher.digest()
    blocks = [data[i : i + BLOCK_BYTES] for i in range(0, size, BLOCK_BYTES)]
    assert digest.blocks == b"".join(struct.pack("<Q", xxhash.xxh3_64_intdigest(block)) for block in blocks)
    sums = BlockSums(digest.blocks, size, "f")
    parts = [memoryview(data)[start : start + 300_007] for start in range(0, size, 300_007)]
    assert sums.first_damaged(0, memoryview(data)) is None
    assert sums.first_damaged(0, *parts) is None
    for block in range(len(blocks)):
        damaged = bytearray(data)
        damaged[block * BLOCK_BYTES] ^= 1
        assert sums.first_damaged(0, memoryview(damaged)) == block
        assert sums.first_damaged(0, memoryview(b""), memoryview(damaged)[:5], memoryview(damaged)[5:]) == block
    with pytest.raises(CheckpointError, match="blocks"):
        BlockSums(digest.blocks + b"12345678", size, "f")
