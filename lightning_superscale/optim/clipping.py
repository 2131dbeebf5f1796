"""Gradient clipping as the optimizer engine applies it: requested first, computed once, fused in the step.

[Note: Norms taken early] A step's verdict needs the norm of every gradient. Taken at the step, from gradients that left
for the host, it waits for the last copy and then reads all of them once more, with nothing to hide it. So norms are
taken on the device while backward still runs, and the verdict waits for no copy. Steps predict whether the next one
needs norms. Where a prediction was wrong, and where a second gradient was added to a first, the gradient is brought
back to the device: a device and a host add up in different orders, and no bit of a step may depend on the step before
it. All norms are those of gradients in their weights' dtype, as they are stepped.

In a norm over ranks every element of the model's gradient counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_superscale.comm.collectives import control_sum
from lightning_superscale.comm.dtensor import is_cut
from lightning_superscale.comm.mesh import DataMesh
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.ops.cpu.flat import sumsq
from lightning_superscale.ops.events import has_streams
from lightning_superscale.ops.state_dtypes import WIDE_DTYPES
from lightning_superscale.ops.update import StatsSource
from lightning_superscale.optim.param_update import ParamUpdate, by_unit
from lightning_superscale.optim.unit import GradientDelta
from lightning_superscale.torch_private import norms_of_all, order_of_norms


@dataclass(frozen=True, slots=True)
class ClipByNorm:
    """Scale all gradients of one optimizer so that their global 2-norm is at most `max_norm`."""

    max_norm: float


@dataclass(frozen=True, slots=True)
class ClipByValue:
    """Limit every gradient element to [-clip_value, clip_value]."""

    clip_value: float


ClipRequest = ClipByNorm | ClipByValue


def clip_in_place(params: Iterable[nn.Parameter], clip: ClipRequest, *, keeps_nonfinite: bool) -> Tensor | None:
    """Clip `param.grad` of every parameter as plain PyTorch does. Every rank calls it where parameters are sharded.

    Args:
        keeps_nonfinite: leave gradients whose norm is NaN or infinite as they are, so that the culprits can be named.

    Returns:
        the 2-norm of all gradients before, scalar of their dtype on the CPU; None after a clip by value.
    """
    clipped = [param for param in params if param.grad is not None]
    if isinstance(clip, ClipByValue):
        nn.utils.clip_grad_value_(clipped, clip.clip_value)
        return None
    norm = nn.utils.get_total_norm([param.grad for param in clipped if param.grad is not None])
    total = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if total.isfinite() or not keeps_nonfinite:
        nn.utils.clip_grads_with_norm_(clipped, clip.max_norm, total)
    return total.cpu()


def norm_of_scaled(params: Iterable[nn.Parameter], loss_scale: float) -> Tensor:
    """2-norm of all gradients in `param.grad`, divided by the loss scale that they have: fp32 scalar on the CPU.

    Every rank calls it where parameters are sharded. The sum is in fp32, in which the square of a scaled fp16 element
    has room.
    """
    norms = [torch.linalg.vector_norm(param.grad, dtype=torch.float32) for param in params if param.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).cpu() / loss_scale


def joined(requests: Sequence[ClipRequest], new: ClipRequest) -> list[ClipRequest]:
    """The clip requests of one step, with one more added: of two of the same kind the stricter is kept.

    Raises:
        SuperScaleError: a clip by norm follows one by value, so that its norm would be that of clipped gradients.
    """
    if isinstance(new, ClipByNorm):
        if any(isinstance(r, ClipByValue) for r in requests):
            raise SuperScaleError(
                "gradients of one step can be clipped by norm, by value, or by norm and then by value; "
                "found a clip by norm after a clip by value."
            )
        return [ClipByNorm(min([new.max_norm, *(r.max_norm for r in requests if isinstance(r, ClipByNorm))]))]
    by_norm: list[ClipRequest] = [r for r in requests if isinstance(r, ClipByNorm)]
    return [
        *by_norm,
        ClipByValue(min([new.clip_value, *(r.clip_value for r in requests if isinstance(r, ClipByValue))])),
    ]


def grad_norms(grads: Sequence[Tensor]) -> list[Tensor]:
    """2-norm of each gradient, scalars on the gradients' devices: one launch per device and dtype.

    `torch.nn.utils.clip_grad_norm_` measures fp32 gradients in the same way, so norms of fp32 gradients have its bits
    on each device.
    """
    return _by_kind(grads, lambda alike: norms_of_all(alike, _norm_dtype(alike[0])))


def _norm_dtype(grad: Tensor) -> torch.dtype:
    """The dtype in which torch takes the norm of a gradient, at least fp32 or as precise and complex."""
    return torch.promote_types(grad.dtype, torch.float32)


def grad_sumsqs(grads: Sequence[Tensor]) -> list[Tensor]:
    """Sum of squares of each gradient, fp64 scalars on the gradients' devices.

    In fp64 the shards of a gradient add up to the same norm however it is cut.
    """
    return _by_kind(grads, _sumsqs)


def _sumsqs(alike: list[Tensor]) -> Sequence[Tensor]:
    if alike[0].dtype in WIDE_DTYPES:
        kind = torch.complex128 if alike[0].is_complex() else torch.float64
        return [norm.square() for norm in norms_of_all(alike, kind)]
    if not has_streams(alike[0].device):
        return [torch.tensor(sumsq(grad.contiguous()), dtype=torch.float64) for grad in alike]
    return [norm.square() for norm in norms_of_all(alike, torch.float64)]


def _by_kind(grads: Sequence[Tensor], measure: Callable[[list[Tensor]], Sequence[Tensor]]) -> list[Tensor]:
    """Call `measure` once per device and dtype; returns the measures in the order of `grads`."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, grad in enumerate(grads):
        kinds.setdefault((grad.device, grad.dtype), []).append(i)
    found: dict[int, Tensor] = {}
    for alike in kinds.values():
        found.update(zip(alike, measure([grads[i] for i in alike]), strict=True))
    return [found[i] for i in range(len(grads))]


def total_norm(norms: Tensor) -> Tensor:
    """Global 2-norm of gradients whose own 2-norms are given, [num_grads] fp32; fp32 scalar on their device."""
    total: Tensor = torch.linalg.vector_norm(norms, 2)
    return total


def clip_coefficient(total: Tensor, max_norm: float) -> Tensor:
    """The factor that clips gradients of norm `total`: `min(1, max_norm / (total + 1e-6))`; NaN where `total` is NaN.

    The order of operations is that of `torch.nn.utils.clip_grads_with_norm_`, so that clipped
    gradients have the bits that plain PyTorch gives.
    """
    return torch.clamp(max_norm / (total + 1e-6), max=1.0)


class EarlyNorms:
    """Measures of the gradients of one step, taken before the step.

    A measure is the fp32 2-norm where every rank has whole gradients, and the fp64 sum of squares of this rank's rows
    otherwise.

    Attributes:
        are_wanted: whether to take measures; set by each step for the next one. The first step after a start or a
            resume takes them.
    """

    def __init__(self, mesh: DataMesh) -> None:
        self.are_wanted = True
        self._measure = grad_norms if mesh.num_shares == 1 else grad_sumsqs
        self._taken: dict[tuple[int, int], Tensor | None] = {}

    def take(self, delta: GradientDelta) -> None:
        """Measure gradients on their device, in the order of its current stream; on CUDA the host does not wait."""
        if not self.are_wanted:
            return
        keys = [(delta.unit.index, i) for i, _ in delta.slices]
        # A second delta adds to the first, and the norm of the sum counts: it is taken when both are there.
        self._taken.update((key, None) for key in keys if key in self._taken)
        dtype = delta.unit.dtype
        new = [
            (key, grad.to(dtype)) for key, (_, grad) in zip(keys, delta.slices, strict=True) if key not in self._taken
        ]
        self._taken.update(zip([key for key, _ in new], self._measure([grad for _, grad in new]), strict=True))

    def clear(self) -> None:
        """Forget the measures of a step that is over."""
        self._taken.clear()

    def of(self, due: Sequence[ParamUpdate]) -> Tensor:
        """The measure of each gradient, [len(due)]. Gradients that `take` did not measure are measured now.

        The result is on the gradients' device where all have one, and on the host otherwise.
        """
        known = {key: measure for key, measure in self._taken.items() if measure is not None}
        late = by_unit(item for item in due if (item.unit.index, item.i) not in known)
        for index, items in late.items():  # unit by unit, so that few gradients are back on the device at a time
            measured = self._measure([_on_device(item) for item in items])
            known.update(zip(((index, item.i) for item in items), measured, strict=True))
        measures = [known[item.unit.index, item.i] for item in due]
        devices = {measure.device for measure in measures}
        return torch.stack(measures if len(devices) == 1 else [measure.cpu() for measure in measures])


def _on_device(item: ParamUpdate) -> Tensor:
    """The gradient of an update, 1D; one that left for the host is brought back to where early ones are measured."""
    grad = item.grad()
    return grad.to(item.unit.device, item.unit.dtype) if "host" in item.state.homes else grad


@dataclass(frozen=True, slots=True)
class LastNorm:
    """The norm of a step's gradients as far as a rank knows it, in numbers that keep no tensor of the step alive.

    Attributes:
        norm: 2-norm of all gradients on all ranks; None where ranks have not added up theirs.
        sumsq: sum of squares of the gradients that count on this rank; None where no kernel counted it.
    """

    norm: float | None = None
    sumsq: float | None = None

    def over(self, mesh: DataMesh) -> Tensor:
        """The global 2-norm, fp32 scalar on the CPU. Every rank calls it where states are sharded.

        Raises:
            SuperScaleError: the step measured no norm: no step was taken yet, it had no gradients, or an optimizer
                other than Adam and AdamW took it without clipping by norm.
        """
        if self.norm is not None:
            return torch.tensor(self.norm, dtype=torch.float32)
        if self.sumsq is None:
            raise SuperScaleError(
                "grad_norm() is known after an optimizer step of Adam or AdamW, or after one with clipping by norm; "
                "neither has happened yet."
            )
        if mesh.num_shares == 1:
            return torch.tensor(self.sumsq**0.5, dtype=torch.float32)
        return norm_over_ranks(mesh, self.sumsq)


def norms_of(mesh: DataMesh, due: Sequence[ParamUpdate], early: EarlyNorms) -> tuple[Tensor, Tensor]:
    """2-norms of gradients. Every rank calls it where states are sharded.

    Returns:
        the norm of each gradient, or of this rank's rows of it, [len(due)] fp32; and the norm of all gradients on all
        ranks, fp32 scalar.
    """
    measures = early.of(due)
    if mesh.num_shares == 1:
        params: list[Tensor] = [item.param for item in due]
        if len({param.dtype for param in params}) == 1:
            return measures, total_norm(measures)
        each = measures.unbind()  # torch adds up dtype after dtype; a tensor of indices would make the host wait
        return measures, total_norm(torch.stack([each[i] for i in order_of_norms(params)]))
    sums = measures.cpu()
    counted = torch.tensor([_counts(mesh, item.param) for item in due])
    return sums.sqrt().float(), norm_over_ranks(mesh, float(sums[counted].sum()))


def gathered_norms(
    mesh: DataMesh, params: Sequence[nn.Parameter], due: Sequence[ParamUpdate], early: EarlyNorms
) -> dict[nn.Parameter, float]:
    """2-norm of each parameter's gradient, with the rows that other ranks have. Every rank calls it.

    Args:
        params: the module's, in the same order on every rank.

    Returns:
        by parameter; without those that have a gradient on no rank, or one of zeros.
    """
    measures = early.of(due).double().cpu() if due else torch.zeros(0, dtype=torch.float64)
    own = {item.param: measure for item, measure in zip(due, measures.tolist(), strict=True)}
    if mesh.num_shares == 1:
        return {param: norm for param, norm in own.items() if norm != 0}
    sums = torch.tensor([own.get(param, 0.0) if _counts(mesh, param) else 0.0 for param in params], dtype=torch.float64)
    total = control_sum(mesh, sums, "the gradient norms") / mesh.replicate.size
    return {param: value**0.5 for param, value in zip(params, total.tolist(), strict=True) if value != 0}


def norm_over_ranks(mesh: DataMesh, sumsq: float) -> Tensor:
    """The 2-norm of all shards from this rank's sum of squares, fp32 scalar on the CPU. Every rank calls it."""
    total = control_sum(mesh, torch.tensor([sumsq], dtype=torch.float64), "the gradient norm") / mesh.replicate.size
    return total[0].sqrt().float()


def counted_stats(mesh: DataMesh, due: Sequence[ParamUpdate], stats: Sequence[StatsSource]) -> list[StatsSource]:
    """Statistics of every unit's gradients, with empty ones for units that do not count on this rank.

    Args:
        stats: statistics of every unit of `due`, in the order of `by_unit`; or none at all.
    """
    if mesh.tensor.rank == 0:
        return list(stats)
    units = by_unit(due).values()
    return [s if _counts(mesh, items[0].param) else tuple for s, items in zip(stats, units, strict=False)]


def _counts(mesh: DataMesh, param: nn.Parameter) -> bool:
    """Whether this rank's rows of a parameter count in a norm over ranks.

    Ranks of the tensor axis have a parameter that is not cut alike, and it counts on the first of them only. All
    parameters of a unit are cut, or none is.
    """
    return mesh.tensor.rank == 0 or is_cut(param)
