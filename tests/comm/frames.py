"""Frames of code that lies in files of any name."""

from __future__ import annotations

import os
import sys


def frame_in(*files: str):
    """The innermost of nested frames, each of a function in one of these files, outermost first."""
    call = sys._getframe
    for file in reversed(files):
        names: dict = {"call": call}
        exec(compile("def inner():\n    return call()", os.path.join("/site-packages", file), "exec"), names)
        call = names["inner"]
    return call()


def stack_in(*files: str) -> list:
    """Such frames, innermost first, and behind them the caller's."""
    stack, frame = [], frame_in(*files)
    while frame is not None:
        stack.append(frame)
        frame = frame.f_back
    return stack
