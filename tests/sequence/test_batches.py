"""Tokens of batches are found or named, in every kind of container, and equal batches have equal fingerprints."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch

from lightning_superscale.comm.in_graph import AxisLink
from lightning_superscale.comm.mesh import MeshAxis
from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.sequence.batches import find_tokens, fingerprints, map_batch, shared, tensors_of
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
