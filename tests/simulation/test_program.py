"""The program of a rank: what it exchanges equals what real ranks counted; where its pieces are cut."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

import lightning_superscale as lss
from lightning_superscale.config import OffloadConfig, SequenceConfig, ZeroConfig
from lightning_superscale.estimation.devices import PROFILES
from lightning_superscale.estimation.links import Kind, Latencies
from lightning_superscale.estimation.memory import params_of
from lightning_superscale.estimation.peak import units_of
from lightning_superscale.estimation.setup import Setup
from lightning_superscale.estimation.step_time import roofline
from lightning_superscale.estimation.tracing.inputs import loss_of
from lightning_superscale.estimation.tracing.step import trace_step
from lightning_superscale.estimation.tracing.techniques import techniques_of
from lightning_superscale.layout.rows import align_up
from lightning_superscale.offload.planner.forecast import HostSchedule
from lightning_superscale.run.precision import choose
from lightning_superscale.simulation.cluster import simulate_cluster
from lightning_superscale.simulation.program import program_of
from tests.estimation.test_memory import WIDTH, Blocks
from tests.helpers.ranks import run_ranks
from tests.helpers.sequence import LanguageModel, Texts
from tests.helpers.trainers import trainer

pytest.importorskip("simpy")

PROFILE = PROFILES["H100 SXM"]
KINDS = get_args(Kind)


class _Counts(L.Callback):
    """Keeps the mesh's counters beyond the end of a run."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.counts = trainer.strategy.run.environment.mesh.counts


def _module(way: dict) -> L.LightningModule:
    return LanguageModel() if "sequence" in way else Blocks()


def _data(way: dict):
    return Texts() if "sequence" in way else torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(1))


def counted(rank: int, world_size: int, ways: list[dict]) -> list[tuple[dict, dict]]:
    """One step's collectives and their bytes by kind: a half of those of four steps less those of two."""
    found = []
    for way in ways:
        totals = []
        for num_steps in (2, 4):
            counts = _Counts()
            run = trainer(
                lss.SuperScaleStrategy(**way),
                devices=world_size,
                callbacks=[counts],
                precision="bf16-true",
                limit_train_batches=num_steps,
                max_epochs=1,
            )
            run.fit(_module(way), DataLoader(_data(way), 2))
            totals.append((dict(counts.counts.calls), dict(counts.counts.nbytes)))
        (calls, nbytes), (all_calls, all_nbytes) = totals
        halves = [
            {kind: (after.get(kind, 0) - before.get(kind, 0)) / 2 for kind in KINDS}
            for before, after in ((calls, all_calls), (nbytes, all_nbytes))
        ]
        found.append(tuple({kind: count for kind, count in half.items() if count} for half in halves))
    return found


def program(way: dict, num_ranks: int):
    """The simulated step of a way, and its setup."""
    setup = Setup(
        zero=way["zero"],
        offload=way.get("offload"),
        precision=choose("bf16-true"),
        sequence=way.get("sequence"),
        num_ranks=num_ranks,
        ranks_per_node=num_ranks,
    )
    module = _module(way)
    batch = next(iter(DataLoader(_data(way), 2)))
    with techniques_of(module, setup.sequence, setup.zero) as techniques:
        loss = LanguageModel.loss if "sequence" in way else loss_of(module)
        trace = trace_step(module, batch, techniques.around(loss), weights=torch.bfloat16)
    return program_of(trace, params_of(module, setup), setup, PROFILE, roofline(PROFILE)), setup


WAYS = {
    "zero0": {"zero": ZeroConfig()},
    "zero1": {"zero": ZeroConfig(stage=1)},
    "zero2": {"zero": ZeroConfig(stage=2)},
    "zero3": {"zero": ZeroConfig(stage=3)},
    "hybrid": {"zero": ZeroConfig(stage=1, shard_size=2)},
    "cpu": {"zero": ZeroConfig(stage=2), "offload": OffloadConfig(engine="cpu", bucket_mb=1, gpu_fraction=0.0)},
    **{
        mode: {"zero": ZeroConfig(stage=1), "sequence": SequenceConfig(size=2, mode=mode, check_batches=0)}
        for mode in ("ulysses", "ring", "allgather")
    },
}


def padding(way: dict, num_ranks: int) -> int:
    """Bytes between and after slices of one rank's rows, which a gather of weights on the device leaves out on gloo."""
    setup = program(way, num_ranks)[1]
    if "offload" in way or setup.num_shards == 1:
        return 0
    gaps = 0
    for unit in units_of(params_of(_module(way), setup), setup, {}):
        if not unit[0].is_gathered:
            rows = [param.shard_numel(setup.num_shards) for param in unit]
            gaps += unit[0].dtype.itemsize * sum(align_up(numel) - numel for numel in rows)
    return gaps


def check(names: list[str], num_ranks: int) -> None:
    ways = [WAYS[name] for name in names]
    for name, way, (calls, nbytes) in zip(names, ways, run_ranks(num_ranks, counted, ways)[0], strict=True):
        traffic = simulate_cluster(*program(way, num_ranks), PROFILE, Latencies(), HostSchedule()).record.traffic
        if name == "allgather":  # its gradients are sent as an all-to-all, and counted as the reduce-scatter they are
            for counts in (traffic.calls, traffic.nbytes):
                counts["reduce_scatter"] += counts.pop("all_to_all")
        gaps = padding(way, num_ranks)
        simulated = {kind: count - gaps * (kind == "all_gather") for kind, count in traffic.nbytes.items()}
        assert (traffic.calls, simulated) == (calls, nbytes), name


def test_two_ranks_exchange_what_real_ones_do():
    check([*WAYS], 2)


def test_four_ranks_exchange_what_real_ones_do():
    check(["zero0", "hybrid", "zero3"], 4)


def test_pieces_are_cut_where_they_wait():
    found, _ = program(WAYS["zero3"], 2)
    passes = found.forward, found.backward
    needed = [[index for piece in pieces for index in piece.needs] for pieces in passes]
    gathered = [index for index, unit in enumerate(found.units) if unit.is_gathered]
    assert sorted(needed[0]) == [*range(len(found.units))]
    assert sorted(needed[1]) == gathered
    completed = [index for piece in found.backward for index in piece.completes]
    assert completed == [index for index, unit in enumerate(found.units) if unit.reduced_bytes]
    assert found.forward_order == needed[0]


def test_ranks_that_share_tokens_share_the_work():
    way = WAYS["ulysses"]
    shared, whole = program(way, 2)[0], program({**way, "sequence": None}, 2)[0]
    kinds = [exchange.kind for piece in (*shared.forward, *shared.backward) for exchange in piece.exchanges]
    assert kinds.count("all_to_all") == 8
    assert set(kinds) == {"all_to_all", "all_reduce"}
    # Blocks that are recomputed keep what they got from other ranks.
    recomputed = {**way, "sequence": replace(way["sequence"], checkpoint_blocks=True, tile_loss=True)}
    again = program(recomputed, 2)[0]
    assert sorted(one.kind for piece in (*again.forward, *again.backward) for one in piece.exchanges) == sorted(kinds)
    assert again.seconds() > shared.seconds()
    assert not any(piece.exchanges for piece in (*whole.forward, *whole.backward))
