"""Build the native libraries, run the gpu-marked tests, measure, and write JSON.

Every step runs whatever the one before it did; the exit status is 1 if any failed. `--dry-run`
rehearses all but the GPU: no build, no tests, the oracle on small CPU tensors.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import cases

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS: dict[str, Callable[[cases.Setting], list[cases.Row]]] = {
    "adamw": cases.adamw,
    "sumsq": cases.sumsq,
    "triton": cases.triton,
    "transfers": cases.transfers,
}


def describe_hardware() -> dict[str, Any]:
    """The machine and the software that a number belongs to."""
    found: dict[str, Any] = {
        "cpu": platform.processor() or platform.machine(),
        "cpu_cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version_of("triton"),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "driver": _driver_version(),
        }
    return found


def _version_of(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver_version() -> str | None:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    return done.stdout.strip() or None


def _run(command: Sequence[str], timeout_s: float) -> str:
    print("+", " ".join(command), flush=True)
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s
    )
    print(done.stdout, flush=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with status {done.returncode}: see run.log")
    return done.stdout


def build_cuda(directory: Path) -> dict[str, Any]:
    """Compile csrc/cuda for this GPU and make the binding use it."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("expected nvcc on the PATH, found none: add the CUDA toolkit's bin directory")
    major, minor = torch.cuda.get_device_capability()
    library = directory / "liblss_cuda.so"
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    start = time.perf_counter()
    arch = f"-arch=sm_{major}{minor}"
    _run([nvcc, "--options-file", "csrc/cuda/nvcc.flags", arch, "-shared", "-o", str(library), *sources], 300)
    os.environ["LSS_CUDA_LIB"] = str(library)
    return {"seconds": time.perf_counter() - start, "arch": arch}


def build_cpu() -> dict[str, Any]:
    """Compile the CPU library, where this version of the project has a builder."""
    if importlib.util.find_spec("lightning_superscale.ops.native.build") is None:
        return {"skipped": "lightning_superscale.ops.native.build does not exist"}
    start = time.perf_counter()
    _run([sys.executable, "-m", "lightning_superscale.ops.native.build"], 300)
    return {"seconds": time.perf_counter() - start}


def run_tests(out: Path, selection: str, timeout_s: float) -> dict[str, int]:
    """The gpu-marked tests; none passed, or any skipped, is a failure too."""
    report = out / "pytest.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-rs",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
    ]
    try:
        _run([*command, selection], timeout_s)
    finally:
        counts = _count_tests(report)
        print("tests:", counts, flush=True)
    if counts["passed"] == 0 or counts["skipped"]:
        raise RuntimeError(f"expected every gpu test to run and pass, found {counts}")
    return counts


def _count_tests(report: Path) -> dict[str, int]:
    if not report.is_file():
        return {"passed": 0, "failed": 0, "skipped": 0}
    suites = ElementTree.parse(report).getroot().findall("testsuite")
    total, failures, errors, skipped = (
        sum(int(suite.get(key, "0")) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    )
    return {"passed": total - failures - errors - skipped, "failed": failures + errors, "skipped": skipped}


class StepLog:
    """Runs steps, keeps what failed, and writes after each step."""

    def __init__(self, out: Path, limit_s: float) -> None:
        self._out = out
        self._deadline = time.monotonic() + limit_s
        self._hardware = describe_hardware()
        self.steps: dict[str, Any] = {}

    @property
    def left_s(self) -> float:
        return self._deadline - time.monotonic()

    @property
    def failed(self) -> list[str]:
        return [name for name, step in self.steps.items() if not step["ok"]]

    def step(self, name: str, run: Callable[[], Any]) -> None:
        start = time.monotonic()
        print(f"== {name} ({self.left_s:.0f} s left)", flush=True)
        try:
            if self.left_s <= 0:
                raise TimeoutError("the run's time was used up before this step")
            outcome = {"ok": True, "result": run()}
        except Exception as error:  # reported, and the later steps still run
            traceback.print_exc()
            outcome = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        self.steps[name] = {**outcome, "step_seconds": time.monotonic() - start}
        self.write("summary", {"steps": self.steps, "failed": self.failed})

    def write(self, name: str, content: dict[str, Any]) -> None:
        path = self._out / f"{name}.json"
        path.write_text(json.dumps({"hardware": self._hardware, **content}, indent=1) + "\n")


def _benchmark(log: StepLog, name: str, setting: cases.Setting) -> str:
    rows = BENCHMARKS[name](setting)
    log.write(name, {"is_rehearsal": setting.is_rehearsal, "rows": rows})
    for row in rows:
        print(f"{row['name']:45s} {row['median_ms']:10.4f} ms {row['gb_s']:10.1f} GB/s", flush=True)
    if not setting.is_rehearsal:
        torch.cuda.empty_cache()
    return f"{name}.json"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="directory for JSON files and logs")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU")
    parser.add_argument("--tests", default="tests/ops", help="what pytest is to collect gpu tests from")
    parser.add_argument("--only", choices=sorted(BENCHMARKS), action="append", help="measure only these")
    parser.add_argument("--numel", type=int, help="elements of the large cases")
    parser.add_argument("--limit-s", type=float, default=570.0, help="time for the whole run")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    log = StepLog(options.out, options.limit_s)
    if options.dry_run:
        setting = cases.Setting(torch.device("cpu"), options.numel or 1 << 13, repetitions=3)
    else:
        setting = cases.Setting(torch.device("cuda"), options.numel or 1 << 27, repetitions=20)
        if not torch.cuda.is_available():
            log.step("gpu", _no_gpu)
            return 1
        directory = Path(tempfile.mkdtemp(prefix="lss_gpu_"))
        log.step("build_cuda", lambda: build_cuda(directory))
        log.step("build_cpu", build_cpu)
        log.step("tests", lambda: run_tests(options.out, options.tests, max(log.left_s - 120, 30)))
    for name in options.only or BENCHMARKS:
        log.step(name, partial(_benchmark, log, name, setting))
    if not options.dry_run and not options.only:
        log.step("superoffload", lambda: _run(_offload_command(options.out), max(log.left_s, 30)))
    if log.failed:
        print("failed:", ", ".join(log.failed), flush=True)
    return 1 if log.failed else 0


def _offload_command(out: Path) -> list[str]:
    """Whole training steps; systems that this machine does not have are left out."""
    command = [sys.executable, "benchmarks/superoffload.py", "--device", "cuda", "--sizes", "1B", "--rounds", "5"]
    return [*command, "--json", str(out / "superoffload.json")]


def _no_gpu() -> None:
    raise RuntimeError("torch.cuda.is_available() is False: this needs a GPU; --dry-run rehearses without one")


if __name__ == "__main__":
    sys.exit(main())
