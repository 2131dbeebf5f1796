"""The tiled loss is the plain one, value and gradients, while no more logits exist than a tile has."""

from __future__ import annotations

import warnings
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lightning_superscale.comm.collectives import AxisCollectives
from lightning_superscale.comm.mesh import build_mesh
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.layout.mesh import MeshSpec
from lightning_superscale.ops import events
from lightning_superscale.sequence.memory import tiled_loss
from lightning_superscale.sequence.memory.saved_bytes import SavedBytes
from lightning_superscale.sequence.memory.tiled_loss import (
    cross_entropy_sum,
    tiled_cross_entropy,
    tokens_per_tile,
    vocab_parallel_cross_entropy_sum,
)
from tests.helpers.ranks import run_ranks

B, S, H, V = 2, 19, 12, 50
TILES = [1, 5, 16, B * S, 1000, None]


def case(dtype=torch.float32, *, has_bias=True, num_ignored=7, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    labels = torch.randint(0, V, (B, S), generator=generator)
    labels.view(-1)[torch.randperm(B * S, generator=generator)[:num_ignored]] = -100
    hidden, weight = leaf(B, S, H), leaf(V, H)
    return SimpleNamespace(hidden=hidden, weight=weight, bias=leaf(V) if has_bias else None, labels=labels)


def plain(c, *, acc=torch.float32, **options):
    logits = F.linear(c.hidden, c.weight, c.bias).to(acc)
    return F.cross_entropy(logits.flatten(0, 1), c.labels.flatten(), **options)


def grads(c):
    return [t.grad for t in (c.hidden, c.weight, c.bias) if t is not None]


def run(c, loss, scale=1.0):
    (loss * scale).backward()
    return loss.detach(), grads(c)


# A logit is a sum of H products, its softmax a sum over V; a weight's gradient a sum of N tokens' products, and the
# loss a sum over N. In any order the error of a sum of n terms is below n * eps times the sum of their magnitudes
# (Higham 2002, eq. 4.4), both sides have it, and here these magnitudes are at most about 30 times the largest result:
# 2 * (H + V + N) * eps * 30, relative to the largest.
def tolerance(dtype):
    return 2 * (H + V + B * S) * torch.finfo(dtype).eps * 30


def assert_near(actual, expected, tolerance):
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert a.shape == e.shape
        assert (a - e).abs().max() <= tolerance * e.abs().max()


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradients_are_those_of_the_plain_loss(dtype, has_bias, smoothing, reduction, tile):
    ours, theirs = case(dtype, has_bias=has_bias), case(dtype, has_bias=has_bias)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    loss, expected = (
        run(ours, tiled_cross_entropy(**vars(ours), tile=tile, **options), 0.3),
        run(theirs, plain(theirs, acc=dtype, **options), 0.3),
    )
    assert_near([loss[0], *loss[1]], [expected[0], *expected[1]], tolerance(dtype))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torchs_own_chunked_loss_agrees_where_it_is_exact(dtype, reduction):
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("torch has it from 2.13 on")
    ours, theirs = case(dtype), case(dtype)
    chunks = nn.LinearCrossEntropyOptions(batch_chunk_size=5, chunking_method=None)
    chunked = F.linear_cross_entropy(
        theirs.hidden.flatten(0, 1), theirs.weight, theirs.labels.flatten(), linear_bias=theirs.bias,
        reduction=reduction, options=chunks,
    )  # fmt: skip
    loss, expected = run(ours, tiled_cross_entropy(**vars(ours), tile=5, reduction=reduction)), run(theirs, chunked)
    assert_near([loss[0], *loss[1]], [expected[0], *expected[1]], tolerance(dtype))


def test_the_reasons_against_torchs_own_chunked_loss_hold():
    """[Note: Why not torch's chunked loss]: when one of them no longer holds, the choice is worth another look."""
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("torch has it from 2.13 on")
    c, chunks = case(torch.bfloat16), nn.LinearCrossEntropyOptions()
    flat, labels = c.hidden.flatten(0, 1), c.labels.flatten()
    assert F.linear_cross_entropy(flat, c.weight, labels, reduction="sum", options=chunks).dtype == torch.bfloat16
    assert tiled_cross_entropy(**vars(c), reduction="sum").dtype == torch.float32
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        F.linear_cross_entropy(flat, c.weight, labels, label_smoothing=0.1, options=chunks)
    assert any("``options`` ignored" in str(warning.message) for warning in caught)
    num, weight = 4096, torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    tokens = nn.LinearCrossEntropyOptions(batch_chunk_size=1, chunking_method=None)
    ones, first = torch.ones(num, 1, dtype=torch.bfloat16), torch.zeros(num, dtype=torch.int64)
    F.linear_cross_entropy(ones, weight, first, reduction="sum", options=tokens).backward()
    assert weight.grad.abs().max() < num / 4, "its sum over tiles stops where bf16 can't count on"


@pytest.mark.parametrize("tile", TILES)
def test_bf16_is_as_near_to_the_truth_as_the_plain_loss(tile):
    ours, theirs, truth = case(torch.bfloat16), case(torch.bfloat16), case(torch.bfloat16)
    exact = SimpleNamespace(**{k: v if k == "labels" else v.detach().double() for k, v in vars(truth).items()})
    for t in (exact.hidden, exact.weight, exact.bias):
        t.requires_grad_()
    expected = run(exact, plain(exact, acc=torch.float64))
    loss, plain_loss = run(ours, tiled_cross_entropy(**vars(ours), tile=tile)), run(theirs, plain(theirs))

    def errors(result):
        return torch.stack([(a.double() - e).norm() / e.norm() for a, e in zip(result[1], expected[1], strict=True)])

    assert (errors(loss) <= 1.1 * errors(plain_loss)).all()
    # Logits below 16 that are rounded to 8 bits: half of 2^-4 each, and their errors average out in the mean.
    assert (loss[0] - expected[0]).abs() <= 2**-5
    assert [g.dtype for g in loss[1]] == [torch.bfloat16] * 3


def test_the_weights_gradient_is_summed_in_fp32_over_tiles():
    """Tiles of one token in bf16: 16-bit sums would lose most of them."""
    num, dtype = 4096, torch.bfloat16
    hidden, weight = torch.ones(num, 1, dtype=dtype), torch.zeros(2, 1, dtype=dtype, requires_grad=True)
    tiled_cross_entropy(hidden, weight, torch.zeros(num, dtype=torch.int64), tile=1, reduction="sum").backward()
    assert weight.grad.tolist() == [[-num / 2], [num / 2]]  # a 16-bit sum stops at 256 halves


@pytest.mark.parametrize("only", ["hidden", "weight", "bias"])
def test_one_input_alone_may_want_a_gradient(only):
    ours, theirs = case(), case()
    for c in (ours, theirs):
        for name in {"hidden", "weight", "bias"} - {only}:
            getattr(c, name).requires_grad_(False)
    tiled_cross_entropy(**vars(ours), tile=5).backward()
    plain(theirs).backward()
    assert [g is None for g in grads(ours)] == [g is None for g in grads(theirs)]
    assert_near([getattr(ours, only).grad], [getattr(theirs, only).grad], tolerance(torch.float32))


def test_without_gradients_only_the_loss_is_computed():
    c = case()
    with torch.no_grad():
        loss, (largest, products) = watched(lambda: tiled_cross_entropy(**vars(c), tile=5))
    assert not loss.requires_grad
    assert torch.equal(loss, tiled_cross_entropy(**vars(c), tile=5).detach())
    assert products == 0


class Watch(TorchDispatchMode):
    """The most elements of a result [.., V] other than the transposed weight, and the number of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (V,) and tensor.shape != (H, V):
                self.largest = max(self.largest, tensor.numel())
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default)
        return out


def watched(function):
    with Watch() as watch:
        result = function()
    return result, (watch.largest, watch.products)


@pytest.mark.parametrize("tile", [1, 5, 16])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_no_more_logits_exist_than_a_tile_has(tile, smoothing):
    c = case()
    _, (largest, products) = watched(
        lambda: tiled_cross_entropy(**vars(c), tile=tile, label_smoothing=smoothing).backward()
    )
    assert largest == tile * V
    assert products >= 2  # the watch sees inside of the loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_kept_for_backward_are_those_of_the_note(dtype):
    c, n = case(dtype, has_bias=False), B * S
    kept = (c.hidden, c.weight, c.labels)
    with SavedBytes(kept) as tiled:
        tiled_cross_entropy(c.hidden, c.weight, c.labels, tile=5)
    assert tiled.nbytes == n * H * dtype.itemsize + V * H * 4 + 8  # and the number of valid tokens
    with SavedBytes(kept) as whole:
        plain(c)
    assert whole.nbytes == n * V * 4 + 4  # and the number of valid tokens, as a float


def test_a_second_backward_gives_the_same_again():
    c = case()
    loss = tiled_cross_entropy(**vars(c), tile=5)
    first = torch.autograd.grad(loss, [c.hidden, c.weight, c.bias], retain_graph=True)
    second = torch.autograd.grad(loss, [c.hidden, c.weight, c.bias])
    assert all(map(torch.equal, first, second))


def test_a_second_derivative_is_refused_by_name():
    c = case()
    with pytest.raises(SuperScaleError, match="tiled cross entropy has no second derivative.*create_graph=True"):
        torch.autograd.grad(tiled_cross_entropy(**vars(c)), c.hidden, create_graph=True)


def test_inside_of_a_checkpoint_nothing_is_kept_and_bits_are_equal():
    ours, theirs = case(), case()
    with SavedBytes((ours.hidden, ours.weight, ours.bias, ours.labels)) as saved:
        loss = checkpoint(lambda h: tiled_cross_entropy(h, ours.weight, ours.labels, tile=5), ours.hidden,
                          use_reentrant=False)  # fmt: skip
    assert saved.nbytes == 0
    loss.backward()
    tiled_cross_entropy(theirs.hidden, theirs.weight, theirs.labels, tile=5).backward()
    assert torch.equal(ours.hidden.grad, theirs.hidden.grad)
    assert torch.equal(ours.weight.grad, theirs.weight.grad)


def test_a_tied_embedding_gets_the_gradients_of_both_uses():
    results = []
    for loss_of in (tiled_cross_entropy, lambda h, w, y: F.cross_entropy(F.linear(h, w).flatten(0, 1), y.flatten())):
        torch.manual_seed(0)
        embedding, labels = nn.Embedding(V, H), torch.randint(0, V, (B, S))
        loss_of(embedding(labels).tanh(), embedding.weight, labels).backward()
        results.append(embedding.weight.grad)
    assert_near(results[:1], results[1:], tolerance(torch.float32))


def test_autocast_decides_the_dtype_of_the_products():
    ours, theirs = case(), case()
    with torch.autocast("cpu", torch.bfloat16):
        loss = tiled_cross_entropy(**vars(ours), tile=B * S)
        expected = plain(theirs)
    run(ours, loss)
    run(theirs, expected)
    assert loss.dtype == torch.float32
    cast = {name: t if name == "labels" else t.detach().bfloat16() for name, t in vars(ours).items()}
    assert torch.equal(loss, tiled_cross_entropy(**cast, tile=B * S))
    # Equal bf16 logits; after them fp32 sums in another order.
    assert (loss - expected).abs() <= tolerance(torch.float32) * expected.abs()
    # The plain loss rounds the logits' gradient to bf16, and each gradient once more. Each rounding is 2^-9 at most, of
    # numbers that cancel to about half.
    assert_near(grads(ours), grads(theirs), 4 * 2**-9)
    # Autocast leaves fp64 alone.
    wide = vars(case(torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = tiled_cross_entropy(**wide)
    assert torch.equal(under_autocast, tiled_cross_entropy(**wide))


def test_sum_and_number_of_valid_tokens():
    c = case(num_ignored=7)
    summed = cross_entropy_sum(**vars(c), tile=5)
    assert summed.num_valid.item() == B * S - 7
    assert summed.num_valid.dtype == torch.int64
    assert torch.equal(summed.total, tiled_cross_entropy(**vars(c), tile=5, reduction="sum"))
    assert torch.equal(summed.mean, tiled_cross_entropy(**vars(c), tile=5))


def test_without_valid_tokens_the_mean_is_nan_and_the_sum_zero():
    c = case(num_ignored=B * S)
    assert tiled_cross_entropy(**vars(c)).isnan()
    loss = tiled_cross_entropy(**vars(c), reduction="sum")
    loss.backward()
    assert loss == 0
    assert not any(g.any() for g in grads(c))


def test_another_index_may_be_ignored_also_one_that_is_a_class():
    ours, theirs = case(), case()
    for c in (ours, theirs):
        c.labels.clamp_(min=0)
    loss = run(ours, tiled_cross_entropy(**vars(ours), ignore_index=0, tile=5))
    expected = run(theirs, plain(theirs, ignore_index=0))
    assert_near([loss[0], *loss[1]], [expected[0], *expected[1]], tolerance(torch.float32))


def test_the_chosen_tile_has_about_as_many_logits_as_there_are_hidden_numbers():
    assert tokens_per_tile(131072, 4096, 131072) == 4096
    assert tokens_per_tile(100, 64, 32) == 128
    assert tokens_per_tile(1, 64, 32000) == 1
    assert tokens_per_tile(0, 64, 32000) == 1


def test_a_tile_of_a_short_sequence_has_no_more_logits_than_the_weight_has_numbers():
    assert tokens_per_tile(1024, 1024, 32000) == 256, "by hidden numbers it would be 32"
    assert tokens_per_tile(1024, 64, 32000) == 64
    assert tokens_per_tile(100, 1024, 32000) == 128


REFUSED = {
    "expected hidden": {"hidden": torch.zeros(B, S, H + 1)},
    "expected a bias of shape": {"bias": torch.zeros(V - 1)},
    "expected labels of shape": {"labels": torch.zeros(B, S + 1, dtype=torch.int64)},
    "Probabilities as targets": {"labels": torch.zeros(B, S)},
    "of one floating dtype, or autocast; found torch.float32, torch.bfloat16": {
        "weight": torch.zeros(V, H, dtype=torch.bfloat16)
    },
    r"label_smoothing is in \[0, 1\]; found 1.5": {"label_smoothing": 1.5},
    "tile is a number of tokens of at least 1": {"tile": 0},
    "reduction is 'mean' or 'sum'; found 'none'": {"reduction": "none"},
    r"classes in \[0, 50\) or ignore_index \(-100\); found 50": {"labels": torch.full((B, S), V)},
    "found -1": {"labels": torch.full((B, S), -1)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused_by_name(message):
    with pytest.raises(SuperScaleError, match=message):
        tiled_cross_entropy(**{**vars(case()), **REFUSED[message]})


def _sharded(rank, world_size, dtype, smoothing):
    """The loss and gradients of rows that are divided unevenly, and what is refused."""
    mesh = build_mesh(MeshSpec(tensor=world_size), timedelta(seconds=30))
    ranks, c = AxisCollectives(mesh.tensor, mesh), case(dtype)
    bounds = [0, 18, V] if world_size == 2 else [0, 7, 8, V]
    rows = slice(bounds[rank], bounds[rank + 1])
    weight, bias = (t.detach()[rows].clone().requires_grad_() for t in (c.weight, c.bias))
    options = {"ranks": ranks, "first_row": rows.start, "vocab_size": V, "label_smoothing": smoothing, "tile": 5}
    mesh.counts.clear()
    summed = vocab_parallel_cross_entropy_sum(c.hidden, weight, c.labels, bias=bias, **options)
    calls = dict(mesh.counts.calls)
    (summed.mean * 0.3).backward()
    assert mesh.counts.calls == calls, "backward runs no collective"
    with torch.no_grad():
        again = vocab_parallel_cross_entropy_sum(c.hidden, weight, c.labels, bias=bias, **options)
    assert torch.equal(again.total, summed.total.detach())
    for wrong in ({"first_row": V - rows.stop + rows.start + 1}, {"vocab_size": rows.stop - 1}):
        with pytest.raises(SuperScaleError, match="are not within the vocabulary"):
            vocab_parallel_cross_entropy_sum(c.hidden, weight, c.labels, **{**options, **wrong})
    if dtype == torch.float32:
        sharded = DTensor.from_local(weight.detach(), init_device_mesh("cpu", (world_size,)))
        with pytest.raises(SuperScaleError, match="weight is a DTensor"):
            tiled_cross_entropy(c.hidden, sharded, c.labels)
    return summed.mean.detach(), c.hidden.grad, weight.grad, bias.grad, calls


@pytest.mark.parametrize(
    ("world_size", "dtype", "smoothing"), [(2, torch.float32, 0.0), (2, torch.float64, 0.2), (3, torch.float32, 0.2)]
)
def test_a_vocabulary_over_ranks_gives_the_loss_of_one_process(world_size, dtype, smoothing):
    whole = case(dtype)
    expected, (hidden, weight, bias) = run(whole, plain(whole, acc=dtype, label_smoothing=smoothing), 0.3)
    results = run_ranks(world_size, _sharded, dtype, smoothing, limit_s=60)
    for one in results:
        assert torch.equal(one[0], results[0][0]), "all ranks have the same loss"
        assert torch.equal(one[1], results[0][1]), "all ranks have the same gradient of hidden"
        assert one[4] == {"all_gather": -(-B * S // 5), "all_reduce": 1}
    mine = [results[0][0], results[0][1], torch.cat([r[2] for r in results]), torch.cat([r[3] for r in results])]
    assert_near(mine, [expected * 1.0, hidden, weight, bias], tolerance(dtype))


class Wide(TorchDispatchMode):
    """Plays the product of 16-bit matrices with a wide result, which a CPU lacks."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.dtype:
            return torch.mm(args[0].to(args[2]), args[1].to(args[2]))
        return func(*args, **(kwargs or {}))


def test_on_a_device_with_streams_16_bit_products_are_added_up_in_fp32(monkeypatch):
    expected = case(torch.bfloat16)
    tiled_cross_entropy(**vars(expected), tile=5).backward()
    monkeypatch.setattr(events, "STREAMED_DEVICE_TYPES", frozenset({"cpu"}))
    monkeypatch.setattr(tiled_loss, "_ROWS_AT_A_TIME", 7)
    c = case(torch.bfloat16)
    with Wide():
        tiled_cross_entropy(**vars(c), tile=5).backward()
    # The logits' gradient is rounded to bf16 before the product: 2^-9 of each term. Terms cancel to no less than an
    # eighth, and the sum is rounded once more.
    assert_near([c.weight.grad], [expected.weight.grad], 2**-6 + 2**-9)
    assert torch.equal(c.hidden.grad, expected.hidden.grad)
