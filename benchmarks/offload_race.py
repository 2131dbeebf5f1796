"""A race of contestants that step on the host: what `superoffload.py` and `zenflow.py` share.

Forward and backward use one thread; the optimizer has all cores that are left, or all of them where nothing runs beside
it. Contestants take turns of a few steps, as in `step_cost.py`; a turn ends when nothing of it is under way any more,
weights on their way included, so that nobody works in another's time.

Processes that do the same differ by a percent or two to their end, which is as much as the limits here. So each
contestant has several, as far as memory holds them, and the one with the shortest median turn stands for it.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.models import SHAPES
from benchmarks.step_cost import (
    WARMUP_STEPS,
    Contestant,
    available_bytes,
    conclude,
    find_peers,
    hardware,
    least_disturbed,
    process_bytes,
    run_heat,
)

PASSES = "passes"
"""The contestant that runs forward and backward only, from whose steps exposed time is counted."""

Row = dict[str, Any]

# At a turn's end what its last step left under way is awaited, as training does once. Steps of a tenth of a second need
# turns of more steps, or that wait would be what is measured.
_SMALL, _TIMES_AS_MANY = ("1M", "5M"), 4


@dataclass(frozen=True)
class Race:
    """What sets one race apart.

    Attributes:
        labels: of contestants, by name; `PASSES` first. Those whose name begins with "deepspeed" need `--peers`.
        figures_of: more figures of one contestant, beside `PASSES`.
        checks_of: limits of one size, from its contestants and their rows.
        show: prints the table of one size.
        warmup: first steps, which are not counted.
        settings: by name, options of all contestants; the race is run once with each.
    """

    labels: Mapping[str, str]
    figures_of: Callable[[Contestant, Contestant], Row]
    checks_of: Callable[[str, Sequence[Contestant], Sequence[Row]], list[Row]]
    show: Callable[[Row], None]
    warmup: int = WARMUP_STEPS
    settings: Mapping[str, Sequence[str]] = field(default_factory=lambda: {"": ()})


def exposed(a: Contestant, passes: Contestant) -> float:
    """Seconds of a step beyond forward and backward: the median over rounds of the difference of a round's means."""
    pairs = zip(a.wall, passes.wall, strict=True)
    return statistics.median(statistics.mean(x) - statistics.mean(y) for x, y in pairs)


def wall_ratio(a: Contestant, b: Contestant) -> float:
    """Wall seconds of a over those of b: the median over rounds of the ratio of a round's means."""
    pairs = zip(a.wall, b.wall, strict=True)
    return statistics.median(statistics.mean(x) / statistics.mean(y) for x, y in pairs)


def median_turn(run: Contestant) -> float:
    """Wall seconds of a step: the median over rounds of a round's means; 0 of one that can't run."""
    return 0.0 if run.absent is not None else statistics.median(map(statistics.mean, run.wall))


def limit(size: str, check: str, at_most: float, measured: float) -> Row:
    """One check: what was measured, and the most that it may be."""
    row = {"check": f"{size}: {check}", "limit": at_most, "measured": round(measured, 4)}
    return row | {"met": measured <= at_most}


def rows_of(race: Race, runs: Sequence[Contestant], tokens: int) -> list[Row]:
    """One row per contestant."""
    passes = runs[0]
    rows = []
    for run in runs:
        row: Row = {"name": run.name, "label": race.labels[run.name]}
        if run.absent is not None:
            rows.append(row | {"absent": run.absent})
            continue
        wall = median_turn(run)
        facts, num_params, num_steps = run.end["facts"], run.end["num_params"], sum(map(len, run.wall))
        row |= {
            "wall_s": round(wall, 4),
            "cpu_s": round(statistics.median(statistics.mean(turn) for turn in run.cpu), 4),
            "tokens_per_s": round(tokens / wall, 1),
            "exposed_s": round(exposed(run, passes), 4),
            "exposed_share": round(exposed(run, passes) / wall, 4),
            "peak_mib": run.end["peak_mib"],
            "final_loss": run.losses[-1],
            "facts": facts,
        }
        if "d2h" in facts:
            row["link_bytes_per_param"] = round((facts["d2h"] + facts["h2d"]) / num_params / num_steps, 4)
            row["host_bytes_per_param"] = round(facts["host_bytes"] / num_params, 4)
        rows.append(row | race.figures_of(run, passes))
    return rows


def num_processes(names: Sequence[str], size: str, asked: int, available: int) -> int:
    """How many processes each contestant gets: as many as asked, or as memory holds."""
    need = sum(process_bytes(size, per_param=4 if name == PASSES else 20) for name in names)
    return max(1, min(asked, int(0.9 * available / need)))


def parser(doc: str | None, *, steps: int) -> argparse.ArgumentParser:
    """The options that races have in common.

    Args:
        steps: default number of steps per turn; small models take more.
    """
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--sizes", default=None, help=f"of {', '.join(SHAPES)}; default 25M,120M (25M with --quick)")
    made.add_argument("--rounds", type=int, default=None, help="default 9, of the slow 120M 7; 5 with --quick")
    small = f"{_TIMES_AS_MANY * steps} of {' and '.join(_SMALL)}"
    made.add_argument("--steps", type=int, help=f"steps per turn, default {steps}, {small}")
    made.add_argument(
        "--processes", type=int, help="of each contestant, default 3, 1 with --quick; fewer if memory says so"
    )
    made.add_argument("--peers", default="none", help="environment of benchmarks/peers.sh, or none")
    made.add_argument("--quick", action="store_true", help="about two minutes")
    made.add_argument("--json", type=Path, help="also write the JSON here")
    made.set_defaults(device="cpu", default_steps=steps)
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse and check the command line."""
    options = made.parse_args()
    options.sizes = (options.sizes or ("25M" if options.quick else "25M,120M")).split(",")
    unknown = [name for name in options.sizes if name not in SHAPES]
    if unknown:
        made.error(f"unknown: {', '.join(unknown)}")
    options.processes = options.processes or (1 if options.quick else 3)
    options.peers = find_peers(made, options.peers)
    return options


def _settings(device: str, cores: int) -> tuple[dict[str, str], list[str]]:
    """Variables and options of every contestant."""
    if device == "cuda":
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LSS_CPU_THREADS"), str(cores))
        return threads | {"DS_ACCELERATOR": "cuda"}, ["--settle", "--device", "cuda", "--threads", "0"]
    # Our workers run beside forward and backward; DeepSpeed's optimizer has the machine to itself.
    return {"LSS_CPU_THREADS": str(max(1, cores - 1))}, ["--settle"]


def run_race(race: Race, options: argparse.Namespace, more_report: Row | None = None) -> int:
    """Run it, and print the tables, the checks and the JSON; the exit status.

    Args:
        more_report: more entries of the JSON, with "checks" that count too.
    """
    start = time.perf_counter()
    machine = hardware()
    os.environ["BENCH_OPTIMIZER_THREADS"] = str(machine["cores"])
    variables, more = _settings(options.device, machine["cores"])
    names = [name for name in race.labels if options.peers or not name.startswith("deepspeed")]
    tables, checks = [], []
    versions: dict[str, str] = {}
    for size, (setting, own) in itertools.product(options.sizes, race.settings.items()):
        print(f"[{size} {setting}] {', '.join(names)}", file=sys.stderr, flush=True)
        steps = options.steps or options.default_steps * (_TIMES_AS_MANY if size in _SMALL else 1)
        how = argparse.Namespace(**(vars(options) | {"steps": steps}))
        start_one = functools.partial(Contestant, rank=variables, more=[*more, "--warmup", str(race.warmup), *own])
        processes = num_processes(names, size, options.processes, available_bytes())
        every = run_heat(processes * names, size, "offload", how, start_one)
        runs = least_disturbed(every, lambda run: run.name, median_turn)
        tokens = SHAPES[size].tokens
        table: Row = {
            "size": size,
            "setting": setting,
            "num_params": runs[0].end["num_params"],
            "tokens": tokens,
            "rounds": len(runs[0].wall),
            "steps_per_turn": steps,
            "processes": processes,
            "rows": rows_of(race, runs, tokens),
        }
        race.show(table)
        checks += race.checks_of(f"{size} {setting}".rstrip(), runs, table["rows"])
        tables.append(table)
        for facts in (row["facts"] for row in table["rows"] if "facts" in row):
            versions |= {key: facts[key] for key in ("torch", "python", "deepspeed") if key in facts}
    report = {
        "hardware": machine,
        "device": options.device,
        "versions": versions,
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "seconds": round(time.perf_counter() - start, 1),
        **(more_report or {}),
        "tables": tables,
        "checks": [*(more_report or {}).get("checks", []), *checks],
    }
    print(f"{machine}\n{versions}\n{report['seconds']} s in all")
    return conclude(report, options.json)
