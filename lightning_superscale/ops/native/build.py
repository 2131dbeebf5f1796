"""Build the native libraries of a source checkout into a cache: `python -m lightning_superscale.ops.native.build`.

`pip install .` builds them into the wheel. In a checkout that is only on the path, this command runs the same
CMake project into a directory named by the hash of the sources, where `loader` looks first; so switching branches
never loads a library of other sources. Only libraries of this user's are taken from there, and only whole ones.
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
import warnings
from pathlib import Path

from lightning_superscale.ops.native.own_files import make_own_folder, own_file, private_folder, user_cache
from lightning_superscale.ops.native.seal import sealed, why_seal_broken

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


def cache_dirs(root: Path) -> list[Path]:
    """Folders that may hold the libraries built from the sources in `root`, best first, whether they exist or not."""
    first = Path(os.environ.get("LSS_BUILD_CACHE") or user_cache())
    name = source_hash(root)
    return [folder / name for folder in dict.fromkeys((first, private_folder()))]


def cache_dir(root: Path) -> Path:
    """The folder where the libraries of `root` are built, unless it is not this user's."""
    return cache_dirs(root)[0]


def why_unusable(library: Path) -> str | None:
    """Why a library in a cache can't be loaded: it is missing, not this user's, or not whole; None if it can."""
    try:
        with own_file(library) as descriptor, os.fdopen(os.dup(descriptor), "rb") as file:
            return why_seal_broken(file.read())
    except OSError as error:
        return str(error)


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
        RuntimeError: no sources, no CMake, no folder of this user's, or the compiler failed (with its output).

    Warns:
        UserWarning: the cache is not this user's, and the libraries are built elsewhere.
    """
    root = source_root()
    if root is None:
        raise RuntimeError(
            "expected CMakeLists.txt and csrc/ beside the lightning_superscale package, found none: this command "
            "builds a source checkout; an installed package is rebuilt with `pip install --force-reinstall`"
        )
    target = _own_target(root)
    if force or cuda != "AUTO" or why_unusable(target / LIBRARY_NAME):
        _build_into(root, target, cuda=cuda, jobs=jobs)
    return sorted(target.glob("*.so"))


def _own_target(root: Path) -> Path:
    """The first cache folder that is this user's or can be made so.

    Warns:
        UserWarning: it is not the first of all; says why.
    """
    refused = []
    for folder in cache_dirs(root):
        try:
            make_own_folder(folder)
        except OSError as error:
            refused.append(str(error))
            continue
        if refused:
            warnings.warn(f"the libraries are built into {folder}, because {'; '.join(refused)}", stacklevel=3)
        return folder
    raise RuntimeError(
        f"expected a folder of this user's to build into, found none: {'; '.join(refused)}. Set LSS_BUILD_CACHE."
    )


def _build_into(root: Path, target: Path, *, cuda: str, jobs: int) -> None:
    cmake = _tool("cmake")
    if cmake is None:
        raise RuntimeError("expected cmake on the PATH, found none: `pip install cmake ninja`, and a C++17 compiler")
    with tempfile.TemporaryDirectory(prefix="lss-build-") as scratch:
        ninja = _tool("ninja")
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        _run([cmake, "-S", str(root), "-B", scratch, f"-DLSS_CUDA={cuda}", *generator])
        _run([cmake, "--build", scratch, "--parallel", str(jobs)])
        built = sorted(Path(scratch).glob("liblss*.so"))
        for library in built:
            _put(sealed(library.read_bytes()), target / library.name)
        for stale in target.glob("*.so"):
            if stale.name not in {library.name for library in built}:
                stale.unlink()


def _put(content: bytes, path: Path) -> None:
    """Write a file that nobody else can write and rename it into place: another process may be looking for it."""
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), 0o755)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


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
