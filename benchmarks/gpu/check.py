"""`make gpu-check`: is everything right on this GPU? Rows go to OUT/check.jsonl as they are found.

Facts of the machine; the native build; the tests marked gpu; whole training steps of every engine, precision, clip,
accumulation, flow and recomputation against states that stay on the device, bit for bit, again with delays in the
streams; peak memory; evaluation alone; resume; the sanitizers; one trace. With `--device cpu --tiny` the same is
rehearsed on a small model without a GPU. Exits with 1 if any row is not ok.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu import exact_cases
from benchmarks.gpu.exact_cases import Case
from benchmarks.gpu.process import kill_all
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.runner import Runner, carry_out, parser

CASE_LIMIT_S = 90.0  # without an answer; a worker's first answer waits for its imports
WORKERS, SEEDS = 4, (1, 2)


class Check(Runner):
    """One run of all checks."""

    def tests(self) -> None:
        """The tests marked gpu; a skipped one is a failure too, and so is none."""
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "tests.xml"
            if self.is_cuda:
                spread = ["-n", "8"] if importlib.util.find_spec("xdist") else []
                chosen = ["-m", "gpu", *spread, "tests/ops"]
            else:
                # Quick ones, for the rehearsal; the usual filter of warnings imports Lightning.
                chosen = ["-o", "filterwarnings=error", "tests/layout/test_mesh.py"]
            # pytest-benchmark warns about xdist, and a warning is an error here.
            quiet = ["-q", "-p", "no:cacheprovider", "-p", "no:benchmark", f"--junitxml={report}"]
            said: list[str] = []
            outcome = self.run(["-m", "pytest", *quiet, *chosen], 240, on_line=said.append)
            counts = _counts(report)
        print("\n".join(said[-40:]), flush=True)
        if outcome.is_good and counts["passed"] and not counts["skipped"]:
            self.rows.write("tests", took_s=round(outcome.seconds, 1), **counts)
        else:
            self.rows.write("tests", ok=False, error=outcome.why, **counts, last_words="\n".join(said[-25:]))

    def exactness(self, cases: Sequence[Case]) -> None:
        """Give a worker its cases; where it dies or hangs at one, the next worker gets the rest."""
        rest = list(cases)
        while rest:
            if not self.rows.left_s:
                return self.rows.no_time(f"exact: {len(rest)} cases, from {rest[0].name} on")
            started: list[str] = []
            answered = 0

            def take(line: str, started: list[str] = started) -> None:
                nonlocal answered
                if "start" in (said := json.loads(line)):
                    started.append(said["start"])
                else:
                    answered += 1
                    self.take(line)

            stdin = json.dumps([case.as_json() for case in rest])
            command = ["-m", "benchmarks.gpu.exactness", *self.device]
            command += ["--trace", str(self.options.out.resolve() / "trace.json")]
            outcome = self.run(command, self.rows.left_s, stdin=stdin, silence_s=CASE_LIMIT_S, on_line=take)
            if answered < len(rest) and self.rows.left_s:
                self.rows.outcome(f"exact: {rest[answered].name}", outcome)
                answered += 1
                if not started:  # it can't even start: no case would get further
                    return None
            rest = rest[answered:]
        return None

    def sanitize(self, tool: str) -> None:
        """NVIDIA's sanitizer on our kernels."""
        name = f"compute-sanitizer {tool}"
        if shutil.which("compute-sanitizer") is None:
            return self.rows.write(name, why="compute-sanitizer is not on the PATH")
        before = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        if tool == "memcheck":
            before += ["--leak-check", "no"]
        command = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:benchmark", "-x"]
        command += ["tests/ops/gpu/test_on_gpu.py", "-k", "test_cuda_op_equals_reference"]
        said: list[str] = []
        # Triton's and torch's memory must not hide behind a pool.
        variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        outcome = self.run(command, 150, before=before, variables=variables, on_line=said.append)
        return self.rows.outcome(name, outcome, said="\n".join(said[-10:]))

    def sanitize_streams(self) -> None:
        """torch's sanitizer of streams on one fit with states on the host and on one with weights there too."""
        name, cases = "stream sanitizer", [Case("superoffload"), Case("flow")]
        found: list[dict[str, Any]] = []
        outcome = self.run(
            ["-m", "benchmarks.gpu.exactness", *self.device],
            150,
            variables={"TORCH_CUDA_SANITIZER": "1"},
            stdin=json.dumps([case.as_json() for case in cases]),
            on_line=lambda line: found.append(json.loads(line)),
        )
        verdicts = [row for row in found if "row" in row]
        if outcome.is_good and len(verdicts) == len(cases) and all(row["ok"] for row in verdicts):
            self.rows.write(name, took_s=round(outcome.seconds, 1))
        else:
            self.rows.write(name, ok=False, error=outcome.why, found=verdicts, last_words=outcome.tail)

    def all(self) -> None:
        """Facts and the build first; then everything at once, as the cores of a GPU's host allow."""
        self.facts()
        self.build()
        hands = exact_cases.tiny() if self.options.tiny else exact_cases.deal(WORKERS, SEEDS)
        parts = [partial(self.exactness, hand) for hand in hands]
        last = []
        if self.is_cuda:
            last = [self.sanitize_streams, *(partial(self.sanitize, tool) for tool in ("memcheck", "racecheck"))]
        with ThreadPoolExecutor(len(hands) + 2 if self.is_cuda else 1) as pool:
            doing = [pool.submit(part) for part in (self.tests, *parts, *last)]
            try:
                for done in doing:
                    done.result()
            except BaseException:
                self.rows.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                kill_all()
                raise


def _counts(report: Path) -> dict[str, int]:
    """Tests that passed, failed and were skipped, of pytest's XML."""
    if not report.is_file():
        return {"passed": 0, "failed": 0, "skipped": 0}
    suites = ElementTree.parse(report).getroot().findall("testsuite")
    total, failures, errors, skipped = (
        sum(int(suite.get(key, "0")) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    )
    return {"passed": total - failures - errors - skipped, "failed": failures + errors, "skipped": skipped}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__).parse_args(arguments)
    rows = Rows(options.out / "check.jsonl", options.limit_s)
    return carry_out(rows, Check(options, rows).all)


if __name__ == "__main__":
    sys.exit(main())
