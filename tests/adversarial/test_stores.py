"""Object stores that fail, answer late or are written by two: the old checkpoint or the new one loads, whole."""

from __future__ import annotations

import random
import threading
import time

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from lightning_superscale.checkpoint.load.reader import is_checkpoint, open_checkpoint
from lightning_superscale.checkpoint.save.writer import save
from lightning_superscale.checkpoint.state import ReadRequest
from lightning_superscale.checkpoint.storage import remote
from lightning_superscale.checkpoint.storage.local import remove
from lightning_superscale.checkpoint.tools.verify import verify
from lightning_superscale.comm.mesh import single_mesh
from lightning_superscale.errors import CheckpointError
from lightning_superscale.layout.box import whole_box
from tests.adversarial.disks import KINDS, Fault, faulty_store
from tests.helpers.checkpoints import ONE_KEY, ONE_SHAPE, one_tensor
from tests.helpers.extent import IS_ALL

MESH = single_mesh()
URL = "memory://run/last.ckpt"
MANIFEST = "/run/last.ckpt/MANIFEST.json"


@pytest.fixture(autouse=True)
def store(monkeypatch):
    monkeypatch.setattr(remote, "_PAUSE_S", 0.0)
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield filesystem
    filesystem.store.clear()


def put(value: float, url: str = URL) -> None:
    save(url, one_tensor(value), MESH, step=int(value))


def value() -> float | None:
    if not is_checkpoint(URL):
        return None
    source = open_checkpoint(URL)
    out = torch.empty(ONE_SHAPE)
    source.read([ReadRequest(ONE_KEY, whole_box(ONE_SHAPE), out)])
    assert torch.equal(out, torch.full(ONE_SHAPE, source.rest["value"]))
    assert verify(URL) == []
    return float(source.rest["value"])


def generations(store) -> set[str]:
    return {name.split("/")[3].split(".")[0] for name in store.find("/run/last.ckpt") if name != MANIFEST}


def a_day_passes(store) -> None:
    """For all but the manifest that is there and what it names."""
    named = open_checkpoint(URL).manifest.root
    for path, file in store.store.items():
        if path != MANIFEST and named not in path:
            file.modified = file.modified.replace(year=2000)


def told(act) -> BaseException | None:
    try:
        act()
    except (CheckpointError, OSError, KeyboardInterrupt) as error:
        return error
    return None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act", ["overwrite", "first", "remove"])
def test_a_fault_at_any_request(store, act, kind):
    do = (lambda: remove(URL)) if act == "remove" else (lambda: put(2.0))
    old, new = None if act == "first" else 1.0, None if act == "remove" else 2.0

    def prepare() -> None:
        store.store.clear()
        if old is not None:
            put(old)

    prepare()
    counting = Fault(None, KeyboardInterrupt)
    with faulty_store(counting):
        do()
    stride = 1 if IS_ALL else 6
    for at in range(1 + len(kind) % stride, counting.count + 1, stride):
        prepare()
        with faulty_store(Fault(at, **KINDS[kind])):
            error = told(do)
        assert value() in (old, new), at
        assert error is not None or value() == new, at
        assert not remote._LIVE, at
        put(3.0)
        assert value() == 3.0
        if len(generations(store)) > 1:  # one that nobody is known to write
            a_day_passes(store)
            put(3.0)
        assert len(generations(store)) == 1, at
        remove(URL)
        assert store.find("/run") == [], at


@pytest.mark.parametrize("lost", range(1, 7))
def test_a_manifest_whose_answer_is_lost_is_asked_for_again(store, monkeypatch, lost):
    """It arrived; nobody said so. Both are there until it is known, and then the new one is."""
    put(1.0)
    pipe_file, left = MemoryFileSystem.pipe_file, [lost]

    def timed_out(self, path, value, **kwargs):
        pipe_file(self, path, value, **kwargs)
        if path.endswith("MANIFEST.json") and left[0]:
            left[0] -= 1
            raise TimeoutError("no answer")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", timed_out)
    put(2.0)
    assert value() == 2.0
    assert len(generations(store)) == 1


def test_a_manifest_that_arrives_after_everybody_gave_up(store, monkeypatch):
    put(1.0)
    pipe_file, late = MemoryFileSystem.pipe_file, []

    def delayed(self, path, value, **kwargs):
        if path.endswith("MANIFEST.json"):
            late.append((path, value))
            raise TimeoutError("no answer")
        pipe_file(self, path, value, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", delayed)
    with pytest.raises(CheckpointError, match="the store did not say, asked 4 times, that it has taken MANIFEST.json"):
        put(2.0)
    assert value() == 1.0
    pipe_file(store, *late[0])
    assert value() == 2.0
    monkeypatch.undo()
    put(3.0)
    a_day_passes(store)
    put(3.0)
    assert value() == 3.0
    assert len(generations(store)) == 1


def test_a_removal_whose_answer_is_lost(store, monkeypatch):
    put(1.0)
    rm_file = MemoryFileSystem.rm_file

    def timed_out(self, path):
        if path.endswith("MANIFEST.json"):
            raise TimeoutError("no answer")
        rm_file(self, path)

    monkeypatch.setattr(MemoryFileSystem, "rm_file", timed_out)
    with pytest.raises(CheckpointError, match="that it has deleted MANIFEST.json"):
        remove(URL)
    assert value() == 1.0  # its data stays as long as its manifest


def test_a_store_that_may_not_be_listed_is_saved_to(store, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "AccessDenied")

    for name in ("ls", "find"):
        monkeypatch.setattr(MemoryFileSystem, name, refused)
    put(1.0)
    put(2.0)
    monkeypatch.undo()
    assert value() == 2.0
    assert len(generations(store)) == 1


def test_generations_of_the_dead_go_and_those_of_running_saves_stay(store):
    put(1.0)
    kept = remote.RemoteTarget(URL)
    kept.begin("a" * 32, 0)
    kept.create("data/w00000-0.safetensors").close()
    for number, note in enumerate((b"[" * 9999, b'{"host": 5}', b"")):  # of nobody that can be told
        store.pipe_file(f"/run/last.ckpt/{number:032d}.owner.json", note)
        store.pipe_file(f"/run/last.ckpt/{number:032d}/data/w00000-0.safetensors", b"x")
    mine = f"/run/last.ckpt/{'b' * 32}/thesis"
    store.pipe_file(mine, b"years of work")
    put(2.0)
    assert generations(store) >= {"a" * 32, "b" * 32, f"{0:032d}"}
    assert len(generations(store)) == 6
    kept.abort()
    assert "a" * 32 not in generations(store)
    a_day_passes(store)
    put(3.0)
    assert generations(store) == {"b" * 32, open_checkpoint(URL).manifest.root}
    remove(URL)
    assert store.cat_file(mine) == b"years of work"


def test_two_writers_to_one_url_leave_a_checkpoint_of_one(store, monkeypatch):
    """Whole, and nothing of the other, whoever comes first at any step."""
    chooser = random.Random(5)
    plain = {name: getattr(MemoryFileSystem, name) for name in ("pipe_file", "rm_file", "cat_file")}

    def slowed(name):
        def call(*args, **kwargs):
            time.sleep(chooser.choice([0.0, 0.0, 0.002]))
            return plain[name](*args, **kwargs)

        return call

    for name in plain:
        monkeypatch.setattr(MemoryFileSystem, name, slowed(name))
    for number in range(200 if IS_ALL else 8):
        if number % 2:
            store.store.clear()  # nothing tells the first save of the other
        errors: list[BaseException | None] = []

        def write(own: float, errors=errors) -> None:
            errors.append(told(lambda: put(own)))

        threads = [threading.Thread(target=write, args=(own,)) for own in (1.0, 2.0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == [None, None]
        assert value() in (1.0, 2.0)
    put(3.0)
    assert value() == 3.0
