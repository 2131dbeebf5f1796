"""`make bench`'s script end to end on a tiny model without peers, its ratios, its table and its picture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.step_cost import BenchmarkError, num_weights
from benchmarks.versus import bench
from benchmarks.versus.contestants import VERSUS
from benchmarks.versus.entrant import Entrant, named_error
from benchmarks.versus.report import HEAD, bars_of, draw, table_text
from benchmarks.versus.rows import checkpoint_rows, equality_of, ratio_of, rows_of, sequence_rows
from benchmarks.versus.techniques import SHARDED, TECHNIQUES
from tests.helpers.extent import only_in_test_all

ROOT = Path(__file__).resolve().parents[2]


def _run(tmp_path: Path, *options: str) -> tuple[dict[str, Any], str]:
    out = tmp_path / "versus.json"
    command = [sys.executable, "benchmarks/versus/bench.py", "--quick", "--json", str(out), *options]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text()), done.stdout


def _check_heat(report: dict[str, Any], key: str) -> None:
    """Everybody has a row: ours and Lightning's with figures and exact, the peers that are not there with why."""
    technique = TECHNIQUES[key]
    rows = {row["name"]: row for row in report["rows"] if row["technique"] == technique.title}
    assert list(rows) == list(technique.labels)
    for name, row in rows.items():
        if name.startswith(("deepspeed", "torchao")):
            assert "needs --peers, an environment that benchmarks/peers.sh makes" in row["error"]
        elif name != "fsdp":
            assert row["wall_s"] > 0
            assert row["cpu_s"] > 0
            assert row["peak_mib"] > 100
    for ours, others in technique.rivals.items():
        assert rows[ours]["equality"].startswith("same losses and weights") or ours.startswith("zenflow")
        for other in (name for name in others if "error" not in rows[name]):
            assert {"ours": ours, "rounds": 2}.items() <= next(
                one for one in rows[other]["ratios"] if one["ours"] == ours
            ).items()


@only_in_test_all
@pytest.mark.slow
def test_a_quick_run_of_shards_without_peers_has_a_row_for_everybody(tmp_path: Path) -> None:
    report, printed = _run(tmp_path, "--only", "zero3")
    _check_heat(report, "zero3")
    rows = {row["name"]: row for row in report["rows"]}
    assert "requires a GPU accelerator" in rows["fsdp"]["error"]  # Lightning's words
    # FSDP2 in a loop and under Lightning's strategy does the same.
    assert rows["model-parallel"]["equality"] == rows["fsdp2"]["equality"] == "same losses"
    assert all(row["label"] in printed for row in report["rows"])
    assert set(report["seconds"]) == {"zero3"}


@pytest.mark.slow
@only_in_test_all
def test_a_quick_run_of_offload_without_peers_has_a_row_for_everybody(tmp_path: Path) -> None:
    report, _ = _run(tmp_path, "--only", "offload")
    _check_heat(report, "offload")
    # bf16 there and back: 2 + 2 bytes per parameter, and what pads buckets.
    [moved] = [row["moved_bytes"] for row in report["rows"] if row["name"] == "superoffload"]
    num_params = num_weights("1M")
    assert 4 * num_params < moved < 4.1 * num_params


@pytest.mark.slow
@pytest.mark.timeout(600)
@only_in_test_all
def test_the_whole_quick_run_without_peers_draws_its_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("transformers")
    picture = tmp_path / "versus.png"
    report, _ = _run(tmp_path, "--picture", str(picture))
    for key in TECHNIQUES:
        _check_heat(report, key)
    rest = {row["name"]: row for row in report["rows"]}
    assert rest["ulysses-z0"]["equality"].startswith("gradients within")
    assert rest["DCP"]["ratios"][0]["ours"] == bench.OURS_CHECKPOINT
    assert "needs --peers" in rest["deepspeed-autosp-z0"]["error"]
    assert picture.stat().st_size > 10_000


def test_every_contestant_of_a_technique_is_known_and_rivals_take_part() -> None:
    for technique in TECHNIQUES.values():
        assert set(technique.labels) <= set(VERSUS)
        for ours, others in technique.rivals.items():
            assert technique.labels[ours].startswith("ours")
            assert set(others) <= set(technique.labels)
    assert set(SHARDED) <= set(VERSUS)


def test_ratios_are_taken_within_rounds_with_their_range() -> None:
    # Round 2 ran on a machine twice as slow, round 3 disturbed one contestant.
    found = ratio_of("zero1", wall=([1.1, 2.2, 9.0], [1.0, 2.0, 1.0]))
    assert found == {"ours": "zero1", "rounds": 3, "wall": {"median": 1.1, "least": 1.1, "largest": 9.0}}


def _entrant(
    name: str, *, losses: list[float], digest: str = "a", wall: float = 1.0, error: str | None = None
) -> Entrant:
    entrant = Entrant.__new__(Entrant)
    entrant.name, entrant.error, entrant.absent = name, error, None
    end = {"digest": digest, "peak_mib": 7, "facts": {"written_bytes": 30}, "num_params": 5}
    turns = [[wall] for _ in losses]
    entrant.ranks = [Namespace(wall=turns, cpu=turns, losses=losses, end=end, close=lambda: None)] * 2  # type: ignore[list-item]
    return entrant


def test_equality_is_of_bits_where_weights_are_whole() -> None:
    oracle = _entrant("ddp", losses=[1.0, 2.0])
    assert equality_of(oracle, oracle) == "oracle"
    assert equality_of(_entrant("zero1", losses=[1.0, 2.0]), oracle) == "same losses and weights"
    assert equality_of(_entrant("zero1", losses=[1.0, 2.0], digest="b"), oracle) == "same losses, other weights"
    assert equality_of(_entrant("fsdp2", losses=[1.0, 2.0], digest="b"), oracle) == "same losses"
    assert equality_of(_entrant("zero1", losses=[1.0, 2.5]), oracle) == "losses within 2.5e-01"


def test_rows_have_what_was_measured_and_what_failed_its_error() -> None:
    losses = [1.0, 2.0]
    entrants = [
        _entrant("ddp", losses=losses, wall=2.0),
        _entrant("zero1", losses=losses, wall=1.0),
        _entrant("zero2", losses=losses, wall=3.0),
        _entrant("deepspeed-z1", losses=losses, error="it ended\nValueError: no gloo\nmore"),
    ]
    ddp, zero1, _, failed = rows_of(TECHNIQUES["zero12"], entrants)
    assert [(one["ours"], one["wall"]["median"], one["cpu"]["median"]) for one in ddp["ratios"]] == [
        ("zero1", 0.5, 0.5),
        ("zero2", 1.5, 1.5),
    ]
    # Both ranks together: seconds and memory; the bytes are of the busiest.
    assert (zero1["wall_s"], zero1["cpu_s"], zero1["peak_mib"], zero1["moved_bytes"]) == (1.0, 2.0, 14, 15.0)
    assert zero1["tokens_per_s"] == 2 * 512
    assert (failed["error"], failed["rivals"]) == ("ValueError: no gloo", ["zero1"])
    text = table_text([ddp, zero1, failed])
    assert "does not run here: ValueError: no gloo" in text
    assert "zero1 0.50 (0.50 to 0.50), zero2 1.50 (1.50 to 1.50)" in text
    assert all(line.count("|") == len(HEAD) + 1 for line in text.splitlines())


def test_bars_are_of_ratios_and_of_errors(tmp_path: Path) -> None:
    entrants = [_entrant("ddp", losses=[1.0]), _entrant("zero1", losses=[1.0]), _entrant("zero2", losses=[1.0])]
    entrants.append(_entrant("deepspeed-z2", losses=[1.0], error="RuntimeError: no"))
    rows = rows_of(TECHNIQUES["zero12"], entrants)
    bars = bars_of(rows)
    assert [label for _, label, _ in bars] == [
        "zero1 / Lightning DDP, Trainer",
        "zero2 / Lightning DDP, Trainer",
        "zero2 / DeepSpeed ZeRO-2, bare loop",
    ]
    assert bars[-1][2] == "RuntimeError: no"
    pytest.importorskip("matplotlib")
    draw(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5_000


def test_an_entrant_keeps_the_error_and_does_nothing_more() -> None:
    entrant = Entrant("deepspeed-z1", "1M", "fp32", None, num_ranks=2)
    assert entrant.why == "deepspeed-z1 needs --peers, an environment that benchmarks/peers.sh makes"
    entrant.ready()
    entrant.turn(1)  # of nobody
    entrant.finish()
    entrant.close()

    other = Entrant.__new__(Entrant)
    other.name, other.error, other.ranks = "zero1", None, []

    def fail() -> None:
        raise BenchmarkError("zero1 ended; its last words:\nTraceback\nRuntimeError: first\n")

    other._try(fail)
    other._try(lambda: pytest.fail("it goes on after an error"))
    assert other.why == "RuntimeError: first"


def test_the_error_is_named_by_its_line() -> None:
    assert (
        named_error("x\n[rank0]: AssertionError: only CUDA\nException ignored in: y\n") == "AssertionError: only CUDA"
    )
    assert named_error("killed\n") == "killed"
    assert named_error("") == "it said nothing"


def test_sequence_rows_are_those_of_its_own_script() -> None:
    one = {
        "name": "one-process",
        "label": "one process",
        "num_ranks": 1,
        "ms": 10.0,
        "ms_least": 9.0,
        "ms_largest": 11.0,
    }
    one |= {"cpu_s": 0.01, "peak_mib": 5, "sent_bytes": 3, "gradient_error": 0.0, "facts": {}}
    peer = one | {"name": "deepspeed-alst-z0", "label": "DeepSpeed ALST, ZeRO-0", "num_ranks": 2, "gradient_error": 1.0}
    pairs = {"wall": ([1.0, 3.0, 2.0], [1.0, 1.0, 1.0]), "cpu": ([1.0, 1.0, 1.0], [2.0, 2.0, 2.0])}
    peer["seconds_of_rounds"] = {"ours": "ulysses-z0", **pairs}
    failed = {"name": "ring-z0", "label": "ours ring, ZeRO-0", "num_ranks": 2, "error": "no heads", "rivals": []}
    rows = sequence_rows({"stage": 0, "tokens": 20, "rows": [one, peer, failed]})
    assert [row["label"] for row in rows] == ["one process", "DeepSpeed ALST", "ours ring"]
    assert (rows[0]["moved_bytes"], rows[1]["moved_bytes"], rows[1]["peak_mib"]) == (None, 3, 10)
    assert rows[0]["tokens_per_s"] == 2000
    assert rows[1]["equality"] == "gradients within 1.0e+00"
    [ratio] = rows[1]["ratios"]
    assert ratio["wall"] == {"median": 2.0, "least": 1.0, "largest": 3.0}
    assert ratio["cpu"]["median"] == 0.5
    assert rows[2]["error"] == "no heads"


def test_checkpoint_rows_are_of_the_whole_way() -> None:
    def run(save: float, convert: float, load: float) -> dict[str, float]:
        return {"save_seconds": save, "convert_seconds": convert, "load_seconds": load, "load_bytes": 4.0}

    ours = bench.OURS_CHECKPOINT
    runs = {ours: [run(1.0, 0.0, 1.0)], "DCP": [run(1.0, 0.0, 3.0)], "DeepSpeed": [run(1.0, 6.0, 1.0)], "broken": []}
    first, dcp, deepspeed, broken = checkpoint_rows(runs, {"broken": "no disk"}, ours)
    assert (first["wall_s"], first["ratios"]) == (2.0, [])
    assert [row["ratios"][0]["wall"]["median"] for row in (dcp, deepspeed)] == [0.5, 0.25]
    assert (broken["error"], broken["rivals"]) == ("no disk", [ours])


def test_an_unknown_race_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse(["--only", "zero9"])
    assert "unknown: zero9; known: zero12, zero3," in capsys.readouterr().err
