"""The one table and the one picture of `make bench`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from benchmarks.versus.rows import Row

HEAD = (
    "",
    "wall s",
    "least to largest",
    "ours / this, wall",
    "ours / this, CPU",
    "CPU s",
    "tokens/s",
    "peak MiB",
    "moved MB",
    "equality",
)
FAILED = "does not run here: "


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def ratio_text(row: Row, by: str) -> str:
    """Ratios of one row, with the range over rounds; named where there are several.

    Args:
        by: "wall" or "cpu".
    """
    texts = []
    for one in (one for one in row["ratios"] if by in one):
        name = f"{one['ours']} " if len(row["ratios"]) > 1 else ""
        texts.append(f"{name}{one[by]['median']:.2f} ({one[by]['least']:.2f} to {one[by]['largest']:.2f})")
    return ", ".join(texts)


def cells_of(row: Row) -> list[str]:
    """One line of the table; what failed has its error in the last cell."""
    if "error" in row:
        return [row["label"], *[""] * (len(HEAD) - 2), f"{FAILED}{row['error']}"]
    moved = row["moved_bytes"]
    return [
        row["label"],
        f"{row['wall_s']:.3f}",
        f"{row['wall_least_s']:.3f} to {row['wall_largest_s']:.3f}",
        ratio_text(row, "wall"),
        ratio_text(row, "cpu"),
        _number(row["cpu_s"], ".3f"),
        _number(row["tokens_per_s"], ".0f"),
        _number(row["peak_mib"], "d"),
        _number(None if moved is None else moved / 1e6, ".1f"),
        row["equality"],
    ]


def table_text(rows: Sequence[Row]) -> str:
    """The table, as Markdown with columns of one width: a line per contestant, techniques one after another."""
    lines: list[list[str]] = [list(HEAD), []]
    technique = None
    for row in rows:
        if row["technique"] != technique:
            technique = row["technique"]
            lines.append([f"**{technique}**", *[""] * (len(HEAD) - 1)])
        lines.append(cells_of(row))
    # An error may be as long as it is: the columns take their widths from the rows that have figures.
    plain = [line for line in lines if line and not line[-1].startswith(FAILED)]
    widths = [max(len(line[at]) for line in plain) for at in range(len(HEAD))]
    lines[1] = ["-" * max(3, width) for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def bars_of(rows: Sequence[Row]) -> list[tuple[str, str, Row | str]]:
    """What the picture shows, from top to bottom: technique, whose time over whose, and the ratio or the error."""
    bars: list[tuple[str, str, Row | str]] = []
    for row in rows:
        if "error" in row:
            bars += [(row["technique"], f"{ours} / {row['label']}", row["error"]) for ours in row["rivals"]]
            continue
        bars += [(row["technique"], f"{one['ours']} / {row['label']}", one) for one in row["ratios"]]
    return bars


def draw(rows: Sequence[Row], path: Path) -> None:
    """Ratios of wall time and of CPU seconds, ours over each peer, by technique; left of 1.0 ours takes less."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    bars = bars_of(rows)
    figure, axis = plt.subplots(figsize=(10, 1.4 + 0.34 * len(bars)), layout="constrained")
    techniques = list(dict.fromkeys(technique for technique, _, _ in bars))
    for place, (technique, _, ratio) in enumerate(bars):
        color = f"C{techniques.index(technique) % 10}"
        if isinstance(ratio, str):
            text = textwrap.shorten(ratio, 96, placeholder=" ...")
            axis.text(0.01, place, text, transform=axis.get_yaxis_transform(), va="center", fontsize=7, color="0.4")
            continue
        for by, shift, fill in (("wall", -0.13, color), ("cpu", 0.17, "white")):
            if by in ratio:
                one = ratio[by]
                around = [[one["median"] - one["least"]], [one["largest"] - one["median"]]]
                marks = {"fmt": "o", "color": color, "markerfacecolor": fill, "markersize": 5, "capsize": 2}
                axis.errorbar(one["median"], place + shift, xerr=around, **marks)
    for technique in techniques:
        places = [place for place, bar in enumerate(bars) if bar[0] == technique]
        at = (1.02, (places[0] + places[-1]) / 2)
        axis.text(*at, technique.replace(", ", ",\n"), transform=axis.get_yaxis_transform(), va="center", fontsize=8,
                  color=f"C{techniques.index(technique) % 10}")  # fmt: skip
        axis.axhline(places[-1] + 0.5, color="0.85", linewidth=0.8)
    axis.axvline(1.0, color="0.2", linewidth=1)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:.2g}")
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    axis.tick_params(axis="x", which="both", labelsize=8)
    axis.set_yticks(range(len(bars)), [label for _, label, _ in bars], fontsize=8)
    for tick, (technique, _, _) in zip(axis.get_yticklabels(), bars, strict=True):
        tick.set_color(f"C{techniques.index(technique) % 10}")
    axis.set_ylim(len(bars) - 0.4, -0.6)
    axis.set_xlabel(
        "ours / peer's, median with least and largest of rounds: wall time filled, CPU seconds hollow", fontsize=9
    )
    axis.grid(axis="x", alpha=0.25, which="both")
    figure.savefig(path, dpi=120)
    plt.close(figure)
