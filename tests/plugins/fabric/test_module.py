"""Which calls of the module are training, and which evaluate."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn

from lightning_superscale.plugins.fabric.module import RunModule


class RecordingRun:
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.assembly: object = None

    @contextmanager
    def forward(self):
        self.calls.append("forward")
        yield

    @contextmanager
    def evaluating(self):
        self.calls.append("evaluating")
        yield

    def before_evaluation(self) -> None:
        self.calls.append("before evaluation")

    def output(self, output, *, trains):
        return output


def test_a_call_without_gradients_evaluates_and_the_first_one_gets_the_run_ready():
    run = RecordingRun()
    module = RunModule(nn.Linear(2, 2), run)
    x = torch.ones(1, 2)
    module(x)
    with torch.no_grad():
        assert torch.equal(module(x), module.module(x))
        module(x)
    module.eval()(x)  # gradients are recorded: it is fine-tuned
    with torch.inference_mode():
        module(x)
    evaluation = ["before evaluation", "evaluating"]
    assert run.calls == ["forward", *evaluation, "evaluating", "forward", *evaluation]
    assert not module.has_trained
    run.assembly = object()
    with torch.no_grad():
        module(x)
    assert not module.has_trained
    module(x)
    assert module.has_trained
