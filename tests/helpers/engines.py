"""Builds optimizer engines on the CPU without Lightning."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from lightning_superscale.comm.communicator import Communicator, single_rank
from lightning_superscale.config import OffloadConfig, ZenFlowConfig
from lightning_superscale.layout.rows import ParamSpec
from lightning_superscale.offload.engine import OffloadContext, engine_of
from lightning_superscale.offload.link.arena import HostArena
from lightning_superscale.offload.link.dtype import LinkDtype
from lightning_superscale.offload.link.link import CpuLink
from lightning_superscale.offload.memory import ParamKind
from lightning_superscale.offload.weight_flow.schedule import WeightFlow
from lightning_superscale.ops.cpu.pool import Pool, default_pool
from lightning_superscale.ops.state_dtypes import FP32_STATES, StateDtypes
from lightning_superscale.ops.update import UpdatePath, update_path
from lightning_superscale.optim.adamw_step import AdamWStep
from lightning_superscale.optim.bucketing import Grouping
from lightning_superscale.optim.engine import OptimizerEngine
from lightning_superscale.optim.mixed_step import MixedStep
from lightning_superscale.optim.unit_state import ResidentState
from lightning_superscale.zero.buckets.transport import BucketTransport
from tests.helpers.plans import take_turns


def offload_context(
    *,
    link: CpuLink | None = None,
    arena: HostArena | None = None,
    pool: Pool | None = None,
    link_dtype: LinkDtype = "weights",
    streams: bool = False,
    **config,
) -> OffloadContext:
    """What states and rules of an offload engine are made of, on the CPU."""
    pool = pool or default_pool()
    return OffloadContext(
        config=OffloadConfig(**config),
        link=link or CpuLink(),
        arena=arena or HostArena(),
        pool=pool,
        update=update_path(torch.device("cpu"), pool),
        device_update=update_path(torch.device("cpu"), pool),
        ranks=single_rank(),
        link_dtype=link_dtype,
        streams=streams,
    )


def host_bytes(
    engine: str,
    numel: int,
    dtype: torch.dtype,
    *,
    has_moments: bool = True,
    flows: bool = False,
    num_shares: int = 1,
    dtypes: StateDtypes = FP32_STATES,
    link_dtype: LinkDtype = "weights",
) -> int:
    """What an engine says that so many parameters take of the host."""
    kind = ParamKind(
        spec=ParamSpec("weight", (numel, 1)),
        weights=dtype,
        has_moments=has_moments,
        flows=flows,
        num_shares=num_shares,
        dtypes=dtypes,
        link_dtype=link_dtype,
        config=OffloadConfig(engine=engine),
    )
    return engine_of(engine).memory(kind).bytes("host", numel, num_shares)


def build_engine(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    is_offloaded: bool,
    is_streamed: bool = False,
    is_deferred: bool = False,
    unit_bytes: int = 2048,
    link: CpuLink | None = None,
    num_threads: int | None = None,
    error_if_nonfinite: bool = False,
    ranks: Communicator | None = None,
    no_sync: bool = True,
    on_device: frozenset[nn.Parameter] = frozenset(),
    flow: WeightFlow | None = None,
    link_dtype: LinkDtype = "weights",
    device_path: UpdatePath | None = None,
    zenflow: ZenFlowConfig | None = None,
    speculate: bool | str = "auto",
) -> OptimizerEngine:
    path = device_path or update_path(torch.device("cpu"), Pool(num_threads) if num_threads else None)
    name = "zenflow" if zenflow is not None else "superoffload" if is_deferred else "cpu"
    context = offload_context(
        link=link,
        pool=Pool(num_threads or 2),
        link_dtype=link_dtype,
        streams=is_streamed,
        engine=name,
        zenflow=zenflow,
        speculate=speculate,
    )
    context = dataclasses.replace(context, device_update=path, ranks=ranks or single_rank())
    chosen = engine_of(name)

    def make_native(own, guard):
        native = AdamWStep(own, guard, path.submit, scales_on_device=path.scales_on_device)
        host = native if name == "cpu" else chosen.make_step(own, guard, context)
        if name == "superoffload":
            take_turns(host.chooser)
        return MixedStep(own, guard, host=host, device=native)

    def make_state(unit, *, has_moments, is_on_device):
        if is_on_device or not (is_offloaded or is_deferred and has_moments):
            return ResidentState(unit, has_moments=has_moments)
        streamed = unit if unit.is_streamed else None
        maker = chosen if has_moments else engine_of("cpu")
        state = maker.make_state(unit, context, has_moments=has_moments, streamed=streamed)
        if streamed is not None:
            streamed.keep_in(state.flowing)
            flow.add(state.flowing)
        return state

    engine = OptimizerEngine(
        optimizer,
        fqn_of={param: fqn for fqn, param in module.named_parameters()},
        ranks=ranks or single_rank(),
        make_transport=lambda sink: BucketTransport(
            [],
            grouping=Grouping(unit_bytes, on_device=on_device, block_of={} if flow is None else flow.block_of),
            sink=sink,
            ranks=ranks or single_rank(),
            no_sync=no_sync,
            streams_to=torch.device("cpu"),
        ),
        make_state=make_state,
        make_native=make_native,
        error_if_nonfinite=error_if_nonfinite,
    )
    if is_streamed:
        engine.transport.stream()
    return engine
