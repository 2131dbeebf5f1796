"""The body of `make gpu` rehearsed on the CPU: arguments, every case, the JSON, the exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ops.gpu.helpers import ROOT


def _run_script(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "benchmarks/gpu/run.sh", str(out), *options]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment.pop("LSS_WHEELS", None)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def test_dry_run_writes_every_file(tmp_path: Path) -> None:
    done = _run_script(tmp_path, "--dry-run", "--numel", "4096")
    assert done.returncode == 0, done.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["failed"] == []
    assert summary["hardware"]["torch"] == torch.__version__
    for name in ("adamw", "sumsq", "triton", "transfers"):
        content = json.loads((tmp_path / f"{name}.json").read_text())
        assert content["is_rehearsal"]
        assert len(content["rows"]) >= 3
        assert all(row["median_ms"] > 0 and row["gb_s"] > 0 for row in content["rows"])
    assert "== adamw" in (tmp_path / "run.log").read_text()


def test_run_without_gpu_fails_and_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = _run_script(tmp_path)
    assert done.returncode == 1
    step = json.loads((tmp_path / "summary.json").read_text())["steps"]["gpu"]
    assert not step["ok"]
    assert "this needs a GPU" in step["error"]
