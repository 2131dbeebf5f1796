"""Every combination of dtypes works or is refused with the reason, before anything is built."""

from __future__ import annotations

import itertools

import pytest
import torch

import lightning_superscale as lss
from lightning_superscale.run.precision import PRECISIONS, choose

REFUSED = [
    ("32-true", {"master_weights": "bf16"}, "are fp32 and their own masters.*use precision='bf16-true'"),
    ("bf16-mixed", {"master_weights": "bf16"}, "are fp32 and their own masters"),
    ("16-true", {"master_weights": "bf16"}, "fp16 weights have three binary digits more"),
    ("bf16-true", {"master_weights": "fp16"}, "no numbers between 6e-8 and 0"),
    ("bf16-true", {"master_weights": "bf61"}, "must be one of 'fp32', 'bf16', found 'bf61'"),
    ("bf16-true", {"optimizer_states": "fp16"}, "squares of gradients below 2e-4"),
    ("bf16-true", {"optimizer_states": torch.bfloat16}, "must be one of 'fp32', 'bf16', found torch.bfloat16"),
    ("bf16-true", {"kahan": True}, "master_weights='fp32' lose nothing"),
    ("bf16-true", {"stochastic_rounding": True}, "nothing is rounded to bf16"),
    ("32-true", {"autocast": True}, "names no 16-bit dtype.*bf16-mixed"),
    ("bf16-mixed", {"autocast": False}, "is autocast.*32-true"),
    ("bf16-true", {"gradient_accumulation": "fp16"}, "gradients of precision='bf16-true' are bf16"),
    ("32-true", {"gradient_accumulation": "bf16"}, "gradients of precision='32-true' are fp32"),
    ("bf16-true", {"gradient_reduction": "fp16"}, "overflow in fp16 unless a loss scale"),
    ("16-true", {"gradient_reduction": "bf16"}, "three binary digits more"),
    ("bf16-true", {"seed": -1}, "seed must be a whole number"),
    ("bf16-true", {"seed": True}, "seed must be a whole number"),
]


@pytest.mark.parametrize(("precision", "choices", "message"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_cannot_work_is_refused_with_the_reason(precision, choices, message):
    with pytest.raises(lss.SuperScaleError, match=message):
        lss.SuperScalePrecision(precision, **choices)


def test_every_combination_works_or_is_refused():
    """No combination ends in anything but choices that fit together, or our error."""
    num_works = 0
    for precision, masters, states, accumulation, reduction, stochastic, kahan, autocast in itertools.product(
        PRECISIONS,
        ("fp32", "bf16"),
        ("fp32", "bf16"),
        ("auto", "fp32", "bf16", "fp16"),
        ("auto", "fp32", "bf16", "fp16"),
        (None, False, True),
        (False, True),
        (None, False, True),
    ):
        try:
            found = choose(
                precision,
                master_weights=masters,
                optimizer_states=states,
                gradient_accumulation=accumulation,
                gradient_reduction=reduction,
                stochastic_rounding=stochastic,
                kahan=kahan,
                autocast=autocast,
            )
        except lss.SuperScaleError:
            continue
        num_works += 1
        is_low = torch.bfloat16 in (found.states.masters, found.states.moments)
        assert found.states.is_stochastic == (is_low if stochastic is None else stochastic)
        assert found.weights == torch.bfloat16 or found.states.masters == torch.float32
        assert not found.states.is_compensated or found.states.masters == torch.bfloat16
        assert (found.autocast is not None) == (autocast or (autocast is None and "mixed" in precision))
    assert num_works > 200


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({}, "bf16-true"),
        ({"autocast": True}, "bf16-true, under autocast"),
        (
            {"master_weights": "bf16", "optimizer_states": "bf16", "kahan": True, "seed": 7},
            "bf16-true, masters in bf16, compensated, optimizer states in bf16, rounded stochastically, seed 7",
        ),
        (
            {"gradient_accumulation": "fp32", "gradient_reduction": "bf16"},
            "bf16-true, gradients summed up in fp32, reduced in bf16",
        ),
    ],
)
def test_choices_are_told_in_words(choices, words):
    assert lss.SuperScalePrecision("bf16-true", **choices).choices.describe() == words


@pytest.mark.parametrize(("precision", "low"), [("bf16-true", torch.bfloat16), ("16-true", torch.float16)])
def test_autocast_keeps_inputs_and_losses_in_fp32(precision, low):
    plugin = lss.SuperScalePrecision(precision, autocast=True)
    linear, norm = torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)
    model = plugin.convert_module(torch.nn.Sequential(linear, norm))
    batch = plugin.convert_input(torch.randn(2, 8))
    assert batch.dtype == torch.float32
    with plugin.forward_context():
        out = linear(batch)
        assert out.dtype == low
        assert torch.nn.functional.mse_loss(out, batch).dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {low}
