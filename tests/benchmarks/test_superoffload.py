"""`benchmarks/superoffload.py` end to end on a tiny model: bytes, bits, the JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import virtual_hardware
from tests.helpers.extent import only_in_test_all

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@only_in_test_all
def test_superoffload_tiny_run_counts_its_bytes(tmp_path: Path) -> None:
    out = tmp_path / "superoffload.json"
    command = [sys.executable, "benchmarks/superoffload.py", "--sizes", "1M", "--rounds", "2", "--no-virtual"]
    command += ["--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr  # nothing in it is a matter of time without peers
    report = json.loads(out.read_text())
    assert report == json.loads(done.stdout.splitlines()[-1])
    assert [table["setting"] for table in report["tables"]] == ["0 % clipped", "50 % clipped", "100 % clipped"]
    for table, share in zip(report["tables"], (0.0, 0.5, 1.0), strict=True):
        check_table({row["name"]: row for row in table["rows"]}, share)
    assert len(report["checks"]) == 9


def check_table(rows: dict, clipped_share: float) -> None:
    assert list(rows) == ["passes", "superoffload", "cpu"]
    assert rows["passes"]["exposed_s"] == 0
    assert rows["superoffload"]["final_loss"] == rows["cpu"]["final_loss"]
    assert 4 <= rows["superoffload"]["link_bytes_per_param"] < 4.04
    assert 16 <= rows["superoffload"]["host_bytes_per_param"] < 16.16
    for name in ("superoffload", "cpu"):
        assert rows[name]["clipped_share"] == pytest.approx(clipped_share, abs=0.06)  # of nine steps


def test_virtual_hardware_hides_its_optimizer_with_few_buckets(monkeypatch, capsys) -> None:
    monkeypatch.setattr(virtual_hardware, "NUM_BUCKETS", 12)
    report = virtual_hardware.virtual_report()
    assert len(report["checks"]) == 3 * len(virtual_hardware.HARDWARE)
    assert all(check["met"] for check in report["checks"])
    assert {row["clip_rate"] for row in report["virtual"]} == {0.0, 0.5, 1.0}
    assert "GH200" in capsys.readouterr().out
