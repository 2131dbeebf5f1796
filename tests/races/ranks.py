"""Runs over two ranks that the checker watches on each, with NCCL played over gloo."""

from __future__ import annotations

import gc
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch

from lightning_superscale.comm.mesh import build_mesh
from lightning_superscale.layout.mesh import MeshSpec
from lightning_superscale.offload.link.link import CudaLink
from tests.helpers import fsdp
from tests.offload.weight_flow.test_schedule import Stack, batches
from tests.races.cases import WAYS, Case, build_and_train, nothing, train
from tests.races.nccl import play_nccl
from tests.races.stand_in import playing
from tests.races.world import World

Run = Callable[[int, int, Case, Callable[[pytest.MonkeyPatch], None]], World]


def run_buckets(rank: int, num_ranks: int, case: Case, plant: Callable[[pytest.MonkeyPatch], None] = nothing) -> World:
    """Train in stage 1 or 2 as a case says."""
    world = World(case.queries)
    with playing(world), pytest.MonkeyPatch.context() as patch:
        play_nccl(patch, world)
        plant(patch)
        mesh = build_mesh(MeshSpec(shard=num_ranks), timedelta(seconds=30))
        # Ranks take the same branch.
        build_and_train(case, mesh, [x.abs() * (1 + rank) for x in batches(3, case.dtype)])
        gc.collect()
    return world


def run_sharded(rank: int, num_ranks: int, case: Case, plant: Callable[[pytest.MonkeyPatch], None] = nothing) -> World:
    """Train a stack of blocks in stage 3."""
    world = World(case.queries)
    with playing(world), pytest.MonkeyPatch.context() as patch:
        play_nccl(patch, world)
        plant(patch)
        how = fsdp.Case(None, None, is_offloaded=True, is_streamed=WAYS[case.way].get("is_streamed", False))
        model = Stack(4, dtype=case.dtype)
        engine, _ = fsdp.build(model, rank, num_ranks, how, link=CudaLink(torch.device("cpu")))
        train(case, model, engine, [x * (1 + rank) for x in batches(3, case.dtype)])
        del engine
        gc.collect()
    return world
