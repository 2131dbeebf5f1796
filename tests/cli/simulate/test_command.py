"""`superscale simulate` as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lightning_superscale.cli import main

pytest.importorskip("simpy")

IMAGES = ["simulate", "tests.estimation.models:Images", "--input", "float32[8,3,32,32]"]


def test_a_table_of_sizes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*IMAGES, "--num-nodes", "1", "1250", "--slow-rank", "1.2"]) == 0
    said = capsys.readouterr().out
    assert "Images: " in said
    assert "on nodes of 8 x H100 SXM; 8 samples a batch; Trainer(strategy=SuperScaleStrategy(zero=3))" in said
    assert "10,000" in said, "numbers are whole in a narrow terminal"
    assert "100%" in said
    assert "efficiency" in said
    assert "slow" in said
    assert "a round of a collective takes 3.4 us within a node and 9.6 us between nodes" in said


def test_json_and_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "seconds.png"
    chosen = ["--zero", "2", "--offload", "cpu", "--devices", "4", "--num-nodes", "2", "--node-latency", "100"]
    assert main([*IMAGES, *chosen, "--json", "--picture", str(picture)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["line"] == "strategy=SuperScaleStrategy(zero=2, offload='cpu')"
    assert [step["num_ranks"] for step in found["steps"]] == [8]
    assert "100 us between nodes" in found["assumptions"][-1]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-nodes", "0"], "num_nodes takes a number of nodes or several"),
        (["--zero", "4"], "ZeroConfig.stage"),
        (["--shard-size", "3"], "ZeroConfig.shard_size=3 does not divide the 8 data-parallel ranks"),
        (["--slow-rank", "0.5"], "slow_rank is a factor of at least 1"),
        (["--sequence", "2"], "expected a batch with token ids"),
    ],
)
def test_what_can_not_be_simulated_is_refused(arguments, message, capsys):
    assert main([*IMAGES, *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("superscale simulate: ")
    assert message in said


def test_the_command_line_does_not_load_simpy():
    code = "import sys, lightning_superscale.cli.command; sys.exit('simpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_picture_that_can_not_be_written(capsys):
    pytest.importorskip("matplotlib")
    assert main([*IMAGES, "--picture", "/nowhere/a.png"]) == 2
    assert "--picture /nowhere/a.png can't be written" in capsys.readouterr().err
