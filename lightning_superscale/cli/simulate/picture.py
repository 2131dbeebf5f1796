"""A simulation as a picture: where a step's seconds go, by size of the cluster."""

from __future__ import annotations

from pathlib import Path

from lightning_superscale.cli.estimate.picture import drawing_module, write
from lightning_superscale.cli.simulate.table import WAITINGS
from lightning_superscale.simulation.result import SimulatedStep, Simulation


def parts_of(step: SimulatedStep) -> dict[str, float]:
    """Seconds of a step's parts, from the bottom of its bar."""
    return {"model": step.model, "update": step.update} | {
        f"waits: {what}": step.waited.get(what, 0.0) for what in WAITINGS
    }


def draw(found: Simulation, path: Path) -> None:
    """Write the picture.

    Raises:
        SettingError: matplotlib is not installed, or the file can't be written; says what to do.
    """
    plots = drawing_module("matplotlib.figure")
    labels = [f"{step.num_ranks:,}" for step in found.steps]
    figure = plots.Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    bottoms = [0.0] * len(labels)
    stacks = [parts_of(step) for step in found.steps]
    for name in stacks[0]:
        heights = [stack[name] for stack in stacks]
        if any(heights):
            axes.bar(labels, heights, bottom=bottoms, label=name)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for label, bottom, step in zip(labels, bottoms, found.steps, strict=True):
        axes.annotate(f"{step.efficiency:.0%}", (label, bottom), ha="center", va="bottom", fontsize=8)
    axes.set_xlabel("ranks (above a bar: efficiency)")
    axes.set_ylabel("seconds of a step")
    axes.set_title(f"{found.model}, {found.num_params:,} parameters, {found.device}, {found.line}", fontsize=9)
    axes.legend(fontsize=8)
    write(figure, path)
