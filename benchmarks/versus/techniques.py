"""What `make bench` compares: techniques, who takes part in each, and whose time is held against whose.

All train the model and the tokens of `benchmarks/models.py` with AdamW and the same clip; where nothing else is said, a
contestant has one thread in forward and backward. Ours and Lightning's run under the Trainer, all others in bare loops.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.contestants import ZENFLOW
from benchmarks.step_cost import WARMUP_STEPS
from lightning_superscale.offload.superoffload.trial import FIRST_TRIAL_STEPS

# Whose parameters are not whole when training ends, or not by all ranks, so that digests of weights say nothing.
SHARDED = ("fsdp2", "fsdp2-offload", "model-parallel", "fsdp", "deepspeed-z3", "deepspeed-superoffload")


@dataclass(frozen=True)
class Technique:
    """One heat: contestants that take turns on one model.

    Attributes:
        title: how the table calls it.
        labels: of contestants, by name. The first is the oracle: others' losses and weights are compared with its own.
        rivals: for each of ours, the contestants whose time its own is divided by.
        table: precision and clip, a key of `step_cost.PRECISION`.
        size: of the model; a key of `models.SHAPES`.
        num_ranks: processes of each contestant.
        warmup: first steps, which are not counted.
        steps: of one turn.
        is_host_race: whether optimizers step on the host. A turn then ends when nothing is under way any more, and the
            optimizers that run beside nothing have all cores.
        setting: precision, clip and what else sets the heat apart, in words.
        wants_0_19_6: whether DeepSpeed has to be 0.19.6: 0.19.8's ZenFlow scrambles the weights when it starts.
    """

    title: str
    labels: Mapping[str, str]
    rivals: Mapping[str, Sequence[str]]
    table: str
    size: str = "25M"
    num_ranks: int = 1
    warmup: int = WARMUP_STEPS
    steps: int = 2
    is_host_race: bool = False
    wants_0_19_6: bool = False
    setting: str = ""

    def more(self) -> list[str]:
        """Options of `versus/contestants.py`."""
        return ["--warmup", str(self.warmup), *(["--settle"] if self.is_host_race else [])]

    def variables(self, cores: int) -> dict[str, str]:
        """Variables of every contestant's environment."""
        if not self.is_host_race:
            return {}
        # Our workers run beside forward and backward; the other optimizers have the machine to themselves.
        return {"LSS_CPU_THREADS": str(max(1, cores - 1)), "BENCH_OPTIMIZER_THREADS": str(cores)}


_OFFLOAD = {
    "loop-fused": "plain AdamW, masters by hand, bare loop",
    "superoffload": "ours superoffload, Trainer",
    "cpu": "ours cpu (synchronous), Trainer",
    "deepspeed-z2-offload": "DeepSpeed ZeRO-2 offload, bare loop",
    "deepspeed-superoffload": "DeepSpeed SuperOffload, bare loop",
    "fsdp2-offload": "FSDP2 CPUOffloadPolicy, bare loop",
    "torchao-offload": "torchao CPUOffloadOptimizer, bare loop",
}
_HOST_SETTING = "bf16 weights, fp32 masters on the host, clip 1.0"

TECHNIQUES: dict[str, Technique] = {
    "zero12": Technique(
        "ZeRO-1 and ZeRO-2",
        {
            "ddp": "Lightning DDP, Trainer",
            "zero1": "ours zero1, Trainer",
            "zero2": "ours zero2, Trainer",
            "deepspeed-z1": "DeepSpeed ZeRO-1, bare loop",
            "deepspeed-z2": "DeepSpeed ZeRO-2, bare loop",
        },
        {"zero1": ("ddp", "deepspeed-z1"), "zero2": ("ddp", "deepspeed-z2")},
        "fp32",
        num_ranks=2,
        setting="fp32, no clip",
    ),
    "zero3": Technique(
        "ZeRO-3",
        {
            "ddp": "Lightning DDP, Trainer",
            "zero3": "ours zero3, Trainer",
            "fsdp2": "FSDP2, bare loop",
            "model-parallel": "Lightning ModelParallel (FSDP2), Trainer",
            "fsdp": "Lightning FSDP, Trainer",
            "deepspeed-z3": "DeepSpeed ZeRO-3, bare loop",
        },
        {"zero3": ("fsdp2", "model-parallel", "fsdp", "deepspeed-z3")},
        "fp32",
        num_ranks=2,
        setting="fp32, no clip",
    ),
    "offload": Technique(
        "optimizer offload",
        _OFFLOAD,
        {"superoffload": ("deepspeed-z2-offload", "deepspeed-superoffload", "fsdp2-offload", "torchao-offload")},
        "offload",
        warmup=FIRST_TRIAL_STEPS,  # superoffload tries whether its steps are better awaited
        steps=3,
        is_host_race=True,
        setting=_HOST_SETTING,
    ),
    # Of a larger model, where the optimizer's share of a step shows; without those that the heat above has shown.
    "offload-120M": Technique(
        "optimizer offload, 120M",
        {name: _OFFLOAD[name] for name in ("loop-fused", "superoffload", "deepspeed-z2-offload", "fsdp2-offload")},
        {"superoffload": ("deepspeed-z2-offload", "fsdp2-offload")},
        "offload",
        size="120M",
        warmup=FIRST_TRIAL_STEPS,
        is_host_race=True,
        setting=_HOST_SETTING,
    ),
    "zenflow": Technique(
        "ZenFlow",
        {
            "loop-fused": "plain AdamW, masters by hand, bare loop",
            "zenflow": "ours zenflow, Trainer",
            "zenflow-synchronous": "ours zenflow, overlap=False, Trainer",
            "deepspeed-zenflow": "DeepSpeed ZenFlow, bare loop",
            "deepspeed-zenflow-synchronous": "DeepSpeed ZenFlow, no overlap, bare loop",
        },
        {"zenflow": ("deepspeed-zenflow",), "zenflow-synchronous": ("deepspeed-zenflow-synchronous",)},
        "offload",
        # DeepSpeed starts its worker process at the first window's end.
        warmup=2 * ZENFLOW["update_interval"],
        steps=2 * ZENFLOW["update_interval"],
        is_host_race=True,
        wants_0_19_6=True,
        setting=f"as offload; topk {ZENFLOW['topk']}, windows of {ZENFLOW['update_interval']} steps",
    ),
}


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
