"""What nvcc makes of csrc/cuda: machine code for each target, and no rounding that the source does not write."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

from lightning_superscale.ops.cuda.abi import Call, candidate_paths, open_library
from tests.ops.gpu.helpers import CUDA_SOURCES, ROOT

NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not on the PATH")
FLAGS = ["--options-file", "csrc/cuda/nvcc.flags"]


def _nvcc(*arguments: str) -> None:
    done = subprocess.run([str(NVCC), *FLAGS, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def _operations(ptx: str) -> Counter[str]:
    return Counter(re.findall(r"^\s+(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s", ptx, re.MULTILINE))


@pytest.mark.parametrize("arch", ["75", "80", "90"])
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.stem)
def test_source_compiles_to_machine_code_without_spills(source: Path, arch: str, tmp_path: Path) -> None:
    cubin = tmp_path / "out.cubin"
    command = [
        str(NVCC),
        *FLAGS,
        f"-arch=sm_{arch}",
        "-Xptxas",
        "-v",
        "-Werror",
        "all-warnings",
        "-cubin",
        "-o",
        str(cubin),
    ]
    done = subprocess.run([*command, str(source)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert cubin.stat().st_size > 1000
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", done.stderr)
    assert spills
    assert all(numbers == ("0", "0") for numbers in spills)


def test_adamw_machine_instructions_are_those_of_the_source(tmp_path: Path) -> None:
    counts = {}
    for contract in ("false", "true"):
        ptx = tmp_path / f"{contract}.ptx"
        flags = (ROOT / "csrc" / "cuda" / "nvcc.flags").read_text().replace("-fmad=false", f"-fmad={contract}").split()
        command = [str(NVCC), *flags, "-arch=sm_90", "-ptx", "-o", str(ptx), "csrc/cuda/adamw.cu"]
        subprocess.run(command, cwd=ROOT, check=True, timeout=300)
        text = ptx.read_text()
        assert ".approx" not in text
        assert ".ftz" not in text
        counts[contract] = _operations(text)
    # The source leaves nothing to contract: allowing it changes no instruction.
    assert counts["false"] == counts["true"]
    found = counts["false"]
    # An update has one square root, two divisions and three fused multiply-adds (L2, lerp, exp_avg_sq).
    updates = found["sqrt.rn.f32"]
    assert updates > 0
    assert found["div.rn.f32"] == 2 * updates
    assert found["fma.rn.f32"] == 3 * updates
    loose = {name for name in found if re.fullmatch(r"(add|sub|mul|mad|fma|div|sqrt)(\.\w+)*\.f32", name)}
    assert loose <= {"add.rn.f32", "mul.rn.f32", "fma.rn.f32", "div.rn.f32", "sqrt.rn.f32"}, loose


def test_library_needs_no_cuda_runtime_and_reports_a_missing_driver(tmp_path: Path) -> None:
    library = tmp_path / "liblss_cuda.so"
    targets = [
        "-gencode",
        "arch=compute_75,code=sm_75",
        "-gencode",
        "arch=compute_80,code=sm_80",
        "-gencode",
        "arch=compute_90,code=[sm_90,compute_90]",
    ]
    _nvcc(*targets, "-shared", "-o", str(library), *map(str, CUDA_SOURCES))
    needed = subprocess.run(
        ["readelf", "-d", str(library)], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert "libcudart" not in needed
    opened = open_library(library)  # checks the ABI version and every struct's size
    if not torch.cuda.is_available():
        error = opened.dll.lss_cuda_adamw(ctypes.byref(Call()), None)
        with pytest.raises(RuntimeError, match=r"probe: CUDA error \d+ \(.+\)"):
            opened.check(error, "probe")


def test_open_library_of_another_version_says_rebuild(tmp_path: Path) -> None:
    source = tmp_path / "other.c"
    source.write_text("int lss_cuda_abi_version(void) { return 999; }\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(tmp_path / "other.so"), str(source)], check=True, timeout=60)
    with pytest.raises(RuntimeError, match="expected ABI version 1, found 999; rebuild"):
        open_library(tmp_path / "other.so")


def test_candidate_paths_environment_variable_is_the_only_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LSS_CUDA_LIB", str(tmp_path / "mine.so"))
    assert candidate_paths() == [tmp_path / "mine.so"]
    monkeypatch.delenv("LSS_CUDA_LIB")
    library = tmp_path / "lightning_superscale" / "ops" / "native" / "_native" / "liblss_cuda.so"
    assert library not in candidate_paths([str(tmp_path)])
    library.parent.mkdir(parents=True)
    library.touch()
    assert library in candidate_paths([str(tmp_path)])
