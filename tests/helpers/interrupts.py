"""Interrupts at every line of a piece of work."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import lightning_superscale as lss
from lightning_superscale.ops.cpu.flat import submit_copy
from lightning_superscale.run.interrupts import mark_whole

PACKAGE = str(Path(lss.__file__).parent)


def in_finalizer(frame) -> bool:
    """Whether the garbage collector called it: Python ignores what is raised there."""
    while frame is not None and not (frame.f_code.co_name == "__del__" or frame.f_code.co_filename == weakref.__file__):
        frame = frame.f_back
    return frame is not None


class RaisesAtLine:
    """A trace function that raises at one line of the package's code that runs in this thread.

    Args:
        error: the class of what is raised.
        place: the number of the line, counted from 1 as they run; None for none.
        number: of the step that is traced, where one is.

    Attributes:
        num_lines: lines so far.
        where: file and line where it raised; "" before.
        last_in_step: number of the line at which a step last became whole.
    """

    def __init__(self, error: type[BaseException], place: int | None, number: int = 0) -> None:
        self.error, self.place, self.number = error, place, number
        self.num_lines, self.where = 0, ""
        self.last_in_step = 0

    def __call__(self, frame, event, arg):
        is_ours = frame.f_code.co_filename.startswith(PACKAGE)
        return self.line if is_ours and not in_finalizer(frame) else None

    def line(self, frame, event, arg):
        if event == "line":
            self.num_lines += 1
            if frame.f_code is mark_whole.__code__:
                self.last_in_step = self.num_lines
            if self.num_lines == self.place:
                sys.settrace(None)
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise self.error("raised by a test")
        return self.line


def interrupted_everywhere(begin: Callable[[], Callable[[], object]]) -> Iterator[str]:
    """Interrupt some work once at each of its lines, with native copies queued behind one that takes long.

    Args:
        begin: gives the work, which is thrown away afterwards.

    Yields:
        where it was interrupted, after the exception is handled and before queued copies run.
    """
    long = torch.zeros(2**24), torch.ones(2**24)
    for place in range(1, 1000):
        work, tracer = begin(), RaisesAtLine(KeyboardInterrupt, place)
        busy = submit_copy(*long)
        sys.settrace(tracer)
        try:
            work()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        del work
        if not tracer.where:
            busy.wait()
            return
        yield tracer.where
        busy.wait()


def is_written_later(nbytes: int, wait: Callable[[], object]) -> bool:
    """Whether memory of a size that was freed just now is written by work that ends with `wait`."""
    probes = [torch.full((nbytes // 4,), 7.0) for _ in range(20)]  # an allocator gives out again what was freed last
    wait()
    return not all(bool((probe == 7).all()) for probe in probes)
