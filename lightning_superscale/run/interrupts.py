"""Ctrl-C during an optimizer step takes effect at its end, so that what is saved then is a whole step.

[Note: Interrupted steps] Python runs a signal's handler between any two instructions of the main thread. A
KeyboardInterrupt that is raised in the middle of a step would leave some weights of one step and others of the next,
and one that is raised right after it would leave the framework's counters one step behind. So while training runs, the
interrupt's handler is this one, which waits for the end of a step, and then as long as the framework needs to count it.
A second Ctrl-C during the same step takes effect at once: the step may be stuck. SIGTERM needs nothing: Lightning only
notes it, and ends at the end of a batch.

An ordinary error in the middle of a step can't be put off. The engine notes that its step is torn
(`OptimizerEngine.why_torn`), and nothing is saved of it.
"""

from __future__ import annotations

import _weakrefset
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

import torch.utils.weak

# The seconds that the framework is given to count a step: many times what it needs, and too short to be noticed.
_TAIL_S = 0.1


class Tearable(Protocol):
    """What knows whether a step has begun to change it whose end its caller has not seen."""

    is_torn: bool


def mark_whole(engines: Sequence[Tearable]) -> None:
    """Note that a step of these has ended. The last line that runs is the one after which none is torn."""
    for engine in engines[1:]:
        engine.is_torn = False
    if engines:
        engines[0].is_torn = False


class StepInterrupts:
    """Puts interrupts of one run off to the ends of its steps. Does nothing outside of the main thread."""

    def __init__(self) -> None:
        self._former: Callable[[int, FrameType | None], Any] | None = None
        self._thread = threading.get_ident()
        self._is_open = False
        self._is_stepping = self._is_counting = self._is_due = False
        self._num_waiting = 0

    def open(self) -> None:
        """Take the interrupt's handler over, once: at the first step, when the framework has set its own."""
        if self._is_open:
            return
        self._is_open = True
        former = signal.getsignal(signal.SIGINT)
        if callable(former) and threading.current_thread() is threading.main_thread():
            self._former = former
            signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_stepping and not self._num_waiting:
            self._num_waiting += 1
        elif _is_in_finalizer(frame) or (self._is_counting and not self._is_stepping and not self._is_due):
            self._send_later()
        elif self._former is not None:
            self._num_waiting, self._is_due = 0, False
            self._former(number, frame)

    def _send_later(self) -> None:
        self._num_waiting, self._is_due = 0, True
        timer = threading.Timer(_TAIL_S, signal.pthread_kill, (self._thread, signal.SIGINT))
        timer.daemon = True
        timer.start()

    @contextmanager
    def step(self) -> Iterator[None]:
        """A context around a step, which must happen as a whole."""
        self._is_stepping = True
        try:
            yield
        finally:
            self._end_step()

    @contextmanager
    def step_after(self, closure: Callable[[], Any]) -> Iterator[Callable[[], Any]]:
        """A context around an optimizer's own step, which begins where the closure that it calls ends.

        Gives the closure to pass to the optimizer.
        """

        def evaluate() -> Any:
            self._is_stepping = False
            result = closure()
            self._is_stepping = True
            return result

        try:
            yield evaluate
        finally:
            self._end_step()

    def _end_step(self) -> None:
        self._is_counting, self._is_stepping = True, False
        if self._num_waiting:
            self._send_later()

    def counted(self) -> None:
        """The framework has counted the last step."""
        self._is_counting = False

    def close(self) -> None:
        """Give the former handler back, unless another one has come since."""
        if self._former is not None and signal.getsignal(signal.SIGINT) == self._handle:
            signal.signal(signal.SIGINT, self._former)
        self._former = None


# Where callbacks of weak references run: finalizers, and entries of dictionaries that go with their keys.
_WEAK = frozenset(str(module.__file__) for module in (weakref, _weakrefset, torch.utils.weak))


def _is_in_finalizer(frame: FrameType | None) -> bool:
    """Whether an object is being given up, where Python would swallow an error."""
    while frame is not None and frame.f_code.co_name != "__del__" and frame.f_code.co_filename not in _WEAK:
        frame = frame.f_back
    return frame is not None
