"""AdamW on some rows of its states, as a technique that steps a part of each parameter needs it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from lightning_superscale.ops.cpu import adamw
from lightning_superscale.ops.cpu.pool import Pool
from lightning_superscale.ops.types import AdamWHyper, AdamWSegment, Rounding, RowSelection
from tests.ops.paths import BF16, F16, F32, PATHS, running, same, values

HYPER = AdamWHyper(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=3, grad_scale=0.37, ieee_sqrt=True)
RUNS = {
    "adamw_commit": adamw.adamw_commit,
    "adamw_peek": adamw.adamw_peek,
    "adamw_commit_peek": adamw.adamw_commit_peek,
}
STATES = ("param", "exp_avg", "exp_avg_sq", "compensation")
# (rows of the states, elements of a row, selected rows)
SHAPES = [
    (7, 5, [0, 2, 3, 6]),
    (40, 333, [*range(3, 20), 22, 39]),
    (6, 70_001, [1, 2, 5]),  # rows longer than a chunk
    (3000, 11, sorted({*range(0, 3000, 7), *range(1000, 1400)})),
    (4, 16, []),
    (1, 1, [0]),
]


def segment(num_rows, row_numel, rows, *, grad=F32, master=F32, moments=F32, out=BF16, **changed) -> AdamWSegment:
    numel, chosen = num_rows * row_numel, len(rows) * row_numel
    made = AdamWSegment(
        param=values(numel, master),
        exp_avg=values(numel, moments, seed=1, scale=1e-2),
        exp_avg_sq=values(numel, moments, seed=2, scale=1e-3).abs(),
        grad=values(chosen, grad, seed=3),
        next_grad=values(chosen, grad, seed=4),
        hyper=HYPER,
        next_hyper=dataclasses.replace(HYPER, lr=3e-2, step=4),
        weight_out=None if out is None else torch.zeros(chosen, dtype=out),
        selection=RowSelection(torch.tensor(rows, dtype=torch.int64), row_numel, row_numel),
    )
    return dataclasses.replace(made, **changed)


def row_by_row(run, seg: AdamWSegment) -> AdamWSegment:
    """The oracle: every selected row is a segment of its own, without a selection."""
    own = dataclasses.replace(
        seg,
        **{name: getattr(seg, name).clone() for name in STATES if getattr(seg, name) is not None},
        weight_out=None if seg.weight_out is None else seg.weight_out.clone(),
    )
    chosen = seg.selection
    parts = []
    for at, row in enumerate(chosen.rows.tolist()):
        there = slice(row * chosen.row_numel, (row + 1) * chosen.row_numel)
        here = slice(at * chosen.row_numel, (at + 1) * chosen.row_numel)
        numbers = {}
        if seg.rounding is not None:
            first = seg.rounding.first_element + row * chosen.row_stride
            numbers = {"rounding": dataclasses.replace(seg.rounding, first_element=first)}
        parts.append(
            dataclasses.replace(
                own,
                **{name: getattr(own, name)[there] for name in STATES if getattr(own, name) is not None},
                grad=own.grad[here],
                next_grad=own.next_grad[here],
                weight_out=None if own.weight_out is None else own.weight_out[here],
                selection=None,
                **numbers,
            )
        )
    run(parts)
    return own


def check(run, seg: AdamWSegment, pool: Pool | None = None) -> None:
    expected = row_by_row(run, seg)
    grad = seg.next_grad if run is adamw.adamw_commit_peek else seg.grad
    hyper = seg.next_hyper if run is adamw.adamw_commit_peek else seg.hyper
    (stats,) = run([seg], stats=True, pool=pool)
    for name in (*STATES, "weight_out"):
        a, b = getattr(seg, name), getattr(expected, name)
        assert (a is None) == (b is None)
        assert a is None or same(a, b), name
    assert math.isclose(stats.sumsq, float((grad.double() * hyper.grad_scale).square().sum()), rel_tol=1e-5, abs_tol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", RUNS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_selected_rows_are_stepped_as_by_themselves_and_no_other_element_changes(path, mode, shape):
    with running(path):
        check(RUNS[mode], segment(*shape))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", RUNS)
@pytest.mark.parametrize(
    "changed",
    [
        {"lr": 1e-3, "clip_value": 0.1},
        {"decoupled": False},
        {"maximize": True},
        {"beta1": 0.3},
        {"ieee_sqrt": False},
    ],
    ids=str,
)
def test_any_hyperparameters(path, mode, changed):
    seg = segment(*SHAPES[1], grad=BF16, out=F16)
    seg.hyper, seg.next_hyper = (
        dataclasses.replace(seg.hyper, **changed),
        dataclasses.replace(seg.next_hyper, **changed),
    )
    with running(path):
        check(RUNS[mode], seg)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", RUNS)
@pytest.mark.parametrize("row_stride", [333, 1001])
@pytest.mark.parametrize("is_compensated", [False, True])
def test_random_numbers_follow_the_elements_of_the_whole_parameter(path, mode, row_stride, is_compensated):
    num_rows, row_numel, rows = SHAPES[1]
    seg = segment(
        num_rows,
        row_numel,
        rows,
        grad=BF16,
        master=BF16,
        moments=BF16,
        rounding=Rounding(True, key=77, first_element=5),
        compensation=values(num_rows * row_numel, BF16, seed=9, scale=1e-4) if is_compensated else None,
    )
    seg.selection = RowSelection(seg.selection.rows, row_numel, row_stride)
    with running(path):
        check(RUNS[mode], seg)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", RUNS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_without_the_others_between_them_keep_their_random_numbers(path, mode, shape):
    num_rows, row_numel, rows = shape
    seg = segment(*shape, grad=BF16, master=BF16, moments=BF16, rounding=Rounding(True, key=77, first_element=5))
    chosen = seg.selection = RowSelection(seg.selection.rows, row_numel, row_numel + 3)

    def of_rows(state):
        return state.view(num_rows, row_numel)[chosen.rows].view(-1)

    states = {name: of_rows(getattr(seg, name)) for name in STATES if getattr(seg, name) is not None}
    compact = dataclasses.replace(
        seg, **states, weight_out=seg.weight_out.clone(), selection=dataclasses.replace(chosen, is_compact=True)
    )
    with running(path):
        RUNS[mode]([seg])
        RUNS[mode]([compact])
    assert same(compact.weight_out, seg.weight_out)
    for name in states:
        assert same(getattr(compact, name), of_rows(getattr(seg, name)))


@pytest.mark.parametrize("path", PATHS)
def test_new_weights_may_take_the_place_of_the_gradient(path):
    with running(path):
        apart, together = segment(*SHAPES[3], grad=BF16), segment(*SHAPES[3], grad=BF16)
        together.weight_out = together.grad
        adamw.adamw_commit([apart])
        adamw.adamw_commit([together])
    assert same(apart.weight_out, together.weight_out)
    assert same(apart.param, together.param)


def test_submitted_work_keeps_the_rows_that_it_reads():
    pool = Pool(2)
    seg, expected = segment(*SHAPES[1]), segment(*SHAPES[1])
    adamw.adamw_commit([expected])
    ticket = adamw.submit_adamw_commit([seg], pool=pool, held=True)
    seg.selection = None  # the caller's last reference to the rows
    ticket.release()
    ticket.wait()
    pool.close()
    assert same(seg.param, expected.param)


WRONG = {
    "descending": (lambda: RowSelection(torch.tensor([2, 1]), 4, 4), ValueError, "ascending"),
    "twice": (lambda: RowSelection(torch.tensor([1, 1]), 4, 4), ValueError, "each once"),
    "negative": (lambda: RowSelection(torch.tensor([-1, 1]), 4, 4), ValueError, "from 0 on"),
    "int32": (lambda: RowSelection(torch.tensor([1], dtype=torch.int32), 4, 4), TypeError, "int64"),
    "row_numel": (lambda: RowSelection(torch.tensor([1]), 0, 4), ValueError, "row_numel >= 1"),
    "row_stride": (lambda: RowSelection(torch.tensor([1]), 4, 3), ValueError, "row_stride >= row_numel"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_selections_are_refused_when_they_are_made(case):
    make, error, said = WRONG[case]
    with pytest.raises(error, match=said):
        make()


@pytest.mark.parametrize("path", [PATHS[0], PATHS[-1]])
@pytest.mark.parametrize(
    ("num_rows", "row_numel", "rows", "said"),
    [
        (3, 4, [0, 3], "at least 16 elements for the last row of the selection, found 12"),
        (3, 4, [0, 1], "grad: expected 8 elements of the selected rows, found 12"),
    ],
)
def test_a_selection_that_does_not_fit_its_segment_is_refused(path, num_rows, row_numel, rows, said):
    seg = segment(num_rows, row_numel, [0, 1, 2])
    seg.selection = RowSelection(torch.tensor(rows), row_numel, row_numel)
    with running(path), pytest.raises(ValueError, match=said):
        adamw.adamw_commit([seg])
