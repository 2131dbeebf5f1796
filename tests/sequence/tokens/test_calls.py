"""Calls of torch's functions give the values and gradients of one process, or are refused: none is silently wrong.

Shapes have odd lengths, one token, fewer tokens than ranks, and sizes that are all equal. Tolerance: fp64, sums of some
hundred terms in another order, 1e-11; where a call makes 16 or 32 bits, two roundings of them.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from lightning_superscale.comm.in_graph import AxisLink
from lightning_superscale.comm.mesh import MeshAxis
from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.sequence.tokens.custom_functions import CustomFunctions
from lightning_superscale.sequence.tokens.layout import Replicated, Sharded, Sharing, TokenDim
from lightning_superscale.sequence.tokens.tensor import layout_of, plain, with_layout
from lightning_superscale.torch_private import tree_leaves
from tests.helpers.extent import only_in_test_all
from tests.helpers.ranks import run_ranks
from tests.sequence.tokens import foreign
from tests.sequence.tokens.calls import EXACT, REFUSED, WRITTEN_OUT

SHAPES = {2: [((3, 8, 6), "auto"), ((2, 7, 6), "ring"), ((2, 1, 4), "auto")],
          4: [((2, 7, 6), "auto"), ((4, 4, 4), "ring")]}  # fmt: skip
NAMES = {"torch": torch, "F": F, "copy": copy, "pickle": pickle, **vars(foreign)}


def called(name: str, shape, sharing: Sharing | None, world_size: int):
    batch, tokens, features = shape
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(11, features, generator=generator, dtype=torch.float64).requires_grad_()
    ids = torch.randint(11, (batch, tokens), generator=generator)
    if sharing is not None:
        ids = with_layout(ids, Replicated(TokenDim(1, tokens), sharing))
    torch.manual_seed(5)
    x = F.embedding(ids, w)
    found = WRITTEN_OUT[name](x, w, ids) if name in WRITTEN_OUT else eval(name, {**NAMES, "x": x, "w": w, "ids": ids})
    results = [y for y in tree_leaves(found) if isinstance(y, Tensor)]
    losses = []
    for y in results:
        if y.requires_grad:
            size = torch.Size(y.shape)
            losses.append((y.double() * (torch.arange(size.numel()).double().view(size) * 0.37 + 1).sin()).sum())
    grad = None
    if losses:
        sum(losses).backward()
        grad = torch.zeros_like(w) if w.grad is None else w.grad
        if sharing is not None:
            dist.all_reduce(grad)  # noqa: TID251 # as a strategy does in the end
            grad /= world_size
    return [_whole(y) for y in results], grad


def _whole(y: Tensor) -> Tensor:
    layout = layout_of(y)
    return layout.gather(plain(y).detach()) if isinstance(layout, Sharded) else plain(y).detach()


def _work(rank: int, world_size: int):
    link, wrong = AxisLink(MeshAxis("sequence", rank, world_size, dist.group.WORLD)), []
    guard = CustomFunctions(foreign.TOKEN_WISE)
    for shape, mode in SHAPES[world_size]:
        for name in [*EXACT, *WRITTEN_OUT]:
            wanted, wanted_grad = called(name, shape, None, 1)
            guard.install()
            try:
                found, grad = called(name, shape, Sharing(link=link, mode=mode), world_size)
                assert len(found) == len(wanted)
                for ours, theirs in zip([*found, grad], [*wanted, wanted_grad], strict=True):
                    if theirs is not None:
                        bits = 1e-11 if theirs.dtype == torch.float64 else 2e-3 if theirs.dtype == torch.half else 2e-2
                        tolerance = {"rtol": bits, "atol": bits} if theirs.is_floating_point() else {}
                        torch.testing.assert_close(ours, theirs, equal_nan=True, **tolerance)
            except Exception as error:
                wrong.append(f"{name} {shape} {mode}: {type(error).__name__} {str(error)[:300]}")
            finally:
                guard.remove()
    return wrong


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=only_in_test_all)])
def test_calls_are_exact(world_size):
    wrong = run_ranks(world_size, _work, limit_s=110.0)
    assert wrong == [[]] * world_size


def _refused(rank: int, world_size: int):
    sharing = Sharing(link=AxisLink(MeshAxis("sequence", rank, world_size, dist.group.WORLD)))
    guard, messages = CustomFunctions(foreign.TOKEN_WISE), {}
    guard.install()
    for name in REFUSED:
        try:
            called(name, (2, 8, 6), sharing, world_size)
            messages[name] = "was not refused"
        except SequenceParallelError as error:
            messages[name] = str(error)
        except Exception as error:
            messages[name] = f"{type(error).__name__} {error}"
    guard.remove()
    return messages


def test_calls_are_refused_by_name_on_every_rank():
    for messages in run_ranks(2, _refused):
        for name, message in messages.items():
            assert "The strategy's sequence= shares" in message, (name, message)
            assert "is not known" not in message, (name, message)
