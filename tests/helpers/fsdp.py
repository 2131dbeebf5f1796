"""ZeRO-3 engines on real ranks, and the same training in one process."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

import torch
from torch import nn

from lightning_superscale.comm.communicator import ranks_of
from lightning_superscale.comm.mesh import build_mesh
from lightning_superscale.layout.mesh import MeshSpec
from lightning_superscale.offload.engine import engine_of
from lightning_superscale.offload.link.link import CpuLink
from lightning_superscale.ops.update import update_path
from lightning_superscale.optim.adamw_step import AdamWStep
from lightning_superscale.optim.bucketing import Grouping
from lightning_superscale.optim.clipping import ClipByNorm
from lightning_superscale.optim.engine import OptimizerEngine
from lightning_superscale.optim.unit_state import ResidentState
from lightning_superscale.zero.fsdp2.gather_order import GatherOrder
from lightning_superscale.zero.fsdp2.shard import ShardingPolicy, shard_module
from lightning_superscale.zero.fsdp2.transport import Fsdp2Transport
from tests.helpers.engines import offload_context
from tests.helpers.plain import PlainMasterAdamW

ADAMW = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)}


class DelayedLink(CpuLink):
    """Uploads happen only when somebody waits for them."""

    def h2d(self, dst, src, after=None):
        self.bytes.h2d += src.numel() * src.element_size()
        return _Delayed(dst, src)


class _Delayed:
    def __init__(self, dst, src) -> None:
        self._copy = (dst, src)
        self._is_done = False

    def is_waitable(self) -> bool:
        return self._is_done

    def wait(self) -> None:
        if not self._is_done:
            self._copy[0].copy_(self._copy[1])
            self._is_done = True

    synchronize = wait


@dataclass
class Case:
    """One training, on ranks and in one process.

    Attributes:
        make: builds the model, the same on every rank.
        program: forward and backward of one micro-batch on one rank; leaves gradients behind.
        num_micro: micro-batches per step.
        is_one_delta: a step's gradient is summed in the oracle's order when it is streamed.
        is_averaged: gradients are averaged into `param.grad` before the step.
    """

    make: object
    program: object
    shape: tuple = (6, 12)
    num_steps: int = 5
    num_micro: int = 1
    no_sync: bool = True
    is_offloaded: bool = False
    max_norm: float | None = None
    policy: ShardingPolicy = field(default_factory=ShardingPolicy)
    dtype: torch.dtype = torch.float32
    is_one_delta: bool = True
    is_streamed: bool = True
    is_averaged: bool = False


def batch(case: Case, step: int, micro: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    return torch.randn(*case.shape, generator=generator).to(case.dtype)


def build(model, rank, world_size, case, *, optimizer=None, **how):
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAMW)
    engines, sharded = build_all(model, rank, world_size, case, [optimizer], **how)
    return engines[0], sharded


def build_all(model, rank, world_size, case, optimizers, *, store=None, shard_size=None, watch=None, link=None):
    mesh = build_mesh(
        MeshSpec(replicate=world_size // (shard_size or world_size), shard=shard_size or world_size),
        timedelta(seconds=60),
        watch,
    )
    order = GatherOrder(store, rank, world_size, patience_s=5.0, watch=watch)
    sharded = shard_module(model, optimizers, mesh, torch.device("cpu"), order, case.policy)
    ranks = ranks_of(mesh, model.parameters())
    is_deferred = case.is_offloaded and case.is_streamed
    context = offload_context(link=link or DelayedLink(), streams=case.is_streamed)
    chosen = engine_of("superoffload" if is_deferred else "cpu")

    def make_state(unit, *, has_moments, is_on_device):
        if not case.is_offloaded:
            return ResidentState(unit, has_moments=has_moments)
        maker = chosen if has_moments else engine_of("cpu")
        return maker.make_state(unit, context, has_moments=has_moments, streamed=None)

    def make_native(optimizer, guard):
        if case.is_offloaded:
            return chosen.make_step(optimizer, guard, context)
        return AdamWStep(optimizer, guard, update_path(torch.device("cpu")).submit)

    engines = [
        OptimizerEngine(
            optimizer,
            fqn_of={param: fqn for fqn, param in model.named_parameters()},
            ranks=ranks,
            make_transport=lambda sink: Fsdp2Transport(
                sharded, sink=sink, ranks=ranks, grouping=Grouping(2048), no_sync=case.no_sync
            ),
            make_state=make_state,
            make_native=make_native,
        )
        for optimizer in optimizers
    ]
    for engine in engines:
        if case.is_streamed:
            engine.transport.stream()
    return engines, sharded


def train_sharded(case: Case, rank: int, world_size: int, **how):
    """Returns the model after close(), its weights' names, and the packed optimizer state (whole on rank 0)."""
    model = case.make()
    engine, sharded = build(model, rank, world_size, case, **how)
    for step in range(case.num_steps):
        for micro in range(case.num_micro):
            x = batch(case, step, micro, rank)
            if micro < case.num_micro - 1:
                with engine.transport.blocked():
                    case.program(model, x)
            else:
                case.program(model, x)
        if case.is_averaged:
            engine.transport.average_grads()
        if case.max_norm is not None:
            engine.request_clip(ClipByNorm(case.max_norm))
        engine.step()
        engine.optimizer.zero_grad()
    engine.transport.wait_all_published()
    state = engine.state_dict()["state"]
    engine.close()
    return model, sharded, state


def rank_averages(case: Case, model: nn.Module, step: int, world_size: int) -> list[torch.Tensor | None]:
    """Every rank's gradients of one step, scaled and summed in rank order, in one process."""
    per_rank = []
    for rank in range(world_size):
        rounds = []
        for micro in range(case.num_micro):
            if not case.no_sync or micro == 0:
                model.zero_grad()
            case.program(model, batch(case, step, micro, rank))
            rounds.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        per_rank.append(rounds if not case.no_sync else rounds[-1:])
    model.zero_grad()
    averages: list[torch.Tensor | None] = []
    for i, _ in enumerate(model.parameters()):
        total = None
        for round_ in range(len(per_rank[0])):
            grads = [per_rank[rank][round_][i] for rank in range(world_size)]
            if all(g is None for g in grads):
                continue
            scaled = [torch.zeros_like(_) if g is None else g * (1.0 / world_size) for g in grads]
            mean = scaled[0].float()
            for g in scaled[1:]:
                mean = mean + g
            mean = mean.to(_.dtype)
            total = mean if total is None else total + mean
        averages.append(total)
    return averages


def train_plain(case: Case, world_size: int):
    model = case.make()
    params = list(model.parameters())
    oracle = PlainMasterAdamW([p for p in params if p.requires_grad], max_norm=case.max_norm, **ADAMW)
    for step in range(case.num_steps):
        for param, grad in zip(params, rank_averages(case, model, step, world_size), strict=True):
            param.grad = grad
        oracle.step()
        oracle.zero_grad()
    return model, oracle


# Sums in another order differ by 2**-23 of a gradient, which AdamW divides out but for the rounding of each step's
# weight: 5 steps of half an ulp of weights below 2, and as much again for the updates.
TOLERANCE = 2 * 5 * 2**-24


def assert_equals_plain(case: Case, rank: int, world_size: int, **how):
    """Weights on every rank, and moments and masters on rank 0: bits, or a tolerance where sums differ in order."""
    # A norm over shards rounds once per rank where the oracle's rounds once per parameter.
    is_exact = (case.is_one_delta or not case.is_streamed) and case.max_norm is None
    model, _, state = train_sharded(case, rank, world_size, **how)
    plain, oracle = train_plain(case, world_size)
    assert all(type(p) is nn.Parameter for p in model.parameters())
    for (name, param), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert param.shape == expected.shape, name
        if is_exact:
            assert torch.equal(param, expected), f"{name} differs by {(param - expected).abs().max()}"
        else:
            torch.testing.assert_close(param, expected, rtol=0, atol=TOLERANCE, msg=name)
    if rank == 0 and is_exact:
        for i, master in enumerate(oracle.masters):
            own, expected = state.get(i, {}), oracle.optimizer.state.get(master, {})
            for key, value in expected.items():
                assert torch.equal(own[key].reshape(value.shape), value), f"{key} of {i}"
            if expected and "master_param" in own:
                assert torch.equal(own["master_param"].reshape(master.shape), master), f"master of {i}"
