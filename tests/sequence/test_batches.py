"""Tokens of batches are found or named, in every kind of container, and equal batches have equal fingerprints."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch

from lightning_superscale.comm.in_graph import AxisLink
from lightning_superscale.comm.mesh import MeshAxis
from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.sequence.batches import (
    find_tokens,
    fingerprints,
    first_tokens,
    map_batch,
    shared,
    tensors_of,
    token_lengths,
)
from lightning_superscale.sequence.tokens.layout import Replicated, Sharing, TokenDim
from lightning_superscale.sequence.tokens.tensor import layout_of

Pair = namedtuple("Pair", ["ids", "labels"])


@dataclass(frozen=True)
class Sample:
    ids: torch.Tensor
    name: str


IDS, LABELS = torch.arange(12).view(2, 6), torch.ones(2, 6, dtype=torch.int64)
BATCHES = {
    "tensor": IDS,
    "tuple": (IDS, LABELS),
    "list": [IDS, "a name"],
    "dict": {"input_ids": IDS, "labels": LABELS, "n": 3},
    "user dict": UserDict(input_ids=IDS, labels=LABELS),
    "named tuple": Pair(IDS, LABELS),
    "frozen dataclass": Sample(IDS, "a"),
    "nested": {"text": [Pair(IDS, LABELS)], "weight": torch.ones(2)},
}


@pytest.mark.parametrize("kind", BATCHES)
def test_a_batch_keeps_its_kinds_and_its_values(kind):
    batch = BATCHES[kind]
    before = tensors_of(batch)
    mapped = map_batch(lambda place, x: x + 1, batch)
    assert type(mapped) is type(batch)
    after = tensors_of(mapped)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[place], x + 1) for place, x in before.items())
    assert all(torch.equal(x, before[place]) for place, x in tensors_of(batch).items())  # the given one is as it was


@pytest.mark.parametrize("kind", BATCHES)
def test_tokens_are_on_the_second_dim_of_all_that_are_as_long_as_the_ids(kind):
    found = find_tokens(BATCHES[kind], None)
    assert set(found) == {place for place, x in tensors_of(BATCHES[kind]).items() if x.dim() == 2}
    assert set(found.values()) == {TokenDim(1, 6)}


def test_places_name_where_a_tensor_is():
    assert set(tensors_of(BATCHES["nested"])) == {"text.0.ids", "text.0.labels", "weight"}
    assert set(tensors_of(IDS)) == {""}


def test_ids_of_transformers_go_before_other_whole_numbers():
    batch = {"lengths": torch.ones(2, 3, dtype=torch.int64), "input_ids": IDS, "pixels": torch.ones(2, 9, 4)}
    assert find_tokens(batch, None) == {"input_ids": TokenDim(1, 6)}


def test_dims_that_the_user_gives_count():
    batch = {"frames": torch.ones(5, 2, 4), "mask": torch.ones(2, 5)}
    assert find_tokens(batch, {"frames": 0, "mask": -1}) == {"frames": TokenDim(0, 5), "mask": TokenDim(1, 5)}


@pytest.mark.parametrize(
    ("batch", "dims", "told"),
    [
        ({"image": torch.ones(2, 3, 8, 8)}, None, ["image [2, 3, 8, 8] float32", "SequenceConfig(size=..., dims="]),
        ([], None, ["found no tensor"]),
        ({"ids": IDS}, {"input_ids": 1}, ["'input_ids'", "ids [2, 6] int64"]),
        ({"ids": IDS}, {"ids": 2}, ["'ids'", "dim 2"]),
    ],
)
def test_a_batch_without_tokens_is_refused_with_what_is_in_it(batch, dims, told):
    with pytest.raises(SequenceParallelError) as error:
        find_tokens(batch, dims)
    assert all(text in str(error.value) for text in told)


def test_what_has_tokens_knows_them_and_shares_memory():
    sharing = Sharing(link=AxisLink(MeshAxis("sequence", 0, 2)))
    batch = {"input_ids": IDS, "weight": torch.ones(2)}
    got = shared(batch, find_tokens(batch, None), sharing)
    assert layout_of(got["input_ids"]) == Replicated(TokenDim(1, 6), sharing)
    assert got["weight"] is batch["weight"]
    assert got["input_ids"].data_ptr() == IDS.data_ptr()


def test_fingerprints_tell_values_shapes_and_dtypes_apart():
    same = fingerprints((IDS, torch.tensor(1.5), torch.ones(0, 3, dtype=torch.bfloat16)))
    assert same == fingerprints((IDS.t().contiguous().t(), torch.tensor(1.5), torch.ones(0, 3, dtype=torch.bfloat16)))
    assert "checksum" in same["0"]
    for other in (IDS + 1, IDS.int(), IDS.view(3, 4)):
        assert fingerprints((other,))["0"] != same["0"]


def test_the_front_of_a_batch_is_a_plain_copy_with_masks_of_pairs_cut_twice():
    sharing = Sharing(link=AxisLink(MeshAxis("sequence", 0, 2, None)))
    batch = {
        "input_ids": torch.arange(12).view(2, 6),
        "pairs": torch.ones(2, 6, 6, dtype=torch.bool),
        "bias": torch.ones(2, 1, 6, 6),
        "features": torch.ones(2, 6, 6),
        "per_sample": torch.ones(2),
        "name": "a",
    }
    given = shared(batch, find_tokens(batch, None), sharing)
    assert token_lengths(given) == {6}
    front, tokens = first_tokens(given, lambda length: length - 2)
    assert {key: list(x.shape) for key, x in front.items() if key != "name"} == {
        "input_ids": [2, 4],
        "pairs": [2, 4, 4],
        "bias": [2, 1, 4, 4],
        "features": [2, 4, 6],  # as many features as tokens
        "per_sample": [2],
    }
    assert tokens == dict.fromkeys(["input_ids", "pairs", "features"], TokenDim(1, 4))
    assert all(type(x) is torch.Tensor for x in tensors_of(front).values())
    for x in tensors_of(front).values():
        x.zero_()
    assert torch.equal(batch["input_ids"], torch.arange(12).view(2, 6))
    assert all(bool(batch[key].all()) for key in ("pairs", "bias", "features", "per_sample"))


def test_sequences_of_several_lengths_are_each_cut_by_their_own():
    sharing = Sharing(link=AxisLink(MeshAxis("sequence", 0, 2, None)))
    batch = {"images": torch.ones(2, 3, 10), "ids": torch.ones(2, 6)}
    given = shared(batch, find_tokens(batch, {"images": 2, "ids": 1}), sharing)
    front, tokens = first_tokens(given, lambda length: length // 2)
    assert tokens == {"images": TokenDim(2, 5), "ids": TokenDim(1, 3)}
    assert [list(x.shape) for x in front.values()] == [[2, 3, 5], [2, 3]]
