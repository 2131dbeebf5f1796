"""Sequences shared among ranks that a tensor-parallel plan also cuts layers over: training is that of one process.

Tolerance: of two fp32 evaluations of four steps in other orders, as in test_tensor_parallel_checkpoints.py, which a
part of tokens or of features that is lost exceeds a thousandfold.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import lightning_superscale as lss
from lightning_superscale.errors import SequenceParallelError
from tests.helpers.ranks import run_ranks
from tests.helpers.tensor_parallel import LanguageModel, token_loader
from tests.helpers.trainers import trainer

TOLERANCE = 2e-6
CASES = {
    "rowwise": ("rowwise", {}, {}),
    "vocabulary, clipped": ("vocabulary", {}, {"gradient_clip_val": 0.1}),
    "vocabulary, superoffload": ("vocabulary", {"offload": "superoffload"}, {}),
    "vocabulary, ring, verified": ("vocabulary", {"sequence": {"mode": "ring", "verify": "first_batch"}}, {}),
}


class Odd(LanguageModel):
    """A plan of one layer, whose style does what a layer of shared sequences can't."""

    def __init__(self, style: ColwiseParallel) -> None:
        super().__init__("odd")
        self.style = style

    def configure_model(self):
        if not self.is_parallel:
            self.is_parallel = True
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], {"head": self.style})


def strategy(world_size, offload=None, sequence=None):
    zero = {"stage": 3, "tensor_parallel": 2} if world_size > 1 else 0
    shared = {"size": 2, **(sequence or {})} if world_size > 1 else None
    return lss.SuperScaleStrategy(zero=zero, offload=offload, sequence=shared)


def fit(world_size, module, options, flags, **more):
    own = strategy(world_size, **options)
    run = trainer(own, devices=world_size, use_distributed_sampler=False, **{"max_epochs": 2, **flags})
    run.fit(module, token_loader(8), **more)
    return run


def whole(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in module.named_parameters()
    }


def _all(rank: int, world_size: int, folder: str):
    found = {}
    for name, (kind, options, flags) in CASES.items():
        module = LanguageModel(kind)
        run = fit(world_size, module, options, flags)
        found[name] = module.losses, whole(module), run.strategy.explain()
    half = LanguageModel("vocabulary")
    fit(world_size, half, {}, {"max_epochs": 1}).save_checkpoint(f"{folder}/half.ckpt")
    for style in (
        ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        ColwiseParallel(output_layouts=Replicate(), use_local_output=False),
    ):
        with pytest.raises(SequenceParallelError) as refusal:
            fit(world_size, Odd(style), {}, {})
        found.setdefault("refused", []).append(str(refusal.value))
    with pytest.raises(SequenceParallelError) as refusal:
        fit(world_size, LanguageModel("sequence"), {}, {})
    found["refused"].append(str(refusal.value))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def found(folder):
    return run_ranks(4, _all, str(folder))


@pytest.mark.parametrize("name", CASES)
def test_losses_and_weights_are_those_of_one_process(found, name):
    module = LanguageModel(None)
    fit(1, module, {}, CASES[name][2])
    for losses, weights, explained in (one[name] for one in found):
        assert losses[-4:] == pytest.approx(module.losses, abs=TOLERANCE)  # verifying runs two steps more
        for key, weight in whole(module).items():
            torch.testing.assert_close(weights[key], weight, rtol=0, atol=TOLERANCE)
        assert "sequence=2: 1 heads" in explained


def test_one_process_goes_on_from_their_checkpoint(found, folder):
    through, resumed = LanguageModel(None), LanguageModel(None)
    fit(1, through, {}, {})
    fit(1, resumed, {}, {}, ckpt_path=str(folder / "half.ckpt"), weights_only=False)
    assert resumed.losses == pytest.approx(through.losses[2:], abs=TOLERANCE)
    for key, weight in whole(through).items():
        torch.testing.assert_close(whole(resumed)[key], weight, rtol=0, atol=TOLERANCE)


def test_plans_that_cut_the_sequence_themselves_are_refused_by_name(found):
    for cut, stays, norms in (one["refused"] for one in found):
        assert "Linear of a tensor-parallel plan([8, 6, 20]) returns 6 tokens on dim 1 where this rank has 3" in cut
        assert "returns a DTensor, which has no tokens" in stays
        assert "net.blocks.0.norm1 is a LayerNorm of a tensor-parallel plan" in norms
