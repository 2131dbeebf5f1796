"""The loss over ranks is that of the whole sequence, and so is the mean of ranks' gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional

from lightning_superscale.comm.in_graph import AxisLink
from lightning_superscale.comm.mesh import MeshAxis
from lightning_superscale.sequence.loss import cross_entropy
from tests.helpers.ranks import run_ranks

TOKENS, CLASSES = 24, 11
MASKS = {
    "every token": lambda at: at < 0,
    "some masked": lambda at: at % 3 == 0,
    "a rank without any": lambda at: at < TOKENS // 2,
    "one token": lambda at: at != 20,
    "none": lambda at: at >= 0,
}


def made(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states [2, tokens, 5], the head [classes, 5] and labels."""
    source = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, TOKENS, 5, generator=source, dtype=torch.float64)
    head = torch.randn(CLASSES, 5, generator=source, dtype=torch.float64)
    labels = torch.randint(CLASSES, (2, TOKENS), generator=source)
    return hidden, head, labels.masked_fill(MASKS[name](torch.arange(TOKENS)), -100)


def _losses(rank: int, world_size: int):
    link = AxisLink(MeshAxis("sequence", rank, world_size, dist.group.WORLD))
    mine, found = slice(rank * TOKENS // world_size, (rank + 1) * TOKENS // world_size), {}
    for name in MASKS:
        for smoothing in (0.0, 0.1):
            hidden, head, labels = made(name)
            own, head = hidden[:, mine].clone().requires_grad_(), head.requires_grad_()
            loss = cross_entropy(own @ head.t(), labels[:, mine], link, label_smoothing=smoothing)
            (3 * loss).backward()
            found[name, smoothing] = loss.detach(), own.grad / world_size, head.grad / world_size
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_loss_and_gradients_are_those_of_the_whole_sequence(world_size):
    ranks = run_ranks(world_size, _losses)
    for name, smoothing in ranks[0]:
        hidden, head, labels = made(name)
        hidden, head = hidden.requires_grad_(), head.requires_grad_()
        expected = functional.cross_entropy(
            (hidden @ head.t()).view(-1, CLASSES), labels.view(-1), label_smoothing=smoothing
        )
        (3 * expected).backward()
        parts = [found[name, smoothing] for found in ranks]
        # Sums of at most 48 terms in another order: 48 x 2^-53 of their size, below 1e-14.
        close = {"rtol": 1e-12, "atol": 1e-14, "equal_nan": True}
        # A strategy averages gradients over the ranks.
        torch.testing.assert_close(sum(of_head for *_, of_head in parts), head.grad, **close)
        for loss, *_ in parts:
            torch.testing.assert_close(loss, expected.detach(), **close)
        torch.testing.assert_close(torch.cat([own for _, own, _ in parts], 1), hidden.grad, **close)


def test_on_one_rank_it_is_torchs():
    hidden, head, labels = made("some masked")
    link = AxisLink(MeshAxis("sequence", 0, 1))
    logits = hidden @ head.t()
    ours = cross_entropy(logits, labels, link)
    assert torch.equal(ours, functional.cross_entropy(logits.view(-1, CLASSES), labels.view(-1)))
