"""One contestant of `make gpu-bench` in a process of its own; it talks as those of `benchmarks/contestants.py` do.

All train one model with bf16 weights, made on the device, and fp32 masters and states on the host; who can't do that
says so here. Threads are as the system gives them, buckets are large, copies overlap: each peer's own best settings.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from benchmarks.contestants import (
    ADAMW,
    Runner,
    Turns,
    WithLoss,
    build_model,
    deepspeed_zenflow,
    main,
    ours,
    run_deepspeed,
    run_passes,
    run_trainer,
    train_module,
    zenflow,
)
from benchmarks.models import Shape
from lightning_superscale import OffloadConfig, SequenceConfig

# As DeepSpeed's own examples: buckets of hundreds of millions of elements, copies beside backward.
_ZERO2 = {
    "stage": 2,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "reduce_bucket_size": 500_000_000,
    "allgather_bucket_size": 500_000_000,
    "offload_optimizer": {"device": "cpu", "pin_memory": True},
}


def super_offload(ratio: float) -> dict[str, Any]:
    """The settings that its authors publish, which have no overlap_comm: it overlaps the optimizer by itself."""
    offload = {"device": "cpu", "pin_memory": True, "super_offload": True, "ratio": ratio, "cpuadam_cores_perc": 0.9}
    sizes = {"reduce_bucket_size": 400_000_000, "sub_group_size": 400_000_000}
    return {"stage": 3, "overlap_comm": False, **sizes, "offload_optimizer": offload}


def run_fsdp2_offload(turns: Turns, shape: Shape, precision: str, clip: float) -> nn.Module:
    """FSDP2 with its CPUOffloadPolicy: fp32 masters and states on the host, stepped by torch's fused AdamW there."""
    import torch.distributed as dist
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    is_cuda = turns.device.type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if is_cuda else "gloo"
    dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    half = torch.bfloat16 if precision == "bf16-true" else torch.float32
    how: dict[str, Any] = {
        "mesh": dist.init_device_mesh(turns.device.type, (1,)),
        "offload_policy": CPUOffloadPolicy(pin_memory=is_cuda),
        "mp_policy": MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half),
        # Where backward has no need to recompute, weights stay from forward to backward, which spares an upload.
        "reshard_after_forward": shape.remat,
    }
    model = WithLoss(build_model(shape, "32-true", turns.device))
    blocks = [fully_shard(block, **how) for block in model.model.blocks]
    fully_shard(model, **how)
    for block, following in zip(blocks, blocks[1:], strict=False):
        block.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([block])
    return train_module(turns, model, torch.optim.AdamW(model.parameters(), fused=True, **ADAMW), clip)


def run_torchao(turns: Turns, shape: Shape, precision: str, clip: float) -> nn.Module:
    """torchao's CPUOffloadOptimizer: no clip, because it steps during backward, and bf16 states, as are its weights."""
    from torchao.optim import CPUOffloadOptimizer

    model = WithLoss(build_model(shape, precision, turns.device))
    return train_module(turns, model, CPUOffloadOptimizer(model.parameters(), torch.optim.AdamW, fused=True, **ADAMW))


# What keeps less of a long sequence and changes no bit of blocks, whose MLPs are no modules of their own.
_KIT = SequenceConfig(tile_loss=True, checkpoint_blocks=True, offload_activations=True)
_HOST = {"gpu_fraction": 0, "weights": "stationary"}

# What our strategy is given.
OURS: dict[str, dict[str, Any]] = {
    "superoffload-host": {"offload": OffloadConfig(engine="superoffload", **_HOST)},
    "superoffload-auto": {"offload": OffloadConfig(engine="superoffload")},
    "superoffload-third": {"offload": OffloadConfig(engine="superoffload", gpu_fraction=0.35, weights="stationary")},
    "cpu-host": {"offload": OffloadConfig(engine="cpu", **_HOST)},
    "zenflow-host": {"offload": OffloadConfig(**zenflow(), **_HOST)},
    "zenflow-sums-on-device": {"offload": OffloadConfig(**zenflow(accumulate_on="device"), **_HOST)},
    "kit": {"offload": OffloadConfig(engine="superoffload", **_HOST), "sequence": _KIT},
    "flow": {"offload": OffloadConfig(engine="superoffload", weights="flow")},
}


def _run_ours(options: dict[str, Any]) -> Runner:
    return lambda *a: run_trainer(*a, fused=True, strategy=ours(**options))


CONTESTANTS: dict[str, Runner] = {
    "passes": run_passes,
    **{name: _run_ours(options) for name, options in OURS.items()},
    "deepspeed-z2-offload": lambda *a: run_deepspeed(*a, zero=_ZERO2),
    "deepspeed-zenflow": lambda *a: run_deepspeed(*a, zero={**_ZERO2, "zenflow": deepspeed_zenflow(overlap=True)}),
    "deepspeed-superoffload": lambda *a: run_deepspeed(*a, zero=super_offload(1.0)),
    "deepspeed-superoffload-90": lambda *a: run_deepspeed(*a, zero=super_offload(0.9)),
    "fsdp2-offload": run_fsdp2_offload,
    "torchao-offload": run_torchao,
}

if __name__ == "__main__":
    sys.exit(main(CONTESTANTS))
