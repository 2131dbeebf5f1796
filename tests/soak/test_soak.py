"""The soak itself: a minute of it, and that it finds what it looks for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.extent import only_in_test_all
from tests.soak.one_run import samples_of_steps

ROOT = Path(__file__).resolve().parents[2]


def soak(*arguments: str, code: str = "") -> tuple[int, dict, str]:
    """The exit code, the figures and all that was printed; `code` runs first, in the driver and in its ranks."""
    program = f"import sys\n{code}\nfrom tests.soak.__main__ import main\nraise SystemExit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=230,
        check=False,
        cwd=ROOT,
    )
    last = done.stdout.splitlines()[-1] if done.stdout else ""
    return done.returncode, json.loads(last) if last.startswith("{") else {}, done.stdout + done.stderr


@only_in_test_all
@pytest.mark.slow
def test_a_minute_of_everything():
    code, figures, said = soak("--seconds", "60", "--seed", "7")
    assert code == 0, said[-4000:]
    assert figures["failures"] == []
    assert figures["legs"] > 3


@pytest.mark.slow
def test_a_moment_of_it():
    code, figures, said = soak("--seconds", "5", "--steps", "20", "--seed", "28", "--only", "an exception")
    assert code == 0, said[-4000:]
    assert figures["legs"] >= 2
    assert figures["happenings"]["an exception of one rank"]["recovered"] >= 1


def test_a_later_leg_takes_the_place_of_the_steps_that_were_lost():
    entries = [
        {"leg": 0, "step": 0, "ids": [1, 2]},
        {"leg": 0, "step": 1, "ids": [3, 4]},
        {"leg": 1, "step": 1, "ids": [4]},
        {"leg": 1, "step": 1, "ids": [3]},
    ]
    assert samples_of_steps(entries) == {0: (1, 2), 1: (3, 4)}


@only_in_test_all
@pytest.mark.slow
def test_samples_that_come_twice_are_found_and_everything_is_kept(tmp_path):
    broken = "import tempfile\n" + f"tempfile.tempdir = {str(tmp_path)!r}\n"
    broken += "import tests.soak.one_run as run\nrun._lines = lambda folder: []\n"
    code, figures, said = soak("--seconds", "1", "--steps", "12", "--seed", "3", code=broken)
    assert code == 1, said[-4000:]
    assert "used other samples" in figures["failures"][0]
    assert f"everything is kept in {tmp_path}" in said
    assert list(tmp_path.glob("soak-*/run-0/leg-0-rank-0.log"))
