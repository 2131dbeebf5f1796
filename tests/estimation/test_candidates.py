"""The strategies that are compared: each line makes what was estimated."""

from __future__ import annotations

import pytest

import lightning_superscale as lss
from lightning_superscale.config import OffloadConfig, SequenceConfig, ZeroConfig
from lightning_superscale.estimation.candidates import Candidate, candidates
from lightning_superscale.plugins.registry import STRATEGY_NAMES

NAMES = {name: getattr(lss, name) for name in lss.__all__}
OWN = [
    Candidate(ZeroConfig(stage=2, bucket_mb=8)),
    Candidate(ZeroConfig(stage=3), OffloadConfig(engine="cpu")),
    Candidate(ZeroConfig(), OffloadConfig(bucket_mb=4)),
]


@pytest.mark.parametrize("one", [*candidates(1), *candidates(8), *OWN], ids=lambda one: one.line())
@pytest.mark.parametrize(
    "sequence", [None, SequenceConfig(checkpoint_blocks="auto", tile_loss=False), SequenceConfig(size=4)]
)
def test_a_line_makes_the_strategy(one: Candidate, sequence):
    line = one.line(sequence).removeprefix("strategy=")
    made = eval(line, dict(NAMES))
    if isinstance(made, str):
        class_name, arguments, _ = STRATEGY_NAMES[made]
        made = NAMES[class_name](**arguments)
    assert (made.zero_config, made.offload_config) == (one.zero, one.offload)
    assert made.sequence_config == sequence


def test_names_are_of_registered_strategies():
    named = {one.name for one in candidates(8)} - {None}
    assert named == STRATEGY_NAMES.keys()


def test_only_zenflow_is_another_optimizer():
    for ranks in (1, 8):
        assert [one.name for one in candidates(ranks) if not one.is_exact] == ["zenflow"]
        assert candidates(ranks)[-1].name == "zenflow"
