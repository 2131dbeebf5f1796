"""Batches and losses that are not said."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lightning_superscale.errors import SettingError, SuperScaleError
from lightning_superscale.estimation.tracing.inputs import batch_for, count_tokens, loss_of, parse_bytes


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [
        (2**20, 2**20),
        ("80GiB", 80 * 2**30),
        ("24 GB", 24 * 10**9),
        ("1.5tib", 3 * 2**39),
        ("5000000", 5_000_000),
        ("2MB", 2_000_000),
    ],
)
def test_sizes(value, nbytes):
    assert parse_bytes(value, "device_memory") == nbytes


@pytest.mark.parametrize("value", [0, -1, True, "", "80 gigs", "GiB", "1.2.3GB", "-4GB", 1.5, "0GB"])
def test_what_is_no_size_is_refused(value):
    with pytest.raises(SettingError, match='device_memory takes bytes, or a size with a unit such as "80GiB"'):
        parse_bytes(value, "device_memory")


@pytest.mark.parametrize("value", [80, "80", " 80 "])
def test_a_size_whose_unit_was_forgotten_is_refused(value):
    with pytest.raises(SettingError, match=r'device_memory takes bytes .*found 80; did you mean "80GiB"'):
        parse_bytes(value, "device_memory")


class Tokens(nn.Module):
    def forward(self, input_ids, labels=None):
        return {"loss": input_ids.float().mean(), "logits": input_ids}


class Example(nn.Linear):
    example_input_array = torch.ones(2, 3)


def test_batches():
    batch = batch_for(Tokens(), 3, 17)
    assert batch["input_ids"].shape == (3, 17)
    assert batch["input_ids"].is_meta
    assert count_tokens(batch) == (51, "tokens")
    assert batch_for(Example(3, 1), 1, 1) is Example.example_input_array
    assert count_tokens(torch.ones(5, 3)) == (5, "samples")
    with pytest.raises(SuperScaleError, match="Linear does not say what its batches are. Pass batch="):
        batch_for(nn.Linear(3, 1), 1, 1)


@dataclass
class Pair:
    mask: torch.Tensor
    tokens: torch.Tensor


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(3, 7, dtype=torch.long), (21, "tokens")),
        ({"mask": torch.ones(2, 5), "input_ids": torch.zeros(2, 5, dtype=torch.long)}, (10, "tokens")),
        (UserDict(input_ids=torch.zeros(2, 5, dtype=torch.long)), (10, "tokens")),
        (Pair(torch.ones(2, 4), torch.zeros(2, 4, dtype=torch.long)), (8, "tokens")),
        ([torch.zeros(4, 8), torch.zeros(4)], (4, "samples")),
        ((torch.tensor(1.0),), (1, "samples")),
        ("nothing", (0, "samples")),
    ],
)
def test_the_size_of_a_batch(batch, size):
    assert count_tokens(batch) == size


class Trained(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.training_step = step


def test_losses():
    seven = torch.tensor(7.0)
    for step in (lambda batch, index: seven, lambda batch: seven, lambda batch, index: {"loss": seven}):
        module = Trained(step)
        assert loss_of(module)(module, None) is seven
    tokens = Tokens()
    assert loss_of(tokens)(tokens, {"input_ids": torch.ones(2, 2)}) == 1.0
    linear = nn.Linear(3, 2)
    assert loss_of(linear)(linear, torch.ones(4, 3)) == linear(torch.ones(4, 3)).sum()
    assert loss_of(nn.Bilinear(3, 3, 2))(nn.Bilinear(3, 3, 2), (torch.ones(4, 3), torch.ones(4, 3))).ndim == 0
