"""Checkpoints within saved-tensor hooks compute blocks again with tokens that know their ranks.

Tolerance: as in tests/plugins/trainer/test_sequence_parallel.py. A block that attends to a rank's own tokens in
backward moves the losses by more than 1e-2.
"""

from __future__ import annotations

import pytest
import torch.utils.checkpoint
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lightning_superscale.sequence.tokens.checkpoints import Checkpoints, restoring
from tests.helpers.ranks import run_ranks
from tests.helpers.sequence import LanguageModel, Texts, fitted


class OnTheHost(LanguageModel):
    """Keeps the inputs of checkpoints on the host."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def loss(self, batch):
        model = self.model
        x = model.embed(batch[0])
        with torch.autograd.graph.save_on_cpu():
            for norm, attention, mlp in zip(model.norms, model.attentions, model.mlps, strict=True):
                x = x + checkpoint(torch.nn.Sequential(norm, attention), x, use_reentrant=self.use_reentrant)
                x = x + checkpoint(mlp, x, use_reentrant=self.use_reentrant)
        return functional.cross_entropy((x @ model.embed.weight.T).flatten(0, 1), batch[1].flatten())


def losses(rank, world_size):
    found = []
    for use_reentrant in (True, False):
        module = OnTheHost(use_reentrant)
        fitted(world_size, {"sequence": world_size} if world_size > 1 else {}, Texts(), module=module)
        found.append(module.losses)
    return found, is_as_torch_made_it()


def is_as_torch_made_it() -> bool:
    modules = [getattr(one, "__module__", None) or "" for one in vars(torch.utils.checkpoint).values()]
    return not any(module.startswith("lightning_superscale") for module in modules)


def test_what_is_computed_again_attends_to_all_tokens():
    expected, _ = losses(0, 1)
    for found, is_restored in run_ranks(2, losses):
        assert found[0] == pytest.approx(expected[0], abs=1e-5)
        assert found[1] == pytest.approx(expected[1], abs=1e-5)
        assert is_restored


def test_functions_of_torch_are_put_back_when_the_last_run_ends():
    first, second = Checkpoints(), Checkpoints()
    first.remove()
    first.install()
    first.install()
    second.install()
    first.remove()
    assert not is_as_torch_made_it()
    second.remove()
    second.remove()
    assert is_as_torch_made_it()


def test_a_block_without_tokens_is_left_alone():
    assert restoring(torch.exp, (torch.ones(2), None)) is torch.exp
