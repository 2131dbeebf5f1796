"""One run of `zenflow_quality.py` with DeepSpeed's ZenFlow, in DeepSpeed's environment and in a process of its own.

Its engine trains the same module from the same weights on the same batches in fp32. Each step has the learning rate
that the module's scheduler gives the Trainer's optimizer there, and gradients are to be clipped at the same norm. All
else is DeepSpeed 0.19.6 as it is. It clips neither what it steps on the device nor, in its warm-up, at that norm, but
at `update_interval` times as much; what it steps on the device decays by one rate, whatever the group says; and with
`overlap_step` the last window is not applied. The last line is JSON: the validation loss in nats per byte, null where
it is not finite.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.language_model import CLIP_NORM
from benchmarks.zenflow_quality import BATCH_SIZE, build_module, data_of, digest_of


class Loss(nn.Module):
    """The model with its loss as forward, where DeepSpeed's hooks are."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        loss: Tensor = self.module.loss((inputs_BT, targets_BT))
        return loss


def zenflow_of(options: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's settings that mean what the defaults of `ZenFlowConfig` do, with some of them replaced."""
    same = {"topk_ratio": 0.1, "update_interval": 4, "select_strategy": "step", "select_interval": 64}
    return {**same, "full_warm_up_rounds": 1, "overlap_step": True, **options}


def config_of(module: Any, options: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's config. It takes `gradient_accumulation_steps` from ZenFlow's `update_interval`."""
    hyper = {"lr": module.hparams.lr, "betas": module.hparams.betas, "weight_decay": module.hparams.weight_decay}
    return {
        "train_micro_batch_size_per_gpu": BATCH_SIZE,
        "gradient_clipping": CLIP_NORM,
        "optimizer": {"type": "AdamW", "params": hyper},
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": False,
            "offload_optimizer": {"device": "cpu", "pin_memory": False},
            "zenflow": zenflow_of(options),
        },
    }


def optimizer_of(module: Any, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """The optimizer and the scheduler that a Trainer of so many steps would get."""
    module.trainer = SimpleNamespace(estimated_stepping_batches=steps)
    made = module.configure_optimizers()
    return made["optimizer"], made["lr_scheduler"]["scheduler"]


def batches_of(data: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """What a Trainer draws from the data, epoch after epoch."""
    loader = data.train_dataloader()
    while True:
        yield from loader


@torch.no_grad()
def validation_loss(module: Any, data: Any) -> float:
    """Mean over all validation windows, in nats per byte: what a Trainer logs of the module, without bits."""
    module.eval()
    total, num = 0.0, 0
    for batch in data.val_dataloader():
        total += float(module.loss(batch)) * len(batch[0])
        num += len(batch[0])
    return total / num


def train(spec: dict[str, Any]) -> float:
    """Train as `spec` says, and return the validation loss in nats per byte."""
    import deepspeed

    module = build_module(spec["seed"], None if spec["start"] is None else Path(spec["start"]), spec["lr"])
    before = [param.detach().clone() for param in module.parameters()]
    reference, scheduler = optimizer_of(module, spec["steps"])
    groups = [{key: group[key] for key in ("params", "weight_decay")} for group in reference.param_groups]
    engine, inner, *_ = deepspeed.initialize(
        model=Loss(module), model_parameters=groups, config=config_of(module, spec["options"])
    )
    if not all(map(torch.equal, before, module.parameters())):
        raise RuntimeError("deepspeed.initialize() changed the weights, so that it would not start where others do")
    data = data_of(spec["task"], spec["seed"])
    if digest_of(data) != spec["text"]:
        raise RuntimeError(
            "this environment's Python has another standard library: make it with the Python of the others"
        )
    module.train()
    for _, batch in zip(range(spec["steps"]), batches_of(data), strict=False):
        for group, scheduled in zip(inner.param_groups, reference.param_groups, strict=True):
            group["lr"] = scheduled["lr"]
        engine.backward(engine(*batch))
        engine.step()
        scheduler.step()
    return validation_loss(module, data)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "spec", type=json.loads, help="JSON: task, options of ZenFlow, text, seed, steps, start, lr, threads"
    )
    spec = parser.parse_args().spec
    torch.set_num_threads(spec["threads"])
    loss = train(spec)
    print("\n" + json.dumps({"loss": loss if math.isfinite(loss) else None}), flush=True)
    return 0


if __name__ == "__main__":  # its optimizer's process imports this file again
    raise SystemExit(main())
