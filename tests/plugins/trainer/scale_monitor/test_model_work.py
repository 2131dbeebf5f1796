"""Operations per token, and their share of a device's peak."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_superscale.estimation.devices import PROFILES
from lightning_superscale.plugins.trainer.scale_monitor.model_work import ModelWork

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Other tests of this process compile, and where anything is compiled nothing is counted."""
    torch._dynamo.reset()


class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.low, self.high = nn.Linear(4, 4, dtype=torch.bfloat16), nn.Linear(4, 2)

    def training_step(self, batch):
        return self.high(self.low(batch).float()).sum()


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")


def test_each_dtype_has_its_own_peak(h100):
    work, module = ModelWork("auto", "auto", GPU, torch.float32), Step()
    assert work.flops(10) is None
    work.count_next_step(module)
    module.training_step(torch.zeros(3, 4, dtype=torch.bfloat16)).backward()
    work.end_step(3)
    low, high = 2 * (2 * 4 * 4), 3 * (2 * 4 * 2)  # the batch needs no gradient, the activation does
    assert work.flops(10) == 10 * (low + high)
    at_peak = low / PROFILES["H100 SXM"].flops16 + high / PROFILES["H100 SXM"].flops32
    assert work.mfu(10, 2.0) == pytest.approx(10 * at_peak / 2)


def test_only_the_next_step_is_counted(h100):
    work, module = ModelWork("auto", "auto", GPU, torch.float32), Step()
    work.count_next_step(module)
    for size in (3, 5):
        module.training_step(torch.zeros(size, 4, dtype=torch.bfloat16))
        work.end_step(size)
    assert work.flops(1) == 2 * (2 * 4 * 4) + 3 * (2 * 4 * 2)
    assert work.why_no_flops is None


def test_given_numbers_are_of_one_dtype(h100):
    assert ModelWork(6e9, "auto", GPU, torch.bfloat16).mfu(1000, 1.0) == 6e12 / PROFILES["H100 SXM"].flops16
    assert ModelWork(6e9, 12e12, CPU, torch.float32).mfu(1000, 1.0) == 0.5


def test_an_unknown_device_has_no_peak(monkeypatch):
    assert ModelWork(6e9, "auto", CPU, torch.float32).why_no_peak == (
        "no data sheet of 'cpu' is known here; pass peak_flops"
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA T4")
    work = ModelWork(6e9, "auto", GPU, torch.float32)
    assert work.mfu(1, 1.0) is None
    assert "NVIDIA T4" in work.why_no_peak


def test_nothing_is_counted_of_a_batch_without_a_size(h100):
    work, module = ModelWork("auto", "auto", GPU, torch.float32), Step()
    work.count_next_step(module)
    module.training_step(torch.zeros(3, 4, dtype=torch.bfloat16))
    work.end_step(0)
    assert work.flops(0) is None
    assert work.why_no_flops == "no batch was trained"
