"""No run has a race, and every bug that is planted is found."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch

from lightning_superscale.comm import collectives
from lightning_superscale.zero.buckets import all_gather
from tests.helpers.extent import only_in_test_all
from tests.helpers.programs import (
    block_applied_three_times_reentrant_checkpoint,
    data_dependent_branch,
    extra_backward_of_a_part,
    plain_backward,
)
from tests.helpers.ranks import run_ranks
from tests.races.cases import WAYS, ZENFLOW_WAYS, Case, all_cases, run, train_stack
from tests.races.plants import PLANTS, PLANTS_OVER_RANKS
from tests.races.ranks import run_buckets, run_sharded


def assert_clean(case, races) -> None:
    assert not races, f"{case}:\n" + "\n".join(map(str, races))


FEW = [
    *(Case(way, program, flows, queries=queries) for (way, program), flows, queries in zip(
        itertools.product(WAYS, (train_stack, extra_backward_of_a_part, data_dependent_branch)),
        itertools.cycle((False, True, True, False, True)),
        itertools.cycle(("no", "random", "yes")),
    )),
    *(Case(way, looks=True, flows=flows, queries="no") for way, flows in itertools.product(WAYS, (False, True))),
    *(Case(way, regroups=True, queries="no") for way in WAYS),
    *(Case(way, plain_backward, dtype=torch.bfloat16, link_dtype="fp32", clip=None, queries="no") for way in WAYS),
    *(Case(way, block_applied_three_times_reentrant_checkpoint, flows=True, dtype=torch.bfloat16) for way in WAYS),
    *(
        Case(way, program, dtype=dtype, queries=queries)
        for (way, program, dtype), queries in zip(
            itertools.product(ZENFLOW_WAYS, (train_stack, extra_backward_of_a_part), (torch.float32, torch.bfloat16)),
            itertools.cycle(("no", "random", "yes")),
        )
    ),
    *(Case(way, regroups=True, looks=True, queries="no") for way in ZENFLOW_WAYS),
]  # fmt: skip


@pytest.mark.parametrize("case", FEW, ids=str)
def test_no_access_is_without_an_order(case):
    world = run(case)
    assert world.num_accesses > 100
    assert_clean(case, world.races)


@only_in_test_all
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(8))
def test_no_access_of_any_case_is_without_an_order(part):
    for case in list(all_cases())[part::8]:
        assert_clean(case, run(case).races)


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_found(name):
    bug, case = PLANTS[name]
    assert_clean(case, run(case).races)
    assert run(case, plant=bug).races


# Over ranks

FEW_OVER_RANKS = [
    (run_buckets, Case("superoffload", queries="no", no_sync=False)),
    (run_buckets, Case("superoffload", extra_backward_of_a_part, queries="no", looks=True)),
    (run_buckets, Case("superoffload", flows=True, queries="no", looks=True)),
    (run_buckets, Case("superoffload, held", flows=True, queries="yes")),
    (run_buckets, Case("cpu", queries="no", looks=True)),
    (run_buckets, Case("cpu, held", flows=True)),
    (run_buckets, Case("superoffload", queries="no", regroups=True)),
    (run_sharded, Case("superoffload", queries="no")),
    (run_sharded, Case("cpu", queries="no")),
    (run_buckets, Case("zenflow", queries="no")),
]


def _races(rank: int, num_ranks: int, runs):
    found = []
    for how, case, *plant in runs:
        world = how(rank, num_ranks, case, *plant)
        found.append((world.num_accesses, [str(race) for race in world.races]))
    return found


def assert_clean_over_ranks(runs) -> None:
    for found in run_ranks(2, _races, runs):
        for (how, case), (num_accesses, races) in zip(runs, found, strict=True):
            assert num_accesses > 100
            assert_clean(f"{how.__name__}, {case}", races)


def test_no_access_over_ranks_is_without_an_order():
    assert_clean_over_ranks(FEW_OVER_RANKS)


@only_in_test_all
@pytest.mark.parametrize("way", WAYS)
def test_no_access_of_any_case_over_ranks_is_without_an_order(way):
    programs = (train_stack, plain_backward, extra_backward_of_a_part)
    for queries in ("no", "yes", "random"):
        assert_clean_over_ranks([(run_sharded, Case(way, queries=queries))])
        for flows in (False, True):
            runs = itertools.product(programs, (False, True), (torch.float32, torch.bfloat16))
            assert_clean_over_ranks(
                [(run_buckets, Case(way, p, flows, dtype=d, looks=looks, queries=queries)) for p, looks, d in runs]
            )


def test_bugs_planted_over_ranks_are_found():
    runs = [(how, case, bug) for bug, how, case in PLANTS_OVER_RANKS.values()]
    for found in run_ranks(2, _races, runs):
        for name, (_, races) in zip(PLANTS_OVER_RANKS, found, strict=True):
            assert races, name


# One order per device


def skips_the_end_of_every_other_batch(model, x) -> None:
    """Then nobody has waited for the end's new weights when the batch is reduced."""
    h = model.block(model.inp(x))
    (model.out(h) if x.sum() > 0 else h).float().pow(2).mean().backward()


def _issued(rank: int, num_ranks: int, is_ordered: bool):
    def slowly(patch):
        gather, reduce = all_gather.GatherThread._issue, collectives.AxisCollectives.reduce_scatter
        has_reduced = threading.Event()

        def issue(self, unit, event):
            has_reduced.clear()
            if rank == 1 and "out" in unit.full.slices[0].fqn:
                has_reduced.wait(0.3)  # rank 1 is slow, and its backward may begin before this gather
            return gather(self, unit, event)

        def reduce_scatter(self, packed):
            result = reduce(self, packed)
            has_reduced.set()
            return result

        patch.setattr(all_gather.GatherThread, "_issue", issue)
        patch.setattr(collectives.AxisCollectives, "reduce_scatter", reduce_scatter)
        if not is_ordered:
            patch.setattr(collectives.AxisCollectives, "_begin", lambda self: None)

    case = Case(
        "superoffload", skips_the_end_of_every_other_batch, no_sync=False, clip=None, unit_bytes=1, has_two_batches=True
    )
    return run_buckets(rank, num_ranks, case, slowly).issued


def test_every_rank_starts_its_collectives_in_one_order():
    """NCCL's kernels wait for one another on the device."""
    first, second = run_ranks(2, _issued, True)
    assert len(first) > 20
    assert first == second
    first, second = run_ranks(2, _issued, False)
    assert first != second  # the order is ours, not luck
