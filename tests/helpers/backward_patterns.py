"""Ways of calling backward, as data: each is one training step of one rank, under a Trainer or in a plain process.

A *manual* pattern is a generator: it runs forward and backward, and yields the number of the optimizer that is to step.
An *automatic* one returns the loss, and whoever runs it calls backward. Both know nothing of where they run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.layer(x))


class Tower(nn.Module):
    """Repeated blocks, a scalar, and a side branch that is part of no block."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.side = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(
        self, x: Tensor, *, use_reentrant: bool | None = None, num_uses: int = 1, is_aside: bool = False
    ) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            for _ in range(num_uses):
                x = block(x) if use_reentrant is None else checkpoint(block, x, use_reentrant=use_reentrant)
        if is_aside:
            x = self.side(x)
        return self.last(x) * self.scale


class TwoTowers(nn.Module):
    """Two models, which their user calls one by one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vision = Tower()
        self.text = Tower()


def _unused(*_args: Any) -> Any:
    raise AssertionError("automatic patterns leave this to whoever runs them")


@dataclass
class Step:
    """What a pattern sees of where it runs.

    Attributes:
        backward: what `self.manual_backward` is under Lightning.
        zero_grad: throws away the gradients of an optimizer, by its number.
        toggled: while open, only an optimizer's own parameters take part, by its number.
    """

    model: TwoTowers
    x: Tensor
    rank: int
    backward: Callable[..., None] = Tensor.backward
    zero_grad: Callable[..., None] = _unused
    toggled: Callable[[int], AbstractContextManager[Any]] = _unused

    @property
    def vision(self) -> Tower:
        return self.model.vision

    @property
    def text(self) -> Tower:
        return self.model.text


def loss_of(y: Tensor) -> Tensor:
    return y.square().mean()


def weights_of(y: Tensor) -> Tensor:
    """A gradient for a tensor that is no scalar."""
    return torch.linspace(-1, 1, y.numel()).view_as(y)


# Manual


def one_loss(step: Step) -> Iterator[int]:
    step.zero_grad()
    step.backward(loss_of(step.vision(step.x)))
    yield 0


def raw_backward(step: Step) -> Iterator[int]:
    step.zero_grad()
    loss_of(step.vision(step.x)).backward()
    yield 0


def several_losses(step: Step) -> Iterator[int]:
    """Some through Lightning and some not, over one graph and over others."""
    step.zero_grad()
    y = step.vision(step.x)
    step.backward(loss_of(y), retain_graph=True)
    y.abs().sum().backward(retain_graph=True)
    step.backward(loss_of(y + step.text(step.x)))
    loss_of(step.vision(-step.x)).backward()
    yield 0


def non_scalar(step: Step) -> Iterator[int]:
    step.zero_grad()
    y, z = step.vision(step.x), step.text(step.x)
    y.backward(gradient=weights_of(y))
    step.backward(z, gradient=weights_of(z))
    yield 0


def several_tensors_at_once(step: Step) -> Iterator[int]:
    step.zero_grad()
    h = step.vision(step.x)
    y, z = h * 2, step.text(h)
    torch.autograd.backward([y, z, loss_of(h)], [weights_of(y), weights_of(z), None])
    yield 0


def gradient_from_outside(step: Step) -> Iterator[int]:
    """An encoder that is fed the gradient of its embedding, which another model made of a detached copy."""
    step.zero_grad()
    embedding = step.vision(step.x)
    received = embedding.detach().requires_grad_()
    loss_of(step.text(received)).backward()
    embedding.backward(received.grad)
    yield 0


def two_models_two_optimizers(step: Step) -> Iterator[int]:
    step.zero_grad(0)
    step.zero_grad(1)
    y, z = step.vision(step.x), step.text(step.x.flip(1))
    step.backward((y * z).mean() + loss_of(y - z))
    yield 0
    yield 1


def in_turns(step: Step) -> Iterator[int]:
    """As adversarial training: each model in its turn, through the other one, gradients thrown away after the step."""
    with step.toggled(0):
        step.backward(loss_of(step.text(step.vision(step.x))))
        yield 0
        step.zero_grad(0)
    with step.toggled(1):
        step.backward(loss_of(step.text(step.vision(step.x)) - 1))
        yield 1
        step.zero_grad(1)


def penalty_on_inputs(step: Step) -> Iterator[int]:
    """A gradient penalty: backward through a backward."""
    step.zero_grad()
    x = step.x.clone().requires_grad_()
    y = step.vision(x)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    step.backward(loss_of(y) + (grad.norm(dim=1) - 1).square().mean())
    yield 0


def gradient_of_inputs_only(step: Step) -> Iterator[int]:
    """A gradient that is asked for leaves no trace in those of parameters."""
    step.zero_grad()
    x = step.x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(step.vision(x)), x)
    step.backward(loss_of(step.vision(step.x + grad)))
    yield 0


def gradient_of_graph_kept(step: Step) -> Iterator[int]:
    step.zero_grad()
    x = step.x.clone().requires_grad_()
    y = step.vision(x)
    (grad,) = torch.autograd.grad(loss_of(y), x, retain_graph=True)
    step.backward(loss_of(y) + (grad.detach() * y).sum())
    yield 0


def penalty_on_weights(step: Step) -> Iterator[int]:
    step.zero_grad()
    loss = loss_of(step.vision(step.x))
    grads = torch.autograd.grad(loss, list(step.vision.first.parameters()), create_graph=True)
    step.backward(loss + sum(g.square().sum() for g in grads))
    yield 0


def backward_with_create_graph(step: Step) -> Iterator[int]:
    step.zero_grad()
    x = step.x.clone().requires_grad_()
    y = step.vision(x)
    step.backward(loss_of(y), create_graph=True)
    step.backward(x.grad.square().sum())
    yield 0


def gradients_put_by_hand(step: Step) -> Iterator[int]:
    params = [p for p in step.vision.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss_of(step.vision(step.x)), params, allow_unused=True)
    step.zero_grad()
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    yield 0


def backward_into_some(step: Step) -> Iterator[int]:
    step.zero_grad()
    loss = loss_of(step.text(step.vision(step.x)))
    step.backward(loss, inputs=list(step.text.parameters()))
    yield 0


def accumulated(step: Step) -> Iterator[int]:
    """A loop of its own, each time another way."""
    step.zero_grad()
    for part in step.x.split(2):
        y = step.vision(part)
        step.backward(loss_of(y) / 3, retain_graph=True)
        y.backward(weights_of(y) / 3)
    yield 0


def accumulated_with_penalty(step: Step) -> Iterator[int]:
    step.zero_grad()
    for part in step.x.split(3):
        x = part.clone().requires_grad_()
        y = step.vision(x)
        (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (loss_of(y) + grad.square().mean()).backward()
    yield 0


def thrown_away(step: Step) -> Iterator[int]:
    """`zero_grad` between two backward calls means what it says."""
    step.backward(loss_of(step.vision(step.x)))
    step.zero_grad()
    step.backward(loss_of(step.vision(step.x)))
    step.zero_grad(set_to_none=False)
    step.backward(loss_of(step.vision(-step.x)))
    yield 0


def reused_block(step: Step) -> Iterator[int]:
    step.zero_grad()
    step.backward(loss_of(step.vision(step.x, num_uses=3)))
    yield 0


def checkpointed(step: Step) -> Iterator[int]:
    step.zero_grad()
    step.backward(loss_of(step.vision(step.x, use_reentrant=False, num_uses=2)))
    y = step.vision(step.x, use_reentrant=False)
    y.backward(weights_of(y))
    yield 0


def checkpointed_reentrant(step: Step) -> Iterator[int]:
    step.zero_grad()
    step.backward(loss_of(step.vision(step.x, use_reentrant=True, num_uses=2)))
    y = step.vision(step.x, use_reentrant=True)
    y.backward(weights_of(y))
    yield 0


def checkpointed_penalty(step: Step) -> Iterator[int]:
    step.zero_grad()
    x = step.x.clone().requires_grad_()
    y = step.vision(x, use_reentrant=False)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    step.backward(loss_of(y) + grad.square().mean())
    yield 0


def branch_of_one_rank(step: Step) -> Iterator[int]:
    """A part of a model that only the last rank's batch needs."""
    step.zero_grad()
    step.backward(loss_of(step.vision(step.x, is_aside=step.rank == 0)))
    yield 0


def model_of_one_rank(step: Step) -> Iterator[int]:
    """A whole model, and a second backward call, of one rank only."""
    step.zero_grad()
    y = step.vision(step.x)
    step.backward(loss_of(y))
    if step.rank == 0:
        loss_of(step.text(step.x)).backward()
    yield 0


def backward_of_one_rank(step: Step) -> Iterator[int]:
    """A call that ranks average after, on one rank only; the other one is at its step meanwhile."""
    step.zero_grad()
    step.backward(loss_of(step.vision(step.x)))
    if step.rank == 0:
        step.backward(loss_of(step.text(step.x)))
    yield 0


def graph_kept_over_a_step(step: Step) -> Iterator[int]:
    step.zero_grad()
    y = step.vision(step.x)
    step.backward(loss_of(y), retain_graph=True)
    yield 0
    step.backward(y.sum())
    yield 0


def hooked(step: Step) -> Iterator[int]:
    """A hook that comes and goes between steps, on a parameter, sees its whole gradient."""
    weight = step.vision.first.weight

    def spare_some_rows(grad: Tensor) -> Tensor:
        return grad * (torch.arange(len(grad)) % 3 > 0)[:, None]

    step.zero_grad()
    handle = weight.register_hook(spare_some_rows)
    step.backward(loss_of(step.vision(step.x)))
    loss_of(step.vision(-step.x)).backward()
    handle.remove()
    step.backward(loss_of(step.vision(step.x.flip(1))))
    yield 0


# Automatic


def plain_loss(step: Step) -> Tensor:
    return loss_of(step.text(step.vision(step.x)))


def loss_with_penalty(step: Step) -> Tensor:
    x = step.x.clone().requires_grad_()
    y = step.vision(x)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return loss_of(y) + (grad.norm(dim=1) - 1).square().mean()


def loss_with_penalty_on_weights(step: Step) -> Tensor:
    loss = loss_of(step.vision(step.x))
    grads = torch.autograd.grad(loss, list(step.vision.first.parameters()), create_graph=True)
    return loss + sum(g.square().sum() for g in grads)


def loss_of_gradient_from_outside(step: Step) -> Tensor:
    embedding = step.vision(step.x)
    received = embedding.detach().requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(received * 3), received)
    return (embedding * grad).sum()


def loss_after_a_backward(step: Step) -> Tensor:
    """Lightning zeroes gradients after training_step: at the first micro-batch, and only there."""
    loss_of(step.text(step.x)).backward()
    loss_of(step.vision(step.x)).backward()
    return loss_of(step.vision(-step.x))


def loss_of_reused_block(step: Step) -> Tensor:
    return loss_of(step.vision(step.x, num_uses=3))


def loss_of_checkpointed(step: Step) -> Tensor:
    return loss_of(step.vision(step.x, use_reentrant=False, num_uses=2))


def loss_of_checkpointed_reentrant(step: Step) -> Tensor:
    return loss_of(step.vision(step.x, use_reentrant=True, num_uses=2))


def loss_of_branch_of_one_rank(step: Step) -> Tensor:
    return loss_of(step.vision(step.x, is_aside=step.rank == 0))


def loss_of_model_of_one_rank(step: Step) -> Tensor:
    y = step.vision(step.x)
    return loss_of(step.text(y) if step.rank == 0 else y)


MANUAL = (
    one_loss,
    raw_backward,
    several_losses,
    non_scalar,
    several_tensors_at_once,
    gradient_from_outside,
    penalty_on_inputs,
    gradient_of_inputs_only,
    gradient_of_graph_kept,
    penalty_on_weights,
    backward_with_create_graph,
    gradients_put_by_hand,
    backward_into_some,
    accumulated,
    accumulated_with_penalty,
    thrown_away,
    reused_block,
    checkpointed,
    checkpointed_reentrant,
    checkpointed_penalty,
    branch_of_one_rank,
    model_of_one_rank,
    backward_of_one_rank,
    graph_kept_over_a_step,
    hooked,
)
OF_TWO_OPTIMIZERS = (two_models_two_optimizers, in_turns)
AUTOMATIC = (
    plain_loss,
    loss_with_penalty,
    loss_with_penalty_on_weights,
    loss_of_gradient_from_outside,
    loss_after_a_backward,
    loss_of_reused_block,
    loss_of_checkpointed,
    loss_of_checkpointed_reentrant,
    loss_of_branch_of_one_rank,
    loss_of_model_of_one_rank,
)
