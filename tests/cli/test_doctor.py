"""The doctor's table: every row says what was found, and a missing piece says how to get it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

import lightning_superscale as lss
from lightning_superscale.cli import doctor, main
from lightning_superscale.offload.planner import profile_cache
from lightning_superscale.offload.planner.numa import available_cpus
from lightning_superscale.offload.planner.profile import key_of
from tests.offload.planner.test_choices import H100


def test_doctor_prints_every_row_and_exits_0(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    names = ("versions", "torch", "lightning", "native CPU library", "square root", "cores", "hardware profile")
    names += ("host memory", "pinned memory", "CUDA devices", "CUDA library", "Triton", "strategy names", "autoload")
    for name in names:
        assert name.split()[0] in out


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"superscale {lss.__version__}\n"


def test_a_row_that_fails_to_look_is_an_error_row(monkeypatch):
    def broken(name):
        raise OSError("no such thing")

    monkeypatch.setattr(doctor, "_CHECKS", (("broken", broken),))
    (check,) = doctor.examine()
    assert (check.status, check.found) == ("error", "OSError: no such thing")


def test_the_profile_row_shows_what_is_filed_and_measures_nothing(monkeypatch, tmp_path):
    def profile_row():
        (row,) = (check for check in doctor.examine() if check.name == "hardware profile")
        return row

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    key = key_of(device, available_cpus())  # finds the native library before the cache folder moves
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LSS_PROFILE", raising=False)
    assert profile_row().remedy == "the first run that offloads measures it"
    assert not list(tmp_path.rglob("*.json"))
    profile = dataclasses.replace(H100, key=key)
    profile_cache._write(profile_cache.profile_path(key), profile)
    assert (profile_row().status, profile_row().found) == ("ok", profile.summary())
    busy = dataclasses.replace(profile, cpu_share=0.5)
    profile_cache._write(profile_cache.profile_path(key), busy)
    assert (profile_row().status, profile_row().found) == ("note", busy.summary())
    assert profile_row().remedy == "the next run that offloads measures it again"
    profile_cache.profile_path(key).write_text("{")
    assert "is damaged" in profile_row().found
    monkeypatch.setenv("LSS_PROFILE", "off")
    assert profile_row().found == "switched off by LSS_PROFILE"


def test_without_a_native_library_the_row_says_how_to_get_it():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "lightning_superscale.cli", "doctor"],
        env={**{k: v for k, v in os.environ.items() if k != "LSS_REQUIRE_NATIVE"}, "LSS_NATIVE": "0", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "python -m lightning_superscale.ops.native.build" in done.stdout
