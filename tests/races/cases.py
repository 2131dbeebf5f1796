"""Training runs that the checker watches: every engine, with weights that stay or flow, and every backward program."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from lightning_superscale.comm.communicator import ranks_of
from lightning_superscale.comm.mesh import DataMesh, single_mesh
from lightning_superscale.config import ZenFlowConfig
from lightning_superscale.offload.link.dtype import LinkDtype
from lightning_superscale.offload.link.link import CudaLink
from lightning_superscale.offload.weight_flow.schedule import WeightFlow
from lightning_superscale.ops.reference import adamw_commit
from lightning_superscale.ops.update import UpdatePath, _beside_norms
from lightning_superscale.optim.bucketing import Grouping
from lightning_superscale.optim.clipping import ClipByNorm
from lightning_superscale.optim.engine import OptimizerEngine
from lightning_superscale.optim.rebuild_buckets import regroup
from lightning_superscale.zero.forward_gates import PublishGates
from tests.helpers.engines import build_engine
from tests.helpers.programs import PROGRAMS, Programs
from tests.offload.weight_flow.test_schedule import ADAMW, PARTS, Stack, batches, close, enter, flow_of
from tests.races.stand_in import playing
from tests.races.world import World

WAYS = {
    "cpu, held": {},
    "cpu": {"is_streamed": True},
    "superoffload, held": {"is_deferred": True},
    "superoffload": {"is_streamed": True, "is_deferred": True},
}
OFTEN = ZenFlowConfig(topk=0.3, update_interval=2, select_interval=2)
# These keep weights on the device.
ZENFLOW_WAYS = {
    "zenflow, held": {"zenflow": OFTEN},
    "zenflow": {"is_streamed": True, "zenflow": OFTEN},
    "zenflow, one step late": {"is_streamed": True, "zenflow": ZenFlowConfig(topk=0.5, update_interval=1)},
    "zenflow, at once": {"is_streamed": True, "zenflow": replace(OFTEN, overlap=False)},
    "zenflow, sums on the device": {"is_streamed": True, "zenflow": replace(OFTEN, accumulate_on="device")},
}


def train_stack(model: nn.Module, x: Tensor) -> None:
    model.loss(x).backward()


# A kernel that steps on the device, of torch's operations.
ON_DEVICE = UpdatePath("device", lambda segments: _beside_norms(adamw_commit, segments), 0, scales_on_device=True)


@dataclass(frozen=True)
class Case:
    """One run on one rank.

    Attributes:
        way: a key of WAYS.
        flows: whether weights flow.
        no_sync: whether ranks reduce once per step, and not once per batch.
        regroups: whether parameters move to other units after the first step, and half of them to the device.
        has_two_batches: whether a step has a second batch, the first one's negative.
        looks: whether user code reads weights and moments after each step, and zeroes gradients in place.
        queries: what events answer about work that is under way; see `World`.
    """

    way: str
    program: Callable[[nn.Module, Tensor], None] = train_stack
    flows: bool = False
    link_dtype: LinkDtype = "weights"
    dtype: torch.dtype = torch.float32
    clip: float | None = 1e-3
    looks: bool = False
    no_sync: bool = True
    unit_bytes: int = 2048
    has_two_batches: bool = False
    regroups: bool = False
    queries: str = "random"

    def __str__(self) -> str:
        flow = "flow" if self.flows else "stay"
        dtype = str(self.dtype).removeprefix("torch.")
        looks = "-looks" if self.looks else "-regroups" if self.regroups else ""
        return f"{self.way}-{self.program.__name__}-{flow}-{self.link_dtype}-{dtype}-{self.clip}-{self.queries}{looks}"


def all_cases() -> Iterator[Case]:
    for way, program, clip, queries in itertools.product(
        WAYS, (train_stack, *PROGRAMS), (None, 1e-3), ("random", "yes", "no")
    ):
        for flows, link_dtype, dtype in (
            (False, "weights", torch.float32),
            (False, "weights", torch.bfloat16),
            (False, "fp32", torch.bfloat16),
            (True, "weights", torch.float32),
            (True, "weights", torch.bfloat16),
        ):
            yield Case(way, program, flows, link_dtype, dtype, clip, queries)


def _look(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read between steps what user code may read."""
    for state in optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq"):
            (state[key] + 1.0).sum()
    for param in model.parameters():
        param.detach().sum()


def nothing(patch: pytest.MonkeyPatch) -> None:
    """Plants no bug."""


def run(case: Case, *, plant: Callable[[pytest.MonkeyPatch], None] = nothing) -> World:
    """Train as a case says; returns what was seen.

    Args:
        plant: puts a bug into the package.
    """
    world = World(case.queries)
    with playing(world), pytest.MonkeyPatch.context() as patch:
        plant(patch)
        build_and_train(case, single_mesh(), batches(6 if case.way in ZENFLOW_WAYS else 3, case.dtype))
        gc.collect()  # host buffers are unmapped while the checker looks
    return world


def build_and_train(case: Case, mesh: DataMesh, inputs: Sequence[Tensor]) -> None:
    """Build what a case says, with buckets over the mesh's ranks, and train it."""
    model = Stack(4, dtype=case.dtype) if case.program is train_stack else Programs(case.dtype)
    flow = flow_of(model, None if case.program is train_stack else PARTS) if case.flows else None
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
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
        **{**WAYS, **ZENFLOW_WAYS}[case.way],
    )
    train(case, model, engine, inputs, flow)


def train(
    case: Case, model: nn.Module, engine: OptimizerEngine, inputs: Sequence[Tensor], flow: WeightFlow | None = None
) -> None:
    """Train in the order in which a Trainer does, and close."""
    optimizer = engine.optimizer
    is_gated = flow is None and all(unit.has_whole_weights for unit in engine.transport.units)  # FSDP2 has its own
    gates = PublishGates(model, engine.transport, per_module=True) if is_gated else None
    for x in inputs:
        if gates is not None:
            gates.enter_step()
        elif flow is not None:
            enter(engine, flow)
        if case.has_two_batches:
            with engine.transport.blocked():
                case.program(model, -x)
        case.program(model, x)
        if flow is not None:
            flow.rest()
        if case.clip is not None:
            engine.request_clip(ClipByNorm(case.clip))
        engine.step()
        if case.regroups and x is inputs[0]:
            params = [param for _, param in engine.named_params()]
            regroup(engine, Grouping(512, on_device=frozenset(params[: len(params) // 2])))
        optimizer.zero_grad(set_to_none=not case.looks)
        if case.looks:
            _look(model, optimizer)
    if flow is not None:
        close(engine, flow)
        return
    engine.is_torn = False
    engine.transport.wait_all_published()
    if gates is not None:
        gates.close()
    engine.close()
