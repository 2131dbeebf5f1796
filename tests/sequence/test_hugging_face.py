"""Models of transformers attend over ranks without masks over all pairs of tokens, as one process does.

Tolerance: they compute norms in fp32, so they run in fp32; 1e-5 is a hundred roundings of 2^-24 of the largest one.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import masking_utils

from lightning_superscale.comm.in_graph import AxisLink
from lightning_superscale.comm.mesh import MeshAxis
from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.sequence.hugging_face import NAME, HuggingFaceAttention, attention, mask
from lightning_superscale.sequence.tokens.layout import Replicated, Sharing, TokenDim
from lightning_superscale.sequence.tokens.tensor import plain, with_layout
from lightning_superscale.sequence.whole import whole_sequences
from lightning_superscale.torch_private import TorchDispatchMode, tree_leaves
from tests.helpers.extent import only_in_test_all
from tests.helpers.ranks import run_ranks
from tests.sequence.attention.test_shared import VOCABULARY, hugging_face

TOKENS, SEQUENCES = 32, 2
# Model, mode, what the batch has besides ids and labels, whether blocks are checkpointed.
CASES = [
    ("mistral", "auto", "", False),
    ("mistral", "ring", "", True),
    ("mistral", "allgather", "padding", False),
    ("mistral", "ring", "padding", False),
    ("mistral", "auto", "documents", False),
    ("llama", "ring", "documents", False),
    ("llama", "auto", "padding", True),
    ("qwen2", "ring", "", False),
    ("qwen3", "auto", "documents", True),
    ("gpt2", "ring", "padding", False),
]


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor of truth values: those of masks."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.dtype == torch.bool:
                self.numel = max(self.numel, x.numel())
        return result


def batch(what: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(VOCABULARY, (SEQUENCES, TOKENS), generator=generator)
    given = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(TOKENS) < 9, -100)}
    if what == "padding":
        given["attention_mask"] = torch.ones_like(ids)
        given["attention_mask"][0, :5] = 0
    if what == "documents":
        given["position_ids"] = torch.cat([torch.arange(n) for n in (3, 18, TOKENS - 21)]).expand(SEQUENCES, -1)
    return given


def small(name: str, recomputes: bool) -> nn.Module:
    model = hugging_face(name)
    if recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def _train(rank: int, world_size: int):
    link, found = AxisLink(MeshAxis("sequence", rank, world_size, dist.group.WORLD)), {}
    for case in CASES:
        name, mode, what, recomputes = case
        sharing = Sharing(link=link, mode=mode)
        tokens = Replicated(TokenDim(1, TOKENS), sharing)
        model, installed = small(name, recomputes), HuggingFaceAttention()
        installed.install(model)
        with LargestTensor() as largest:
            loss = model(**{key: with_layout(x, tokens) for key, x in batch(what).items()}).loss
        loss.backward()
        installed.remove()
        assert model.config._attn_implementation == "sdpa"
        found[case] = plain(loss).detach(), gradients(model), largest.numel
    return found


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=only_in_test_all)])
def test_loss_and_every_gradient_are_those_of_one_process(world_size):
    ranks = run_ranks(world_size, _train, limit_s=200)
    for case in CASES:
        model = small(case[0], case[3])
        loss = model(**batch(case[2])).loss
        loss.backward()
        expected = gradients(model)
        scale = max(grad.abs().max() for grad in expected.values())
        for found, _, _ in (one[case] for one in ranks):
            assert abs(found - loss.detach()) / loss.detach() < 1e-5, case
        for key, theirs in expected.items():
            ours = sum(one[case][1][key] for one in ranks) / world_size
            assert (ours - theirs).abs().max() / scale < 1e-5, (case, key)


class Block(nn.Module):
    is_causal = True


def test_a_mask_of_pairs_is_made_only_where_no_other_can_say_it():
    causal, window = masking_utils.causal_mask_function, masking_utils.sliding_window_causal_mask_function(3)
    documents = torch.tensor([[0, 0, 1, 1, 1]])
    packed = masking_utils.and_masks(causal, masking_utils.packed_sequence_mask_function(documents))
    assert mask(1, 5, 5, mask_function=causal) is None
    assert mask(1, 5, 5, mask_function=window) is None
    assert torch.equal(mask(1, 5, 5, mask_function=packed), documents[:, None, None])
    padding = torch.tensor([[0, 1, 1, 1, 1]])
    assert torch.equal(mask(1, 5, 5, mask_function=window, attention_mask=padding), padding.bool()[:, None, None])


def prefix(batch_idx, head_idx, q_idx, kv_idx):
    return (kv_idx <= q_idx) | (kv_idx < 2)


@pytest.mark.parametrize("function", [prefix, masking_utils.chunked_causal_mask_function(2, torch.zeros(1, dtype=int))])
def test_another_rule_gets_transformers_own_mask(function):
    expected = masking_utils.sdpa_mask(1, 5, 5, mask_function=function, allow_is_causal_skip=False)
    assert torch.equal(mask(1, 5, 5, mask_function=function, allow_is_causal_skip=False), expected)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 5, 4).unbind()
    found, _ = attention(Block(), q, k, v, expected)
    attends = nn.functional.scaled_dot_product_attention(q, k, v, expected)
    torch.testing.assert_close(found, attends.transpose(1, 2))


def test_a_whole_sequence_attends_as_ever_within_whole_sequences():
    sharing = Sharing(link=AxisLink(MeshAxis("sequence", 0, 2)))
    model, installed, given = small("mistral", False), HuggingFaceAttention(), batch("padding")
    expected = model(**given).loss
    installed.install(model)
    assert model.config._attn_implementation == NAME
    tokens = Replicated(TokenDim(1, TOKENS), sharing)
    with whole_sequences():
        found = model(**{key: with_layout(x, tokens) for key, x in given.items()}).loss
    torch.testing.assert_close(plain(found), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("option", [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"output_attentions": True}])
def test_what_no_mode_computes_is_refused_by_name(option):
    x = torch.zeros(1, 4, 8, 2)
    with pytest.raises(SequenceParallelError, match=f"Block attends with {next(iter(option))}, which"):
        attention(Block(), x, x, x, None, **option)
