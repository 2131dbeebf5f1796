"""The same script under every launcher, as a user starts it: equal weights, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.extent import IS_ALL

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = Path(__file__).parent / "scripts" / "two_ranks.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

pytestmark = pytest.mark.slow


def launch(strategy: str, out: Path, *launcher: str) -> dict:
    run = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), strategy, str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(out)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return launch("ddp_find_unused_parameters_true", tmp_path_factory.mktemp("ddp") / "out.pt")


LAUNCHES = [
    ("zero2", (), "_SubprocessScriptLauncher"),
    ("superoffload", TORCHRUN, "_SubprocessScriptLauncher"),
    ("zero3_spawn", (), "_MultiProcessingLauncher"),
    ("superoffload_fork", (), "_MultiProcessingLauncher"),
    ("zero1_spawn", (), "_MultiProcessingLauncher"),
    ("zero3", TORCHRUN, "_SubprocessScriptLauncher"),
]


@pytest.mark.parametrize(("strategy", "launcher", "name"), LAUNCHES if IS_ALL else LAUNCHES[1:3])
def test_launcher(strategy, launcher, name, expected, tmp_path):
    result = launch(strategy, tmp_path / "out.pt", *launcher)
    assert result["ranks"] == 2
    assert result["launcher"] == name
    assert result["metrics"] == expected["metrics"]
    for key, value in expected["weights"].items():
        assert torch.equal(result["weights"][key], value), key
