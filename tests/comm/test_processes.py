"""What became of a process: it runs, is stopped, was killed, or is another one by now."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from lightning_superscale.comm.processes import Process, fate_of, this_machine, this_process

pytestmark = pytest.mark.skipif(not this_machine(), reason="needs Linux's /proc")


@pytest.fixture
def child():
    """A process that sleeps, and what names it."""
    code = "from lightning_superscale.comm.processes import this_process as p; print(*p()[1:], flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as popen:
        pid, started = map(int, popen.stdout.readline().split())
        yield popen, Process(this_machine(), pid, started)
        popen.kill()


def fate_in_time(process, is_due):
    deadline = time.monotonic() + 10
    while not is_due(fate_of(process)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return fate_of(process)


def test_a_process_that_runs_has_no_fate(child):
    assert fate_of(this_process()) is None
    assert fate_of(child[1]) is None


def test_a_process_that_is_stopped_may_go_on(child):
    popen, process = child
    popen.send_signal(signal.SIGSTOP)
    fate = fate_in_time(process, lambda fate: fate is not None)
    assert (fate.is_gone, fate.text) == (False, f"its process {popen.pid} is stopped by a signal or a debugger")
    popen.send_signal(signal.SIGCONT)
    assert fate_in_time(process, lambda fate: fate is None) is None


def test_a_process_that_was_killed_is_gone_and_its_signal_is_known_until_it_is_waited_for(child):
    popen, process = child
    popen.kill()
    fate = fate_in_time(process, lambda fate: fate is not None)
    assert fate.is_gone
    assert fate.text.startswith(f"its process {popen.pid} was killed by SIGKILL")
    popen.wait()
    assert fate_of(process) == (True, f"its process {popen.pid} is gone")


def test_the_exit_code_of_a_process_is_told(child):
    popen, process = child
    popen.stdin.close()  # input() raises
    assert "ended with exit code 1" in fate_in_time(process, lambda fate: fate is not None).text


def test_a_later_process_of_the_same_number_is_another(child):
    process = child[1]
    assert fate_of(process._replace(started=process.started - 1)).is_gone


def test_nothing_is_known_of_processes_of_other_machines(child):
    popen, process = child
    popen.kill()
    popen.wait()
    assert fate_of(process._replace(machine="another")) is None
    assert fate_of(process._replace(machine="")) is None
