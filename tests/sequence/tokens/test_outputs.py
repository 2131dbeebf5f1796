"""Blocks whose outputs are written to in place keep the hooks that stage 3, weight flow and user code put on them.

Tolerance: of fp32 losses near 4 over eight steps, as in plugins/trainer/test_sequence_parallel.py.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_superscale.comm.in_graph import AxisLink
from lightning_superscale.comm.mesh import MeshAxis
from lightning_superscale.sequence.tokens.layout import Sharded, Sharing, TokenDim
from lightning_superscale.sequence.tokens.outputs import _own_output
from lightning_superscale.sequence.tokens.tensor import with_layout
from tests.helpers.ranks import run_ranks
from tests.helpers.sequence import VOCABULARY, LanguageModel, Texts, fitted

FLOW = {"engine": "superoffload", "weights": "flow", "wrap": ["Block"]}
CASES = {"zero3": {"zero": 3}, "flow": {"zero": 2, "offload": FLOW}}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Scaled(Block):
    """Its output is no view, as a linear layer's is."""

    def forward(self, x):
        return super().forward(x) * 1.5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)
        self.blocks = nn.ModuleList([Block(), Scaled(), Block()])

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            y = block(x)
            if y.requires_grad and isinstance(block, Scaled):  # torch drops a hook on a view
                y.register_hook(lambda grad: grad.clamp(max=1e-3))
            y += x
            x = y
        return self.head(x)


def _trained(world_size, options):
    module = LanguageModel(Net())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*returned a view tensor")
        fitted(world_size, options, Texts(), module=module)
    with torch.no_grad():
        weights = {
            name: (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()
            for name, param in module.named_parameters()
        }
    return module.losses, weights


def _all(rank, world_size):
    return {name: _trained(world_size, {"sequence": world_size, **options}) for name, options in CASES.items()}


@pytest.fixture(scope="module")
def shared():
    return run_ranks(2, _all)


@pytest.mark.parametrize("name", CASES)
def test_residuals_that_are_added_in_place_train_as_on_one_process(shared, name):
    losses, weights = _trained(1, {})
    for found_losses, found in (one[name] for one in shared):
        assert found_losses == pytest.approx(losses, abs=1e-5)
        for key, weight in weights.items():
            torch.testing.assert_close(found[key], weight, rtol=0, atol=1e-4)


def test_only_a_view_whose_memory_is_its_alone_is_made_a_tensor_of_its_own():
    sharing = Sharing(link=AxisLink(MeshAxis("sequence", 0, 1)))

    def tokens(x):
        return with_layout(x, Sharded(TokenDim(1, 3), sharing, sharing.frame(3)))

    base = torch.randn(2, 3, 4, requires_grad=True) * 1
    fresh, view, one, other = tokens(base * 2), tokens((base * 2)[:1]), tokens(base[:1]), tokens(base[1:])
    found = _own_output(nn.Identity(), (), {"outputs": [fresh, view, one, other], "n": 3})
    assert found["n"] == 3
    assert [x is y for x, y in zip(found["outputs"], (fresh, view, one, other), strict=True)] == [
        True,
        False,
        True,  # writing to one of them in place changes the other, which autograd has to know
        True,
    ]
    owned = found["outputs"][1]
    assert owned._base is None
    assert owned.placement == view.placement
