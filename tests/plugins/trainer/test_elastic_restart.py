"""One command starts a run, and after a crash goes on with it, on as many ranks as there are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lightning_superscale as lss
from tests.helpers.extent import only_in_test_all

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = Path(__file__).parent / "scripts" / "elastic.py"

pytestmark = pytest.mark.slow


def command(ranks: int, *arguments: object, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, *options, str(SCRIPT), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def samples_of_steps(folder: Path) -> dict[int, tuple[int, ...]]:
    """The samples that the final weights are made of, by step: those of a later start take the place of lost ones."""
    files = sorted(folder.glob("seen-*.jsonl"))
    entries = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    last = {entry["step"]: entry["start"] for entry in sorted(entries, key=lambda entry: entry["start"])}
    steps: dict[int, list[int]] = {}
    for entry in entries:
        if entry["start"] == last[entry["step"]]:
            steps.setdefault(entry["step"], []).extend(entry["ids"])
    return {step: tuple(sorted(samples)) for step, samples in steps.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    done = command(1, "zero2", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("strategy", ["zero3 superoffload", pytest.param("zero2", marks=only_in_test_all)])
def test_a_run_killed_at_four_ranks_goes_on_at_two(strategy, undisturbed, tmp_path):
    killed = command(4, strategy, tmp_path, 11, 2)
    assert killed.returncode != 0
    assert lss.last_checkpoint(tmp_path / "checkpoints").endswith("step=9.ckpt")
    went_on = command(2, strategy, tmp_path, 11, 2)  # the same command, on fewer ranks
    assert went_on.returncode == 0, went_on.stderr[-3000:]
    assert_same_run(tmp_path, undisturbed)


@only_in_test_all
def test_torchrun_restarts_the_ranks_itself(undisturbed, tmp_path):
    done = command(2, "zero3 superoffload", tmp_path, 11, 1, options=("--max-restarts=1",))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "died").exists()
    assert_same_run(tmp_path, undisturbed)


def assert_same_run(folder: Path, undisturbed: Path) -> None:
    found, expected = (torch.load(place / "end.pt") for place in (folder, undisturbed))
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert samples_of_steps(folder) == samples_of_steps(undisturbed)
