"""`make gpu-check` rehearsed without a GPU; what it does when something is wrong."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import check, exact_cases, exactness
from benchmarks.gpu.exact_cases import RESIDENT, WAYS, Case
from benchmarks.gpu.process import Outcome
from benchmarks.gpu.rows import Rows
from lightning_superscale.offload.link.link import CpuLink, CudaLink

SMALL = exactness.Size("cpu", width=16, layers=2, batch=2, steps=2)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_a_rehearsal_finds_everything_right(tmp_path: Path) -> None:
    status = check.main([str(tmp_path), "--device", "cpu", "--tiny"])
    rows = [json.loads(line) for line in (tmp_path / "check.jsonl").read_text().splitlines()]
    assert status == 0, [row for row in rows if not row["ok"]]
    names = [row["row"] for row in rows]
    assert names[0] == "fact: software"
    assert {"fact: memory", "fact: touch", "fact: registration", "fact: link, pinned", "native build"} <= set(names)
    assert [row["passed"] for row in rows if row["row"] == "tests"] != [0]
    compared = [row for row in rows if "differing_weights" in row]
    assert {f"exact: {way}, bf16-true" for way in WAYS} <= {row["row"] for row in compared}
    assert all(row["differing_weights"] == row["differing_losses"] == 0 for row in compared)
    assert names[-1] == "end"
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert len(list(tmp_path.iterdir())) <= 4  # with the log of run.sh; the benchmark adds two


def test_every_case_is_dealt_once_and_those_of_one_reference_to_one_worker() -> None:
    hands = exact_cases.deal(4, (1, 2))
    cases = [case for hand in hands for case in hand]
    assert set(Counter(cases).values()) == {1}
    assert len({case.name for case in cases}) == len(cases)
    products = [case for case in cases if case.way in WAYS]
    assert {case.way for case in products} == set(WAYS)
    assert {case.precision for case in products} == set(exact_cases.PRECISIONS)
    for hand in hands:
        seeds = [case.delay_seed for case in hand if case.way in WAYS]
        assert seeds == sorted(seeds, key=lambda seed: seed or 0)  # what no delay is needed for comes first
    owners = {(case.reference, number) for number, hand in enumerate(hands) for case in hand if case.way in WAYS}
    assert len(owners) == len({reference for reference, _ in owners})


@pytest.mark.usefixtures("deterministic")
def test_a_wrong_bit_on_the_link_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("superoffload", accumulate=2, clip=True)
    checker = exactness.Checker(SMALL)
    assert checker.compare(case)["ok"]
    d2h = CpuLink.d2h

    def wrong(link: CpuLink, dst: torch.Tensor, src: torch.Tensor) -> Any:
        done = d2h(link, dst, src)
        dst[:1] += 1
        return done

    monkeypatch.setattr(CpuLink, "d2h", wrong)
    found = checker.compare(case)
    assert not found["ok"]
    assert found["differing_weights"] > 0


@pytest.mark.usefixtures("deterministic")
def test_an_evaluation_in_another_dtype_is_found() -> None:
    checker = exactness.Checker(SMALL)
    assert checker.evaluate(Case(exact_cases.EVALUATE, "bf16-mixed"))["ok"]
    assert not checker.evaluate(Case(exact_cases.EVALUATE, "32-true"))["ok"]


def test_delays_come_into_all_three_streams_and_go_again(monkeypatch: pytest.MonkeyPatch) -> None:
    streams, said = ["compute"], []

    @contextlib.contextmanager
    def stream(name: str) -> Iterator[None]:
        streams.append(name)
        yield
        streams.pop()

    monkeypatch.setattr(torch.cuda, "_sleep", lambda ticks: said.append(f"wait in {streams[-1]}"))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(CudaLink, "d2h", lambda link, dst, src: said.append("d2h"))
    monkeypatch.setattr(CudaLink, "h2d", lambda link, dst, src, after=None: said.append(f"h2d after {after}"))
    link = CudaLink.__new__(CudaLink)
    monkeypatch.setattr(link, "_d2h_stream", "down", raising=False)
    monkeypatch.setattr(link, "_h2d_stream", "up", raising=False)
    host = torch.zeros(1)
    with exactness.Delays(1).everywhere():
        link.d2h(host, host)
        link.h2d(host, host, "fence")  # type: ignore[arg-type]
    assert said == ["wait in compute", "wait in down", "d2h", "wait in up", "h2d after fence"]
    link.d2h(host, host)
    assert said[5:] == ["d2h"]


class Scripted(check.Check):
    """A check whose workers answer a few cases and then end as told."""

    def __init__(self, out: Path, rows: Rows, script: list[tuple[int, Outcome]]) -> None:
        super().__init__(argparse.Namespace(device="cpu", tiny=True, out=out), rows)
        self.script, self.given = script, []

    def run(self, arguments: Any, limit_s: float, **more: Any) -> Outcome:
        cases = [Case(**fields) for fields in json.loads(more["stdin"])]
        self.given.append([case.way for case in cases])
        answers, outcome = self.script.pop(0)
        for number, case in enumerate(cases[: answers + 1]):
            more["on_line"](json.dumps({"start": case.name}))
            if number < answers:
                more["on_line"](json.dumps({"row": f"exact: {case.name}", "ok": True}))
        return outcome


def test_a_case_that_kills_its_worker_does_not_take_the_others_along(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "check.jsonl", limit_s=100)
    crashed, hung = Outcome(-11, 1.0, "Segmentation fault"), Outcome(None, 1.0, "", "nothing came for 90 s")
    scripted = Scripted(tmp_path, rows, [(1, crashed), (0, hung), (1, Outcome(0, 1.0, ""))])
    scripted.exactness([Case(way) for way in ("superoffload", "cpu", "flow", "auto")])
    assert scripted.given == [["superoffload", "cpu", "flow", "auto"], ["flow", "auto"], ["auto"]]
    assert rows.failed == ["exact: cpu, bf16-true", "exact: flow, bf16-true"]
    assert [row["error"] for row in rows.written if not row["ok"]] == [
        "ended with status -11",
        "killed: nothing came for 90 s",
    ]
    rows.conclude()


def test_cases_without_time_are_a_failure_that_says_how_many(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "check.jsonl", limit_s=100)
    rows.stop()
    Scripted(tmp_path, rows, []).exactness([Case(RESIDENT), Case("cpu")])
    assert rows.failed == ["exact: 2 cases, from resident, bf16-true on"]
    assert rows.conclude() == 1
