"""ZenFlow beside DeepSpeed's, `superoffload` and `cpu`: `python benchmarks/zenflow.py [--peers .venv-peers-0.19.6]`.

One model with bf16 weights and fp32 masters on the host, a tenth of the columns at every step and windows of four, in
ours and in DeepSpeed's ZenFlow, which both run with and without overlap. DeepSpeed has to be 0.19.6
(`benchmarks/peers.sh .venv-peers-0.19.6 0.19.6`): 0.19.8 scrambles the weights when it starts. It does not clip what it
steps at once, so that the norm of 1.0 means less there. Threads and turns are described in `offload_race.py`; with
`--device cuda` all have the threads that they want.

Beside what that says: the largest step of a window, which holds a boundary wherever windows end together; what all of a
contestant takes of the host's memory, its worker process included, less what forward and backward alone take; and the
mean loss of the last window. Link bytes are counted where they are ours; of DeepSpeed, whose copies on a CPU are none,
the table has what its code sends. The last line is JSON. Exits with 1 when a limit is missed.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contestants import ZENFLOW
from benchmarks.offload_race import PASSES, Race, Row, limit, parse, parser, run_race, wall_ratio
from benchmarks.step_cost import BenchmarkError, Contestant

LABELS = {
    PASSES: "forward and backward only, bare loop",
    "zenflow": "ours zenflow, Trainer",
    "zenflow-on-device": "ours zenflow, sums on the device",
    "zenflow-synchronous": "ours zenflow, overlap=False",
    "superoffload": "ours superoffload, Trainer",
    "cpu": "ours cpu (synchronous), Trainer",
    "deepspeed-zenflow": "DeepSpeed ZenFlow, bare loop",
    "deepspeed-zenflow-synchronous": "DeepSpeed ZenFlow, no overlap",
}
PEERS = {"zenflow": "deepspeed-zenflow", "zenflow-synchronous": "deepspeed-zenflow-synchronous"}
"""Which of DeepSpeed's does what one of ours does."""
INTERVAL, SHARE = ZENFLOW["update_interval"], ZENFLOW["topk"]
# Over the link per parameter and step, of two-byte weights: what the paper promises, and the same with sums on the
# device. What has one dim never crosses, and shares of columns are rounded. A selection moves masters and moments of at
# most as many columns as are selected, each way.
PROMISED = {"zenflow": 2 * (1 - SHARE) * (1 + 1 / INTERVAL), "zenflow-on-device": 4 * (1 - SHARE) / INTERVAL}
ROUNDING = 1.02
SELECTING = 2 * 12 * SHARE / ZENFLOW["select_interval"]


def by_its_code() -> float:
    """Bytes per parameter and step that DeepSpeed 0.19.6 sends over the link, by reading its code.

    It sends gradients of all columns to sums on the host, by way of the device: at every step but a window's first the
    sum goes there and back, in two bytes. At a window's end gradients come once more in fp32, and weights go back.
    """
    to_host, to_device = 2 * INTERVAL + 4, 2 * (INTERVAL - 1) + 2
    return (to_host + to_device) / INTERVAL


def windows(run: Contestant) -> list[list[float]]:
    """Seconds of steps, by window."""
    return [turn[at : at + INTERVAL] for turn in run.wall for at in range(0, len(turn) - INTERVAL + 1, INTERVAL)]


def at_boundaries(run: Contestant) -> float:
    """Seconds of the largest step of a window: the median over windows."""
    return statistics.median(map(max, windows(run)))


def figures_of(run: Contestant, passes: Contestant) -> Row:
    memory = run.end["facts"]["memory_bytes"] - passes.end["facts"]["memory_bytes"]
    return {
        "boundary_s": round(at_boundaries(run), 4),
        "boundary_exposed_s": round(at_boundaries(run) - at_boundaries(passes), 4),
        "memory_bytes_per_param": round(memory / run.end["num_params"], 2),
        "window_loss": statistics.mean(run.losses[-INTERVAL:]),
        **({"link_bytes_by_its_code": by_its_code()} if run.name.startswith("deepspeed") else {}),
    }


def checks_of(size: str, runs: Sequence[Contestant], rows: Sequence[Row]) -> list[Row]:
    by_name = {run.name: run for run in runs if run.absent is None}
    row_of = {row["name"]: row for row in rows}
    checks = [
        limit(size, f"{name}: bytes over the link per parameter and step", promised * ROUNDING + SELECTING, measured)
        for name, promised in PROMISED.items()
        for measured in (row_of[name]["link_bytes_per_param"],)
    ]
    own, cpu = row_of["zenflow"], row_of["cpu"]
    checks.append(
        limit(size, "zenflow / cpu, wall time of a step", 1.0, wall_ratio(by_name["zenflow"], by_name["cpu"]))
    )
    checks.append(limit(size, "zenflow / cpu, largest step of a window", 1.0, own["boundary_s"] / cpu["boundary_s"]))
    for name, peer in PEERS.items():
        if peer not in by_name:
            continue
        ours, theirs = row_of[name], row_of[peer]
        wall = wall_ratio(by_name[name], by_name[peer])
        pair = f"{name} / {peer}"
        checks += [
            limit(size, f"{pair}, wall time of a step", 1.0, wall),
            limit(size, f"{pair}, largest step of a window", 1.0, ours["boundary_s"] / theirs["boundary_s"]),
            limit(
                size,
                f"{pair}, bytes over the link",
                1.0,
                ours["link_bytes_per_param"] / theirs["link_bytes_by_its_code"],
            ),
            limit(
                size,
                f"{pair}, memory of the host",
                1.0,
                ours["memory_bytes_per_param"] / theirs["memory_bytes_per_param"],
            ),
            limit(size, f"{pair}, loss of the last window", 1.0, ours["window_loss"] / theirs["window_loss"]),
        ]
    return checks


def show(table: Row) -> None:
    print(
        f"\n{table['size']} ({table['num_params']:,} parameters, {table['tokens']} tokens), bf16 weights, clip 1.0, "
        f"topk {SHARE}, windows of {INTERVAL} steps\n"
    )
    print(
        f"{'':40}{'wall s':>8}{'exposed':>9}{'boundary':>9}{'exposed':>9}{'CPU s':>8}{'link B':>9}{'memory B':>9}"
        f"{'loss':>8}"
    )
    for row in table["rows"]:
        if "absent" in row:
            print(f"{row['label']:40}  {row['absent']}")
            continue
        link = (
            f"{row['link_bytes_per_param']:.3f}"
            if "link_bytes_per_param" in row
            else f"({row['link_bytes_by_its_code']:.2f})"
            if "link_bytes_by_its_code" in row
            else "-"
        )
        print(
            f"{row['label']:40}{row['wall_s']:8.3f}{row['exposed_s']:9.4f}{row['boundary_s']:9.3f}"
            f"{row['boundary_exposed_s']:9.4f}{row['cpu_s']:8.3f}{link:>9}{row['memory_bytes_per_param']:9.1f}"
            f"{row['window_loss']:8.4f}"
        )
    print("\nboundary: the largest step of a window. (Bytes in parentheses are by DeepSpeed's code, not counted.)")


def main() -> int:
    made = parser(__doc__, steps=3 * INTERVAL)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parse(made)
    if options.steps is not None and options.steps < INTERVAL:
        made.error(f"--steps has to be at least {INTERVAL}, a window; found {options.steps}")
    # DeepSpeed starts its worker process at the first window's end.
    return run_race(Race(LABELS, figures_of, checks_of, show, warmup=2 * INTERVAL), options)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchmarkError as error:
        print(f"zenflow: {error}", file=sys.stderr)
        sys.exit(2)
