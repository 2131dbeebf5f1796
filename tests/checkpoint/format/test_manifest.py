"""The manifest: what it says comes back, and what it may not say is refused."""

import json
from dataclasses import replace

import pytest
import torch

from lightning_superscale.checkpoint.format import manifest as module
from lightning_superscale.checkpoint.format.blocks import hex_digest
from lightning_superscale.checkpoint.format.chunks import Chunk, ChunkColumns
from lightning_superscale.checkpoint.format.manifest import FileRecord, Manifest, TensorRecord
from lightning_superscale.checkpoint.state import TensorInfo, TensorKey
from lightning_superscale.errors import CheckpointError
from lightning_superscale.layout.box import Box, row_box

KEY = TensorKey("optimizer.0", "a.weight", "exp_avg")
SCALAR = TensorKey("model", "s")
FILE = "data/w00000-0.safetensors"
SAMPLE = Manifest(
    uuid="u" * 32,
    step=7,
    world=2,
    writers=1,
    libs={"torch": "2"},
    files={FILE: FileRecord(1000, "0" * 16)},
    tensors={
        KEY: TensorRecord(
            TensorInfo(torch.bfloat16, (4, 8), "state"),
            (Chunk(FILE, "x#0", 64, row_box((4, 8), 0, 1)), Chunk(FILE, "x#1", 128, row_box((4, 8), 1, 4))),
        ),
        SCALAR: TensorRecord(TensorInfo(torch.int64, (), "model", True), (Chunk(FILE, "s#0", 80, Box((), ())),)),
    },
    optimizers=({"class": "AdamW", "groups": [], "names": [], "values": {}},),
    aliases={"b": "a.weight"},
    root="abc",
)
COLUMNS = replace(
    SAMPLE,
    tensors={
        **SAMPLE.tensors,
        KEY: TensorRecord(
            TensorInfo(torch.bfloat16, (4, 8), "state"),
            ChunkColumns((FILE,), "x#", torch.tensor([[0, 0, 64, 0, 0, 1, 8], [0, 1, 128, 1, 0, 3, 8]])),
        ),
    },
)


def rewritten(change, sample: Manifest = SAMPLE) -> bytes:
    """The sample with other JSON and a checksum that fits it."""
    fields = json.loads(sample.to_bytes())
    del fields["xxh3"]
    change(fields)
    body = json.dumps(fields, separators=(",", ":")).encode()
    return body[:-1] + f',"xxh3":"{hex_digest(body)}"}}\n'.encode()


def test_what_is_written_comes_back():
    assert Manifest.from_bytes(SAMPLE.to_bytes(), "m") == SAMPLE
    assert Manifest.from_bytes(rewritten(lambda fields: None), "m") == SAMPLE


def test_columns_come_back_as_the_chunks_that_they_stand_for():
    data = COLUMNS.to_bytes()
    found = Manifest.from_bytes(data, "m")
    assert found.tensors == COLUMNS.tensors
    assert tuple(found.tensors[KEY].chunks) == SAMPLE.tensors[KEY].chunks
    assert found.to_bytes() == data
    assert (SAMPLE.min_reader, found.min_reader) == ("lucp/1.0", "lucp/1.1"), "only columns need a newer reader"
    assert json.loads(data)["tensors"][1]["pieces"]["at"] == [64, 128]


def test_columns_follow_files_that_come_to_the_manifest():
    more = replace(COLUMNS, files={"blocks/w00000-0.xxh": FileRecord(8, "0" * 16), **COLUMNS.files})
    found = Manifest.from_bytes(more.to_bytes(), "m")
    assert tuple(found.tensors[KEY].chunks) == SAMPLE.tensors[KEY].chunks
    with pytest.raises(CheckpointError, match="not listed"):
        Manifest.from_bytes(replace(COLUMNS, files={}).to_bytes(), "m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(offset=[[0, 0], 0]), r"a\.weight.*overlap"),
        (lambda p: p.update(offset=[[0, 2], 0], size=[[1, 2], 8]), r"a\.weight.*24 of the 32"),
        (lambda p: p.update(offset=[0, [0, 1]], size=[4, [1, 6]]), r"a\.weight.*28 of the 32"),
        (lambda p: p.update(size=[[1, 3], 9]), r"a\.weight.*not within"),
        (lambda p: p.update(at=[64, 129]), r"a\.weight.*unaligned"),
        (lambda p: p.update(at=[-2, 128]), r"a\.weight.*should end"),
        (lambda p: p.update(at=[64, 2**63 - 2]), r"a\.weight.*should end"),
        (lambda p: p.update(at=[64, 2**63]), "not a manifest"),
        (lambda p: p.update(at=[64, 128.0]), "not a manifest"),
        (lambda p: p.update(at=[64, "128"]), "not a manifest"),
        (lambda p: p.update(at=[[64, 128]]), "long|not a manifest"),
        (lambda p: p.update(at=None), "not a manifest"),
        (lambda p: p.update(at=1.5), "not a manifest"),
        (lambda p: p.update(at=[64, 128, 256]), "long"),
        (lambda p: p.update(file=[0, 1]), "not listed"),
        (lambda p: p.update(file=[0, -1]), "not listed"),
        (lambda p: p.update(offset=[[0, -1], 0]), "below 0"),
        (lambda p: p.update(offset=[[0, 1]]), "another number of offsets"),
        (lambda p: p.update(offset=[[0, 1]], size=[[1, 3]]), r"a\.weight.*not within"),
        (lambda p: p.pop("number"), "not a manifest"),
    ],
)
def test_columns_that_are_not_complete_are_refused_by_name(change, message):
    def change_columns(fields):
        change(next(tensor for tensor in fields["tensors"] if tensor["name"] == "a.weight")["pieces"])

    with pytest.raises(CheckpointError, match=message):
        Manifest.from_bytes(rewritten(change_columns, COLUMNS), "m")


def test_no_size_is_so_large_that_its_bytes_seem_to_fit():
    """2^62 rows of 4 bytes are 2^64 bytes, which are 0 where numbers of 64 bits overflow."""
    table = torch.tensor([[0, 0, 0, 0, 2**61], [0, 1, 0, 2**61, 2**61]])
    record = TensorRecord(TensorInfo(torch.float32, (2**62,), "model"), ChunkColumns((FILE,), "x#", table))
    with pytest.raises(CheckpointError, match="which it lacks"):
        replace(SAMPLE, tensors={KEY: record}).check("m")


def test_a_flipped_byte_anywhere_is_found():
    data = SAMPLE.to_bytes()
    for i in range(len(data)):
        damaged = bytearray(data)
        damaged[i] ^= 1
        with pytest.raises(CheckpointError, match="m "):
            Manifest.from_bytes(bytes(damaged), "m")
    for end in range(0, len(data), 7):
        with pytest.raises(CheckpointError, match="damaged"):
            Manifest.from_bytes(data[:end], "m")


def test_optional_fields_of_a_newer_minor_version_are_kept():
    def change(fields):
        fields.update(schema="lucp/1.9", colour="blue")
        fields["tensors"][0]["shade"] = 3

    found = Manifest.from_bytes(rewritten(change), "m")
    assert found.unknown == {"colour": "blue"}
    assert found.tensors == SAMPLE.tensors
    again = Manifest.from_bytes(found.to_bytes(), "m")
    assert (again.unknown, again.schema) == ({"colour": "blue"}, "lucp/1.9")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "lucp/2.0"}, "lucp/2.0.*Upgrade"),
        ({"min_reader": "lucp/1.2"}, "needs a reader of lucp/1.2.*Upgrade"),
        ({"features": ["compressed"]}, "compressed.*Upgrade"),
        ({"schema": "other/1.0"}, "no manifest"),
        ({"files": {"../../etc/passwd": {"size": 1, "xxh3": ""}}}, "not one of a checkpoint"),
        ({"files": {"/etc/passwd": {"size": 1, "xxh3": ""}}}, "not one of a checkpoint"),
        ({"files": {"data/../x": {"size": 1, "xxh3": ""}}}, "not one of a checkpoint"),
        ({"root": ".."}, "not one of a checkpoint"),
        ({"files": {}}, "which it lacks"),
        ({"files": {FILE: {"size": 127, "xxh3": ""}}}, "should end at byte 176"),
        ({"files": 3}, "not a manifest"),
        ({"tensors": [{}]}, "not a manifest"),
    ],
)
def test_what_can_not_be_read_or_trusted_is_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        Manifest.from_bytes(rewritten(lambda fields: fields.update(change)), "m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["pieces"].pop(), "24 of the 32|8 of the 32"),
        (lambda t: t["pieces"].append(t["pieces"][0]), "overlap"),
        (lambda t: t["pieces"][0].update(offset=[0, 9]), "not within"),
        (lambda t: t["pieces"][0].update(at=-2), "should end"),
        (lambda t: t["pieces"][0].update(at=65), "unaligned"),
        (lambda t: t.update(dtype="F4"), "'F4'"),
        (lambda t: t.update(role="spy"), "'spy'"),
    ],
)
def test_tensors_that_are_not_complete_are_refused_by_name(change, message):
    def change_tensor(fields):
        change(next(tensor for tensor in fields["tensors"] if tensor["name"] == "a.weight"))

    with pytest.raises(CheckpointError, match=rf"a.weight.*({message})"):
        Manifest.from_bytes(rewritten(change_tensor), "m")


def test_features_that_are_known_are_read(monkeypatch):
    data = replace(SAMPLE, features=("compressed",)).to_bytes()
    monkeypatch.setattr(module, "KNOWN_FEATURES", frozenset({"compressed"}))
    assert Manifest.from_bytes(data, "m").features == ("compressed",)
