"""Records a training step and the forward after it, when `superscale trace` asks for it.

Where steps differ, as they do in an engine that works in windows, it records as many as show everything (`Cycle` in
optim/step_rule.py), and begins where these do.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.optim.step_rule import EACH_STEP, Cycle
from lightning_superscale.run.report.phases import PhaseSeconds
from lightning_superscale.timeline import Lane, Timeline, chrome_trace

FOLDER_VARIABLE, STEP_VARIABLE = "LSS_TRACE", "LSS_TRACE_STEP"
DEFAULT_STEP = 5


class StepRecorder:
    """Opens a timeline at one step of a run, and writes a Chrome trace when the forward after the last one is over.

    That forward is recorded too, since uploads of new weights hide behind it.

    Args:
        folder: where `trace-rank<r>.json` goes; None records nothing.
        step: least number of optimizer steps before the recorded ones.

    Attributes:
        timeline: counts stalls of all steps.
    """

    def __init__(self, device: torch.device, folder: Path | None, step: int, rank: int) -> None:
        self.timeline = Timeline(device)
        self._folder = folder
        self._step = step
        self._rank = rank
        self._is_done = folder is None
        # Not the timeline's own flag: whoever else opened it closes it.
        self._is_recording = False
        # Of the recording: steps before it, and the number of its own.
        self._first, self._num_steps = step, 1

    @classmethod
    def from_environment(cls, device: torch.device, rank: int) -> StepRecorder:
        """Make the recorder that the variables LSS_TRACE (a folder) and LSS_TRACE_STEP ask for.

        Raises:
            SuperScaleError: a step that is no whole number of at least 1; the first one builds what later ones reuse.
        """
        folder, step = os.environ.get(FOLDER_VARIABLE), os.environ.get(STEP_VARIABLE, str(DEFAULT_STEP))
        if folder and (not step.isdigit() or int(step) < 1):
            raise SuperScaleError(f"{STEP_VARIABLE} must be a whole number of at least 1, found {step!r}.")
        return cls(device, Path(folder) if folder else None, int(step) if folder else 0, rank)

    def before_forward(self, num_steps: int, cycles: Callable[[], Sequence[Cycle]]) -> None:
        """Open the timeline if the steps to record begin now, after `num_steps` optimizer steps.

        Args:
            cycles: returns those of all optimizers, which take turns.
        """
        if self._is_done or self.timeline.is_open or num_steps < self._step:
            return
        found = cycles()
        cycle = max(found, default=EACH_STEP)
        if cycle.starts_in == 0:
            self._first, self._num_steps = num_steps, cycle.num_steps * max(1, len(found))
            self._is_recording = True
            self.timeline.open()

    @contextmanager
    def phase(self, lane: Lane, phases: PhaseSeconds) -> Iterator[None]:
        """A context of a pass: stalls are counted, the device's work is recorded on a lane, its waits are measured."""
        is_own = self._first <= phases.num_steps < self._first + self._num_steps
        name = f"step {phases.num_steps + 1}" if is_own else "next step"
        waits = self.timeline.waits
        if lane == "forward":
            waits.begin_forward(phases.num_steps)
        try:
            with phases.stalls(self.timeline, in_backward=lane == "backward"), self.timeline.device(lane, name):
                yield
        finally:
            if lane == "forward":
                waits.end_forward()
            else:
                waits.end_backward(phases.num_steps)

    def after_forward(self, num_steps: int, facts: Callable[[], dict[str, Any]]) -> None:
        """Write the trace if the recorded steps and this forward are over.

        Args:
            facts: what the trace says of its run.
        """
        if self._is_recording and num_steps >= self._first + self._num_steps:
            self._write(self._num_steps, facts)

    def end(self, num_steps: int, facts: Callable[[], dict[str, Any]]) -> None:
        """Write what was recorded, or warn that nothing was: training is over after `num_steps` optimizer steps."""
        if self._is_recording:
            self._write(max(1, min(self._num_steps, num_steps - self._first)), facts)
        elif not self._is_done:
            self._is_done = True
            warnings.warn(
                f"nothing was traced: training ended after {num_steps} optimizer steps, and step {self._step + 1} was "
                f"to be recorded. Train longer, or choose an earlier step ({STEP_VARIABLE}, superscale trace --step).",
                stacklevel=2,
            )

    def _write(self, num_steps: int, facts: Callable[[], dict[str, Any]]) -> None:
        self._is_done, self._is_recording = True, False
        spans = self.timeline.close()
        if self._folder is None:
            raise AssertionError("a recording without a folder")
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"trace-rank{self._rank}.json"
        said = {**facts(), "num_steps": num_steps}
        path.write_text(json.dumps(chrome_trace(spans, rank=self._rank, facts=said)))
