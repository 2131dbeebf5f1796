"""`superscale trace`: runs a training command, records a step of it or a cycle of steps, and draws its lanes."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.offload.planner.forecast import StepTimes, exposed_seconds
from lightning_superscale.run.report.plan import format_bytes
from lightning_superscale.run.report.recorder import FOLDER_VARIABLE, STEP_VARIABLE
from lightning_superscale.timeline import LANES, Span

_COLOURS = (
    "#4c78a8",
    "#72b7b2",
    "#eeca3b",
    "#9d755d",
    "#f58518",
    "#b279a2",
    "#54a24b",
    "#e45756",
    "#ff9da6",
    "#79706e",
)


@dataclass(frozen=True, slots=True)
class Trace:
    """A recording of one rank's step, or of several where an engine's steps differ.

    Attributes:
        path: the file of the recording.
        facts: device, engine and size of the run, by name.
        spans: all spans of the recorded steps and of the next step's forward; times in seconds.
    """

    path: Path
    facts: dict[str, Any]
    spans: tuple[Span, ...]

    @classmethod
    def read(cls, path: Path) -> Trace:
        """Read the file of a recording.

        Raises:
            SuperScaleError: the file can't be read, or no recording wrote it.
        """
        try:
            facts = json.loads(path.read_text())["superscale"]
            spans = tuple(Span(**span) for span in facts.pop("spans"))
        except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise SuperScaleError(f"{path} is no trace that `superscale trace` wrote: {error!r}") from error
        return cls(path, facts, spans)

    @property
    def num_steps(self) -> int:
        """Number of recorded steps."""
        return int(self.facts.get("num_steps", 1))  # earlier versions recorded one

    @property
    def seconds(self) -> float:
        """Seconds from the beginning of the recorded steps to the beginning of the next step's forward."""
        forwards = [span.start for span in self.spans if span.lane == "forward" and span.name == "next step"]
        first = min(span.start for span in self.spans)
        return (min(forwards) if forwards else max(span.end for span in self.spans)) - first

    @property
    def step_seconds(self) -> float:
        """Mean seconds of a recorded step."""
        return self.seconds / self.num_steps

    @property
    def step_starts(self) -> list[float]:
        """The beginning of the first forward of each recorded step."""
        starts: dict[str, float] = {}
        for span in self.spans:
            if span.lane == "forward" and span.name != "next step":
                starts[span.name] = min(span.start, starts.get(span.name, span.start))
        return sorted(starts.values())

    def busy_seconds(self, lane: str) -> float:
        """Seconds in which at least one span of a lane ran, with work that hides behind the next step's forward."""
        busy, reached = 0.0, float("-inf")
        own = (s for s in self.spans if s.lane == lane and not (lane == "forward" and s.name == "next step"))
        for span in sorted(own, key=lambda span: span.start):
            busy += max(0.0, span.end - max(span.start, reached))
            reached = max(reached, span.end)
        return busy

    @property
    def exposed_seconds(self) -> float:
        """Mean seconds that a step took beyond its own forward and backward."""
        beyond = self.seconds - self.busy_seconds("forward") - self.busy_seconds("backward")
        return max(0.0, beyond / self.num_steps)

    def table(self) -> Table:
        """Busy time, share of the recorded steps and bytes of each lane."""
        what = "One step" if self.num_steps == 1 else f"{self.num_steps} steps"
        table = Table(title=f"{what}, {self.facts.get('engine', '')} on {self.facts.get('device', '')}")
        for column in ("lane", "busy", "of the step" if self.num_steps == 1 else "of the steps", "spans", "bytes"):
            table.add_column(column, justify="left" if column == "lane" else "right")
        for lane in LANES:
            spans = [span for span in self.spans if span.lane == lane]
            if spans:
                busy = self.busy_seconds(lane)
                nbytes = sum(span.nbytes for span in spans)
                share = f"{busy / self.seconds:.0%}"
                table.add_row(lane, f"{busy * 1e3:.1f} ms", share, str(len(spans)), format_bytes(nbytes))
        return table

    def summary(self) -> str:
        """A line with the exposed time and, for a deferred step, the forecast of it from the lanes' busy times."""
        exposed = self.exposed_seconds
        text = (
            f"step {self.step_seconds * 1e3:.1f} ms{self._mean_of()}, of which {exposed * 1e3:.1f} ms "
            f"({exposed / self.step_seconds:.0%}) are neither forward nor backward"
        )
        stalled = self.busy_seconds("wait for host") / self.num_steps
        if stalled:
            text += f"; the host kept the model waiting {stalled * 1e3:.1f} ms ({stalled / self.step_seconds:.0%})"
        units = {span.name.removesuffix(", ahead") for span in self.spans if span.lane == "host optimizer"}
        if not self.facts.get("is_deferred") or not units:
            return text
        busy = self.busy_seconds
        times = StepTimes(
            forward=busy("forward"),
            backward=busy("backward"),
            d2h=busy("device to host"),
            host=busy("host optimizer"),
            h2d=busy("host to device"),
            num_buckets=len(units),
            device_share=float(self.facts.get("device_share", 0.0)),
        )
        return f"{text}; lanes as busy as these should expose {exposed_seconds(times) * 1e3:.1f} ms"

    def _mean_of(self) -> str:
        return "" if self.num_steps == 1 else f" (mean of {self.num_steps} steps)"

    def draw(self, path: Path) -> None:
        """Write the lanes as a PNG.

        Raises:
            SuperScaleError: matplotlib is not installed.
        """
        _check_can_draw()
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        lanes = [lane for lane in LANES if any(span.lane == lane for span in self.spans)]
        figure = Figure(figsize=(12, 0.6 * len(lanes) + 1.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        # In milliseconds: a bar is at least as wide as can be seen, and one that an edge would hide has none.
        least, least_with_edge = self.seconds * 1e3 / 1500, self.seconds * 1e3 / 300
        for row, lane in enumerate(lanes):
            bars = [(s.start * 1e3, max((s.end - s.start) * 1e3, least)) for s in self.spans if s.lane == lane]
            colour = _COLOURS[LANES.index(lane) % len(_COLOURS)]
            edges = ["white" if width > least_with_edge else colour for _, width in bars]
            axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=colour, edgecolors=edges, linewidth=0.3)
        for start in self.step_starts[1:]:
            axes.axvline(start * 1e3, color="black", linewidth=0.4, linestyle=":")
        first = min(span.start for span in self.spans)
        axes.axvline((first + self.seconds) * 1e3, color="black", linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(lanes)), lanes)
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds; dashed: the next step's forward begins")
        axes.set_title(
            f"{self.facts.get('engine', '')} on {self.facts.get('device', '')}, "
            f"{self.facts.get('num_params', 0):,} parameters: {self.exposed_seconds * 1e3:.1f} ms exposed "
            f"of {self.step_seconds * 1e3:.1f} ms{self._mean_of()}"
        )
        figure.savefig(path, dpi=140)


def _check_can_draw() -> None:
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise SuperScaleError("drawing a trace needs matplotlib: pip install matplotlib") from error


def run(command: Sequence[str], folder: Path, step: int) -> int:
    """Run a training command that records a step, then print and draw each rank's recording.

    Args:
        command: the command and its arguments.
        folder: directory for recordings and pictures; those of the same ranks are replaced.
        step: number of optimizer steps before the recorded one.

    Returns:
        The command's exit code.

    Raises:
        SuperScaleError: matplotlib is not installed, the command can't be run, or it succeeded and recorded nothing.
    """
    _check_can_draw()  # before hours of training, not after them
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".trace-") as own:
        environment = {**os.environ, FOLDER_VARIABLE: own, STEP_VARIABLE: str(step)}
        try:
            done = subprocess.run(command, env=environment)
        except OSError as error:
            raise SuperScaleError(
                f"{command[0]!r} can't be run: {error.strerror}. Give a command after '--'."
            ) from error
        for path in sorted(Path(own).glob("trace-rank*.json")):
            written.append(path.replace(folder / path.name))
    if not written:
        if done.returncode:
            return done.returncode
        raise SuperScaleError(
            f"{' '.join(command)} wrote no trace to {folder}. It must train with one of this package's strategies, for "
            f"more than {step} optimizer steps."
        )
    for path in written:
        show(path)
    return done.returncode


def show(path: Path) -> None:
    """Print the table of a recording, and draw its lanes as a PNG beside its file.

    Raises:
        SuperScaleError: the file is no recording, or matplotlib is not installed.
    """
    trace = Trace.read(path)
    console = Console()
    console.print(trace.table())
    console.print(trace.summary(), soft_wrap=True)
    picture = path.with_suffix(".png")
    trace.draw(picture)
    console.print(f"picture {picture}; {path} opens in https://ui.perfetto.dev", soft_wrap=True)
