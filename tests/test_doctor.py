"""The doctor's table: every row says what was found, and a missing piece says how to get it."""

from __future__ import annotations

import os
import subprocess
import sys

from lightning_superscale import doctor
from lightning_superscale.cli import main


def test_doctor_prints_every_row_and_exits_0(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    names = ("versions", "torch", "lightning", "native CPU library", "square root", "cores", "host memory")
    names += ("pinned memory", "CUDA devices", "CUDA library", "Triton", "strategy names", "autoload")
    for name in names:
        assert name.split()[0] in out


def test_a_row_that_fails_to_look_is_an_error_row(monkeypatch):
    def broken(name):
        raise OSError("no such thing")

    monkeypatch.setattr(doctor, "_CHECKS", (("broken", broken),))
    (check,) = doctor.examine()
    assert (check.status, check.found) == ("error", "OSError: no such thing")


def test_without_a_native_library_the_row_says_how_to_get_it():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "lightning_superscale.cli", "doctor"],
        env={**{k: v for k, v in os.environ.items() if k != "LSS_REQUIRE_NATIVE"}, "LSS_NATIVE": "0", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "python -m lightning_superscale.ops.build" in done.stdout
