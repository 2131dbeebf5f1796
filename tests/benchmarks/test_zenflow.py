"""`benchmarks/zenflow.py` end to end on a tiny model, and how it measures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import contestants, zenflow
from tests.helpers.extent import only_in_test_all

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@only_in_test_all
def test_zenflow_tiny_run_counts_its_bytes(tmp_path: Path) -> None:
    out = tmp_path / "zenflow.json"
    command = [sys.executable, "benchmarks/zenflow.py", "--sizes", "1M", "--rounds", "1", "--steps", "4"]
    done = subprocess.run(
        [*command, "--json", str(out)], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=300
    )
    assert done.returncode in (0, 1), done.stderr
    report = json.loads(out.read_text())
    assert report == json.loads(done.stdout.splitlines()[-1])
    [table] = report["tables"]
    rows = {row["name"]: row for row in table["rows"]}
    assert list(rows) == [name for name in zenflow.LABELS if not name.startswith("deepspeed")]
    assert 2.2 <= rows["zenflow"]["link_bytes_per_param"] < 2.27
    assert 2.2 <= rows["zenflow-synchronous"]["link_bytes_per_param"] < 2.27
    assert 0.88 <= rows["zenflow-on-device"]["link_bytes_per_param"] < 0.91
    # The host's 12 and 9.0 of transfers and sums, and the device's, which on a CPU is host memory too.
    assert rows["superoffload"]["memory_bytes_per_param"] > 12
    assert rows["zenflow"]["memory_bytes_per_param"] > 20
    assert rows["superoffload"]["window_loss"] == rows["cpu"]["window_loss"] != rows["zenflow"]["window_loss"]
    promises = [check for check in report["checks"] if "over the link" in check["check"]]
    assert len(promises) == 2
    assert all(check["met"] for check in promises)


def test_a_boundary_is_the_largest_step_of_a_window_the_median_over_windows() -> None:
    run = Namespace(wall=[[1.0, 1.0, 5.0, 1.0, 7.0, 1.0, 1.0, 1.0, 99.0], [9.0, 1.0, 1.0, 1.0]])
    assert zenflow.at_boundaries(run) == 7.0  # type: ignore[arg-type]


def test_deepspeed_sends_two_and_a_half_times_the_weights() -> None:
    """In units of the weights' bytes, which are two per parameter; section 5 of the paper promises 1.125."""
    assert zenflow.by_its_code() / 2 == 2.5
    assert zenflow.PROMISED["zenflow"] / 2 == pytest.approx(1.125)


def test_memory_of_children_counts_and_what_they_share_counts_once() -> None:
    before = contestants.memory_bytes()
    mebibytes, code = 64, "import sys; held = b'1' * (64 * 2**20); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        grown = contestants.memory_bytes() - before
        child.communicate()
    assert mebibytes <= grown / 2**20 < mebibytes + 24


def test_a_child_that_works_is_waited_for() -> None:
    code = "import sys, time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\n"
    code += "print('done', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        contestants.wait_for_children()
        os.set_blocking(child.stdout.fileno(), False)
        assert child.stdout.read() == b"done\n"
        child.communicate()
