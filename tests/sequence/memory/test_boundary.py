"""A store is handed a block's boundary activations, and nothing else that the block saves or is given."""

from __future__ import annotations

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lightning_superscale.sequence.memory.boundary import boundary_hooks


def test_only_boundary_activations_are_handed_over_each_once_per_use():
    packed, unpacked = [], []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.clone()

    def unpack(kept):
        unpacked.append(kept.shape)
        return kept * 2

    x, other = torch.ones(3, 4, requires_grad=True), torch.ones(3, 4, requires_grad=True)
    mask, ids = torch.ones(3, 1), torch.zeros(3, dtype=torch.int64)

    def block(h, mask, ids):
        return (h.square() * mask * other.square())[ids]

    def note(tensor, into):
        into.append(tensor.dtype)
        return tensor

    others, others_back = [], []
    around = saved_tensors_hooks(lambda t: note(t, others), lambda t: note(t, others_back))
    with around, boundary_hooks([x, mask, ids], pack, unpack):
        out = checkpoint(block, x, mask, ids, use_reentrant=False)
    assert (packed, unpacked) == ([(3, 4)], [])
    out.sum().backward()
    assert unpacked == [(3, 4)]
    assert {torch.float32, torch.int64} <= set(others) == set(others_back), "the mask and the indices"
    # The block was recomputed with what the store gave back: d/dx x^2 of 2, not of 1, for each of three equal rows.
    assert x.grad.tolist() == [[12.0] * 4, [0.0] * 4, [0.0] * 4]
    assert other.grad.tolist() == [[24.0] * 4, [0.0] * 4, [0.0] * 4]
