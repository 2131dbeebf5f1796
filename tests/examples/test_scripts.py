"""The example programs, run as a user runs them."""

from __future__ import annotations

import logging
import math
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from examples.fabric.train import main as train_in_fabric
from examples.language_model.demo import DemoCLI, main
from examples.language_model.model import GPTConfig
from examples.language_model.module import LanguageModel
from lightning_superscale import load_from_checkpoint
from tests.helpers.extent import only_in_test_all

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "language_model" / "demo.py"
TOWERS = ROOT / "examples" / "two_towers" / "train.py"
LONG = ROOT / "examples" / "long_documents" / "train.py"
FINETUNE = ROOT / "examples" / "finetune_hf" / "finetune.py"
TINY = {
    "trainer.accelerator": "cpu",
    "trainer.max_steps": 6,
    "trainer.val_check_interval": 3,
    "trainer.log_every_n_steps": 1,
    "data.seq_len": 32,
    "data.batch_size": 4,
    "data.num_val_windows": 4,
    "model.gpt.num_layers": 1,
    "model.gpt.dim": 16,
    "model.gpt.num_heads": 2,
    "sample_bytes": 40,
}


def python(script: Path, *args: str, cwd: Path) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    return subprocess.run(
        [sys.executable, str(script), *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=200, check=False
    )


def demo(cwd: Path, *args: str, **settings) -> subprocess.CompletedProcess:
    flags = [f"--{key}={value}" for key, value in {**TINY, **settings}.items()]
    return python(DEMO, *flags, *args, cwd=cwd)


@pytest.mark.slow
def test_demo_trains_then_resumes_then_starts_anew(tmp_path):
    first = demo(tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "Traceback" not in first.stderr
    run_dir = tmp_path / "runs" / "demo"
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    state = torch.load(run_dir / "last.ckpt", weights_only=True)
    assert state["global_step"] == 6
    assert state["loops"]["fit_loop"]["state_dict"]["combined_loader"] == [{"num_windows": 24}]
    for text in (
        "optimizer engine  superoffload",
        "step     6 of 6  validation",
        "Where the bytes live",
        "Where the time went",
        "tokens/s",
        "Bits per byte after 6 steps",
        "order-0 entropy of all bytes",
        "\ndef ",
        "Starting anew",
    ):
        assert text in first.stdout, text
    assert len(first.stdout.splitlines()) < 120

    second = demo(tmp_path)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "at step 6, up to step 12. Pass --fresh to start anew." in second.stdout
    assert "Bits per byte after 12 steps" in second.stdout
    assert torch.load(run_dir / "last.ckpt", weights_only=True)["global_step"] == 12

    third = demo(tmp_path, "--fresh", **{"model.gpt.dim": 32, "trainer.max_steps": 3})
    assert third.returncode == 0, third.stdout + third.stderr
    assert torch.load(run_dir / "last.ckpt", weights_only=True)["global_step"] == 3


def test_demo_refuses_a_bad_path_in_one_line(tmp_path):
    result = demo(tmp_path, **{"data.path": "nowhere"})
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    [error] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: data.path=nowhere: expected a file or a directory, found nothing there. Pass")
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """Runs the demo in this process; gives back the error it ends with."""
    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level

    def run(**settings) -> str:
        assert main([f"--{key}={value}" for key, value in {**TINY, **settings}.items()]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    yield run
    logger.setLevel(level)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("trainer.strategy", "superofload", "unknown trainer.strategy 'superofload'; did you mean 'superoffload'?"),
        ("trainer.gradient_clip_val", -1.0, "gradient_clip_val must be a number of at least 0 or None, found -1.0"),
        ("model.gpt.dim", 17, "num_heads=2 must divide dim=17"),
        ("data.batch_size", 0, "data.batch_size must be at least 1"),
    ],
)
def test_demo_refuses_settings_in_one_line(refusal, setting, value, message):
    error = refusal(**{setting: value})
    assert error.startswith("error: ")
    assert message in error


def test_demo_refuses_a_broken_checkpoint(refusal, tmp_path):
    (tmp_path / "last.ckpt").write_text("not a checkpoint")
    assert "last.ckpt is not a readable checkpoint. Pass --fresh" in refusal(run_dir=tmp_path)


def test_demo_refuses_a_checkpoint_of_another_model(refusal, tmp_path):
    gpt = {"num_layers": 1, "dim": 64, "num_heads": 2}
    state = {"global_step": 6, "callbacks": {}, "hyper_parameters": LanguageModel(GPTConfig(**gpt)).hparams}
    torch.save({**state, "hyper_parameters": dict(state["hyper_parameters"])}, tmp_path / "last.ckpt")
    assert "holds another model: context 256 (now 32), dim 64 (now 16)" in refusal(run_dir=tmp_path)


def test_resumed_run_gets_as_many_steps_and_as_much_time_again():
    cli = Namespace(config=Namespace(trainer=Namespace(max_steps=900, max_time="00:00:03:45")))
    state = {"global_step": 700, "callbacks": {"Timer": {"time_elapsed": {"train": 200.2}}}}
    DemoCLI.extend_limits(cli, state)
    assert cli.config.trainer == Namespace(max_steps=1600, max_time="00:00:07:06")


@pytest.mark.slow
def test_finetune_lowers_the_loss_and_saves_usable_weights(tmp_path):
    result = python(FINETUNE, "--steps=8", "--seq_len=32", "--batch_size=4", "--output=a/model.ckpt", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line.split() for line in result.stdout.splitlines() if line.startswith("  ") and "(" in line]
    before, after, reloaded = (float(line[0]) for line in lines[-3:])
    assert reloaded == after < before
    assert "optimizer engine  superoffload" in result.stdout


@pytest.mark.parametrize("strategy", ["superoffload", pytest.param("superscale", marks=only_in_test_all)])
def test_two_towers_read_and_have_the_gradients_of_one_process(tmp_path, strategy):
    settings = ("--num_words=1500", "--steps=50", "--batch_size=48", f"--strategy={strategy}")
    result = python(TOWERS, *settings, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Epoch 0: 100%" in result.stdout + result.stderr
    lines = [line.split() for line in result.stdout.splitlines() if line.startswith("  ")]
    _, _, difference = (float(line[0].rstrip("%")) for line in lines[-3:])
    assert difference == 0.0
    # After fifty steps the towers tell words apart; which of a hundred unseen ones they find is luck yet, and the words
    # are those of the Python that runs. A guess among 48 has a loss of log(48) = 3.87.
    losses = re.findall(r"loss=(\d+\.\d+)", result.stdout + result.stderr)
    assert float(losses[-1]) < math.log(48) - 0.5


@only_in_test_all
def test_two_towers_refuse_too_little_text(tmp_path):
    (tmp_path / "words.txt").write_text("only four words here")
    result = python(TOWERS, "--data=words.txt", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: found 3 words to train on and 1 held out")


def test_long_documents_have_the_losses_of_one_process_and_half_of_its_activations(tmp_path):
    result = python(LONG, "--steps=3", "--tokens=256", "--layers=1", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    found = dict(line.rsplit(": ", 1) for line in result.stdout.splitlines() if ": " in line)
    # fp32 losses near 6 in nats have roundings of 2^-24 * 6 = 4e-7.
    assert float(found["largest difference between the losses of 3 steps"]) < 1e-5
    alone, shared = (
        float(found[f"activations kept for backward by {name}"].split()[0]) for name in ("one process", "each of 2")
    )
    assert 0 < shared <= 1.1 / 2 * alone
    assert (tmp_path / "runs/long_documents/loss.png").read_bytes().startswith(b"\x89PNG")
    assert "attend by ulysses" in result.stdout


@only_in_test_all
def test_long_documents_refuse_too_long_ones_in_one_line(tmp_path):
    (tmp_path / "text.txt").write_text("short")
    result = python(LONG, "--data=text.txt", cwd=tmp_path)
    assert result.returncode == 2
    assert "expected at least 2049 bytes" in result.stderr


def test_a_fabric_loop_and_the_trainer_go_on_from_each_other_with_the_bits_of_one_loop(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny = ["--seq_len=16", "--batch_size=4", "--precision=32-true"]

    def run(name: str, loop: str, steps: int, strategy: str) -> None:
        checkpoint = f"--checkpoint={tmp_path / name}"
        assert train_in_fabric([f"--loop={loop}", f"--steps={steps}", f"--strategy={strategy}", checkpoint, *tiny]) == 0

    run("one", "fabric", 7, "superscale")
    for loop, steps, strategy in (("fabric", 3, "superoffload"), ("trainer", 2, "zero2"), ("fabric", 2, "zero3")):
        run("several", loop, steps, strategy)
    told = capsys.readouterr().out
    assert "Trainer, from step 3" in told
    assert "Fabric, zero3, from step 5" in told
    one, several = (load_from_checkpoint(LanguageModel, tmp_path / name).state_dict() for name in ("one", "several"))
    assert one.keys() == several.keys()
    for name in one:
        assert torch.equal(one[name], several[name]), name
