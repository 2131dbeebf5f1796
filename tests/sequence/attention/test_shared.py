"""Models that nobody changed attend over the tokens of all ranks: their losses and all gradients are one process'.

Tolerances, relative to the largest gradient of a model: in fp64 1e-12, thousands of roundings of 2^-53, where sums have
at most 100 terms. Hugging Face's models compute norms in fp32 whatever their dtype is, so they run in fp32: 1e-5, a
hundred roundings of 2^-24.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lightning_superscale.comm.in_graph import AxisLink
from lightning_superscale.comm.mesh import MeshAxis
from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.sequence.attention.shared import SharedAttention
from lightning_superscale.sequence.loss import cross_entropy
from lightning_superscale.sequence.spans import TokenSpans
from tests.helpers.extent import only_in_test_all
from tests.helpers.ranks import run_ranks
from tests.sequence.attention.replacement import Replacement

TOKENS, VOCABULARY = 32, 64
MODES = {
    "ulysses": {"mode": "ulysses"},
    "ulysses in chunks": {"mode": "ulysses", "num_chunks": 2},
    "all-gather": {"mode": "allgather"},
    "ring": {"mode": "ring"},
    "zigzag": {"mode": "ring", "order": "zigzag"},
}


class Attends(nn.Module):
    """One block with attention by torch's function, normed, with learned positions before it."""

    def __init__(self, num_heads: int = 4, num_kv_heads: int = 2, dim: int = 32, wraps: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(3)
        self.sizes, self.wraps = (num_heads, num_kv_heads, dim // num_heads), wraps
        self.embed, self.positions = nn.Embedding(VOCABULARY, dim), nn.Embedding(TOKENS, dim)
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * num_kv_heads * dim // num_heads)
        self.norm, self.out, self.head = nn.LayerNorm(dim), nn.Linear(dim, dim), nn.Linear(dim, VOCABULARY)
        if wraps == "compiled":
            self.block = torch.compile(self.block, backend="aot_eager", fullgraph=True)

    def block(self, x: torch.Tensor) -> torch.Tensor:
        heads, kv_heads, size = self.sizes
        h = self.norm(x)
        q = self.q(h).unflatten(-1, (heads, size)).transpose(1, 2)
        k, v = (y.unflatten(-1, (kv_heads, size)).transpose(1, 2) for y in self.kv(h).chunk(2, -1))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return x + self.out(y.transpose(1, 2).flatten(2))

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.positions(positions)
        x = checkpoint(self.block, x, use_reentrant=False) if self.wraps == "recomputed" else self.block(x)
        return self.head(x)


def hugging_face(name: str) -> nn.Module:
    import transformers

    torch.manual_seed(5)
    small = {"vocab_size": VOCABULARY, "use_cache": False}
    llama = {
        **small,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": TOKENS,
    }
    configs = {
        "llama": lambda: transformers.LlamaConfig(**llama),
        "qwen2": lambda: transformers.Qwen2Config(**llama),
        "qwen3": lambda: transformers.Qwen3Config(**llama, head_dim=8),
        "gpt2": lambda: transformers.GPT2Config(
            **small, n_embd=32, n_layer=2, n_head=4, n_positions=TOKENS, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0
        ),
        "mistral": lambda: transformers.MistralConfig(**llama, sliding_window=7),
    }
    return transformers.AutoModelForCausalLM.from_config(configs[name](), attn_implementation="sdpa").train()


class Logits(nn.Module):
    def __init__(self, name: str, *, recomputes: bool = False) -> None:
        super().__init__()
        self.model = hugging_face(name)
        if recomputes:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, ids, positions):
        return self.model(input_ids=ids, position_ids=positions).logits


MODELS = {
    "plain": lambda: Attends().double(),
    "uneven heads": lambda: Attends(3, 3, 24).double(),
    "recomputed": lambda: Attends(wraps="recomputed").double(),
    "compiled": lambda: Attends(wraps="compiled").double(),
    **{name: functools.partial(Logits, name) for name in ("llama", "qwen2", "qwen3", "gpt2")},
    "llama recomputed": functools.partial(Logits, "llama", recomputes=True),
}
CASES = [
    *[("plain", mode) for mode in MODES],
    *[(name, "ulysses") for name in MODELS if name != "plain"],
    ("uneven heads", "zigzag"),
    ("recomputed", "zigzag"),
    ("recomputed", "all-gather"),
    ("llama", "ring"),
    ("gpt2", "all-gather"),
]


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, positions and labels of two sequences; labels are shifted, and some don't count."""
    ids = torch.randint(VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    labels[0, 3:19] = -100
    return ids, torch.arange(TOKENS).expand(2, -1), labels


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def _train(rank: int, world_size: int):
    link, found = AxisLink(MeshAxis("sequence", rank, world_size, dist.group.WORLD)), {}
    for name, mode in CASES:
        shared = SharedAttention(link=link, **MODES[mode])
        spans = TokenSpans(TOKENS, world_size, shared.order)
        ids, positions, labels = (spans.take(x, 1, rank) for x in batch())
        model, replacement = MODELS[name](), Replacement(shared)
        replacement.install()
        try:
            loss = cross_entropy(model(ids, positions), labels, link)
            loss.backward()
        finally:
            replacement.remove()
        found[name, mode] = loss.detach(), gradients(model)
    return found


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=only_in_test_all)])
def test_loss_and_every_gradient_are_those_of_one_process(world_size):
    ranks = run_ranks(world_size, _train, limit_s=300)
    for name, mode in CASES:
        # torch's compiler is not what this is about.
        model, (ids, positions, labels) = MODELS["plain" if name == "compiled" else name](), batch()
        loss = functional.cross_entropy(model(ids, positions).reshape(-1, VOCABULARY), labels.reshape(-1))
        loss.backward()
        close = 1e-12 if loss.dtype == torch.float64 else 1e-5
        expected = gradients(model)
        for found, grads in (one[name, mode] for one in ranks):
            assert abs(found - loss.detach()) / loss.detach() < close, (name, mode)
            assert grads.keys() == expected.keys()
        for key, theirs in expected.items():
            # As a strategy averages gradients over the ranks. The largest element of all is the scale.
            ours = sum(one[name, mode][1][key] for one in ranks) / world_size
            scale = max(grad.abs().max() for grad in expected.values())
            assert (ours - theirs).abs().max() / scale < close, (name, mode, key)


def _refuse(rank: int, world_size: int):
    link, said = AxisLink(MeshAxis("sequence", rank, world_size, dist.group.WORLD)), {}
    ids, positions, _ = (TokenSpans(TOKENS, world_size).take(x, 1, rank) for x in batch())
    replacement = Replacement(SharedAttention(link=link))
    replacement.install()
    try:
        with pytest.raises(SequenceParallelError) as caught:
            Logits("mistral")(ids, positions)
        said["mistral"] = str(caught.value)
    finally:
        replacement.remove()
    return said


def test_a_window_that_the_model_cut_for_its_own_tokens_is_refused():
    for said in run_ranks(2, _refuse):
        assert (
            "expected a mask over the whole sequence, [..., 32 or 1, 32], of which this rank has 16" in said["mistral"]
        )


def test_on_one_rank_it_is_torchs_function():
    shared = SharedAttention(link=AxisLink(MeshAxis("sequence", 0, 1)))
    q, k, v = (torch.randn(2, heads, 8, 4) for heads in (4, 2, 2))
    for options in ({"is_causal": True}, {"attn_mask": torch.ones(8, 8, dtype=torch.bool).tril()}, {"scale": 0.3}):
        ours = shared(q, k, v, enable_gqa=True, **options)
        theirs = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
        torch.testing.assert_close(ours, theirs)


X = torch.zeros(1, 4, 8, 2)
WRONG = {
    "three dims": ((X[0], X[0], X[0]), {}, r"shape \[batch, heads, tokens, head dim\]; found query \(4, 8, 2\)"),
    "other tokens": ((X, X[:, :, :4], X[:, :, :4]), {}, "expected as many keys as queries.*with a cache"),
    "other heads": ((X, X[:, :2], X[:, :2]), {}, "equally many heads, or enable_gqa=True"),
    "own mask": ((X, X, X), {"attn_mask": torch.ones(8, 8)}, r"\[..., 16 or 1, 16\].*has 8 tokens; found \(8, 8\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_can_not_be_shared_is_refused_with_its_shapes(case):
    args, options, said = WRONG[case]
    with pytest.raises(SequenceParallelError, match=said):
        SharedAttention(link=AxisLink(MeshAxis("sequence", 0, 2)))(*args, **options)


def test_dropout_in_a_ring_and_zigzag_elsewhere_are_refused():
    link = AxisLink(MeshAxis("sequence", 0, 2))
    with pytest.raises(SequenceParallelError, match="dropout_p=0.1; use mode='ulysses'"):
        SharedAttention(link=link, mode="ring")(X, X, X, dropout_p=0.1)
    with pytest.raises(SequenceParallelError, match="mode='ulysses', found order='zigzag'"):
        SharedAttention(link=link, order="zigzag")
