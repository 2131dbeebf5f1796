"""`benchmarks/step_cost.py` end to end on a tiny model: contestants, exactness, the JSON, the exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import step_cost
from benchmarks.models import SHAPES, Decoder, num_params
from tests.helpers.extent import only_in_test_all

ROOT = Path(__file__).resolve().parents[2]


def _run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/step_cost.py", *options]
    return subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=220)


@pytest.mark.slow
@only_in_test_all
def test_step_cost_tiny_run_reports_exact_contestants(tmp_path: Path) -> None:
    out = tmp_path / "step_cost.json"
    tables = ["fp32", "bf16"]
    options = ["--quick", "--sizes", "1M", "--tables", ",".join(tables), "--rounds", "2", "--peers", "none"]
    done = _run(*options, "--json", str(out))
    # A model of a few milliseconds per step proves nothing about cost: limits may be missed, exactness may not.
    assert done.returncode in (0, 1), done.stderr
    report = json.loads(out.read_text())
    assert report == json.loads(done.stdout.splitlines()[-1])
    assert report["hardware"]["cores"] >= 1
    assert report["versions"]["torch"]
    assert [table["kind"] for table in report["tables"]] == tables
    for table in report["tables"]:
        assert table["num_params"] == num_params(Decoder(SHAPES["1M"]))
        assert table["num_rounds"] == 2
        names = {row["name"] for row in table["rows"]}
        assert {"loop-fused", "resident-fused", "superoffload"} <= names
        for row in table["rows"]:
            assert 0 < row["cpu_s_min"] <= row["cpu_s"] <= row["cpu_s_max"]
            assert row["wall_s"] > 0
            assert row["to_plain_fused"] > 0
            assert row["final_loss"] == table["rows"][0]["final_loss"]
    exact = [check for check in report["checks"] if "equals" in check["check"]]
    assert len(exact) == 5
    assert all(check["met"] and check["measured"] == 0 for check in exact)
    assert (done.returncode == 0) == all(check["met"] for check in report["checks"])


def test_step_cost_missing_peer_environment_says_how_to_make_it(tmp_path: Path) -> None:
    done = _run("--quick", "--peers", str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert "benchmarks/peers.sh" in done.stderr


def test_plan_heats_little_memory_splits_between_families_with_the_yardstick_in_each() -> None:
    families = (("a", "b"), ("c",), ("d", "e"))
    assert step_cost.plan_heats(families, 10, 1000) == [["loop-fused", "a", "b", "c", "d", "e"]]
    assert step_cost.plan_heats(families, 10, 50) == [["loop-fused", "a", "b", "c"], ["loop-fused", "d", "e"]]
    with pytest.raises(step_cost.BenchmarkError, match="choose a smaller size"):
        step_cost.plan_heats(families, 10, 20)


def test_of_several_runs_of_a_name_the_fastest_counts() -> None:
    runs = [("cpu", 2.2), ("zero2", 1.0), ("cpu", 2.0), ("zero2", 1.1), ("broken", 0.0), ("broken", 0.0)]
    found = step_cost.least_disturbed(runs, lambda run: run[0], lambda run: run[1])
    assert found == [("cpu", 2.0), ("zero2", 1.0), ("broken", 0.0)]


def test_ratio_is_taken_within_rounds_then_its_median() -> None:
    # Round 2 ran on a machine twice as slow, round 3 disturbed one contestant.
    ours = Namespace(cpu=[[1.1], [2.2], [9.0]])
    plain = Namespace(cpu=[[1.0], [2.0], [1.0]])
    assert step_cost.ratio(ours, plain) == pytest.approx(1.1)
