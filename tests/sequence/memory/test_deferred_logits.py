"""Programs whose logits are deferred mean what they mean without, whatever they do with logits.

Where logits are read, the very same functions run, and bits are equal. A tiled loss rounds otherwise: sums of some
dozen terms of size 1 in fp32, right to 16 * 2^-24 = 1e-6.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.sequence.memory.deferred_logits import DeferredLogits, TiledLosses
from lightning_superscale.torch_private import without_torch_function

B, S, H, V = 2, 8, 16, 64


class Inputs:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.w, self.x = nn.Parameter(torch.randn(V, H) / 4), torch.randn(B, S, H, requires_grad=True)
        self.y = torch.randint(0, V, (B, S))
        self.y[0, :3] = -100


def flat(logits, y):
    return F.cross_entropy(logits.view(-1, V), y.view(-1))


def shifted(i):
    logits = (i.x @ i.w.T)[:, :-1].contiguous().view(-1, V).float()
    return F.cross_entropy(logits, i.y[:, 1:].reshape(-1), reduction="sum")


def after_argmax(i):
    logits = F.linear(i.x, i.w)
    assert (logits.argmax(-1) == i.y).shape == (B, S)
    return F.cross_entropy(logits.flatten(0, 1), i.y.flatten())


def with_z_loss(i):
    logits = torch.matmul(i.x, i.w.t())
    return flat(logits, i.y) + 0.1 * logits.logsumexp(-1).square().mean()


TILED = {
    "flat": lambda i: flat(F.linear(i.x, i.w), i.y),
    "shifted": shifted,
    "ellipsis": lambda i: F.cross_entropy(F.linear(i.x, i.w)[..., :-1, :].reshape(-1, V), i.y[..., 1:].reshape(-1)),
    "transposed": lambda i: F.cross_entropy(F.linear(i.x, i.w).transpose(1, 2), i.y, label_smoothing=0.1),
    "after argmax": after_argmax,
    "z loss": with_z_loss,
}


class Double(torch.autograd.Function):
    """An autograd function of another package, which torch lets no class see."""

    @staticmethod
    def forward(ctx, logits):
        return logits * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Square(torch.autograd.Function):
    """Saves logits, which backward reads."""

    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return logits * logits

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


def changed_in_place(i):
    logits = F.linear(i.x, i.w)
    flattened = logits.flatten(0, 1)
    logits.div_(2.0)
    flattened[:, 3] = -1.0
    return F.cross_entropy(flattened, i.y.flatten())


def hooked(i):
    logits = F.linear(i.x, i.w)
    logits.register_hook(lambda grad: grad * 3)
    return flat(logits, i.y)


READ = {
    "scaled": lambda i: flat(F.linear(i.x, i.w) * 2, i.y),
    "in place": changed_in_place,
    "hook": hooked,
    "class weights": lambda i: F.cross_entropy(F.linear(i.x, i.w).flatten(0, 1), i.y.flatten(), torch.arange(V) / V),
    "every token": lambda i: F.cross_entropy(F.linear(i.x, i.w).flatten(0, 1), i.y.flatten(), reduction="none").mean(),
    "of classes": lambda i: F.cross_entropy(F.linear(i.x, i.w).flatten(0, 1), torch.ones(B * S, V) / V),
    "in a checkpoint": lambda i: checkpoint(lambda x: flat(F.linear(x, i.w), i.y), i.x, use_reentrant=False),
    "autograd function": lambda i: flat(Double.apply(F.linear(i.x, i.w)), i.y),
    "saved logits": lambda i: flat(Square.apply(F.linear(i.x, i.w)), i.y),
    "activations": lambda i: (i.x @ i.x.transpose(1, 2)).sum(),
}


def run(program, mode=None):
    inputs = Inputs()
    if mode is None:
        loss = program(inputs)
    else:
        with mode:
            loss = program(inputs)
    assert type(loss) is torch.Tensor
    loss.backward()
    return [one for one in (loss.detach(), inputs.w.grad, inputs.x.grad) if one is not None]


@pytest.mark.parametrize("name", TILED)
def test_losses_do_without_logits(name):
    mode = TiledLosses(True)
    for found, expected in zip(run(TILED[name], mode), run(TILED[name]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert mode.seen.num_tiled == 1
    assert not mode.seen.not_tiled


@pytest.mark.parametrize("name", READ)
def test_what_reads_logits_has_the_bits_of_plain_torch(name):
    mode = TiledLosses(True)
    assert all(map(torch.equal, run(READ[name], mode), run(READ[name])))
    assert mode.seen.num_tiled == 0


def test_code_below_classes_is_refused():
    i = Inputs()
    with TiledLosses(True):
        logits = F.linear(i.x, i.w)
    with without_torch_function(), pytest.raises(SuperScaleError, match="logits that are not computed yet went to"):
        logits + 1


def test_a_copy_is_not_changed_with_the_logits():
    i = Inputs()
    with TiledLosses(True), torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(i.x, i.w)
        copy = logits.float()
        logits.mul_(2)
        with pytest.raises(SuperScaleError, match="a copy of logits"):
            copy.argmax()


def test_logits_are_not_computed_from_changed_weights():
    i = Inputs()
    with TiledLosses(True) as mode, torch.no_grad():
        logits = F.linear(i.x, i.w)
        i.w.add_(1)
        with pytest.raises(SuperScaleError, match="changed in place"):
            logits.argmax()
        other = F.linear(i.x, i.w)
        mode.let_go("weights may have been stepped")
        with pytest.raises(SuperScaleError, match="may have been stepped"):
            flat(other, i.y)


def test_logits_that_outlive_the_step_are_computed_at_its_end():
    i = Inputs()
    with TiledLosses(True) as mode:
        logits = F.linear(i.x, i.w)
        assert type(logits) is DeferredLogits
        assert (logits.shape, logits.dtype, logits.requires_grad) == ((B, S, V), torch.float32, True)
    expected = (i.x @ i.w.T).detach()
    mode.settle()
    with torch.no_grad():
        i.w.zero_()
    assert torch.equal(logits.detach(), expected)


def test_only_wide_products_of_many_tokens_are_worth_it():
    mode, x = TiledLosses("auto"), torch.randn(40, 32)
    with mode:
        for shape, is_deferred in (((4096, 32), True), ((4095, 32), False), ((64, 32), False)):
            assert (type(F.linear(x, nn.Parameter(torch.zeros(shape)))) is DeferredLogits) is is_deferred
        assert type(F.linear(x[:32], nn.Parameter(torch.zeros(4096, 32)))) is torch.Tensor


def test_a_product_that_meets_no_loss_is_not_deferred_again():
    i, mode = Inputs(), TiledLosses(True)
    with mode:
        F.gelu(F.linear(i.x, i.w))
        assert type(F.linear(i.x, i.w)) is torch.Tensor
    assert not mode.seen.reads  # it was no logits
