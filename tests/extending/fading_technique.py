"""A toy module technique: noise on training inputs that fades from step to step. No file of the package knows it."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.run.report.plan import ByteClass
from lightning_superscale.run.techniques.technique import ModuleTechnique, TechniqueFacts

NUM_INPUTS = 17


def noise() -> torch.Tensor:
    return torch.randn(NUM_INPUTS, generator=torch.Generator().manual_seed(11))


class FadingNoise(ModuleTechnique):
    """Adds the same noise to every sample, half as much at each step."""

    def __init__(self) -> None:
        self.noise = noise()
        self.num_forwards = 0

    def prepare(self, module) -> None:
        if not hasattr(module, "net"):
            raise SuperScaleError(f"{type(module).__name__} has no 'net' whose inputs could get noise.")

    def batch(self, batch, *, trains):
        inputs, targets = batch
        return (inputs + self.noise * 0.5**self.num_forwards, targets) if trains else batch

    @contextmanager
    def around_forward(self, *, trains):
        yield
        self.num_forwards += trains

    def reasons(self):
        return [f"noise on inputs was halved {self.num_forwards} times"]

    def bytes(self):
        return [ByteClass("noise", "float32", self.noise.nbytes, 0, f"4 B x {NUM_INPUTS}")]

    def state_dict(self):
        return {"num_forwards": self.num_forwards}

    def load_state_dict(self, state) -> None:
        self.num_forwards = int(state["num_forwards"])


def fading_noise(facts: TechniqueFacts) -> ModuleTechnique | None:
    return FadingNoise() if facts.trains else None
