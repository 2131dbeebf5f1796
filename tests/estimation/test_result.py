"""What is recommended of several strategies."""

from __future__ import annotations

import json

import pytest

from lightning_superscale.estimation.peak import Moment
from lightning_superscale.estimation.result import Estimate, StrategyEstimate
from lightning_superscale.estimation.step_time import StepTime
from lightning_superscale.run.report.plan import ByteClass


def one(line: str, seconds: float, *, why_not: str | None = None, is_exact: bool = True) -> StrategyEstimate:
    return StrategyEstimate(
        line=line,
        is_exact=is_exact,
        checkpoints_blocks=False,
        bytes=[ByteClass("weights", "bfloat16", 4, 0)],
        peak=Moment(kept=4, batch=1, activations=2, gradients=3, transfers=5),
        host_bytes=0,
        device_share=0.0,
        why_not=why_not,
        time=StepTime(forward=seconds, backward=0.0, optimizer=0.0, ranks=0.0),
        tokens_per_s=1.0,
        mfu=0.5,
        largest_params=None,
        longest_sequence=None,
    )


def estimate(*strategies: StrategyEstimate) -> Estimate:
    return Estimate(
        model="Model",
        num_params=2,
        num_trainable=2,
        num_ranks=1,
        device="A100",
        device_memory=100,
        host_memory=100,
        num_tokens=1,
        unit="tokens",
        strategies=strategies,
        assumptions=["none"],
    )


@pytest.mark.parametrize(
    ("strategies", "best"),
    [
        ([one("a", 1.0), one("b", 0.5)], "b"),
        ([one("a", 1.02), one("b", 1.0)], "a"),
        ([one("a", 1.0), one("b", 0.5, why_not="too large")], "a"),
        ([one("a", 1.0), one("b", 0.5, is_exact=False)], "a"),
        ([one("a", 1.0, why_not="too large"), one("b", 0.5, is_exact=False)], None),
    ],
)
def test_the_fastest_exact_strategy_that_fits(strategies, best):
    found = estimate(*strategies)
    assert (found.recommended and found.recommended.line) == best
    content = json.loads(json.dumps(found.to_dict()))
    assert content["recommended"] == best
    assert content["strategies"][0]["peak"]["total"] == 15
    assert content["strategies"][0]["time"]["total"] == strategies[0].time.total
