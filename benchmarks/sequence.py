"""Sequence parallelism beside DeepSpeed's: `python benchmarks/sequence.py [--peers .venv-peers-0.19.6]`.

An unmodified Llama of transformers with its own loss, one sequence per batch, whose first 40 % have no labels, so that
ranks count different numbers of them. The same weights and batches for all; 2 gloo ranks, each a process with one
thread, against one process in plain PyTorch. Ours under the Trainer with every mode and ZeRO stage; of DeepSpeed ALST,
AutoSP and DistributedAttention in a bare loop, from the environment of `benchmarks/peers.sh`.

Per contestant: how far the gradients that it trains with, and its losses, are from those of the one process; what it
keeps for backward; what it sends; and the time of a step, in turns as in `step_cost.py`. Contestants of one ZeRO stage
run in one heat. `--lengths` measures what is kept for backward by 1, 2 and 4 ranks, without a clock, and `--picture`
draws it. A contestant that fails has its error in its row. The last line is JSON. Exits with 1 when a limit is missed.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.sequence_contestants import CONTESTANTS, MODES, SIZES
from benchmarks.step_cost import ROOT, BenchmarkError, Contestant, conclude, find_peers, free_port, hardware, run_heat

ONE = "one-process"
Row = dict[str, Any]
# Of gradients, per parameter, relative to its largest: a hundred roundings of 2^-24, in the sums of which ranks have
# another order. Of the mean loss a tenth of that. The tests of the package hold double precision to 1e-12.
GRADIENT_LIMIT, LOSS_LIMIT = 1e-5, 1e-6
KEPT_LIMIT = 1.1
"""Of what is kept for backward, times the ranks, over that of the one process."""
READY_SECONDS = 400  # AutoSP compiles the model


def label_of(name: str) -> str:
    if name == ONE:
        return "one process, plain PyTorch"
    whose, _, stage = name.rpartition("-z")
    theirs = {
        "compiled": "ours `ulysses`, compiled",
        "deepspeed-alst": "DeepSpeed ALST",
        "deepspeed-autosp": "DeepSpeed AutoSP, compiled",
        "deepspeed-attention": "DeepSpeed DistributedAttention",
    }
    return f"{theirs.get(whose, f'ours {whose}')}, ZeRO-{stage}"


def is_ours(name: str) -> bool:
    return name.startswith((*MODES, "compiled"))


class Rank(Contestant):
    """One process of `sequence_contestants.py`.

    Attributes:
        sent: bytes, per step.
    """

    def __init__(self, name: str, size: str, peers: Path | None, place: Mapping[str, str], more: Sequence[str]) -> None:
        self.sent: list[int] = []
        super().__init__(name, size, "", peers, place, more)

    def command(self, name: str, size: str, table: str) -> list[str]:
        return [str(ROOT / "benchmarks" / "sequence_contestants.py"), name, "--size", size]

    def ready(self) -> None:
        self.answer(READY_SECONDS)

    def take_turn(self) -> None:
        answer = self.answer(READY_SECONDS)
        self.wall.append(answer["wall"])
        self.cpu.append(answer["cpu"])
        self.losses += answer["loss"]
        self.sent += answer["sent"]


class Team:
    """The ranks of one contestant, which step together.

    Attributes:
        error: of what it failed, in its words; None where it did not.
        gradients: by the model's names.
    """

    def __init__(self, name: str, size: str, tokens: int, num_ranks: int, peers: Path | None, warmup: int = 2) -> None:
        self.name, self.num_ranks = name, num_ranks
        self.absent: str | None = None
        self.error: str | None = None
        self.gradients: dict[str, torch.Tensor] = {}
        self._folder = tempfile.TemporaryDirectory()
        self._target = Path(self._folder.name, "gradients.pt")
        port = str(free_port())
        self.ranks: list[Rank] = []
        for rank in range(num_ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "MASTER_PORT": port}
            place |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_ranks))
            place |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "benchmark"}
            more = ["--tokens", str(tokens), "--warmup", str(warmup), "--gradients", str(self._target)]
            self.ranks.append(Rank(name, size, peers, place, more))

    def _try(self, action: Callable[[], None]) -> None:
        """Do it where nothing failed before; note what fails."""
        if self.error is not None:
            return
        try:
            action()
        except (BenchmarkError, BrokenPipeError) as error:
            self.error = str(error)
            print(f"{self.name}: {error}", file=sys.stderr, flush=True)
            self.close()

    def ready(self) -> None:
        self._try(lambda: self._each(Rank.ready))

    def turn(self, steps: int) -> None:
        def act() -> None:
            self._each(lambda rank: rank.tell(str(steps)))
            self._each(Rank.take_turn)

        self._try(act)

    def finish(self) -> None:
        def act() -> None:
            self._each(lambda rank: rank.tell("end"))
            self._each(Rank.take_end)
            self.gradients = torch.load(self._target, weights_only=True)

        self._try(act)

    def _each(self, action: Callable[[Rank], None]) -> None:
        for rank in self.ranks:
            action(rank)

    def close(self) -> None:
        self._each(Rank.close)
        self._folder.cleanup()

    @property
    def wall(self) -> list[float]:
        """Milliseconds of a step, per round: the slower rank's."""
        rounds = zip(*(rank.wall for rank in self.ranks), strict=True)
        return [1e3 * max(map(statistics.mean, turn)) for turn in rounds]

    @property
    def cpu(self) -> list[float]:
        """CPU seconds of a step, per round: all ranks together."""
        return [sum(map(statistics.mean, turn)) for turn in zip(*(rank.cpu for rank in self.ranks), strict=True)]

    @property
    def losses(self) -> list[tuple[float, ...]]:
        """Per step, of every rank; the last is of the step whose gradients count."""
        return list(zip(*(rank.losses + rank.end["loss"] for rank in self.ranks), strict=True))

    @property
    def kept_bytes(self) -> int:
        return max(rank.end["saved_bytes"] for rank in self.ranks)

    def why(self) -> str:
        """The last line of what its first rank said before it failed."""
        return (self.error or "").strip().splitlines()[-1].removeprefix("[rank0]: ")


def gradient_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest difference within a parameter over its largest gradient, of the worst parameter, and which that is."""
    errors = {name: float((found[name] - g).abs().max() / g.abs().max()) for name, g in expected.items()}
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def row_of(team: Team, measure: Team, rival: Team | None) -> Row:
    """Of a contestant beside the one process, and beside its rival of ours in the same heat."""
    row: Row = {"name": team.name, "label": label_of(team.name), "num_ranks": team.num_ranks}
    if team.error is not None:
        return row | {"error": team.why(), "rivals": [] if rival is None else [rival.name]}
    error, worst = gradient_error(team.gradients, measure.gradients)
    pairs = zip(team.losses, measure.losses, strict=True)
    sent = [max(step) for step in zip(*(rank.sent for rank in team.ranks), strict=True)]
    row |= {
        "gradient_error": error,
        "worst_parameter": worst,
        "loss_error": max(abs(loss / one[0] - 1) for losses, one in pairs for loss in losses),
        "ms": round(statistics.median(team.wall), 1),
        "ms_least": round(min(team.wall), 1),
        "ms_largest": round(max(team.wall), 1),
        "cpu_s": round(statistics.median(team.cpu), 4),
        "kept_bytes": team.kept_bytes,
        "kept_to_one": round(team.kept_bytes / measure.kept_bytes, 4),
        "sent_bytes": statistics.median_low(sent),
        "peak_mib": max(rank.end["peak_mib"] for rank in team.ranks),
        "facts": team.ranks[0].end["facts"],
    }
    if rival is not None and rival.error is None:
        pairs_of = {"wall": (rival.wall, team.wall), "cpu": (rival.cpu, team.cpu)}
        row["seconds_of_rounds"] = {"ours": rival.name, **pairs_of}
        own = statistics.median_low([max(step) for step in zip(*(rank.sent for rank in rival.ranks), strict=True)])
        row["ours_to_this"] = {
            "ms": round(statistics.median(a / b for a, b in zip(rival.wall, team.wall, strict=True)), 3),
            "kept": round(rival.kept_bytes / team.kept_bytes, 3),
            "sent": round(own / row["sent_bytes"], 3),
        }
    return row


def rival_of(name: str, teams: Sequence[Team]) -> Team | None:
    """The contestant of ours that a peer's row compares with: the compiled one with a compiled one."""
    if not name.startswith("deepspeed"):
        return None
    whose, _, stage = name.rpartition("-")
    ours = f"compiled-{stage}" if whose == "deepspeed-autosp" else f"ulysses-{stage}"
    return next((team for team in teams if team.name == ours), None)


def table_of(stage: int, options: argparse.Namespace) -> Row:
    """The heat of one ZeRO stage."""
    names = [name for name in CONTESTANTS if name.endswith(f"-z{stage}")]
    if options.peers is None:
        names = [name for name in names if is_ours(name)]
    if options.only:
        names = [name for name in names if name in options.only]
    names = [ONE, *names]
    print(f"[ZeRO-{stage}] {', '.join(names)}", file=sys.stderr, flush=True)

    def start(name: str, size: str, table: str, peers: Path | None) -> Team:
        return Team(name, size, options.tokens, 1 if name == ONE else options.ranks, peers)

    teams = run_heat(names, options.size, "", options, start)
    measure = teams[0]
    if measure.error is not None:
        raise BenchmarkError(f"the one process, which the others are measured by, failed: {measure.error}")
    rows = [row_of(team, measure, rival_of(team.name, teams)) for team in teams]
    num_params = measure.ranks[0].end["num_params"]
    return {"stage": stage, "num_params": num_params, "tokens": options.tokens, "rows": rows}


def lengths_of(options: argparse.Namespace) -> list[Row]:
    """What is kept for backward, by length and number of ranks: one step each, nothing is clocked."""
    chosen = [(ONE, 1), *((f"{mode}-z0", ranks) for mode in ("ulysses", "ring") for ranks in (2, 4))]
    if options.peers is not None:
        chosen += [("deepspeed-alst-z3", ranks) for ranks in (2, 4)] + [("deepspeed-autosp-z0", 2)]
    rows: list[Row] = []
    for tokens in options.lengths:
        for name, ranks in chosen:
            print(f"[{tokens} tokens] {name}, {ranks} ranks", file=sys.stderr, flush=True)
            team = Team(name, options.size, tokens, ranks, options.peers, warmup=1)
            try:
                team.ready()
                team.finish()
            finally:
                team.close()
            row: Row = {"name": name, "label": label_of(name), "num_ranks": ranks, "tokens": tokens}
            if team.error is not None:
                rows.append(row | {"error": team.why()})
                continue
            kept = team.kept_bytes
            if name == ONE:
                of_one = kept
            row |= {"kept_bytes": kept, "kept_bytes_per_token": round(kept / tokens, 1)}
            rows.append(row | {"factor": round(of_one / kept, 3)})
    return rows


def checks_of(tables: Sequence[Row], lengths: Sequence[Row]) -> list[Row]:
    """Of ours only: a peer's row says what it does."""
    checks: list[Row] = []

    def add(check: str, limit: float, measured: float) -> None:
        checks.append({"check": check, "limit": limit, "measured": measured, "met": measured <= limit})

    for row in (row for table in tables for row in table["rows"] if is_ours(row["name"])):
        if "error" in row:
            add(f"{row['label']}: failures", 0, 1)
            continue
        add(f"{row['label']}: gradient error", GRADIENT_LIMIT, row["gradient_error"])
        add(f"{row['label']}: loss error", LOSS_LIMIT, row["loss_error"])
        # Ring and all-gather keep keys and values of other ranks too, which the width of the model decides.
        if row["name"].startswith("ulysses"):
            kept = round(row["kept_to_one"] * row["num_ranks"], 4)
            add(f"{row['label']}: kept for backward, times the ranks", KEPT_LIMIT, kept)
    for row in (row for row in lengths if row["name"].startswith("ulysses") and "error" not in row):
        add(f"{row['label']}, {row['num_ranks']} ranks, {row['tokens']} tokens: kept for backward, times the ranks",
            KEPT_LIMIT, round(row["num_ranks"] / row["factor"], 4))  # fmt: skip
    return checks


def show(table: Row) -> None:
    print(
        f"\nZeRO-{table['stage']}: {table['num_params']:,} parameters, one sequence of {table['tokens']} tokens, fp32\n"
    )
    print(
        f"{'':42}{'gradient':>10}{'loss':>10}{'ms':>9}{'kept MiB':>10}{'/ one':>7}{'sent KiB':>10}{'MiB':>6}"
        "  ours / this: ms, kept, sent"
    )
    for row in table["rows"]:
        if "error" in row:
            print(f"{row['label']:42}  {row['error']}")
            continue
        beside = ", ".join(f"{value:.3f}" for value in row.get("ours_to_this", {}).values())
        print(
            f"{row['label']:42}{row['gradient_error']:10.1e}{row['loss_error']:10.1e}{row['ms']:9.1f}"
            f"{row['kept_bytes'] / 2**20:10.2f}{row['kept_to_one']:7.3f}{row['sent_bytes'] / 2**10:10.1f}"
            f"{row['peak_mib']:6}  {beside}"
        )


def show_lengths(rows: Sequence[Row]) -> None:
    print(
        f"\nKept for backward per process\n\n{'':42}{'ranks':>6}{'tokens':>8}{'MiB':>9}{'B per token':>13}{'factor':>8}"
    )
    for row in rows:
        start = f"{row['label']:42}{row['num_ranks']:6}{row['tokens']:8}"
        if "error" in row:
            print(f"{start}  {row['error']}")
            continue
        print(f"{start}{row['kept_bytes'] / 2**20:9.2f}{row['kept_bytes_per_token']:13.1f}{row['factor']:8.2f}")


def draw(rows: Sequence[Row], path: Path) -> None:
    """What each process keeps for backward, by the tokens of a sequence."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
    lines: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if "error" not in row:
            lines.setdefault((row["name"], row["num_ranks"]), []).append(row)
    for (name, ranks), line in lines.items():
        style = {"ring": "--", "deepspeed-alst": ":", "deepspeed-autosp": "-."}.get(name.rpartition("-z")[0], "-")
        ranked = "" if name == ONE else f", {ranks} ranks"
        axis.plot(
            [row["tokens"] for row in line],
            [row["kept_bytes"] / 2**20 for row in line],
            style,
            marker="o",
            color={1: "0.4", 2: "C0", 4: "C1"}.get(ranks, "C2"),
            markersize=4,
            linewidth=1.6 if is_ours(name) or name == ONE else 3,
            label=f"{label_of(name)}{ranked}",
        )
    axis.set_xlabel("tokens of one sequence")
    axis.set_ylabel("kept for backward by each process, MiB")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="5M", help="of the model")
    parser.add_argument("--tokens", type=int, default=None, help="of a sequence; default: what the size says")
    parser.add_argument("--ranks", type=int, choices=(2, 4), default=2)
    parser.add_argument("--stages", type=int, nargs="*", default=[0, 1, 2, 3], help="ZeRO stages, default all")
    parser.add_argument("--only", nargs="*", default=[], help="contestants, for example ulysses-z0; default all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps per turn, default 2")
    parser.add_argument("--lengths", type=int, nargs="*", default=[], help="tokens, of what is kept for backward")
    parser.add_argument("--peers", default="none", help="environment of benchmarks/peers.sh, or none")
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    parser.add_argument("--picture", type=Path, help="a PNG of --lengths; needs matplotlib")
    options = parser.parse_args()
    options.quick = False
    options.tokens = options.tokens or SIZES[options.size].tokens
    unknown = [name for name in options.only if name not in CONTESTANTS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(CONTESTANTS)}")
    if options.picture is not None and not options.lengths:
        parser.error("--picture draws what --lengths measures; give some, for example --lengths 1024 2048")
    options.peers = find_peers(parser, options.peers)
    return options


def main() -> int:
    options = parse()
    start = time.perf_counter()
    machine = hardware()
    tables = [table_of(stage, options) for stage in options.stages]
    lengths = lengths_of(options)
    facts = [row["facts"] for table in tables for row in table["rows"] if "facts" in row]
    known = ("torch", "python", "transformers", "deepspeed")
    report = {
        "benchmark": "sequence",
        "hardware": machine,
        "versions": {key: fact[key] for fact in facts for key in known if key in fact},
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "size": options.size,
        "num_ranks": options.ranks,
        "num_rounds": options.rounds,
        "seconds": round(time.perf_counter() - start, 1),
        "tables": tables,
        "lengths": lengths,
        "checks": checks_of(tables, lengths),
    }
    print(f"{machine}\n{report['versions']}\n{report['seconds']} s in all")
    for table in tables:
        show(table)
    if lengths:
        show_lengths(lengths)
    if options.picture is not None:
        draw(lengths, options.picture)
    return conclude(report, options.json)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchmarkError as error:
        print(f"sequence: {error}", file=sys.stderr)
        sys.exit(2)
