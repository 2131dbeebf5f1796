"""The example GPT against naive references."""

from __future__ import annotations

import math

import pytest
import torch

from examples.language_model.model import GPT, Attention, GPTConfig, KVCache, apply_rope, rope_table

SMALL = GPTConfig(context=24, num_layers=2, dim=32, num_heads=4, num_kv_heads=2)


@pytest.fixture
def gpt():
    torch.manual_seed(3)
    model = GPT(SMALL)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn_like(param))
    return model.double()


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("changed", [1, 7, 23])
def test_logits_before_a_changed_byte_stay_the_same(gpt, changed):
    first = tokens(2, 24)
    second = first.clone()
    second[:, changed] = (second[:, changed] + 1) % 256
    before, after = gpt(first), gpt(second)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed], after[:, changed])


def test_rope_equals_complex_rotation():
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    turned = apply_rope(x, rope_table(9, 8, 10000.0).double())
    for t in range(9):
        for i in range(4):
            pair = torch.complex(x[:, :, t, i], x[:, :, t, i + 4]) * torch.polar(
                torch.tensor(1.0, dtype=torch.float64), torch.tensor(t * 10000.0 ** (-i / 4), dtype=torch.float64)
            )
            # The table is fp32: half an ulp of 1, times |x| < 8, and the angle's own rounding.
            torch.testing.assert_close(turned[:, :, t, i], pair.real, rtol=0, atol=2e-5)
            torch.testing.assert_close(turned[:, :, t, i + 4], pair.imag, rtol=0, atol=2e-5)


def test_rope_scores_depend_on_distance_alone():
    table = rope_table(16, 8, 100.0).double()
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    turned_q, turned_k = (apply_rope(v.expand(1, 1, 16, 8), table)[0, 0] for v in (q, k))
    torch.testing.assert_close(turned_q[9] @ turned_k[4], turned_q[15] @ turned_k[10], rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_grouped_attention_equals_naive_loop(num_kv_heads):
    torch.manual_seed(0)
    config = GPTConfig(context=10, dim=32, num_heads=4, num_kv_heads=num_kv_heads)
    attention = Attention(config).double()
    table = rope_table(10, 8, config.rope_base).double()
    x = torch.randn(2, 10, 32, dtype=torch.float64)
    heads = attention.qkv(x).view(2, 10, 4 + 2 * num_kv_heads, 8)
    q, k, v = heads.split([4, num_kv_heads, num_kv_heads], dim=2)
    out = torch.zeros(2, 10, 4, 8, dtype=torch.float64)
    for h in range(4):
        shared = h // (4 // num_kv_heads)
        q_h, k_h = (apply_rope(y[:, None], table)[:, 0] for y in (q[:, :, h], k[:, :, shared]))
        for t in range(10):
            scores = torch.einsum("bc,bsc->bs", q_h[:, t], k_h[:, : t + 1]) / math.sqrt(8)
            out[:, t, h] = torch.einsum("bs,bsc->bc", scores.softmax(-1), v[:, : t + 1, shared])
    torch.testing.assert_close(attention(x, table), attention.out(out.flatten(2)), rtol=1e-9, atol=1e-12)


def test_forward_in_pieces_with_cache_equals_forward_at_once(gpt):
    sequence = tokens(2, 20)
    caches = gpt.new_caches(2)
    pieces = [gpt(piece, caches) for piece in sequence.split([7, 1, 5, 7], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), gpt(sequence), rtol=1e-9, atol=1e-12)
    assert isinstance(caches[0], KVCache)
    assert caches[0].length == 20


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_cached_generation_equals_uncached(gpt, temperature):
    prompt = tokens(2, 4)
    cached = gpt.generate(prompt, 20, temperature, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    uncached = prompt
    for _ in range(20):
        logits = gpt(uncached)[:, -1].float()
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        uncached = torch.cat([uncached, new], dim=1)
    assert torch.equal(cached, uncached)


def test_generation_goes_on_past_the_context(gpt):
    assert gpt.generate(tokens(1, 30), 40).shape == (1, 70)


def test_forward_past_the_context_is_refused(gpt):
    with pytest.raises(ValueError, match="at most context=24 tokens, found 25"):
        gpt(tokens(1, 25))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"dim": 33}, "must divide dim=33"),
        ({"dim": 12, "num_heads": 4, "num_kv_heads": 2}, "must be even, found 3"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"ffn_dim": -1}, "ffn_dim must be at least 0"),
    ],
)
def test_impossible_shape_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**shape)
