"""What the host optimizer leaves exposed on a CPU: `python benchmarks/superoffload.py [--peers .venv-peers]`.

One model with bf16 weights and fp32 masters on the host in every system that can: `superoffload`, its synchronous
sibling `cpu`, DeepSpeed's ZeRO-2 with offload; with none, half and all of the steps clipped by norm, half by a bound
that every second step's norm exceeds. Threads and turns are described in `offload_race.py`. On a GPU the comparison is
`make gpu-bench`.

Wall time is what counts here: exposed is a step's wall time less that of a contestant that runs forward and backward
only, in the same round. Link bytes are counted by the link. Before that, real engines step in virtual time, on links
and hosts as fast as data sheets say (`virtual_hardware.py`). The last line is JSON. Exits with 1 when a limit is
missed.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.offload_race import PASSES, Race, Row, limit, parse, parser, run_race, wall_ratio
from benchmarks.step_cost import BenchmarkError, Contestant
from benchmarks.virtual_hardware import virtual_report
from lightning_superscale.offload.superoffload.trial import FIRST_TRIAL_STEPS

LABELS = {
    PASSES: "forward and backward only, bare loop",
    "superoffload": "ours superoffload, Trainer",
    "cpu": "ours cpu (synchronous), Trainer",
    "deepspeed-z2-offload": "DeepSpeed ZeRO-2 offload, bare loop",
}
# 2 + 2 bytes per parameter and step over the link, 16 on the host, and what pads buckets.
LINK_BYTES, HOST_BYTES, PADDING = 4, 16, 1.01
# Clip rates: no norm of these models is above 1e6 or below 1e-3.
RATES = {"0 % clipped": ["--clip", "1e6"], "50 % clipped": ["--clip", "1e-3", "--clip-every", "2"]}
RATES |= {"100 % clipped": ["--clip", "1e-3"]}
# Nobody loses to `cpu`, but for what medians of such rounds vary by on an idle machine. Steps of 1M are too short.
AS_FAST, UNTIMED = 1.01, "1M"


def checks_of(size: str, runs: Sequence[Contestant], rows: Sequence[Row]) -> list[Row]:
    by_name = {run.name: run for run in runs if run.absent is None}
    own = next(row for row in rows if row["name"] == "superoffload")
    ours, other = by_name["superoffload"], by_name["cpu"]
    peer = "deepspeed-z2-offload"
    checks = []
    if peer in by_name:
        ratio = wall_ratio(ours, by_name[peer])
        checks.append(limit(size, f"superoffload / {LABELS[peer]}, wall time of a step", 1.0, ratio))
    if not size.startswith(UNTIMED):
        checks.append(limit(size, "superoffload / cpu, wall time of a step", AS_FAST, wall_ratio(ours, other)))
    differing = sum(x != y for x, y in zip(ours.losses, other.losses, strict=True))
    differing += ours.end["digest"] != other.end["digest"]
    return [
        *checks,
        limit(size, "bytes over the link per parameter and step", LINK_BYTES * PADDING, own["link_bytes_per_param"]),
        limit(size, "bytes on the host per parameter", HOST_BYTES * PADDING, own["host_bytes_per_param"]),
        limit(size, "superoffload equals cpu: losses and weights that differ", 0, differing),
    ]


def figures_of(run: Contestant, passes: Contestant) -> Row:
    """The share of steps that were clipped, and CPU seconds beyond forward and backward."""
    pairs = zip(run.cpu, passes.cpu, strict=True)
    row: Row = {"more_cpu_s": round(statistics.median(statistics.mean(x) - statistics.mean(y) for x, y in pairs), 4)}
    facts = run.end["facts"]
    if facts.get("normed_steps"):
        row["clipped_share"] = round(facts["clipped_steps"] / facts["normed_steps"], 3)
    row |= {"spread_s": spread(run, passes)}
    return row


def spread(run: Contestant, passes: Contestant) -> list[float]:
    """First and third quartile over rounds of the exposed seconds."""
    each = [statistics.mean(x) - statistics.mean(y) for x, y in zip(run.wall, passes.wall, strict=True)]
    quartiles = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
    return [round(quartiles[0], 4), round(quartiles[2], 4)]


def show(table: Row) -> None:
    print(
        f"\n{table['size']} ({table['num_params']:,} parameters, {table['tokens']} tokens), {table['setting']}, bf16 "
        "weights, fp32 masters on the host\n"
    )
    print(
        f"{'':40}{'wall s':>8}{'exposed':>9}{'share':>8}{'quartiles':>18}{'CPU s':>8}{'more CPU':>9}{'clipped':>9}"
        f"{'link B':>8}{'host B':>8}{'MiB':>7}"
    )
    for row in table["rows"]:
        if "absent" in row:
            print(f"{row['label']:40}  {row['absent']}")
            continue
        link, host = (
            f"{row[key]:.2f}" if key in row else "-" for key in ("link_bytes_per_param", "host_bytes_per_param")
        )
        quartiles = " to ".join(f"{value:.3f}" for value in row["spread_s"])
        clipped = f"{row['clipped_share']:.0%}" if "clipped_share" in row else "-"
        print(
            f"{row['label']:40}{row['wall_s']:8.3f}{row['exposed_s']:9.4f}{row['exposed_share']:8.1%}{quartiles:>18}"
            f"{row['cpu_s']:8.3f}{row['more_cpu_s']:9.3f}{clipped:>9}{link:>8}{host:>8}{row['peak_mib']:7}"
        )


def main() -> int:
    made = parser(__doc__, steps=4)  # as many of either kind, where every second one is clipped
    made.add_argument("--no-virtual", action="store_true", help="leave out the steps in virtual time")
    options = parse(made)
    # By then superoffload has tried whether its steps are better awaited, which it does in CPU training.
    race = Race(LABELS, figures_of, checks_of, show, warmup=FIRST_TRIAL_STEPS, settings=RATES)
    return run_race(race, options, None if options.no_virtual else virtual_report())


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchmarkError as error:
        print(f"superoffload: {error}", file=sys.stderr)
        sys.exit(2)
