"""Threads that run native ops beside the launching thread, and tickets for the work that they were given.

The threads belong to the native library (csrc/cpu/pool.cpp): they hold no GIL, sleep when idle, start with the
first submission, and start anew in a forked child. Without the library the ops run in the submitting thread.
"""

from __future__ import annotations

import ctypes
import functools
import os
import weakref
from collections.abc import Callable, Sequence
from ctypes import byref, c_int32, c_void_p
from typing import Any, Generic, TypeVar, cast

from lightning_superscale.ops.native import loader

T = TypeVar("T")


class Pool:
    """A pool of worker threads that run native kernels.

    Args:
        num_threads: None takes LSS_CPU_THREADS, else the CPUs of this process less one (the launching
            thread's), never below 1.
        cpus: CPUs that the workers may run on; empty for all of the process.

    Raises:
        ValueError: num_threads below 1.
    """

    def __init__(self, num_threads: int | None = None, *, cpus: Sequence[int] = ()) -> None:
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"num_threads must be None or at least 1, found {num_threads}")
        self._lib = loader.native()
        self._handle: int | None = None
        self._num_threads = num_threads or 1
        if self._lib is None:
            return
        handle = c_void_p()
        ids = (c_int32 * len(cpus))(*cpus)
        loader.check(self._lib, self._lib.lss_pool_create(num_threads or 0, ids, len(cpus), byref(handle)))
        self._handle = handle.value
        self._num_threads = self._lib.lss_pool_num_threads(handle)
        self._destroy = weakref.finalize(self, self._lib.lss_pool_destroy, handle)

    @property
    def num_threads(self) -> int:
        """Number of worker threads; without the native library the number asked for, or 1."""
        return self._num_threads

    @property
    def handle(self) -> int | None:
        """The native `lss_pool *`; None without the native library."""
        return self._handle

    def close(self) -> None:
        """Finish released work, cancel held work, end the threads. The pool then takes no more work."""
        if self._handle is not None:
            self._handle = None
            self._destroy()

    def flag(self) -> Ticket[None]:
        """A held ticket without work: `release()`, or a CUDA stream (`launch_notify` of ops/cuda), makes it done."""
        if self._lib is None or self._handle is None:
            return Ticket(run=lambda: None, held=True)
        ticket: Ticket[None] = Ticket(lib=self._lib, keep=self, run=lambda: None)
        loader.check(self._lib, self._lib.lss_ticket_create(self._handle, ticket.slot()))
        return ticket

    def drain(self) -> None:
        """Block until all work that was released so far is done, also work whose tickets are lost."""
        if self._lib is not None and self._handle is not None:
            loader.check(self._lib, self._lib.lss_pool_drain(self._handle))


def _num_threads_of_rank() -> int | None:
    """Threads of this rank where several ranks share the machine unbound; None lets the library decide."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if os.environ.get("LSS_CPU_THREADS") or not ranks.isdigit() or int(ranks) < 2:
        return None
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cpus < (os.cpu_count() or 1):
        return None  # the launcher has given this rank its own CPUs
    return max(1, cpus // int(ranks) - 1)


@functools.cache
def default_pool() -> Pool:
    """The process's shared pool, created at the first call."""
    return Pool(_num_threads_of_rank())


class Ticket(Generic[T]):
    """Work that was submitted: an `Event`. Keeps the tensors of the work alive until it is done.

    The work runs on the host, so a ticket is waitable when the work is complete, or failed, or cancelled.

    Dropping the last reference to an unfinished ticket waits for the work (or cancels it while it is held),
    because the work writes to memory that the ticket keeps.

    [Note: A ticket comes first] An interrupt or an error may leave the caller between any two lines. So the ticket is
    there, with all that it keeps, before the work is submitted, and the native library writes its handle into the
    ticket within the call that submits: at no moment is work under way that nobody would wait for.

    Args:
        run: gives the result. It is called once, after the native work is done, or, without a native library, to
            do the work itself at its release.
        lib: the native library, which is handed `slot()` with the work; None where `run` does the work.
        keep: objects that live at least until the work is done, such as its tensors.
        held: start only at `release()`; for a ticket without a native handle.
    """

    def __init__(
        self,
        *,
        run: Callable[[], T],
        lib: ctypes.CDLL | None = None,
        keep: object = None,
        held: bool = False,
    ) -> None:
        self._lib = lib
        self._slot = c_void_p()
        self._keep: object = keep
        self._run: Callable[[], T] | None = run
        self._result: T | None = None
        self._error: BaseException | None = None
        if lib is None and not held:
            self.release()

    def slot(self) -> Any:
        """Where the native library writes the handle of the work, as its `lss_ticket **`."""
        return byref(self._slot)

    def is_complete(self) -> bool:
        if self._lib is None or self.handle is None:
            return self._run is None
        return bool(self._lib.lss_ticket_done(self.handle))

    def wait(self) -> T:
        """Block until the work is done, and return its result.

        Raises:
            RuntimeError: the work failed, was cancelled, or was pending when this process was forked.
        """
        if self._lib is not None and self.handle is not None:
            loader.check(self._lib, self._lib.lss_ticket_wait(self.handle))
            self._finish()
        elif self._run is not None:
            raise RuntimeError("this ticket is held and its work runs at release(), which was not called")
        if self._error is not None:
            raise self._error
        return cast("T", self._result)

    def synchronize(self) -> None:
        self.wait()

    def is_waitable(self) -> bool:
        return self.is_complete()

    def release(self) -> None:
        """Let held work start. No effect on work that was not held."""
        if self._lib is not None and self.handle is not None:
            loader.check(self._lib, self._lib.lss_ticket_release(self.handle))
            return
        try:
            self._finish()
        except (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
            self._error = error  # `wait` raises it, as for work of a worker thread

    def cancel(self) -> None:
        """Drop held work: `wait` then raises. No effect once released."""
        if self._lib is not None and self.handle is not None:
            loader.check(self._lib, self._lib.lss_ticket_cancel(self.handle))
        elif self._run is not None:
            self._run, self._keep = None, None
            self._error = RuntimeError("the held work was cancelled before its release")

    @property
    def handle(self) -> int | None:
        """The native `lss_ticket *`; None when the work ran without the native library."""
        return self._slot.value

    def _finish(self) -> None:
        run, self._run, self._keep = self._run, None, None
        if run is not None:
            self._result = run()

    def __del__(self) -> None:
        lib, slot = getattr(self, "_lib", None), getattr(self, "_slot", None)
        if lib is None or slot is None or slot.value is None:
            return
        handle = slot.value
        if not lib.lss_ticket_done(handle):
            lib.lss_ticket_cancel(handle)
            lib.lss_ticket_wait(handle)
        lib.lss_ticket_free(handle)
