"""`benchmarks/estimate.py`: a case from end to end, and what counts as a miss."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import estimate
from tests.helpers.extent import only_in_test_all


@only_in_test_all
def test_a_case_is_measured_around_its_prediction(monkeypatch, capsys) -> None:
    monkeypatch.setattr(estimate, "_STEPS", 3)
    row = estimate.compare(estimate.Case("images", 4, "cpu", "32-true"))
    parts = row["predicted_s"]
    assert sum(parts[name] for name in ("forward", "backward", "optimizer")) == pytest.approx(parts["total"], rel=1e-3)
    assert row["error"] == pytest.approx(parts["total"] / row["measured_s"] - 1, rel=1e-3)
    assert "predicted" in capsys.readouterr().out


@pytest.mark.parametrize(("errors", "code"), [([0.02, -0.09, 0.05], 0), ([0.02, 0.12, 0.11], 1), ([0.02, 0.3], 1)])
def test_a_miss_is_told_by_the_exit_code(monkeypatch, capsys, tmp_path, errors, code) -> None:
    left = [*errors]
    monkeypatch.setattr(estimate, "compare", lambda case: {**case._asdict(), "error": left.pop(0)})
    monkeypatch.setattr(estimate, "MODELS", {"language": (estimate.Language, tuple(range(len(errors))))})
    out = tmp_path / "estimate.json"
    arguments = ["--strategies", "cpu", "--precisions", "32-true", "--models", "language", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["estimate.py", *arguments])
    assert estimate.main() == code
    report = json.loads(out.read_text())
    assert [row["batch"] for row in report["rows"]] == list(range(len(errors)))
    assert report["largest_error"] == max(map(abs, errors))
    assert f"{len(errors)} cases on" in capsys.readouterr().out
