"""Another thread's frames, read while it goes on."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading
import weakref

import pytest

from lightning_superscale.comm.stacks import main_stack, no_collection
from tests.comm.frames import frame_in


@pytest.mark.parametrize(
    ("main", "is_hook"), [("torch/autograd/graph.py", True), ("train.py", False)], ids=["backward", "else"]
)
def test_while_the_main_thread_waits_in_backward_it_is_where_autograd_runs_hooks(monkeypatch, main, is_hook):
    """On a GPU hooks run in a thread of autograd's, which Python did not start."""
    own, hook = frame_in(main), frame_in("hook.py")
    helper = threading.Thread(target=threading.Event().wait, daemon=True)
    helper.start()
    frames = {helper.ident: frame_in("loader.py"), threading.main_thread().ident: own, 1: hook}
    monkeypatch.setattr(sys, "_current_frames", lambda: frames)
    assert main_stack()[0] is (hook if is_hook else own)
    del frames[1]
    assert main_stack()[0] is own


def test_a_stack_begins_at_the_innermost_frame_and_ends_at_the_outermost():
    def inner():
        return main_stack()

    names = [frame.f_code.co_name for frame in inner()]
    assert names[names.index("inner") + 1] == "test_a_stack_begins_at_the_innermost_frame_and_ends_at_the_outermost"
    assert names[-1] == ("_run_module_as_main" if "_run_module_as_main" in names else "<module>")


def test_what_frames_held_goes_with_them_once_they_were_read():
    """Without garbage collection: tensors of a step that lived on looked like views that user code keeps."""

    class Held:
        pass

    def work():
        held = Held()
        reader = threading.Thread(target=main_stack)
        reader.start()
        reader.join()
        return weakref.ref(held)

    was_enabled = gc.isenabled()
    gc.disable()
    try:
        assert work()() is None
    finally:
        if was_enabled:
            gc.enable()


# Garbage whose finalizers give up the interpreter's lock is collected wherever a thread that reads frames allocates,
# while the main thread enters and leaves frames of its own. Without [Note: A still stack] this dies by SIGSEGV, or
# hangs, every other time on Python 3.11.
READS_WHILE_GARBAGE_IS_COLLECTED = """
    import gc, sys, threading, time
    from lightning_superscale.comm.stacks import main_stack

    class Garbage:
        left = 0

        def __init__(self):
            self.me = self
            Garbage.left += 1

        def __del__(self):
            Garbage.left -= 1
            if threading.get_ident() != main:
                time.sleep(0)

    def go_down(depth, *values, last=1, **more):
        if depth:
            return (go_down(depth - 1, depth, depth, more=2), values)[0]
        if Garbage.left < 300:  # the reader is slow at it, and would never be done
            for _ in range(7):
                Garbage()

    def read():
        while not is_done:
            read_names.update(frame.f_code.co_name for frame in main_stack())
            time.sleep(0)

    main, is_done, read_names = threading.get_ident(), False, set()
    gc.set_threshold(5)
    sys.setswitchinterval(1e-5)
    reader = threading.Thread(target=read)
    reader.start()
    ends, step = time.monotonic() + 1, 0
    while time.monotonic() < ends:
        step += 1
        go_down(step % 60)
    is_done = True
    reader.join()
    print(sorted(read_names & {"go_down", "<module>"}))
"""


def test_frames_are_read_while_the_main_thread_leaves_them_and_garbage_is_collected():
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(READS_WHILE_GARBAGE_IS_COLLECTED)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, "['<module>', 'go_down']"), ran.stderr


before_3_12 = pytest.mark.skipif(sys.version_info >= (3, 12), reason="collects between instructions only")


@before_3_12
def test_no_garbage_is_collected_between_one_frame_and_the_next():
    """Each new frame object would otherwise be a reason to collect."""
    reader, collections = threading.get_ident(), []

    def count(phase: str, _info: dict) -> None:
        if phase == "start" and threading.get_ident() == reader:
            collections.append(sys._getframe(1).f_code.co_name)

    def go_down(depth: int) -> int:
        return go_down(depth - 1) if depth else len(main_stack())

    thresholds = gc.get_threshold()
    gc.callbacks.append(count)
    gc.set_threshold(1)
    try:
        assert go_down(200) > 200
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(count)
    assert collections.count("main_stack") < 10  # of what surrounds the reading


@before_3_12
def test_thresholds_are_put_back_unless_somebody_set_others():
    thresholds = gc.get_threshold()
    try:
        with no_collection(), no_collection():
            assert gc.get_threshold()[0] == 0
        assert gc.get_threshold() == thresholds
        with no_collection():
            gc.set_threshold(321, 5, 5)
        assert gc.get_threshold() == (321, 5, 5)
    finally:
        gc.set_threshold(*thresholds)


@before_3_12
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_process_that_is_forked_meanwhile_collects():
    holds, may_go = threading.Event(), threading.Event()

    def hold() -> None:
        with no_collection():
            holds.set()
            may_go.wait(0.3)

    thread = threading.Thread(target=hold)
    thread.start()
    holds.wait()
    pid = os.fork()
    if pid == 0:
        os._exit(0 if gc.get_threshold()[0] > 0 else 1)
    thread.join()
    assert os.waitpid(pid, 0)[1] == 0
