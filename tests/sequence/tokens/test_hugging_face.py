"""Unmodified models of transformers, with their own loss, give the loss and gradients of one process.

Tolerance: fp32 with roundings of 2^-24, and sums of some thousand terms in another order: 1e-5 relative to the largest
gradient.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from lightning_superscale.comm.in_graph import AxisLink
from lightning_superscale.comm.mesh import MeshAxis
from lightning_superscale.sequence.tokens.custom_functions import CustomFunctions
from lightning_superscale.sequence.tokens.layout import Replicated, Sharing, TokenDim
from lightning_superscale.sequence.tokens.tensor import plain, with_layout
from tests.helpers.ranks import run_ranks

transformers = pytest.importorskip("transformers")

TOKENS = 14
SIZES = {"vocab_size": 29, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
         "use_cache": False}  # fmt: skip
# The names of a model's config and class, and what its config has besides sizes.
MODELS = {
    "Llama": ("LlamaConfig", "LlamaForCausalLM", SIZES),
    "Qwen2": ("Qwen2Config", "Qwen2ForCausalLM", SIZES),
    "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**SIZES, "head_dim": 4}),
    "Mistral": ("MistralConfig", "MistralForCausalLM", {**SIZES, "sliding_window": 5}),
    "GPT2": ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": 29, "n_embd": 16, "n_layer": 2, "n_head": 4,
             "n_positions": 64, "use_cache": False, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}),
    "GPTNeoX": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**SIZES, "attention_dropout": 0.0, "hidden_dropout": 0.0}),
    "Llama, classes": ("LlamaConfig", "LlamaForSequenceClassification", {**SIZES, "num_labels": 3, "pad_token_id": 0}),
    "BERT": ("BertConfig", "BertForMaskedLM", {**SIZES, "hidden_dropout_prob": 0.0,
             "attention_probs_dropout_prob": 0.0}),
    "BERT, classes": ("BertConfig", "BertForSequenceClassification", {**SIZES, "num_labels": 3,
                      "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
}  # fmt: skip
CASES = [
    *((name, "plain") for name in MODELS),
    *((name, "padded") for name in MODELS),
    ("Llama", "packed"),
    ("Qwen3", "checkpointed"),
    ("GPT2", "checkpointed"),
]


def _model(name: str, case: str):
    config, cls, options = MODELS[name]
    torch.manual_seed(7)
    model = getattr(transformers, cls)(getattr(transformers, config)(**options, attn_implementation="sdpa"))
    model.train()
    if case == "checkpointed":
        model.gradient_checkpointing_enable()
    return model


def _batch(name: str, case: str):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 29, (2, TOKENS), generator=generator)
    batch = {"input_ids": ids, "labels": torch.tensor([1, 2]) if "classes" in name else ids.clone()}
    if case == "padded":
        present = torch.ones_like(ids)
        present[0, -5:] = 0
        batch["input_ids"] = ids * present
        batch["attention_mask"] = present
        if "classes" not in name:
            batch["labels"] = ids.masked_fill(present == 0, -100)
    if case == "packed":
        batch["position_ids"] = torch.cat([torch.arange(6), torch.arange(8)])[None].expand(2, -1)
    return batch


def _found(name: str, case: str, wrap):
    model = _model(name, case)
    loss = model(**{key: wrap(x) if x.dim() == 2 else x for key, x in _batch(name, case).items()}).loss
    loss.backward()
    return plain(loss).detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def _shared(rank: int, world_size: int):
    torch.set_num_threads(1)
    link, found = AxisLink(MeshAxis("sequence", rank, world_size, dist.group.WORLD)), {}
    guard = CustomFunctions()
    guard.install()
    for name, case in CASES:
        for mode in ("auto", "ring"):
            tokens = Replicated(TokenDim(1, TOKENS), Sharing(link=link, mode=mode))
            try:
                loss, grads = _found(name, case, lambda x, tokens=tokens: with_layout(x, tokens))
            except Exception as error:
                found[name, case, mode] = f"{type(error).__name__}: {error}"
                continue
            for grad in grads.values():
                dist.all_reduce(grad)  # noqa: TID251 # as a strategy does in the end
                grad /= world_size
            found[name, case, mode] = loss, grads
    guard.remove()
    return found


@pytest.fixture(scope="module")
def shared():
    return run_ranks(2, _shared, limit_s=110.0)


@pytest.mark.parametrize("mode", ["auto", "ring"])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_loss_and_gradients_are_those_of_one_process(shared, name, case, mode):
    loss, grads = _found(name, case, lambda x: x)
    for rank in shared:
        assert not isinstance(rank[name, case, mode], str), rank[name, case, mode]
        found_loss, found = rank[name, case, mode]
        torch.testing.assert_close(found_loss, loss, rtol=1e-5, atol=0)
        assert found.keys() == grads.keys()
        largest = max(float(grad.abs().max()) for grad in grads.values())
        for key, grad in grads.items():
            torch.testing.assert_close(found[key], grad, rtol=0, atol=1e-5 * largest)
