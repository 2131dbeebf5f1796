"""Fits whose sequences ranks share, in every composition: models, losses, strategies and precisions, as one table.

The optimizer is AdamW with a large eps. So a weight moves by at most lr / eps = 1 times what its gradient is off, and
does not turn whole steps where a gradient is roundoff alone: what ranks compute in another order stays roundoff.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import combinations, product
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tests.helpers.trainers import trainer
from tests.sequence.tokens.programs import VOCABULARY, Gpt

NUM_STEPS, NUM_SAMPLES, _SEED = 2, 16, 5
MODES = ("auto", "ulysses", "ring", "allgather")
MODELS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1), "uneven": (3, 3)}


class Checkpointed(nn.Module):
    """A block whose activations are computed again in backward."""

    def __init__(self, block: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.block, self.use_reentrant = block, use_reentrant

    def forward(self, *args: Any) -> Tensor:
        return checkpoint(self.block, *args, use_reentrant=self.use_reentrant)


def _model_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def given(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    return _model_loss(model(ids), labels)


def by_slices(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    return _model_loss(model(ids)[:, :-1], ids[:, 1:])


def by_padding(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    return _model_loss(model(ids), functional.pad(labels, (0, 1), value=-100)[:, 1:])


def masked(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    each = functional.cross_entropy(model(ids).float().transpose(1, 2), labels, reduction="none")
    weights = (labels != -100).to(each.dtype)
    return (each * weights).sum() / weights.sum()


def only_late(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """No label of the first rank's part counts."""
    late = torch.arange(ids.shape[1]) >= 3 * ids.shape[1] // 4
    return _model_loss(model(ids), labels.clamp(min=0).masked_fill(~late, -100))


def _causal(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def packed(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Documents end where an id is small; tokens attend within their own."""
    document = (ids < 5).cumsum(1)
    mask = (document[:, :, None] == document[:, None, :]) & _causal(ids.shape[1])
    return _model_loss(model(ids, mask[:, None]), labels)


def windowed(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    mask = _causal(ids.shape[1]) & ~_causal(ids.shape[1]).tril(-4)
    return _model_loss(model(ids, mask), labels)


LABELS: dict[str, tuple[Callable[[nn.Module, Tensor, Tensor], Tensor], int]] = {
    "given": (given, 16),
    "by slices": (by_slices, 16),
    "by padding": (by_padding, 16),
    "masked": (masked, 16),
    "a part without": (only_late, 16),
    "odd length": (given, 13),
    "odd length by slices": (by_slices, 11),
    "packed": (packed, 16),
    "window": (windowed, 14),
}


@dataclass(frozen=True)
class Layout:
    """A strategy's options and its ranks.

    Attributes:
        world_size: ranks.
        size: those that share a sequence.
    """

    zero: Any
    offload: Any = None
    world_size: int = 2
    size: int = 2

    @property
    def num_data(self) -> int:
        return self.world_size // self.size


_ZENFLOW = {"engine": "zenflow", "zenflow": {"topk": 1, "update_interval": 1}}
STRATEGIES = {
    "zero0": Layout(0),
    "zero1": Layout(1),
    "zero2": Layout(2),
    "zero3": Layout(3),
    "cpu": Layout(2, "cpu"),
    "superoffload": Layout(2, "superoffload"),
    "zero3 superoffload": Layout(3, "superoffload"),
    "zenflow": Layout(2, _ZENFLOW),
    "weight flow": Layout(0, {"engine": "cpu", "weights": "flow"}),
    "four zero1": Layout(1, None, 4, 4),
    "four zero3": Layout(3, None, 4, 4),
    "dp2 zero2": Layout(2, None, 4, 2),
    "hsdp": Layout({"stage": 3, "shard_size": 2}, None, 4, 2),
}
CHECKPOINTING = ("off", "on")
ACCUMULATE = (1, 2)
CLIPPING = ("off", "norm", "value")
CLIP_AT = {"norm": 1.0, "value": 0.02}
PRECISION = ("32-true", "bf16-mixed", "bf16-true")


@dataclass(frozen=True)
class Case:
    """One composition."""

    mode: str
    model: str
    labels: str
    strategy: str
    checkpointing: str
    accumulate: int
    clipping: str
    precision: str

    @property
    def layout(self) -> Layout:
        return STRATEGIES[self.strategy]

    @property
    def flags(self) -> dict[str, Any]:
        """Those of the Trainer."""
        flags: dict[str, Any] = {"precision": self.precision, "accumulate_grad_batches": self.accumulate}
        if self.clipping != "off":
            flags |= {"gradient_clip_val": CLIP_AT[self.clipping], "gradient_clip_algorithm": self.clipping}
        return flags


FACTORS = (MODES, tuple(MODELS), tuple(LABELS), tuple(STRATEGIES), CHECKPOINTING, ACCUMULATE, CLIPPING, PRECISION)


def pairs_of(case: Case) -> set[tuple[int, Any, int, Any]]:
    """Every two of a composition's levels."""
    levels = [getattr(case, one.name) for one in fields(case)]
    return {(i, levels[i], j, levels[j]) for i, j in combinations(range(len(levels)), 2)}


def all_pairs() -> set[tuple[int, Any, int, Any]]:
    return {(i, a, j, b) for i, j in combinations(range(len(FACTORS)), 2) for a, b in product(FACTORS[i], FACTORS[j])}


def pairwise() -> list[Case]:
    """Few compositions that have every pair of levels: each is the best of some that hold a pair that is missing."""
    missing, chosen, draw = all_pairs(), [], torch.Generator().manual_seed(0)
    while missing:
        i, a, j, b = min(missing, key=str)
        best = max((_drawn(draw, {i: a, j: b}) for _ in range(300)), key=lambda case: len(pairs_of(case) & missing))
        chosen.append(best)
        missing -= pairs_of(best)
    return chosen


def _drawn(draw: torch.Generator, fixed: dict[int, Any]) -> Case:
    picks = (int(torch.randint(len(levels), (), generator=draw)) for levels in FACTORS)
    return Case(*(fixed.get(i, FACTORS[i][pick]) for i, pick in enumerate(picks)))


def every() -> Iterator[Case]:
    """Each mode, model and kind of labels with each strategy; the other factors take turns."""
    for number, four in enumerate(product(*FACTORS[:4])):
        turns, rest = number * 7 + number // 14, []
        for levels in FACTORS[4:]:
            rest.append(levels[turns % len(levels)])
            turns //= len(levels)
        yield Case(*four, *rest)


class Composed(L.LightningModule):
    """Knows nothing of ranks."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.case, self.losses = case, []
        self.model = Gpt(*MODELS[case.model])
        if case.checkpointing == "on":
            pairs = zip(self.model.attentions, self.model.mlps, strict=True)
            for at, (attention, mlp) in enumerate(list(pairs)):
                self.model.attentions[at] = Checkpointed(attention, use_reentrant=bool(at % 2))
                self.model.mlps[at] = Checkpointed(mlp, use_reentrant=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = LABELS[self.case.labels][0](self.model, *batch)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-1, eps=1e-1)


def texts(case: Case) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    ids, labels = torch.randint(VOCABULARY, (2, NUM_SAMPLES, LABELS[case.labels][1]), generator=generator)
    labels[::3, 5:] = -100
    labels[1] = -100
    return TensorDataset(ids, labels)


class Alone(Composed):
    """The same on one process, where a batch is the samples of all ranks: its loss is the mean of theirs."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        num = self.case.layout.num_data
        parts = [[one[rank::num] for one in batch] for rank in range(num)]
        loss = torch.stack([LABELS[self.case.labels][0](self.model, *part) for part in parts]).mean()
        self.losses.append(float(loss.detach()))
        return loss


@dataclass(frozen=True)
class Trained:
    """What a fit ended with: losses by micro-batch, and weights by name."""

    losses: list[float]
    weights: dict[str, Tensor]
    explained: str = ""


def shared(rank: int, world_size: int, case: Case) -> Trained:
    """One rank's fit."""
    from lightning_superscale import SuperScaleStrategy

    layout = case.layout
    strategy = SuperScaleStrategy(
        zero=layout.zero, offload=layout.offload, sequence={"size": layout.size, "mode": case.mode}
    )
    return _fit(Composed(case), strategy, world_size, layout.num_data)


def alone(case: Case, dtype: torch.dtype = torch.float32) -> Trained:
    """One process' fit, in the case's precision; in fp64 where `dtype` says so."""
    from lightning_superscale import SuperScaleStrategy

    data = texts(case)
    # Lightning shuffles what it deals to several ranks, with the seed of seed_everything.
    dealt = DistributedSampler(data, 1, 0, seed=_SEED) if case.layout.num_data > 1 else None
    return _fit(Alone(case), SuperScaleStrategy(zero=0), 1, 1, dtype, dealt)


def _fit(
    module: Composed,
    strategy: Any,
    world_size: int,
    num_data: int,
    dtype: torch.dtype = torch.float32,
    sampler: DistributedSampler | None = None,
) -> Trained:
    case = module.case
    L.seed_everything(_SEED, verbose=False)
    run = trainer(
        "auto" if dtype == torch.float64 else strategy,
        devices=world_size,
        max_epochs=1,
        **case.flags | ({"precision": "64-true"} if dtype == torch.float64 else {}),
    )
    batch_size = NUM_SAMPLES // num_data // NUM_STEPS // case.accumulate
    run.fit(module, DataLoader(texts(case), batch_size, sampler=sampler))
    state = module.state_dict() if dtype == torch.float64 else run.strategy.run.module_state(module, is_local=False)
    weights = {name.replace(".block", ""): value.detach().double().clone() for name, value in state.items()}
    return Trained(module.losses, weights, "" if dtype == torch.float64 else run.strategy.explain())


def shared_all(rank: int, world_size: int, cases: list[Case]) -> list[Trained]:
    """One rank's fits."""
    return [shared(rank, world_size, case) for case in cases]
