"""The verdict on one step's gradients, the same on all ranks: norm, clip coefficient, whether they are finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_superscale.comm.collectives import gather_objects
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.ops.update import StatsSource
from lightning_superscale.zero.clip import (
    ClipByNorm,
    ClipByValue,
    ClipRequest,
    clip_coefficient,
    joined,
)
from lightning_superscale.zero.due import Due
from lightning_superscale.zero.early_norms import EarlyNorms
from lightning_superscale.zero.global_norm import counted_stats, norm_over_ranks, norms_of
from lightning_superscale.zero.ranks import Ranks
from lightning_superscale.zero.units import GradientDelta


class Verdict(NamedTuple):
    """What a step does to its gradients.

    Attributes:
        grad_scale: they are multiplied by it: the clip coefficient over the loss scale.
        clip_value: then limited to [-clip_value, clip_value]; None for no limit.
        has_overflowed: a gradient of a scaled loss is NaN or infinite somewhere: the step is dropped.
    """

    grad_scale: float
    clip_value: float | None
    has_overflowed: bool = False


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
        self._early = EarlyNorms(ranks.mesh)

    def receive(self, delta: GradientDelta) -> None:
        """Gradients that leave for the host; where steps need norms, they are measured before."""
        self._early.take(delta)

    def request(self, clip: ClipRequest) -> None:
        """Clip the gradients of the next step.

        Raises:
            SuperScaleError: a clip by norm after one by value, which can't be fused.
        """
        self._clips = joined(self._clips, clip)

    def discard(self) -> None:
        """Forget requests and gradients of an interrupted step."""
        self._clips.clear()
        self._early.clear()

    def judge(self, due: Sequence[Due], loss_scale: float | None) -> Verdict:
        """Every rank calls it.

        Args:
            loss_scale: what the loss of these gradients was multiplied by; None without a scaler.

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
            return Verdict(unscale, clip_value)
        norms, self._last_norm = norms_of(self._ranks.mesh, due, self._early)
        self._early.clear()
        if loss_scale is not None:
            self._last_norm = self._last_norm * unscale
        if not bool(self._last_norm.isfinite()):
            # An overflow is the scaler's business, as long as it can do something about it.
            if self._error_if_nonfinite and (loss_scale is None or loss_scale <= 1):
                self._raise_nonfinite(due, norms)
            if loss_scale is not None:
                return Verdict(unscale, clip_value, has_overflowed=True)
        if max_norm is None:
            return Verdict(unscale, clip_value)
        return Verdict(float(clip_coefficient(self._last_norm, max_norm)) * unscale, clip_value)

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

    def note(self, due: Sequence[Due], stats: Sequence[StatsSource]) -> None:
        """Know what the step's own kernels counted, for `grad_norm` of a step that needed no norm."""
        self._last_stats = counted_stats(self._ranks.mesh, due, stats)

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
            if self._ranks.mesh.num_shares == 1:
                return torch.tensor(here**0.5)
            self._last_norm = norm_over_ranks(self._ranks.mesh, here)
            return self._last_norm
        raise SuperScaleError(
            "grad_norm() is known after an optimizer step of Adam or AdamW, or after one with clipping by norm; "
            "neither has happened yet."
        )
