"""What the host optimizer leaves exposed on a CPU: `python benchmarks/superoffload.py [--peers .venv-peers]`.

One model with bf16 weights and fp32 masters on the host, gradients clipped at norm 1.0, in every system that can:
`superoffload`, its synchronous sibling `cpu`, DeepSpeed's ZeRO-2 with offload. Threads and turns are described in
`offload_race.py`. On a GPU the comparison is `make gpu-bench`.

Wall time is what counts here: exposed is a step's wall time less that of a contestant that runs forward and backward
only, in the same round. Link bytes are counted by the link. The last line is JSON. Exits with 1 when a limit is missed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.offload_race import PASSES, Race, Row, limit, parse, parser, run_race, wall_ratio
from benchmarks.step_cost import BenchmarkError, Contestant

LABELS = {
    PASSES: "forward and backward only, bare loop",
    "superoffload": "ours superoffload, Trainer",
    "cpu": "ours cpu (synchronous), Trainer",
    "deepspeed-z2-offload": "DeepSpeed ZeRO-2 offload, bare loop",
}
# 2 + 2 bytes per parameter and step over the link, 16 on the host, and what pads buckets.
LINK_BYTES, HOST_BYTES, PADDING = 4, 16, 1.01


def checks_of(size: str, runs: Sequence[Contestant], rows: Sequence[Row]) -> list[Row]:
    by_name = {run.name: run for run in runs if run.absent is None}
    own = next(row for row in rows if row["name"] == "superoffload")
    ours, other = by_name["superoffload"], by_name["cpu"]
    peer = "deepspeed-z2-offload"
    checks = []
    if peer in by_name:
        ratio = wall_ratio(ours, by_name[peer])
        checks.append(limit(size, f"superoffload / {LABELS[peer]}, wall time of a step", 1.0, ratio))
    differing = sum(x != y for x, y in zip(ours.losses, other.losses, strict=True))
    differing += ours.end["digest"] != other.end["digest"]
    return [
        *checks,
        limit(size, "bytes over the link per parameter and step", LINK_BYTES * PADDING, own["link_bytes_per_param"]),
        limit(size, "bytes on the host per parameter", HOST_BYTES * PADDING, own["host_bytes_per_param"]),
        limit(size, "superoffload equals cpu: losses and weights that differ", 0, differing),
    ]


def show(table: Row) -> None:
    print(
        f"\n{table['size']} ({table['num_params']:,} parameters, {table['tokens']} tokens), bf16 weights, "
        "fp32 masters on the host, clip 1.0\n"
    )
    print(
        f"{'':48}{'wall s':>8}{'exposed':>9}{'share':>8}{'CPU s':>8}{'tokens/s':>10}{'link B':>8}{'host B':>8}"
        f"{'MiB':>7}"
    )
    for row in table["rows"]:
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


def main() -> int:
    race = Race(LABELS, lambda run, passes: {}, checks_of, show)
    return run_race(race, parse(parser(__doc__, steps=3)))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchmarkError as error:
        print(f"superoffload: {error}", file=sys.stderr)
        sys.exit(2)
