"""Records one training step and the forward after it, when `superscale trace` asks for it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.run.report.phases import PhaseSeconds
from lightning_superscale.timeline import Lane, Timeline, chrome_trace

FOLDER_VARIABLE, STEP_VARIABLE = "LSS_TRACE", "LSS_TRACE_STEP"
DEFAULT_STEP = 5


class StepRecorder:
    """Opens a timeline at one step of a run and writes a Chrome trace when the next step's forward is over.

    The next step's forward is recorded too, since uploads of new weights hide behind it.

    Args:
        folder: where `trace-rank<r>.json` goes; None records nothing.
        step: optimizer steps before the recorded one.
    """

    def __init__(self, device: torch.device, folder: Path | None, step: int, rank: int) -> None:
        self.timeline = Timeline(device)
        self._folder = folder
        self._step = step
        self._rank = rank
        self._is_done = folder is None

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

    def before_forward(self, num_steps: int) -> None:
        """Open the timeline if the step to record begins now, after `num_steps` optimizer steps."""
        if not self._is_done and not self.timeline.is_open and num_steps == self._step:
            self.timeline.open()

    @contextmanager
    def phase(self, lane: Lane, phases: PhaseSeconds) -> Iterator[None]:
        """A context in which stalls are counted, and the device's work is recorded on a lane."""
        name = f"step {self._step + 1}" if phases.num_steps == self._step else "next step"
        with phases.stalls(self.timeline, in_backward=lane == "backward"), self.timeline.device(lane, name):
            yield

    def after_forward(self, num_steps: int, facts: dict[str, Any]) -> None:
        """Write the trace if the recorded step and this forward are over."""
        if self.timeline.is_open and num_steps > self._step:
            self._write(facts)

    def end(self, num_steps: int, facts: dict[str, Any]) -> None:
        """Write what was recorded, or warn that nothing was: training is over."""
        if self.timeline.is_open:
            self._write(facts)
        elif not self._is_done:
            self._is_done = True
            warnings.warn(
                f"nothing was traced: training ended after {num_steps} optimizer steps, and step {self._step + 1} was "
                f"to be recorded. Train longer, or choose an earlier step ({STEP_VARIABLE}, superscale trace --step).",
                stacklevel=2,
            )

    def _write(self, facts: dict[str, Any]) -> None:
        self._is_done = True
        spans = self.timeline.close()
        if self._folder is None:
            raise AssertionError("a recording without a folder")
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"trace-rank{self._rank}.json"
        path.write_text(json.dumps(chrome_trace(spans, rank=self._rank, facts=facts)))
