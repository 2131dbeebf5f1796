"""One run, from its first step to its last, in legs that something happens to; and what it has to come to."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from tests.helpers.ends import free_port
from tests.soak.happenings import ENDS_WITHIN_S, HAPPENINGS, Happening
from tests.soak.processes import Processes, Started
from tests.soak.ranks import NAMES, Leg

# Seconds within which a leg begins to train: processes start, read checkpoints, and a machine has other things to do.
STARTS_WITHIN_S = 120.0
ENDED_FIRST = "nothing: the run ended first"


@dataclass
class Outcome:
    """What happened to a leg, and what came of it.

    Attributes:
        name: what happened.
        leg: to which leg.
        where: to which rank, file or disk.
        failures: what was not as promised.
        lost_steps: steps that had to be taken again.
        ended_s: seconds until every rank had ended.
        restarted_s: seconds from then to the next leg's first step.
        is_named: whether every rank that lived on said why it ended.
    """

    name: str
    leg: Leg
    where: str = ""
    failures: list[str] = field(default_factory=list)
    lost_steps: int = 0
    ended_s: float = 0.0
    restarted_s: float = 0.0
    is_named: bool = False


class Run:
    """A run of `steps` steps.

    Args:
        folder: for records; made anew.
        only: part of the names of what may happen.
        checkpoints: the folder of checkpoints.
        can_fill: whether the disk of checkpoints is small enough to be filled.
        deadline: time.monotonic() from which on nothing happens to it any more.
    """

    def __init__(
        self,
        kind: str,
        steps: int,
        folder: Path,
        checkpoints: Path,
        seed: int,
        *,
        only: str,
        can_fill: bool,
        deadline: float,
    ) -> None:
        self.kind, self.steps, self.folder, self.checkpoints = kind, steps, folder, checkpoints
        self.outcomes: list[Outcome] = []
        self.failures: list[str] = []
        self.legs: list[Leg] = []
        self._rng = random.Random(seed)
        self._can_fill = can_fill
        self._only = only
        self._deadline = deadline
        self._damaged = ""
        folder.mkdir(parents=True)

    def play(self) -> None:
        """Run until all steps are taken; `failures` says what was not as promised."""
        while not (self.folder / "end.pt").exists() and not self.failures:
            self._play_leg()
        if not self.failures:
            self._compare()

    def _leg(self, happening: Happening | None) -> Leg:
        rng = self._rng
        ranks = rng.choice([1, 2, 2, 4])
        if happening is not None:
            ranks = max(ranks, happening.needs_ranks)
        names = [name for name in NAMES if name != "lightning" or self._may_be_lightnings(happening)]
        if ranks == 1:
            names = [name for name in names if not name.startswith("zero1") and not name.startswith("zero2")]
        return Leg(
            number=len(self.legs),
            kind=self.kind,
            strategy=rng.choice(names),
            ranks=ranks,
            asynchronous=rng.random() < 0.5,
            workers=rng.choice([0, 0, 0, 1]),
            steps=self.steps,
            folder=str(self.folder),
            checkpoints=str(self.checkpoints),
            port=free_port(),
            trap="" if happening is None else happening.trap,
            victim=rng.randrange(ranks),
            at=rng.randrange(1, 90)
            if happening is not None and happening.trap == "kill in a save"
            else rng.randrange(40),
        )

    def _may_be_lightnings(self, happening: Happening | None) -> bool:
        return self.kind == "fp32" and (happening is None or not happening.needs_ours)

    def _play_leg(self) -> None:
        happening = None
        if time.monotonic() < self._deadline:
            happening = self._rng.choice([one for one in HAPPENINGS if self._is_possible(one)])
        leg = self._leg(happening)
        self.legs.append(leg)
        name = "nothing" if happening is None else happening.name
        outcome = Outcome(name, leg)
        before, begun = self._steps_done(), time.monotonic()
        processes = Processes(leg)
        try:
            is_there = processes.listen(STARTS_WITHIN_S, until_started=True)
            if is_there and all(end.how == "done" for end in processes.ends.values()) and processes.start is None:
                outcome.name = ENDED_FIRST  # the last checkpoint was of the last step, after which ranks were killed
            elif processes.start is None:
                processes.dump_stacks()
                outcome.failures.append(f"no rank began to train: {processes.ends}")
            else:
                self._check_start(processes.start, outcome, before, time.monotonic() - begun)
                self._happen(happening, processes, outcome)
        finally:
            processes.close()
        self.outcomes.append(outcome)
        self.failures += [f"leg {leg.number}, {name}: {failure}" for failure in outcome.failures]

    def _is_possible(self, happening: Happening) -> bool:
        if self.kind not in happening.kinds or self._only not in happening.name:
            return False
        return self._can_fill or happening.name != "a full disk"

    def _check_start(self, start: Started, outcome: Outcome, before: int, seconds: float) -> None:
        """Charge the last leg with what it cost, and look whether damage was named."""
        if self.outcomes:
            last = self.outcomes[-1]
            last.lost_steps, last.restarted_s = max(0, before - start.step), seconds
        damaged, self._damaged = self._damaged, ""
        if not damaged:
            return
        if not any(damaged in text for text in start.passed_over):
            outcome.failures.append(f"{damaged} was not named as damaged: {start.passed_over}")
        if start.path == damaged:
            outcome.failures.append(f"went on from the damaged {damaged}")

    def _happen(self, happening: Happening | None, processes: Processes, outcome: Outcome) -> None:
        if happening is not None and happening.do is not None:
            processes.listen(self._rng.uniform(0.0, 2.5))
        begun = time.monotonic()
        limit_s = ENDS_WITHIN_S
        if happening is None or happening.trap:
            limit_s += self.steps * processes.leg.pause_s * 8  # it trains on until it is done, or its trap closes
        elif not processes.ends:
            outcome.where = happening.do(processes, self._rng)  # type: ignore[misc]
        if not processes.listen(limit_s):
            processes.dump_stacks()
            if processes.leg.strategy != "lightning":
                left = processes.alive()
                outcome.failures.append(f"ranks {left} had not ended after {time.monotonic() - begun:.0f} s")
        outcome.ended_s = 0.0 if happening is None or happening.trap else time.monotonic() - begun
        if outcome.where.startswith("FAILED"):
            outcome.failures.append(outcome.where)
        if outcome.where.startswith("damaged "):
            self._damaged = outcome.where.removeprefix("damaged ")
        self._check_ends(happening, processes, outcome)

    def _check_ends(self, happening: Happening | None, processes: Processes, outcome: Outcome) -> None:
        said = {rank: end.text for rank, end in processes.ends.items() if end.how == "error"}
        done = [rank for rank, end in processes.ends.items() if end.how == "done"]
        if len(done) == processes.leg.ranks:
            outcome.name = ENDED_FIRST if happening is not None else outcome.name
            return
        if happening is None:
            outcome.failures.append(f"ended although nothing happened: {processes.ends}")
            return
        if not happening.says:
            return
        unnamed = [
            rank
            for rank, text in said.items()
            if text.strip() and processes.ends[rank].how == "error" and not any(word in text for word in happening.says)
        ]
        outcome.is_named = bool(said) and not unnamed
        if unnamed:
            outcome.failures.append(
                f"rank {unnamed[0]} ended with {said[unnamed[0]][:600]!r}, which says nothing of it"
            )

    def _records(self) -> list[dict]:
        lines = [line for path in sorted(self.folder.glob("seen-*.jsonl")) for line in path.read_text().splitlines()]
        return [json.loads(line) for line in lines if line.endswith("}")]  # a rank may die within a line

    def _steps_done(self) -> int:
        return 1 + max((entry["step"] for entry in self._records()), default=-1)

    def _compare(self) -> None:
        """The weights and the samples of every step, beside those of a run that nothing happened to."""
        other = undisturbed(self.kind, self.steps, self.folder)
        found, expected = (torch.load(place / "end.pt") for place in (self.folder, other))
        for name, value in expected.items():
            if not torch.equal(found[name], value):
                self.failures.append(f"{name} differs by {(found[name] - value).abs().max().item():.3g} at the end")
        ours, theirs = samples_of_steps(self._records()), samples_of_steps(_lines(other))
        differing = [step for step in range(self.steps) if ours.get(step) != theirs.get(step)]
        if differing:
            step = differing[0]
            self.failures.append(
                f"steps {differing[:10]} used other samples; "
                f"step {step} used {ours.get(step)}, expected {theirs.get(step)}"
            )


def samples_of_steps(entries: list[dict]) -> dict[int, tuple[int, ...]]:
    """The samples that the final weights are made of, by step: a later leg's take the place of lost ones."""
    last: dict[int, int] = {}
    for entry in entries:
        last[entry["step"]] = max(entry["leg"], last.get(entry["step"], 0))
    found: dict[int, list[int]] = {}
    for entry in entries:
        if entry["leg"] == last[entry["step"]]:
            found.setdefault(entry["step"], []).extend(entry["ids"])
    return {step: tuple(sorted(samples)) for step, samples in found.items()}


def _lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "seen-0.jsonl").read_text().splitlines()]


def undisturbed(kind: str, steps: int, beside: Path) -> Path:
    """The folder of one process's run that nothing happens to; plain Lightning and torch in fp32."""
    folder = beside.parent / f"undisturbed-{kind}-{steps}"
    if (folder / "end.pt").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    strategy = "lightning" if kind == "fp32" else "zero0"
    leg = Leg(0, kind, strategy, 1, False, 0, steps, str(folder), str(folder / "checkpoints"), free_port())
    processes = Processes(replace(leg, pause_s=0.0))
    try:
        if not processes.listen(STARTS_WITHIN_S + steps) or processes.ends[0].how != "done":
            raise AssertionError(f"the undisturbed run failed: {processes.ends}")
    finally:
        processes.close()
    return folder
