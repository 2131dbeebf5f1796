"""What a whole training step costs: `python benchmarks/step_cost.py [--quick] [--peers .venv-peers]`.

Plain AdamW (a bare loop, and Lightning's Trainer), this package's strategies and DeepSpeed train the same model
from the same seed on the same tokens, each in a process of its own with one thread. They take turns, one step
each per round, so that a disturbance meets all of them; while one steps, the others sleep. CPU seconds of all
threads of a process are compared: ratios are medians over rounds of ratios taken within a round. The last line
of the output is JSON. Exits with 1 when a limit is missed: a ratio beyond its limit is measured again, those two
contestants alone and for longer, and then that figure counts; the first one is reported beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.models import SHAPES
from lightning_superscale.offload.link.cgroup import cgroup_free_bytes

ROOT = Path(__file__).resolve().parents[1]
YARDSTICK = "loop-fused"
LABELS = {
    "loop-fused": "plain AdamW(fused=True), bare loop",
    "loop-default": "plain AdamW(), bare loop",
    "auto-fused": "plain AdamW(fused=True), Trainer",
    "auto-default": "plain AdamW(), Trainer",
    "resident-fused": "ours resident, fused=True, Trainer",
    "resident-default": "ours resident, default, Trainer",
    "superoffload": "ours superoffload, fused=True, Trainer",
    "cpu": "ours cpu offload, fused=True, Trainer",
    "deepspeed-z1": "DeepSpeed ZeRO-1, torch fused AdamW",
    "deepspeed-z2-offload": "DeepSpeed ZeRO-2 offload, DeepSpeedCPUAdam",
}
# Who runs beside whom when memory does not hold everybody: limits compare within a family.
FAMILIES = {
    "fp32": (
        ("superoffload", "cpu", "deepspeed-z2-offload", "deepspeed-z1"),
        ("auto-fused", "resident-fused"),
        ("loop-default", "auto-default", "resident-default"),
    ),
    "bf16": (("superoffload", "deepspeed-z2-offload", "deepspeed-z1"), ("resident-fused",)),
    "clip": (("superoffload",), ("auto-fused", "resident-fused")),
}
QUICK = {"superoffload", "deepspeed-z2-offload", "auto-fused", "resident-fused"}
PRECISION = {"fp32": "32-true", "bf16": "bf16-true", "clip": "32-true", "offload": "bf16-true"}
CLIP = {"fp32": 0.0, "bf16": 0.0, "clip": 1.0, "offload": 1.0}
# Whose weights must have exactly the bits of whose.
EXACT = {
    "auto-fused": "loop-fused",
    "resident-fused": "loop-fused",
    "superoffload": "loop-fused",
    "cpu": "loop-fused",
    "auto-default": "loop-default",
    "resident-default": "loop-default",
}
# Names of contestants whose libraries are in the environment of benchmarks/peers.sh.
IN_PEERS = ("deepspeed", "torchao")
WARMUP_STEPS = 2
AGAIN_ROUNDS = 15
READY_SECONDS, ANSWER_SECONDS = 180, 120


class BenchmarkError(RuntimeError):
    """A contestant could not run."""


class Contestant:
    """One process that steps when asked.

    Args:
        rank: variables of its environment, such as those that make it one rank of several.
        more: options of `contestants.py` beside the usual ones.
    """

    def __init__(
        self,
        name: str,
        size: str,
        table: str,
        peers: Path | None,
        rank: Mapping[str, str] | None = None,
        more: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.cpu: list[list[float]] = []  # per round, per step
        self.wall: list[list[float]] = []
        self.losses: list[float] = []
        self.end: dict[str, Any] = {}
        self.absent: str | None = None  # why this contestant does not run
        python, environment = sys.executable, _environment()
        if name.startswith(IN_PEERS):
            if peers is None:
                raise BenchmarkError(f"{name} needs --peers, an environment that benchmarks/peers.sh makes")
            python = str(peers / "bin" / "python")
            environment |= peer_environment(peers)
        environment |= rank or {}
        command = [python, "-W", "ignore", *self.command(name, size, table), *more]
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115  # closed with the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )

    def command(self, name: str, size: str, table: str) -> list[str]:
        """The script that it runs, and its options."""
        command = [str(ROOT / "benchmarks" / "contestants.py"), name, "--size", size]
        command += ["--precision", PRECISION[table], "--clip", str(CLIP[table]), "--warmup", str(WARMUP_STEPS)]
        return command

    def answer(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], seconds)
        line = self._process.stdout.readline() if readable else ""
        if not line:
            why = f"said nothing for {seconds:.0f} s"
            if readable:
                why = f"ended with exit status {self._process.wait(ANSWER_SECONDS)}"
            self._log.seek(0)
            tail = "".join(self._log.readlines()[-15:])
            raise BenchmarkError(f"{self.name} {why}; its last words:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ready(self) -> None:
        self.absent = self.answer(READY_SECONDS).get("absent")

    def tell(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text + "\n")
        self._process.stdin.flush()

    def turn(self, steps: int) -> None:
        self.tell(str(steps))
        self.take_turn()

    def take_turn(self) -> None:
        """Wait for the end of steps that it was told to make."""
        answer = self.answer(ANSWER_SECONDS)
        self.cpu.append(answer["cpu"])
        self.wall.append(answer["wall"])
        self.losses += answer["loss"]

    def finish(self) -> None:
        self.tell("end")
        self.take_end()

    def take_end(self) -> None:
        self.end = self.answer(ANSWER_SECONDS)
        self.close()

    def close(self) -> None:
        if self._process.poll() is None:
            try:
                self._process.wait(timeout=0 if not self.end else 15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()


# glibc's malloc gives large tensors back to the system and takes them anew in every step, as a process's addresses
# happen to let it: 2000 to 5000 page faults in a step of 0.06 s, which made processes that did the same differ by 5 to
# 8 %. So all keep the memory that they had.
_KEEPS_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(64 * 2**20)}


def _environment() -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "PL_"))}
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LSS_CPU_THREADS"), "1") | {"OMP_WAIT_POLICY": "passive"}
    path = str(ROOT) + os.pathsep + environment.get("PYTHONPATH", "")
    return environment | one | _KEEPS_MEMORY | {"PYTHONPATH": path.rstrip(os.pathsep)}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def peer_environment(peers: Path) -> dict[str, str]:
    return {
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(peers / "extensions")),
        "PATH": f"{peers / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",  # DeepSpeed looks for ninja there
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }


class Series(NamedTuple):
    """What one contestant did in one heat."""

    heat: int
    contestant: Contestant


def num_weights(size: str) -> int:
    """About how many parameters the model has."""
    shape = SHAPES[size]
    return 12 * shape.num_layers * shape.width**2 + 2 * shape.vocabulary * shape.width


def process_bytes(size: str, per_param: int = 24) -> int:
    """About what one contestant occupies: libraries and activations, weights, gradient, two moments, two copies."""
    return 700 * 2**20 + per_param * num_weights(size)


def plan_heats(
    families: Iterable[Sequence[str]], need: int, available: int, yardstick: str = YARDSTICK
) -> list[list[str]]:
    """Merge families into as few heats as memory holds; the yardstick runs in each."""
    fits = int(0.8 * available / need)
    heats: list[list[str]] = []
    for family in families:
        if heats and len(heats[-1]) + len(family) <= fits:
            heats[-1] += family
        elif 1 + len(family) <= fits:
            heats.append([yardstick, *family])
        else:
            raise BenchmarkError(
                f"{1 + len(family)} processes of {need / 2**30:.1f} GiB need more than 80 % of the "
                f"{available / 2**30:.1f} GiB that are available; choose a smaller size with --sizes."
            )
    return heats


def num_rounds(size: str, options: argparse.Namespace) -> int:
    rounds: int = options.rounds or (5 if options.quick else 7 if size == "120M" else 9)
    return rounds


class Runs(Protocol):
    """What takes part in a heat."""

    absent: str | None

    def ready(self) -> None: ...
    def turn(self, steps: int) -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...


Running = TypeVar("Running", bound=Runs)


def run_heat(
    names: Sequence[str],
    size: str,
    table: str,
    options: argparse.Namespace,
    start: Callable[[str, str, str, Path | None], Running],
) -> list[Running]:
    contestants: list[Running] = []
    try:
        for name in names:  # one after the other: what one measures and tries in its first steps is of a quiet machine
            contestants.append(start(name, size, table, options.peers))
            contestants[-1].ready()
        present = [contestant for contestant in contestants if contestant.absent is None]
        for number in range(num_rounds(size, options)):
            shift = number % max(1, len(present))  # nobody always runs after the same neighbour's end of a round
            for contestant in present[shift:] + present[:shift]:
                contestant.turn(options.steps)
        for contestant in present:
            contestant.finish()
    finally:
        for contestant in contestants:
            contestant.close()
    return contestants


Run = TypeVar("Run")


def least_disturbed(
    runs: Iterable[Run], name_of: Callable[[Run], str], seconds_of: Callable[[Run], float]
) -> list[Run]:
    """Of each name's runs the one of the fewest seconds, in the order of names."""
    least: dict[str, Run] = {}
    for run in runs:
        known = least.setdefault(name_of(run), run)
        if seconds_of(run) < seconds_of(known):
            least[name_of(run)] = run
    return list(least.values())


class Timed(Protocol):
    """CPU seconds per round, per step."""

    @property
    def cpu(self) -> list[list[float]]: ...


def ratio(a: Timed, b: Timed) -> float:
    """CPU seconds of a over those of b: the median over rounds of both."""
    pairs = zip(a.cpu, b.cpu, strict=True)
    return statistics.median(statistics.mean(x) / statistics.mean(y) for x, y in pairs)


def available_bytes() -> int:
    """Memory that contestants can take: what the host has available, or less under a container's limit."""
    available, free = psutil.virtual_memory().available, cgroup_free_bytes()
    return available if free is None else min(available, free)


class Table:
    """All heats of one size under one setting."""

    def __init__(self, kind: str, size: str, options: argparse.Namespace) -> None:
        self.kind, self.size, self._options = kind, size, options
        self.series: dict[str, Series] = {}
        self.yardsticks: list[Contestant] = []
        families = [self._chosen(family, options) for family in FAMILIES[kind]]
        heats = plan_heats([f for f in families if f], process_bytes(size), available_bytes())
        for heat, names in enumerate(heats):
            print(f"[{kind} {size}] {', '.join(names)}", file=sys.stderr, flush=True)
            contestants = run_heat(names, size, kind, options, Contestant)
            self.yardsticks.append(contestants[0])
            for contestant in contestants:
                self.series.setdefault(contestant.name, Series(heat, contestant))

    @staticmethod
    def _chosen(family: Sequence[str], options: argparse.Namespace) -> list[str]:
        names = [name for name in family if name in QUICK] if options.quick else family
        return [name for name in names if options.peers or not name.startswith("deepspeed")]

    def ratio(self, name: str, other: str) -> float | None:
        """Directly where both ran in one heat, else by way of the yardstick of each heat."""
        if name not in self.series or other not in self.series:
            return None
        a, b = self.series[name], self.series[other]
        if YARDSTICK in (name, other) or a.heat == b.heat:
            heat = max(a.heat, b.heat)
            first = self.yardsticks[heat] if name == YARDSTICK else a.contestant
            second = self.yardsticks[heat] if other == YARDSTICK else b.contestant
            return ratio(first, second)
        return ratio(a.contestant, self.yardsticks[a.heat]) / ratio(b.contestant, self.yardsticks[b.heat])

    def minimum(self, name: str) -> float:
        """The least disturbed step's CPU seconds."""
        runs = self.yardsticks if name == YARDSTICK else [self.series[name].contestant]
        return min(step for run in runs for turn in run.cpu for step in turn)

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for name, label in LABELS.items():
            if name not in self.series:
                continue
            contestant = self.series[name].contestant
            if name == YARDSTICK:
                cpu = [step for y in self.yardsticks for r in y.cpu for step in r]
                wall = [step for y in self.yardsticks for r in y.wall for step in r]
            else:
                cpu = [step for r in contestant.cpu for step in r]
                wall = [step for r in contestant.wall for step in r]
            to_fused, to_default = self.ratio(name, YARDSTICK), self.ratio(name, "loop-default")
            rows.append(
                {
                    "name": name,
                    "label": label,
                    "cpu_s": round(statistics.median(cpu), 4),
                    "cpu_s_min": round(min(cpu), 4),
                    "cpu_s_max": round(max(cpu), 4),
                    "wall_s": round(statistics.median(wall), 4),
                    "to_plain_fused": None if to_fused is None else round(to_fused, 3),
                    "to_plain_default": None if to_default is None else round(to_default, 3),
                    "final_loss": contestant.losses[-1],
                    "digest": contestant.end["digest"],
                    "peak_mib": contestant.end["peak_mib"],
                    "facts": contestant.end["facts"],
                }
            )
        return rows

    def report(self) -> dict[str, Any]:
        num_params = self.yardsticks[0].end["num_params"]
        shape = SHAPES[self.size]
        return {
            "kind": self.kind,
            "size": self.size,
            "num_params": num_params,
            "tokens": shape.batch * shape.sequence,
            "num_heats": len(self.yardsticks),
            "num_rounds": len(self.yardsticks[0].cpu),
            "rows": self.rows(),
        }

    def _alone(self, name: str, other: str) -> list[Contestant]:
        """Measure two again, over more rounds: a few of them miss a limit of 5 % by chance."""
        print(f"[{self.kind} {self.size}] again, for longer: {name}, {other}", file=sys.stderr, flush=True)
        longer = argparse.Namespace(**{**vars(self._options), "rounds": AGAIN_ROUNDS})
        return run_heat([name, other], self.size, self.kind, longer, Contestant)

    def checks(self) -> list[dict[str, Any]]:
        checks: list[dict[str, Any]] = []

        def add(check: str, limit: float, measured: float, **more: float) -> None:
            row = {"check": f"{self.kind} {self.size}: {check}", "limit": limit, "measured": round(measured, 4)}
            checks.append(row | {key: round(value, 4) for key, value in more.items()} | {"met": measured <= limit})

        def compare(check: str, limit: float, name: str, other: str) -> None:
            measured = self.ratio(name, other)
            if measured is None:
                return
            more = {"of_minima": self.minimum(name) / self.minimum(other)}
            if measured > limit and not self._options.quick:
                more["in_the_table"] = measured
                a, b = self._alone(name, other)
                measured = ratio(a, b)
                more["of_minima"] = min(map(min, a.cpu)) / min(map(min, b.cpu))
            add(check, limit, measured, **more)

        for kind in ("fused", "default"):
            compare(f"resident / plain, both {kind}, Trainer", 1.05, f"resident-{kind}", f"auto-{kind}")
        if self.kind == "bf16":
            compare("resident / plain with masters by hand", 1.05, "resident-fused", YARDSTICK)
        compare("superoffload / DeepSpeed ZeRO-2 offload", 1.0, "superoffload", "deepspeed-z2-offload")
        for name, oracle in EXACT.items():
            if name in self.series and oracle in self.series:
                ours, plain = self.series[name].contestant, self.series[oracle].contestant
                differing = sum(x != y for x, y in zip(ours.losses, plain.losses, strict=True))
                differing += ours.end["digest"] != plain.end["digest"]
                add(f"{name} equals {oracle}: losses and weights that differ", 0, differing)
        tolerance = 2e-2 if self.kind == "bf16" else 1e-3
        for name in ("deepspeed-z1", "deepspeed-z2-offload"):
            if name in self.series:
                last, plain_last = self.series[name].contestant.losses[-1], self.yardsticks[0].losses[-1]
                add(f"{name}: relative distance of its final loss", tolerance, abs(last / plain_last - 1))
        return checks


def hardware() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        cpu = fields.get("model name", cpu)
        if "cpu family" in fields:
            cpu += f" (family {fields['cpu family']}, model {fields.get('model', '?')})"
    memory = psutil.virtual_memory()
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory.total / 2**30, 1),
        "available_gib": round(memory.available / 2**30, 1),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def show(table: dict[str, Any]) -> None:
    setting = {
        "fp32": "fp32, no clipping",
        "bf16": "bf16 weights with fp32 masters, no clipping",
        "clip": "fp32, clipped at 1.0",
    }
    print(
        f"\n{table['size']} ({table['num_params']:,} parameters, {table['tokens']} tokens), {setting[table['kind']]}, "
        f"{table['num_rounds']} rounds\n"
    )
    print(f"{'':44}{'CPU s':>8}{'min':>8}{'max':>8}{'wall s':>8}{'/fused':>8}{'/default':>9}{'MiB':>7}  final loss")
    for row in table["rows"]:
        fused, default = (
            "-" if row[key] is None else f"{row[key]:.3f}" for key in ("to_plain_fused", "to_plain_default")
        )
        print(
            f"{row['label']:44}{row['cpu_s']:8.3f}{row['cpu_s_min']:8.3f}{row['cpu_s_max']:8.3f}{row['wall_s']:8.3f}"
            f"{fused:>8}{default:>9}{row['peak_mib']:7}  {row['final_loss']:.7f}"
        )


def conclude(report: dict[str, Any], path: Path | None) -> int:
    """Print the checks and the JSON, also to `path`; the exit status."""
    print()
    for check in report["checks"]:
        state = "met   " if check["met"] else "MISSED"
        line = f"{state} {check['check']}: {check['measured']} (at most {check['limit']})"
        notes = [f"{key.replace('_', ' ')} {check[key]}" for key in ("of_minima", "in_the_table") if key in check]
        print("; ".join([line, *notes]))
    text = json.dumps(report)
    if path:
        path.write_text(text + "\n")
    print(text)
    return 0 if all(check["met"] for check in report["checks"]) else 1


def find_peers(parser: argparse.ArgumentParser, given: str) -> Path | None:
    """The environment that holds DeepSpeed, ready to be used."""
    if given == "none":
        return None
    peers = Path(given).absolute()
    if not (peers / "bin" / "python").exists():
        parser.error(f"no environment in {peers}: make it with benchmarks/peers.sh, or pass --peers none")
    # A start of DeepSpeed that was killed leaves a lock that every later one would wait for.
    for lock in (peers / "extensions").glob("*/lock"):
        lock.unlink()
    return peers


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=None, help=f"of {', '.join(SHAPES)}; default 25M,120M (25M with --quick)")
    parser.add_argument("--tables", default=None, help="of fp32, bf16, clip; default all (fp32 with --quick)")
    parser.add_argument("--rounds", type=int, default=None, help="default 9, of the slow 120M 7; 5 with --quick")
    parser.add_argument("--steps", type=int, default=1, help="steps per turn, default 1")
    parser.add_argument("--peers", default="none", help="environment of benchmarks/peers.sh, or none")
    parser.add_argument("--quick", action="store_true", help="about a minute; leaves most contestants out")
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    options.sizes = (options.sizes or ("25M" if options.quick else "25M,120M")).split(",")
    options.tables = (options.tables or ("fp32" if options.quick else "fp32,bf16,clip")).split(",")
    unknown = [name for name in options.sizes if name not in SHAPES] + [t for t in options.tables if t not in FAMILIES]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    options.peers = find_peers(parser, options.peers)
    return options


def main() -> int:
    options = parse()
    start = time.perf_counter()
    machine = hardware()
    tables = []
    for kind in options.tables:
        # Every size in fp32; what other settings change, the first size shows.
        for size in options.sizes if kind == "fp32" else options.sizes[:1]:
            tables.append(Table(kind, size, options))
    reports = [table.report() for table in tables]
    checks = [check for table in tables for check in table.checks()]
    versions: dict[str, str] = {}
    for row in (row for report in reports for row in report["rows"]):
        versions |= {key: row["facts"][key] for key in ("torch", "python", "deepspeed") if key in row["facts"]}
    report = {
        "hardware": machine,
        "versions": versions,
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "steps_per_turn": options.steps,
        "seconds": round(time.perf_counter() - start, 1),
        "tables": reports,
        "checks": checks,
    }
    print(f"{machine}\n{versions}\n{report['seconds']} s in all")
    for table in reports:
        show(table)
    return conclude(report, options.json)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchmarkError as error:
        print(f"step_cost: {error}", file=sys.stderr)
        sys.exit(2)
