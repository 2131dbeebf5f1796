"""Hugging Face weights: one file, and shards of which none may lack."""

import json

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from lightning_superscale.checkpoint.foreign.registry import detect, open_foreign
from lightning_superscale.checkpoint.state import MODEL, TensorKey
from lightning_superscale.errors import CheckpointError
from tests.helpers.foreign import read_all, read_in_parts

WEIGHTS = {
    "a.weight": torch.randn(5, 3),
    "a.bias": torch.randn(5).bfloat16(),
    "scale": torch.tensor(2.5, dtype=torch.float16),
    "counter": torch.tensor(7),
    "mask": torch.tensor([True, False, True]),
    "eighth": torch.randn(4).to(torch.float8_e4m3fn),
    "empty": torch.zeros(0, 3),
}


def shards(folder):
    names = list(WEIGHTS)
    parts = {f"model-0000{i}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, own in parts.items():
        save_file({name: WEIGHTS[name] for name in own}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return list(parts)


def check(source):
    for found in (read_all(source), read_in_parts(source, seed=5)):
        assert found.keys() == {TensorKey(MODEL, name) for name in WEIGHTS}
        for name, value in WEIGHTS.items():
            tensor = found[TensorKey(MODEL, name)]
            assert tensor.dtype == value.dtype
            assert torch.equal(tensor.view(torch.uint8) if tensor.dim() else tensor,
                               value.view(torch.uint8) if value.dim() else value)  # fmt: skip


def test_a_file_a_directory_with_one_and_shards_are_the_same(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    check(open_foreign(tmp_path / "model.safetensors"))
    check(open_foreign(tmp_path))
    (tmp_path / "shards").mkdir()
    shards(tmp_path / "shards")
    check(open_foreign(tmp_path / "shards"))
    assert detect(tmp_path / "shards") == detect(tmp_path / "model.safetensors") == "safetensors"


def test_what_the_format_can_not_say_is_absent(tmp_path):
    save_file(WEIGHTS, tmp_path / "x.safetensors")
    source = open_foreign(tmp_path)
    assert (source.step, source.optimizers, source.aliases, source.rest) == (None, (), {}, {})


def test_ties_are_read_where_the_header_says_them(tmp_path):
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    save_model(model, str(tmp_path / "x.safetensors"))
    source = open_foreign(tmp_path)
    (name,) = source.tensors
    assert {*source.aliases, name.name} == {"embed.weight", "head.weight"}
    assert source.aliases == dict.fromkeys(source.aliases, name.name)


def test_a_missing_shard_is_named(tmp_path):
    files = shards(tmp_path)
    (tmp_path / files[1]).unlink()
    with pytest.raises(CheckpointError, match=r"lacks \['model-00001-of-00003.safetensors'\].*Copy all 3"):
        open_foreign(tmp_path)


def test_a_shard_of_another_checkpoint_is_refused(tmp_path):
    files = shards(tmp_path)
    (tmp_path / files[1]).write_bytes((tmp_path / files[0]).read_bytes())
    with pytest.raises(CheckpointError, match="belongs to another checkpoint"):
        open_foreign(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_damaged_shard_is_named(tmp_path, damage):
    victim = tmp_path / shards(tmp_path)[2]
    data = victim.read_bytes()
    victim.write_bytes({"truncated": data[:-1], "garbage": b"\xff" * 99, "empty": b""}[damage])
    with pytest.raises(CheckpointError, match=f"{victim.name} is damaged"):
        open_foreign(tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../x.safetensors"}}'])
def test_a_damaged_index_is_named(tmp_path, index):
    shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="index.json"):
        open_foreign(tmp_path)


def test_several_files_without_an_index_are_ambiguous(tmp_path):
    shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="3 safetensors files and no"):
        open_foreign(tmp_path)


def test_another_directory_says_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"Looked for: .*\.ckpt.*safetensors.*It has \['notes.txt'\]"):
        open_foreign(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        open_foreign(tmp_path / "gone")
