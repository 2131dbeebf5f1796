"""Exposed time on a GPU, whose events are played here; on a CPU see test_callback.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import lightning_superscale as lss
from lightning_superscale.plugins.trainer.scale_monitor.window import Counts, ExposedTime, memory_metrics


def trainer(waits, *, is_cuda):
    timeline = SimpleNamespace(waits=waits, is_cuda=is_cuda)
    strategy = lss.SuperScaleStrategy()
    strategy.run.assembly = SimpleNamespace(settings=SimpleNamespace(timeline=timeline))
    return SimpleNamespace(strategy=strategy)


class Waits:
    def __init__(self, *seconds):
        self.seconds, self.num_asked = list(seconds), 0

    def ask(self):
        self.num_asked += 1

    def take(self):
        return self.seconds.pop(0)


def test_a_gpu_is_asked_once_in_a_window_and_may_not_be_there_yet():
    waits = Waits(0.25, None, 0.75)
    exposed = ExposedTime(trainer(waits, is_cuda=True))
    assert exposed.mean() is None
    found = []
    for step in range(1, 4):
        found.append(exposed.per_step(Counts(num_steps=step - 1), Counts(num_steps=step, exposed=100.0)))
        exposed.ask()
    assert found == [0.25, None, 0.75]
    assert exposed.mean() == 0.5
    assert waits.num_asked == 4


def test_a_cpu_counts_every_step():
    exposed = ExposedTime(trainer(Waits(), is_cuda=False))
    assert exposed.per_step(Counts(num_steps=2, exposed=1.0), Counts(num_steps=6, exposed=3.0)) == 0.5
    assert exposed.per_step(Counts(num_steps=2), Counts(num_steps=2)) is None
    assert ExposedTime(SimpleNamespace(strategy=object())).per_step(Counts(), Counts(num_steps=1)) is None


def test_memory_of_the_process_and_of_a_gpu(monkeypatch):
    found = memory_metrics(torch.device("cpu"))
    assert found.keys() == {"process_bytes"}
    assert found["process_bytes"] > 2**25
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 77)
    assert memory_metrics(torch.device("cuda"))["device_peak_bytes"] == pytest.approx(77)
