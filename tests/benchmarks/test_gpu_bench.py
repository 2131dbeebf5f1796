"""`make gpu-bench` and `make gpu-long` rehearsed without a GPU; what a contestant that breaks leaves."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import bench, contestants, predictions
from benchmarks.gpu.process import Outcome
from benchmarks.gpu.rows import Rows
from benchmarks.models import SHAPES, Decoder, Shape, batches, num_params
from tests.helpers.extent import only_in_test_all


def _rows(path: Path) -> dict[str, dict[str, Any]]:
    return {row["row"]: row for row in map(json.loads, path.read_text().splitlines())}


@only_in_test_all
def test_a_rehearsal_measures_what_a_cpu_can_run(tmp_path: Path) -> None:
    status = bench.main([str(tmp_path), "--device", "cpu", "--tiny"])
    rows = _rows(tmp_path / "bench.jsonl")
    assert status == 0, [row for row in rows.values() if not row["ok"]]
    assert list(rows)[0] == "fact: software"
    passes, ours = rows["1M: forward and backward alone"], rows["1M: ours superoffload, gpu_fraction=0"]
    assert passes["exposed_s"] == 0
    assert ours["exposed_s"] == pytest.approx(ours["wall_s"] - passes["wall_s"], abs=2e-4)
    assert ours["error_s"] == pytest.approx(ours["predicted_s"] / ours["wall_s"] - 1, abs=1e-3)
    assert "predicted_s" not in passes
    assert len(ours["steps_wall_s"]) == 3
    assert 4 <= ours["link_bytes_per_param"] < 4.04
    assert 16 <= ours["host_bytes_per_param"] < 16.16
    assert ours["losses"][0] == pytest.approx(passes["losses"][0], rel=0.02)
    kernels = [row for name, row in rows.items() if name.startswith("kernels: ")]
    assert len(kernels) > 30
    assert all(row["median_ms"] > 0 for row in kernels)


@pytest.mark.slow
@only_in_test_all
def test_a_rehearsal_of_the_long_part_lets_weights_flow(tmp_path: Path) -> None:
    assert bench.main([str(tmp_path), "--device", "cpu", "--tiny", "--long"]) == 0
    rows = _rows(tmp_path / "long.jsonl")
    row = rows["1M: ours superoffload, weights=flow"]
    assert row["facts"]["device_bytes"] < row["facts"]["host_bytes"] / 4
    two, three = (rows[f"1M-{n}of4: ours superoffload, gpu_fraction=0, long-context kit"] for n in (2, 3))
    whole = rows["1M, in layers: 4 layers, from two and three"]
    assert whole["wall_s"] == pytest.approx(two["wall_s"] + 2 * (three["wall_s"] - two["wall_s"]), abs=1e-3)
    assert whole["tokens_per_s"] == pytest.approx(128 / whole["wall_s"], abs=0.1)


def _plan(tmp_path: Path, *options: str) -> bench.Plan:
    return bench.plan_of(bench.parse([str(tmp_path), *options]))


def test_plans_name_contestants_and_sizes_that_exist(tmp_path: Path) -> None:
    assert set(bench.LABELS) == set(contestants.CONTESTANTS)
    assert {name for name, label in bench.LABELS.items() if label.startswith("ours ")} == set(contestants.OURS)
    ahead, long = _plan(tmp_path), _plan(tmp_path, "--long")
    assert [size for size, _ in ahead.entries] == ["3.1B"] * len(ahead.entries)
    names = [name for _, name in ahead.entries]
    assert names[0] == names[-1] == "passes"  # for drift
    assert {"superoffload-host", "superoffload-auto", "deepspeed-z2-offload", "deepspeed-superoffload"} < set(names)
    stacks = {f"8B-{n}of38-{k}k" for n in (2, 3) for k in (64, 128, 256)}
    long_ones = {"3.1B-16k", "3.1B-32k", "3.1B-64k", "3.1B-128k"}
    assert {size for size, _ in long.entries} == {"6.7B", "11B", *long_ones, *stacks}
    assert {three for _, three, _ in bench.STACKS.values()} - {"1M-3of4"} <= stacks
    assert {size for size, _ in long.entries} < set(SHAPES)
    only = _plan(tmp_path, "--only", "flow", "--size", "5.1B")
    assert (list(only.entries), only.has_kernels) == ([("5.1B", "flow")], False)
    assert _plan(tmp_path, "--only", "kernels").has_kernels
    assert (ahead.predicts, long.predicts, _plan(tmp_path, "--only", "passes").predicts) == (True, False, False)


@pytest.mark.parametrize(("size", "billions"), [("3.1B", 3.1), ("5.1B", 5.1), ("6.7B", 6.7), ("11B", 11.0)])
def test_models_have_the_size_that_their_name_says(size: str, billions: float) -> None:
    import torch

    with torch.device("meta"):
        assert num_params(Decoder(SHAPES[size])) / 1e9 == pytest.approx(billions, rel=0.02)
    assert SHAPES[size].tokens == 16384


def test_recomputation_and_a_loss_in_parts_change_no_gradient() -> None:
    plain = Shape(width=32, num_layers=2, num_heads=2, vocabulary=64, batch=2, sequence=8)
    lean = Shape(width=32, num_layers=2, num_heads=2, vocabulary=64, batch=2, sequence=8, remat=True, loss_tokens=5)
    ids, grads = batches(plain)(0), []
    for shape in (plain, lean):
        model = Decoder(shape)
        model.loss(ids).backward()
        grads.append([param.grad for param in model.parameters()])
    for a, b in zip(*grads, strict=True):
        # fp32 sums of 16 tokens in another order: some roundings of 2**-24 each.
        assert a is not None
        assert b is not None
        assert (a - b).abs().max() <= 16 * 2**-24 * max(1.0, float(a.abs().max()))


class Scripted(bench.Bench):
    """A benchmark whose processes say what they are told."""

    def __init__(self, out: Path, rows: Rows, plan: bench.Plan, script: list[tuple[list[Any], Outcome]]) -> None:
        super().__init__(argparse.Namespace(device="cuda", tiny=False, out=out), rows, plan)
        self.script, self.commands = script, []

    def run(self, arguments: Any, limit_s: float, **more: Any) -> Outcome:
        self.commands.append((arguments, more))
        answers, outcome = self.script.pop(0)
        for answer in answers:
            more["on_line"](json.dumps(answer))
        return outcome


TURN = {"cpu": [1.0, 1.0], "wall": [0.5, 0.7], "loss": [3.0, 2.0]}
END = {"digest": "0", "num_params": 100, "peak_mib": 7, "facts": {"peak_device_mib": 9}}
GOOD, FACTS = Outcome(0, 1.0, ""), ([], Outcome(0, 1.0, ""))


def test_a_contestant_that_breaks_leaves_a_row_and_the_others_go_on(tmp_path: Path) -> None:
    names = ("passes", "superoffload-host", "deepspeed-z2-offload", "fsdp2-offload")
    plan = bench.Plan([("1M", name) for name in names], 1, 2, 75, has_kernels=False)
    rows = Rows(tmp_path / "bench.jsonl", limit_s=100)
    script = [
        FACTS,
        FACTS,
        ([{"ready": {}}, TURN, END], GOOD),
        ([{"ready": {}}], Outcome(1, 1.0, "torch.OutOfMemoryError: CUDA out of memory.")),
        ([{"ready": {}}, TURN], Outcome(None, 75.0, "", "its time was up")),
        ([{"ready": {}}, TURN, END], Outcome(-6, 1.0, "terminate called")),  # it broke after it was measured
    ]
    scripted = Scripted(tmp_path, rows, plan, script)
    scripted.all()
    assert rows.conclude() == 1
    found = _rows(tmp_path / "bench.jsonl")
    assert found["1M: forward and backward alone"]["peak_device_mib"] == 9
    assert found["1M: ours superoffload, gpu_fraction=0"]["is_out_of_memory"]
    hung = found["1M: DeepSpeed ZeRO-2 offload"]
    assert (hung["ok"], hung["wall_s"], hung["error"]) == (False, 0.6, "killed: its time was up")
    assert found["1M: FSDP2 CPUOffloadPolicy"]["ok"]
    assert found["end"]["failed"] == ["1M: ours superoffload, gpu_fraction=0", "1M: DeepSpeed ZeRO-2 offload"]
    command, more = scripted.commands[4]
    assert command[command.index("--threads") + 1] == "0"
    assert more["variables"]["WORLD_SIZE"] == "1"
    assert more["stdin"] == "2\nend\n"


def test_what_was_predicted_stands_beside_what_was_measured(tmp_path: Path) -> None:
    entries = [("1M", name) for name in ("passes", "superoffload-host", "superoffload-host", "cpu-host")]
    rows = Rows(tmp_path / "bench.jsonl", limit_s=100)
    predicted = {"size": "1M", "contestant": "superoffload-host", "step_s": 0.66, "peak_device_mib": 8.1}
    measured = ([{"ready": {}}, TURN, END], GOOD)
    # The other prediction never came: its process broke.
    script = [FACTS, FACTS, ([predicted], Outcome(1, 1.0, "an error")), *[measured] * 4]
    scripted = Scripted(tmp_path, rows, bench.Plan(entries, 1, 2, 75, has_kernels=False, predicts=True), script)
    scripted.all()
    assert rows.conclude() == 1
    command, _ = scripted.commands[2]
    assert command == ["-m", "benchmarks.gpu.predictions", "1M:superoffload-host", "1M:cpu-host"]
    found = _rows(tmp_path / "bench.jsonl")
    assert (found["predictions"]["ok"], found["predictions"]["contestants"]) == (False, 1)
    for label in ("1M: ours superoffload, gpu_fraction=0", "1M: ours superoffload, gpu_fraction=0, again"):
        row = found[label]
        assert (row["predicted_s"], row["predicted_peak_device_mib"]) == (0.66, 8.1)
        assert (row["error_s"], row["error_peak"]) == (pytest.approx(0.1), pytest.approx(-0.1))
    assert found["1M: ours cpu, gpu_fraction=0"]["ok"]
    assert "error_s" not in found["1M: ours cpu, gpu_fraction=0"]


def test_a_prediction_is_of_the_step_that_the_contestant_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert predictions.main(["1M:cpu-host", "1M-2of4:kit"]) == 0
    whole, less = map(json.loads, capsys.readouterr().out.splitlines())
    assert (whole["size"], whole["contestant"], less["size"]) == ("1M", "cpu-host", "1M-2of4")
    # Weights and gradients are bf16, 2 bytes each, and stay; the kit's blocks leave their activations on the host.
    weights = num_params(Decoder(SHAPES["1M"])) * 2 / 2**20
    assert whole["peak_device_mib"] > 2 * weights
    assert less["peak_device_mib"] < whole["peak_device_mib"]
    assert whole["step_s"] > 0
