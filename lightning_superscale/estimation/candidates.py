"""The strategies that an estimate compares, each with the line that a user pastes."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_superscale.config import OffloadConfig, SequenceConfig, ZeroConfig
from lightning_superscale.config.offload import ENGINES, OWN_STRATEGIES
from lightning_superscale.offload.engine import engine_of


@dataclass(frozen=True, slots=True)
class Candidate:
    """One strategy.

    Attributes:
        name: its registered name; None where it has none.
    """

    zero: ZeroConfig
    offload: OffloadConfig | None = None
    name: str | None = None

    @property
    def is_exact(self) -> bool:
        """Whether its steps are AdamW's, bit for bit where ranks share no sequences."""
        return self.offload is None or engine_of(self.offload.engine).equals_adamw

    def line(self, sequence: SequenceConfig | None = None) -> str:
        """The argument of the Trainer, with these options for long sequences."""
        if self.name is not None and sequence is None:
            return f'strategy="{self.name}"'
        zero, offload = self.zero, self.offload
        arguments = [f"zero={_shown(zero, zero.stage, ZeroConfig(stage=zero.stage))}"] if zero != ZeroConfig() else []
        if offload is not None:
            arguments.append(f"offload={_shown(offload, offload.engine, OffloadConfig(engine=offload.engine))}")
        if sequence is not None:
            arguments.append(f"sequence={_shown(sequence, sequence.size, SequenceConfig(size=sequence.size))}")
        return f"strategy=SuperScaleStrategy({', '.join(arguments)})"


def _shown(config: object, short: object, plain: object) -> str:
    if config == plain:
        return repr(short)
    changed = [key for key, value in vars(config).items() if value != getattr(type(config)(), key)]
    return f"{type(config).__name__}({', '.join(f'{key}={getattr(config, key)!r}' for key in changed)})"


def candidates(num_ranks: int) -> list[Candidate]:
    """The strategies worth comparing on so many ranks, those that give up the least first."""
    default = OffloadConfig().engine
    engines = sorted(ENGINES, key=lambda engine: (not engine_of(engine).equals_adamw, engine != default))
    offloaded = [
        Candidate(ZeroConfig(stage=2), OffloadConfig(engine=engine), engine if engine in OWN_STRATEGIES else None)
        for engine in engines
    ]
    flowing = Candidate(ZeroConfig(stage=2), OffloadConfig(weights="flow"))
    resident = Candidate(ZeroConfig(), name="superscale")
    if num_ranks == 1:
        return [resident, offloaded[0], flowing, *offloaded[1:]]
    sharded = [Candidate(ZeroConfig(stage=stage), name=f"zero{stage}") for stage in (1, 2, 3)]
    both = Candidate(ZeroConfig(stage=3), OffloadConfig())
    return [resident, *sharded, offloaded[0], both, flowing, *offloaded[1:]]
