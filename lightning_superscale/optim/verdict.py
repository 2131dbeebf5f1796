"""The verdict on one step's gradients, the same on all ranks: norm, clip coefficient, whether they are finite.

[Note: What the plan left whole] Every rank of the tensor axis computes the same batch, so a parameter that the plan
left alone (a norm, an embedding) has the same gradient on all of them, and each rank steps it for itself: nothing is
sent. This holds wherever activations are whole. Where they are cut, as between ColwiseParallel and RowwiseParallel or
along the sequence, each rank's gradient of a plain parameter is only its part of the sum, and PyTorch raises no error:
weights would drift apart in silence. So each such parameter's first gradient that is not zero is compared over the
tensor axis.
The plan's own styles (SequenceParallel) place such a parameter as Replicate, and DTensor sums its gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_superscale.comm.collectives import gather_objects
from lightning_superscale.comm.communicator import Communicator
from lightning_superscale.comm.dtensor import is_cut
from lightning_superscale.comm.mesh import DataMesh
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.ops.update import StatsSource
from lightning_superscale.optim.clipping import (
    ClipByNorm,
    ClipByValue,
    ClipRequest,
    EarlyNorms,
    LastNorm,
    clip_coefficient,
    clip_in_place,
    counted_stats,
    gathered_norms,
    grad_sumsqs,
    joined,
    norms_of,
)
from lightning_superscale.optim.param_update import GradScale, ParamUpdate
from lightning_superscale.optim.unit import GradientDelta

# The relative difference that two sums of squares of one gradient, computed twice, may have. Kernels that are not
# deterministic change each element by a few roundings (2**-8 in bf16), which average out in the sum; partial gradients
# differ by about their own size.
_ROUNDOFF = 2.0**-7


class Verdict(NamedTuple):
    """The decision of what a step does to its gradients.

    Attributes:
        grad_scale: factor of every gradient: the clip coefficient over the loss scale.
        clip_value: bound of every element after that, to [-clip_value, clip_value]; None for no bound.
        has_overflowed: whether a gradient of a scaled loss is NaN or infinite on any rank, so that the step is dropped.
    """

    grad_scale: GradScale
    clip_value: float | None
    has_overflowed: bool = False


class GradVerdict:
    """Judges the gradients of one optimizer.

    [Note: Verdicts on the device] Where gradients are whole and on one device, a clip coefficient stays there, and the
    host queues the step without waiting for backward. The host waits once where it has to decide something: with
    error_if_nonfinite, and where losses are scaled: a step that overflowed counts in no step number and changes the
    scale of the next loss, both of which are the host's. Where ranks share gradients it waits for the other ranks.

    Args:
        fqn_of: names of the module's parameters, in registration order.
        error_if_nonfinite: raise when a gradient is NaN or infinite, before anything changes.
    """

    def __init__(self, ranks: Communicator, fqn_of: Mapping[nn.Parameter, str], *, error_if_nonfinite: bool) -> None:
        self._ranks = ranks
        self._fqn_of = fqn_of
        self._error_if_nonfinite = error_if_nonfinite
        self._clips: list[ClipRequest] = []
        self._norm_before: Tensor | None = None
        self._last_norm: Tensor | None = None
        self._last_stats: Sequence[StatsSource] = ()
        self._early = EarlyNorms(ranks.mesh)

    def measure(self, delta: GradientDelta) -> None:
        """Measure gradients that are about to leave for the host, where steps need norms."""
        self._early.take(delta)

    def request(self, clip: ClipRequest) -> None:
        """Clip the gradients of the next step.

        Raises:
            SuperScaleError: a clip by norm after one by value, which can't be fused.
        """
        self._clips = joined(self._clips, clip)

    def clip_in_place(
        self, params: Iterable[nn.Parameter], clip: ClipRequest, *, keeps_nonfinite: bool = False
    ) -> Tensor | None:
        """Clip gradients in `param.grad` now, and keep their norm before for `grad_norm`. Every rank calls it.

        Returns:
            that norm; see `clip_in_place` in clipping.py.
        """
        norm = clip_in_place(params, clip, keeps_nonfinite=keeps_nonfinite or self._error_if_nonfinite)
        if norm is not None and self._norm_before is None:
            self._norm_before = norm.float()
        return norm

    def discard(self) -> None:
        """Forget requests and gradients of an interrupted step."""
        self._clips.clear()
        self._norm_before = None
        self._early.clear()

    def judge(self, due: Sequence[ParamUpdate], loss_scale: float | None) -> Verdict:
        """Decide what a step does to its gradients, as `_judge` does, and keep their norm."""
        verdict = self._judge(due, loss_scale)
        if self._norm_before is not None:
            self._last_norm, self._norm_before = self._norm_before, None
        return verdict

    def _judge(self, due: Sequence[ParamUpdate], loss_scale: float | None) -> Verdict:
        """Decide what a step does to its gradients. Every rank calls it.

        Args:
            loss_scale: factor of the loss whose gradients these are; None without a scaler.

        Raises:
            SuperScaleError: a NaN or infinite gradient with error_if_nonfinite, on every rank; names the parameters.
        """
        clips, self._clips = self._clips, []
        max_norm = next((c.max_norm for c in clips if isinstance(c, ClipByNorm)), None)
        clip_value = next((c.clip_value for c in clips if isinstance(c, ClipByValue)), None)
        self._last_norm, self._last_stats = None, ()
        unscale = 1.0 if loss_scale is None else 1.0 / loss_scale
        self._early.are_wanted = max_norm is not None or self._error_if_nonfinite or loss_scale is not None
        if not due or not self._early.are_wanted:
            self._early.clear()  # measured for this step; the next one that asks must not find them
            return Verdict(unscale, clip_value)
        norms, self._last_norm = norms_of(self._ranks.mesh, due, self._early)
        self._early.clear()
        if loss_scale is not None:
            self._last_norm = self._last_norm * unscale
        must_be_finite = self._error_if_nonfinite or loss_scale is not None
        if must_be_finite and not bool(self._last_norm.isfinite()):
            # The scaler handles an overflow by a lower scale, as long as the scale is above 1.
            if self._error_if_nonfinite and (loss_scale is None or loss_scale <= 1):
                self._raise_nonfinite(due, norms)
            if loss_scale is not None:
                return Verdict(unscale, clip_value, has_overflowed=True)
        if max_norm is None:
            return Verdict(unscale, clip_value)
        coefficient = clip_coefficient(self._last_norm, max_norm)
        if loss_scale is None and coefficient.device == due[0].unit.device and self._ranks.mesh.num_shares == 1:
            return Verdict(coefficient, clip_value)
        return Verdict(float(coefficient) * unscale, clip_value)

    def _raise_nonfinite(self, due: Sequence[ParamUpdate], norms: Tensor) -> None:
        is_bad = (~norms.isfinite()).tolist()
        here = {self._fqn_of[item.param] for item, flag in zip(due, is_bad, strict=True) if flag}
        anywhere = here.union(*gather_objects(self._ranks.mesh, here))
        bad = [fqn for fqn in self._fqn_of.values() if fqn in anywhere]
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise SuperScaleError(
            f"error_if_nonfinite: the gradients of {len(bad)} of {len(due)} parameters are NaN or infinite "
            f"({shown}). Weights and optimizer states are as before this step. "
            "Look for a NaN loss or an overflow; pass error_if_nonfinite=False to train on regardless."
        )

    def note(self, due: Sequence[ParamUpdate], stats: Sequence[StatsSource]) -> None:
        """Keep the statistics that the step's own kernels counted, for `grad_norm` of a step that needed no norm.

        Args:
            stats: statistics of every unit of `due`, in the order of `by_unit`; or none at all.
        """
        self._last_stats = counted_stats(self._ranks.mesh, due, stats)

    def norms_by_name(self, due: Sequence[ParamUpdate]) -> dict[str, float]:
        """2-norm of each parameter's gradient, with all ranks' rows of it, by name. Every rank calls it.

        Nothing is judged, and nothing kept for the next step.
        """
        norms = gathered_norms(self._ranks.mesh, list(self._fqn_of), due, self._early)
        self._early.clear()
        return {self._fqn_of[param]: norm for param, norm in norms.items()}

    def grad_norm(self) -> Tensor:
        """Global 2-norm of the gradients of the last step, before clipping; fp32 scalar on the CPU.

        Every rank calls it where states are sharded.

        Raises:
            SuperScaleError: the last step measured no norm: see `LastNorm.over`.
        """
        norm = self.last_norm().over(self._ranks.mesh)
        self._last_norm = norm
        return norm

    def last_norm(self) -> LastNorm:
        """The last step's norm as far as this rank knows it without asking another."""
        if self._last_norm is not None:
            return LastNorm(norm=float(self._last_norm))
        if self._last_stats:
            return LastNorm(sumsq=sum(s.sumsq for source in self._last_stats for s in source()))
        return LastNorm()


class EqualGradients:
    """Compares the gradients of parameters that the plan left whole over the tensor axis, once per parameter.

    Args:
        fqn_of: names of the module's parameters.
    """

    def __init__(self, mesh: DataMesh, fqn_of: Mapping[nn.Parameter, str]) -> None:
        self._mesh = mesh
        self._fqn_of = fqn_of
        self._seen: set[nn.Parameter] = set()

    def check(self, due: Sequence[ParamUpdate]) -> None:
        """Compare the gradients of parameters that were not compared yet. Every rank calls it at each step.

        Args:
            due: updates of the same parameters on every rank.

        Raises:
            SuperScaleError: gradients differ, on every rank; names the parameter and each rank's 2-norm.
        """
        if self._mesh.tensor.size == 1:
            return
        new = [i for i, item in enumerate(due) if item.param not in self._seen and not is_cut(item.param)]
        if not new:
            return
        own = list(map(float, grad_sumsqs([due[i].grad() for i in new])))
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
