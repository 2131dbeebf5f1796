"""Rows of a GPU run: limits, interrupts, what is in the file; the environment that contestants get."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import process, runner
from benchmarks.gpu.rows import Rows

ROOT = Path(__file__).resolve().parents[2]


def _run(code: str, **limits: float) -> tuple[process.Outcome, list[str]]:
    lines: list[str] = []
    limits.setdefault("limit_s", 30)
    outcome = process.run([sys.executable, "-c", code], env=os.environ, on_line=lines.append, **limits)
    return outcome, lines


def test_lines_come_and_the_end_is_told() -> None:
    outcome, lines = _run("import sys; print('a'); print('b'); print('broken', file=sys.stderr); sys.exit(3)")
    assert lines == ["a", "b"]
    assert (outcome.status, outcome.why, outcome.tail) == (3, "ended with status 3", "broken\n")


def test_a_process_that_hangs_is_killed_with_its_children() -> None:
    code = (
        "import subprocess, time; child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); "
        "time.sleep(60)"
    )
    outcome, lines = _run(code, limit_s=30, silence_s=1.5)
    assert outcome.seconds < 20
    assert (outcome.status, outcome.why) == (None, "killed: nothing came for 2 s")
    [child] = map(int, lines)
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "zombie" in Path(f"/proc/{child}/status").read_text():
            return
        time.sleep(0.05)
    pytest.fail("the child lives on")


def test_the_limit_counts_all_and_not_the_silence() -> None:
    outcome, lines = _run("import time\nwhile True: print('x', flush=True); time.sleep(0.05)", limit_s=1, silence_s=10)
    assert lines
    assert outcome.why == "killed: its time was up"


def test_kill_all_ends_what_another_thread_runs() -> None:
    found: list[process.Outcome] = []
    thread = threading.Thread(target=lambda: found.append(_run("import time; time.sleep(60)")[0]))
    thread.start()
    while not process._RUNNING:
        time.sleep(0.01)
    process.kill_all()
    thread.join(20)
    assert found[0].status == -signal.SIGKILL


def test_threads_are_free_on_a_gpu_and_as_they_were_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "LSS_CPU_THREADS", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("LSS_HOST_MEMORY_GIB", "120")
    gpu, cpu = (process.environment(device, {"RANK": "0"}) for device in ("cuda", "cpu"))
    assert not {"OMP_NUM_THREADS", "OMP_WAIT_POLICY", "LSS_CPU_THREADS", "SLURM_JOB_ID"} & gpu.keys()
    assert cpu["OMP_NUM_THREADS"] == "1"
    assert gpu["RANK"] == "0"
    assert gpu["LSS_HOST_MEMORY_GIB"] == "120"
    assert str(ROOT) in gpu["PYTHONPATH"].split(os.pathsep)


def test_a_row_is_in_the_file_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    rows = Rows(path, limit_s=100)
    rows.write("first", gib=1.5)
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == ["first"]
    rows.outcome("second", process.Outcome(1, 2.0, "last words"))
    assert rows.failed == ["second"]
    assert rows.conclude() == 1
    second, end = (json.loads(line) for line in path.read_text().splitlines()[1:])
    assert (second["error"], second["last_words"]) == ("ended with status 1", "last words")
    assert (end["row"], end["failed"]) == ("end", ["second"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_what_is_there(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    rows = Rows(tmp_path / "rows.jsonl", limit_s=100)

    def work() -> None:
        rows.write("measured")
        os.kill(os.getpid(), number)
        time.sleep(10)

    assert runner.carry_out(rows, work) == 1
    assert signal.getsignal(number) == before
    written = [json.loads(line)["row"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert written == ["measured", "interrupted", "end"]


def test_the_script_installs_offline_frees_the_lock_and_runs_the_part(tmp_path: Path) -> None:
    said, wheels = tmp_path / "said", tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "some-1-py3-none-any.whl").write_text("")
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/sh\necho "$PYTHONPATH | $*" >>{said}\n')
    stub.chmod(0o755)
    extensions = tmp_path / "extensions"
    lock = extensions / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.write_text("")
    env = {**os.environ, "PYTHON": str(stub), "LSS_WHEELS": str(wheels), "TORCH_EXTENSIONS_DIR": str(extensions)}
    env["LSS_GPU_BUILD"] = str(tmp_path / "made")
    out = tmp_path / "out"
    command = ["bash", "benchmarks/gpu/run.sh", "long", str(out), "--only", "flow"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    calls = said.read_text().splitlines()
    [install] = [call for call in calls if "pip install" in call]
    assert "--no-index" in install
    assert "some-1-py3-none-any.whl" in install
    [ran] = [call for call in calls if "benchmarks.gpu." in call]
    assert ran.endswith(f"-m benchmarks.gpu.bench {out} --long --only flow")
    assert ran.startswith(str(tmp_path / "made" / "site-"))
    while "CPUAdamBuilder" not in said.read_text():  # in the background
        time.sleep(0.05)
    assert not lock.exists()
    assert (out / "long.log").exists()
