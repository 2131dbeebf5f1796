"""Wheels built as a user builds them: no torch at build time, a library inside, a pure fallback, a loud refusal.

The package index is asked for scikit-build-core only (and CMake where the machine has none).
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lightning_superscale.ops.native.loader import ABI_VERSION
from tests.helpers.extent import only_in_test_all

ROOT = Path(__file__).resolve().parents[2]
NO_COMPILER = {"CXX": "/nonexistent", "CC": "/nonexistent"}

pytestmark = pytest.mark.slow


def run(command: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("LSS_", "PYTHONPATH", "CMAKE_"))}
    return subprocess.run(command, capture_output=True, text=True, env={**clean, **env}, timeout=230, check=False)


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> str:
    """The interpreter of an empty virtual environment."""
    home = tmp_path_factory.mktemp("empty") / "venv"
    made = run([sys.executable, "-m", "venv", str(home)])
    assert made.returncode == 0, made.stdout + made.stderr
    return str(home / "bin" / "python")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the tracked files, so that nothing in the checkout is found by accident or written to."""
    copy = tmp_path_factory.mktemp("source")
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    return copy


def wheel(python: str, source: Path, out: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return run(
        [python, "-m", "pip", "wheel", "--no-deps", "--verbose", "--wheel-dir", str(out), str(source)],
        **{"LSS_CUDA": "OFF", "CMAKE_BUILD_PARALLEL_LEVEL": "2", "CMAKE_ARGS": "-DLSS_CUDA=OFF", **env},
    )


def contents(out: Path) -> tuple[str, set[str]]:
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return path.name, set(archive.namelist())


@only_in_test_all  # make wheel does the same in every run of the checks
def test_wheel_has_the_library_and_needs_no_torch(python, source, tmp_path):
    result = wheel(python, source, tmp_path, LSS_REQUIRE_NATIVE="1")
    log = result.stdout + result.stderr
    assert result.returncode == 0, log
    assert "Collecting torch" not in log
    name, files = contents(tmp_path)
    assert name.startswith("lightning_superscale-0.1.0-py3-none-linux_")
    assert "lightning_superscale/ops/native/_native/liblss.so" in files
    assert {Path(file).parts[0].split("-")[0] for file in files} <= {
        "lightning_superscale", "_lightning_superscale_autoload.py"
    }  # fmt: skip
    if (ROOT / "_lightning_superscale_autoload.py").exists():
        assert "_lightning_superscale_autoload.py" in files
    installed = run([python, "-m", "pip", "install", "--no-deps", str(tmp_path / name)])
    assert installed.returncode == 0, installed.stdout + installed.stderr
    # torch is not there, so the library is loaded without the package.
    load = (
        "import ctypes, sysconfig, pathlib\n"
        "site = pathlib.Path(sysconfig.get_path('purelib'))\n"
        "path = site / 'lightning_superscale/ops/native/_native/liblss.so'\n"
        "print(ctypes.CDLL(str(path)).lss_abi_version())"
    )
    assert run([python, "-c", load]).stdout == f"{ABI_VERSION}\n"
    # The package itself finds it, from this interpreter's torch.
    site = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).stdout.strip()
    use = (
        "from lightning_superscale.ops.cpu import flat; from lightning_superscale.ops.native import loader\n"
        "import torch\n"
        "assert 'site-packages' in str(next(iter(loader.library_candidates())))\n"
        "print(loader.isa_name(), flat.sumsq(torch.ones(10)))"
    )
    used = run([sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", "-c", use], PYTHONPATH=site,
               LSS_REQUIRE_NATIVE="1", LSS_BUILD_CACHE=str(tmp_path))  # fmt: skip
    assert used.returncode == 0, used.stderr
    assert used.stdout.endswith(" 10.0\n")


def test_wheel_without_a_compiler_is_pure(python, source, tmp_path):
    result = wheel(python, source, tmp_path, **NO_COMPILER)
    assert result.returncode == 0, result.stdout + result.stderr
    name, files = contents(tmp_path)
    assert name == "lightning_superscale-0.1.0-py3-none-any.whl"
    assert not any(file.endswith(".so") for file in files)
    assert "lightning_superscale/ops/reference.py" in files


def test_wheel_without_a_compiler_fails_when_native_is_required(python, source, tmp_path):
    result = wheel(python, source, tmp_path, LSS_REQUIRE_NATIVE="1", **NO_COMPILER)
    assert result.returncode != 0
    assert not list(tmp_path.glob("*.whl"))
    assert "/nonexistent" in result.stdout + result.stderr
