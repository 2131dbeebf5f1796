"""Runs over two ranks that the checker watches on each, with NCCL played over gloo."""

from __future__ import annotations

import gc
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch

from lightning_superscale.comm.communicator import ranks_of
from lightning_superscale.comm.mesh import build_mesh
from lightning_superscale.layout.mesh import MeshSpec
from lightning_superscale.offload.link.link import CudaLink
from tests.helpers import fsdp
from tests.helpers.engines import build_engine
from tests.races.cases import ADAMW, ON_DEVICE, WAYS, Case, batches, flow_of_case, model_of, train
from tests.races.nccl import play_nccl
from tests.races.stand_in import playing
from tests.races.world import World

Run = Callable[[int, int, Case, Callable[[pytest.MonkeyPatch], None]], World]


def nothing(patch: pytest.MonkeyPatch) -> None:
    """Plants no bug."""


def run_buckets(
    rank: int,
    num_ranks: int,
    case: Case,
    plant: Callable[[pytest.MonkeyPatch], None] = nothing,
    num_steps: int = 3,
) -> World:
    """Train in stage 1 or 2 as a case says."""
    world = World(case.queries)
    with playing(world), pytest.MonkeyPatch.context() as patch:
        play_nccl(patch, world)
        plant(patch)
        model = model_of(case)
        mesh = build_mesh(MeshSpec(shard=num_ranks), timedelta(seconds=30))
        optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
        flow = flow_of_case(case, model)
        engine = build_engine(
            model,
            optimizer,
            is_offloaded=True,
            link=CudaLink(torch.device("cpu")),
            link_dtype=case.link_dtype,
            flow=flow,
            ranks=ranks_of(mesh, model.parameters()),
            no_sync=case.no_sync,
            unit_bytes=case.unit_bytes,
            device_path=ON_DEVICE,
            **WAYS[case.way],
        )
        inputs = [x.abs() * (1 + rank) for x in batches(num_steps, case.dtype)]  # ranks take the same branch
        train(case, model, optimizer, engine, flow, inputs)
        del engine, flow, optimizer
        gc.collect()
    return world


def run_sharded(rank: int, num_ranks: int, case: Case, plant: Callable[[pytest.MonkeyPatch], None] = nothing) -> World:
    """Train in stage 3."""
    world = World(case.queries)
    with playing(world), pytest.MonkeyPatch.context() as patch:
        play_nccl(patch, world)
        plant(patch)
        how = fsdp.Case(None, None, is_offloaded=True, is_streamed=WAYS[case.way].get("is_streamed", False))
        model = model_of(case)
        engine, _ = fsdp.build(model, rank, num_ranks, how, link=CudaLink(torch.device("cpu")))
        train(case, model, engine.optimizer, engine, None, [x * (1 + rank) for x in batches(3, case.dtype)])
        del engine
        gc.collect()
    return world
