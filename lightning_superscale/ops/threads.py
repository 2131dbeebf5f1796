"""Threads that are there before they are needed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

# Seconds within which a thread has to start. One that the system is out of memory for may never say so.
_START_S = 10.0


def one_thread(name: str) -> ThreadPoolExecutor:
    """An executor of one thread, which runs when this returns.

    A thread that first starts in the middle of a step may fail there for lack of memory, and its work would be waited
    for without end.

    Raises:
        RuntimeError, TimeoutError: the system gave no thread.
    """
    executor = ThreadPoolExecutor(1, name)
    executor.submit(int).result(_START_S)
    return executor
