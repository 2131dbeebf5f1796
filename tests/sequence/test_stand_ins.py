"""Stand-ins look like what they stand for, and what is done to containers of them is done to the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lightning_superscale.comm.in_graph import AxisLink
from lightning_superscale.comm.mesh import MeshAxis
from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.sequence.stand_ins import StandIns, has_tokens
from lightning_superscale.sequence.tokens.layout import Reduced, Sharded, Sharing, TokenDim
from lightning_superscale.sequence.tokens.tensor import with_layout

SHARING = Sharing(link=AxisLink(MeshAxis("sequence", 1, 2)))


def tokens(part: torch.Tensor | None = None):
    """Six tokens, of which this rank has three."""
    part = torch.randn(2, 3, 4, requires_grad=True) if part is None else part
    return with_layout(part, Sharded(TokenDim(1, 6), SHARING, SHARING.frame(6)))


@dataclass
class Record:
    x: Any
    rest: Any = None


@pytest.fixture
def stand_ins():
    return StandIns("block")


@pytest.mark.parametrize(
    ("part", "strides"),
    [
        (torch.randn(2, 3, 4), (24, 4, 1)),
        (torch.randn(2, 4, 3).transpose(1, 2), (24, 1, 6)),
        (torch.randn(3, 2, 4).transpose(0, 1), (4, 8, 1)),
        (torch.randn(3, 4).expand(2, 3, 4), (0, 4, 1)),
        (torch.randn(2, 3, 8)[..., ::2], (24, 4, 1)),
    ],
)
def test_a_stand_in_has_shape_and_order_of_all_tokens_and_no_memory(stand_ins, part, strides):
    x = tokens(part.requires_grad_())
    one = stand_ins.replace(x)
    assert (one.shape, one.stride()) == ((2, 6, 4), strides)
    assert (one.dtype, one.device, one.requires_grad) == (x.dtype, x.device, True)
    assert one.untyped_storage().data_ptr() == part.data_ptr()
    assert stand_ins.behind(one) is x
    assert stand_ins.replace(x) is one
    del one
    stand_ins.end()


def test_a_value_of_all_tokens_stands_for_itself(stand_ins):
    x = with_layout(torch.randn(2, 4, requires_grad=True), Reduced(SHARING))
    assert torch.equal(stand_ins.replace(x), torch.Tensor(x.detach()))
    stand_ins.end()


def test_what_is_done_to_containers_is_done_to_the_users(stand_ins):
    x, y = tokens(), tokens()
    history, record = [x], Record(x)
    record.rest = {"history": history, "record": record}
    given = (record, history, {"n": 1, "y": y})
    replaced = stand_ins.replace(given)
    first, second, third = replaced
    assert first is not record
    assert first.x is second[0]
    assert first.rest["history"] is second
    assert first.rest["record"] is first
    second.append(third["y"])
    third.clear()
    third["x"] = [first.x, 3]
    first.x = None
    found = stand_ins.restore((first, [third["x"][0]]))
    stand_ins.write_back()
    del replaced, first, second, third
    stand_ins.end()
    assert found[0] is record
    assert found[1][0] is x
    assert record.x is None
    assert record.rest["history"] is history
    assert (history[0] is x, history[1] is y, len(history)) == (True, True, 2)
    assert given[2] == {"x": [x, 3]}


def test_what_has_no_tokens_is_left_alone(stand_ins):
    record = Record([torch.zeros(2)], {"a": None})
    record.rest["record"] = record
    assert not has_tokens((record, 3))
    assert stand_ins.replace(record) is record


def test_a_stand_in_that_is_kept_or_marked_is_told_and_has_nothing_to_read(stand_ins):
    one = stand_ins.replace(tokens())
    with pytest.raises(SequenceParallelError, match="block is compiled, and its forward keeps a tensor of tokens"):
        stand_ins.end()
    assert one.numel() == 0
    marked = stand_ins.replace(x := tokens())
    marked.scale = 3
    del marked, x
    with pytest.raises(SequenceParallelError, match="sets an attribute, on a tensor of tokens"):
        stand_ins.end()
