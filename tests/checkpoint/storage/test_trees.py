"""Folders are looked into and deleted from by name, and never through a link."""

from __future__ import annotations

import os

import pytest

from lightning_superscale.checkpoint.storage.trees import delete, entries, move_entries, opened, read_plain_file


@pytest.fixture
def tree(tmp_path):
    for name in ("tree/a/b", "tree/empty", "away"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("tree/x", "tree/a/y", "tree/a/b/z", "away/y"):
        (tmp_path / name).write_text(name)
    (tmp_path / "tree" / "link").symlink_to("../away")
    return tmp_path / "tree"


def test_all_that_lies_there_is_listed_and_links_are_no_folders(tree):
    with opened(str(tree)) as descriptor:
        assert set(entries(descriptor)) == {"x", "a/y", "a/b/z", "empty/", "link"}
    with pytest.raises(OSError, match="Not a directory|symbolic links"):
        opened(str(tree / "link")).__enter__()


def test_only_named_files_go_and_folders_that_are_empty_then(tree):
    with opened(str(tree)) as descriptor:
        delete(descriptor, ["x", "a/b/z", "link/y", "empty/", "gone", "a/../../away/y", "a"])
        assert set(entries(descriptor)) == {"a/y", "link"}
        delete(descriptor, ["link", "a/y"])
    assert os.listdir(tree) == []
    assert (tree.parent / "away" / "y").read_text() == "away/y"


def test_entries_move_to_free_places(tree):
    other = tree.parent / "other"
    (other / "a").mkdir(parents=True)
    (other / "a" / "y").write_text("taken")
    (other / "empty").symlink_to("../away")
    with opened(str(tree)) as source, opened(str(other)) as target:
        move_entries(source, target, {"x"})
        assert set(entries(source)) == {"x", "a/y", "a/b/", "empty/"}
        assert set(entries(target)) == {"a/y", "a/b/z", "link", "empty"}
    assert (other / "a" / "y").read_text() == "taken"


@pytest.mark.timeout(20)
def test_only_plain_files_are_read(tree):
    os.mkfifo(tree / "fifo")
    with opened(str(tree)) as descriptor:
        found = [read_plain_file(name, descriptor, 3) for name in ("x", "fifo", "link", "a", "gone")]
    assert found == [b"tre", None, None, None, None]
