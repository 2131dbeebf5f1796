"""Are simulated steps of several ranks as long as measured ones? `python benchmarks/simulation.py [--turns N]`.

A small language model in fp32 trains on this machine's cores over gloo, one thread per rank. Steps of ranks that
exchange nothing, so many at once, calibrate operations; two ranks calibrate links: the seconds of a reduce-scatter and
of an all-gather of few and of many bytes give a latency and a rate. Then steps of two and four ranks are simulated and
measured, in ZeRO stages 0, 2 and 3. All of them take turns, and of each the least disturbed turn counts. More ranks
than cores share them, and `shares_cores` says so: links are then slower by as much as operations are. Nothing overlaps
on cores, so what this shows is what is exchanged, how often and how fast; not what hides. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lightning as L
import torch
from torch import distributed as dist
from torch.utils.data import DataLoader

from benchmarks.step_cost import hardware
from benchmarks.versus.techniques import num_cores
from lightning_superscale.config import ZeroConfig
from lightning_superscale.estimation.devices import PROFILES, DeviceProfile, Reach
from lightning_superscale.estimation.links import Latencies
from lightning_superscale.estimation.memory import params_of
from lightning_superscale.estimation.setup import Setup
from lightning_superscale.estimation.step_time import roofline, step_time
from lightning_superscale.estimation.tracing.inputs import loss_of
from lightning_superscale.estimation.tracing.operations import TracedOperation
from lightning_superscale.estimation.tracing.step import trace_step
from lightning_superscale.offload.planner.forecast import HostSchedule
from lightning_superscale.run.precision import choose
from lightning_superscale.simulation.cluster import simulate_cluster
from lightning_superscale.simulation.program import program_of
from tests.estimation.models import Language
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import trainer

BATCH = 16
STAGES = (0, 2, 3)
RANKS = (2, 4)
SMALL, LARGE = 2**10, 2**24
WARMUP_STEPS = 3


@dataclass(frozen=True)
class Calibration:
    """What this machine's cores do.

    Attributes:
        steps: by number of ranks at once, seconds of a step that exchanges nothing.
        latency: seconds of a round of a collective of two ranks.
        rate: bytes per second that each of two ranks sends.
    """

    steps: dict[int, float]
    latency: float
    rate: float

    def crowding(self, num_ranks: int) -> float:
        """By how much everything is slower than with two ranks."""
        return self.steps[num_ranks] / self.steps[2]


class _Times(L.Callback):
    """When each training step began."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.starts.append(time.perf_counter())


def measured_step(rank: int, world_size: int, stage: int, num_steps: int) -> float:
    """The median seconds of a step, of this rank."""
    from lightning_superscale import SuperScaleStrategy

    times = _Times()
    strategy = SuperScaleStrategy(zero=stage)
    run = trainer(strategy, devices=world_size, callbacks=[times], max_epochs=1, limit_train_batches=num_steps)
    tokens = Language.batch(BATCH * (num_steps + 1) * world_size)
    run.fit(Language(), DataLoader(tokens, BATCH))
    spans = [after - before for before, after in zip(times.starts, times.starts[1:], strict=False)]
    return statistics.median(spans[WARMUP_STEPS:])


def measured_collectives(rank: int, world_size: int, num_calls: int) -> list[float]:
    """The median seconds of a reduce-scatter with an all-gather, of few and of many bytes, by this package's own."""
    from lightning_superscale.comm.collectives import AxisCollectives
    from lightning_superscale.comm.mesh import build_mesh
    from lightning_superscale.layout.mesh import MeshSpec

    mesh = build_mesh(MeshSpec(shard=world_size), timedelta(seconds=60))
    collectives = AxisCollectives(mesh.shard, mesh)
    found = []
    for nbytes in (SMALL, LARGE):
        spans = []
        for _ in range(num_calls):
            packed = torch.zeros(world_size, nbytes // 4 // world_size)
            dist.barrier()
            start = time.perf_counter()
            collectives.reduce_scatter(packed.clone()).wait()
            collectives.all_gather(packed).wait()
            spans.append(time.perf_counter() - start)
        found.append(statistics.median(spans))
    return found


def lone_step(rank: int, world_size: int, num_steps: int) -> float:
    """The median seconds of a step beside other ranks, with which it exchanges nothing."""
    module, tokens = Language(), Language.batch(BATCH)
    optimizer = module.configure_optimizers()
    spans = []
    dist.barrier()
    for _ in range(num_steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        module.training_step(tokens, 0).backward()
        optimizer.step()
        spans.append(time.perf_counter() - start)
    return statistics.median(spans[WARMUP_STEPS:])


def measure(num_steps: int, num_turns: int) -> tuple[Calibration, dict[tuple[int, int], float]]:
    """What calibrates, and seconds of steps by number of ranks and stage: of each the least disturbed turn."""
    lone: dict[int, float] = {}
    links: list[list[float]] = []
    steps: dict[tuple[int, int], float] = {}
    for _ in range(num_turns):
        links += run_ranks(2, measured_collectives, 30)
        for num in RANKS:
            alone = statistics.mean(run_ranks(num, lone_step, num_steps))
            lone[num] = min(alone, lone.get(num, alone))
            for stage in STAGES:
                step = statistics.mean(run_ranks(num, measured_step, stage, num_steps))
                steps[num, stage] = min(step, steps.get((num, stage), step))
    small, large = (min(turns) for turns in zip(*links, strict=True))
    # Two collectives of one round each, that send a half of the bytes.
    return Calibration(lone, small / 2, (LARGE - SMALL) / (large - small)), steps


def profile_of(calibration: Calibration, num_ranks: int) -> DeviceProfile:
    """This machine's cores as devices of so many ranks."""
    rate = calibration.rate / calibration.crowding(num_ranks)
    reach = Reach(products=1.0, memory=1.0, links=1.0, host=1.0, call=0.0)
    return replace(PROFILES["H100 SXM"], rank_link=rate, node_link=rate, reach=reach, shares_cores=True)


def simulated_step(calibration: Calibration, stage: int, num_ranks: int) -> float:
    """Seconds of a step, with operations as long as make a step without exchanges what it was measured to be."""
    profile = profile_of(calibration, num_ranks)
    module = Language()
    alone = Setup(zero=ZeroConfig(), offload=None, precision=choose("32-true"))
    trace = trace_step(module, Language.batch(BATCH), loss_of(module))
    rates = roofline(profile)
    scale = calibration.steps[num_ranks] / step_time(trace, params_of(module, alone), alone, profile, rates).total

    def seconds(one: TracedOperation) -> float:
        return rates(one) * scale

    # The step of the optimizer is scaled as operations are.
    profile = replace(profile, memory_rate=profile.memory_rate / scale)
    setup = replace(alone, zero=ZeroConfig(stage=stage), num_ranks=num_ranks, ranks_per_node=num_ranks)
    program = program_of(trace, params_of(module, setup), setup, profile, seconds)
    latency = calibration.latency * calibration.crowding(num_ranks)
    return simulate_cluster(program, setup, profile, Latencies(latency, latency), HostSchedule()).seconds


def main() -> None:
    """Calibrate, simulate, measure, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="of each run")
    parser.add_argument("--turns", type=int, default=3, help="of everything")
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    asked = parser.parse_args()
    calibration, steps = measure(asked.steps, asked.turns)
    print(
        f"without exchanges: {', '.join(f'{num} ranks {step:.3f} s' for num, step in calibration.steps.items())}; "
        f"links: {1e6 * calibration.latency:.0f} us, {calibration.rate / 1e9:.2f} GB/s"
    )
    rows = []
    for num_ranks in RANKS:
        for stage in STAGES:
            simulated = simulated_step(calibration, stage, num_ranks)
            measured = steps[num_ranks, stage]
            row = {
                "ranks": num_ranks,
                "stage": stage,
                "shares_cores": num_ranks > num_cores(),
                "simulated_s": simulated,
                "measured_s": measured,
                "simulated_by_measured": simulated / measured,
            }
            rows.append(row)
            print(
                f"{num_ranks} ranks, stage {stage}: simulated {simulated:.3f} s, measured {measured:.3f} s, "
                f"{simulated / measured:.2f}"
            )
    report = json.dumps({"hardware": hardware(), "calibration": calibration.__dict__, "rows": rows})
    if asked.json is not None:
        asked.json.write_text(report + "\n")
    print(report)


if __name__ == "__main__":
    main()
