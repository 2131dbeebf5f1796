"""Which training runs are compared bit for bit. Knows no torch, so that the controller can deal cases to workers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

# What is compared with states that stay on the device: name -> options of OffloadConfig.
WAYS: dict[str, dict[str, Any]] = {
    "superoffload": {"engine": "superoffload", "gpu_fraction": 0, "weights": "stationary"},
    "cpu": {"engine": "cpu", "gpu_fraction": 0, "weights": "stationary"},
    "flow": {"engine": "superoffload", "weights": "flow"},
    "auto": {"engine": "superoffload"},
    "half on device": {"engine": "superoffload", "gpu_fraction": 0.5, "weights": "stationary"},
    "flow cpu": {"engine": "cpu", "weights": "flow"},
    "superoffload fp32 link": {"engine": "superoffload", "gpu_fraction": 0, "link_dtype": "fp32"},
    "superoffload after the norm": {"engine": "superoffload", "gpu_fraction": 0, "speculate": False},
}
# Whose weights have 32 bits on the link anyway.
_WIDE = ("32-true", "bf16-mixed", "16-mixed")
PRECISIONS = ("bf16-true", "32-true", "bf16-mixed", "16-mixed", "16-true")
RESIDENT = "resident"
# Single cases: what is trained is not one of the products.
EVALUATE, RESUME, PEAK, TRACE = "evaluate alone", "resume", "peak memory", "trace"


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        way: of WAYS, or one of the single cases.
        clip: whether gradients are clipped, to a norm that every step exceeds.
        accumulate: micro-batches of a step.
        remat: whether blocks compute their activations again in backward.
        delay_seed: of the delays that are put into the streams; None for none.
    """

    way: str
    precision: str = "bf16-true"
    clip: bool = False
    accumulate: int = 1
    remat: bool = False
    delay_seed: int | None = None

    @property
    def name(self) -> str:
        parts = [self.way, self.precision]
        parts += ["clipped"] if self.clip else []
        parts += [f"{self.accumulate} micro-batches"] if self.accumulate > 1 else []
        parts += ["remat"] if self.remat else []
        parts += [f"delays {self.delay_seed}"] if self.delay_seed is not None else []
        return ", ".join(parts)

    @property
    def reference(self) -> Case:
        """The run with states on the device that it must equal."""
        return Case(RESIDENT, self.precision, self.clip, self.accumulate, self.remat)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def groups(precisions: Sequence[str] = PRECISIONS) -> list[Case]:
    """One reference per setting that changes the result, the plainest first."""
    settings = itertools.product((False, True), precisions, (False, True), (1, 2))
    return [Case(RESIDENT, precision, clip, accumulate, remat) for remat, precision, clip, accumulate in settings]


def cases_of(reference: Case, ways: Sequence[str], seeds: Sequence[int | None]) -> list[Case]:
    """All runs that must equal one reference."""
    fields = {key: value for key, value in reference.as_json().items() if key not in ("way", "delay_seed")}
    wanted = [way for way in ways if not ("link_dtype" in WAYS[way] and reference.precision in _WIDE)]
    return [Case(way, **fields, delay_seed=seed) for seed in seeds for way in wanted]


def deal(num_workers: int, seeds: Sequence[int]) -> list[list[Case]]:
    """Every case to one worker, all of one reference to the same: without delays first, and then with each seed."""
    hands: list[list[Case]] = [[] for _ in range(num_workers)]
    for seed in (None, *seeds):
        for number, reference in enumerate(groups()):
            hands[number % num_workers] += cases_of(reference, tuple(WAYS), [seed])
    for number, single in enumerate(singles()):
        hands[number % num_workers].insert(0, single)
    return hands


def singles() -> list[Case]:
    resumes = [Case(f"{RESUME} {way}", clip=True) for way in ("superoffload", "cpu", "flow", "auto")]
    return [Case(EVALUATE, "bf16-mixed"), Case(PEAK), Case(TRACE), *resumes]


def tiny() -> list[list[Case]]:
    """A few of each kind, for one worker: what a machine without a GPU rehearses in seconds."""
    plain, clipped = Case(RESIDENT), Case(RESIDENT, "16-mixed", clip=True, accumulate=2, remat=True)
    picked = [*singles()[:3], Case(f"{RESUME} superoffload", clip=True)]
    return [picked + cases_of(plain, tuple(WAYS), [None]) + cases_of(clipped, ("superoffload", "flow"), [None])]
