"""Where a rank is, told from its Python frames."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from lightning_superscale.comm.places import OWN_COLLECTIVES, is_in_collective, main_frame


def frame_in(*files: str):
    """The innermost of nested frames, each of a function in one of these files, outermost first."""
    call = sys._getframe
    for file in reversed(files):
        names: dict = {"call": call}
        exec(compile("def inner():\n    return call()", os.path.join("/site-packages", file), "exec"), names)
        call = names["inner"]
    return call()


WAITS = "torch/distributed/_functional_collectives.py"


@pytest.mark.parametrize(
    ("files", "is_waiting"),
    [
        (["train.py", "torch/distributed/distributed_c10d.py"], True),
        (["train.py", OWN_COLLECTIVES], True),
        (["train.py", "lightning_superscale/comm/collectives.py"], False),  # of somebody else's copy
        # A collective of DTensor's, in forward or in backward: an operator, called through torch's dispatch.
        (["train.py", "torch/distributed/tensor/_api.py", WAITS, "torch/_ops.py", "torch/_library/autograd.py"], True),
        (["train.py", "torch/distributed/tensor/_dispatch.py", "torch/_ops.py"], False),
        (["torch/distributed/run.py", "train.py"], False),
        (["train.py", "torch/_ops.py"], False),
    ],
)
def test_a_rank_in_a_collective_is_told_from_one_that_computes(files, is_waiting):
    assert is_in_collective(frame_in(*files)) is is_waiting


def test_a_thread_that_is_gone_waits_for_nobody():
    assert not is_in_collective(None)


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
    assert main_frame() is (hook if is_hook else own)
    del frames[1]
    assert main_frame() is own
