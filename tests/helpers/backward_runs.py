"""Backward patterns in training: under a Trainer, and in one plain process that holds every rank's batches."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lightning_superscale as lss
from tests.helpers.backward_patterns import AUTOMATIC, MANUAL, OF_TWO_OPTIMIZERS, WIDTH, Step, TwoTowers
from tests.helpers.trainers import trainer

# A large eps: updates grow with gradients, so that gradients of a wrong size make wrong weights.
ADAMW = {"lr": 5e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 5e-2}
NUM_STEPS = 3
BATCH = 6
PATTERNS = {pattern.__name__: pattern for pattern in (*MANUAL, *OF_TWO_OPTIMIZERS, *AUTOMATIC)}


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        num_micro: micro-batches per step, of automatic patterns.
        clip: ("norm" or "value", limit); None for no clipping.
        is_watched: hooks of the module may look at gradients before the step.
        is_twice: the module's own `backward` runs two.
        is_hooked: a parameter got a hook when the model was made.
    """

    pattern: str
    num_micro: int = 1
    clip: tuple[str, float] | None = None
    is_watched: bool = False
    is_twice: bool = False
    is_hooked: bool = False

    def make(self) -> TwoTowers:
        model = TwoTowers()
        if self.is_hooked:
            model.vision.first.weight.register_hook(lambda grad: grad * 0.25)
            model.vision.scale.register_hook(lambda grad: grad * 0.5)
        return model

    @property
    def is_automatic(self) -> bool:
        return PATTERNS[self.pattern] in AUTOMATIC

    def optimizers_of(self, model: TwoTowers) -> list[torch.optim.Optimizer]:
        is_split = PATTERNS[self.pattern] in OF_TWO_OPTIMIZERS
        towers: list[nn.Module] = [model.vision, model.text] if is_split else [model]
        return [torch.optim.AdamW(tower.parameters(), **ADAMW) for tower in towers]

    def go(self, step: Step) -> Any:
        return PATTERNS[self.pattern](step)


def batch(index: int, rank: int) -> Tensor:
    return torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(100 * index + rank))


# Under a Trainer


class Batches(Dataset):
    def __init__(self, num: int, rank: int) -> None:
        self.num, self.rank = num, rank

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> Tensor:
        return batch(index, self.rank)


class Module(L.LightningModule):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self.automatic_optimization = run.is_automatic
        self.net, self.run = run.make(), run

    def configure_optimizers(self):
        return self.run.optimizers_of(self.net)

    def training_step(self, x, batch_idx):
        if self.run.is_automatic:
            return self.run.go(Step(self.net, x, self.global_rank))
        found = self.optimizers()
        optimizers = found if isinstance(found, list) else [found]

        @contextmanager
        def toggled(number: int) -> Iterator[None]:
            self.toggle_optimizer(optimizers[number])
            yield
            self.untoggle_optimizer(optimizers[number])

        def zero_grad(number: int = 0, set_to_none: bool = True) -> None:
            optimizers[number].zero_grad(set_to_none)

        step = Step(self.net, x, self.global_rank, self.manual_backward, zero_grad, toggled)
        for number in self.run.go(step):
            if self.run.clip is not None:
                self.clip_gradients(optimizers[number], self.run.clip[1], self.run.clip[0])
            optimizers[number].step()
        return None


class Watching(Module):
    def on_after_backward(self):
        pass


class Twice(Module):
    def backward(self, loss):
        loss.backward(retain_graph=True)
        (loss * 0.5).backward()


def fit(run: Run, strategy: dict[str, Any], rank: int, world_size: int, **flags: Any) -> dict[str, Tensor]:
    """Weights after the run on this rank."""
    if run.is_automatic and run.clip is not None:
        flags |= {"gradient_clip_val": run.clip[1], "gradient_clip_algorithm": run.clip[0]}
    module = (Watching if run.is_watched else Twice if run.is_twice else Module)(run)
    runner = trainer(
        lss.SuperScaleStrategy(**strategy),
        devices=world_size,
        max_epochs=1,
        accumulate_grad_batches=run.num_micro,
        use_distributed_sampler=False,
        **flags,
    )
    runner.fit(module, DataLoader(Batches(NUM_STEPS * run.num_micro, rank), batch_size=None))
    return {name: param.detach().clone() for name, param in module.net.named_parameters()}


def outcome(run: Run, strategy: dict[str, Any], rank: int, world_size: int) -> dict[str, Tensor] | str:
    """Weights after the run, or what it was refused with."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    try:
        return fit(run, strategy, rank, world_size)
    except (lss.SuperScaleError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        logging.disable(logging.NOTSET)


def outcomes(rank: int, world_size: int, runs: list[tuple[Run, dict[str, Any]]]) -> list[dict[str, Tensor] | str]:
    return [outcome(run, strategy, rank, world_size) for run, strategy in runs]


# In one plain process


class _Replica:
    """One rank's model."""

    def __init__(self, run: Run, rank: int) -> None:
        self.run, self.rank = run, rank
        self.model = run.make()
        self.params = list(self.model.parameters())
        self.optimizers = run.optimizers_of(self.model)

    def places(self, number: int) -> list[int]:
        """Which parameters an optimizer steps."""
        own = {id(p) for group in self.optimizers[number].param_groups for p in group["params"]}
        return [i for i, param in enumerate(self.params) if id(param) in own]

    @contextmanager
    def toggled(self, number: int) -> Iterator[None]:
        own = self.places(number)
        for i, param in enumerate(self.params):
            param.requires_grad_(i in own)
        yield
        self.model.requires_grad_(True)

    def zero_grad(self, number: int = 0, set_to_none: bool = True) -> None:
        self.optimizers[number].zero_grad(set_to_none)

    def steps(self, backward: Callable[..., None] = torch.Tensor.backward) -> Iterator[int]:
        for k in range(NUM_STEPS):
            for micro in range(self.run.num_micro):
                x = batch(k * self.run.num_micro + micro, self.rank)
                if not self.run.is_automatic:
                    yield from self.run.go(Step(self.model, x, self.rank, backward, self.zero_grad, self.toggled))
                    continue
                loss = self.run.go(Step(self.model, x, self.rank)) / self.run.num_micro
                if micro == 0:
                    self.zero_grad()  # Lightning's order: after training_step, before backward
                loss.backward(retain_graph=self.run.is_twice)
                if self.run.is_twice:
                    (loss * 0.5).backward()
            if self.run.is_automatic:
                yield 0


class _Meeting:
    """Replicas in threads of their own, which meet where ranks do: after each manual backward, and at each step.

    Gradients are averaged after each backward, as under DDP: the average is of the sum of all so far. With sharded
    weights, as under FSDP2, averages are added up.
    """

    def __init__(self, run: Run, world_size: int, *, is_sharded: bool) -> None:
        self.run, self.is_sharded = run, is_sharded
        self.replicas = [_Replica(run, rank) for rank in range(world_size)]
        self.shown: dict[int, Tensor] = {}
        self.steps_at: list[int | None] = [None] * world_size
        self.has_stepped = False
        self.barrier = threading.Barrier(world_size, self.act)

    def go(self) -> dict[str, Tensor]:
        with ThreadPoolExecutor(len(self.replicas)) as threads:
            for done in [threads.submit(self.follow, replica) for replica in self.replicas]:
                done.result()
        return {name: param.detach() for name, param in self.replicas[0].model.named_parameters()}

    def follow(self, replica: _Replica) -> None:
        zero_grad = replica.zero_grad

        def zero_all(number: int = 0, set_to_none: bool = True) -> None:
            zero_grad(number, set_to_none)
            if replica.rank == 0:
                for i in replica.places(number):
                    self.shown.pop(i, None)

        def backward(tensor: Tensor, **how: Any) -> None:
            tensor.backward(**how)
            self.meet(replica.rank, None)

        replica.zero_grad = zero_all  # type: ignore[method-assign]
        try:
            for number in replica.steps(backward):
                self.meet(replica.rank, number)
        except BaseException:
            self.barrier.abort()
            raise

    def meet(self, rank: int, step: int | None) -> None:
        """Return after the average, or after the step: one that is waited for joins the averages of the others."""
        while True:
            self.steps_at[rank] = step
            self.barrier.wait(timeout=60)
            if step is None or self.has_stepped:
                return

    def act(self) -> None:
        first = self.replicas[0]
        self.has_stepped = None not in self.steps_at
        if not self.has_stepped:
            self.average(range(len(first.params)))
            return
        (number,) = set(self.steps_at)
        assert number is not None
        places = first.places(number)
        self.average(places)
        for i in places:
            first.params[i].grad = self.shown.get(i, first.params[i].grad)
        if self.run.clip is not None:
            clip = nn.utils.clip_grad_norm_ if self.run.clip[0] == "norm" else nn.utils.clip_grad_value_
            clip([first.params[i] for i in places], self.run.clip[1])
        first.optimizers[number].step()
        for i in places:
            for other in self.replicas[1:]:
                with torch.no_grad():
                    other.params[i].copy_(first.params[i])
            if self.is_sharded:
                first.params[i].grad = None

    def average(self, places: Iterable[int]) -> None:
        for i in places:
            average = _average([replica.params[i].grad for replica in self.replicas])
            if average is None:
                continue
            if self.is_sharded:
                self.shown[i] = self.shown[i] + average if i in self.shown else average
            for replica in self.replicas:
                replica.params[i].grad = None if self.is_sharded else average.clone()


def plain(run: Run, world_size: int, *, is_sharded: bool = False) -> dict[str, Tensor]:
    """Weights after the run: each optimizer steps with the gradients of all ranks' batches, averaged in rank order."""
    if world_size > 1 and not run.is_automatic:
        return _Meeting(run, world_size, is_sharded=is_sharded).go()
    replicas = [_Replica(run, rank) for rank in range(world_size)]
    first = replicas[0]
    for numbers in zip(*(replica.steps() for replica in replicas), strict=True):
        (number,) = set(numbers)
        places = first.places(number)
        shares = [[replica.params[i].grad for replica in replicas] for i in places]
        for i, grads in zip(places, shares, strict=True):
            first.params[i].grad = _average(grads)
        if run.clip is not None:
            clip = nn.utils.clip_grad_norm_ if run.clip[0] == "norm" else nn.utils.clip_grad_value_
            clip([first.params[i] for i in places], run.clip[1])
        first.optimizers[number].step()
        for i, grads in zip(places, shares, strict=True):
            if first.params[i].grad is not None:
                first.params[i].grad = grads[0]
                for other in replicas[1:]:
                    with torch.no_grad():
                        other.params[i].copy_(first.params[i])
    return {name: param.detach() for name, param in first.model.named_parameters()}


def _average(grads: list[Tensor | None]) -> Tensor | None:
    present = [grad for grad in grads if grad is not None]
    if not present:
        return None
    scale = 1.0 / len(grads)
    return sum((grad.detach() * scale for grad in present[1:]), present[0].detach() * scale)
