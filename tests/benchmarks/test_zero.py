"""`benchmarks/zero.py` end to end on a tiny model: ranks, bits, collectives, the JSON, stages that are absent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import zero
from tests.helpers.extent import only_in_test_all

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@only_in_test_all
def test_zero_tiny_run_reports_exact_contestants_and_their_collectives(tmp_path: Path) -> None:
    out = tmp_path / "zero.json"
    tables = ["fp32", "clip"]
    command = [sys.executable, "benchmarks/zero.py", "--sizes", "1M", "--rounds", "2", "--steps", "1"]
    command += ["--tables", ",".join(tables), "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=280)
    # A model of a few milliseconds per step proves nothing about cost: limits may be missed, exactness may not.
    assert done.returncode in (0, 1), done.stderr
    report = json.loads(out.read_text())
    assert report == json.loads(done.stdout.splitlines()[-1])
    assert report["num_ranks"] == 2
    assert [table["kind"] for table in report["tables"]] == tables
    names = {"fp32": {"ddp", "zero1", "zero2", "fsdp2", "zero3"}, "clip": {"ddp", "zero1", "zero2"}}
    for table in report["tables"]:
        assert {row["name"] for row in table["rows"]} == names[table["kind"]]
        num_control = 2 if table["kind"] == "clip" else 1
        for row in table["rows"]:
            assert 0 < row["cpu_s_min"] <= row["cpu_s"] <= row["cpu_s_max"]
            if row["name"] in ("zero1", "zero2"):
                assert row["collectives"] == {"reduce_scatter": 1, "all_gather": 1, "control": num_control}
    rest = [check for check in report["checks"] if " / " not in check["check"]]
    assert sum("equals ddp" in check["check"] for check in rest) == 2
    assert all(check["met"] for check in rest), rest


def test_team_adds_up_its_ranks() -> None:
    team = zero.Team.__new__(zero.Team)
    team.ranks = [Namespace(cpu=[[1.0, 2.0], [3.0, 4.0]]), Namespace(cpu=[[0.5, 0.5], [0.25, 0.25]])]
    assert team.cpu == [[1.5, 2.5], [3.25, 4.25]]
    assert team.steps == [1.5, 2.5, 3.25, 4.25]


def test_zero_unknown_name_is_refused() -> None:
    command = [sys.executable, "benchmarks/zero.py", "--only", "zero9"]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "unknown: zero9" in done.stderr
