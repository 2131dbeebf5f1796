"""How a step's time grows with parameters and ranks: `python benchmarks/scaling.py [--sizes 10M,25M] [--ranks 1,2]`.

Transformers of 10M parameters to a billion with bf16 weights train on 16 tokens per rank and step, so few that the
optimizer has a large share of a step. Three times are taken: the whole step's wall time, its CPU seconds, and the wall
time in which an optimizer runs, as the strategy's own record has it in turns of their own; of each the least disturbed
turn counts. For each contestant a line is fitted to their logarithms: its slope is the exponent with which seconds
grow, 1 where a parameter costs the same at every size.

Every process has one thread for forward and backward and one for its optimizer; ranks talk over gloo. Contestants of
one size and number of ranks take turns, as many as memory holds at once. More ranks than cores share them, and
`shares_cores` says so. On one rank each contestant has several processes, as far as memory holds them, and the one with
the shortest median turn stands for it: processes that do the same differ by percents to their end. States are fp32 up
to 350M parameters; at a billion everything is bf16. What memory can't hold is a row that says so. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.models import SHAPES
from benchmarks.step_cost import BenchmarkError, available_bytes, hardware, least_disturbed, num_weights, run_heat
from benchmarks.versus.entrant import Entrant
from benchmarks.versus.techniques import num_cores
from lightning_superscale.offload.superoffload.trial import FIRST_TRIAL_STEPS

Row = dict[str, Any]
SIZES = tuple(name.removesuffix("-few") for name in SHAPES if name.endswith("-few"))
DEFAULT_SIZES = SIZES[SIZES.index("10M") :]
RANKS = (1, 2, 4)
# Of a step: its wall time, CPU seconds of all ranks, and wall time in which an optimizer runs.
KEYS = {"step": "step, wall", "cpu": "step, CPU of all ranks", "optimizer": "optimizer, wall"}
LIBRARIES_BYTES = 600 * 2**20
# Of what is available, that contestants of one heat may take.
_SHARE_OF_MEMORY = 0.85
# Steps per turn. At a turn's end what its last step left under way is awaited, as training does once; small models have
# longer turns, or that wait would be measured.
_STEPS, _STEPS_OF_SMALL, _FIRST_THAT_IS_NOT_SMALL = 4, 16, "60M"


@dataclass(frozen=True)
class Line:
    """One contestant over all sizes.

    Attributes:
        bytes_per_param: of each rank: weights, gradients and what buffers double.
        shared_bytes_per_param: of all ranks together: masters and states.
        largest: the largest size that it is measured at.
        over_ranks: whether it runs on several ranks too.
    """

    label: str
    bytes_per_param: int
    shared_bytes_per_param: int
    largest: str = "350M"
    over_ranks: bool = False

    def needed_bytes(self, size: str, num_ranks: int) -> int:
        """About what all its ranks occupy together."""
        per_param = num_ranks * self.bytes_per_param + self.shared_bytes_per_param
        return num_ranks * LIBRARIES_BYTES + per_param * num_weights(f"{size}-few")


LINES = {
    "cpu": Line("cpu", 8, 14),
    "superoffload": Line("superoffload", 8, 16),
    "cpu-all-bf16": Line("cpu, all bf16", 6, 6, largest="1B"),
    "superoffload-all-bf16": Line("superoffload, all bf16", 6, 8, largest="1B"),
    "zero2": Line("zero2", 6, 12, over_ranks=True),
    "zero3": Line("zero3", 6, 12, over_ranks=True),
}


def names_at(size: str, num_ranks: int, chosen: Sequence[str]) -> list[str]:
    """The contestants of one size and number of ranks."""
    return [
        name
        for name in chosen
        if (num_ranks == 1 or LINES[name].over_ranks) and SIZES.index(size) <= SIZES.index(LINES[name].largest)
    ]


def heats_of(names: Sequence[str], size: str, num_ranks: int, available: int) -> list[list[str]]:
    """As many in one heat as memory holds, in the order of their names, so that those to be compared are neighbours."""
    heats: list[list[str]] = []
    free = 0.0
    for name in names:
        needed = LINES[name].needed_bytes(size, num_ranks)
        if not heats or needed > free:
            heats.append([])
            free = _SHARE_OF_MEMORY * available
        heats[-1].append(name)
        free -= needed
    return heats


def steps_of(size: str) -> int:
    """Steps per turn."""
    return _STEPS_OF_SMALL if SIZES.index(size) < SIZES.index(_FIRST_THAT_IS_NOT_SMALL) else _STEPS


def needed_bytes(names: Sequence[str], size: str, num_ranks: int) -> int:
    """About what one entrant of each name occupies."""
    return sum(LINES[name].needed_bytes(size, num_ranks) for name in names)


def num_processes(needed: int, num_ranks: int, asked: int, available: int) -> int:
    """How many processes each contestant of one rank gets: as many as asked, or as memory holds.

    Args:
        needed: bytes of one process of each.
    """
    return max(1, min(asked if num_ranks == 1 else 1, int(_SHARE_OF_MEMORY * available / needed)))


def row_of(entrant: Entrant, size: str, num_ranks: int) -> Row:
    row: Row = {"name": entrant.name, "label": LINES[entrant.name].label, "size": size, "num_ranks": num_ranks}
    if entrant.error is not None:
        return row | {"error": entrant.why}
    num_params = entrant.ranks[0].end["num_params"]
    steps_per_turn = len(entrant.ranks[0].wall[0])
    recorded = list(zip(*(rank.end["facts"]["optimizer_seconds"] for rank in entrant.ranks), strict=True))
    optimizer = [max(turn) / steps_per_turn for turn in recorded if None not in turn]
    timed = [i for i, turn in enumerate(recorded) if None in turn]
    wall, cpu = ([each[i] for i in timed] for each in (entrant.wall, entrant.cpu))
    row |= {"num_params": num_params, "num_steps": len(entrant.losses), "peak_mib": entrant.peak_mib}
    for key, seconds in (("step", wall), ("cpu", cpu), ("optimizer", optimizer)):
        row |= {
            f"{key}_s": round(statistics.median(seconds), 6),
            f"{key}_least_s": round(min(seconds), 6),
            f"{key}_largest_s": round(max(seconds), 6),
            f"{key}_ns_per_param": round(1e9 * min(seconds) / num_params, 3),
        }
    return row


def measure(size: str, num_ranks: int, options: argparse.Namespace) -> list[Row]:
    """The rows of one size and number of ranks."""
    rows: list[Row] = []
    names = names_at(size, num_ranks, options.only)
    for heat in heats_of(names, size, num_ranks, available_bytes()):
        needed = needed_bytes(heat, size, num_ranks)
        if needed > 0.95 * available_bytes():
            error = f"needs about {needed / 2**30:.1f} GiB, {available_bytes() / 2**30:.1f} GiB are available"
            rows += [
                {"name": name, "label": LINES[name].label, "size": size, "num_ranks": num_ranks, "error": error}
                for name in heat
            ]
            continue
        print(f"[{size}, {num_ranks} ranks] {', '.join(heat)}", file=sys.stderr, flush=True)
        more = ["--record", "--settle"]
        if num_ranks == 1:  # superoffload runs, which first tries whether its steps are better awaited
            more += ["--warmup", str(FIRST_TRIAL_STEPS)]
        start = functools.partial(Entrant, num_ranks=num_ranks, more=more)
        # Two turns a round: one is timed, one recorded.
        how = argparse.Namespace(
            peers=None, rounds=2 * options.rounds, steps=options.steps or steps_of(size), quick=False
        )
        processes = num_processes(needed, num_ranks, options.processes, available_bytes())
        entrants = run_heat(processes * heat, f"{size}-few", "bf16", how, start)
        every = [row_of(entrant, size, num_ranks) for entrant in entrants]
        # A row without seconds has an error, which is shown.
        rows += least_disturbed(every, lambda row: row["name"], lambda row: row.get("step_s", 0.0))
    return rows


def fit(xs: Sequence[float], ys: Sequence[float]) -> Row:
    """Least squares of log(y) over log(x): the slope, and its standard error where more than two points give one."""
    log_x, log_y = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_x, mean_y = statistics.mean(log_x), statistics.mean(log_y)
    spread = sum((x - mean_x) ** 2 for x in log_x)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(log_x, log_y, strict=True)) / spread
    residuals = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in zip(log_x, log_y, strict=True))
    error = math.sqrt(residuals / (len(log_x) - 2) / spread) if len(log_x) > 2 else None
    return {"slope": round(slope, 4), "error": None if error is None else round(error, 4), "points": len(log_x)}


def fits_of(rows: Sequence[Row]) -> list[Row]:
    """The exponents of each contestant at each number of ranks, of the whole step and of its optimizer."""
    lines: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if "error" not in row:
            lines.setdefault((row["name"], row["num_ranks"]), []).append(row)
    found: list[Row] = []
    for (name, num_ranks), line in lines.items():
        if len(line) < 2:
            continue
        params = [row["num_params"] for row in line]
        one: Row = {"name": name, "label": LINES[name].label, "num_ranks": num_ranks}
        one |= {key: fit(params, [row[f"{key}_least_s"] for row in line]) for key in KEYS}
        found.append(one)
    return found


def slope_text(fitted: Row) -> str:
    error = "" if fitted["error"] is None else f" +- {fitted['error']:.3f}"
    return f"{fitted['slope']:.3f}{error}"


def show(rows: Sequence[Row], fits: Sequence[Row]) -> None:
    print(
        f"\n{'':26}{'ranks':>6}{'size':>7}{'step s':>10}{'least':>10}{'largest':>10}{'CPU s':>10}"
        f"{'optimizer s':>13}{'least':>10}{'ns/param':>10}{'optimizer':>11}{'MiB':>8}"
    )
    for row in rows:
        start = f"{row['label']:26}{row['num_ranks']:6}{row['size']:>7}"
        if "error" in row:
            print(f"{start}  {row['error']}")
            continue
        print(
            f"{start}{row['step_s']:10.4f}{row['step_least_s']:10.4f}{row['step_largest_s']:10.4f}"
            f"{row['cpu_s']:10.4f}{row['optimizer_s']:13.4f}{row['optimizer_least_s']:10.4f}{row['step_ns_per_param']:10.2f}{row['optimizer_ns_per_param']:11.2f}"
            f"{row['peak_mib']:8}"
        )
    print("\nexponents of seconds over parameters, with their standard errors")
    for one in fits:
        slopes = "; ".join(f"{title} {slope_text(one[key])}" for key, title in KEYS.items())
        print(f"{one['label']:26}{one['num_ranks']:6} ranks: {slopes}")


def draw(rows: Sequence[Row], fits: Sequence[Row], path: Path) -> None:
    """Time per parameter over parameters, of whole steps and of optimizers, with the exponents in the legends."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(KEYS), figsize=(15, 6.6), sharex=True, layout="constrained")
    names = list(LINES)
    for axis, (key, title) in zip(axes, KEYS.items(), strict=True):
        for one in fits:
            line = [row for row in rows if (row["name"], row["num_ranks"]) == (one["name"], one["num_ranks"])]
            line = [row for row in line if "error" not in row]
            axis.plot(
                [row["num_params"] for row in line],
                [row[f"{key}_ns_per_param"] for row in line],
                {1: "-", 2: "--", 4: ":"}[one["num_ranks"]],
                marker="o",
                markersize=4,
                color=f"C{names.index(one['name'])}",
                label=f"{one['label']}, {one['num_ranks']} rank{'s' * (one['num_ranks'] > 1)}: {slope_text(one[key])}",
            )
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("parameters")
        axis.set_title(f"{title}; in the legend the exponent of seconds over parameters", fontsize=8.5)
        axis.grid(alpha=0.25, which="both")
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12)}  # where it hides no line
        axis.legend(fontsize=7, frameon=False, ncols=2, **below)
    axes[0].set_ylabel("ns per parameter and step, least disturbed turn")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(DEFAULT_SIZES), help=f"of {', '.join(SIZES)}")
    parser.add_argument("--ranks", default=",".join(map(str, RANKS)), help="of 1, 2, 4; default all")
    parser.add_argument("--only", default=",".join(LINES), help=f"of {', '.join(LINES)}; default all")
    parser.add_argument("--rounds", type=int, default=5, help="of a turn that is timed and one that is recorded")
    small = f"{_STEPS_OF_SMALL} below {_FIRST_THAT_IS_NOT_SMALL}"
    parser.add_argument("--steps", type=int, help=f"steps per turn, default {_STEPS}, {small}")
    parser.add_argument(
        "--processes", type=int, default=3, help="of each contestant on one rank, default 3; fewer if memory says so"
    )
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    parser.add_argument("--resume", action="store_true", help="leave out what the file of --json has already")
    parser.add_argument("--picture", type=Path, help="a PNG; needs matplotlib and two sizes")
    options = parser.parse_args()
    options.sizes, options.only = options.sizes.split(","), options.only.split(",")
    try:
        options.ranks = [int(text) for text in options.ranks.split(",")]
    except ValueError:
        parser.error(f"--ranks takes numbers of {RANKS} with commas, found {options.ranks!r}")
    unknown = [
        str(one) for one in (*options.sizes, *options.only, *options.ranks) if one not in (*SIZES, *LINES, *RANKS)
    ]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    if options.resume and (options.json is None or not options.json.is_file()):
        parser.error("--resume goes on with the file of --json; give one that is there")
    return options


def resumed(path: Path | None, machine: Row) -> Row:
    """What an earlier run wrote; an empty report without one.

    Raises:
        BenchmarkError: another machine measured it, whose seconds can't stand in one table with this one's, or another
            version wrote it.
    """
    if path is None:
        return {"rows": [], "dates": [], "seconds": 0.0}
    before = json.loads(path.read_text())
    for key in ("hardware", "dates", "seconds", "rows"):
        if key not in before:
            raise BenchmarkError(f"--resume: {path} has no {key!r}, as files of another version. Measure anew.")
    for key in ("cpu", "cores", "memory_gib"):
        if before["hardware"][key] != machine[key]:
            raise BenchmarkError(
                f"--resume: {path} was measured with {key} = {before['hardware'][key]!r}, this machine has "
                f"{machine[key]!r}. Measure anew, with another file for --json."
            )
    return dict(before)


def report_of(rows: Sequence[Row], machine: Row, options: argparse.Namespace, before: Row, start: float) -> Row:
    """Rows in the order of sizes and ranks, with their fits and the conditions they were measured under."""
    ordered = sorted(rows, key=lambda row: (SIZES.index(row["size"]), row["num_ranks"]))
    return {
        "benchmark": "scaling",
        "hardware": machine,
        "load_at_the_end": round(os.getloadavg()[0], 2),
        "shares_cores": [ranks for ranks in options.ranks if ranks > num_cores()],
        "dates": sorted({*before["dates"], datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()}),
        "tokens_per_rank": SHAPES["10M-few"].tokens,
        "seconds": round(before["seconds"] + time.perf_counter() - start, 1),
        "rows": ordered,
        "fits": fits_of(ordered),
    }


def main() -> int:
    options = parse()
    start = time.perf_counter()
    machine = hardware()
    for path in (options.json, options.picture):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    before = resumed(options.json if options.resume else None, machine)
    rows: list[Row] = before["rows"]
    known = {(row["size"], row["num_ranks"]) for row in rows if "error" not in row}
    rows = [row for row in rows if (row["size"], row["num_ranks"]) in known]
    for size in options.sizes:
        for ranks in options.ranks:
            if (size, ranks) not in known:
                rows += measure(size, ranks, options)
            report = report_of(rows, machine, options, before, start)
            if options.json is not None:
                options.json.write_text(json.dumps(report) + "\n")
    print(f"{machine}\n{report['seconds']} s in all")
    show(report["rows"], report["fits"])
    if options.picture is not None:
        draw(report["rows"], report["fits"], options.picture)
    print(json.dumps(report))
    return 1 if any("error" in row and "GiB" not in row["error"] for row in rows) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchmarkError as error:
        print(f"scaling: {error}", file=sys.stderr)
        sys.exit(2)
