"""Threads that are there before they are needed."""

from __future__ import annotations

import concurrent.futures.thread
import threading

import pytest

from lightning_superscale.ops import threads
from lightning_superscale.ops.threads import one_thread


def test_the_thread_runs_before_it_is_given_work(monkeypatch):
    executor = one_thread("early")
    assert any(thread.name.startswith("early") for thread in threading.enumerate())
    monkeypatch.setattr(threading.Thread, "start", lambda self: pytest.fail("no thread starts later"))
    assert executor.submit(lambda: 7).result(5) == 7
    executor.shutdown()


def test_a_thread_that_dies_as_it_starts_is_an_error_and_no_endless_wait(monkeypatch):
    monkeypatch.setattr(threads, "_START_S", 0.1)
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)
    known = set(concurrent.futures.thread._threads_queues)
    with pytest.raises(TimeoutError):
        one_thread("stillborn")
    for thread in set(concurrent.futures.thread._threads_queues) - known:
        del concurrent.futures.thread._threads_queues[thread]  # or the end of this process would join it
