"""Bytes that autograd saves: each storage once, parameters apart, hooks around still at work."""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lightning_superscale.sequence.memory.saved_bytes import SavedBytes


def test_each_storage_counts_once_and_parameters_do_not():
    layer, x = nn.Linear(8, 16), torch.randn(4, 8, requires_grad=True)
    with SavedBytes(layer.parameters()) as saved:
        h = layer(x)  # saves x and the weight, which is a parameter
        (h.sigmoid() * h.exp()).sum()  # sigmoid saves its output, exp its output, the product both again
    assert saved.nbytes == 4 * (4 * 8 + 2 * 4 * 16)
    assert saved.num_storages == 3


def test_a_view_counts_the_storage_that_it_keeps():
    x = torch.randn(100, 8)
    with SavedBytes() as saved:
        torch.nn.functional.linear(x[:2], torch.randn(3, 8, requires_grad=True))
    assert saved.nbytes == 100 * 8 * 4  # the weight is not saved: x needs no gradient


def test_a_checkpointed_block_counts_its_input():
    layer, x = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8)), torch.randn(4, 8, requires_grad=True)
    with SavedBytes(layer.parameters()) as saved:
        out = checkpoint(layer, x, use_reentrant=False)
    assert saved.nbytes == x.nbytes
    out.sum().backward()
    assert x.grad is not None


def test_hooks_around_are_called_as_without():
    seen, x = [], torch.randn(4, requires_grad=True)

    def pack(saved):
        seen.append("pack")
        return saved.double()

    def unpack(packed):
        seen.append("unpack")
        return packed.float()

    with saved_tensors_hooks(pack, unpack), SavedBytes() as saved:
        out = x.exp().sum()
    out.backward()
    assert saved.nbytes == 16
    assert seen == ["pack", "unpack"]
    assert torch.equal(x.grad, x.detach().exp())
