"""`benchmarks/sequence.py` end to end on a tiny model: exact gradients, half of the memory, failures in their rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import sequence, sequence_contestants
from benchmarks.step_cost import BenchmarkError
from tests.helpers.extent import only_in_test_all

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@only_in_test_all
def test_two_ranks_keep_half_and_have_the_gradients_of_one_process(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "sequence.json"
    command = [sys.executable, "benchmarks/sequence.py", "--size", "tiny", "--stages", "0", "--rounds", "1"]
    command += ["--steps", "1", "--only", "ulysses-z0", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report == json.loads(done.stdout.splitlines()[-1])
    [table] = report["tables"]
    one, row = table["rows"]
    assert (one["name"], one["gradient_error"], one["sent_bytes"]) == ("one-process", 0, 0)
    assert 0 < row["gradient_error"] < 1e-5
    assert row["loss_error"] < 1e-6
    assert row["kept_to_one"] <= 1.1 / 2
    # Gradients of 4 bytes alone: each of two ranks sends one half, and the sum of the other; the rest is of tokens.
    assert row["sent_bytes"] > 4 * table["num_params"]
    assert row["ms"] > 0


def test_gradient_errors_are_of_the_worst_parameter_relative_to_its_largest() -> None:
    expected = {"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([100.0, 1.0])}
    found = {"a": torch.tensor([3.0, -4.0]), "b": torch.tensor([90.0, 1.0])}
    assert sequence.gradient_error(found, expected) == (0.5, "a")


def test_a_contestant_that_fails_has_its_error_in_its_row() -> None:
    def fail() -> None:
        raise BenchmarkError("it ended; its last words:\n  File\n[rank0]: ValueError: no heads\n")

    team = sequence.Team.__new__(sequence.Team)
    team.name, team.num_ranks, team.error, team.ranks = "ring-z0", 2, None, []
    team._folder = Namespace(cleanup=lambda: None)  # type: ignore[assignment]
    team._try(fail)
    team.turn(1)  # of nobody: it has ended
    row = sequence.row_of(team, team, None)
    assert row["error"] == "ValueError: no heads"
    [check] = sequence.checks_of([{"rows": [row]}], [])
    assert not check["met"]


def test_gradients_that_are_wrong_miss_their_limit() -> None:
    row = {"name": "ring-z0", "label": "ring", "num_ranks": 2, "gradient_error": 2e-5, "loss_error": 0.0}
    assert [check["met"] for check in sequence.checks_of([{"rows": [row]}], [])] == [False, True]
    peer = row | {"name": "deepspeed-alst-z0"}
    assert sequence.checks_of([{"rows": [peer]}], []) == []


def test_parameters_that_are_gathered_meanwhile_are_no_activations() -> None:
    model = torch.nn.Linear(4, 8, bias=False)
    x = torch.ones(2, 4, requires_grad=True)
    with sequence_contestants.Activations(model) as counts:
        model.weight.data = torch.randn(8, 4)  # as a gather does: another storage than at the start
        model(x).square().sum()
    assert counts.nbytes == 4 * (2 * 4 + 2 * 8)  # its input and its output


def test_labels_that_count_lie_unevenly_and_batches_are_the_same_for_all() -> None:
    tiny = sequence_contestants.SIZES["tiny"]
    steps = [sequence_contestants.Steps(tiny, 64, 1, sys.stdout) for _ in range(2)]
    first, second = (one.batch(3) for one in steps)
    assert torch.equal(first["input_ids"], second["input_ids"])
    counted = [int((part != -100).sum()) for part in first["labels"].chunk(2, dim=1)]
    assert counted == [32 - 25, 32]


def test_unknown_contestants_and_pictures_of_nothing_are_refused() -> None:
    for more, words in ((["--only", "zero9"], "unknown: zero9"), (["--picture", "x.png"], "--lengths")):
        command = [sys.executable, "benchmarks/sequence.py", *more]
        done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=100)
        assert done.returncode == 2
        assert words in done.stderr
