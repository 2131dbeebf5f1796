"""What may be replaced or removed is a checkpoint of a known format; everything else stays, byte for byte."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from lightning_superscale.checkpoint.save.background import BackgroundSaver
from lightning_superscale.checkpoint.save.writer import save
from lightning_superscale.checkpoint.storage import local
from lightning_superscale.checkpoint.storage.local import remove
from lightning_superscale.comm.mesh import single_mesh
from lightning_superscale.errors import CheckpointError
from tests.helpers.checkpoints import one_tensor, value_at

MESH = single_mesh()
FIXTURES = Path(__file__).parents[1] / "foreign/fixtures/deepspeed"
WEIGHTS = {"w": torch.ones(3)}


def snapshot(folder: Path) -> dict[str, object]:
    """All that lies in a folder: content of files, texts of links, and folders."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
    return found


@pytest.fixture(params=[True, False], ids=["exchange", "links"])
def can_exchange(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(local, "exchange", lambda one, other: False)
    return request.param


def project(path: Path) -> None:
    (path / "src").mkdir(parents=True)
    (path / "src" / "train.py").write_text("print(1)")
    (path / "data").mkdir()


def of_another_manifest(path: Path) -> None:
    project(path)
    (path / "MANIFEST.json").write_text('{"name": "a web app", "files": {}}')


def dcp_in_project(path: Path) -> None:
    project(path)
    torch.save({}, path / "meta.pt")
    (path / ".metadata").write_bytes(b"")


def model_repository(path: Path) -> None:
    path.mkdir()
    save_file(WEIGHTS, path / "model.safetensors")
    (path / "tokenizer.json").write_text("{}")


def damaged_beside(path: Path) -> None:
    """A manifest that can't be read names nothing."""
    save(str(path), one_tensor(1.0), MESH)
    (path / "MANIFEST.json").write_text("{")
    (path / "notes.txt").write_text("mine")


USERS = {
    "project": project,
    "with a manifest of another kind": of_another_manifest,
    "project with .metadata": dcp_in_project,
    "model repository": model_repository,
    "damaged with notes": damaged_beside,
    "text": lambda path: path.write_text("years of work"),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"a": 1})),
    "zip": lambda path: zipfile.ZipFile(path, "w").close() or _zip(path),
    "rest.json": lambda path: path.mkdir() or (path / "rest.json").write_text("{}"),
    "fifo": os.mkfifo,
    "link to a project": lambda path: project(path.parent / "real") or path.symlink_to("real"),
    "link to a file": lambda path: (path.parent / "real").write_text("mine") and path.symlink_to("real"),
}


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("letter.txt", "x")


@pytest.mark.parametrize("make", USERS.values(), ids=USERS)
def test_what_is_no_checkpoint_is_neither_replaced_nor_removed(tmp_path, make, can_exchange):
    path = tmp_path / "theirs"
    make(path)
    before = None if make is os.mkfifo else snapshot(tmp_path)
    saver = BackgroundSaver(MESH)
    for act in (
        lambda: save(str(path), one_tensor(2.0), MESH),
        lambda: saver.save(str(path), one_tensor(2.0)),
        lambda: remove(str(path)),
    ):
        with pytest.raises(CheckpointError, match=rf"{path} .*, so it is not (replaced|removed)"):
            act()
        assert before is None or snapshot(tmp_path) == before
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".ucp-staging")]


@pytest.mark.parametrize("given", [".", "..", "", "~", "file://.", "sub/..", "/"])
def test_the_working_folder_the_home_and_their_parents(tmp_path, monkeypatch, given):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "a.py").write_text("x")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path))
    before = snapshot(tmp_path)
    for act in (lambda: save(given, one_tensor(2.0), MESH), lambda: remove(given)):
        with pytest.raises(CheckpointError, match=r"so it is not (replaced|removed): only checkpoints are") as raised:
            act()
        assert local.local_path(given) in str(raised.value)
    assert snapshot(tmp_path) == before
    save("~/a.ckpt", one_tensor(1.0), MESH, step=1)
    monkeypatch.chdir(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="is the working folder"):
        save(".", one_tensor(2.0), MESH)


def legacy(path: Path) -> None:
    torch.save({"state_dict": WEIGHTS}, path, _use_new_zipfile_serialization=False)


def cut_off(path: Path) -> None:
    torch.save({"state_dict": WEIGHTS}, path)
    os.truncate(path, 400)


def distributed(path: Path) -> None:
    dcp.save({"model": WEIGHTS}, checkpoint_id=path, no_dist=True)


def sharded(path: Path) -> None:
    distributed(path)
    torch.save({}, path / "meta.pt")


def damaged(path: Path) -> None:
    save(str(path), one_tensor(1.0), MESH)
    (path / "MANIFEST.json").write_bytes((path / "MANIFEST.json").read_bytes()[:100])


def newer(path: Path) -> None:
    save(str(path), one_tensor(1.0), MESH)
    data = (path / "MANIFEST.json").read_bytes().replace(b"lucp/1.0", b"lucp/9.0")
    (path / "MANIFEST.json").write_bytes(data)


def dangling(path: Path) -> None:
    path.symlink_to("gone.ckpt")


def unzipped(name: str):
    def make(path: Path) -> None:
        with zipfile.ZipFile(FIXTURES / name) as archive:
            for member in archive.namelist():
                if not member.endswith("truth.safetensors"):
                    archive.extract(member, path)

    return make


KNOWN = {
    "lightning": lambda path: torch.save({"state_dict": WEIGHTS}, path),
    "lightning, old": legacy,
    "lightning, cut off": cut_off,
    "lightning-sharded": sharded,
    "dcp": distributed,
    "deepspeed": unzipped("zero1.zip"),
    "deepspeed stage 3": unzipped("zero3.zip"),
    "safetensors": lambda path: save_file(WEIGHTS, path),
    "safetensors folder": lambda path: path.mkdir() or save_file(WEIGHTS, path / "model.safetensors"),
    "ours": lambda path: save(str(path), one_tensor(1.0), MESH, step=1),
    "ours, damaged": damaged,
    "ours, newer": newer,
    "empty folder": lambda path: path.mkdir(),
    "empty file": lambda path: path.touch(),
    "dangling link": dangling,
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("make", KNOWN.values(), ids=KNOWN)
def test_a_checkpoint_of_any_known_format_is_replaced_whole_and_removed(tmp_path, make, can_exchange):
    path = tmp_path / "last.ckpt"
    make(path)
    save(str(path), one_tensor(2.0), MESH, step=2)
    assert value_at(str(path)) == 2.0  # `verify` finds no file of the other format
    remove(str(path))
    make(path)
    remove(str(path))
    assert set(os.listdir(tmp_path)) <= {".ucp-store"}
    assert can_exchange or not os.listdir(tmp_path / ".ucp-store")


def test_what_lies_beside_in_a_checkpoint_of_ours_is_kept(tmp_path, can_exchange):
    path = tmp_path / "last.ckpt"
    save(str(path), one_tensor(1.0), MESH, step=1)
    mine = {"notes.txt": b"mine", "data/own.bin": b"x" * 9, "plots/a/b.png": b"png"}
    for name, data in mine.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    (path / "drafts").mkdir()
    (path / "away").symlink_to(tmp_path)
    for value in (2.0, 3.0):
        save(str(path), one_tensor(value), MESH, step=int(value))
        assert {name: (path / name).read_bytes() for name in mine} == mine
        assert (path / "drafts").is_dir()
        assert os.readlink(path / "away") == str(tmp_path)
    remove(str(path))
    assert {name: (path / name).read_bytes() for name in mine} == mine
    assert not (path / "MANIFEST.json").exists()
    assert set(os.listdir(tmp_path)) <= {"last.ckpt", ".ucp-store"}


def test_a_link_within_a_checkpoint_is_not_followed(tmp_path):
    """`data` became a link to a folder with files of the same names."""
    path, aside = tmp_path / "last.ckpt", tmp_path / "aside"
    save(str(path), one_tensor(1.0), MESH, step=1)
    os.rename(path / "data", aside)
    (path / "data").symlink_to(aside)
    before = snapshot(aside)
    save(str(path), one_tensor(2.0), MESH, step=2)
    assert snapshot(aside) == before
    remove(str(path))
    assert snapshot(aside) == before


def test_something_else_that_takes_the_place_during_the_save_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    seal = local.LocalTarget.seal

    def moved(self):
        seal(self)
        if not path.exists():
            project(path)

    monkeypatch.setattr(local.LocalTarget, "seal", moved)
    with pytest.raises(CheckpointError, match="is a folder that is no checkpoint"):
        save(str(path), one_tensor(2.0), MESH)
    assert set(snapshot(tmp_path)) == {"last.ckpt", "last.ckpt/data", "last.ckpt/src", "last.ckpt/src/train.py"}


def test_other_objects_under_a_url_stay(url):
    filesystem, prefix = fsspec.core.url_to_fs(url.replace("local://", "file://"))
    filesystem.makedirs(f"{prefix}/data", exist_ok=True)
    filesystem.pipe_file(f"{prefix}/dataset.csv", b"1,2")
    filesystem.pipe_file(f"{prefix}/data/a.bin", b"a")
    for act in (lambda: save(url, one_tensor(2.0), MESH), lambda: remove(url)):
        with pytest.raises(CheckpointError, match=r"no checkpoint of a known format.*so it is not (replaced|removed)"):
            act()
    assert len(filesystem.find(prefix)) == 2
    filesystem.rm(prefix, recursive=True)
    for value in (1.0, 2.0):
        save(url, one_tensor(value), MESH, step=int(value))
        filesystem.pipe_file(f"{prefix}/dataset.csv", b"1,2")  # beside a checkpoint of ours
    assert len(filesystem.find(prefix)) == 5
    remove(url)
    assert [name.rsplit("/", 1)[-1] for name in filesystem.find(prefix)] == ["dataset.csv"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_foreign_checkpoint_in_a_store_is_replaced_whole(tmp_path):
    filesystem = fsspec.filesystem("memory")
    sharded(tmp_path / "a")
    filesystem.put(str(tmp_path / "a"), "/run/a.ckpt", recursive=True)
    save("memory://run/a.ckpt", one_tensor(2.0), MESH, step=2)
    assert len(filesystem.find("/run/a.ckpt")) == 4
    remove("memory://run/a.ckpt")
    assert filesystem.find("/run") == []
    filesystem.store.clear()
