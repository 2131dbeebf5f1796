"""Checks that a module's tensor-parallel placements can be trained.

Gradients of parameters that a plan left whole are checked at the step: [Note: What the plan left whole] in
optim/verdict.py.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from lightning_superscale.comm.mesh import TENSOR_AXIS, DataMesh
from lightning_superscale.errors import SuperScaleError


def check_placements(root: nn.Module, mesh: DataMesh) -> None:
    """Refuse DTensor parameters that no plan over the mesh's tensor axis placed, and a tensor axis without a plan.

    Raises:
        SuperScaleError: names the parameter and the remedy, or says that no parameter is parallelized.
    """
    placed = {fqn: param for fqn, param in root.named_parameters() if isinstance(param, DTensor)}
    expected = None if mesh.device_mesh is None else mesh.device_mesh[TENSOR_AXIS]
    for fqn, param in placed.items():
        if expected is None:
            raise SuperScaleError(
                f"parameter {fqn!r} is a DTensor already, placed {param.placements} by parallelize_module or "
                "fully_shard in configure_model(). For tensor parallelism set ZeroConfig(stage=3, tensor_parallel=...) "
                f"and parallelize over self.device_mesh[{TENSOR_AXIS!r}]; leave fully_shard to the strategy."
            )
        if param.device_mesh != expected:
            raise SuperScaleError(
                f"parameter {fqn!r} is placed on {param.device_mesh}; expected {expected}. Parallelize over "
                f"self.device_mesh[{TENSOR_AXIS!r}], which the strategy makes, and leave fully_shard to the strategy."
            )
        placement = param.placements[0]
        if not isinstance(placement, (Shard, Replicate)) or param.ndim == 0 or param.numel() == 0:
            raise SuperScaleError(
                f"parameter {fqn!r} of shape {tuple(param.shape)} is placed {placement}; expected Shard or Replicate, "
                "and a tensor with elements and dims. Leave it out of the plan."
            )
    if expected is not None and not placed:
        raise SuperScaleError(
            f"ZeroConfig.tensor_parallel={mesh.tensor.size}, and no parameter of {type(root).__name__} is "
            "parallelized: every rank of the tensor axis would compute the same. Call parallelize_module(..., "
            f"self.device_mesh[{TENSOR_AXIS!r}], plan) in configure_model(), or remove tensor_parallel."
        )


def check_all_sharded(root: nn.Module, taken: Collection[nn.Parameter], left_out: dict[nn.Parameter, str]) -> None:
    """Refuse DTensor parameters that no FSDP2 group takes: they can't be whole in a bucket.

    Args:
        taken: parameters of FSDP2 groups.
        left_out: parameters that FSDP2 can't take, and why.

    Raises:
        SuperScaleError: names the parameter, the reason and the remedy.
    """
    for fqn, param in root.named_parameters():
        if isinstance(param, DTensor) and (param in left_out or param not in taken):
            why = left_out.get(param, f"it belongs to {type(root).__name__} itself, which gathers nothing")
            raise SuperScaleError(
                f"parameter {fqn!r} is parallelized, and can't be sharded further: {why}. Leave it out of the plan, or "
                "change that."
            )
