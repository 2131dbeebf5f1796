"""A part of a program may see whole sequences: layers within `whole_sequences()` take no part of the batch."""

from __future__ import annotations

import threading

import torch
from torch.nn import functional

from lightning_superscale.comm.in_graph import AxisLink
from lightning_superscale.comm.mesh import MeshAxis
from lightning_superscale.sequence.tokens.layout import Replicated, Sharing, TokenDim
from lightning_superscale.sequence.tokens.tensor import is_sharded, with_layout
from lightning_superscale.sequence.whole import are_whole, whole_sequences


def test_layers_within_it_give_whole_plain_tensors():
    sharing = Sharing(link=AxisLink(MeshAxis("sequence", 0, 2)))
    ids, weight = torch.arange(8).view(1, 8), torch.randn(8, 3)
    tagged = with_layout(ids, Replicated(TokenDim(1, 8), sharing))
    with whole_sequences():
        with whole_sequences():
            pass
        found = functional.embedding(tagged, weight)
    assert type(found) is torch.Tensor
    assert torch.equal(found, functional.embedding(ids, weight))
    assert is_sharded(functional.embedding(tagged, weight))


def test_it_is_of_one_thread():
    seen = []
    with whole_sequences():
        thread = threading.Thread(target=lambda: seen.append(are_whole()))
        thread.start()
        thread.join()
        assert are_whole()
    assert seen == [False]
    assert not are_whole()
