"""The manifest: what it says comes back, and what it may not say is refused."""

import json
from dataclasses import replace

import pytest
import torch

from lightning_superscale.checkpoint.format import manifest as module
from lightning_superscale.checkpoint.format.blocks import hex_digest
from lightning_superscale.checkpoint.format.manifest import Chunk, FileRecord, Manifest, TensorRecord
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


def rewritten(change) -> bytes:
    """The sample with other JSON and a checksum that fits it."""
    fields = json.loads(SAMPLE.to_bytes())
    del fields["xxh3"]
    change(fields)
    body = json.dumps(fields, separators=(",", ":")).encode()
    return body[:-1] + f',"xxh3":"{hex_digest(body)}"}}\n'.encode()


def test_what_is_written_comes_back():
    assert Manifest.from_bytes(SAMPLE.to_bytes(), "m") == SAMPLE
    assert Manifest.from_bytes(rewritten(lambda fields: None), "m") == SAMPLE


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
        ({"min_reader": "lucp/1.1"}, "needs a reader of lucp/1.1.*Upgrade"),
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
