"""Only files and folders of this user that nobody else can write are read; no link is followed, no pipe waited for."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from lightning_superscale.ops.native import own_files
from lightning_superscale.ops.native.own_files import (
    NotOwnError,
    make_own_folder,
    own_folder,
    private_folder,
    read_own_file,
    user_cache,
)

is_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
SOMEBODY = 12345


@pytest.fixture
def folder(tmp_path) -> Path:
    made = tmp_path / "cache"
    make_own_folder(made)
    return made


@pytest.fixture
def as_somebody(monkeypatch):
    """What this process owns belongs to somebody else, for the code under test; neither is root."""
    monkeypatch.setattr(own_files.os, "geteuid", lambda: SOMEBODY)
    if os.getuid() == 0:
        monkeypatch.setattr(own_files, "_check_own", _without_root(own_files._check_own))


def _without_root(check):
    def checked(found, path):
        fields = list(found[:10])
        fields[4] = 54321 if found.st_uid == 0 else found.st_uid
        check(os.stat_result(fields), path)

    return checked


def test_a_plain_file_of_ours_is_read(folder):
    (folder / "a.json").write_bytes(b"12345")
    assert read_own_file(folder / "a.json", 5) == b"12345"
    with pytest.raises(NotOwnError, match="a.json is larger than 4 bytes"):
        read_own_file(folder / "a.json", 4)
    with pytest.raises(FileNotFoundError):
        read_own_file(folder / "b.json", 5)


def test_what_is_no_plain_file_is_refused_at_once(folder, tmp_path):
    (tmp_path / "target").write_text("secret")
    os.symlink(tmp_path / "target", folder / "link")
    os.symlink("/dev/zero", folder / "device")
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    for name, what in {
        "link": "is a link",
        "device": "is a link",
        "pipe": "no regular",
        "folder": "no regular",
    }.items():
        with pytest.raises(NotOwnError, match=f"{name} .*{what}"):
            read_own_file(folder / name, 100)


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_file_that_others_can_write_is_refused(folder, mode):
    (folder / "a").write_text("x")
    (folder / "a").chmod(mode)
    with pytest.raises(NotOwnError, match=rf"a can be written by others \(mode {mode:o}\): run chmod go-w"):
        read_own_file(folder / "a", 10)


@pytest.mark.parametrize("mode", [0o775, 0o707, 0o1777])
def test_a_folder_that_others_can_write_is_refused_until_it_is_made_ours(folder, mode):
    (folder / "a").write_text("x")
    folder.chmod(mode)
    with pytest.raises(NotOwnError, match="cache can be written by others"):
        read_own_file(folder / "a", 10)
    make_own_folder(folder)
    assert not folder.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    assert read_own_file(folder / "a", 10) == b"x"


def test_a_file_or_folder_of_somebody_else_is_refused(folder, as_somebody):
    (folder / "a").write_text("x")
    for act in (lambda: read_own_file(folder / "a", 10), lambda: make_own_folder(folder)):
        with pytest.raises(NotOwnError, match="belongs to user .*, expected user 12345 or root"):
            act()


@is_root
def test_a_file_that_was_given_away_and_a_planted_link_are_refused(folder, tmp_path):
    (folder / "a").write_text("x")
    os.chown(folder / "a", SOMEBODY, SOMEBODY)
    with pytest.raises(NotOwnError, match="a belongs to user 12345"):
        read_own_file(folder / "a", 10)
    os.symlink(folder, tmp_path / "planted")
    with own_folder(tmp_path / "planted"):
        pass  # a link of ours to a folder of ours, as to a larger disk
    os.chown(tmp_path / "planted", SOMEBODY, SOMEBODY, follow_symlinks=False)
    with pytest.raises(NotOwnError, match="planted is a link that belongs to user 12345"):
        read_own_file(tmp_path / "planted" / "a", 10)


def test_a_new_folder_is_private(tmp_path):
    make_own_folder(tmp_path / "x" / "y")
    assert stat.S_IMODE((tmp_path / "x" / "y").stat().st_mode) == 0o700


def test_the_cache_is_where_the_user_says_else_in_a_home_that_can_be_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert user_cache() == tmp_path / "xdg" / "lightning_superscale"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache() == tmp_path / ".cache" / "lightning_superscale"
    (tmp_path / ".cache").write_text("no folder")
    assert user_cache() == private_folder()
    monkeypatch.setattr(own_files.Path, "home", _no_home)
    assert user_cache() == private_folder()


def _no_home():
    raise RuntimeError("Could not determine home directory.")


def test_an_unreadable_home_gives_the_private_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))

    def refuses(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(own_files.os, "lstat", refuses)
    assert user_cache() == private_folder()
