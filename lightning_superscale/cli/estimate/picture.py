"""An estimate as a picture: memory of the device and of the host at the peak, stacked by class, for each strategy."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from lightning_superscale.errors import SettingError
from lightning_superscale.estimation.memory import kept_on_device
from lightning_superscale.estimation.result import Estimate, StrategyEstimate

_GIB = 2**30


def device_parts(one: StrategyEstimate) -> dict[str, int]:
    """Bytes of the device at the peak, by class."""
    peak = one.peak
    parts = kept_on_device(one.bytes) | {
        "gradients": peak.gradients,
        "activations": peak.activations + peak.batch,
        "transfers": peak.transfers,
    }
    return {name: nbytes for name, nbytes in parts.items() if nbytes}


def host_parts(one: StrategyEstimate) -> dict[str, int]:
    """Bytes of host memory, by class."""
    parts: dict[str, int] = {}
    for row in one.bytes:
        if row.host_bytes:
            parts[row.name] = parts.get(row.name, 0) + row.host_bytes
    return parts


def drawing_module(name: str) -> Any:
    """A module of matplotlib's.

    Raises:
        SettingError: matplotlib is not installed; says what to do.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SettingError("--picture draws with matplotlib: pip install matplotlib") from error


def write(figure: Any, path: Path) -> None:
    """Write a figure.

    Raises:
        SettingError: the file can't be written; says why.
    """
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise SettingError(f"--picture {path} can't be written: {error}") from error


def draw(found: Estimate, path: Path) -> None:
    """Write the picture.

    Raises:
        SettingError: matplotlib is not installed, or the file can't be written; says what to do.
    """
    plots = drawing_module("matplotlib.figure")
    colours = drawing_module("matplotlib").colormaps
    # In two lines where blocks are recomputed, so that bars have room.
    labels = [one.line.removeprefix("strategy=").replace(", sequence=", ",\nsequence=") for one in found.strategies]
    classes = dict.fromkeys(
        name for one in found.strategies for part in (device_parts, host_parts) for name in part(one)
    )
    # A class has one colour on both sides; there are fewer classes than the 20 of this map.
    colour_of = dict(zip(classes, colours["tab20"].colors, strict=False))
    figure = plots.Figure(figsize=(12, 1.5 + 0.42 * len(labels)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, parts, limit, title in (
        (left, device_parts, found.device_memory, f"one {found.device}, at the peak of a step"),
        (right, host_parts, found.host_memory, "host memory of one rank"),
    ):
        stacks = [parts(one) for one in found.strategies]
        names = list(dict.fromkeys(name for stack in stacks for name in stack))
        starts = [0.0] * len(stacks)
        for name in names:
            sizes = [stack.get(name, 0) / _GIB for stack in stacks]
            axes.barh(labels, sizes, left=starts, label=name, color=colour_of[name])
            starts = [start + size for start, size in zip(starts, sizes, strict=True)]
        axes.axvline(limit / _GIB, color="black", linestyle="--", linewidth=1)
        axes.set_xlabel("GiB")
        axes.set_title(f"{title}\n(dashed: all of it)", fontsize=9)
        axes.tick_params(labelsize=7)
        if names:
            axes.legend(fontsize=7)
    left.invert_yaxis()
    figure.suptitle(f"{found.model}, {found.num_params:,} parameters, {found.num_ranks} ranks")
    write(figure, path)
