"""Steps traced under a run's techniques: one rank's part, what is recomputed, losses without logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_superscale.config import SequenceConfig, ZeroConfig
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.estimation.tracing.step import HostActivations, StepTrace, trace_step
from lightning_superscale.estimation.tracing.techniques import techniques_of
from lightning_superscale.sequence.memory.eight_bit import BLOCK
from tests.estimation.models import SHAPE, Images, Language

BATCH = 8


def traced(config: SequenceConfig | None, model=Language) -> tuple[StepTrace, bool]:
    with torch.device("meta"):
        module, batch = model(), model.batch(BATCH)
    with techniques_of(module, config, ZeroConfig()) as techniques:
        loss = techniques.around(lambda m, b: m.training_step(b, 0))
        return trace_step(module, batch, loss, weights=torch.bfloat16), techniques.recomputes_blocks


@pytest.mark.parametrize("mode", ["ulysses", "allgather", "ring"])
def test_ranks_share_the_work_and_its_memory(mode):
    whole, _ = traced(None)
    shared, _ = traced(SequenceConfig(size=4, mode=mode))
    parts = 4 * shared.flops()
    # A ring of a causal model computes what its order of tokens hides from no rank; others a quarter each.
    assert parts == pytest.approx(whole.flops(), rel=0.02 if mode != "ring" else 0.1)
    assert shared.activation_bytes < 0.4 * whole.activation_bytes
    assert whole.batch_bytes == shared.batch_bytes
    exchanges = [one.exchange.kind for one in shared.operations if one.exchange is not None]
    assert {"ulysses": "all_to_all", "allgather": "all_gather", "ring": "ring_shift"}[mode] in exchanges
    assert "all_reduce" in exchanges, "of the loss"
    assert not any(one.exchange for one in whole.operations)


def test_blocks_and_logits_are_kept_as_the_options_say():
    plain, is_recomputed = traced(None)
    assert not is_recomputed
    again, is_recomputed = traced(SequenceConfig(checkpoint_blocks=True, tile_loss=False))
    assert is_recomputed
    assert again.activation_bytes < plain.activation_bytes
    assert again.flops("backward") > plain.flops("backward")
    assert again.model_flops == plain.model_flops
    without_logits, _ = traced(SequenceConfig(tile_loss=True))
    logits = BATCH * Language.sequence * 2048 * 2
    assert max(plain.alive) - max(without_logits.alive) > logits
    eight, _ = traced(SequenceConfig(checkpoint_blocks=True, tile_loss=False, boundary_bits=8))
    assert eight.activation_bytes < again.activation_bytes


@pytest.mark.parametrize("bits", [16, 8])
def test_inputs_of_blocks_lie_in_host_memory(bits):
    config = SequenceConfig(checkpoint_blocks=True, tile_loss=False, boundary_bits=bits)
    stay, _ = traced(config)
    tokens, width, num_blocks = BATCH * Language.sequence, SHAPE.width, SHAPE.num_layers
    nbytes = num_blocks * tokens * width * 2
    if bits == 8:
        nbytes = num_blocks * tokens * (width + 4 * width // BLOCK)
    with torch.device("meta"):
        module, batch = Language(), Language.batch(BATCH)
    with techniques_of(module, replace(config, offload_activations=True), ZeroConfig()) as techniques:
        loss = techniques.around(lambda m, b: m.training_step(b, 0))
        for _ in range(2):  # the second counts anew
            with techniques.counting() as on_host:
                away = trace_step(module, batch, loss, weights=torch.bfloat16)
            assert on_host == HostActivations(nbytes, nbytes, nbytes)
    # The last two blocks' are under way.
    left = stay.activation_bytes - away.activation_bytes
    assert left == pytest.approx(nbytes * (num_blocks - 2) / num_blocks, rel=0.02)
    assert away.flops() == stay.flops()
    with techniques_of(module, config, ZeroConfig()) as techniques, techniques.counting() as on_host:
        pass
    assert on_host == HostActivations()


def test_auto_leaves_a_model_without_blocks_alone_and_gives_everything_back():
    class Flat(Images):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList()

    assert not traced(SequenceConfig(checkpoint_blocks="auto"), Flat)[1]
    with torch.device("meta"):
        module = Language()
    before = [type(part) for part in module.modules()]
    with techniques_of(module, SequenceConfig(size=2, checkpoint_blocks=True), ZeroConfig()):
        assert [type(part) for part in module.modules()] != before
    assert [type(part) for part in module.modules()] == before


@pytest.mark.parametrize(
    ("config", "model", "message"),
    [
        (SequenceConfig(size=2), Images, "expected a batch with token ids"),
        (SequenceConfig(tile_mlp=16), Language, "found no MLP in the repeated blocks"),
    ],
)
def test_what_a_run_refuses_is_refused(config, model, message):
    with pytest.raises(SuperScaleError, match=message):
        traced(config, model)
