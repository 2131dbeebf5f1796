"""Training with sequences shared among ranks is training on one process, with every stage and engine.

Tolerance: losses near 20 in fp32 have roundings of 2^-24 * 20 = 1e-6, and differ by a few of them where sums over
tokens are taken in another order. Adam divides a gradient by its own size, so the smallest ones, which are right to few
digits, move weights by other steps of 1e-2; 3e-4 is a thirtieth of one, and 1e-3 what logits make of it. A part that is
missing or counted twice turns whole steps, of all eight.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.data import DataLoader

from tests.helpers.ranks import run_ranks
from tests.helpers.sequence import LanguageModel, Texts, assert_trained_alike, fitted
from tests.helpers.trainers import trainer

CASES = {
    "ddp": {"zero": 0},
    "zero1": {"zero": 1},
    "zero2": {"zero": 2},
    "zero3": {"zero": 3},
    "cpu": {"zero": 2, "offload": "cpu"},
    "superoffload": {"zero": 2, "offload": "superoffload"},
    "zero3 superoffload": {"zero": 3, "offload": "superoffload"},
    "ring": {"zero": 2, "sequence": {"size": 2, "mode": "ring"}},
    "gather": {"zero": 2, "sequence": {"size": 2, "mode": "allgather"}},
    "chunks": {"zero": 1, "sequence": {"size": 2, "head_chunks": 2}},
}


def trained(world_size, options):
    module = LanguageModel()
    run = fitted(world_size, options, Texts(), module=module, validation=Texts(4))
    explained, metrics = run.strategy.explain(), {key: float(value) for key, value in run.callback_metrics.items()}
    predicted = run.predict(module, DataLoader(Texts(4), 2))
    with torch.no_grad():
        weights = {name: param.detach().clone() for name, param in module.named_parameters()}
    return module.losses, metrics, predicted, weights, explained


class Flexible(LanguageModel):
    """Attends by flex_attention, which torch only evaluates on the CPU."""

    def predict_step(self, batch, batch_idx):
        x = self.model.embed(batch[0]).unflatten(-1, (4, -1)).transpose(1, 2)
        return flex_attention(x, x, x, lambda score, b, h, i, j: score + h * (j - i)).transpose(1, 2).flatten(2)


def flex_predicted(world_size):
    from lightning_superscale import SuperScaleStrategy

    run = trainer(SuperScaleStrategy(sequence=world_size), devices=world_size)
    return run.predict(Flexible(), DataLoader(Texts(2), 2))[0]


def _all(rank, world_size):
    found = {"flex": flex_predicted(world_size)}
    for name, options in CASES.items():
        found[name] = trained(world_size, {"sequence": world_size, **options})
    return found


@pytest.fixture(scope="module")
def shared():
    return run_ranks(2, _all, limit_s=200.0)


@pytest.fixture(scope="module")
def alone():
    return trained(1, {})


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_evaluates_as_on_one_process(shared):
    expected = flex_predicted(1)
    for rank in range(2):
        torch.testing.assert_close(shared[rank]["flex"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_losses_metrics_predictions_and_weights_are_those_of_one_process(shared, alone, name):
    for rank in range(2):
        assert_trained_alike(shared[rank][name], alone)
        explained = shared[rank][name][-1]
        assert "4 heads, 4 of keys and values, attend by" in explained
