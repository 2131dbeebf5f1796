"""Objects that a forked process got from its parent are told from those that it made itself."""

from __future__ import annotations

import os
import pickle

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.forks import Origin
from tests.helpers.crashes import in_a_server


def fork_with_an_origin():
    """What a child says of its parent's object and of its own."""
    origin = Origin()
    origin.check("anything")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        said = []
        for one in (origin, Origin()):
            try:
                one.check("a step")
                said.append("fine")
            except SuperScaleError as error:
                said.append(str(error))
        os.write(writing, pickle.dumps((said, os.getpid(), os.getppid())))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        (of_parent, own), child_pid, parent_pid = pickle.load(file)
    os.waitpid(child, 0)
    origin.check("anything")  # the parent's own is as it was
    return of_parent, own, child_pid, parent_pid


def test_a_forked_process_may_use_only_what_it_made():
    of_parent, own, child, parent = in_a_server(fork_with_an_origin)
    assert own == "fine"
    assert of_parent.startswith(f"process {child} was forked from process {parent} while that trained, and can't do")
    assert "a step: threads, locks and process groups do not survive os.fork()" in of_parent


def test_an_origin_is_this_process():
    assert Origin().is_here
