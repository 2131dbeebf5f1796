"""Build the native libraries of a source checkout into a cache: `python -m lightning_superscale.ops.native.build`.

`pip install .` builds them into the wheel. In a checkout that is only on the path, this command runs the same
CMake project into a directory named by the hash of the sources, where `loader` looks first; so switching branches
never loads a library of other sources.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LIBRARY_NAME = "liblss.so"
CUDA_LIBRARY_NAME = "liblss_cuda.so"


def source_root() -> Path | None:
    """The checkout that this package lies in, or None when it was installed without its C++ sources."""
    root = Path(__file__).resolve().parents[3]
    return root if (root / "CMakeLists.txt").is_file() and (root / "csrc" / "include" / "lss.h").is_file() else None


def source_hash(root: Path) -> str:
    """Hash of the platform and of all sources of the build, as 16 hex digits."""
    digest = hashlib.sha256(f"{sys.platform} {platform.machine()}".encode())
    for path in sorted([root / "CMakeLists.txt", *(root / "csrc").rglob("*")]):
        if path.is_file():
            digest.update(f"\0{path.relative_to(root).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def user_cache() -> Path:
    """The user's cache folder of this package, for files that it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_superscale"


def cache_dir(root: Path) -> Path:
    """The folder of the libraries that are built from the sources in `root`, whether it exists or not."""
    return Path(os.environ.get("LSS_BUILD_CACHE") or user_cache()) / source_hash(root)


def _tool(name: str) -> str | None:
    # A virtual environment that is not activated has its tools beside the interpreter.
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(
            f"{' '.join(command[:2])} ... ended with status {result.returncode}:\n{result.stdout}{result.stderr}"
        )


def build(*, cuda: str = "AUTO", jobs: int = 2, force: bool = False) -> list[Path]:
    """Build the libraries of this checkout unless the cache has them.

    Args:
        cuda: AUTO, ON or OFF; ON and OFF always build anew, since the cache does not record it.
        jobs: number of compilers that run at a time.
        force: build although the cache has the libraries.

    Returns:
        The libraries in the cache.

    Raises:
        RuntimeError: no sources, no CMake, or the compiler failed (with its output).
    """
    root = source_root()
    if root is None:
        raise RuntimeError(
            "expected CMakeLists.txt and csrc/ beside the lightning_superscale package, found none: this command "
            "builds a source checkout; an installed package is rebuilt with `pip install --force-reinstall`"
        )
    target = cache_dir(root)
    if force or cuda != "AUTO" or not (target / LIBRARY_NAME).is_file():
        _build_into(root, target, cuda=cuda, jobs=jobs)
    return sorted(target.glob("*.so"))


def _build_into(root: Path, target: Path, *, cuda: str, jobs: int) -> None:
    cmake = _tool("cmake")
    if cmake is None:
        raise RuntimeError("expected cmake on the PATH, found none: `pip install cmake ninja`, and a C++17 compiler")
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="lss-build-") as scratch:
        ninja = _tool("ninja")
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        _run([cmake, "-S", str(root), "-B", scratch, f"-DLSS_CUDA={cuda}", *generator])
        _run([cmake, "--build", scratch, "--parallel", str(jobs)])
        for stale in target.glob("*.so"):
            stale.unlink()
        for built in Path(scratch).glob("liblss*.so"):
            # The file is renamed into place, because another process may be looking for it.
            partial = target / f".{built.name}.{os.getpid()}"
            shutil.copy2(built, partial)
            partial.replace(target / built.name)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lightning_superscale.ops.native.build", description=__doc__)
    parser.add_argument("--cuda", choices=("AUTO", "ON", "OFF"), default="AUTO")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--force", action="store_true", help="build although the cache has the libraries")
    options = parser.parse_args(arguments)
    for path in build(cuda=options.cuda, jobs=options.jobs, force=options.force):
        print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
