"""The quick walk through nested arguments finds and makes what torch's own does."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_superscale.sequence.tokens.nested import leaves_of, map_leaves

Pair = namedtuple("Pair", "first second")
X, Y = torch.zeros(2), nn.Parameter(torch.ones(3))


class Own:
    """A value that torch knows nothing of."""


OWN = Own()
NESTS: list[Any] = [
    X, None, 3, OWN, (), [], {},
    (X, 2.0, "a", None, True, ..., slice(1, None), torch.float32, torch.device("cpu")),
    ((X, [Y, (OWN,)]), {"a": X, "b": {"c": [1, 2]}}),
    (Pair(X, (Y, 1)), OrderedDict(b=X, a=[Y]), torch.Size([2, 3])),
    (X.max(0), range(3), {1, 2}),
]  # fmt: skip


def mark(x: Any) -> Any:
    return x * 2 if isinstance(x, torch.Tensor) else ("seen", x)


@pytest.mark.parametrize("nested", NESTS)
def test_leaves_are_those_of_torch(nested):
    found, expected = leaves_of(nested), tree_leaves(nested)
    assert [id(x) if isinstance(x, torch.Tensor) else x for x in found] == [
        id(x) if isinstance(x, torch.Tensor) else x for x in expected
    ]


def test_leaves_of_several_nests_follow_one_another():
    assert leaves_of((1, [2]), {"a": 3}, 4) == [1, 2, 3, 4]


@pytest.mark.parametrize("nested", NESTS)
def test_a_nest_is_mapped_as_by_torch(nested):
    found, expected = map_leaves(mark, nested), tree_map(mark, nested)
    assert type(found) is type(expected)
    assert str(found) == str(expected)
    assert str(tree_map(type, found)) == str(tree_map(type, expected))
