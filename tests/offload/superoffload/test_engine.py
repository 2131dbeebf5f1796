"""What superoffload's engine forecasts of a step, by the way that the step goes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lightning_superscale.config import OffloadConfig
from lightning_superscale.offload.engine import StepParts
from lightning_superscale.offload.planner.choices import HostWork
from lightning_superscale.offload.planner.forecast import awaited_seconds, exposed_seconds
from lightning_superscale.offload.superoffload.engine import SuperOffloadEngine
from tests.offload.planner.test_choices import H100


def parts(**chooser) -> StepParts:
    """A step of 40 buckets, which take longer on the host than forward does."""
    known = {"plan": "direct", "awaits": False, "has_own_cores": True, "clip_rate": 1.0, **chooser}
    return StepParts(
        config=OffloadConfig(),
        profile=H100,
        work=HostWork(num_params=10**9, link_bytes=2 * 10**9, num_buckets=40),
        forward=0.1,
        backward=0.2,
        states=[],
        rule=SimpleNamespace(chooser=SimpleNamespace(**known)),
        streams=True,
        weights_awaited=False,
    )


def test_the_forecast_is_that_of_the_way_that_was_chosen():
    engine, times = SuperOffloadEngine(), parts().times()
    direct = times.passes.direct * times.host
    found = {
        "hidden": engine.forecast(parts()).exposed,
        "early": engine.forecast(parts(plan="early commit")).exposed,
        "awaited": engine.forecast(parts(awaits=True)).exposed,
        "on the model's cores": engine.forecast(parts(has_own_cores=False)).exposed,
    }
    assert found == pytest.approx(
        {
            "hidden": exposed_seconds(times, "direct", 1.0),
            "early": exposed_seconds(times, "early commit", 1.0),
            "awaited": awaited_seconds(times, direct),
            "on the model's cores": direct,
        }
    )
    assert len({round(seconds, 6) for seconds in found.values()}) == 4
    assert found["hidden"] < found["on the model's cores"] < found["awaited"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"streams": False}, "gradients stay in param.grad"),
        ({"weights_awaited": True}, "new weights are awaited right after the step"),
    ],
)
def test_what_can_not_be_forecast_is_said(change, why):
    step = parts()
    changed = StepParts(**{name: getattr(step, name) for name in StepParts.__slots__} | change)
    found = SuperOffloadEngine().forecast(changed)
    assert found.exposed is None
    assert why in found.why_not
