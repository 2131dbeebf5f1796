"""What tensor parallelism asks of a module and of its gradients, checked.

[Note: What the plan left whole] Every rank of the tensor axis computes the same batch, so a parameter that the plan
left alone (a norm, an embedding) has the same gradient on all of them, and each rank steps it for itself: nothing is
sent. That is so wherever activations are whole. Where they are cut, as between ColwiseParallel and RowwiseParallel or
along the sequence, each rank's gradient of a plain parameter is only its part of the sum, and nothing in PyTorch says
so: weights would drift apart in silence. So the first gradient that is not zero is compared over the tensor axis.
The plan's own styles (SequenceParallel) place such a parameter as Replicate, and DTensor sums its gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from lightning_superscale.comm.collectives import gather_objects
from lightning_superscale.comm.mesh import TENSOR_AXIS, DataMesh
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.zero.clip import grad_sumsq
from lightning_superscale.zero.due import Due
from lightning_superscale.zero.placed import is_cut

# Sums of squares of one gradient, computed twice. Kernels that are not deterministic change each element by a few
# roundings (2**-8 in bf16), which average out in the sum; parts of a sum differ by as much as they are large.
_ROUNDOFF = 2.0**-7


def check_placements(root: nn.Module, mesh: DataMesh) -> None:
    """Refuse parameters that are placed over ranks other than by a plan over the mesh's tensor axis.

    Raises:
        SuperScaleError: names the parameter and what to do, or says that there is a tensor axis and no plan.
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
    """Refuse placed parameters that no group of FSDP2 takes: they can't be whole in a bucket.

    Raises:
        SuperScaleError: names the parameter, why, and what to do.
    """
    for fqn, param in root.named_parameters():
        if isinstance(param, DTensor) and (param in left_out or param not in taken):
            why = left_out.get(param, f"it belongs to {type(root).__name__} itself, which gathers nothing")
            raise SuperScaleError(
                f"parameter {fqn!r} is parallelized, and can't be sharded further: {why}. Leave it out of the plan, or "
                "change that."
            )


class EqualGradients:
    """Compares the gradients of what the plan left whole over the tensor axis, once per parameter.

    Args:
        fqn_of: names of the module's parameters.
    """

    def __init__(self, mesh: DataMesh, fqn_of: Mapping[nn.Parameter, str]) -> None:
        self._mesh = mesh
        self._fqn_of = fqn_of
        self._seen: set[nn.Parameter] = set()

    def check(self, due: Sequence[Due]) -> None:
        """Every rank calls it at each step, with the same parameters.

        Raises:
            SuperScaleError: on every rank; names the parameter and both 2-norms.
        """
        if self._mesh.tensor.size == 1:
            return
        new = [i for i, item in enumerate(due) if item.param not in self._seen and not is_cut(item.param)]
        if not new:
            return
        own = [float(grad_sumsq(due[i].grad)) for i in new]
        everybody = torch.tensor(gather_objects(self._mesh, own), dtype=torch.float64)
        by_data = everybody.view(-1, self._mesh.tensor.size, len(new))
        low, high = by_data.amin(dim=1), by_data.amax(dim=1)
        self._seen.update(due[i].param for i, seen in zip(new, (low > 0).all(dim=0).tolist(), strict=True) if seen)
        for column in ((high - low) > _ROUNDOFF * high).any(dim=0).nonzero().flatten().tolist():
            row = int((high - low)[:, column].argmax())
            fqn = self._fqn_of[due[new[column]].param]
            norms = ", ".join(f"{float(value) ** 0.5:.6g}" for value in by_data[row, :, column])
            raise SuperScaleError(
                f"ranks of the tensor axis computed different gradients of {fqn!r}, which the plan left "
                f"whole: 2-norms {norms}. Either their batches or random numbers differ (give samplers of your own the "
                "data-parallel rank, and call seed_everything), or the parameter acts on activations that are cut: "
                "give it SequenceParallel() or another style in the plan. No weight was changed in this step."
            )
