"""One step on tensors without memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.estimation.tracing.step import trace_step


class Layers(nn.Module):
    """Two layers and a frozen one; keeps 4 x 16 activations twice for backward."""

    def __init__(self, *, remat: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.frozen = nn.Linear(16, 2, bias=False).requires_grad_(False)
        self.remat = remat

    def body(self, x):
        return self.second(self.first(x).relu()).relu()

    def forward(self, x):
        return self.frozen(checkpoint(self.body, x, use_reentrant=False) if self.remat else self.body(x))


def loss(module, batch):
    return module(batch).sum()


def traced(module=None, batch=None, **how):
    return trace_step(module or Layers(), torch.empty(4, 8) if batch is None else batch, loss, **how)


def test_live_bytes_are_those_of_the_step():
    found = traced()
    # Two results of relu are kept for backward, and the loss; those of the products before them are gone.
    assert found.activation_bytes == 2 * 4 * 16 * 4 + 4
    weights = (8 * 16 + 16 * 16) * 4
    assert found.alive[-1] == weights  # only gradients are left
    assert [(grad.fqn, grad.nbytes) for grad in found.gradients] == [
        ("second.weight", 16 * 16 * 4),
        ("first.weight", 8 * 16 * 4),
    ]
    assert found.batch_bytes == 4 * 8 * 4


def test_operations_are_counted_by_phase():
    found = traced()
    layers = 2 * 4 * (8 * 16 + 16 * 16 + 16 * 2)
    assert found.flops("forward") == layers
    # A gradient for each of two weights, and for what goes into two layers.
    assert found.flops("backward") == 2 * 4 * (8 * 16 + 16 * 16 + 16 * 16 + 16 * 2)
    assert found.flops() == found.flops("forward") + found.flops("backward")


def test_what_is_recomputed_keeps_less_and_counts_in_backward():
    plain, again = traced(), traced(Layers(remat=True))
    assert again.activation_bytes == 4  # the input exists before; the loss
    assert again.flops("forward") == plain.flops("forward")
    assert again.flops("backward") > plain.flops("backward")


def test_weights_may_be_on_the_meta_device_and_of_another_dtype():
    with torch.device("meta"):
        module = Layers()
    found = traced(module, torch.empty(4, 8, device="meta"), weights=torch.bfloat16)
    assert sum(grad.nbytes for grad in found.gradients) == (8 * 16 + 16 * 16) * 2
    assert all(param.is_meta and param.dtype == torch.float32 for param in module.parameters())


def test_autocast_is_traced():
    assert {one.dtype for one in traced(autocast=torch.bfloat16).operations if one.flops} == {torch.bfloat16}


def test_the_module_stays_as_it_is():
    module = Layers()
    before = dict(module.named_parameters())
    values = {fqn: param.detach().clone() for fqn, param in before.items()}
    traced(module, watched=[module.first])
    after = dict(module.named_parameters())
    assert all(after[fqn] is before[fqn] for fqn in before)
    assert all(torch.equal(after[fqn], values[fqn]) and after[fqn].grad is None for fqn in before)
    assert not module.first._forward_hooks
    assert not module.first._forward_pre_hooks


def test_tied_weights_have_one_gradient():
    module = Layers()
    module.third = nn.Linear(16, 16, bias=False)
    module.third.weight = module.second.weight
    found = trace_step(module, torch.empty(4, 8), lambda m, b: m.third(m.body(b)).sum())
    assert [grad.fqn for grad in found.gradients] == ["second.weight", "first.weight"]


def test_watched_modules_say_what_they_leave():
    module = Layers()
    assert traced(module, watched=[module.second, module.frozen]).saved == [4 * 16 * 4, 4 * 2 * 4]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda m, b: m(b), r"gave a tensor of shape \(4, 2\); expected a scalar loss"),
        (lambda m, b: m(b).sum().detach(), r"gave a tensor of shape \(\) without a gradient"),
        (lambda m, b: None, "gave an object of type NoneType"),
        (lambda m, b: m(b).sum() * m(b).sum().item(), "could not be traced on tensors without values"),
        (lambda m, b: m(b[:, :3]).sum(), "could not be traced.*Expected a batch of the right shapes"),
    ],
)
def test_a_step_that_can_not_be_traced_is_refused(wrong, message):
    module = Layers()
    before = list(module.parameters())
    with pytest.raises(SuperScaleError, match=message):
        trace_step(module, torch.empty(4, 8), wrong)
    assert all(a is b for a, b in zip(before, module.parameters(), strict=True))
