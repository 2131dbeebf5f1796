"""A simulation as JSON."""

from __future__ import annotations

import json

from lightning_superscale.simulation.result import SimulatedStep, Simulation

STEP = SimulatedStep(
    num_nodes=2,
    num_ranks=16,
    seconds=1.5,
    model=1.0,
    update=0.25,
    waited={"gathers": 0.25},
    slow=0.0,
    tokens_per_s=100.0,
    efficiency=0.5,
    calls={"all_gather": 3},
    nbytes={"all_gather": 300},
    num_classes=1,
    num_events=10,
)
FOUND = Simulation(
    model="Net",
    num_params=7,
    line='strategy="zero3"',
    device="H100 SXM",
    ranks_per_node=8,
    num_tokens=10,
    unit="tokens",
    slow_rank=1.0,
    steps=[STEP],
    assumptions=["none"],
)


def test_all_of_it_is_json():
    assert json.loads(json.dumps(FOUND.to_dict()))["steps"][0]["waited"] == {"gathers": 0.25}
    assert STEP.seconds == STEP.model + STEP.update + sum(STEP.waited.values())
