"""`simulate()`: what a user gets, and what is refused before any work."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_superscale as lss
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.estimation.links import Latencies
from lightning_superscale.simulation import api, machine
from tests.estimation.models import Language

pytest.importorskip("simpy")

WIDTH = 4096


def layers(num: int = 8) -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(num)))


def simulate(**options):
    return lss.simulate(layers(), batch=torch.empty(512, WIDTH, device="meta"), **options)


def test_a_step_is_the_model_the_update_and_what_was_waited_for():
    found = simulate(num_nodes=[1, 4, 100])
    assert [(step.num_nodes, step.num_ranks) for step in found.steps] == [(1, 8), (4, 32), (100, 800)]
    for step in found.steps:
        assert step.seconds == pytest.approx(step.model + step.update + sum(step.waited.values()), rel=1e-9)
        assert step.tokens_per_s == pytest.approx(512 * step.num_ranks / step.seconds)
        assert step.efficiency == pytest.approx(found.steps[0].seconds / step.seconds)
    assert found.line == "strategy=SuperScaleStrategy(zero=3)"
    assert found.steps[0].seconds < found.steps[2].seconds


def test_one_rank_is_the_estimate():
    found = simulate(devices=1, zero=0).steps[0]
    predicted = lss.estimate(layers(), batch=torch.empty(512, WIDTH, device="meta"), zero=0).strategies[0].time
    assert found.seconds == pytest.approx(predicted.total, rel=1e-12)


def test_a_slow_rank_is_said_apart():
    batch = torch.empty(2**15, WIDTH, device="meta")  # so many samples that passes hide what ranks exchange
    even, slow = (lss.simulate(layers(), batch=batch, num_nodes=2, slow_rank=by).steps[0] for by in (1, 1.5))
    assert even.slow == 0
    assert slow.slow == pytest.approx(slow.seconds - even.seconds, rel=1e-9)
    assert 0 < slow.slow <= 0.5 * even.model * (1 + 1e-9)


def test_rounds_between_nodes_take_their_latency():
    quick, late = (simulate(num_nodes=64, latencies=Latencies(0.0, node)).steps[0] for node in (0.0, 1e-3))
    # A unit's gather alone has 63 rounds between nodes.
    assert late.seconds - quick.seconds > 63e-3


def test_shared_sequences_exchange_heads():
    with torch.device("meta"):
        model = Language()
    tokens = torch.empty(4, Language.sequence + 1, dtype=torch.int64, device="meta")
    whole, shared = (lss.simulate(model, devices=8, batch=tokens, sequence=size) for size in (None, 4))
    assert "all_to_all" not in whole.steps[0].calls
    assert shared.steps[0].calls["all_to_all"] == 4 * 2 * 2  # layers, messages, passes
    assert shared.line == "strategy=SuperScaleStrategy(zero=3, sequence=4)"
    assert shared.steps[0].waited["sequence"] > 0


@pytest.mark.parametrize("offload", ["cpu", "superoffload"])
def test_states_in_host_memory_are_waited_for(offload):
    options = {"zero": 2, "offload": lss.OffloadConfig(engine=offload, gpu_fraction=0.0)}
    assert simulate(**options).steps[0].waited["host"] > 0


@pytest.mark.parametrize("offload", ["cpu", "superoffload"])
def test_states_stay_on_the_device_where_they_fit(offload):
    fits, full = (simulate(zero=2, offload=offload, device_memory=size).steps[0] for size in ("80GiB", "100MiB"))
    assert "host" not in fits.waited
    assert full.waited["host"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_nodes": 0}, "num_nodes takes a number of nodes or several, each at least 1; found 0"),
        ({"num_nodes": []}, "num_nodes takes"),
        ({"devices": 0}, "devices"),
        ({"slow_rank": 0.9}, "slow_rank is a factor of at least 1"),
        ({"latencies": Latencies(rank=-1.0)}, "latencies are seconds of 0 or more; found Latencies"),
        ({"offload": "zenflow"}, "knows the steps of 'cpu' and 'superoffload', found offload='zenflow'"),
        ({"offload": {"weights": "flow"}}, 'knows no weights="flow"'),
        ({"devices": 8, "sequence": 3}, "SequenceConfig.size=3 does not divide the 8 ranks"),
        ({"sequence": 2}, "expected a batch with token ids"),
        ({"sequence": {"checkpoint_blocks": True, "offload_activations": True}}, "offload_activations=True keeps"),
        ({"zero": {"stage": 3, "tensor_parallel": 2}}, "knows no tensor parallelism"),
    ],
)
def test_what_can_not_be_simulated_is_refused(options, message):
    with pytest.raises(SuperScaleError, match=message):
        simulate(**options)


def test_without_simpy_nothing_is_traced(monkeypatch):
    def lacking(name):
        raise ImportError(name)

    monkeypatch.setattr(machine.importlib, "import_module", lacking)
    monkeypatch.setattr(api, "trace_in", lambda *_, **__: pytest.fail("worked before it said what is missing"))
    with pytest.raises(SuperScaleError, match="needs simpy"):
        api.simulate(layers(), batch=torch.empty(1, WIDTH, device="meta"))
