"""Hugging Face's models attend over ranks through their own registers: windows, padding, zigzag.

Tolerance: they compute norms in fp32, so they run in fp32; 1e-5 is a hundred roundings of 2^-24 of the largest one.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from lightning_superscale.comm.in_graph import AxisLink
from lightning_superscale.comm.mesh import MeshAxis
from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.sequence.attention.hugging_face import NAME, HuggingFaceAttention
from lightning_superscale.sequence.attention.shared import SharedAttention
from lightning_superscale.sequence.loss import cross_entropy
from tests.helpers.ranks import run_ranks
from tests.sequence.attention.test_shared import MODES, TOKENS, VOCABULARY, batch, gradients, hugging_face

PADDED = 5  # tokens at the start of the first sequence
# Model, mode, whether the first sequence is padded.
CASES = [
    *[("mistral", mode, False) for mode in MODES],
    *[("llama", mode, True) for mode in MODES],
    ("qwen2", "zigzag", False),
    ("qwen3", "ulysses", True),
    ("gpt2", "zigzag", True),
    ("mistral", "zigzag", True),
]


def whole_batch(padded: bool) -> tuple[torch.Tensor, ...]:
    """Ids, positions, labels, and which tokens are no padding; padding's labels don't count."""
    ids, positions, labels = batch()
    present = torch.ones_like(ids)
    if padded:
        present[0, :PADDED] = 0
        labels = labels.masked_fill(present == 0, -100)
    return ids, positions, labels, present


def logits_of(model: nn.Module, ids, positions, present) -> torch.Tensor:
    return model(input_ids=ids, position_ids=positions, attention_mask=present).logits


def _train(rank: int, world_size: int):
    link, found = AxisLink(MeshAxis("sequence", rank, world_size, dist.group.WORLD)), {}
    for case in CASES:
        name, mode, padded = case
        shared = SharedAttention(link=link, **MODES[mode])
        ids, positions, labels, present = (
            shared.spans_of(TOKENS // world_size).take(x, 1, rank) for x in whole_batch(padded)
        )
        model, installed = hugging_face(name), HuggingFaceAttention(shared)
        before = model.config._attn_implementation
        installed.install(model)
        assert model.config._attn_implementation == NAME
        # Zigzag positions are packed documents to a model that gets no mask.
        mask = present if padded or shared.order == "zigzag" else None
        loss = cross_entropy(logits_of(model, ids, positions, mask), labels, link)
        loss.backward()
        installed.remove()
        assert model.config._attn_implementation == before
        found[case] = loss.detach(), gradients(model)
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_loss_and_every_gradient_are_those_of_one_process(world_size):
    ranks = run_ranks(world_size, _train, limit_s=300)
    for case in CASES:
        model, (ids, positions, labels, present) = hugging_face(case[0]), whole_batch(case[2])
        logits = logits_of(model, ids, positions, present if case[2] else None)
        loss = functional.cross_entropy(logits.reshape(-1, VOCABULARY), labels.reshape(-1))
        loss.backward()
        expected = gradients(model)
        scale = max(grad.abs().max() for grad in expected.values())
        for found, _ in (one[case] for one in ranks):
            assert abs(found - loss.detach()) / loss.detach() < 1e-5, case
        for key, theirs in expected.items():
            ours = sum(one[case][1][key] for one in ranks) / world_size
            assert (ours - theirs).abs().max() / scale < 1e-5, (case, key)


def shared_on_one_rank() -> HuggingFaceAttention:
    return HuggingFaceAttention(SharedAttention(link=AxisLink(MeshAxis("sequence", 0, 1))))


def test_packed_documents_that_the_model_finds_by_itself_are_refused():
    model, (ids, *_) = hugging_face("llama"), batch()
    installed = shared_on_one_rank()
    installed.install(model)
    restarting = torch.cat([torch.arange(20), torch.arange(TOKENS - 20)]).expand(2, -1)
    with pytest.raises(SequenceParallelError, match="hides other keys than causality: packed documents"):
        model(input_ids=ids, position_ids=restarting)
    installed.remove()


@pytest.mark.parametrize("option", [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"output_attentions": True}])
def test_what_no_mode_computes_is_refused_by_name(option):
    x = torch.zeros(1, 4, 8, 2)
    with pytest.raises(SequenceParallelError, match=f"Linear attends with {next(iter(option))}, which"):
        shared_on_one_rank().attend(nn.Linear(1, 1), x, x, x, None, **option)


def test_models_of_others_are_refused_by_class():
    with pytest.raises(SequenceParallelError, match="expected a model of transformers, found Linear"):
        shared_on_one_rank().install(nn.Linear(1, 1))
