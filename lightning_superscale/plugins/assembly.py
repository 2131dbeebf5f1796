"""Joins the techniques for one run: engines over transports over states, from resolved configs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_superscale.config import OffloadConfig, ZeroConfig
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.offload.cpu_step import HostState, host_bytes
from lightning_superscale.offload.host_memory import HostArena, check_host_memory
from lightning_superscale.offload.link import Link, link_for
from lightning_superscale.ops.update import UpdatePath, update_path
from lightning_superscale.plan import ByteClass, ParallelPlan
from lightning_superscale.zero.buckets import BucketTransport
from lightning_superscale.zero.engine import OptimizerEngine
from lightning_superscale.zero.gates import PublishGates, is_compiled
from lightning_superscale.zero.ranks import single_rank
from lightning_superscale.zero.states import ResidentState, UnitState
from lightning_superscale.zero.units import ShardUnit

MIB = 2**20


@dataclass(slots=True)
class Assembly:
    """The running parts of one `fit()`.

    Attributes:
        engines: one per optimizer, in the order of `configure_optimizers`.
        link: the way to the host; None when nothing is offloaded.
    """

    module: nn.Module
    engines: dict[Optimizer, OptimizerEngine]
    gates: list[PublishGates]
    link: Link | None
    device: torch.device
    zero: ZeroConfig
    offload: OffloadConfig | None
    precision: str
    update: UpdatePath
    reasons: list[str] = field(default_factory=list)

    def enter_step(self) -> None:
        for gates in self.gates:
            gates.enter_step()

    def wait_all_published(self) -> None:
        for engine in self.engines.values():
            engine.transport.wait_all_published()

    def close(self) -> None:
        for gates in self.gates:
            gates.close()
        for engine in self.engines.values():
            engine.close()

    def plan(self) -> ParallelPlan:
        units = [unit for engine in self.engines.values() for unit in engine.transport.units]
        params = list(self.module.parameters())
        own = sorted({e.reason_not_native for e in self.engines.values() if e.reason_not_native is not None})
        return ParallelPlan(
            device=str(self.device),
            world_size=1,
            zero_stage=self.zero.stage,
            engine="resident" if self.offload is None else self.offload.engine,
            precision=self.precision,
            num_params=sum(p.numel() for p in params),
            num_trainable=sum(p.numel() for p in params if p.requires_grad),
            num_units=len(units),
            unit_bytes=_unit_bytes(self.zero, self.offload),
            cpu_threads=self.update.num_threads,
            kernel="its own code" if own else self.update.name,
            bytes=_byte_classes(self.module, self.engines.values(), self.offload is not None),
            reasons=[*self.reasons, *(f"the optimizer steps through its own code: {reason}" for reason in own)],
        )


def assemble(
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    *,
    device: torch.device,
    zero: ZeroConfig,
    offload: OffloadConfig | None,
    precision: str,
    error_if_nonfinite: bool,
    why_held: str | None,
    why_awaited: str | None,
) -> Assembly:
    """Build the engines of one run on this rank.

    Raises:
        SuperScaleError: nothing to train, an optimizer over foreign or shared parameters, parameters
            of a dtype that no engine steps, or too little host memory; before anything is changed.
    """
    fqn_of = {param: fqn for fqn, param in module.named_parameters()}
    _check_parameters(module, optimizers, fqn_of)
    link = None if offload is None else link_for(device)
    if offload is not None:
        check_host_memory(_host_bytes_needed(optimizers))
    where = torch.device("cpu") if offload is not None else device
    update = update_path(where, None if offload is None or offload.cpu_threads == "auto" else offload.cpu_threads)
    make_state = _state_maker(link, offload)
    ranks = single_rank()
    engines = {
        optimizer: OptimizerEngine(
            optimizer,
            fqn_of=fqn_of,
            ranks=ranks,
            make_transport=lambda sink: BucketTransport(
                [], unit_bytes=_unit_bytes(zero, offload), sink=sink, ranks=ranks
            ),
            make_state=make_state,
            submit_update=update.submit,
            error_if_nonfinite=error_if_nonfinite,
        )
        for optimizer in optimizers
        if any(param in fqn_of for group in optimizer.param_groups for param in group["params"])
    }
    if offload is not None and why_held is None:
        for engine in engines.values():
            engine.transport.stream()
    compiled = is_compiled(module)
    reasons = _reasons(offload, why_held, why_awaited, compiled)
    per_module = offload is not None and offload.engine == "superoffload" and why_held is None and not compiled
    gates = [PublishGates(module, e.transport, per_module=per_module) for e in engines.values() if offload is not None]
    return Assembly(module, engines, gates, link, device, zero, offload, precision, update, reasons)


def _reasons(
    offload: OffloadConfig | None, why_held: str | None, why_awaited: str | None, is_model_compiled: bool
) -> list[str]:
    """One sentence per choice, for `explain()`."""
    if offload is None:
        return ["masters and optimizer states are on the device: offload is None"]
    reasons = [f"the {offload.engine!r} engine steps on the host, synchronously in this version"]
    if why_held is None:
        reasons.append("gradients leave for the host during backward: nothing of yours reads param.grad")
    else:
        reasons.append(f"gradients stay in param.grad until the step: {why_held}")
    if why_awaited is not None:
        reasons.append(f"uploads are awaited right after the step: {why_awaited}")
    if is_model_compiled:
        reasons.append("uploads are awaited at the start of the training step: the model is compiled")
    return reasons


def _unit_bytes(zero: ZeroConfig, offload: OffloadConfig | None) -> int:
    return (zero.bucket_mb if offload is None else offload.bucket_mb) * MIB


def _state_maker(link: Link | None, offload: OffloadConfig | None) -> Callable[[ShardUnit, bool], UnitState]:
    if link is None or offload is None:
        return lambda unit, has_moments: ResidentState(unit, has_moments=has_moments)
    arena = HostArena()
    pin = offload.pin_memory
    return lambda unit, has_moments: HostState(unit, link, arena, has_moments=has_moments, is_pinned=pin)


def _check_parameters(module: nn.Module, optimizers: Sequence[Optimizer], fqn_of: dict[nn.Parameter, str]) -> None:
    name = type(module).__name__
    lazy = [fqn for param, fqn in fqn_of.items() if is_lazy(param)]
    if lazy:
        raise SuperScaleError(
            f"parameter {lazy[0]!r} has no shape yet. Run one batch through {name} in configure_model(), so that its "
            "lazy modules are initialised before the optimizer's memory is planned."
        )
    trainable = [fqn for param, fqn in fqn_of.items() if param.requires_grad]
    if not trainable:
        raise SuperScaleError(
            f"{name} has no trainable parameters: expected at least one with requires_grad=True, found "
            f"{len(fqn_of)} parameters, all frozen. Unfreeze what is to be trained, or use trainer.validate()."
        )
    owner: dict[nn.Parameter, int] = {}
    for number, optimizer in enumerate(optimizers):
        if type(optimizer).__name__ == "_MockOptimizer":
            continue
        for group_number, group in enumerate(optimizer.param_groups):
            for param in group["params"]:
                where = f"optimizer {number} ({type(optimizer).__name__}), parameter group {group_number}"
                if param not in fqn_of:
                    raise SuperScaleError(
                        f"{where} holds a parameter of shape {tuple(param.shape)} that {name} does not own. "
                        "Build the optimizer in configure_optimizers from self.parameters(), and register every "
                        "trained module as an attribute of the LightningModule."
                    )
                if param in owner and owner[param] != number:
                    raise SuperScaleError(
                        f"parameter {fqn_of[param]!r} is in optimizer {owner[param]} and in {where}. Give every "
                        "parameter to one optimizer: two would each keep a master of it."
                    )
                owner[param] = number
                if param.requires_grad and param.dtype not in (torch.float32, torch.bfloat16):
                    raise SuperScaleError(
                        f"trainable parameter {fqn_of[param]!r} is {param.dtype}; expected torch.float32 or "
                        "torch.bfloat16. Convert it, or freeze it."
                    )
    if owner and not any(param.requires_grad for param in owner):
        raise SuperScaleError(
            f"none of the {len(owner)} parameters that the optimizers of {name} hold is trainable; "
            f"trainable ones of the module are, for example, {', '.join(trainable[:3])}."
        )


def _host_bytes_needed(optimizers: Sequence[Optimizer]) -> int:
    return sum(
        host_bytes(param.numel(), param.dtype, has_moments=True)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for param in group["params"]
        if param.requires_grad
    )


def _byte_classes(module: nn.Module, engines: Iterable[OptimizerEngine], is_offloaded: bool) -> list[ByteClass]:
    """Bytes of this rank by class, counted from the tensors that exist."""
    pairs = [pair for engine in engines for pair in zip(engine.transport.units, engine.states, strict=True)]
    in_units = {param for unit, _ in pairs for param in unit.params}
    rows: dict[tuple[str, str], list[int]] = {}

    def add(name: str, tensor: torch.Tensor | None, count: int | None = None) -> None:
        if tensor is None:
            return
        row = rows.setdefault((name, str(tensor.dtype).removeprefix("torch.")), [0, 0])
        nbytes = (tensor.numel() if count is None else count) * tensor.element_size()
        row[1 if is_offloaded and name not in ("weights", "gradients", "frozen weights", "buffers") else 0] += nbytes

    for unit, state in pairs:
        add("weights", unit.params[0], unit.weight_numel)
        add("gradients", unit.params[0], unit.weight_numel)
        add("master weights", state.master)
        add("optimizer states", state.exp_avg)
        add("optimizer states", state.exp_avg_sq)
        if is_offloaded:
            add("transfer buffers", unit.params[0], unit.shard.shard_numel)
    for param in module.parameters():
        if param not in in_units:
            add("frozen weights", param)
    for buffer in module.buffers():
        add("buffers", buffer)
    return [ByteClass(name, dtype, device, host) for (name, dtype), (device, host) in rows.items()]
