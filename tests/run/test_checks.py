"""One rank refuses what several would, and a limit that clips nothing is not taken without a word."""

from __future__ import annotations

import pytest
import torch

import lightning_superscale as lss
from lightning_superscale.run.checks import check_clip_value, facts_of_run
from tests.helpers.trainers import Regressor, fit

STRATEGIES = ["superscale", "superoffload", "zero3"]


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_a_wrap_that_matches_nothing_is_refused_on_one_rank(offload):
    strategy = lss.SuperScaleStrategy(zero={"stage": 3, "wrap": ["Liner"]}, offload=offload)
    with pytest.raises(lss.SuperScaleError, match="wrap='Liner' matches no module of Regressor; did you mean 'Linear'"):
        fit(Regressor(), strategy)


def test_a_wrap_that_matches_trains_on_one_rank():
    fit(Regressor(), lss.SuperScaleStrategy(zero={"stage": 3, "wrap": ["Linear", torch.nn.Linear]}))


def test_a_shard_size_that_does_not_divide_is_refused_on_one_rank():
    strategy = lss.SuperScaleStrategy(zero={"stage": 2, "shard_size": 3})
    with pytest.raises(
        lss.SuperScaleError, match="shard_size=3 does not divide the 1 data-parallel rank. Use one of 1"
    ):
        fit(Regressor(), strategy)
    fit(Regressor(), lss.SuperScaleStrategy(zero={"stage": 2, "shard_size": 1}))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("limit", [-1.0, float("nan")])
def test_a_negative_or_nan_gradient_clip_val_is_refused(strategy, limit):
    with pytest.raises(lss.SuperScaleError, match="gradient_clip_val must be a number of at least 0 or None, found"):
        fit(Regressor(), strategy, gradient_clip_val=limit)


@pytest.mark.parametrize("limit", [-0.5, float("nan")])
def test_a_negative_or_nan_limit_of_the_users_own_call_is_refused(limit):
    class Clips(Regressor):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            self.clip_gradients(optimizer, limit, "norm")

    with pytest.raises(lss.SuperScaleError, match="clip_val must be a number of at least 0 or None, found"):
        fit(Clips(), "superscale")


@pytest.mark.parametrize("limit", [None, 0, 0.0, 1, 0.5, float("inf")])
def test_limits_that_mean_something_pass(limit):
    check_clip_value("gradient_clip_val", limit)


def test_ranks_compare_how_they_share_sequences():
    def facts(sequence):
        return facts_of_run(torch.nn.Linear(2, 2), [], lss.ZeroConfig(), None, "32-true", sequence)

    differing = {key for key, value in facts(lss.SequenceConfig(mode="ring")).items() if facts(None)[key] != value}
    assert differing == {"sequence"}
