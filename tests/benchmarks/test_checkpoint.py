"""`benchmarks/checkpoint.py` end to end on a small state: every contestant, bytes, room, the JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.extent import only_in_test_all

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@only_in_test_all
def test_checkpoint_quick_run_counts_bytes_and_room(tmp_path: Path) -> None:
    out = tmp_path / "checkpoint.json"
    command = [sys.executable, "benchmarks/checkpoint.py", "--quick", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr  # its limits are not a matter of time
    report = json.loads(out.read_text())
    assert report == json.loads(done.stdout.splitlines()[-1])
    assert report["missed"] == []
    state = report["bytes"]
    assert state == 2048 * 1024 * 14
    assert set(report["save"]) == {"ours", "torch.save", "DCP", "safetensors"}
    assert set(report["load"]) >= {"ours, checked before", "ours, checked as read", "torch.load", "DCP"}
    assert state <= report["reshard"]["ours"]["bytes"] <= 1.05 * state < report["reshard"]["DCP"]["bytes"]
    sizes = report["other size"]
    assert set(sizes) == {"ours, checked before", "ours, checked as read"}  # DeepSpeed is a peer
    for name, passes in (("ours, checked before", 2), ("ours, checked as read", 1)):
        assert passes * state <= sizes[name]["load_bytes"] <= 1.05 * passes * state
        assert state <= sizes[name]["peak_disk"] <= 1.02 * state
        assert sizes[name]["convert_seconds"] == 0
