"""`benchmarks/scaling.py`: the fit, who runs where, and a tiny run from end to end."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import scaling
from benchmarks.contestants import Turns, covered_seconds, watch
from benchmarks.models import SHAPES, Decoder, num_params
from tests.helpers.extent import only_in_test_all

ROOT = Path(__file__).resolve().parents[2]


@only_in_test_all
@pytest.mark.slow
def test_a_tiny_run_has_all_times_and_their_exponents(tmp_path: Path) -> None:
    out, picture = tmp_path / "scaling.json", tmp_path / "scaling.png"
    command = [
        sys.executable,
        "benchmarks/scaling.py",
        "--sizes",
        "0.2M,1M",
        "--ranks",
        "1",
        "--rounds",
        "2",
        "--processes",
        "2",
    ]
    command += ["--only", "cpu,superoffload-all-bf16", "--json", str(out)]
    try:
        import matplotlib  # noqa: F401

        command += ["--picture", str(picture)]
    except ModuleNotFoundError:
        pass
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report == json.loads(done.stdout.splitlines()[-1])
    assert [(row["name"], row["size"]) for row in report["rows"]] == [
        ("cpu", "0.2M"),
        ("superoffload-all-bf16", "0.2M"),
        ("cpu", "1M"),
        ("superoffload-all-bf16", "1M"),
    ]
    for row in report["rows"]:
        assert row["num_params"] == num_params(Decoder(SHAPES[f"{row['size']}-few"]))
        assert 0 < row["cpu_least_s"] <= row["cpu_s"]
        assert 0 < row["optimizer_least_s"] <= row["optimizer_s"] < row["step_largest_s"]
        assert row["step_ns_per_param"] == pytest.approx(1e9 * row["step_least_s"] / row["num_params"], rel=1e-3)
    assert [(one["name"], one["step"]["points"]) for one in report["fits"]] == [
        ("cpu", 2),
        ("superoffload-all-bf16", 2),
    ]
    assert picture.exists() == ("--picture" in command)
    command[command.index("0.2M,1M")] = "0.2M,1B,1M"
    command[command.index("1")] = "2"
    done = subprocess.run([*command, "--resume"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ranks]" not in done.stderr, "neither contestant runs on two ranks"
    assert json.loads(out.read_text())["rows"] == report["rows"], "what was measured stays"


def test_a_power_has_its_exponent_and_no_error() -> None:
    xs = [1.0, 10.0, 100.0]
    assert scaling.fit(xs, [3 * x**1.5 for x in xs]) == {"slope": 1.5, "error": 0.0, "points": 3}
    assert scaling.fit(xs[:2], [1.0, 10.0]) == {"slope": 1.0, "error": None, "points": 2}


def test_the_standard_error_is_of_least_squares() -> None:
    # Logarithms x = -1, 0, 1 and y = 1, -2, 1: no slope, residuals 6, so sqrt(6 / (3 - 2) / 2).
    xs, ys = [math.exp(x) for x in (-1, 0, 1)], [math.exp(y) for y in (1, -2, 1)]
    assert scaling.fit(xs, ys) == {"slope": 0.0, "error": round(math.sqrt(3), 4), "points": 3}


def test_fits_leave_out_what_failed_and_lines_of_one_point() -> None:
    def row(name: str, size: str, params: int) -> scaling.Row:
        times = {"step_least_s": params * 2e-9, "cpu_least_s": params * 3e-9, "optimizer_least_s": params * 1e-9}
        return {"name": name, "num_ranks": 1, "size": size, "num_params": params, **times}

    rows = [row("cpu", "1M", 10**6), row("cpu", "10M", 10**7), row("zero2", "1M", 10**6)]
    rows.append({"name": "cpu", "num_ranks": 1, "size": "1B", "error": "needs about 30 GiB"})
    [one] = scaling.fits_of(rows)
    assert (one["name"], one["step"]["slope"], one["optimizer"]["slope"]) == ("cpu", 1.0, 1.0)


def test_a_billion_parameters_are_for_bf16_states_and_ranks_for_sharding() -> None:
    names = list(scaling.LINES)
    assert scaling.names_at("1B", 1, names) == ["cpu-all-bf16", "superoffload-all-bf16"]
    assert scaling.names_at("350M", 1, names) == names
    assert scaling.names_at("10M", 4, names) == ["zero2", "zero3"]
    assert scaling.names_at("1B", 2, names) == []


def test_contestants_run_one_by_one_where_memory_does_not_hold_them() -> None:
    names = ["cpu", "superoffload"]
    needed = sum(scaling.LINES[name].needed_bytes("120M", 1) for name in names)
    assert scaling.heats_of(names, "120M", 1, 2 * needed) == [names]
    assert scaling.heats_of(names, "120M", 1, needed) == [["cpu"], ["superoffload"]]
    assert scaling.heats_of([], "1B", 2, needed) == [], "nobody runs a billion parameters on two ranks"


def test_as_many_neighbours_take_turns_as_memory_holds() -> None:
    """The machine drifts: a ratio of two that ran minutes apart says more about it than about them."""
    names = list(scaling.LINES)
    needed = [scaling.LINES[name].needed_bytes("350M", 1) for name in names]
    heats = scaling.heats_of(names, "350M", 1, int(1.01 * sum(needed[:2]) / 0.85))
    assert heats[0] == ["cpu", "superoffload"]
    assert [name for heat in heats for name in heat] == names
    assert scaling.heats_of(names, "350M", 1, 1) == [[name] for name in names]


def test_contestants_of_one_rank_have_as_many_processes_as_memory_holds() -> None:
    needed = scaling.needed_bytes(["cpu", "superoffload"], "10M", 1)
    available = [int(1.01 * needed * n / 0.85) for n in (1, 2, 5)]
    assert [scaling.num_processes(needed, 1, 3, bytes_) for bytes_ in (0, *available)] == [1, 1, 2, 3]
    assert scaling.num_processes(needed, 2, 3, 2**50) == 1, "ranks are processes of their own"


@pytest.mark.parametrize("size", ["10M", "25M", "60M", "120M", "350M", "1B"])
def test_sizes_are_what_their_names_say(size: str) -> None:
    said = float(size[:-1]) * {"M": 1e6, "B": 1e9}[size[-1]]
    assert scaling.num_weights(f"{size}-few") == pytest.approx(said, rel=0.05)


class FakeTimeline:
    """Has one span of an optimizer whenever it recorded."""

    is_open = False

    def open(self) -> None:
        self.is_open = True

    def close(self) -> list[Namespace]:
        found = [Namespace(lane="host optimizer", start=1.0, end=3.0)] * self.is_open
        self.is_open = False
        return found


def test_turns_that_are_timed_record_nothing_and_end_when_the_host_is_done() -> None:
    """Recording takes a core, and the host's work would run in the next contestant's turn."""
    turns = Turns(SHAPES["1M-few"], 0, io.StringIO())
    done: list[str] = []
    turns.records_steps, turns.settle = True, lambda: done.append("device")
    engine, timeline = Namespace(quiesce=lambda: done.append("host")), FakeTimeline()
    watch(turns, Namespace(link=object(), engines={"adamw": engine}, settings=Namespace(timeline=timeline)))
    turns.on_warm()
    recorded = []
    for _ in range(4):
        recorded.append(timeline.is_open)
        turns.settle()
        turns.on_turn()
    turns.on_end()
    assert recorded == [False, True, False, True]
    assert turns.facts["optimizer_seconds"] == [None, 2.0, None, 2.0]
    assert done == ["host", "device"] * 4
    rank = Namespace(wall=[[1.0, 3.0], [9.0, 9.0]] * 2, cpu=[[2.0, 2.0], [9.0, 9.0]] * 2)
    rank.end = {"num_params": 10, "facts": turns.facts}
    ran = Namespace(name="cpu", error=None, ranks=[rank], losses=[0.0] * 8, peak_mib=1, wall=[2, 9] * 2, cpu=[2, 9] * 2)
    row = scaling.row_of(ran, "1M", 1)
    assert [row[f"{key}_largest_s"] for key in scaling.KEYS] == [2, 2, 1.0]


def test_seconds_that_spans_share_count_once() -> None:
    assert covered_seconds([(0.0, 2.0), (1.0, 3.0), (1.5, 1.75), (5.0, 6.0)]) == 4.0
    assert covered_seconds([]) == 0.0


def test_only_a_file_that_is_there_is_resumed(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/scaling.py", "--resume", "--json", str(tmp_path / "none.json")]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "give one that is there" in done.stderr


def test_rows_of_another_machine_are_not_resumed(tmp_path: Path) -> None:
    path = tmp_path / "scaling.json"
    machine = {"cpu": "A", "cores": 2, "memory_gib": 23.5, "available_gib": 20.1, "load_1min": 0.4}
    path.write_text(json.dumps({"hardware": machine, "rows": [], "dates": ["2026-11-29"], "seconds": 100.0}))
    busier = machine | {"available_gib": 3.0, "load_1min": 2.0}
    assert scaling.resumed(path, busier)["dates"] == ["2026-11-29"]
    with pytest.raises(scaling.BenchmarkError, match=r"cpu = 'A', this machine has 'B'\. Measure anew"):
        scaling.resumed(path, machine | {"cpu": "B"})
    whole = {"hardware": machine, "rows": [], "dates": ["2026-11-29"], "seconds": 100.0}
    for key in whole:
        path.write_text(json.dumps({other: value for other, value in whole.items() if other != key}))
        missing = rf"has no '{key}', as files of another version\. Measure anew"
        with pytest.raises(scaling.BenchmarkError, match=missing):
            scaling.resumed(path, machine)


def test_an_unknown_size_is_refused() -> None:
    command = [sys.executable, "benchmarks/scaling.py", "--sizes", "9B"]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "unknown: 9B" in done.stderr
