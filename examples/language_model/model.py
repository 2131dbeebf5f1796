"""A small GPT: RoPE, RMSNorm, SwiGLU, grouped-query attention, and sampling with a key/value cache.

Suffixes of tensor names are their axes:

    B batch            T positions of this call     S positions of keys: cached ones, then this call's
    V vocabulary       D model width                F hidden width of the feed-forward
    H query heads      K key/value heads            C width of a head, D / H
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT.

    Args:
        vocab_size: number of token ids; 256 for bytes.
        context: longest sequence, in tokens.
        num_layers: transformer blocks.
        dim: model width.
        num_heads: query heads; must divide `dim`.
        num_kv_heads: key/value heads, each shared by num_heads / num_kv_heads query heads.
        ffn_dim: hidden width of the feed-forward; 0 means 8/3 of `dim`, rounded up to a multiple of 32.
        rope_base: base of the rotary frequencies.
    """

    vocab_size: int = 256
    context: int = 256
    num_layers: int = 4
    dim: int = 256
    num_heads: int = 4
    num_kv_heads: int = 2
    ffn_dim: int = 0
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "num_layers", "dim", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"GPTConfig.{name} must be at least 1, found {getattr(self, name)}.")
        if self.ffn_dim < 0:
            raise ValueError(f"GPTConfig.ffn_dim must be at least 0, found {self.ffn_dim}.")
        if self.dim % self.num_heads:
            raise ValueError(f"GPTConfig.num_heads={self.num_heads} must divide dim={self.dim}.")
        if self.head_dim % 2:
            raise ValueError(f"RoPE turns pairs: dim / num_heads must be even, found {self.head_dim}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"GPTConfig.num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}: "
                "each key/value head serves the same number of query heads."
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def hidden_dim(self) -> int:
        return self.ffn_dim or 32 * math.ceil(self.dim * 8 / 3 / 32)


@dataclass(slots=True)
class KVCache:
    """Keys and values of one layer: [B, K, context, C] each, of which the first `length` positions are filled."""

    k: Tensor
    v: Tensor
    length: int = 0

    def append(self, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + k_BKTC.shape[2]
        self.k[:, :, self.length : end] = k_BKTC
        self.v[:, :, self.length : end] = v_BKTC
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


def rope_table(context: int, head_dim: int, base: float) -> Tensor:
    """Cosines and sines of position * base^(-2i/C): [2, context, C/2], fp32."""
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle_TC = torch.arange(context, dtype=torch.float32)[:, None] * frequency
    return torch.stack([angle_TC.cos(), angle_TC.sin()])


def apply_rope(x_BHTC: Tensor, table_2TC: Tensor) -> Tensor:
    """Turn the pair (x[i], x[i + C/2]) of position t by t * base^(-2i/C) (Su et al. 2021, arXiv:2104.09864)."""
    cos, sin = table_2TC
    a, b = x_BHTC.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.qkv = nn.Linear(config.dim, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x_BTD: Tensor, rope_2TC: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, D = x_BTD.shape
        H, K = self.num_heads, self.num_kv_heads
        heads_BHTC = self.qkv(x_BTD).view(B, T, H + 2 * K, self.head_dim).transpose(1, 2)
        q_BHTC, k_BKTC, v_BKTC = heads_BHTC.split([H, K, K], dim=1)
        q_BHTC, k_BKTC = apply_rope(q_BHTC, rope_2TC), apply_rope(k_BKTC, rope_2TC)
        if cache is None:
            k_BKSC, v_BKSC = k_BKTC, v_BKTC
        else:
            k_BKSC, v_BKSC = cache.append(k_BKTC, v_BKTC)
        # Query head h reads key/value head h // (H / K). Repeating keeps SDPA's fused CPU kernel.
        k_BHSC = k_BKSC.repeat_interleave(H // K, dim=1)
        v_BHSC = v_BKSC.repeat_interleave(H // K, dim=1)
        S = k_BHSC.shape[2]
        mask_TS = None
        if 1 < T < S:
            mask_TS = torch.ones(T, S, dtype=torch.bool, device=x_BTD.device).tril(S - T)
        y_BHTC = F.scaled_dot_product_attention(q_BHTC, k_BHSC, v_BHSC, attn_mask=mask_TS, is_causal=1 < T == S)
        return self.out(y_BHTC.transpose(1, 2).reshape(B, T, D))


class SwiGLU(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.dim, 2 * config.hidden_dim, bias=False)
        self.down = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF, up_BTF = self.gate_up(x_BTD).chunk(2, dim=-1)
        return self.down(F.silu(gate_BTF) * up_BTF)


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.ffn = SwiGLU(config)

    def forward(self, x_BTD: Tensor, rope_2TC: Tensor, cache: KVCache | None = None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rope_2TC, cache)
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))


class GPT(nn.Module):
    """Decoder-only transformer; logits of position t depend on tokens 0..t only.

    The head is not tied to the embedding: with 256 token ids it costs 1 % of the default model's weights.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        table = rope_table(config.context, config.head_dim, config.rope_base)
        self.register_buffer("rope", table, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal(0, 0.02); what writes into the residual stream is scaled down by sqrt(2 * num_layers)."""
        for name, param in self.named_parameters():
            if param.ndim > 1:
                into_residual = name.endswith(("attention.out.weight", "ffn.down.weight"))
                nn.init.normal_(param, std=0.02 / math.sqrt(2 * self.config.num_layers) if into_residual else 0.02)

    def forward(self, tokens_BT: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """Logits [B, T, V]. With caches, the tokens continue what the caches hold.

        Raises:
            ValueError: more positions than the context.
        """
        start = 0 if caches is None else caches[0].length
        end = start + tokens_BT.shape[1]
        if end > self.config.context:
            raise ValueError(f"expected at most context={self.config.context} tokens, found {end}.")
        x_BTD = self.embedding(tokens_BT)
        rope_2TC = self.rope[:, start:end]
        for number, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, rope_2TC, None if caches is None else caches[number])
        return self.head(self.norm(x_BTD))

    def new_caches(self, batch_size: int) -> list[KVCache]:
        shape = (batch_size, self.config.num_kv_heads, self.config.context, self.config.head_dim)
        empty = self.head.weight.new_empty
        return [KVCache(empty(shape), empty(shape)) for _ in self.blocks]

    @torch.no_grad()
    def generate(
        self, prompt_BT: Tensor, n: int, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Sample `n` tokens after the prompt; temperature 0 takes the likeliest.

        When the context is full, the cache starts anew from its second half, so `n` has no limit.

        Returns:
            Prompt and continuation, [B, T + n].
        """
        context = self.config.context
        tokens_BT = prompt_BT
        fresh_BT = prompt_BT[:, -context:]
        caches = self.new_caches(prompt_BT.shape[0])
        for _ in range(n):
            if caches[0].length + fresh_BT.shape[1] > context:
                caches = self.new_caches(prompt_BT.shape[0])
                fresh_BT = tokens_BT[:, -max(1, context // 2) :]
            logits_BV = self(fresh_BT, caches)[:, -1].float()
            if temperature == 0:
                fresh_BT = logits_BV.argmax(-1, keepdim=True)
            else:
                probs_BV = torch.softmax(logits_BV / temperature, dim=-1)
                fresh_BT = torch.multinomial(probs_BV, 1, generator=generator)
            tokens_BT = torch.cat([tokens_BT, fresh_BT], dim=1)
        return tokens_BT
