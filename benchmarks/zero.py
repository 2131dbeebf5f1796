"""What sharding costs on two ranks: `python benchmarks/zero.py [--peers .venv-peers] [--sizes 25M,120M]`.

zero1 and zero2 beside Lightning's DDP, zero3 beside bare FSDP2, each beside DeepSpeed's same stage: two gloo ranks,
each a process with one thread, on the same model and the same tokens. DDP and ours run under the same Trainer; FSDP2
and DeepSpeed in a bare loop, so against those the Trainer is on our side of the scales. CPU seconds are of both ranks
together, all threads. Contestants take turns as in `step_cost.py`, in heats of three that memory holds.

Checked in the same run: losses and weights of zero1 and zero2 have DDP's bits, the others' losses are near, and ours
issue exactly the collectives that theory asks for. Exits with 1 when a limit is missed, after measuring again as
`step_cost.py` does. A stage that this version lacks is reported as such.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.models import SHAPES
from benchmarks.step_cost import (
    AGAIN_ROUNDS,
    BenchmarkError,
    Contestant,
    available_bytes,
    conclude,
    find_peers,
    free_port,
    hardware,
    num_weights,
    ratio,
    run_heat,
)

NUM_RANKS = 2
LABELS = {
    "ddp": "DDP, Trainer",
    "zero1": "ours zero1, Trainer",
    "zero2": "ours zero2, Trainer",
    "fsdp2": "FSDP2, bare loop",
    "zero3": "ours zero3, Trainer",
    "deepspeed-z1": "DeepSpeed ZeRO-1, bare loop",
    "deepspeed-z2": "DeepSpeed ZeRO-2, bare loop",
    "deepspeed-z3": "DeepSpeed ZeRO-3, bare loop",
}
# The first of each is what the others' ratios are taken to.
HEATS = {
    "fp32": (
        ("ddp", "zero1", "deepspeed-z1"),
        ("ddp", "zero2", "deepspeed-z2"),
        ("fsdp2", "zero3", "deepspeed-z3"),
    ),
    "clip": (("ddp", "zero1", "zero2"),),
}
LIMITS = {("zero1", "ddp"): 1.05, ("zero2", "ddp"): 1.05, ("zero3", "fsdp2"): 1.03} | {
    (f"zero{stage}", f"deepspeed-z{stage}"): 1.0 for stage in (1, 2, 3)
}
LOSS_TOLERANCE = 1e-3


class Team:
    """The ranks of one contestant, which step together."""

    def __init__(self, name: str, size: str, table: str, peers: Path | None) -> None:
        self.name = name
        self.absent: str | None = None
        port = str(free_port())
        self.ranks: list[Contestant] = []
        for rank in range(NUM_RANKS):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "MASTER_PORT": port}
            place |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(NUM_RANKS))
            place |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "benchmark"}
            self.ranks.append(Contestant(name, size, table, peers, place))

    @property
    def cpu(self) -> list[list[float]]:
        """Of all ranks together, per round, per step."""
        return [
            [sum(step) for step in zip(*turn, strict=True)] for turn in zip(*(r.cpu for r in self.ranks), strict=True)
        ]

    @property
    def steps(self) -> list[float]:
        return [step for turn in self.cpu for step in turn]

    @property
    def losses(self) -> list[tuple[float, ...]]:
        """Per step, of every rank."""
        return list(zip(*(rank.losses for rank in self.ranks), strict=True))

    @property
    def digests(self) -> list[str]:
        return [rank.end["digest"] for rank in self.ranks]

    def ready(self) -> None:
        for rank in self.ranks:
            rank.ready()
        self.absent = self.ranks[0].absent

    def turn(self, steps: int) -> None:
        for rank in self.ranks:
            rank.tell(str(steps))
        for rank in self.ranks:
            rank.take_turn()

    def finish(self) -> None:
        for rank in self.ranks:
            rank.tell("end")
        for rank in self.ranks:
            rank.take_end()

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()

    def collectives(self) -> dict[str, float] | None:
        """Per step, of rank 0; None where nobody counted them."""
        calls = self.ranks[0].end["facts"].get("calls")
        return None if calls is None else {kind: count / len(self.losses) for kind, count in calls.items()}

    def theory(self, *, is_clipped: bool) -> dict[str, float]:
        """What zero1 and zero2 need: each unit once there and back, an agreement, a norm where they clip."""
        num_units = self.ranks[0].end["facts"]["num_units"]
        return {"reduce_scatter": num_units, "all_gather": num_units, "control": 1 + is_clipped}

    def row(self, yardstick: Team) -> dict[str, Any]:
        row: dict[str, Any] = {"name": self.name, "label": LABELS[self.name], "yardstick": yardstick.name}
        if self.absent is not None:
            return row | {"absent": self.absent}
        return row | {
            "cpu_s": round(statistics.median(self.steps), 4),
            "cpu_s_min": round(min(self.steps), 4),
            "cpu_s_max": round(max(self.steps), 4),
            "wall_s": round(statistics.median(s for rank in self.ranks for turn in rank.wall for s in turn), 4),
            "to_yardstick": round(ratio(self, yardstick), 4),
            "peak_mib": max(rank.end["peak_mib"] for rank in self.ranks),
            "final_loss": statistics.mean(self.losses[-1]),
            "collectives": self.collectives(),
            "facts": self.ranks[0].end["facts"],
        }


class Table:
    """All heats of one size under one setting."""

    def __init__(self, kind: str, size: str, options: argparse.Namespace) -> None:
        self.kind, self.size, self._options = kind, size, options
        self.heats = [self._run(names, options) for names in self._chosen()]

    def _chosen(self) -> list[list[str]]:
        chosen = []
        for heat in HEATS[self.kind]:
            names = [n for n in heat if self._options.peers or not n.startswith("deepspeed")]
            if not self._options.only or set(names) & set(self._options.only):
                chosen.append(names)
        return chosen

    def _run(self, names: list[str], options: argparse.Namespace) -> list[Team]:
        need = len(names) * NUM_RANKS * (500 * 2**20 + 20 * num_weights(self.size))
        available = available_bytes()
        if need > 0.9 * available:
            raise BenchmarkError(
                f"{', '.join(names)} need about {need / 2**30:.1f} GiB together, {available / 2**30:.1f} GiB are "
                "available; choose a smaller size with --sizes."
            )
        print(f"[{self.kind} {self.size}] {', '.join(names)}", file=sys.stderr, flush=True)
        return run_heat(names, self.size, self.kind, options, Team)

    def report(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "size": self.size,
            "num_params": self.heats[0][0].ranks[0].end["num_params"],
            "tokens": NUM_RANKS * SHAPES[self.size].batch * SHAPES[self.size].sequence,
            "num_rounds": len(self.heats[0][0].cpu),
            "rows": [team.row(heat[0]) for heat in self.heats for team in heat],
        }

    def checks(self) -> list[dict[str, Any]]:
        checks: list[dict[str, Any]] = []

        def add(check: str, limit: float, measured: float, **more: float) -> None:
            row = {"check": f"{self.kind} {self.size}: {check}", "limit": limit, "measured": round(measured, 4)}
            checks.append(row | {key: round(value, 4) for key, value in more.items()} | {"met": measured <= limit})

        for heat in self.heats:
            teams = {team.name: team for team in heat if team.absent is None}
            for (name, other), limit in LIMITS.items():
                if name in teams and other in teams:
                    add(f"{name} / {other}", limit, **self._measured(teams[name], teams[other], limit))
            for team in list(teams.values())[1:]:
                self._check_numbers(team, heat[0], add)
        return checks

    def _measured(self, a: Team, b: Team, limit: float) -> dict[str, float]:
        """Ratio of two; beyond its limit, of the two alone over more rounds: some miss it by chance."""
        more = {"measured": ratio(a, b)}
        if more["measured"] > limit and not (self._options.rounds or self._options.quick):
            more["in_the_table"] = more["measured"]
            print(f"[{self.kind} {self.size}] again, for longer: {a.name}, {b.name}", file=sys.stderr, flush=True)
            a, b = self._run([a.name, b.name], argparse.Namespace(**{**vars(self._options), "rounds": AGAIN_ROUNDS}))
            more["measured"] = ratio(a, b)
        return more | {"of_minima": min(a.steps) / min(b.steps)}

    def _check_numbers(self, team: Team, plain: Team, add: Any) -> None:
        pairs = list(zip(team.losses, plain.losses, strict=True))
        if team.name in ("zero1", "zero2"):
            differing = sum(x != y for x, y in pairs)
            # Gradients scaled by a norm that was summed in another order have other bits.
            if self.kind != "clip":
                differing += team.digests != plain.digests
                add(f"{team.name} equals {plain.name}: losses and weights that differ", 0, differing)
            counted, theory = team.collectives(), team.theory(is_clipped=self.kind == "clip")
            add(
                f"{team.name}: collectives per step that theory does not ask for, or lacks", 0, float(counted != theory)
            )
        distance = max(abs(x / y - 1) for mine, theirs in pairs for x, y in zip(mine, theirs, strict=True))
        add(f"{team.name}: largest relative distance of a loss from {plain.name}'s", LOSS_TOLERANCE, distance)


def show(table: dict[str, Any]) -> None:
    setting = {"fp32": "fp32, no clipping", "clip": "fp32, clipped at 1.0"}[table["kind"]]
    print(
        f"\n{table['size']} ({table['num_params']:,} parameters, {table['tokens']} tokens on {NUM_RANKS} ranks), "
        f"{setting}, {table['num_rounds']} rounds\n"
    )
    print(
        f"{'':30}{'CPU s':>8}{'min':>8}{'max':>8}{'wall s':>8}{'ratio':>8} {'to':8}{'MiB':>6}  final loss, collectives"
    )
    for row in table["rows"]:
        if "absent" in row:
            print(f"{row['label']:30}  not in this version ({row['absent'].splitlines()[0]})")
            continue
        calls = ", ".join(f"{count:g} {kind}" for kind, count in (row["collectives"] or {}).items())
        print(
            f"{row['label']:30}{row['cpu_s']:8.3f}{row['cpu_s_min']:8.3f}{row['cpu_s_max']:8.3f}{row['wall_s']:8.3f}"
            f"{row['to_yardstick']:8.3f} {row['yardstick']:8}{row['peak_mib']:6}  {row['final_loss']:.7f} {calls}"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=None, help=f"of {', '.join(SHAPES)}; default 25M,120M (25M with --quick)")
    parser.add_argument(
        "--tables", default=None, help="of fp32, clip (first size only); default both (fp32 with --quick)"
    )
    parser.add_argument("--only", default="", help="heats with one of these contestants, for example zero1")
    parser.add_argument("--rounds", type=int, default=None, help="default 9, of the slow 120M 7; nothing is repeated")
    parser.add_argument("--steps", type=int, default=2, help="steps per turn, default 2")
    parser.add_argument("--peers", default="none", help="environment of benchmarks/peers.sh, or none")
    parser.add_argument("--quick", action="store_true", help="zero1 at 25M, 5 rounds: one or two minutes")
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    options.sizes = (options.sizes or ("25M" if options.quick else "25M,120M")).split(",")
    options.tables = (options.tables or ("fp32" if options.quick else "fp32,clip")).split(",")
    options.only = [name for name in (options.only or ("zero1" if options.quick else "")).split(",") if name]
    known = {*SHAPES, *HEATS, *LABELS}
    unknown = [name for name in (*options.sizes, *options.tables, *options.only) if name not in known]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    options.peers = find_peers(parser, options.peers)
    return options


def main() -> int:
    options = parse()
    start = time.perf_counter()
    machine = hardware()
    tables = [
        Table(kind, size, options)
        for kind in options.tables
        for size in (options.sizes if kind == "fp32" else options.sizes[:1])
    ]
    reports = [table.report() for table in tables]
    checks = [check for table in tables for check in table.checks()]
    facts = [row["facts"] for report in reports for row in report["rows"] if "facts" in row]
    report = {
        "hardware": machine,
        "versions": {key: fact[key] for fact in facts for key in ("torch", "python", "deepspeed") if key in fact},
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "num_ranks": NUM_RANKS,
        "steps_per_turn": options.steps,
        "seconds": round(time.perf_counter() - start, 1),
        "tables": reports,
        "checks": checks,
    }
    print(f"{machine}\n{report['versions']}\n{report['seconds']} s in all")
    for table in reports:
        show(table)
    return conclude(report, options.json)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchmarkError as error:
        print(f"zero: {error}", file=sys.stderr)
        sys.exit(2)
