"""The verdict on one step's gradients, the same on all ranks: norm, clip coefficient, whether they are finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_superscale.comm.collectives import control_sum, gather_objects
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.ops.update import StatsSource
from lightning_superscale.zero.clip import (
    ClipByNorm,
    ClipByValue,
    ClipRequest,
    clip_coefficient,
    grad_norms,
    grad_sumsq,
    joined,
    total_norm,
)
from lightning_superscale.zero.due import Due
from lightning_superscale.zero.ranks import Ranks


class Verdict(NamedTuple):
    """What a step does to its gradients.

    Attributes:
        grad_scale: they are multiplied by it: the clip coefficient.
        clip_value: then limited to [-clip_value, clip_value]; None for no limit.
    """

    grad_scale: float
    clip_value: float | None


class Judge:
    """Judges the gradients of one optimizer.

    Args:
        fqn_of: names of the module's parameters, in registration order.
        error_if_nonfinite: raise when a gradient is NaN or infinite.
    """

    def __init__(self, ranks: Ranks, fqn_of: Mapping[nn.Parameter, str], *, error_if_nonfinite: bool) -> None:
        self._ranks = ranks
        self._fqn_of = fqn_of
        self._error_if_nonfinite = error_if_nonfinite
        self._clips: list[ClipRequest] = []
        self._last_norm: Tensor | None = None
        self._last_stats: Sequence[StatsSource] = ()

    def request(self, clip: ClipRequest) -> None:
        """Clip the gradients of the next step.

        Raises:
            SuperScaleError: a clip by norm after one by value, which can't be fused.
        """
        self._clips = joined(self._clips, clip)

    def discard(self) -> None:
        """Forget the requests of an interrupted step."""
        self._clips.clear()

    def judge(self, due: Sequence[Due]) -> Verdict:
        """Every rank calls it.

        Raises:
            SuperScaleError: a NaN or infinite gradient with error_if_nonfinite, on every rank; names the parameters.
        """
        clips, self._clips = self._clips, []
        max_norm = next((c.max_norm for c in clips if isinstance(c, ClipByNorm)), None)
        clip_value = next((c.clip_value for c in clips if isinstance(c, ClipByValue)), None)
        self._last_norm, self._last_stats = None, ()
        if not due or (max_norm is None and not self._error_if_nonfinite):
            return Verdict(1.0, clip_value)
        norms, self._last_norm = self._norms(due)
        if self._error_if_nonfinite and not bool(self._last_norm.isfinite()):
            self._raise_nonfinite(due, norms)
        if max_norm is None:
            return Verdict(1.0, clip_value)
        return Verdict(float(clip_coefficient(self._last_norm, max_norm)), clip_value)

    def _norms(self, due: Sequence[Due]) -> tuple[Tensor, Tensor]:
        """The norm of each gradient, as far as this rank has it, and of all gradients on all ranks."""
        grads = [item.grad for item in due]
        if self._ranks.mesh.shard.size == 1:
            norms = grad_norms(grads)
            return norms, total_norm(norms)
        sums = grad_sumsq(grads)
        return sums.sqrt().float(), self._norm_over_ranks(float(sums.sum()))

    def _norm_over_ranks(self, sumsq: float) -> Tensor:
        """The 2-norm of all shards from this rank's sum of squares; fp32 scalar. Every rank calls it."""
        mesh = self._ranks.mesh
        total = control_sum(mesh, torch.tensor([sumsq], dtype=torch.float64), "the gradient norm") / mesh.replicate.size
        return total[0].sqrt().float()

    def _raise_nonfinite(self, due: Sequence[Due], norms: Tensor) -> None:
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

    def note(self, stats: Sequence[StatsSource]) -> None:
        """Know what the step's own kernels counted, for `grad_norm` of a step that needed no norm."""
        self._last_stats = stats

    def grad_norm(self) -> Tensor:
        """Global 2-norm of the gradients of the last step, before clipping; fp32 scalar on the CPU.

        Every rank calls it, where states are sharded.

        Raises:
            SuperScaleError: no step with gradients has been taken, or the optimizer steps itself.
        """
        if self._last_norm is not None:
            return self._last_norm.detach().cpu()
        if self._last_stats:
            here = sum(s.sumsq for source in self._last_stats for s in source())
            if self._ranks.mesh.shard.size == 1:
                return torch.tensor(here**0.5)
            self._last_norm = self._norm_over_ranks(here)
            return self._last_norm
        raise SuperScaleError(
            "grad_norm() is known after an optimizer step of Adam or AdamW, or after one with clipping by norm; "
            "neither has happened yet."
        )
