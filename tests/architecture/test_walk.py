"""The way of a gradient, recorded from calls: it goes down through the rooms, and no rule or state calls up."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

import lightning_superscale
from tests.helpers.trainers import Regressor, loader, trainer

PACKAGE = str(Path(lightning_superscale.__file__).parent)
ENGINE = "optim/engine.py"
# What the engine drives: what steps, and what it steps.
DRIVEN = (
    "optim/adamw_step.py",
    "optim/mixed_step.py",
    "optim/torch_step.py",
    "optim/unit_state.py",
    "offload/",
    "ops/",
)
# A transport delivers gradients into the sink that it was given; a unit is the object that states fill.
SINK, UNITS = "_add_grads", ("zero/buckets/unit.py", "zero/fsdp2/unit.py")


class Walk:
    """Files and functions of this package that are called, each with the nearest callers of this package."""

    def __init__(self) -> None:
        self.rooms: set[str] = set()
        self.upward: set[str] = set()

    def __call__(self, frame, event, arg) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        callee, name = self._file(frame), frame.f_code.co_name
        self.rooms.add(callee.split("/")[0])
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(PACKAGE):
            caller = caller.f_back  # torch's or Lightning's own code in between
        if caller is None or not self._file(caller).startswith(DRIVEN):
            return
        into_engine = callee == ENGINE and name != SINK
        into_transport = callee.startswith("zero/") and callee not in UNITS
        if into_engine or into_transport or callee.startswith(("run/", "plugins/", "cli/")):
            self.upward.add(f"{self._file(caller)}:{caller.f_code.co_name} calls {callee}:{name}")

    @staticmethod
    def _file(frame) -> str:
        return str(Path(frame.f_code.co_filename).relative_to(PACKAGE))


class Walked(Regressor):
    """Recorded from the second step's forward to the end of the third step."""

    def __init__(self, walk: Walk) -> None:
        super().__init__()
        self.walk = walk

    def training_step(self, batch, batch_idx):
        if batch_idx == 1:
            sys.setprofile(self.walk)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == 2:
            sys.setprofile(None)


@pytest.mark.parametrize("strategy", ["superscale", "superoffload"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_step_calls_down(strategy, precision):
    walk = Walk()
    try:
        module = Walked(walk)
        threading.setprofile(walk)  # the host optimizer's thread, too, where it begins meanwhile
        trainer(strategy, precision=precision, gradient_clip_val=0.05, max_epochs=1).fit(module, loader())
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert not walk.upward
    expected = {"plugins", "run", "zero", "optim", "ops"} | ({"offload"} if strategy == "superoffload" else set())
    assert expected <= walk.rooms
