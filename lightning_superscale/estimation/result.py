"""What an estimate says of one strategy, and of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_superscale.estimation.peak import Moment
from lightning_superscale.estimation.step_time import StepTime
from lightning_superscale.run.report.plan import ByteClass


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyEstimate:
    """One strategy's prediction for one rank.

    Attributes:
        line: the argument of the Trainer.
        is_exact: whether its steps are AdamW's: bit for bit, or but for rounding where ranks share sequences or losses
            do without their logits.
        checkpoints_blocks: whether blocks compute their activations again in backward.
        bytes: of what is kept between steps, by class.
        peak: the moment of a step at which the device holds the most.
        host_bytes: kept in host memory.
        device_share: share of the states that stay on the device although a strategy offloads them.
        why_not: the reason why it does not fit; None where it does.
        time: of one step.
        tokens_per_s: of all ranks.
        mfu: the model's floating-point operations as a share of what the devices can, recomputation not counted.
        largest_params: parameters of the deepest such model, with blocks of this width, that fits; None without blocks.
        longest_sequence: tokens of the longest sequence that fits; None where batches are no tokens.
    """

    line: str
    is_exact: bool
    checkpoints_blocks: bool
    bytes: Sequence[ByteClass]
    peak: Moment
    host_bytes: int
    device_share: float
    why_not: str | None
    time: StepTime
    tokens_per_s: float
    mfu: float
    largest_params: int | None
    longest_sequence: int | None

    @property
    def fits(self) -> bool:
        return self.why_not is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What `estimate()` says.

    Attributes:
        model: its class.
        device: name of the profile.
        device_memory, host_memory: bytes of each for one rank.
        num_tokens: of one rank in a step, its part of those that ranks share; or its samples.
        strategies: in the order of `candidates`, plain ones before those that checkpoint blocks.
        assumptions: what was taken for granted, in sentences.
    """

    model: str
    num_params: int
    num_trainable: int
    num_ranks: int
    device: str
    device_memory: int
    host_memory: int
    num_tokens: int
    unit: str
    strategies: Sequence[StrategyEstimate]
    assumptions: Sequence[str]

    @property
    def recommended(self) -> StrategyEstimate | None:
        """The fastest exact strategy that fits; of those within 3 % of it, the first. None where none fits."""
        fitting = [one for one in self.strategies if one.fits and one.is_exact]
        if not fitting:
            return None
        best = min(one.time.total for one in fitting)
        return next(one for one in fitting if one.time.total <= _AS_FAST * best)

    def to_dict(self) -> dict[str, Any]:
        """All of it in values that JSON takes."""
        best = self.recommended
        content = asdict(self)
        for one, row in zip(self.strategies, content["strategies"], strict=True):
            row["fits"] = one.fits
            row["peak"]["total"] = one.peak.total
            row["time"]["total"] = one.time.total
        return content | {"recommended": None if best is None else best.line}


# An estimate's seconds are no better than that.
_AS_FAST = 1.03
