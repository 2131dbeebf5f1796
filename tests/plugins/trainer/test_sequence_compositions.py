"""Sequences shared among ranks in every composition: the weights of a fit are those of one process.

Tolerance: ranks add the same gradients of tokens in another order, which is one more evaluation, in the same precision,
of the training that fp64 gives exactly. Roundoff takes it about as far from that as it takes one process. Four times as
far is allowed from one process: twice for two such runs, and twice for luck. In fp32 the largest difference of weights
is compared, and is at most 1e-5 of the largest way that a weight went. In 16 bits single weights round to the one or
the other neighbour, so that the largest difference says nothing, and the mean is compared. In bf16-true weights round
too, both runs' mostly alike, so that their distance from fp64 says nothing about that between them, which is at most a
fiftieth of the mean way.
A part of the tokens that is missing or counted twice is off by the whole way: each test checks that its tolerance is
at most a twentieth of that.
"""

from __future__ import annotations

import pytest
import torch

from tests.helpers.extent import IS_ALL
from tests.helpers.ranks import run_ranks
from tests.helpers.sequence_matrix import (
    Case,
    Composed,
    Trained,
    all_pairs,
    alone,
    every,
    pairs_of,
    pairwise,
    shared_all,
)

CASES = [*pairwise(), *(every() if IS_ALL else [])]
# So many fits share their ranks.
_AT_ONCE = 40
_GROUPS = [
    (world_size, cases[at : at + _AT_ONCE])
    for world_size in (2, 4)
    for cases in [[case for case in CASES if case.layout.world_size == world_size]]
    for at in range(0, len(cases), _AT_ONCE)
]


def test_every_pair_of_levels_is_in_some_composition():
    assert set().union(*map(pairs_of, pairwise())) == all_pairs()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("world_size", "cases"), _GROUPS, ids=[f"{n} ranks {cases[0]}" for n, cases in _GROUPS])
def test_weights_are_those_of_one_process(world_size, cases):
    per_rank = run_ranks(world_size, shared_all, cases, limit_s=600.0)
    for number, case in enumerate(cases):
        check(case, [results[number] for results in per_rank])


def check(case: Case, found: list[Trained]) -> None:
    expected, exact = alone(case), alone(case, torch.float64)
    start = {name.replace(".block", ""): weight.double() for name, weight in Composed(case).state_dict().items()}
    way, noise = difference(case, expected.weights, start), difference(case, expected.weights, exact.weights)
    allowed = 4 * noise
    if case.precision == "32-true":
        allowed = min(allowed, 1e-5 * way)
    if case.precision == "bf16-true":
        allowed = way / 50
    assert allowed <= way / 20, (case, noise, way)
    for rank, one in enumerate(found):
        off = difference(case, one.weights, expected.weights)
        assert off <= allowed, (case, rank, off, allowed, way)
        for name, weight in one.weights.items():
            assert torch.equal(weight, found[0].weights[name]), (case, rank, name)
        assert f"sequence={case.layout.size}: " in one.explained, case


def difference(case: Case, weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """The largest difference of two models' weights; in 16 bits its mean."""
    each = torch.cat([(weights[name] - other).abs().flatten() for name, other in others.items()])
    return float(each.max() if case.precision == "32-true" else each.mean())
