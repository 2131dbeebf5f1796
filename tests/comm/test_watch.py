"""Watches over ranks: which ranks went apart, are paused, stopped or gone."""

from __future__ import annotations

import json
import signal
import subprocess
import time

import pytest
from torch.distributed import HashStore

from lightning_superscale.comm import watch
from lightning_superscale.comm.processes import Process, _stat_of, this_machine, this_process
from lightning_superscale.comm.watch import RankFailure, RankWatch


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


def said_by(one, seconds=10):
    """The failure that a watch finds in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and one._failure is None:
        time.sleep(0.01)
    with pytest.raises(RankFailure) as failure:
        one.raise_if_failed()
    return str(failure.value)


@pytest.fixture
def alone(monkeypatch):
    """Makes the watch of rank 0 of two ranks, the other of which said only what is in the store, and gives both."""
    for name, seconds in {"_PERIOD_S": 0.02, "_BROKEN_AFTER_S": 0.3, "_PAUSED_AFTER_S": 0.2}.items():
        monkeypatch.setattr(watch, name, seconds)
    made = []

    def make(said=None, silence_s=0.6):
        store = HashStore()
        if said is not None:
            store.set("sign/1", said)
        made.append(RankWatch(store, 0, 2, silence_s=silence_s))
        return made[-1]

    yield make
    for one in made:
        one.close()


UNKNOWN = Process("", 1, 1)


def sign(beat, *, ended=False, process=UNKNOWN):
    return json.dumps([beat, "", ended, process])


def test_a_rank_that_never_gave_a_sign_of_life_is_missed(alone):
    assert said_by(alone()) == "rank 1 gave no sign of life for 0.6 s since it connected"


def test_an_error_of_a_rank_that_never_gave_a_sign_of_life_is_explained(alone):
    said = str(alone(silence_s=100.0).explain(RuntimeError("Connection closed by peer")))
    assert said == "rank 1 died: no sign of life for 0.3 s since it connected"


def test_a_rank_that_falls_silent_is_missed(alone):
    assert said_by(alone(sign(1))) == "rank 1 gave no sign of life for 0.6 s"


def test_a_rank_whose_process_is_gone_is_missed_at_once(alone):
    with subprocess.Popen(["true"]) as gone:
        process = Process(this_machine(), gone.pid, 1)
    said = said_by(alone(sign(1, process=process), silence_s=100.0))
    assert said == f"rank 1 died: its process {gone.pid} is gone"


def test_a_rank_that_ended_well_is_not_missed(alone):
    made = alone(sign(1, ended=True))
    time.sleep(1.2)
    made.raise_if_failed()


def test_a_rank_that_waits_for_one_that_ended_well_is_told(alone):
    made = alone(sign(1, ended=True))
    with made.waiting("one place"):
        said = said_by(made)
    assert said == "ranks went apart and wait for each other: rank 0 at one place, rank 1 at the end of its run"


def test_ranks_take_leave(two):
    two[1].close()
    assert json.loads(two[0]._store.get("sign/1"))[2] is True


class Hanging(HashStore):
    """A store that does not answer, as one that a stopped rank keeps."""

    hangs = False

    def check(self, keys):
        while self.hangs:
            time.sleep(0.01)
        return super().check(keys)


def test_a_store_that_does_not_answer_is_told(monkeypatch):
    monkeypatch.setattr(watch, "_PERIOD_S", 0.02)
    store = Hanging()
    made = RankWatch(store, 1, 2, silence_s=0.5)
    store.hangs = True
    assert said_by(made) == "rank 0, which keeps the ranks' store, gave no sign of life for 0.5 s"
    store.hangs = False
    made.close()


def test_ranks_that_are_not_heard_because_the_store_is_gone_are_not_called_dead(monkeypatch):
    """The rank that kept it died, and took the signs of the others with it."""
    for name, seconds in {"_PERIOD_S": 0.02, "_BROKEN_AFTER_S": 0.3}.items():
        monkeypatch.setattr(watch, name, seconds)
    with subprocess.Popen(["true"]) as gone:
        process = Process(this_machine(), gone.pid, 1)
    store = Hanging()
    store.set("sign/0", sign(1, process=process))
    store.set("sign/2", sign(1, process=this_process()))
    store.hangs = True
    made = RankWatch(store, 1, 3, silence_s=100.0)
    made._signs = {rank: (watch._Sign(*json.loads(store.get(f"sign/{rank}"))[:3], one), 0.0)
                   for rank, one in ((0, process), (2, this_process()))}  # fmt: skip
    said = str(made.explain(RuntimeError("Connection closed by peer")))
    assert said == f"rank 0 died: its process {gone.pid} is gone"
    store.hangs = False
    made.close()


def test_of_a_store_that_never_answered_it_is_told_whose_process_stopped(monkeypatch):
    monkeypatch.setattr(watch, "_PERIOD_S", 0.02)
    store, keeper = Hanging(), subprocess.Popen(["sleep", "60"])
    process = Process(this_machine(), keeper.pid, int(_stat_of(keeper.pid)[19]))
    keeper.send_signal(signal.SIGSTOP)
    store.hangs = True
    made = RankWatch(store, 1, 2, silence_s=0.5, keeper_process=process)
    try:
        assert said_by(made).endswith(f"for 0.5 s: its process {keeper.pid} is stopped by a signal or a debugger")
    finally:
        keeper.kill()
        keeper.wait()
        store.hangs = False
        made.close()


def test_all_ranks_are_told_the_same(two):
    two[0]._judge(two[0]._store, "first")
    two[1]._judge(two[1]._store, "second")
    assert said_by(two[0]) == said_by(two[1]) == "first"


def test_an_early_watch_waits_for_its_store(monkeypatch):
    monkeypatch.setattr(watch, "_PERIOD_S", 0.02)
    store, tried = HashStore(), []

    def connect():
        tried.append(1)
        if len(tried) < 3:
            raise OSError("no store yet")
        return store

    made = RankWatch(connect, 0, 2, silence_s=0.3)
    time.sleep(0.8)
    made.raise_if_failed()  # rank 1 may still be coming
    store.set("sign/1", sign(1))
    assert said_by(made) == "rank 1 gave no sign of life for 0.3 s"
    made.close()


@pytest.mark.parametrize("world_size", [1, 2])
def test_only_among_several_ranks_are_the_frames_of_training_read(world_size, monkeypatch):
    """Frames that are read keep the tensors of a step alive meanwhile, and a rank by itself waits for nobody."""
    monkeypatch.setattr(watch, "_PERIOD_S", 0.02)
    read = []
    monkeypatch.setattr(watch, "foreign_collective", lambda stack, weights: read.append(1) or "")
    made = RankWatch(HashStore(), 0, world_size)
    time.sleep(0.2)
    made.close()
    assert bool(read) == (world_size > 1)
