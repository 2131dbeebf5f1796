"""Pools, tickets, priorities, failure, fork."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from lightning_superscale.ops.cpu import flat
from lightning_superscale.ops.cpu.adamw import submit_adamw_commit
from lightning_superscale.ops.cpu.pool import Pool, Ticket, default_pool
from lightning_superscale.ops.native import loader
from lightning_superscale.ops.types import AdamWHyper, AdamWSegment
from tests.helpers.interrupts import interrupted_everywhere, is_written_later
from tests.ops.paths import FALLBACK, NATIVE, running, values

pytestmark = pytest.mark.skipif(not NATIVE, reason="no native library")


def test_pool_num_threads_comes_from_argument_then_environment_then_affinity(monkeypatch):
    assert Pool(3).num_threads == 3
    monkeypatch.setenv("LSS_CPU_THREADS", "5")
    assert Pool().num_threads == 5
    monkeypatch.setenv("LSS_CPU_THREADS", "many")
    with pytest.raises(ValueError, match="LSS_CPU_THREADS must be a number"):
        Pool()
    monkeypatch.delenv("LSS_CPU_THREADS")
    assert Pool().num_threads == max(1, len(os.sched_getaffinity(0)) - 1)
    with pytest.raises(ValueError, match="at least 1"):
        Pool(0)
    assert default_pool() is default_pool()


def test_pool_threads_start_with_first_submission_and_end_at_close():
    def count():
        return len(os.listdir("/proc/self/task"))

    before = count()
    pool = Pool(4)
    assert count() == before
    flat.submit_copy(torch.zeros(4), torch.ones(4), pool=pool).wait()
    assert count() == before + 4
    pool.close()
    deadline = time.monotonic() + 5  # a joined thread leaves /proc a moment later
    while count() != before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert count() == before
    pool.close()


def test_pool_binds_to_cpus():
    cpu = min(os.sched_getaffinity(0))
    pool = Pool(1, cpus=[cpu])
    known = set(os.listdir("/proc/self/task"))
    flat.submit_copy(torch.zeros(4), torch.ones(4), pool=pool).wait()
    (worker,) = set(os.listdir("/proc/self/task")) - known
    assert os.sched_getaffinity(int(worker)) == {cpu}
    with pytest.raises(ValueError, match="CPU 1000 is not among"):
        Pool(1, cpus=[1000])


def test_pool_runs_higher_priority_first():
    pool = Pool(1)
    numel = 20_000_000
    src = torch.ones(numel)
    blocker = flat.submit_copy(torch.empty(numel), src, pool=pool)
    low = flat.submit_copy(torch.empty(numel), src, pool=pool)
    high = flat.submit_copy(torch.empty(1000), src[:1000], pool=pool, priority=1)
    high.wait()  # overtakes both at the next chunk
    assert not low.is_complete()
    blocker.wait()
    low.wait()


def test_ticket_cancelled_while_held_raises_and_leaves_memory_alone():
    for path in (NATIVE[0], FALLBACK):
        with running(path):
            dst = torch.zeros(4)
            ticket = flat.submit_copy(dst, torch.ones(4), pool=Pool(1), held=True)
            ticket.cancel()
            with pytest.raises(RuntimeError, match="cancelled"):
                ticket.wait()
            ticket.release()
            assert torch.equal(dst, torch.zeros(4))
            done = flat.submit_copy(dst, torch.ones(4))
            done.wait()
            done.cancel()
            done.wait()


def test_ticket_keeps_tensors_alive_and_waits_when_dropped():
    pool = Pool(1)
    numel = 5_000_000
    dst = torch.zeros(numel)
    flat.submit_copy(dst, torch.ones(numel), pool=pool)  # the source and the ticket are garbage at once
    gc.collect()
    assert bool((dst == 1).all())
    flat.submit_copy(dst, torch.zeros(numel), pool=pool, held=True)  # dropped while held: cancelled
    gc.collect()
    assert bool((dst == 1).all())


@pytest.mark.parametrize("kind", ["copy", "step"])
def test_an_interrupt_at_any_line_leaves_no_work_that_nobody_waits_for(kind):
    """[Note: A ticket comes first]: work that had been submitted before there was a ticket wrote to freed memory."""

    def begin():
        tensors = {name: torch.zeros(64) for name in ("param", "exp_avg", "exp_avg_sq", "grad")}
        if kind == "copy":
            return lambda: flat.submit_copy(tensors["param"], tensors["grad"])
        hyper = AdamWHyper(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, step=1)
        return lambda: submit_adamw_commit([AdamWSegment(**tensors, hyper=hyper)])

    places = []
    for place in interrupted_everywhere(begin):
        places.append(place)
        assert not is_written_later(256, default_pool().drain), place
    assert any(place.startswith("pool.py") for place in places)


def test_a_pool_is_drained_of_what_was_released():
    pool = Pool(1)
    pool.drain()
    dst, src = torch.zeros(5_000_000), torch.ones(5_000_000)
    first = flat.submit_copy(dst, src, pool=pool)
    held = flat.submit_copy(torch.zeros(4), torch.ones(4), pool=pool, held=True)
    pool.drain()
    assert first.is_complete()
    assert bool((dst == 1).all())
    assert not held.is_complete()
    held.release()
    pool.drain()
    assert held.is_complete()
    pool.close()
    pool.drain()
    with loader.without_native():
        Pool(1).drain()


def test_pool_closed_cancels_held_work():
    pool = Pool(1)
    ticket = flat.submit_copy(torch.zeros(4), torch.ones(4), pool=pool, held=True)
    pool.close()
    with pytest.raises(RuntimeError, match="cancelled"):
        ticket.wait()


def test_flag_is_done_after_notify():
    pool = Pool(1)
    flag = pool.flag()
    assert not flag.is_complete()
    waiter = threading.Thread(target=flag.wait)
    waiter.start()
    lib = loader.native()
    lib.lss_ticket_ref(flag.handle)
    lib.lss_notify(flag.handle)  # what a CUDA stream calls
    waiter.join(timeout=10)
    assert flag.is_complete()
    with loader.without_native():
        fallback = Pool(1).flag()
        assert not fallback.is_complete()
        fallback.release()
        assert fallback.wait() is None


def test_ticket_without_native_work_raises_the_error_in_wait():
    def fail():
        raise ValueError("broken")

    ticket = Ticket(run=fail)
    assert ticket.is_complete()
    with pytest.raises(ValueError, match="broken"):
        ticket.wait()
    with pytest.raises(RuntimeError, match="held"):
        Ticket(run=fail, held=True).wait()


def test_pool_many_threads_submit_at_once():
    pool = Pool(3)
    failures = []

    def work(seed):
        for i in range(50):
            src = values(200_000, seed=seed * 100 + i)
            dst = torch.zeros_like(src)
            ticket = flat.submit_copy(dst, src, pool=pool, priority=i % 3)
            total = flat.sumsq(src, pool=pool)
            ticket.wait()
            if not torch.equal(dst, src) or total != flat.sumsq(dst):
                failures.append((seed, i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


FORK = """
import os, sys, torch
from lightning_superscale.ops.cpu import flat
from lightning_superscale.ops.cpu.adamw import submit_adamw_commit
from lightning_superscale.ops.cpu.pool import Pool, default_pool

torch.set_num_threads(1)  # torch's own OpenMP threads do not survive a fork
pool = Pool(2)
src = torch.ones(30_000_000)
running = flat.submit_copy(torch.empty_like(src), src, pool=pool)
held = flat.submit_copy(torch.empty(4), torch.ones(4), pool=pool, held=True)
expected = flat.sumsq(src[:1_000_000], pool=default_pool())
child = os.fork()
if child == 0:
    try:
        for ticket in (running, held):
            try:
                ticket.wait()
            except RuntimeError as error:
                assert "forked" in str(error), error
            else:
                assert ticket is running  # it may have been done before the fork
        held.release()
        for p in (pool, default_pool()):
            assert flat.sumsq(src[:1_000_000], pool=p) == expected
            dst = torch.zeros(500_000)
            flat.submit_copy(dst, src[:500_000], pool=p).wait()
            assert bool((dst == 1).all())
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
_, status = os.waitpid(child, 0)
running.wait()
held.release()
held.wait()
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_pool_works_in_forked_child_and_parent():
    result = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr


def test_pool_idle_workers_use_no_cpu():
    pool = Pool(4)
    flat.submit_copy(torch.zeros(4), torch.ones(4), pool=pool).wait()
    start = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - start < 0.1
