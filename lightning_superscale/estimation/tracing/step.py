"""One training step on fake tensors: its operations, and the bytes that are alive at each moment.

[Note: Traced step] Forward and backward run on tensors that have shapes and no memory, so that a model of any size is
traced in seconds on any machine. Below autograd every operation is seen, those of backward and of recomputed blocks
too; a storage is alive from the operation that makes it until its last tensor is gone, as in a real step. Weights,
buffers and the batch exist before, and are counted apart. Temporary memory within an operation is not seen.
Tensors on the meta device are in host memory ([Note: Host tensors of a trace]), and not among these.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.estimation.tracing.operations import Phase, TracedOperation, traced
from lightning_superscale.torch_private import (
    FakeTensorMode,
    TorchDispatchMode,
    storage_id_of,
    tensors_of,
    tree_leaves,
    tree_map,
)

Loss = Callable[[nn.Module, Any], Tensor]
"""Gives a module's scalar loss of a batch."""


@dataclass(frozen=True, slots=True)
class MadeGradient:
    """The moment in which backward has made the gradient of a parameter.

    Attributes:
        fqn: the parameter's name from the root.
        place: index into `StepTrace.alive` of that moment.
        nbytes: bytes of the gradient.
        operation: number of operations before it.
    """

    fqn: str
    place: int
    nbytes: int
    operation: int = 0


@dataclass(slots=True)
class HostActivations:
    """What a step keeps of its activations in host memory.

    Attributes:
        nbytes: the most at a time.
        to_host, to_device: bytes that cross the link, in forward and in backward.
    """

    nbytes: int = 0
    to_host: int = 0
    to_device: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTrace:
    """One step of a model on one rank, without optimizer.

    Attributes:
        operations: in their order; those that only make views are left out.
        alive: bytes of activations, gradients and temporaries after each change; gradients are kept until the end.
        forward_end: index into `alive` of the end of forward.
        gradients: in the order in which backward makes them.
        batch_bytes: bytes of the batch.
        saved: bytes that each watched module's forward left for backward.
        first_use: index of the first operation of a phase that reads a parameter, by the phase and its name.
        on_host: activations in host memory.
    """

    operations: Sequence[TracedOperation]
    alive: Sequence[int]
    forward_end: int
    gradients: Sequence[MadeGradient]
    batch_bytes: int
    saved: Sequence[int] = ()
    first_use: Mapping[tuple[Phase, str], int] = field(default_factory=dict)
    on_host: HostActivations = field(default_factory=HostActivations)

    def flops(self, phase: Phase | None = None) -> int:
        """Floating-point operations of one phase, or of both; a multiplication and an addition are two."""
        return sum(one.flops for one in self.operations if phase in (None, one.phase))

    @property
    def model_flops(self) -> int:
        """Floating-point operations of forward and of the gradients that backward needs; none that it does again."""
        return sum(one.flops + one.gradient_flops for one in self.operations if one.phase == "forward")

    @property
    def activation_bytes(self) -> int:
        """Bytes alive when forward ends: what backward needs."""
        return self.alive[self.forward_end]


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records operations and live bytes.

    Args:
        known: tensors that exist before, whose memory is not counted.
        params: those of them whose first reads are noted, by name.
    """

    def __init__(self, known: Sequence[Tensor], params: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase: Phase = "forward"
        self.operations: list[TracedOperation] = []
        self.alive = [0]
        self.first_use: dict[tuple[Phase, str], int] = {}
        self._known = {storage_id_of(tensor.untyped_storage()) for tensor in known}
        self._param_of = {storage_id_of(param.untyped_storage()): fqn for fqn, param in params.items()}
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = op(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor) and not leaf.is_meta]
        makes = [self._see(leaf.untyped_storage()) for leaf in made]
        if any(makes) or op._schema.is_mutable:
            self._note_uses(args, kwargs)
            self.operations.append(traced(self.phase, op, args, kwargs or {}, results))
        return results

    def _note_uses(self, args: Any, kwargs: Any) -> None:
        """Note the parameters that the next operation reads, through a view of them too."""
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                fqn = self._param_of.get(storage_id_of(leaf.untyped_storage()))
                if fqn is not None:
                    self.first_use.setdefault((self.phase, fqn), len(self.operations))

    def _see(self, storage: torch.UntypedStorage) -> bool:
        """Count a storage; returns whether it is new."""
        key, nbytes = storage_id_of(storage), storage.nbytes()
        if key in self._known or key in self._watched:
            return False
        self._change(nbytes)

        def gone(_: object) -> None:
            del self._watched[key]
            self._change(-nbytes)

        self._watched[key] = weakref.ref(storage, gone)
        return True

    def _change(self, nbytes: int) -> None:
        self.alive.append(self.alive[-1] + nbytes)


def trace_step(
    module: nn.Module,
    batch: Any,
    loss: Loss,
    *,
    weights: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    watched: Sequence[nn.Module] = (),
) -> StepTrace:
    """Trace one step. The module is as before when it returns; its weights are neither read nor needed.

    Args:
        module: on any device, the meta device too.
        batch: any structure of tensors; only shapes and dtypes are used.
        loss: gives the scalar loss.
        weights: dtype of floating-point weights and buffers; None for those that the module has.
        autocast: dtype of `torch.autocast`; None for none.
        watched: modules of whose forward it is told what each leaves for backward.

    Raises:
        SuperScaleError: the step needs values, gives no scalar loss, or fails; names the reason.
    """
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        inputs = tree_map(lambda leaf: _fake(leaf, weights) if isinstance(leaf, Tensor) else leaf, batch)
        twins = stack.enter_context(_faked(module, weights))
        tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        recorder = _Recorder([*module.parameters(), *module.buffers(), *tensors], twins)
        made: list[MadeGradient] = []
        for fqn, twin in twins.items():
            if twin.requires_grad:
                note = functools.partial(_note_gradient, fqn, recorder, made)
                stack.callback(twin.register_post_accumulate_grad_hook(note).remove)  # type: ignore[no-untyped-call]
        saved = [stack.enter_context(_watching(part, recorder)) for part in watched]
        try:
            forward_end = _run(module, inputs, loss, recorder, autocast)
        except SuperScaleError:
            raise
        except Exception as error:
            raise SuperScaleError(
                f"one step of {type(module).__name__} could not be traced on tensors without values: "
                f"{type(error).__name__}: {error}. Expected a batch of the right shapes, and a step that reads no "
                "values, such as .item(), of its tensors."
            ) from error
        return StepTrace(
            operations=recorder.operations,
            alive=tuple(recorder.alive),
            forward_end=forward_end,
            gradients=made,
            batch_bytes=sum(tensor.nbytes for tensor in tensors),
            saved=[sum(seen) for seen in saved],
            first_use=recorder.first_use,
        )


def _run(module: nn.Module, inputs: Any, loss: Loss, recorder: _Recorder, autocast: torch.dtype | None) -> int:
    """Run the step; returns the index of the end of forward in `recorder.alive`."""
    with recorder, torch.enable_grad():
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            value: object = loss(module, inputs)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise SuperScaleError(
                f"a step of {type(module).__name__} gave {_shown(value)}; expected a scalar loss with a gradient. Pass "
                "loss=, a function of the module and the batch that gives it."
            )
        forward_end = len(recorder.alive) - 1
        recorder.phase = "backward"
        value.backward()  # type: ignore[no-untyped-call]
    return forward_end


def _shown(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"an object of type {type(value).__name__}"
    return f"a tensor of shape {tuple(value.shape)}{'' if value.requires_grad else ' without a gradient'}"


def _note_gradient(fqn: str, recorder: _Recorder, made: list[MadeGradient], param: Tensor) -> None:
    nbytes = 0 if param.grad is None else param.grad.untyped_storage().nbytes()
    made.append(MadeGradient(fqn, len(recorder.alive) - 1, nbytes, len(recorder.operations)))


@contextmanager
def _watching(module: nn.Module, recorder: _Recorder) -> Iterator[list[int]]:
    """While open, add to the list what each call of a module in forward leaves alive."""
    seen: list[int] = []
    before = 0

    def enter(*_: object) -> None:
        nonlocal before
        before = recorder.alive[-1]

    def leave(*_: object) -> None:
        if recorder.phase == "forward":
            seen.append(recorder.alive[-1] - before)

    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _faked(module: nn.Module, weights: torch.dtype | None) -> Iterator[dict[str, nn.Parameter]]:
    """While open, the module has parameters and buffers without memory; gives the parameters by name."""
    originals: list[tuple[MutableMapping[str, Any], str, Tensor]] = []
    twin_of: dict[Tensor, Tensor] = {}
    for part in module.modules():
        for tensors in tensors_of(part):
            originals += [(tensors, name, tensor) for name, tensor in tensors.items() if tensor is not None]
    try:
        for tensors, name, tensor in originals:
            if tensor not in twin_of:
                twin = _fake(tensor, weights)
                is_param = isinstance(tensor, nn.Parameter)
                twin_of[tensor] = nn.Parameter(twin, tensor.requires_grad) if is_param else twin
            tensors[name] = twin_of[tensor]
        yield dict(module.named_parameters())
    finally:
        for tensors, name, tensor in originals:
            tensors[name] = tensor


def _fake(tensor: Tensor, floating: torch.dtype | None) -> Tensor:
    """A tensor of this shape and memory format without memory, on the CPU as the trace sees it."""
    dtype = floating if floating is not None and tensor.is_floating_point() else tensor.dtype
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="cpu")
