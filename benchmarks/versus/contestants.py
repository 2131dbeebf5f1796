"""One contestant of `make bench`, or one rank, in a process of its own; it talks as `benchmarks/contestants.py` does.

Beside those of that script: Lightning's strategies of FSDP2 and FSDP under the Trainer, and the peers whose code asks
for a GPU. These are started where there is none too: what they say then is what the table shows.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.contestants import CONTESTANTS, Runner, Turns, main, run_deepspeed, run_trainer
from benchmarks.gpu.contestants import run_fsdp2_offload, run_torchao, super_offload
from benchmarks.models import Shape


def _shard_blocks(module: Any) -> None:
    """What a module under `ModelParallelStrategy` writes for FSDP2: every block is a group, and the rest is one."""
    from torch.distributed.fsdp import fully_shard

    mesh = module.device_mesh["data_parallel"]
    for block in module.model.blocks:
        fully_shard(block, mesh=mesh)
    # The root is what the loss is called on, so that its forward gathers what no block has.
    fully_shard(module.model, mesh=mesh)


def run_model_parallel(turns: Turns, shape: Shape, precision: str, clip: float) -> nn.Module:
    """Lightning's strategy of FSDP2 under the Trainer."""

    def strategy() -> Any:
        from lightning.pytorch.strategies import ModelParallelStrategy

        return ModelParallelStrategy(data_parallel_size=turns.num_ranks, tensor_parallel_size=1)

    return run_trainer(turns, shape, precision, clip, fused=True, strategy=strategy, configure_model=_shard_blocks)


def _super_offload(turns: Turns, shape: Shape, precision: str, clip: float) -> nn.Module:
    return run_deepspeed(turns, shape, precision, clip, zero=super_offload(1.0))


VERSUS: dict[str, Runner] = {
    **CONTESTANTS,
    "model-parallel": run_model_parallel,
    "fsdp": lambda *a: run_trainer(*a, fused=True, strategy=lambda: "fsdp"),
    "fsdp2-offload": run_fsdp2_offload,
    "deepspeed-superoffload": _super_offload,
    "torchao-offload": run_torchao,
}

if __name__ == "__main__":
    sys.exit(main(VERSUS))
