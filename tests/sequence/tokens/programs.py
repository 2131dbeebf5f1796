"""Small models and losses as users write them, which know nothing of ranks, and their batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, WIDTH, TOKENS, SEQUENCES = 29, 24, 16, 3


class Attention(nn.Module):
    """Grouped self-attention with rotary positions that it makes itself."""

    def __init__(self, heads: int, kv_heads: int, *, is_causal: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.is_causal, self.dropout = heads, kv_heads, is_causal, dropout
        self.dim = 4
        self.qkv = nn.Linear(WIDTH, (heads + 2 * kv_heads) * self.dim)
        self.out = nn.Linear(heads * self.dim, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, tokens, _ = x.shape
        sizes = [self.heads * self.dim, self.kv_heads * self.dim, self.kv_heads * self.dim]
        q, k, v = (one.view(batch, tokens, -1, self.dim).transpose(1, 2) for one in self.qkv(x).split(sizes, dim=-1))
        angle = torch.arange(tokens, dtype=x.dtype)[:, None] / torch.tensor([1.0, 10.0], dtype=x.dtype)
        q, k = self.rotate(q, angle), self.rotate(k, angle)
        y = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=self.is_causal and mask is None, enable_gqa=self.heads != self.kv_heads
        )
        return self.out(y.transpose(1, 2).reshape(batch, tokens, -1))

    @staticmethod
    def rotate(x: Tensor, angle: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class Gpt(nn.Module):
    """Learned positions of its own, pre-norm blocks, tied head."""

    def __init__(self, heads: int = 4, kv_heads: int = 4, *, is_causal: bool = True, num_layers: int = 2) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(64, WIDTH)
        self.attentions = nn.ModuleList(Attention(heads, kv_heads, is_causal=is_causal) for _ in range(num_layers))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))
            for _ in range(num_layers)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(num_layers))

    def hidden(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids) + self.positions(torch.arange(ids.shape[1]))
        for norm, attention, mlp in zip(self.norms, self.attentions, self.mlps, strict=True):
            x = x + attention(norm(x), mask)
            x = x + mlp(x)
        return x

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.hidden(ids, mask) @ self.embed.weight.T


@dataclass
class Program:
    """A model, and the loss of a batch."""

    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    model: Callable[[], nn.Module] = Gpt
    tokens: int = TOKENS
    modes: tuple[str, ...] = ("auto", "ulysses", "ring", "allgather")
    extra: dict[str, object] = field(default_factory=dict)


def given_labels(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), ignore_index=-100)


def views_and_means(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    logits = model(ids)
    return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.reshape(-1))


def shift_by_slices(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    logits = model(ids)[:, :-1]
    return F.cross_entropy(logits.reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1))


def shift_before(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    inputs, targets = ids[:, :-1], ids[:, 1:]
    return F.cross_entropy(model(inputs).transpose(1, 2), targets)


def shift_by_padding(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    logits = model(ids).float().to(model(ids).dtype)
    return F.cross_entropy(logits.view(-1, VOCABULARY), shifted.view(-1))


def masked_sum(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    each = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), reduction="none")
    weights = (labels != -100).flatten().to(each.dtype)
    return (each * weights).sum() / weights.sum()


def weighted_classes(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    weight = torch.linspace(0.5, 2, VOCABULARY, dtype=torch.float64)
    return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), weight, label_smoothing=0.1)


def soft_labels(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    target = F.one_hot(ids, VOCABULARY).double() * 0.9 + 0.1 / VOCABULARY
    return F.cross_entropy(model(ids).flatten(0, 1), target.flatten(0, 1))


def mean_pool(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    pooled = model.hidden(ids).mean(1)
    return F.cross_entropy(pooled @ model.embed.weight.T, labels[:, 0].clamp(min=0))


def last_token(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(ids)[:, -1], ids[:, 0])


def regression(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    target = torch.sin(ids[..., None].double() + torch.arange(WIDTH))
    return F.mse_loss(model.hidden(ids), target) + 0.1 * F.smooth_l1_loss(model.hidden(ids), target)


def gated_by_all(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """A value of all tokens goes back into each of them (squeeze and excitation)."""
    x = model.hidden(ids)
    gate = torch.sigmoid(x.mean(1, keepdim=True))
    norm = x / (1 + x.pow(2).mean().sqrt())
    return F.cross_entropy((norm * gate @ model.embed.weight.T).flatten(0, 1), labels.flatten())


def auxiliary(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    logits = model(ids)
    z = logits.logsumexp(-1)
    return given_labels(model, ids, labels) + 1e-2 * (z**2).mean() + 1e-2 * z.amax() + 1e-3 * z.norm()


def of_mask(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    present = torch.ones_like(ids)
    present[0, -5:] = 0
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    return given_labels_with(
        model(ids, causal & present.bool()[:, None, None, :]), labels.masked_fill(present == 0, -100)
    )


def given_labels_with(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def checkpointed(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    x = model.embed(ids)
    for at, (attention, mlp) in enumerate(zip(model.attentions, model.mlps, strict=True)):
        x = x + checkpoint(attention, x, use_reentrant=bool(at % 2))
        x = x + checkpoint(mlp, x, use_reentrant=False)
    return given_labels_with(x @ model.embed.weight.T, labels)


class Encoder(nn.Module):
    """Two of torch's own layers, and another attention of its own, between an embedding and its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 32, dropout=0.0, batch_first=True, norm_first=first)
            for first in (True, False)
        )
        self.attend = nn.MultiheadAttention(WIDTH, 4)

    def forward(self, ids: Tensor, causal: bool = False) -> Tensor:
        x, padding = self.embed(ids), None if causal else ids == 3
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], dtype=x.dtype) if causal else None
        for layer in self.layers:
            x = layer(x, src_mask=mask, src_key_padding_mask=padding, is_causal=causal)
        x = x.transpose(0, 1)
        never = torch.zeros(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(3)
        x = x + self.attend(x, x, x, key_padding_mask=padding, attn_mask=never, need_weights=False)[0]
        return x.transpose(0, 1) @ self.embed.weight.T


def causal_encoder(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    return given_labels_with(model(ids, True), labels)


def classified(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """One token per sequence, as Hugging Face's models for sequences take it."""
    logits = model(ids)
    last = (torch.arange(ids.shape[1]) * (ids != 0)).argmax(-1)
    return F.cross_entropy(logits[torch.arange(ids.shape[0]), last], ids[:, 0])


def spread_and_extremes(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    x = model.hidden(ids)
    x = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-3)
    values, places = x.max(1)
    return (
        given_labels_with(x @ model.embed.weight.T, labels) + (values * places).mean() + x.var() + x.amin((0, 1)).sum()
    )


def bidirectional() -> nn.Module:
    return Gpt(is_causal=False)


PROGRAMS = {
    "given labels": Program(given_labels),
    "views": Program(views_and_means),
    "shift by slices": Program(shift_by_slices),
    "shift before": Program(shift_before, tokens=TOKENS + 1),
    "shift by padding": Program(shift_by_padding),
    "masked sum": Program(masked_sum),
    "weighted classes": Program(weighted_classes),
    "soft labels": Program(soft_labels, modes=("auto",)),
    "mean pool": Program(mean_pool, modes=("auto", "ring")),
    "last token": Program(last_token, modes=("auto", "ring")),
    "regression": Program(regression, modes=("auto", "ring")),
    "gated by all": Program(gated_by_all, modes=("auto", "ring")),
    "auxiliary": Program(auxiliary, modes=("auto", "ring")),
    "mask": Program(of_mask),
    "checkpointed": Program(checkpointed),
    "odd length": Program(given_labels, tokens=13),
    "odd length, masked": Program(of_mask, tokens=13),
    "odd length, bidirectional": Program(mean_pool, model=bidirectional, tokens=11),
    "odd length, slices": Program(shift_by_slices, tokens=10),
    "bidirectional": Program(given_labels, model=bidirectional),
    "grouped": Program(given_labels, model=lambda: Gpt(4, 2)),
    "multi-query": Program(given_labels, model=lambda: Gpt(4, 1)),
    "uneven heads": Program(given_labels, model=lambda: Gpt(3, 3)),
    "encoder": Program(given_labels, model=Encoder),
    "encoder, causal": Program(causal_encoder, model=Encoder, tokens=13),
    "classified": Program(classified, tokens=13, modes=("auto", "ring")),
    "spread and extremes": Program(spread_and_extremes, tokens=13, modes=("auto", "ring")),
    "one head": Program(given_labels, model=lambda: Gpt(1, 1), modes=("auto", "ring")),
}


def batch(tokens: int) -> tuple[Tensor, Tensor]:
    """Ids and labels [sequences, tokens]; masked labels lie unevenly over the ranks, and one sequence has none left."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCABULARY, (SEQUENCES, tokens), generator=generator)
    labels = torch.randint(VOCABULARY, (SEQUENCES, tokens), generator=generator)
    labels[0, tokens // 2 :] = -100
    labels[1] = -100
    return ids, labels


def made(program: Program) -> nn.Module:
    torch.manual_seed(7)
    return program.model().double()


def mean_grads(model: nn.Module, world_size: int) -> dict[str, Tensor]:
    """The gradients, averaged over ranks as a strategy does in the end, of parameters that have one."""
    found = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    for grad in found.values():
        dist.all_reduce(grad)  # noqa: TID251
        grad /= world_size
    return found


Found = tuple[Tensor, dict[str, Tensor]]
"""A loss, and gradients by name."""


def assert_of_one_process(found: Found, expected: Found, where: str) -> None:
    """Loss and gradients but for 1e-12, of the loss, and of the largest gradient."""
    (loss, grads), (expected_loss, expected_grads) = found, expected
    assert abs(loss - expected_loss) <= 1e-12 * abs(expected_loss), where
    assert grads.keys() == expected_grads.keys()
    largest = max(float(grad.abs().max()) for grad in expected_grads.values())
    for key, grad in expected_grads.items():
        torch.testing.assert_close(grads[key], grad, rtol=0, atol=1e-12 * largest, msg=f"{where} {key}")
