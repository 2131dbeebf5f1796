"""Finding, checking and refusing the native library; the build command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_superscale.ops.native import build, loader
from lightning_superscale.ops.native.own_files import make_own_folder
from lightning_superscale.ops.native.seal import sealed, why_seal_broken
from tests.ops.paths import NATIVE

needs_native = pytest.mark.skipif(not NATIVE, reason="no native library")
SHOW = """
import warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    from lightning_superscale.ops.native import loader
    print(loader.isa_name(), loader.isa_name())
print(len(seen), *(str(w.message) for w in seen))
"""


def run(code: str = SHOW, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=120,
        check=False,
    )


@needs_native
@pytest.mark.parametrize("isa", NATIVE)
def test_isa_environment_is_honoured(isa):
    assert run(LSS_ISA=isa).stdout.startswith(f"{isa} {isa}\n0")


@needs_native
def test_isa_unknown_is_an_error_that_lists_the_known():
    result = run(LSS_ISA="avx9")
    assert result.returncode != 0
    assert "LSS_ISA asks for unknown instruction set 'avx9'; use one of: " in result.stderr
    with pytest.raises(ValueError, match="unknown instruction set 'avx9'"):
        loader.set_isa("avx9")


@needs_native
def test_native_can_be_switched_off():
    assert run(LSS_NATIVE="0", LSS_REQUIRE_NATIVE="").stdout.startswith("None None\n0")


# An editable install's import hook would find the sources before the copy.
COPY = """
import os, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in type(finder).__name__
                    and "Inplace" not in type(finder).__name__]
os.chdir({!r})
"""


def hidden(tmp_path: Path) -> dict[str, str]:
    """An environment in which no library is found: the package is linked into a place without one."""
    root = Path(__file__).resolve().parents[3]
    package = tmp_path / "lightning_superscale"
    package.mkdir()
    (package / "__init__.py").touch()
    ops = root / "lightning_superscale" / "ops"
    for source in ops.rglob("*.py"):
        copy = package / "ops" / source.relative_to(ops)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(source.read_text())
    # An environment's own site-packages may hold an installed library; the copy must come first, and alone.
    return {"PYTHONPATH": str(tmp_path), "LSS_BUILD_CACHE": str(tmp_path / "cache"), "LSS_REQUIRE_NATIVE": ""}


def installed() -> bool:
    return any("site-packages" in path.parts for path in loader.library_candidates())


@pytest.mark.skipif(installed(), reason="an installed library is found from everywhere")
def test_missing_library_warns_once_and_names_the_remedy(tmp_path):
    code = COPY.format(str(tmp_path)) + SHOW
    result = run(code, **hidden(tmp_path))
    first, second = result.stdout.splitlines()
    assert first == "None None"
    assert second.startswith("1 The native CPU library liblss.so was not found")
    assert "reinstall lightning-superscale" in second


@pytest.mark.skipif(installed(), reason="an installed library is found from everywhere")
def test_missing_library_is_an_error_when_required(tmp_path):
    code = COPY.format(str(tmp_path)) + SHOW
    result = run(code, **{**hidden(tmp_path), "LSS_REQUIRE_NATIVE": "1"})
    assert result.returncode != 0
    assert "LSS_REQUIRE_NATIVE=1 expects the native library liblss.so, found none" in result.stderr


@needs_native
def test_library_of_another_abi_is_refused(monkeypatch):
    found = loader.ABI_VERSION
    monkeypatch.setattr(loader, "ABI_VERSION", 99)
    path = next(iter(loader.library_candidates()))
    with pytest.raises(OSError, match=f"expected ABI version 99, found {found}"):
        loader._opened(path)


def test_source_hash_follows_content(tmp_path):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "CMakeLists.txt").write_text("a")
    one = build.source_hash(tmp_path)
    (tmp_path / "csrc" / "x.cpp").write_text("b")
    assert build.source_hash(tmp_path) != one


def test_build_failure_shows_the_compilers_words(tmp_path, monkeypatch):
    if build._tool("cmake") is None:
        pytest.skip("needs cmake")
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setenv("LSS_BUILD_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match="(?s)ended with status 1.*/nonexistent"):
        build.build()


# Libraries in a build cache


@pytest.fixture
def cached(tmp_path, monkeypatch) -> Path:
    """A whole library in a build cache of its own, the only one that is found."""
    library = next(loader.library_candidates()).read_bytes()
    if why_seal_broken(library) is None:
        library = library[:-44]
    monkeypatch.setenv("LSS_BUILD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LSS_REQUIRE_NATIVE", raising=False)
    monkeypatch.setattr(build, "private_folder", lambda: tmp_path / "private")
    monkeypatch.setattr(loader.sys, "path", [])
    monkeypatch.setattr(loader.site, "getsitepackages", list)
    monkeypatch.setattr(loader.site, "getusersitepackages", lambda: "")
    folder = build.cache_dir(build.source_root())
    make_own_folder(folder)
    build._put(sealed(library), folder / build.LIBRARY_NAME)
    return folder / build.LIBRARY_NAME


@needs_native
def test_a_whole_library_of_ours_is_loaded_without_a_word(cached, recwarn):
    assert loader._load() is not None
    assert not recwarn.list
    assert build.why_unusable(cached) is None


DAMAGES = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "does not match its checksum": lambda path: path.write_bytes(b"\x7fELF!" + path.read_bytes()[5:]),
    "an earlier version built it": lambda path: path.write_bytes(path.read_bytes()[:-44]),
    "can be written by others": lambda path: path.chmod(0o775),
    "cache/.* can be written by others": lambda path: path.parent.chmod(0o777),
    "is a link": lambda path: path.symlink_to(path.rename(path.with_suffix(".moved"))),
}


@needs_native
@pytest.mark.parametrize("reason", DAMAGES)
def test_a_library_that_is_not_whole_or_not_ours_is_not_loaded_and_is_built_again(cached, reason):
    DAMAGES[reason](cached)
    with pytest.warns(UserWarning, match=f"(?s)was not found .*{reason}.*run `python -m .*build`"):
        assert loader._load() is None
    assert re.search(reason, build.why_unusable(cached))


@needs_native
def test_another_candidate_is_taken_with_one_warning(cached, tmp_path):
    whole = cached.read_bytes()
    cached.write_bytes(whole[:1000])
    make_own_folder(tmp_path / "private" / cached.parent.name)
    build._put(whole, tmp_path / "private" / cached.parent.name / cached.name)
    with pytest.warns(UserWarning, match="taken from .*private.*, because .*cut short") as seen:
        assert loader._load() is not None
    assert len(seen) == 1


@needs_native
def test_an_installed_library_that_was_cut_short_is_not_mapped(cached, tmp_path):
    path = tmp_path / build.LIBRARY_NAME
    path.write_bytes(cached.read_bytes()[:-44])
    assert loader.open_library(path).lss_abi_version() == loader.ABI_VERSION
    path.unlink()
    path.write_bytes(cached.read_bytes()[:100_000])
    with pytest.raises(OSError, match="its segments need .* bytes, found 100000"):
        loader.open_library(path)


def test_what_is_built_goes_elsewhere_with_one_warning_if_the_cache_is_not_ours(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LSS_BUILD_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(build, "private_folder", lambda: tmp_path / "private")
    root = build.source_root()
    with pytest.warns(UserWarning, match="built into .*private.*because") as seen:
        assert build._own_target(root) == tmp_path / "private" / build.source_hash(root)
    assert len(seen) == 1
    monkeypatch.setattr(build, "private_folder", lambda: tmp_path / "file")
    with pytest.raises(RuntimeError, match=r"expected a folder of this user's to build into.*Set LSS_BUILD_CACHE"):
        build._own_target(root)
