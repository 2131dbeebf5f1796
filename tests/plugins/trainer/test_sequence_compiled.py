"""Compiled modules whose tokens ranks share train as one process does, at every stage.

Tolerances: those of test_sequence_parallel.py.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from tests.helpers.extent import IS_ALL, only_in_test_all
from tests.helpers.ranks import run_ranks
from tests.helpers.sequence import LanguageModel, Texts, assert_trained_alike, fitted

# The stage and engine, and what is compiled.
CASES = {
    "ddp": ({"zero": 0}, "model"),
    "zero3": ({"zero": 3}, "blocks"),
}
MORE = {
    "zero1": ({"zero": 1, "sequence": {"size": 2, "mode": "ring"}}, "model"),
    "zero2": ({"zero": 2, "sequence": {"size": 2, "mode": "allgather"}}, "in place"),
    "superoffload": ({"zero": 2, "offload": "superoffload"}, "blocks"),
    "zero3 superoffload": ({"zero": 3, "offload": "superoffload"}, "blocks"),
    "zenflow": ({"zero": 2, "offload": {"engine": "zenflow", "zenflow": {"topk": 1.0}}}, "in place"),
}


class Compiled(LanguageModel):
    """Compiles its model, or parts of it."""

    def __init__(self, what: str) -> None:
        super().__init__()
        compile_parts(self, what)


def compile_parts(module: LanguageModel, what: str) -> None:
    if what == "model":
        module.model = torch.compile(module.model, backend="aot_eager")
    elif what == "in place":
        module.model.compile(backend="aot_eager")
    elif what == "blocks":
        for part in (*module.model.mlps, *module.model.attentions):
            part.compile(backend="aot_eager")


def trained(world_size, options, what):
    torch._dynamo.reset()
    module = Compiled(what)
    run = fitted(world_size, options, Texts(), module=module, validation=Texts(4))
    explained, metrics = run.strategy.explain(), {key: float(value) for key, value in run.callback_metrics.items()}
    predicted = run.predict(module, DataLoader(Texts(4), 2))
    with torch.no_grad():
        weights = {name.replace("_orig_mod.", ""): param.detach().clone() for name, param in module.named_parameters()}
    return module.losses, metrics, predicted, weights, explained


def _all(rank, world_size, names):
    found = {}
    for name in names:
        options, what = {**CASES, **MORE}[name]
        found[name] = trained(world_size, {"sequence": world_size, **options}, what)
    return found


@pytest.fixture(scope="module")
def shared():
    return run_ranks(2, _all, [*CASES, *(MORE if IS_ALL else ())], limit_s=500.0 if IS_ALL else 120.0)


@pytest.fixture(scope="module")
def alone():
    return trained(1, {}, "nothing")


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=only_in_test_all) for name in MORE)])
def test_losses_metrics_predictions_and_weights_are_those_of_one_process(shared, alone, name):
    for rank in range(2):
        assert_trained_alike(shared[rank][name], alone)
        explained = shared[rank][name][-1]
        assert "4 heads, 4 of keys and values, attend by" in explained
        assert "compiled, with shared tokens: " in explained
        assert "uncompiled" not in explained
