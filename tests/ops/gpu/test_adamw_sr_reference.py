"""The oracle of adamw_sr itself: its random numbers, its mean, and its independence of sharding."""

from __future__ import annotations

import dataclasses

import torch

from lightning_superscale.ops import reference
from tests.ops.gpu.helpers import BASE_HYPER


def test_philox_known_answers() -> None:
    # From the authors' Random123 distribution, kat_vectors: philox4x32-10, counter and key 0.
    words = [int(word) for word in reference.philox(0, torch.tensor([0]), 0)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_round_stochastic_mean_is_unbiased() -> None:
    numel = 400_000
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(numel, generator=generator) * 10.0 ** torch.randint(-30, 30, (numel,), generator=generator)
    rounded = reference.round_stochastic(x, reference.philox(3, torch.arange(numel), 1)[0]).double()
    cut = (x.view(torch.int32) & -0x10000).view(torch.float32).double()
    # Each element leaves the cut value with probability (dropped bits) / 2**16; one such event has a
    # variance of at most 1/4.
    expected = ((x.view(torch.int32) & 0xFFFF).double() / 65536).mean()
    assert abs((rounded != cut).double().mean() - expected) < 5 * 0.5 / numel**0.5
    # And it goes to a neighbour: bf16's spacing is at most 2**-7 of the number.
    assert ((rounded - x.double()).abs() <= x.double().abs() / 128 + 1e-40).all()


def test_round_stochastic_special_values_stay() -> None:
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1.0, -2.5])
    rounded = reference.round_stochastic(x, torch.full((7,), 0xFFFF))
    assert rounded[2].isnan()
    keep = [0, 1, 3, 4, 5, 6]
    assert torch.equal(rounded.float()[keep].view(torch.int32), x[keep].view(torch.int32))


def test_adamw_sr_in_pieces_equals_whole() -> None:
    numel = 1000
    p, m, v, g = (torch.randn(numel, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in range(4))
    v = v.abs()
    whole, pieces, other = ((p.clone(), m.clone(), v.clone()) for _ in range(3))
    reference.adamw_sr(*whole, g, BASE_HYPER, seed=9, offset=77)
    for start, stop in ((0, 333), (333, 334), (334, 1000)):
        part = slice(start, stop)
        reference.adamw_sr(
            pieces[0][part], pieces[1][part], pieces[2][part], g[part], BASE_HYPER, seed=9, offset=77 + start
        )
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))
    reference.adamw_sr(*other, g, BASE_HYPER, seed=10, offset=77)
    assert not torch.equal(other[0], whole[0])


def test_adamw_sr_small_updates_are_not_lost() -> None:
    # A step of 1e-4 is far below half of bf16's spacing under 1 (2**-9): rounding to nearest would leave
    # every weight at 1; stochastic rounding moves the mean by the exact step. One element's result
    # is 1 or 1 - 2**-8, so the mean of n has a standard deviation below 2**-8 / 2 / sqrt(n).
    numel = 100_000
    param = torch.ones(numel, dtype=torch.bfloat16)
    zeros = torch.zeros(numel, dtype=torch.bfloat16)
    hyper = dataclasses.replace(BASE_HYPER, lr=1e-4, eps=0.0, weight_decay=0.0, step=1)
    reference.adamw_sr(param, zeros.clone(), zeros.clone(), torch.ones(numel), hyper, seed=1, offset=0)
    assert abs(param.double().mean() - (1 - 1e-4)) < 5 * 2**-9 / numel**0.5
