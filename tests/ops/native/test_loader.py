"""Finding, checking and refusing the native library; the build command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_superscale.ops.native import build, loader
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
