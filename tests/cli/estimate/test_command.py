"""`superscale estimate` as a user types it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from lightning_superscale.cli import main

IMAGES = ["estimate", "tests.estimation.models:Images", "--input", "float32[8,3,32,32]"]


def test_a_table_names_strategies_and_recommends_one(capsys):
    assert main(IMAGES) == 0
    said = capsys.readouterr().out
    assert "Images: " in said
    assert "1 x H100 SXM with 80.0 GiB" in said
    assert "8 samples a step" in said
    assert 'Recommended: Trainer(strategy="superscale")' in said
    assert "Assumed: rates are the data sheet's" in said


def test_json_and_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "memory.png"
    one = ["--zero", "3", "--offload", "superoffload", "--devices", "4", "--device", "rtx 4090"]
    assert main([*IMAGES, *one, "--json", "--picture", str(picture)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recommended"] == "strategy=SuperScaleStrategy(zero=3, offload='superoffload')"
    assert (found["num_ranks"], found["device"]) == (4, "RTX 4090")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_nothing_fits(capsys):
    assert main([*IMAGES, "--device-memory", "1MiB"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "Nothing fits" in said
    assert 'strategy="superscale" does not fit: ' in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tests.estimation.models:Image"], "has no 'Image'; did you mean 'Images'"),
        (["tests.estimation.models:Images"], "does not say what its batches are"),
        (["tests.estimation.models:Images", "--input", "float32(8)"], "--input takes a dtype and a shape"),
        (["tests.estimation.models:Images", "--input", "flot32[8]"], "--input takes a dtype and a shape"),
        (["tests.estimation.models:Images", "--arg", "width"], "--arg takes KEY=VALUE"),
        (["tests.estimation.models:Images", "--arg", "width=3"], "could not be built with {'width': 3}"),
        ([*IMAGES[1:], "--device", "H100"], "device='H100' is there as 'H100 PCIe' and 'H100 SXM'"),
        ([*IMAGES[1:], "--offload", "cp"], "unknown offload engine"),
    ],
)
def test_what_can_not_be_estimated_is_refused(arguments, message, capsys):
    assert main(["estimate", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("superscale estimate: ")
    assert message in said


def test_a_reader_that_goes_away_is_no_error():
    """As in `superscale estimate ... --json | head`: quiet, with the exit code of a process that SIGPIPE ends."""
    command = [
        sys.executable,
        "-m",
        "lightning_superscale.cli",
        "estimate",
        "torch.nn:Linear",
        "--arg",
        "in_features=4",
    ]
    command += ["--arg", "out_features=4", "--input", "float32[2,4]", "--json"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running.stdout.close()
    said = running.stderr.read()
    running.stderr.close()
    assert (running.wait(60), said) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("given", ["abc", "true", "[2]", '{"size": 2'])
def test_a_sequence_is_a_number_or_options(given, capsys):
    with pytest.raises(SystemExit):
        main([*IMAGES, "--sequence", given])
    said = capsys.readouterr().err
    assert "argument --sequence: takes a number of ranks, or a SequenceConfig as JSON" in said
    assert repr(given) in said
