"""`make gpu-bench`: how fast is it beside its peers? Rows go to OUT/bench.jsonl as they are measured.

Facts of the machine, then what `estimate` predicts for ours, then whole training steps: forward and backward alone,
ours with everything on the host and with what the planner keeps on the device, DeepSpeed, FSDP2, torchao, forward and
backward once more for drift; last our kernels beside torch's. Rows of ours say how far the prediction was from the
clock and from the device's memory. Every contestant is a process of its own with a time limit. `--long` takes large
models and long sequences instead (`make gpu-long`, OUT/long.jsonl). `--device cpu --tiny` rehearses what a CPU can run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.process import Outcome
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.runner import Runner, carry_out, parser
from benchmarks.models import SHAPES
from benchmarks.step_cost import free_port

LABELS = {
    "passes": "forward and backward alone",
    "superoffload-host": "ours superoffload, gpu_fraction=0",
    "superoffload-auto": "ours superoffload, gpu_fraction=auto",
    "superoffload-third": "ours superoffload, gpu_fraction=0.35",
    "cpu-host": "ours cpu, gpu_fraction=0",
    "zenflow-host": "ours zenflow, gpu_fraction=0",
    "zenflow-sums-on-device": "ours zenflow, gpu_fraction=0, accumulate_on=device",
    "flow": "ours superoffload, weights=flow",
    "kit": "ours superoffload, gpu_fraction=0, long-context kit",
    "deepspeed-z2-offload": "DeepSpeed ZeRO-2 offload",
    # Time only: 0.19.8 scrambles weights when it starts, so that its losses mean nothing.
    "deepspeed-zenflow": "DeepSpeed ZenFlow",
    "deepspeed-superoffload": "DeepSpeed SuperOffload, ratio 1.0",
    "deepspeed-superoffload-90": "DeepSpeed SuperOffload, ratio 0.9",
    "fsdp2-offload": "FSDP2 CPUOffloadPolicy",
    "torchao-offload": "torchao CPUOffloadOptimizer, bf16 states, no clip",
}
# The most telling first, since time may run out.
ORDER = (
    "passes",
    "superoffload-host",
    "deepspeed-z2-offload",
    "superoffload-auto",
    "deepspeed-superoffload",
    "zenflow-host",
    "deepspeed-zenflow",
    "zenflow-sums-on-device",
    "fsdp2-offload",
    "cpu-host",
    "torchao-offload",
    "deepspeed-superoffload-90",
)
LONG = (
    ("6.7B", "superoffload-host"),
    ("11B", "superoffload-third"),
    ("3.1B-32k", "superoffload-auto"),
    ("3.1B-32k", "fsdp2-offload"),
    ("3.1B-128k", "superoffload-auto"),
    ("3.1B-128k", "fsdp2-offload"),
    ("11B", "flow"),
    *((f"8B-{layers}of38-{thousands}k", "kit") for thousands in (128, 64, 256) for layers in (2, 3)),
    ("3.1B-64k", "superoffload-auto"),
    ("3.1B-64k", "fsdp2-offload"),
    ("3.1B-16k", "superoffload-auto"),
    ("3.1B-16k", "fsdp2-offload"),
)
# Stacks that are measured with two and with three layers: those sizes, and layers in all.
STACKS = {
    **{f"8B, {k}k tokens": (f"8B-2of38-{k}k", f"8B-3of38-{k}k", 38) for k in (64, 128, 256)},
    "1M, in layers": ("1M-2of4", "1M-3of4", 4),
}
ON_CPU = (
    "passes",
    "superoffload-host",
    "superoffload-auto",
    "zenflow-host",
    "zenflow-sums-on-device",
    "cpu-host",
    "flow",
    "kit",
)
# DeepSpeed asks for a process group; one rank needs no launcher.
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        entries: (size of the model, contestant), in order.
        warmup, steps: steps that are not counted, and those that are.
        row_limit_s: seconds for one contestant, its start included.
        has_kernels: whether our kernels are measured too.
        predicts: whether `estimate` predicts steps and peaks of ours first.
    """

    entries: Sequence[tuple[str, str]]
    warmup: int
    steps: int
    row_limit_s: float
    has_kernels: bool
    predicts: bool = False


class Bench(Runner):
    """One run of a plan."""

    def __init__(self, options: argparse.Namespace, rows: Rows, plan: Plan) -> None:
        super().__init__(options, rows)
        self._plan = plan
        self._passes: dict[str, float] = {}  # seconds of forward and backward, by size
        self._of_layers: dict[str, dict[str, Any]] = {}  # what was measured of the first layers of a stack, by size
        self._predictions: dict[tuple[str, str], dict[str, Any]] = {}  # by size and contestant

    def all(self) -> None:
        self.facts()
        self.build()
        if self._plan.predicts:
            self._predict()
        for number, (size, name) in enumerate(self._plan.entries):
            is_again = (size, name) in self._plan.entries[:number]
            label = f"{size}: {LABELS[name]}{', again' if is_again else ''}"
            if self.rows.left_s:
                self._contestant(label, size, name)
            else:
                self.rows.no_time(label)
            self._stacks(size)
        if self._plan.has_kernels:
            outcome = self.run(["-m", "benchmarks.gpu.ops", *self.device], 150, on_line=self.take)
            self.rows.outcome("kernels", outcome)

    def _predict(self) -> None:
        """Predictions for all of ours, before anything of them is measured."""
        names = [f"{size}:{name}" for size, name in dict.fromkeys(self._plan.entries) if _is_ours(name)]

        def take(line: str) -> None:
            row = json.loads(line)
            self._predictions[row.pop("size"), row.pop("contestant")] = row

        outcome = self.run(["-m", "benchmarks.gpu.predictions", *names], 90, on_line=take)
        self.rows.outcome("predictions", outcome, contestants=len(self._predictions))

    def _contestant(self, label: str, size: str, name: str) -> None:
        plan, answers = self._plan, []
        command = ["-m", "benchmarks.gpu.contestants", name, "--size", size, "--precision", "bf16-true"]
        command += ["--clip", "1.0", "--warmup", str(plan.warmup), "--device", self.options.device, "--settle"]
        command += ["--threads", "0" if self.is_cuda else "1"]
        outcome = self.run(
            command,
            plan.row_limit_s,
            variables={**ALONE, "MASTER_PORT": str(free_port())} if name.startswith("deepspeed") else None,
            stdin=f"{plan.steps}\nend\n",
            on_line=lambda line: answers.append(json.loads(line)),
        )
        turn = next((answer for answer in answers if "wall" in answer), None)
        if turn is None:
            self.rows.outcome(label, outcome, is_out_of_memory="out of memory" in outcome.tail.lower())
            return
        wall = statistics.mean(turn["wall"])
        if name == "passes":
            self._passes.setdefault(size, wall)
        row = _measured(turn, answers[-1], SHAPES[size].tokens)
        self._of_layers[size] = row
        if size in self._passes:
            row["exposed_s"] = round(wall - self._passes[size], 4)
        if (size, name) in self._predictions:
            row |= _errors(self._predictions[size, name], row)
        # What came before a broken end is measured all the same.
        self.rows.outcome(label, _with_end(outcome, answers), contestant=name, size=size, **row)

    def _stacks(self, size: str) -> None:
        """The whole of a stack whose second size was just measured: each further layer takes what the third one did.

        A step of the whole stack would take too long; its layers are alike, and so are their shares of time and memory.
        """
        for label, (two, three, num_layers) in STACKS.items():
            if size == three and {two, three} <= self._of_layers.keys():
                less, more = self._of_layers[two], self._of_layers[three]
                row: dict[str, Any] = {"layers": num_layers}
                for key in ("wall_s", "peak_device_mib", "peak_host_mib"):
                    if more.get(key) is not None:
                        row[key] = round(less[key] + (num_layers - 2) * (more[key] - less[key]), 4)
                row["tokens_per_s"] = round(SHAPES[two].tokens / row["wall_s"], 1)
                self.rows.write(f"{label}: {num_layers} layers, from two and three", ok=True, **row)


def _with_end(outcome: Outcome, answers: Sequence[dict[str, Any]]) -> Outcome:
    """A contestant that answered everything and then crashes or hangs at its exit has been measured."""
    has_end = bool(answers) and "digest" in answers[-1]
    return Outcome(0, outcome.seconds, outcome.tail) if has_end else outcome


def _is_ours(name: str) -> bool:
    return LABELS[name].startswith("ours ")


def _errors(predicted: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """What was predicted, and by which share it was above what was measured."""
    errors = {"predicted_s": predicted["step_s"], "error_s": round(predicted["step_s"] / row["wall_s"] - 1, 4)}
    if row.get("peak_device_mib"):
        errors["predicted_peak_device_mib"] = predicted["peak_device_mib"]
        errors["error_peak"] = round(predicted["peak_device_mib"] / row["peak_device_mib"] - 1, 4)
    return errors


def _measured(turn: dict[str, Any], end: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The figures of one contestant: seconds and tokens of a step, memory, losses."""
    wall = statistics.mean(turn["wall"])
    row: dict[str, Any] = {
        "wall_s": round(wall, 4),
        "tokens_per_s": round(tokens / wall, 1),
        "cpu_s": round(statistics.mean(turn["cpu"]), 3),
        "steps_wall_s": [round(step, 4) for step in turn["wall"]],
        "losses": turn["loss"],
    }
    if "digest" in end:
        facts, num_params = end["facts"], end["num_params"]
        row |= {"num_params": num_params, "peak_host_mib": end["peak_mib"], "facts": facts}
        row["peak_device_mib"] = facts.get("peak_device_mib")
        if "d2h" in facts:
            moved = facts["d2h"] + facts["h2d"]
            row["link_bytes_per_param"] = round(moved / num_params / len(turn["wall"]), 4)
            row["host_bytes_per_param"] = round(facts["host_bytes"] / num_params, 4)
    return row


def plan_of(options: argparse.Namespace) -> Plan:
    """The rows that the options ask for."""
    size = "1M" if options.tiny else options.size
    if options.tiny:
        entries = [(size, "passes"), (size, "flow" if options.long else "superoffload-host")]
        entries += [(f"1M-{layers}of4", "kit") for layers in (2, 3)] if options.long else []
    elif options.long:
        entries = [entry for entry in LONG if not options.only or entry[1] in options.only]
    elif options.only:
        entries = [(size, name) for name in options.only if name in LABELS]
    else:
        entries = [(size, name) for name in (*ORDER, "passes")]
    if options.device == "cpu":
        entries = [entry for entry in entries if entry[1] in ON_CPU]
    warmup, steps = (1, 3) if options.long or options.tiny else (3, 8)
    has_kernels = not options.long and (not options.only or "kernels" in options.only)
    # Large models and long sequences have no time to spare.
    predicts = not options.long and any(_is_ours(name) for _, name in entries)
    row_limit_s = 100 if options.long else 75
    return Plan(entries, warmup, steps, row_limit_s, has_kernels=has_kernels, predicts=predicts)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--size", choices=SHAPES, default="3.1B", help="of the model, default 3.1B")
    made.add_argument("--long", action="store_true", help="large models and long sequences")
    made.add_argument("--only", choices=[*LABELS, "kernels"], action="append", help="measure only these")
    return made.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    rows = Rows(options.out / ("long.jsonl" if options.long else "bench.jsonl"), options.limit_s)
    return carry_out(rows, Bench(options, rows, plan_of(options)).all)


if __name__ == "__main__":
    sys.exit(main())
