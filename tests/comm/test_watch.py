"""Watches over ranks: where a rank is, told from its Python frames, and which ranks went apart or are paused."""

from __future__ import annotations

import os
import sys
import time

import pytest
from torch.distributed import HashStore

from lightning_superscale.comm import watch
from lightning_superscale.comm.watch import OWN_COLLECTIVES, RankFailure, RankWatch, _is_in_collective


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
    assert _is_in_collective(frame_in(*files)) is is_waiting


def test_a_thread_that_is_gone_waits_for_nobody():
    assert not _is_in_collective(None)


@pytest.fixture
def two(monkeypatch):
    """Watches of two ranks over one store, which look often."""
    for name, seconds in {"_PERIOD_S": 0.02, "_APART_AFTER_S": 0.4, "_PAUSED_AFTER_S": 0.2}.items():
        monkeypatch.setattr(watch, name, seconds)
    store = HashStore()
    watches = [RankWatch(store, rank, 2) for rank in range(2)]
    yield watches
    for one in watches:
        one.close()


def test_ranks_that_wait_in_different_places_went_apart(two):
    with two[0].waiting("one place"), two[1].waiting("another"):
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and two[0]._failure is None:
            time.sleep(0.02)
        with pytest.raises(RankFailure, match="rank 0 at one place, rank 1 at another"):
            two[0].raise_if_failed()


def test_a_rank_that_is_paused_did_not_go_apart(two, monkeypatch):
    with two[0].waiting("one place"), two[1].waiting("another"):
        time.sleep(0.1)
        monkeypatch.setattr(two[1], "_say_and_look", lambda: None)  # as while it is stopped, or C++ has the lock
        time.sleep(1.5)
        two[0].raise_if_failed()
        monkeypatch.undo()
