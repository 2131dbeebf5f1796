"""What treats every token alone is found out, and so is everything else; the check leaves no trace."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_superscale.sequence.memory.row_wise import why_not_row_wise

S, H = 10, 6


class Module(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.layer = nn.Linear(H, H)
        self.function = function

    def forward(self, x):
        return self.function(self.layer(x))


class Counting(nn.Module):
    """Has a buffer that every call changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * 2


def why_not(function, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(2, S, H).to(dtype)
    if isinstance(function, nn.Module):
        function.to(dtype)
    params = list(function.parameters()) if isinstance(function, nn.Module) else []
    return why_not_row_wise(function, x, params, num_rows=S)


ROW_WISE = {
    "activation": F.silu,
    "norm": nn.LayerNorm(H),
    "mlp": nn.Sequential(nn.Linear(H, 24), nn.GELU(), nn.Linear(24, 3)),
    "dropout": nn.Sequential(nn.Linear(H, H), nn.Dropout(0.5), nn.Linear(H, H)),
    "top experts": Module(lambda h: h * (h >= h.topk(2, dim=-1).values[..., -1:])),
    "not a number": Module(lambda h: h / 0 * 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROW_WISE)
def test_what_treats_every_token_alone_may_run_in_tiles(name, dtype):
    assert why_not(ROW_WISE[name], dtype) is None


MIXING = {
    "attention": Module(lambda h: F.scaled_dot_product_attention(h, h, h)),
    "causal attention": Module(lambda h: F.scaled_dot_product_attention(h, h, h, is_causal=True)),
    "sum so far": Module(lambda h: h.cumsum(-2)),
    "sum of what follows": Module(lambda h: h.flip(-2).cumsum(-2).flip(-2)),
    "neighbour": Module(lambda h: F.pad(h, (0, 0, 1, 0))[..., :-1, :]),
    "convolution": Module(lambda h: F.avg_pool1d(h.mT, 3, 1, 1).mT),
    "pooling": Module(lambda h: h - h.mean(-2, keepdim=True)),
    "norm over the batch": Module(lambda h: F.batch_norm(h.mT, None, None, training=True).mT),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_tokens_is_found_out(name, dtype):
    assert "it mixes tokens" in why_not(MIXING[name], dtype)


def test_what_depends_on_the_place_is_found_out():
    places = torch.arange(S)[:, None] / S
    assert "the token's place in the sequence" in why_not(Module(lambda h: h + places))
    assert "or is random in eval mode too" in why_not(lambda x: F.dropout(x, 0.5))


def test_a_gradient_that_would_be_lost_is_found_out():
    layer, frozen = nn.Linear(H, H), nn.Linear(H, H).requires_grad_(False)
    assert r"(6, 6) of torch.float32 that wants a gradient" in why_not(lambda x: F.linear(x, layer.weight))
    assert "neither its input nor one of its parameters" in why_not(lambda x: x * layer.weight.exp()[0])
    assert why_not(lambda x: frozen(x)) is None


def test_another_shape_is_found_out():
    assert "it returned (2, 5, 6) for an input (2, 10, 6)" in why_not(lambda x: x[:, ::2])
    assert "it returned tuple" in why_not(lambda x: (x, x))


def test_a_change_in_place_is_found_out_and_leaves_the_input_alone():
    x = torch.randn(2, S, H)
    before = x.clone()
    assert "it changes its input in place" in why_not_row_wise(lambda h: h.mul_(2), x, [], num_rows=S)
    assert torch.equal(x, before)


def test_the_check_leaves_no_trace():
    module = nn.Sequential(nn.Linear(H, H), Counting(), nn.Dropout(0.5), nn.Dropout(0.5).eval())
    torch.manual_seed(1)
    state = torch.get_rng_state()
    x = torch.randn(2, S, H, generator=torch.Generator().manual_seed(0))
    assert why_not_row_wise(module, x, list(module.parameters()), num_rows=S) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert module[1].calls == 0
    assert [m.training for m in module] == [True, True, True, False]
    assert all(p.grad is None for p in module.parameters())
