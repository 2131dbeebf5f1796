"""`estimate()` as a user calls it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import lightning_superscale as lss
from lightning_superscale.errors import SettingError, SuperScaleError
from tests.estimation.models import Images, Language


class LanguageModel(nn.Module):
    """Takes what Hugging Face's models take; attention has a matrix of scores."""

    def __init__(self, num_layers: int = 4, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(512, width)
        layers = (
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True) for _ in "x" * num_layers
        )
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(width, 512)

    def forward(self, input_ids, labels=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()), "logits": logits}


def on_meta(model, *args, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return model(*args, **kwargs)


def test_every_strategy_is_estimated_with_and_without_checkpoints():
    found = lss.estimate(on_meta(Language), batch=Language.batch(4))
    assert [one.checkpoints_blocks for one in found.strategies] == [False] * 5 + [True] * 5
    assert found.recommended.line == 'strategy="superscale"'
    plain, again = found.strategies[0], found.strategies[5]
    assert again.peak.activations < plain.peak.activations
    assert again.time.backward > plain.time.backward
    assert again.mfu < plain.mfu
    assert all(one.largest_params > found.num_params for one in found.strategies)
    assert (found.num_tokens, found.unit) == (4 * 65, "tokens")
    json.dumps(found.to_dict())


def test_ranks_share():
    one, four = (lss.estimate(on_meta(Images), batch=Images.batch(8), devices=n, zero=2) for n in (1, 4))
    assert four.strategies[0].peak.kept < one.strategies[0].peak.kept
    assert four.strategies[0].time.ranks > 0
    assert len(four.strategies) == 2
    assert four.strategies[0].line == "strategy=SuperScaleStrategy(zero=2)"


def test_what_does_not_fit_says_why_and_offloading_takes_what_is_free():
    model, batch = on_meta(Language), Language.batch(2)
    found = lss.estimate(model, batch=batch, device_memory="60MiB")
    by_line = {one.line: one for one in found.strategies if not one.checkpoints_blocks}
    resident, offloaded = by_line['strategy="superscale"'], by_line['strategy="superoffload"']
    assert resident.why_not == "71.1 MiB of device memory, of 55.2 MiB"
    assert offloaded.fits
    assert 0 < offloaded.device_share < 1
    assert offloaded.peak.total == pytest.approx(0.92 * 60 * 2**20, rel=0.1)  # whole parameters move
    assert found.recommended.line == 'strategy="superoffload"'
    assert lss.estimate(model, batch=batch, device_memory="1MiB").recommended is None
    assert (
        "host memory"
        in lss.estimate(model, batch=batch, host_memory="1MiB", offload="cpu", device_memory="20MiB")
        .strategies[0]
        .why_not
    )


@pytest.mark.parametrize("offload", [None, "superoffload"])
def test_the_longest_sequence_fits_and_a_longer_one_does_not(offload):
    def at(length: int):
        return lss.estimate(
            on_meta(LanguageModel),
            batch_size=2,
            sequence_length=length,
            zero=0,
            offload=offload,
            device_memory="200MiB",
        ).strategies[0]

    longest = at(128).longest_sequence
    assert longest > 300
    assert at(longest).fits
    assert not at(round(1.05 * longest)).fits


@pytest.mark.parametrize("memory", ["device", "host"])
def test_the_deepest_model_fits_and_one_with_one_more_block_does_not(memory):
    sizes = {f"{memory}_memory": "20MiB"}
    how = {"offload": None if memory == "device" else {"engine": "cpu", "gpu_fraction": 0.0}, "zero": 0}

    def at(num_layers: int):
        model = on_meta(LanguageModel, num_layers)
        tokens = torch.zeros(2, 64, dtype=torch.int64)
        found = lss.estimate(model, batch={"input_ids": tokens, "labels": tokens}, **how, **sizes)
        return found.num_params, found.strategies[0]

    size, found = at(4)
    block = sum(param.numel() for param in LanguageModel(1).layers.parameters())
    more, rest = divmod(found.largest_params - size, block)
    assert rest == 0
    assert more > 4
    assert at(4 + more)[1].fits
    assert at(4 + more)[0] == found.largest_params
    assert not at(4 + more + 1)[1].fits


def test_activations_in_host_memory_end_what_fits_there():
    away = {"checkpoint_blocks": True, "tile_loss": False, "offload_activations": True}

    def at(length: int, num_layers: int = 4, **sequence):
        model = on_meta(LanguageModel, num_layers)
        return lss.estimate(
            model, batch_size=2, sequence_length=length, zero=0, sequence=sequence or away, host_memory="1MiB"
        ).strategies[0]

    found = at(128)
    assert [(row.name, row.host_bytes) for row in found.bytes if row.host_bytes] == [
        ("activations (blocks' inputs)", 4 * 2 * 128 * 64 * 2)
    ]
    assert found.host_bytes == 4 * 2 * 128 * 64 * 2
    assert found.peak.total < at(128, checkpoint_blocks=True, tile_loss=False).peak.total
    assert at(found.longest_sequence).fits
    assert "of host memory" in at(found.longest_sequence + 1).why_not
    block = sum(param.numel() for param in LanguageModel(1).layers.parameters())
    deepest = 4 + (found.largest_params - sum(param.numel() for param in on_meta(LanguageModel).parameters())) // block
    assert at(128, deepest).fits
    assert "of host memory" in at(128, deepest + 1).why_not


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "A1000"}, "device='A1000' is not one of"),
        ({"device_memory": "many"}, "device_memory takes bytes"),
        ({"devices": 0}, "devices"),
        ({"precision": "bf16"}, "did you mean 'bf16-mixed'"),
        ({"zero": 4}, "stage"),
        ({"zero": 2, "offload": "superofload"}, "did you mean 'superoffload'"),
        ({"zero": {"stage": 2, "shard_size": 3}, "devices": 4}, "does not divide"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises((SettingError, SuperScaleError), match=message):
        lss.estimate(on_meta(Images), batch=Images.batch(2), **arguments)


def test_this_machine_is_measured():
    found = lss.estimate(on_meta(Images), batch=Images.batch(4), device="this machine", zero=0, precision="32-true")
    assert found.assumptions[0].startswith("rates are measured here")
    assert found.strategies[0].time.forward > 0


def test_micro_batches_make_a_step_of_more_tokens_and_keep_their_gradients():
    model = on_meta(Language)
    one, four = (
        lss.estimate(model, batch=Language.batch(4), zero=0, offload="superoffload", accumulate_grad_batches=n)
        for n in (1, 4)
    )
    assert four.num_tokens == 4 * one.num_tokens
    assert "4 micro-batches a step, AdamW" in four.assumptions
    few, many = one.strategies[0], four.strategies[0]
    assert many.time.backward == pytest.approx(4 * few.time.backward)
    assert many.mfu > few.mfu
    assert many.peak.gradients > few.peak.gradients
