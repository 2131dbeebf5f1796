"""8-bit activations: within the bound that the note states, in the bytes that it states, and the error is reported."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_superscale.offload.link.link import CpuLink
from lightning_superscale.sequence.memory.activation_offload import ActivationOffload
from lightning_superscale.sequence.memory.checkpointing import BlockCheckpoints, RecomputePolicy
from lightning_superscale.sequence.memory.eight_bit import BLOCK, EightBitCodec, EightBitStore, dequantize, quantize

SHAPES = [(3, 256), (2, 5, 128), (4, 200), (7, 1), (2, 129), (0, 128)]


def blocks_of(x):
    """[..., H] as [..., number of blocks, 128], padded with zeros."""
    padded = nn.functional.pad(x, (0, -x.shape[-1] % BLOCK))
    return padded.view(*x.shape[:-1], padded.shape[-1] // BLOCK, BLOCK)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_element_is_within_the_bound_of_its_block(dtype, scale, shape):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)).exp() * scale).clamp(max=60000).to(dtype)
    x = x * torch.where(torch.arange(shape[-1]) % 3 == 0, -1, 1).to(dtype)
    codes, scales = quantize(x)
    back = dequantize(codes, scales, dtype)
    assert (codes.shape, codes.dtype) == (x.shape, torch.int8)
    assert (scales.shape, scales.dtype) == ((*shape[:-1], math.ceil(shape[-1] / BLOCK)), torch.float32)
    assert (back.shape, back.dtype) == (x.shape, dtype)
    error = (blocks_of(back).double() - blocks_of(x).double()).abs()
    largest = blocks_of(x).double().abs().amax(-1, keepdim=True) if x.numel() else torch.zeros(0, 1, 1)
    # absmax / 254; the scale, the quotient and the product are each rounded to fp32, of numbers up to absmax; and the
    # result to its dtype, by half a unit in its last place.
    bound = largest / 254 + 3 * 2**-24 * largest + torch.finfo(dtype).eps / 2 * blocks_of(back).double().abs()
    assert (error <= bound).all()


def test_the_bound_is_reached():
    x = torch.zeros(1, BLOCK)
    x[0, 0], x[0, 1] = 127.0, 0.5  # half of a step, which rounds to even
    codes, scales = quantize(x)
    assert codes[0, :2].tolist() == [127, 0]
    assert (dequantize(codes, scales, torch.float32) - x).abs().max() == 0.5 == 127 / 254


def test_zeros_are_exact_and_what_is_not_finite_stays_so():
    x = torch.randn(4, 256)
    x[0] = 0
    x[1, 3], x[2, 200], x[3, 5] = math.inf, math.nan, -math.inf
    back = dequantize(*quantize(x), torch.float32)
    assert not back[0].any()
    is_finite = back.isfinite().view(4, 2, BLOCK)
    assert is_finite.all(-1).tolist() == [[True, True], [False, True], [True, False], [False, True]]
    assert not is_finite.any(-1)[1, 0]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(256, 256)

    def forward(self, x):
        return x + self.layer(x).tanh()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.blocks = nn.Linear(4, 256), nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        h = self.first(x)
        for block in self.blocks:
            h = block(h)
        return h


def train(make_store):
    """Loss and gradients of two batches."""
    model, store = Model(), make_store()
    blocks = {str(i): block for i, block in enumerate(model.blocks)}
    checkpoints = BlockCheckpoints(blocks, RecomputePolicy(save="nothing"), store)
    losses = []
    for seed in range(2):
        loss = model(torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(seed))).square().mean()
        loss.backward()
        losses.append(loss.detach())
    checkpoints.close()
    return losses, [p.grad for p in model.parameters()], store


def by_hand():
    """The inputs of blocks in the first batch."""
    h, inputs = Model().first(torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))), []
    for block in Model().blocks:
        inputs.append(h.detach())
        h = block(h)
    return inputs


def test_the_loss_is_exact_and_gradients_are_those_of_inputs_in_8_bits():
    exact, (losses, grads, store) = train(lambda: None), train(EightBitStore)
    assert all(map(torch.equal, losses, exact[0]))
    report = store.codec.report()
    assert len(report.relative_errors) == 3
    assert not all(map(torch.equal, grads, exact[1])), "backward used what was kept"
    # A gradient is a product with an input that is off by the reported error, and with derivatives of tanh, which is
    # twice as steep at most and is off likewise; three blocks lie in one another.
    for ours, theirs in zip(grads, exact[1], strict=True):
        assert (ours - theirs).norm() <= 3 * (1 + 2) * report.largest * theirs.norm()


def test_the_error_of_the_first_batch_is_reported():
    _, _, store = train(EightBitStore)
    report = store.codec.report()
    expected = []
    for x in by_hand():
        back = dequantize(*quantize(x), x.dtype)
        expected.append(float((back - x).norm() / x.norm()))
    assert report.relative_errors == expected
    assert report.largest == max(expected) > 0
    # At worst every element is off by the bound, and the largest is at least the root mean square.
    assert report.largest <= math.sqrt(BLOCK) / 254
    assert report.bytes_per_element == 1 + 4 / 128
    assert EightBitCodec().report().relative_errors == []


def test_over_the_link_go_a_byte_and_a_share_of_a_scale_per_element_and_gradients_are_the_same():
    link = CpuLink()
    _, grads, offload = train(lambda: ActivationOffload(link, torch.device("cpu"), codec=EightBitCodec()))
    numel = 2 * 3 * 2 * 6 * 256  # batches, blocks, tokens, features
    assert link.bytes.d2h == link.bytes.h2d == numel * (1 + 4 / 128)
    assert offload.lent_bytes == 0
    assert all(map(torch.equal, grads, train(EightBitStore)[1]))


def test_an_input_of_zeros_has_no_error():
    codec = EightBitCodec()
    codec.encode(0, torch.zeros(2, 128))
    assert codec.report().relative_errors == [0.0]
