"""The settings of an estimate."""

from __future__ import annotations

import pytest
import torch

from lightning_superscale.config import OffloadConfig, SequenceConfig, ZeroConfig
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.estimation.setup import Setup
from lightning_superscale.run.precision import choose


def setup(stage=0, precision="bf16-true", **more) -> Setup:
    return Setup(zero=ZeroConfig(stage=stage), offload=None, precision=choose(precision), **more)


@pytest.mark.parametrize(("stage", "shards"), [(0, 1), (1, 8), (3, 8)])
def test_stages_share_states(stage, shards):
    assert setup(stage, num_ranks=8).num_shards == shards
    assert setup(stage, num_ranks=8).shards_weights == (stage == 3)
    assert not setup(stage).shards_weights


def test_ranks_that_share_a_sequence_share_states_too():
    found = setup(2, num_ranks=8, sequence=SequenceConfig(size=4))
    assert (found.num_shards, found.mesh.sequence, found.mesh.shard) == (8, 4, 2)


def test_an_axis_that_does_not_fit_is_refused():
    with pytest.raises(SuperScaleError, match="does not divide"):
        _ = setup(2, num_ranks=8, sequence=SequenceConfig(size=3)).num_shards


def test_gradients_leave_for_a_host_or_for_other_ranks():
    assert not setup().streams
    assert setup(num_ranks=2).streams
    assert Setup(zero=ZeroConfig(), offload=OffloadConfig(), precision=choose("32-true")).streams


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("bf16-mixed", torch.float32)])
def test_true_precisions_cast_what_is_of_floating_point(precision, dtype):
    assert setup(precision=precision).dtype_of(torch.empty(1)) == dtype
    assert setup(precision=precision).dtype_of(torch.empty(1, dtype=torch.int64)) == torch.int64
