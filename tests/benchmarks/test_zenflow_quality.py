"""`benchmarks/zenflow_quality.py` on few steps: what it prints, and that its peer trains what the others do."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_superscale.config import ZenFlowConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import zenflow_quality, zenflow_quality_peer
from benchmarks.zenflow_quality import Run
from tests.helpers.extent import only_in_test_all

REPOSITORY = Path(__file__).resolve().parents[2]


@only_in_test_all
def test_two_steps_print_rows_and_checks():
    command = [sys.executable, "benchmarks/zenflow_quality.py", "--steps", "2", "2", "--seeds", "1"]
    command += ["--variants", "default", "warmup_steps=200"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (0, 1), done.stderr
    report = json.loads(done.stdout.strip().splitlines()[-1])
    assert [(row["task"], row["variant"]) for row in report["rows"]] == [
        ("fine-tune", "adamw"),
        ("fine-tune", "default"),
        ("fine-tune", "adamw, lr=0.0003"),
        ("fine-tune", "default, lr=0.0003"),
        ("fine-tune", "adamw, lr=0.002"),
        ("fine-tune", "default, lr=0.002"),
        ("scratch", "adamw"),
        ("scratch", "warmup_steps=200"),
        ("scratch", "default"),
    ]
    assert report["rows"][0]["deltas"] == [0.0]
    assert all(0 < row["loss"] < 8 for row in report["rows"])
    assert [check["limit"] for check in report["checks"]] == [0.01, 0.05]
    assert report["hardware"]["cores"] >= 1


def test_with_peers_each_task_has_deepspeed_with_and_without_overlap():
    seen = [run for run in zenflow_quality.runs([], with_peers=True) if run.is_peer]
    overlaps = {
        (run.task, run.lr, settings["full_warm_up_rounds"], settings["overlap_step"])
        for run in seen
        for settings in (zenflow_quality_peer.zenflow_of(run.options or {}),)
    }
    assert overlaps == {
        *(("scratch", 2e-3, 200, overlap) for overlap in (True, False)),
        *(("fine-tune", 1e-3, 1, overlap) for overlap in (True, False)),
        *(("fine-tune", lr, 1, True) for lr in (3e-4, 2e-3)),
    }
    assert len(seen) == len(overlaps)
    assert all(run.name.startswith("DeepSpeed 0.19.6") for run in seen)
    assert not any(run.is_peer for run in zenflow_quality.runs([], with_peers=False))


def test_the_peers_settings_mean_what_our_defaults_do():
    ours, theirs = ZenFlowConfig(), zenflow_quality_peer.zenflow_of({})
    assert theirs == {
        "topk_ratio": ours.topk,
        "update_interval": ours.update_interval,
        "select_strategy": "step",
        "select_interval": ours.select_interval,
        "full_warm_up_rounds": ours.warmup_steps,
        "overlap_step": ours.overlap,
    }


class PlainAdamW:
    """Stands in for DeepSpeed's engine: AdamW, clipped."""

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]], config: dict[str, Any]) -> None:
        self.model, self.clip = model, config["gradient_clipping"]
        self.optimizer = torch.optim.AdamW(groups, **config["optimizer"]["params"])
        self.rates: list[float] = []

    def __call__(self, *batch: Tensor) -> Tensor:
        loss: Tensor = self.model(*batch)
        return loss

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A DeepSpeed whose engine is `PlainAdamW`; `made` has the engines."""
    module = ModuleType("deepspeed")
    module.made = []

    def initialize(*, model: nn.Module, model_parameters: list[dict[str, Any]], config: dict[str, Any]) -> Any:
        engine = PlainAdamW(model, model_parameters, config)
        module.made.append(engine)
        return engine, engine.optimizer, None, None

    module.initialize = initialize
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    return module


def spec_of(**changed: Any) -> dict[str, Any]:
    text = zenflow_quality.digest_of(zenflow_quality.data_of("fine-tune", 3))
    spec = {"task": "fine-tune", "options": {}, "text": text, "seed": 3, "steps": 6, "start": None, "lr": 3e-3}
    return {**spec, **changed}


def test_a_peer_that_steps_as_adamw_does_gets_adamws_loss(deepspeed, tmp_path, monkeypatch):
    """Start weights, order of batches, rates, clipping, decay and validation: all that a peer shares with the rest."""
    # Two batches an epoch, so that the second and third epochs count too.
    monkeypatch.setattr(zenflow_quality, "REPOSITORY", tmp_path)
    (tmp_path / "docs").mkdir()
    letters = torch.randint(32, 127, (2400,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    (tmp_path / "docs" / "text.txt").write_bytes(bytes(letters.tolist()))
    assert len(zenflow_quality.data_of("fine-tune", 3).train_dataloader()) == 2

    start = tmp_path / "start.pt"
    torch.save(zenflow_quality.build_module(9, None, 1.0).state_dict(), start)
    expected, _ = zenflow_quality.train(Run("fine-tune", "adamw", None, 3e-3), 3, 6, start)
    found = zenflow_quality_peer.train(spec_of(start=str(start)))
    # Lightning sums the losses of batches in fp32.
    assert found == pytest.approx(expected, rel=1e-6)
    assert deepspeed.made[0].rates[:3] == pytest.approx([1e-3, 2e-3, 3e-3])
    assert deepspeed.made[0].rates[-1] < 3e-3
    another, _ = zenflow_quality.train(Run("fine-tune", "adamw", None, 3e-3), 4, 6, start)
    assert abs(another - found) > 1e-4  # another order of batches shows


def test_a_peer_that_changes_weights_before_training_is_refused(deepspeed, monkeypatch):
    def scramble(*, model: nn.Module, **_: Any) -> Any:
        with torch.no_grad():
            next(model.parameters()).neg_()
        return None, None

    monkeypatch.setattr(deepspeed, "initialize", scramble)
    with pytest.raises(RuntimeError, match="changed the weights"):
        zenflow_quality_peer.train(spec_of())


def test_a_peer_with_another_text_is_refused(deepspeed):
    with pytest.raises(RuntimeError, match="another standard library"):
        zenflow_quality_peer.train(spec_of(text="0"))


def environment_that_says(folder: Path, script: str) -> Path:
    """An environment whose Python is a shell script."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return folder


@pytest.mark.parametrize(("script", "found"), [("echo 0.19.8", "0.19.8"), ("exit 1", "none")])
def test_another_deepspeed_is_refused_before_anything_is_trained(tmp_path, monkeypatch, capsys, script, found):
    peers = environment_that_says(tmp_path, script)
    monkeypatch.setattr(sys, "argv", ["zenflow_quality.py", "--peers", str(peers)])
    monkeypatch.setattr(zenflow_quality, "train", None)
    with pytest.raises(SystemExit) as ended:
        zenflow_quality.main()
    assert ended.value.code == 2
    assert f"takes an environment with DeepSpeed 0.19.6, found {found} in {peers}" in capsys.readouterr().err


PEER = Run("fine-tune", "DeepSpeed 0.19.6", {}, 1e-3, is_peer=True)


@pytest.mark.parametrize(("said", "loss"), [('{"loss": 1.5}', 1.5), ('{"loss": null}', math.nan)])
def test_the_peers_last_line_is_its_loss(tmp_path, said, loss):
    peers = environment_that_says(tmp_path, f"echo much else; echo '{said}'")
    found = zenflow_quality.train_peer(PEER, 0, 2, None, peers=peers, threads=1)
    assert found == pytest.approx(loss, nan_ok=True)


def test_a_peer_that_fails_says_why(tmp_path):
    peers = environment_that_says(tmp_path, "echo no memory >&2; exit 3")
    with pytest.raises(RuntimeError, match=r"DeepSpeed 0\.19\.6 failed; its last words:\nno memory"):
        zenflow_quality.train_peer(PEER, 0, 2, None, peers=peers, threads=1)


DIVERGED = {
    "fine-tune": {"adamw": [1.8, 1.9], "default": [1.805, math.nan], "DeepSpeed 0.19.6": [math.nan, math.inf]},
    "scratch": {"adamw": [1.5, 1.6], "warmup_steps=200": [1.53, 1.63]},
}


def test_a_seed_that_diverged_is_shown_and_meets_no_limit(capsys):
    rows, checks = zenflow_quality.table_of(DIVERGED)
    text = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["fine-tune", "default", "diverged", "+0.0050,", "diverged"] in text
    assert ["fine-tune", "DeepSpeed", "0.19.6", "diverged", "diverged,", "diverged"] in text
    by_name = {row["variant"]: row for row in rows if row["task"] == "fine-tune"}
    assert by_name["default"] == {
        "task": "fine-tune",
        "variant": "default",
        "loss": None,
        "deltas": [0.005, None],
    }
    assert by_name["DeepSpeed 0.19.6"]["deltas"] == [None, None]
    assert [(check["measured"], check["met"]) for check in checks] == [(None, False), (0.03, True)]
    json.dumps([rows, checks], allow_nan=False)


def test_the_picture_marks_what_diverged(tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes").Axes
    drawn: list[tuple[list[float], str]] = []
    plot = axes.plot

    def note(self: Any, at: Any, heights: Any, mark: str, **options: Any) -> Any:
        drawn.append((list(at), mark))
        return plot(self, at, heights, mark, **options)

    monkeypatch.setattr(axes, "plot", note)
    zenflow_quality.draw(zenflow_quality.table_of(DIVERGED)[0], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert drawn.count(([1], "x")) == 2
    assert ([0.005], "o") in drawn
    assert all(math.isfinite(x) for xs, _ in drawn for x in xs)
