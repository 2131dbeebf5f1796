"""Updates of low-precision states: every path against the reference, and the reference itself."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from lightning_superscale.ops import reference
from lightning_superscale.ops.cpu import adamw
from lightning_superscale.ops.cpu.pool import Pool
from lightning_superscale.ops.state_dtypes import forget_lost
from lightning_superscale.ops.types import STATE_DTYPES, AdamWHyper, AdamWSegment, Rounding
from tests.ops.paths import BF16, F32, FLOATS, LARGE, NATIVE, PATHS, THREADS, running, same, values

HYPER = AdamWHyper(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=3, grad_scale=0.37)
NEXT = dataclasses.replace(HYPER, lr=2e-2, step=4, grad_scale=1.7)
FIELDS = ("param", "exp_avg", "exp_avg_sq", "grad", "next_grad", "weight_out", "compensation")
PAIRS = {
    "adamw_commit": (adamw.adamw_commit, reference.adamw_commit),
    "adamw_peek": (adamw.adamw_peek, reference.adamw_peek),
    "adamw_commit_peek": (adamw.adamw_commit_peek, reference.adamw_commit_peek),
}
STOCHASTIC = Rounding(True, key=2**62 + 12345, first_element=2**33 + 5)


def make_segment(
    numel: int,
    rounding: Rounding = STOCHASTIC,
    *,
    master: torch.dtype = BF16,
    m: torch.dtype = BF16,
    v: torch.dtype = BF16,
    grad: torch.dtype = BF16,
    kahan: bool = False,
    hyper: AdamWHyper = HYPER,
) -> AdamWSegment:
    return AdamWSegment(
        param=values(numel, master),
        exp_avg=values(numel, m, seed=1, scale=1e-2),
        exp_avg_sq=values(numel, v, seed=2, scale=1e-3).abs(),
        grad=values(numel, grad, seed=3),
        next_grad=values(numel, F32, seed=4),
        hyper=hyper,
        next_hyper=dataclasses.replace(NEXT, decoupled=hyper.decoupled, clip_value=hyper.clip_value),
        weight_out=torch.zeros(numel, dtype=BF16),
        rounding=rounding,
        compensation=values(numel, BF16, seed=5, scale=1e-3) if kahan else None,
    )


def copied(seg: AdamWSegment) -> AdamWSegment:
    return dataclasses.replace(
        seg, **{name: getattr(seg, name).clone() for name in FIELDS if getattr(seg, name) is not None}
    )


def check(mode: str, seg: AdamWSegment, *, pool: Pool | None = None) -> None:
    ours, oracle = PAIRS[mode]
    expected = copied(seg)
    assert ours([seg], stats=True, pool=pool) == oracle([expected], stats=True)
    for name in FIELDS:
        found, wanted = getattr(seg, name), getattr(expected, name)
        assert wanted is None or same(found, wanted), name


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", PAIRS)
def test_any_states_equal_reference(path: str, mode: str) -> None:
    with running(path):
        for master, m, v, is_stochastic in itertools.product(STATE_DTYPES, STATE_DTYPES, STATE_DTYPES, (False, True)):
            for kahan in (False, True) if master == BF16 else (False,):
                rounding = dataclasses.replace(STOCHASTIC, is_stochastic=is_stochastic)
                check(mode, make_segment(1037, rounding, master=master, m=m, v=v, kahan=kahan))


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("mode", PAIRS)
def test_any_size_and_place_equal_reference(path: str, mode: str) -> None:
    with running(path):
        for numel, first in itertools.product((0, 1, 15, 17, 511, 512, 513, 4097), (0, 1, 2**40 + 7)):
            check(mode, make_segment(numel, Rounding(True, 3, first)))
        check(mode, make_segment(LARGE), pool=Pool(7))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", PAIRS)
def test_any_hyper_and_gradient_equal_reference(path: str, mode: str) -> None:
    changes = ({"decoupled": False}, {"maximize": True, "clip_value": 0.05}, {"beta1": 0.3}, {"weight_decay": 0.0})
    with running(path):
        for changed, grad in itertools.product(changes, FLOATS):
            check(mode, make_segment(700, grad=grad, hyper=dataclasses.replace(HYPER, **changed)))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", PAIRS)
def test_numbers_that_are_none_equal_reference(path: str, mode: str) -> None:
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-42, 3.39e38, -1e-38, 1.00390625])
    with running(path):
        seg = make_segment(900, grad=F32)
        seg.grad[::3] = special.repeat(40)[:300]
        seg.param[::7] = special.repeat(40)[:129].to(BF16)
        ours, oracle = PAIRS[mode]
        expected = copied(seg)
        ours([seg])
        oracle([expected])
        assert all(same(getattr(seg, name), getattr(expected, name)) for name in FIELDS if name != "compensation")


@pytest.mark.parametrize("num_threads", THREADS)
def test_a_peek_shows_what_the_commit_stores(num_threads: int) -> None:
    for kahan in (False, True):
        seg = make_segment(70_000, kahan=kahan)
        pool = Pool(num_threads)
        adamw.adamw_peek([seg], pool=pool)
        peeked = seg.weight_out.clone()
        adamw.adamw_commit([seg], pool=pool)
        assert torch.equal(peeked, seg.param)
        assert torch.equal(peeked, seg.weight_out)


@pytest.mark.parametrize("path", PATHS)
def test_pieces_equal_the_whole(path: str) -> None:
    with running(path):
        whole, cut = make_segment(1000), make_segment(1000)
        adamw.adamw_commit([whole])
        pieces = []
        for start, stop in ((0, 333), (333, 334), (334, 1000)):
            part = {name: getattr(cut, name)[start:stop] for name in FIELDS if getattr(cut, name) is not None}
            rounding = dataclasses.replace(STOCHASTIC, first_element=STOCHASTIC.first_element + start)
            pieces.append(dataclasses.replace(cut, **part, rounding=rounding))
        adamw.adamw_commit(pieces)
        assert all(torch.equal(getattr(whole, name), getattr(cut, name)) for name in FIELDS if name != "compensation")
        other = make_segment(1000, dataclasses.replace(STOCHASTIC, key=10))
        adamw.adamw_commit([other])
        assert not torch.equal(other.param, whole.param)


def test_refusals() -> None:
    def refused(error: type[Exception], text: str, **changed: object) -> None:
        with pytest.raises(error, match=text):
            adamw.adamw_commit([dataclasses.replace(make_segment(8), **changed)])

    refused(TypeError, "found torch.bfloat16 without", rounding=None)
    refused(TypeError, "weight_out: expected torch.bfloat16 like param", weight_out=torch.zeros(8))
    refused(TypeError, "compensation: expected with a bf16 param", param=torch.zeros(8), compensation=values(8, BF16))
    refused(ValueError, "expected a key in", rounding=Rounding(True, -1))


# The reference itself


def test_philox_known_answers() -> None:
    # From the authors' Random123 distribution, kat_vectors: philox4x32-10, counter and key 0.
    words = [int(word) for word in reference.philox(0, torch.tensor([0]), 0)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_random_bits_of_one_pair_are_four_words() -> None:
    words = [int(word) for word in reference.philox(9, torch.tensor([21]), 5)]
    param, exp_avg, exp_avg_sq = reference.random_halves(Rounding(True, 9, 42), 2, 5, torch.device("cpu"))
    assert param.tolist() == [words[0] & 0xFFFF, words[2] & 0xFFFF]
    assert exp_avg.tolist() == [words[0] >> 16, words[2] >> 16]
    assert exp_avg_sq.tolist() == [words[1] & 0xFFFF, words[3] & 0xFFFF]


def test_round_stochastic_mean_is_unbiased() -> None:
    numel = 400_000
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(numel, generator=generator) * 10.0 ** torch.randint(-30, 30, (numel,), generator=generator)
    for random in reference.random_halves(Rounding(True, 3, 0), numel, 1, x.device):
        rounded = reference.round_stochastic(x, random).double()
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


def _stepped(rounding: Rounding, steps: int, *, kahan: bool = False) -> AdamWSegment:
    """Weights of 1 after steps of 1e-4 each, which is far below half of bf16's spacing under 1, 2**-9."""
    numel = 20_000
    zeros = [torch.zeros(numel, dtype=BF16) for _ in range(3)]
    hyper = AdamWHyper(lr=1e-4, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0, step=1)
    seg = AdamWSegment(
        param=torch.ones(numel, dtype=BF16),
        exp_avg=zeros[0],
        exp_avg_sq=zeros[1],
        grad=torch.ones(numel),
        hyper=hyper,
        rounding=rounding,
        compensation=zeros[2] if kahan else None,
    )
    for step in range(1, steps + 1):
        seg.hyper = dataclasses.replace(hyper, step=step)
        adamw.adamw_commit([seg])
    return seg


def test_small_updates_are_kept_in_the_mean() -> None:
    assert torch.equal(_stepped(Rounding(False), 20).param, torch.ones(20_000, dtype=BF16))  # to nearest: lost
    # An element of 20 steps is a sum of independent roundings with a variance of at most (2**-8)**2 / 4 each.
    moved = _stepped(STOCHASTIC, 20).param.double().mean()
    assert abs(moved - (1 - 20e-4)) < 5 * 2**-9 * (20 / 20_000) ** 0.5


def test_compensation_keeps_every_update() -> None:
    # param + compensation has 16 bits: each step is off by at most half of 2**-17 of 1.
    seg = _stepped(Rounding(False), 50, kahan=True)
    assert (seg.param.double() + seg.compensation.double() - (1 - 50e-4)).abs().max() < 50 * 2**-18


def test_a_stochastic_second_moment_decays() -> None:
    # From 4 to 1 at beta2 = 0.999: nearest stays at 4, because a step is less than half of bf16's spacing there.
    for is_stochastic, low, high in ((False, 3.99, 4.01), (True, 0.95, 1.1)):
        numel = 4096
        seg = AdamWSegment(
            param=torch.zeros(numel),
            exp_avg=torch.zeros(numel, dtype=BF16),
            exp_avg_sq=torch.full((numel,), 4.0, dtype=BF16),
            grad=torch.ones(numel),
            hyper=dataclasses.replace(HYPER, grad_scale=1.0),
            rounding=Rounding(is_stochastic),
        )
        for step in range(1, 5001):
            seg.hyper = dataclasses.replace(seg.hyper, step=step)
            adamw.adamw_commit([seg])
        assert low < float(seg.exp_avg_sq.float().mean()) < high


def test_a_compensation_belongs_to_the_weight_that_its_update_gave():
    exact = torch.randn(4000, generator=torch.Generator().manual_seed(1)) * torch.logspace(-30, 30, 4000)
    weights = exact.bfloat16()
    lost = (exact - weights.float()).bfloat16()
    assert lost.count_nonzero() > 3900
    for master in (weights.clone(), None):
        kept = lost.clone()
        forget_lost(kept, weights, master)
        assert torch.equal(kept, lost)
    edited = weights.clone()
    edited[:1000] = 0
    edited[1000:2000] *= 2**-12
    for master in (weights, None):
        kept = lost.clone()
        forget_lost(kept, edited, master)
        assert torch.equal(kept[2000:], lost[2000:])
        assert not kept[:1000].any()
        assert kept[1000:2000].float().abs().le(edited[1000:2000].float().abs() * 2**-8).all()
