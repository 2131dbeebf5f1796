"""AdamW on every path against the reference, torch.optim and synchronous clipping."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_superscale.ops import reference
from lightning_superscale.ops.cpu import adamw
from lightning_superscale.ops.cpu.pool import Pool
from lightning_superscale.ops.types import STATE_DTYPES, AdamWHyper, AdamWSegment
from tests.helpers.extent import IS_ALL
from tests.ops.paths import (
    BF16,
    F16,
    F32,
    FALLBACK,
    FLOATS,
    LARGE,
    NATIVE,
    PATHS,
    SIZES,
    THREADS,
    ExactSqrt,
    running,
    same,
    values,
)

HYPER = AdamWHyper(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=3, grad_scale=0.37, ieee_sqrt=True)
NEXT = AdamWHyper(lr=2e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=4, grad_scale=1.7, ieee_sqrt=True)
PAIRS = {
    "adamw_commit": (adamw.adamw_commit, reference.adamw_commit, adamw.submit_adamw_commit),
    "adamw_peek": (adamw.adamw_peek, reference.adamw_peek, adamw.submit_adamw_peek),
    "adamw_commit_peek": (adamw.adamw_commit_peek, reference.adamw_commit_peek, adamw.submit_adamw_commit_peek),
}


def make_segment(
    numel, *, grad=F32, next_grad=F32, m=F32, v=F32, weight_out=BF16, hyper=HYPER, next_hyper=NEXT, seed=0
) -> AdamWSegment:
    return AdamWSegment(
        param=values(numel, seed=seed),
        exp_avg=values(numel, m, seed=seed + 1, scale=1e-2),
        exp_avg_sq=values(numel, v, seed=seed + 2, scale=1e-3).abs(),
        grad=values(numel, grad, seed=seed + 3),
        next_grad=values(numel, next_grad, seed=seed + 4),
        hyper=hyper,
        next_hyper=next_hyper,
        weight_out=None if weight_out is None else torch.zeros(numel, dtype=weight_out),
    )


def copied(seg: AdamWSegment) -> AdamWSegment:
    clone = {
        name: getattr(seg, name).clone()
        for name in ("param", "exp_avg", "exp_avg_sq", "grad", "next_grad", "weight_out")
        if getattr(seg, name) is not None
    }
    return AdamWSegment(**clone, hyper=seg.hyper, next_hyper=seg.next_hyper)


def assert_same_segment(ours: AdamWSegment, oracle: AdamWSegment) -> None:
    for name in ("param", "exp_avg", "exp_avg_sq", "weight_out", "grad", "next_grad"):
        a, b = getattr(ours, name), getattr(oracle, name)
        assert (a is None) == (b is None)
        assert a is None or same(a, b), name


def check(mode: str, segments: list[AdamWSegment], *, pool: Pool | None = None) -> None:
    ours, oracle, _ = PAIRS[mode]
    expected = [copied(seg) for seg in segments]
    expected_stats = oracle(expected, stats=True)
    stats = ours(segments, stats=True, pool=pool)
    for seg, want in zip(segments, expected, strict=True):
        assert_same_segment(seg, want)
    for got, want in zip(stats, expected_stats, strict=True):
        assert got.nonfinite == want.nonfinite
        assert got.sumsq == want.sumsq or (math.isnan(got.sumsq) and math.isnan(want.sumsq))


@pytest.fixture(scope="module", params=THREADS)
def pool(request):
    made = Pool(request.param)
    yield made
    made.close()


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("mode", PAIRS)
def test_adamw_any_size_equals_reference(path, mode, pool):
    with running(path):
        for numel in SIZES:
            check(mode, [make_segment(numel, grad=BF16, next_grad=BF16)], pool=pool)


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("mode", PAIRS)
def test_adamw_large_equals_reference(path, mode):
    with running(path):
        check(mode, [make_segment(LARGE, grad=BF16, next_grad=BF16, m=BF16)], pool=Pool(7))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", PAIRS)
def test_adamw_any_dtype_equals_reference(path, mode):
    with running(path):
        for grad in FLOATS:
            for next_grad in FLOATS if mode == "adamw_commit_peek" else (F32,):
                for m in STATE_DTYPES:
                    for v in STATE_DTYPES:
                        for out in (F32, BF16, F16, *((None,) if mode == "adamw_commit" else ())):
                            seg = make_segment(1037, grad=grad, next_grad=next_grad, m=m, v=v, weight_out=out)
                            check(mode, [seg])


ODD = (
    {"decoupled": False},
    {"maximize": True},
    {"clip_value": 0.05},
    {"clip_value": 0.0},
    {"decoupled": False, "maximize": True, "clip_value": 0.1},
    {"weight_decay": 0.0},
    {"beta1": 0.3},  # torch interpolates from the other end
    {"beta1": 0.5, "decoupled": False},
    {"beta1": 0.0, "beta2": 0.0},
    {"beta2": 1.0},  # bias correction 0: a division by zero
    {"grad_scale": 0.0},
    {"step": 1},
    {"step": 100_000},
    {"ieee_sqrt": True},
    {"ieee_sqrt": True, "decoupled": False, "clip_value": 0.05},
)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", PAIRS)
@pytest.mark.parametrize("changed", [*ODD, *({**odd, "ieee_sqrt": False} for odd in ODD[:9])], ids=str)
def test_adamw_any_hyper_equals_reference(path, mode, changed):
    fields = {name: getattr(HYPER, name) for name in AdamWHyper.__dataclass_fields__}
    hyper = AdamWHyper(**{**fields, **changed})
    with running(path):
        for first, second in ((hyper, NEXT), (HYPER, hyper), (hyper, hyper)):
            check(mode, [make_segment(2500, grad=BF16, next_grad=BF16, hyper=first, next_hyper=second)])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", PAIRS)
@pytest.mark.parametrize("clip_value", [None, 0.5])
def test_adamw_nan_and_infinity_equal_reference(path, mode, clip_value):
    fields = {name: getattr(HYPER, name) for name in AdamWHyper.__dataclass_fields__}
    hyper = AdamWHyper(**{**fields, "clip_value": clip_value})
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-39, 3e38, -3e38, 65520.0, 1e-7, 6e-8])
    with running(path):
        for dtype in FLOATS:
            seg = make_segment(9000, grad=dtype, next_grad=dtype, hyper=hyper, next_hyper=hyper, weight_out=F16)
            for tensor in (seg.grad, seg.next_grad, seg.param, seg.exp_avg):
                at = torch.randint(0, 9000, (300,), generator=torch.Generator().manual_seed(tensor.element_size()))
                tensor[at] = special.repeat(25).to(tensor.dtype)
            seg.exp_avg_sq[5000:5012] = special.abs()
            check(mode, [seg])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", PAIRS)
def test_adamw_weight_out_in_gradient_memory_equals_separate(path, mode):
    with running(path):
        for grads, outs in (((BF16, F16), (BF16, F16)), ((F32,), (F32,))):
            for grad, out in itertools.product(grads, outs):
                for clip_value in (None, 0.1):
                    fields = {name: getattr(HYPER, name) for name in AdamWHyper.__dataclass_fields__}
                    hyper = AdamWHyper(**{**fields, "clip_value": clip_value})
                    apart = make_segment(70_001, grad=grad, next_grad=grad, weight_out=out, hyper=hyper)
                    for kind in (apart.grad, apart.next_grad):
                        kind[[7, 4_000, 70_000]] = math.inf  # counted although the weight replaces it
                    shared = copied(apart)
                    shared.weight_out = shared.grad.view(out)
                    ours, _, _ = PAIRS[mode]
                    expected, got = ours([apart], stats=True), ours([shared], stats=True)
                    assert got == expected
                    assert same(shared.weight_out, apart.weight_out)
                    assert same(shared.param, apart.param)


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("mode", PAIRS)
def test_adamw_weight_out_at_any_alignment_equals_reference(path, mode):
    # Aligned weights are stored past the caches, others are not.
    with running(path):
        for start in (0, 1, 8, 16, 33):
            seg = make_segment(9_001, grad=BF16, next_grad=BF16)
            seg.grad[4_096], seg.next_grad[9_000] = math.nan, math.nan
            seg.weight_out = torch.zeros(9_100, dtype=BF16)[start : start + 9_001]
            check(mode, [seg])


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("mode", PAIRS)
def test_adamw_many_segments_equal_reference(path, mode, pool):
    sizes = (3, 0, 70_000, 1, 1, 4096, 65_536, 12, 0, 500)
    with running(path):
        segments = [make_segment(n, grad=BF16, next_grad=F16 if i % 3 else BF16, seed=i) for i, n in enumerate(sizes)]
        check(mode, segments, pool=pool)
        check(mode, [], pool=pool)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", PAIRS)
def test_submit_adamw_equals_reference(path, mode, pool):
    _, oracle, submit = PAIRS[mode]
    with running(path):
        for held in (False, True):
            segments = [make_segment(n, grad=BF16, next_grad=BF16, seed=n) for n in (200_000, 7)]
            expected = [copied(seg) for seg in segments]
            expected_stats = oracle(expected, stats=True)
            ticket = submit(segments, stats=True, pool=pool, held=held)
            if held:
                assert not ticket.is_complete()
                ticket.release()
            assert ticket.wait() == expected_stats
            assert ticket.is_complete()
            for seg, want in zip(segments, expected, strict=True):
                assert_same_segment(seg, want)


TORCH_CASES = (
    (torch.optim.AdamW, {}),
    (torch.optim.AdamW, {"weight_decay": 0.1, "maximize": True}),
    (torch.optim.AdamW, {"weight_decay": 0.0, "betas": (0.3, 0.9)}),
    (torch.optim.Adam, {}),
    (torch.optim.Adam, {"weight_decay": 0.1}),
    (torch.optim.Adam, {"weight_decay": 0.1, "maximize": True}),
)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("ieee_sqrt", [False, True])
@pytest.mark.parametrize(("optimizer", "options"), TORCH_CASES)
def test_adamw_many_steps_equal_torch_optimizer(path, optimizer, options, ieee_sqrt):
    numel = 20_011
    theirs = torch.nn.Parameter(values(numel))
    param, m, v = theirs.detach().clone(), torch.zeros(numel), torch.zeros(numel)
    opt = optimizer([theirs], lr=3e-3, foreach=False, fused=False, **options)
    group = opt.param_groups[0]
    with running(path):
        for step in range(1, 41):
            grad = values(numel, seed=step)
            theirs.grad = grad.clone()
            with ExactSqrt() if ieee_sqrt else contextlib.nullcontext():
                opt.step()
            hyper = AdamWHyper(
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                step=step,
                decoupled=optimizer is torch.optim.AdamW,
                maximize=group["maximize"],
                ieee_sqrt=ieee_sqrt,
            )
            adamw.adamw_commit([AdamWSegment(param=param, exp_avg=m, exp_avg_sq=v, grad=grad, hyper=hyper)])
    state = opt.state[theirs]
    assert torch.equal(m, state["exp_avg"])
    assert torch.equal(v, state["exp_avg_sq"])
    assert torch.equal(param, theirs.detach())


floats = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(max_examples=60)
@given(st.lists(st.tuples(floats, floats, floats, floats), min_size=1, max_size=40), st.sampled_from([1, 2, 1000]))
def test_adamw_arbitrary_numbers_equal_reference(rows, step):
    columns = [torch.tensor(column, dtype=F32) for column in zip(*rows, strict=True)]
    hyper = AdamWHyper(lr=1e-3, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=step)
    for path in PATHS:
        with running(path):
            for mode in PAIRS:
                p, m, v, g = (column.clone() for column in columns)
                seg = AdamWSegment(
                    param=p, exp_avg=m, exp_avg_sq=v.abs(), grad=g, next_grad=g.flip(0), hyper=hyper, next_hyper=hyper,
                    weight_out=torch.zeros(len(rows), dtype=F16),
                )  # fmt: skip
                check(mode, [seg])


@pytest.mark.parametrize("path", PATHS)
def test_adamw_fused_multiply_add_rounds_once(path):
    # v = 0 * beta2 + (w g) g and m = fma(w, g - m, m): products whose sums lie next to a midpoint of two floats,
    # subnormal results included, where rounding twice gives another number.
    generator = torch.Generator().manual_seed(1)
    numel = 400_000
    mantissa = torch.randint(1, 1 << 23, (3, numel), generator=generator, dtype=torch.int64)
    exponent = torch.randint(1, 254, (3, numel), generator=generator, dtype=torch.int64)
    exponent[1] = (exponent[0] + torch.randint(-26, 27, (numel,), generator=generator)).clamp(0, 254)
    exponent[0, : numel // 4] = 0  # subnormal
    p, m, g = ((exponent << 23) | mantissa).to(torch.int32).view(F32).clone()
    hyper = AdamWHyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=2, ieee_sqrt=True)
    with running(path):
        check("adamw_commit", [AdamWSegment(
            param=p, exp_avg=m, exp_avg_sq=torch.zeros(numel), grad=g, hyper=hyper
        )])  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_adamw_commit_peek_divides_correctly_for_every_fraction(path):
    # [Note: Division by a constant]: the peek's root runs over all 2^23 fractions at one exponent, by giving it
    # moments that are squares rounded, and the quotient shows in the new weight through param 0 and exp_avg 1.
    with running(path):
        for step in (1, 1234):
            numel = 1 << 23
            root = torch.arange(numel) | 0x3F800000
            root = root.to(torch.int32).view(F32)
            hyper = AdamWHyper(lr=1.0, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=step, ieee_sqrt=True)
            seg = AdamWSegment(
                param=torch.zeros(numel), exp_avg=torch.ones(numel), exp_avg_sq=root * root, grad=torch.zeros(numel),
                next_grad=torch.zeros(numel), hyper=hyper, next_hyper=hyper, weight_out=torch.zeros(numel, dtype=F16),
            )  # fmt: skip
            check("adamw_commit_peek", [seg])


def _second_moments(roots: torch.Tensor, beta2: float) -> torch.Tensor:
    """Values that, once multiplied by beta2 in fp32, have exactly these square roots."""
    beta = torch.tensor(beta2)
    near = (roots.double().square() / beta.double()).float()
    found = near.clone()
    for offset in range(-4, 5):
        candidate = (near.view(torch.int32) + offset).view(F32)
        fits = (candidate * beta).double().sqrt().float() == roots
        found = torch.where(fits, candidate, found)
    return found


def _roots_near_midpoints(c: float) -> list[int]:
    """Fractions (as 24-bit integers) whose quotient by c is nearest to the middle of two floats."""
    y = int(math.ldexp(math.frexp(c)[0], 24))
    if y % 2 == 0:
        y //= 2
    if y % 2 == 0:
        return []
    residues = {sign * pow(2, -power, y) % y for sign in (1, -1) for power in (24, 25)}
    return [x for residue in residues for x in range(residue, 1 << 24, y) if x >= 1 << 23]


@pytest.mark.parametrize("path", PATHS)
def test_adamw_commit_peek_divides_correctly_next_to_midpoints(path):
    # Both ways of [Note: Division by a constant]: of 2000 bias corrections, some fail is_product_right() at the
    # fractions tried here. Four exponents and several numerators each, so that a wrong quotient shows in p. By default
    # every fourth correction is tried.
    beta2 = 0.999
    exponents, numerators = (-30, -24, -17, 0), (1.0, 1.1, 1.3, 1.7)
    with running(path):
        for step in range(1, 2001, 1 if IS_ALL else 4):
            hyper = AdamWHyper(lr=1.0, beta1=0.9, beta2=beta2, eps=1e-12, weight_decay=0.0, step=step, ieee_sqrt=True)
            fractions = _roots_near_midpoints(float(torch.tensor(math.sqrt(1.0 - beta2**step))))
            if not fractions:
                continue
            roots = torch.tensor([math.ldexp(x, e) for x in fractions for e in exponents for _ in numerators])
            numel = roots.numel()
            seg = AdamWSegment(
                param=torch.zeros(numel), exp_avg=torch.tensor(numerators).repeat(numel // len(numerators)),
                exp_avg_sq=_second_moments(roots, beta2), grad=torch.zeros(numel), next_grad=torch.zeros(numel),
                hyper=hyper, next_hyper=hyper, weight_out=torch.zeros(numel, dtype=F16),
            )  # fmt: skip
            check("adamw_commit_peek", [seg])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("ieee_sqrt", [False, True])
def test_adamw_deferred_commit_equals_clip_then_step(path, ieee_sqrt):
    """Speculate, learn the verdict, and either stand, redo with the right coefficient, or drop."""
    numel, max_norm = 20_003, 1.0
    clipped, broken = {2, 3, 6, 9, 13, 14, 18}, {5: math.inf, 11: math.nan, 19: -math.inf}
    base = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "ieee_sqrt": ieee_sqrt}

    def state():
        return {"param": values(numel), "exp_avg": torch.zeros(numel), "exp_avg_sq": torch.zeros(numel)}

    ours, sync = state(), state()
    weight, expected = torch.zeros(numel, dtype=BF16), torch.zeros(numel, dtype=BF16)
    pending: tuple[torch.Tensor, AdamWHyper] | None = None
    ours_step = sync_step = num_clipped = num_broken = 0
    with running(path):
        for iteration in range(20):
            norm = 3.0 if iteration in clipped else 0.5
            raw = values(numel, seed=iteration + 50)
            grad = (raw * (norm / raw.norm())).to(BF16)
            if iteration in broken:
                grad[iteration * 700] = broken[iteration]
            # Synchronous oracle: norm first, then the step.
            total = reference.sumsq(grad)
            finite = math.isfinite(total)
            scale = min(1.0, max_norm / (math.sqrt(total) + 1e-6)) if finite else 1.0
            if finite:
                sync_step += 1
                hyper = AdamWHyper(**base, step=sync_step, grad_scale=scale)
                reference.adamw_commit([AdamWSegment(**sync, grad=grad, hyper=hyper, weight_out=expected)])
            # Deferred commit.
            guess = AdamWHyper(**base, step=ours_step + 1)
            if pending is None:
                seg = AdamWSegment(**ours, grad=grad, hyper=guess, weight_out=weight)
                (stats,) = adamw.adamw_peek([seg], stats=True)
            else:
                held, held_hyper = pending
                seg = AdamWSegment(
                    **ours, grad=held, hyper=held_hyper, next_grad=grad, next_hyper=guess, weight_out=weight
                )
                (stats,) = adamw.adamw_commit_peek([seg], stats=True)
                pending = None
            if stats.nonfinite:
                num_broken += 1
                weight.copy_(ours["param"])
            else:
                assert stats.sumsq == total
                ours_step += 1
                hyper = guess
                if scale < 1.0:
                    num_clipped += 1
                    hyper = AdamWHyper(**base, step=ours_step, grad_scale=scale)
                    adamw.adamw_peek([AdamWSegment(**ours, grad=grad, hyper=hyper, weight_out=weight)])
                pending = (grad, hyper)
            assert same(weight, expected), iteration
        if pending is not None:
            adamw.adamw_commit([AdamWSegment(**ours, grad=pending[0], hyper=pending[1])])
    assert (num_clipped, num_broken) == (7, 3)
    for name, tensor in ours.items():
        assert same(tensor, sync[name]), name


WRONG = {
    "param bf16": (lambda s: setattr(s, "param", s.param.bfloat16()), TypeError, "segment 1: param: expected"),
    "moments fp16": (lambda s: setattr(s, "exp_avg", s.exp_avg.half()), TypeError, "exp_avg: expected"),
    "grad double": (lambda s: setattr(s, "grad", s.grad.double()), TypeError, "grad: expected"),
    "weight_out fp64": (lambda s: setattr(s, "weight_out", s.param.double()), TypeError, "weight_out: expected"),
    "two dimensions": (lambda s: setattr(s, "param", s.param.view(2, 5)), ValueError, "contiguous 1D"),
    "strided": (lambda s: setattr(s, "grad", torch.zeros(20)[::2]), ValueError, "contiguous 1D"),
    "other numel": (lambda s: setattr(s, "grad", torch.zeros(11)), ValueError, "expected 10 elements like param"),
    "on meta": (lambda s: setattr(s, "grad", torch.zeros(10, device="meta")), ValueError, "expected a CPU tensor"),
    "overlap": (lambda s: setattr(s, "exp_avg", s.param), ValueError, "overlap in memory"),
    "step 0": (lambda s: setattr(s, "hyper", AdamWHyper(lr=1, beta1=0, beta2=0, eps=1, weight_decay=0, step=0)),
               ValueError, "expected step >= 1"),
    "clip nan": (lambda s: setattr(s, "hyper", AdamWHyper(lr=1, beta1=0, beta2=0, eps=1, weight_decay=0, step=1,
                                                          clip_value=math.nan)), ValueError, "clip_value"),
    "no next": (lambda s: setattr(s, "next_grad", None), ValueError, "expected next_grad and next_hyper"),
    "no output": (lambda s: setattr(s, "weight_out", None), ValueError, "expected weight_out"),
}  # fmt: skip


@pytest.mark.parametrize("path", [PATHS[0], FALLBACK])
@pytest.mark.parametrize("case", WRONG)
def test_adamw_wrong_segment_is_refused_by_name(path, case):
    spoil, error, message = WRONG[case]
    good, bad = make_segment(10), make_segment(10)
    spoil(bad)
    with running(path), pytest.raises(error, match=message):
        adamw.adamw_commit_peek([good, bad])


def test_adamw_segments_sharing_memory_are_refused():
    seg, other = make_segment(10), make_segment(10)
    other.exp_avg_sq = seg.exp_avg_sq
    with pytest.raises(ValueError, match="segment 0 exp_avg_sq and segment 1 exp_avg_sq overlap"):
        adamw.adamw_commit([seg, other])
    other = make_segment(10)
    other.grad = seg.grad  # only read: no conflict
    adamw.adamw_commit([seg, other])
    shifted = torch.zeros(11, dtype=BF16)
    seg = make_segment(10, grad=BF16)
    seg.grad, seg.weight_out = shifted[:10], shifted[1:]
    with pytest.raises(ValueError, match="overlap"):
        adamw.adamw_commit([seg])


@pytest.mark.parametrize("path", PATHS)
def test_a_device_scale_is_what_the_same_number_is(path):
    number = make_segment(3000, hyper=dataclasses.replace(HYPER, grad_scale=0.37))
    scaled = copied(number)
    scaled.hyper, scaled.device_scale = dataclasses.replace(HYPER, grad_scale=1.0), torch.tensor(0.37)
    with running(path):
        assert adamw.adamw_commit([number], stats=True) == adamw.adamw_commit([scaled], stats=True)
    for field in ("param", "exp_avg", "exp_avg_sq", "weight_out"):
        assert same(getattr(number, field), getattr(scaled, field)), field
