"""`superscale trace` on real training commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_superscale.cli import main
from lightning_superscale.cli.trace import Trace
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.optim.step_rule import EACH_STEP, Cycle
from lightning_superscale.run.report.phases import PhaseSeconds
from lightning_superscale.run.report.recorder import StepRecorder
from lightning_superscale.timeline import LANES, Span
from tests.helpers.extent import IS_ALL

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import sys
import time
import lightning_superscale as lss
from lightning_superscale.offload.zenflow.state import SplitState
from lightning_superscale.offload.zenflow.sums import GradientSums
from tests.helpers.trainers import Regressor, fit

name, epochs, precision = sys.argv[1], int(sys.argv[2]), sys.argv[3]
window = {"topk": 0.3, "update_interval": 3, "select_interval": 6}
kinds = {
    "split": lss.OffloadConfig(gpu_fraction=0.4),
    "cpu": "cpu",
    "superoffload": "superoffload",
    "zenflow": lss.OffloadConfig(engine="zenflow", gpu_fraction=0, zenflow=window),
}
strategy = lss.SuperScaleStrategy(offload=kinds[name]) if name in kinds else name

def slow(kind, method, seconds):
    real = getattr(kind, method)

    def run(*args, **kwargs):
        time.sleep(seconds)
        return real(*args, **kwargs)

    setattr(kind, method, run)

if name == "zenflow":  # a host that is slower than steps of this model, on any machine
    slow(SplitState, "update_host", 0.3)
    slow(GradientSums, "absorb", 0.03)
fit(Regressor(), strategy, max_epochs=epochs, precision=precision, gradient_clip_val=1.0)
"""


def trace(out: Path, script: Path, *arguments: str, step: str = "3") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lightning_superscale.cli", "trace", "--out", str(out), "--step", step, "--"]
    script.write_text(SCRIPT)
    return subprocess.run(
        [*command, sys.executable, str(script), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


OF_WINDOWS = {"host sums", "selection"}
RUNS = [
    ("superoffload", set(LANES) - OF_WINDOWS - {"device optimizer"}),
    ("split", set(LANES) - OF_WINDOWS),
    ("cpu", set(LANES) - OF_WINDOWS - {"device optimizer"}),
    ("superscale", {"forward", "backward", "verdict", "device optimizer"}),
]


@pytest.mark.parametrize(("name", "lanes"), RUNS if IS_ALL else RUNS[1:2])
def test_a_step_of_any_engine_is_drawn(tmp_path, name, lanes):
    done = trace(tmp_path / "out", tmp_path / "train.py", name, "2", "bf16-true")
    assert done.returncode == 0, done.stderr
    found = Trace.read(tmp_path / "out" / "trace-rank0.json")
    assert {span.lane for span in found.spans} == lanes
    assert [span.name for span in found.spans if span.lane == "forward"] == ["step 4", "next step"]
    assert [span.name for span in found.spans if span.lane == "backward"] == ["step 4"]
    assert 0 <= found.exposed_seconds < found.step_seconds
    assert (tmp_path / "out" / "trace-rank0.png").read_bytes()[1:4] == b"PNG"
    assert "are neither forward nor backward" in done.stdout
    assert ("lanes as busy as these should expose" in done.stdout) == (name in ("superoffload", "split"))
    for lane in lanes:
        assert lane in done.stdout


def test_a_whole_window_is_drawn_with_the_selections_of_its_columns(tmp_path):
    done = trace(tmp_path, tmp_path / "train.py", "zenflow", "3", "bf16-true", step="5")
    assert done.returncode == 0, done.stderr
    found = Trace.read(tmp_path / "trace-rank0.json")
    assert {span.lane for span in found.spans} == set(LANES)
    # One matrix' windows of 3 end with steps 7 and 10, another's with 9; they choose in the steps after 7 and 9.
    steps = [f"step {number}" for number in range(7, 11)]
    assert [span.name for span in found.spans if span.lane == "forward"] == [*steps, "next step"]
    assert found.num_steps == len(found.step_starts) == 4
    assert found.step_seconds == found.seconds / 4

    def lane(name):
        return [span for span in found.spans if span.lane == name]

    def step_of(span):
        return sum(start <= span.start for start in found.step_starts)

    assert [step_of(span) for span in lane("selection")] == [2, 4]
    assert {step_of(span) for span in lane("device optimizer")} == {1, 2, 3, 4}
    assert {step_of(span) for span in lane("device to host")} >= {1, 2, 3, 4}
    updates = lane("host optimizer")
    assert len(updates) >= 2
    assert updates[0].start >= min(span.end for span in lane("host sums"))
    waits = lane("wait for host")
    assert {step_of(span) for span in waits if span.name == "update of windows"} >= {2, 4}
    assert any(span.name == "sums" for span in waits)
    assert "4 steps, zenflow on cpu" in done.stdout
    assert "(mean of 4 steps), of which" in done.stdout
    assert "the host kept the model waiting" in done.stdout


def test_gradients_leave_before_the_verdict_and_weights_come_after_it(tmp_path):
    trace(tmp_path, tmp_path / "train.py", "superoffload", "2", "bf16-true")
    spans = Trace.read(tmp_path / "trace-rank0.json").spans
    (verdict,) = [span for span in spans if span.lane == "verdict"]
    (backward,) = [span for span in spans if span.lane == "backward"]
    sent = [span for span in spans if span.lane == "device to host"]
    own = [span for span in spans if span.lane == "host to device" and span.start >= backward.start]
    assert sent
    assert own
    assert all(span.end <= verdict.end for span in sent)
    assert all(span.start >= verdict.end for span in own)
    # 2 + 2 bytes per parameter of bf16; the 12 parameters of `unused` have no gradient.
    assert sum(span.nbytes for span in sent) == sum(span.nbytes for span in own)


def test_a_step_between_two_forwards_is_recorded_by_the_next(tmp_path):
    """Two optimizers step in each training step: of steps 0, 2, 4, ... none is the fifth."""
    recorder, phases = StepRecorder(torch.device("cpu"), tmp_path, 5, rank=0), PhaseSeconds()
    for _ in range(5):
        recorder.before_forward(phases.num_steps, lambda: [EACH_STEP, EACH_STEP])
        with recorder.phase("forward", phases):
            pass
        recorder.after_forward(phases.num_steps, dict)
        phases.num_steps += 2
    found = Trace.read(tmp_path / "trace-rank0.json")
    assert [span.name for span in found.spans] == ["step 7", "next step"]


def test_a_run_that_ends_within_a_window_has_what_was_recorded(tmp_path):
    recorder, phases = StepRecorder(torch.device("cpu"), tmp_path, 1, rank=0), PhaseSeconds()
    for num_steps in range(6):
        phases.num_steps = num_steps
        recorder.before_forward(num_steps, lambda num_steps=num_steps: [Cycle(9, 3 - num_steps)])
        with recorder.phase("forward", phases):
            pass
        recorder.after_forward(num_steps, dict)
    recorder.end(6, dict)
    found = Trace.read(tmp_path / "trace-rank0.json")
    assert [span.name for span in found.spans] == ["step 4", "step 5", "step 6"]
    assert found.num_steps == 3


def test_a_timeline_that_another_opened_stays_open(tmp_path):
    recorder, phases = StepRecorder(torch.device("cpu"), None, 0, rank=0), PhaseSeconds()
    recorder.timeline.open()
    for phases.num_steps in range(2):
        recorder.before_forward(phases.num_steps, lambda: [EACH_STEP])
        with recorder.phase("forward", phases):
            pass
        recorder.after_forward(phases.num_steps, dict)
    recorder.end(2, dict)
    assert [span.lane for span in recorder.timeline.close()] == ["forward", "forward"]


def test_a_run_that_ends_too_early_says_so(tmp_path):
    done = trace(tmp_path, tmp_path / "train.py", "superoffload", "1", "32-true", step="100")
    assert done.returncode == 1
    assert "nothing was traced: training ended after 6 optimizer steps, and step 101 was to be recorded" in done.stderr
    assert "for more than 100 optimizer steps" in done.stderr


def test_a_command_that_fails_keeps_its_exit_code(tmp_path):
    command = ["trace", "--out", str(tmp_path), "--", sys.executable, "-c", "raise SystemExit(7)"]
    assert main(command) == 7


def test_another_strategy_is_told_apart(tmp_path, capsys):
    assert main(["trace", "--out", str(tmp_path), "--", sys.executable, "-c", "pass"]) == 1
    assert "It must train with one of this package's strategies" in capsys.readouterr().err


def test_a_command_that_is_not_there_is_one_line_and_no_recording_of_others_is_touched(tmp_path, capsys):
    (tmp_path / "trace-rank7.json").write_text("of another run")
    assert main(["trace", "--out", str(tmp_path), "--", "no-such-command"]) == 1
    assert "'no-such-command' can't be run: No such file or directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["trace-rank7.json"]


def test_a_file_that_is_no_trace_is_refused(tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"traceEvents": []}))
    assert main(["trace", "--draw", str(path)]) == 1
    assert "is no trace that `superscale trace` wrote" in capsys.readouterr().err
    with pytest.raises(SuperScaleError, match="is no trace"):
        Trace.read(tmp_path / "absent.json")


@pytest.mark.parametrize("arguments", [[], ["--draw", "x.json", "--", "true"], ["--step", "0", "--", "true"]])
def test_a_call_without_sense_is_refused(arguments):
    with pytest.raises(SystemExit):
        main(["trace", *arguments])


def test_a_recording_of_several_steps_is_told_by_its_mean_step():
    spans = (
        Span("forward", "step 2", 0.0, 1.0),
        Span("backward", "step 2", 1.0, 2.0),
        Span("wait for host", "sums", 1.5, 1.75),
        Span("forward", "step 3", 3.0, 4.0),
        Span("forward", "step 3", 4.0, 4.5),
        Span("backward", "step 3", 4.5, 5.0),
        Span("wait for host", "window's update", 5.0, 5.75),
        Span("forward", "next step", 6.0, 9.0),
    )
    found = Trace(Path("x"), {"num_steps": 2}, spans)
    assert (found.seconds, found.step_seconds, found.exposed_seconds) == (6.0, 3.0, 1.0)
    assert found.step_starts == [0.0, 3.0]
    assert found.summary() == (
        "step 3000.0 ms (mean of 2 steps), of which 1000.0 ms (33%) are neither forward nor backward; the host kept "
        "the model waiting 500.0 ms (17%)"
    )


def test_busy_time_counts_overlapping_spans_once():
    spans = (
        Span("forward", "step 2", 0.0, 1.0),
        Span("backward", "step 2", 1.0, 3.0),
        Span("host optimizer", "a", 1.0, 2.0),
        Span("host optimizer", "b", 1.5, 2.5),
        Span("host optimizer", "c", 4.0, 4.5),
        Span("forward", "next step", 4.0, 5.0),
    )
    found = Trace(Path("x"), {}, spans)
    assert found.step_seconds == 4.0
    assert found.busy_seconds("host optimizer") == 2.0
    assert found.exposed_seconds == 1.0


def test_without_matplotlib_no_training_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    trained = tmp_path / "trained"
    command = [sys.executable, "-c", f"open({str(trained)!r}, 'w')"]
    assert main(["trace", "--out", str(tmp_path / "out"), "--", *command]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not trained.exists()
