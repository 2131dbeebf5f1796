"""Traced tokens reach the rules by the functions by which a TokenTensor does."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor

from lightning_superscale.comm.in_graph import AxisLink
from lightning_superscale.comm.mesh import MeshAxis
from lightning_superscale.sequence.tokens import dispatch as dispatching
from lightning_superscale.sequence.tokens.layout import Replicated, Sharing, TokenDim
from lightning_superscale.sequence.tokens.tensor import layout_of, plain, with_layout
from lightning_superscale.sequence.tokens.traced import TracedTokens, is_tensor

LAYOUT = Replicated(TokenDim(1, 3), Sharing(link=AxisLink(MeshAxis("sequence", 0, 1))))
SUMS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
BINARY = (*SUMS, "matmul", "and_", "or_", "xor", "lshift", "rshift", "eq", "ne", "lt", "le", "gt", "ge")
IN_PLACE = (*(f"i{name}" for name in SUMS), "iand", "ior", "ixor", "ilshift", "irshift")
USES = {
    **{name: lambda x, name=name: getattr(operator, name)(x, x) for name in (*BINARY, *IN_PLACE)},
    **{f"number {name}": lambda x, name=name: getattr(operator, name)(2, x) for name in BINARY},
    **{name: lambda x, name=name: getattr(operator, name)(x) for name in ("neg", "pos", "abs", "invert", "index")},
    **{kind.__name__: lambda x, kind=kind: kind(x) for kind in (bool, int, float, complex, len)},
    "item": lambda x: x[0],
    "set item": lambda x: operator.setitem(x, 0, 1),
    "in": lambda x: 1 in x,
    "method": lambda x: x.unsqueeze(0),
    "method written in Python": lambda x: x.split(1),
    "attribute": lambda x: x.shape,
    "transposed": lambda x: x.mT,
    "function": lambda x: torch.sum(x),
    "function written in Python": lambda x: torch.nn.functional.softmax(x, dim=-1),
    "argument of a tensor": lambda x: torch.ones(2, 3) + x,
}


@pytest.mark.parametrize("name", USES)
def test_a_use_reaches_the_same_function(name, monkeypatch):
    reached = []

    def record(func, args, kwargs):
        reached.append((dispatching.name_of(func), len(args)))
        return torch.Size([2]) if name in ("len", "index") else 1

    monkeypatch.setattr(dispatching, "dispatch", record)
    for x in (with_layout(torch.ones(2, 3), LAYOUT), TracedTokens(torch.ones(2, 3), LAYOUT)):
        reached.append("begin")
        try:
            USES[name](x)
        except (TypeError, ValueError) as error:  # of what the recorder returned
            reached.append(type(error))
    of_traced = reached[reached.index("begin", 1) :]
    assert reached[: len(reached) - len(of_traced)] == of_traced
    assert len(of_traced) > 1


def test_traced_tokens_are_a_tensor_to_rules_and_none_to_others():
    x = TracedTokens(torch.ones(2, 3), LAYOUT)
    assert is_tensor(x)
    assert is_tensor(torch.ones(1))
    assert not is_tensor(1.0)
    # C++ reads the memory of what Python says is a tensor.
    assert not isinstance(x, Tensor)
    assert layout_of(x) is LAYOUT
    assert plain(x) is x.part
    assert x in {x: 1}
