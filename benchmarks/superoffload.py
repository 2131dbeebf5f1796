"""What the host optimizer leaves exposed on a CPU: `python benchmarks/superoffload.py [--peers .venv-peers]`.

One model with bf16 weights and fp32 masters on the host, gradients clipped at norm 1.0, in every system that can:
`superoffload`, its synchronous sibling `cpu`, DeepSpeed's ZeRO-2 with offload. Forward and backward use one thread; the
optimizer has all cores that are left, or all of them where nothing runs beside it. Contestants take turns of a few
steps, as in `step_cost.py`; a turn ends when nothing of it is under way any more, weights on their way included, so
that nobody works in another's time. On a GPU the comparison is `make gpu-bench`.

Wall time is what counts here: exposed is a step's wall time less that of a contestant that runs forward and backward
only, in the same round. Link bytes are counted by the link. The last line is JSON. Exits with 1 when a limit is missed.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.models import SHAPES
from benchmarks.step_cost import BenchmarkError, Contestant, conclude, find_peers, hardware, run_heat

LABELS = {
    "passes": "forward and backward only, bare loop",
    "superoffload": "ours superoffload, Trainer",
    "cpu": "ours cpu (synchronous), Trainer",
    "deepspeed-z2-offload": "DeepSpeed ZeRO-2 offload, bare loop",
}
# 2 + 2 bytes per parameter and step over the link, 16 on the host, and what pads buckets.
LINK_BYTES, HOST_BYTES, PADDING = 4, 16, 1.01


def exposed(a: Contestant, passes: Contestant) -> float:
    """Seconds of a step beyond forward and backward: the median over rounds of the difference of a round's means."""
    pairs = zip(a.wall, passes.wall, strict=True)
    return statistics.median(statistics.mean(x) - statistics.mean(y) for x, y in pairs)


def wall_ratio(a: Contestant, b: Contestant) -> float:
    pairs = zip(a.wall, b.wall, strict=True)
    return statistics.median(statistics.mean(x) / statistics.mean(y) for x, y in pairs)


def rows_of(runs: Sequence[Contestant], tokens: int, steps: int) -> list[dict[str, Any]]:
    passes = runs[0]
    rows = []
    for run in runs:
        if run.absent is not None:
            rows.append({"name": run.name, "label": LABELS[run.name], "absent": run.absent})
            continue
        wall = statistics.median(statistics.mean(turn) for turn in run.wall)
        facts, num_params, num_steps = run.end["facts"], run.end["num_params"], len(run.wall) * steps
        row = {
            "name": run.name,
            "label": LABELS[run.name],
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
        rows.append(row)
    return rows


def checks_of(size: str, runs: Sequence[Contestant], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    by_name = {run.name: run for run in runs if run.absent is None}
    row_of = {row["name"]: row for row in rows}
    checks: list[dict[str, Any]] = []

    def add(check: str, limit: float, measured: float) -> None:
        row = {"check": f"{size}: {check}", "limit": limit, "measured": round(measured, 4)}
        checks.append(row | {"met": measured <= limit})

    ours = by_name["superoffload"]
    peer = "deepspeed-z2-offload"
    if peer in by_name:
        add(f"superoffload / {LABELS[peer]}, wall time of a step", 1.0, wall_ratio(ours, by_name[peer]))
    own = row_of["superoffload"]
    add("bytes over the link per parameter and step", LINK_BYTES * PADDING, own["link_bytes_per_param"])
    add("bytes on the host per parameter", HOST_BYTES * PADDING, own["host_bytes_per_param"])
    other = by_name["cpu"]
    differing = sum(x != y for x, y in zip(ours.losses, other.losses, strict=True))
    add(
        "superoffload equals cpu: losses and weights that differ",
        0,
        differing + (ours.end["digest"] != other.end["digest"]),
    )
    return checks


def show(size: str, rows: Sequence[dict[str, Any]], num_params: int, tokens: int) -> None:
    print(f"\n{size} ({num_params:,} parameters, {tokens} tokens), bf16 weights, fp32 masters on the host, clip 1.0\n")
    print(
        f"{'':48}{'wall s':>8}{'exposed':>9}{'share':>8}{'CPU s':>8}{'tokens/s':>10}{'link B':>8}{'host B':>8}"
        f"{'MiB':>7}"
    )
    for row in rows:
        if "absent" in row:
            print(f"{row['label']:48}  {row['absent']}")
            continue
        link, host = (
            f"{row[key]:.2f}" if key in row else "-" for key in ("link_bytes_per_param", "host_bytes_per_param")
        )
        print(
            f"{row['label']:48}{row['wall_s']:8.3f}{row['exposed_s']:9.4f}{row['exposed_share']:8.1%}{row['cpu_s']:8.3f}"
            f"{row['tokens_per_s']:10.0f}{link:>8}{host:>8}{row['peak_mib']:7}"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=None, help=f"of {', '.join(SHAPES)}; default 25M,120M (25M with --quick)")
    parser.add_argument("--rounds", type=int, default=None, help="default 9, of the slow 120M 7; 5 with --quick")
    parser.add_argument("--steps", type=int, default=3, help="steps per turn, default 3")
    parser.add_argument("--peers", default="none", help="environment of benchmarks/peers.sh, or none")
    parser.add_argument("--quick", action="store_true", help="about two minutes")
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    options.sizes = (options.sizes or ("25M" if options.quick else "25M,120M")).split(",")
    unknown = [name for name in options.sizes if name not in SHAPES]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    options.peers = find_peers(parser, options.peers)
    return options


def main() -> int:
    options = parse()
    start = time.perf_counter()
    machine = hardware()
    cores = machine["cores"]
    # Our workers run beside forward and backward; DeepSpeed's optimizer has the machine to itself.
    os.environ["BENCH_OPTIMIZER_THREADS"] = str(cores)
    threads = {"LSS_CPU_THREADS": str(max(1, cores - 1))}
    names = [name for name in LABELS if options.peers or not name.startswith("deepspeed")]
    tables, checks = [], []
    versions: dict[str, str] = {}
    for size in options.sizes:
        print(f"[{size}] {', '.join(names)}", file=sys.stderr, flush=True)
        start_one = functools.partial(Contestant, rank=threads, more=["--settle"])
        runs = run_heat(names, size, "offload", options, start_one)
        tokens = SHAPES[size].tokens
        rows = rows_of(runs, tokens, options.steps)
        num_params = runs[0].end["num_params"]
        show(size, rows, num_params, tokens)
        checks += checks_of(size, runs, rows)
        tables.append(
            {"size": size, "num_params": num_params, "tokens": tokens, "rounds": len(runs[0].wall), "rows": rows}
        )
        for facts in (row["facts"] for row in rows if "facts" in row):
            versions |= {key: facts[key] for key in ("torch", "python", "deepspeed") if key in facts}
    report = {
        "hardware": machine,
        "device": "cpu",
        "versions": versions,
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "steps_per_turn": options.steps,
        "seconds": round(time.perf_counter() - start, 1),
        "tables": tables,
        "checks": checks,
    }
    print(f"{machine}\n{versions}\n{report['seconds']} s in all")
    return conclude(report, options.json)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchmarkError as error:
        print(f"superoffload: {error}", file=sys.stderr)
        sys.exit(2)
