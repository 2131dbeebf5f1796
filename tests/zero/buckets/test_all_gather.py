"""New weights from the host are gathered when forward needs them: the host's steps hide behind it on several ranks."""

from __future__ import annotations

import threading
from datetime import timedelta

import torch
from torch import nn

from lightning_superscale.comm.communicator import ranks_of
from lightning_superscale.comm.mesh import build_mesh
from lightning_superscale.layout.mesh import MeshSpec
from lightning_superscale.offload.link.link import CpuLink
from lightning_superscale.ops.events import Done
from lightning_superscale.zero.forward_gates import PublishGates
from tests.helpers.engines import build_engine
from tests.helpers.fsdp import DelayedLink
from tests.helpers.plain import PlainMasterAdamW
from tests.helpers.ranks import run_ranks

ADAMW = {"lr": 1e-2, "weight_decay": 0.1}
WAIT_S = 20.0


class GatedLink(CpuLink):
    """Holds uploads of one size until it is told to go on."""

    def __init__(self, held_numel: int) -> None:
        super().__init__()
        self.may_go = threading.Event()
        self.held_numel = held_numel
        self.outcomes: list[bool] = []
        self.is_armed = False

    def h2d(self, dst, src, after=None):
        if self.is_armed and dst.numel() == self.held_numel:
            self.outcomes.append(self.may_go.wait(WAIT_S))
        super().h2d(dst, src).wait()
        return Done(None)


class Branches(nn.Module):
    """Two layers, of which a rank may skip the second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(16, 16, bias=False, dtype=torch.bfloat16)
        self.second = nn.Linear(16, 32, bias=False, dtype=torch.bfloat16)

    def forward(self, x, *, with_second=True):
        hidden = self.first(x)
        return self.second(hidden) if with_second else hidden


def batch(step: int, rank: int) -> torch.Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(10 * step + rank)).to(torch.bfloat16)


def build(world_size: int, link=None):
    model = Branches()
    ranks = ranks_of(build_mesh(MeshSpec(shard=world_size), timedelta(seconds=30)), model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    engine = build_engine(
        model,
        optimizer,
        is_offloaded=True,
        is_streamed=True,
        is_deferred=True,
        unit_bytes=1,
        ranks=ranks,
        link=link,
        no_sync=False,
    )
    return model, optimizer, engine, PublishGates(model, engine.transport, per_module=True)


def is_skipped(step: int, rank: int) -> bool:
    return step % 3 == 1 and rank == step % 2


def _with_branches(rank: int, world_size: int) -> list[torch.Tensor]:
    model, optimizer, engine, gates = build(world_size, DelayedLink())  # no row is there before it is waited for
    for step in range(8):
        gates.enter_step()
        optimizer.zero_grad()
        # Ranks reduce each micro-batch: one that skipped a module meets one that still waits for its weights.
        with engine.transport.blocked():
            model(batch(step, rank), with_second=not is_skipped(step, rank)).float().pow(2).mean().backward()
        model(batch(100 + step, rank)).float().pow(2).mean().backward()
        engine.step()
    engine.transport.wait_all_published()
    gates.close()
    engine.close()
    return [p.detach().float() for p in model.parameters()]


def test_ranks_that_skip_a_module_neither_hang_nor_miss_its_weights():
    results = run_ranks(2, _with_branches, limit_s=60)
    plain = Branches()
    oracle = PlainMasterAdamW(plain.parameters(), **ADAMW)
    for step in range(8):
        sums = [None, None]
        for micro in (step, 100 + step):
            grads = []
            for rank in range(2):
                oracle.zero_grad()
                skips = micro < 100 and is_skipped(step, rank)
                plain(batch(micro, rank), with_second=not skips).float().pow(2).mean().backward()
                grads.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in plain.parameters()])
            for i in range(2):
                # As the reduction does: halves in bf16 (exact), summed in fp32 in rank order, rounded once.
                mean = sum((g[i] * 0.5).float() for g in grads).bfloat16()
                sums[i] = mean if sums[i] is None else sums[i] + mean
        for param, grad in zip(plain.parameters(), sums, strict=True):
            param.grad = grad
        oracle.step()
    for result in results:
        for found, expected in zip(result, plain.parameters(), strict=True):
            assert torch.equal(found, expected.detach().float())


def _held_until_forward(rank: int, world_size: int) -> list[bool]:
    held_numel = 16 * 32 // world_size
    link = GatedLink(held_numel)
    model, optimizer, engine, gates = build(world_size, link)
    model.first.register_forward_hook(lambda *_: link.may_go.set() if link.is_armed else None)
    for step in range(4):
        gates.enter_step()
        optimizer.zero_grad()
        model(batch(step, rank)).float().pow(2).mean().backward()
        # The gates have seen every module by now: the next forward waits at each, not at the root.
        link.is_armed = step == 2
        engine.step()
    link.is_armed = False
    engine.transport.wait_all_published()
    gates.close()
    engine.close()
    return link.outcomes


def test_the_host_still_steps_the_last_layer_when_every_rank_is_in_its_next_forward():
    assert run_ranks(2, _held_until_forward, limit_s=60) == [[True], [True]]
