"""Every technique beside every peer, in one run: `python benchmarks/versus/bench.py [--quick] [--peers .venv-peers]`.

`make bench` runs this, after it has made the environments of the peers. Heats follow one another; within a heat all
contestants train the same model on the same tokens, each in processes of its own, and take turns of a few steps. Wall
time is what ratios are of: ours over the peer's within a round, the median over rounds, with the range. A contestant
that can't run here has a row with its own error. Exits with 1 when one of ours fails.

Ends with one table, one picture (`--picture`) and the JSON (`--json`). The scripts of single claims, with limits, are
in the folder above; `make bench-claims` runs them.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import checkpoint, sequence
from benchmarks.step_cost import BenchmarkError, available_bytes, find_peers, hardware, process_bytes, run_heat
from benchmarks.versus.entrant import Entrant, named_error
from benchmarks.versus.report import draw, table_text
from benchmarks.versus.rows import Row, checkpoint_rows, rows_of, sequence_rows
from benchmarks.versus.techniques import TECHNIQUES, num_cores

SEQUENCE, CHECKPOINT = "sequence", "checkpoint"
SEQUENCE_STAGE = 0
OURS_CHECKPOINT = "ours, checked before"
NO_PEERS = "needs --peers, an environment that benchmarks/peers.sh makes"


def run_technique(key: str, options: argparse.Namespace) -> list[Row]:
    """One heat of whole training steps."""
    technique = TECHNIQUES[key]
    if options.quick:
        technique = dataclasses.replace(technique, size="1M", steps=1)
    needed = len(technique.labels) * technique.num_ranks * process_bytes(technique.size)
    if needed > available_bytes():
        raise BenchmarkError(
            f"{technique.title}: {len(technique.labels)} contestants of {technique.num_ranks} processes need about "
            f"{needed / 2**30:.1f} GiB together, {available_bytes() / 2**30:.1f} GiB are available; leave it out with "
            "--only, or free memory"
        )
    peers = options.zenflow_peers or options.peers if technique.wants_0_19_6 else options.peers
    start = functools.partial(
        Entrant, num_ranks=technique.num_ranks, variables=technique.variables(num_cores()), more=technique.more()
    )
    heat = argparse.Namespace(peers=peers, rounds=options.rounds, steps=technique.steps, quick=options.quick)
    return rows_of(technique, run_heat(list(technique.labels), technique.size, technique.table, heat, start))


def run_sequence(options: argparse.Namespace) -> list[Row]:
    """Sequence parallelism without sharding, as `sequence.py` runs it."""
    size = "tiny" if options.quick else "5M"
    given = argparse.Namespace(
        peers=options.peers, size=size, tokens=sequence.SIZES[size].tokens, ranks=2, rounds=options.rounds, steps=2
    )
    given.quick, given.only = options.quick, ["ulysses-z0", "deepspeed-alst-z0"] if options.quick else []
    rows = sequence_rows(sequence.table_of(SEQUENCE_STAGE, given))
    if options.peers is None:
        names = [n for n in sequence.CONTESTANTS if n.endswith("-z0") and n.startswith("deepspeed")]
        for name in names:
            label = sequence.label_of(name).removesuffix(", ZeRO-0")
            row: Row = {"technique": "sequence parallelism", "name": name, "label": label, "num_ranks": given.ranks}
            rows.append(row | {"error": NO_PEERS, "rivals": ["ulysses-z0"]})
    return rows


def run_checkpoint(options: argparse.Namespace) -> list[Row]:
    """A state that 2 ranks save and 3 load, as `checkpoint.py` does it; what fails once is not run again."""
    mib = 28 if options.quick else 400
    runs: dict[str, list[Row]] = {OURS_CHECKPOINT: [], "ours, checked as read": [], "DCP": []}
    peer = "DeepSpeed ZeRO-3 by universal checkpoint"
    runs[peer] = []
    errors: dict[str, str] = {} if options.peers else {peer: NO_PEERS}
    os.environ.update(OMP_NUM_THREADS="2", OMP_WAIT_POLICY="passive")
    with tempfile.TemporaryDirectory(prefix="checkpoint-bench-") as folder:
        for _ in range(options.rounds):
            for name, answer in checkpoint.library_at_other_size(folder, mib).items():
                runs[name].append(answer)
            if peer not in errors:
                try:
                    runs[peer].append(checkpoint.deepspeed_at_other_size(folder, mib, options.peers))
                except SystemExit as error:
                    errors[peer] = named_error(str(error))
    return checkpoint_rows(runs, errors, OURS_CHECKPOINT)


RACES: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    **{key: functools.partial(run_technique, key) for key in TECHNIQUES},
    SEQUENCE: run_sequence,
    CHECKPOINT: run_checkpoint,
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(RACES), help=f"of {', '.join(RACES)}; default all")
    parser.add_argument("--rounds", type=int, default=None, help="default 7; 2 with --quick")
    parser.add_argument("--peers", default="none", help="environment of benchmarks/peers.sh, or none")
    parser.add_argument(
        "--zenflow-peers", default="none", help="one with DeepSpeed 0.19.6, whose ZenFlow works; none takes --peers"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model: whether all run, not how fast; minutes")
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    parser.add_argument("--picture", type=Path, help="also draw the ratios here; needs matplotlib")
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    unknown = [name for name in options.only if name not in RACES]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(RACES)}")
    options.rounds = options.rounds or (2 if options.quick else 7)
    options.zenflow_peers = find_peers(parser, options.zenflow_peers)
    options.peers = find_peers(parser, options.peers)
    return options


def versions_of(rows: list[Row]) -> dict[str, list[str]]:
    """All versions that contestants found, by library."""
    found: dict[str, set[str]] = {}
    for facts in (row.get("facts", {}) for row in rows):
        for key in ("torch", "python", "deepspeed", "transformers"):
            if key in facts:
                found.setdefault(key, set()).add(facts[key])
    return {key: sorted(versions) for key, versions in found.items()}


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    """Run all races that are asked for. The JSON is written after each, so that an interrupt leaves those before it."""
    report: dict[str, Any] = {
        "benchmark": "versus",
        "hardware": hardware(),
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "is_quick": options.quick,
        "num_rounds": options.rounds,
        "settings": {TECHNIQUES[key].title: TECHNIQUES[key].setting for key in options.only if key in TECHNIQUES},
        "seconds": {},
        "rows": [],
    }
    for key in options.only:
        began = time.perf_counter()
        print(f"[{key}]", file=sys.stderr, flush=True)
        report["rows"] += RACES[key](options)
        report["seconds"][key] = round(time.perf_counter() - began, 1)
        report |= {"versions": versions_of(report["rows"]), "load_at_the_end": round(os.getloadavg()[0], 2)}
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(report) + "\n")
    return report


def main() -> int:
    options = parse()
    report = run_all(options)
    rows = report["rows"]
    print(f"{report['hardware']}\n{report['versions']}\n{sum(report['seconds'].values()):.0f} s in all")
    for title, setting in report["settings"].items():
        print(f"{title}: {setting}")
    print(f"\n{table_text(rows)}")
    if options.picture is not None:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        draw(rows, options.picture)
    failed = [row for row in rows if "error" in row and row["label"].startswith("ours")]
    for row in failed:
        print(f"failed: {row['label']}: {row.get('last_words', row['error'])}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchmarkError as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(2)
