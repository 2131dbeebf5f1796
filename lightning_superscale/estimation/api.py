"""`estimate()`: will it fit, and how fast, for each strategy, from a model that needs no memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Optional, Union

from torch import nn

from lightning_superscale.config import (
    OffloadConfig,
    SequenceConfig,
    ZeroConfig,
    resolve_offload,
    resolve_sequence,
    resolve_zero,
)
from lightning_superscale.config.values import PositiveInt, check_arguments
from lightning_superscale.estimation.candidates import Candidate, candidates
from lightning_superscale.estimation.devices import THIS_MACHINE, DeviceProfile, profile_named, with_memory
from lightning_superscale.estimation.limits import largest_params, longest_sequence
from lightning_superscale.estimation.memory import activations_class, byte_classes, params_of
from lightning_superscale.estimation.peak import Moment, device_peak, fit_states
from lightning_superscale.estimation.result import Estimate, StrategyEstimate
from lightning_superscale.estimation.setup import Setup
from lightning_superscale.estimation.step_time import Seconds, roofline, step_time
from lightning_superscale.estimation.this_machine import MeasuredOperations, measure_profile
from lightning_superscale.estimation.tracing.inputs import batch_for, count_tokens, loss_of, parse_bytes, takes_tokens
from lightning_superscale.estimation.tracing.step import Loss, StepTrace, trace_step
from lightning_superscale.estimation.tracing.techniques import TracedTechniques, techniques_of
from lightning_superscale.run.environment import mesh_spec_of
from lightning_superscale.run.precision import PrecisionChoices, choose
from lightning_superscale.run.report.plan import format_bytes
from lightning_superscale.zero.fsdp2.wrap import blocks_with_own_params

# Share of the device's memory that a step may take: the rest is the context's, and lies between allocations.
USABLE = 0.92
_LENGTHS = (1, 4, 8, 16)  # times the sequence that is asked for


def estimate(  # noqa: PLR0913 # a user names what matters, and nothing else
    model: nn.Module,
    *,
    devices: PositiveInt = 1,
    num_nodes: PositiveInt = 1,
    zero: Union[int, ZeroConfig, Mapping[str, Any], None] = None,
    offload: Union[str, OffloadConfig, Mapping[str, Any], None] = None,
    sequence: Union[int, SequenceConfig, Mapping[str, Any], None] = None,
    precision: str = "bf16-true",
    device: str = "H100 SXM",
    device_memory: Union[int, str, None] = None,
    host_memory: Union[int, str, None] = None,
    batch: Any = None,
    batch_size: PositiveInt = 1,
    sequence_length: PositiveInt = 2048,
    accumulate_grad_batches: PositiveInt = 1,
    loss: Optional[Loss] = None,
) -> Estimate:
    """Predict memory and time of training a model, before there is a machine for it.

    Forward and backward are traced on tensors without memory, so that a model of any size takes seconds, on any
    machine, and the meta device will do. One process calls it by itself.

    Args:
        model: a LightningModule, a Hugging Face model or any module. Its weights are not read.
        devices, num_nodes: as the Trainer takes them.
        zero, offload: as SuperScaleStrategy takes them; with both None every strategy is estimated.
        sequence: as SuperScaleStrategy takes it, for every strategy. Where it does not say whether blocks are
            recomputed, both are estimated.
        precision: the Trainer's.
        device: name of a profile, or "this machine", which is measured.
        device_memory, host_memory: bytes for each device, or a size such as "80GiB"; None takes the profile's.
        batch: one rank's batch, whole samples also where ranks share their sequences: tensors of the right shapes and
            dtypes. None makes tokens for a Hugging Face model, and takes `example_input_array` of others.
        batch_size, sequence_length: of these tokens.
        accumulate_grad_batches: such batches in one step, as the Trainer takes it.
        loss: gives the scalar loss of the module and a batch; None takes `training_step`, the loss of a Hugging Face
            model, or the sum of an output.

    Raises:
        SuperScaleError: an argument that can't be used, or a step that can't be traced; says what to pass.
    """
    numbers = {"devices": devices, "num_nodes": num_nodes, "accumulate_grad_batches": accumulate_grad_batches}
    numbers |= {"batch_size": batch_size, "sequence_length": sequence_length}
    check_arguments("estimate", estimate, **numbers)
    machine = _Machine(profile_for(device, device_memory, host_memory), devices * num_nodes, devices)
    if zero is None and offload is None:
        chosen = candidates(machine.num_ranks)
    else:
        chosen = [Candidate(resolve_zero(0 if zero is None else zero), resolve_offload(offload))]
    shared = resolve_sequence(sequence)
    machine.check(chosen, shared)
    batches, lengths = _batches(model, batch, batch_size, sequence_length)
    step = _Step(model, batches, lengths, loss or loss_of(model), choose(precision), accumulate_grad_batches)
    work = _Work(step, machine, shared)
    zero = chosen[0].zero if len(chosen) == 1 else ZeroConfig()
    return work.result([work.estimate(one, traces) for traces in work.traces(zero) for one in chosen])


def _batches(model: nn.Module, batch: Any, batch_size: int, sequence_length: int) -> tuple[list[Any], list[int]]:
    """The batch, and where it has tokens that were not given, longer ones; and the lengths of their sequences."""
    if batch is not None:
        return [batch], []
    lengths = [sequence_length * times for times in _LENGTHS] if takes_tokens(model) else []
    first = batch_for(model, batch_size, sequence_length)
    return [first, *(batch_for(model, batch_size, length) for length in lengths[1:])], lengths


def profile_for(name: str, device_memory: int | str | None, host_memory: int | str | None) -> DeviceProfile:
    """The profile of a name, with other sizes of memory where they are given.

    Raises:
        SettingError: no such profile or size.
    """
    profile = measure_profile() if name == THIS_MACHINE else profile_named(name)
    device, host = (
        None if given is None else parse_bytes(given, key)
        for key, given in (("device_memory", device_memory), ("host_memory", host_memory))
    )
    return with_memory(profile, device, host)


@dataclass(frozen=True, slots=True)
class _Machine:
    """The ranks of a run, and what each has."""

    profile: DeviceProfile
    num_ranks: int
    ranks_per_node: int

    def check(self, strategies: Sequence[Candidate], sequence: SequenceConfig | None) -> None:
        """Refuse axes that don't divide the ranks.

        Raises:
            SuperScaleError: names the option, and what works.
        """
        for one in strategies:
            mesh_spec_of(one.zero, sequence, self.num_ranks)


@dataclass(frozen=True, slots=True)
class _Step:
    """A step to trace.

    Attributes:
        batches: the batch, and where it has tokens, longer ones.
        lengths: of their sequences; empty where they have none.
        micro_batches: such batches in one step.
    """

    model: nn.Module
    batches: Sequence[Any]
    lengths: Sequence[int]
    loss: Loss
    precision: PrecisionChoices
    micro_batches: int


@dataclass(frozen=True, slots=True)
class _Traces:
    """The traces under one choice of options for long sequences, at each length of a sequence."""

    sequence: SequenceConfig | None
    checkpoints_blocks: bool
    steps: Sequence[StepTrace]


class _Work:
    """One step of one model on one machine.

    Args:
        sequence: options that a user gave.
    """

    def __init__(self, step: _Step, machine: _Machine, sequence: SequenceConfig | None) -> None:
        self._step = step
        self._model = step.model
        self._machine = machine
        self._profile = machine.profile
        self._precision = step.precision
        self._sequence = sequence
        self._shares = 1 if sequence is None else sequence.size
        self._blocks = blocks_with_own_params(step.model)
        num_tokens, self._unit = count_tokens(step.batches[0])
        self._num_tokens = num_tokens * step.micro_batches / self._shares
        self._seconds = seconds_on(machine.profile)
        self._model_flops = 0.0

    def traces(self, zero: ZeroConfig) -> list[_Traces]:
        """Steps under the options that were given, and with the repeated blocks checkpointed too, if there are any that
        are not yet.
        """
        given = self._sequence
        with techniques_of(self._model, given, zero) as techniques:
            plain = self._under(techniques, given)
        whole = plain.steps[0]
        if self._shares > 1 or plain.checkpoints_blocks:  # what ranks share and compute again is not the model's
            whole = trace_in(self._precision, self._model, self._step.batches[0], self._step.loss)
        self._model_flops = self._step.micro_batches * whole.model_flops / self._shares
        if given is not None and given.checkpoint_blocks is not False:
            return [plain]
        # Losses keep their logits where nothing was said, so that steps stay AdamW's, bit for bit.
        options = replace(SequenceConfig(tile_loss=False) if given is None else given, checkpoint_blocks="auto")
        with techniques_of(self._model, options, zero) as techniques:
            return [plain, self._under(techniques, options)] if techniques.recomputes_blocks else [plain]

    def _under(self, techniques: TracedTechniques, sequence: SequenceConfig | None) -> _Traces:
        """The traces under the techniques that these options give."""
        watched, loss = [block for _, block, _ in self._blocks], techniques.around(self._step.loss)
        steps = []
        for one in self._step.batches:
            with techniques.counting() as on_host:
                trace = trace_in(self._precision, self._model, one, loss, watched=watched)
            steps.append(replace(trace, on_host=on_host))
        return _Traces(sequence, techniques.recomputes_blocks, steps)

    def result(self, strategies: Sequence[StrategyEstimate]) -> Estimate:
        """The estimates of several strategies with what they have in common."""
        params, profile = list(self._model.parameters()), self._profile
        return Estimate(
            model=type(self._model).__name__,
            num_params=sum(param.numel() for param in params),
            num_trainable=sum(param.numel() for param in params if param.requires_grad),
            num_ranks=self._machine.num_ranks,
            device=profile.name,
            device_memory=profile.memory,
            host_memory=profile.host_memory,
            num_tokens=round(self._num_tokens),
            unit=self._unit,
            strategies=strategies,
            assumptions=assumptions_of(profile, self._step.micro_batches),
        )

    def estimate(self, candidate: Candidate, traces: _Traces) -> StrategyEstimate:
        """One strategy with one way of keeping activations."""
        setup = self._fitted(candidate, traces)
        params = params_of(self._model, setup)
        classes = byte_classes(self._model, params, setup)
        peak = device_peak(traces.steps[0], params, classes, setup)
        classes += activations_class(traces.steps[0])
        host_bytes = sum(row.host_bytes for row in classes)
        time = step_time(traces.steps[0], params, setup, self._profile, self._seconds)
        rate = self._profile.flops(self._precision.autocast or self._precision.weights)
        largest, longest = self._limits(setup, traces)
        return StrategyEstimate(
            line=candidate.line(traces.sequence),
            is_exact=candidate.is_exact,
            checkpoints_blocks=traces.checkpoints_blocks,
            bytes=classes,
            peak=peak,
            host_bytes=host_bytes,
            device_share=setup.on_device if setup.offload is not None else 0.0,
            why_not=self._why_not(peak, host_bytes),
            time=time,
            tokens_per_s=self._num_tokens * self._machine.num_ranks / time.total,
            mfu=self._model_flops / (time.total * rate),
            largest_params=largest,
            longest_sequence=longest,
        )

    def _limits(self, setup: Setup, traces: _Traces) -> tuple[int | None, int | None]:
        """Parameters of the largest model and tokens of the longest sequence that fit, with states where they take the
        least of the device.
        """
        if setup.offload is not None and setup.offload.gpu_fraction == "auto":
            setup = replace(setup, on_device=0.0)
        params = params_of(self._model, setup)
        classes = byte_classes(self._model, params, setup)
        peaks = [device_peak(step, params, classes, setup).total for step in traces.steps]
        on_host = [step.on_host.nbytes for step in traces.steps]
        host_bytes = sum(row.host_bytes for row in classes)
        shared = 0
        if self._profile.shares_cores:  # one memory for both
            peaks, shared = [sum(both) for both in zip(peaks, on_host, strict=True)], host_bytes
        largest = largest_params(
            params,
            [list(own) for _, _, own in self._blocks],
            traces.steps[0].saved,
            setup,
            device_left=self._usable - peaks[0] - shared,
            host_left=self._profile.host_memory - host_bytes - on_host[0],
            saved_on_host=on_host[0] // max(1, len(self._blocks)),
        )
        if not self._step.lengths:
            return largest, None
        longest = longest_sequence(self._step.lengths, peaks, self._usable - shared)
        if on_host[0]:
            host_left = self._profile.host_memory - host_bytes
            longest = min(longest, longest_sequence(self._step.lengths, on_host, host_left))
        return largest, longest

    @property
    def _usable(self) -> int:
        return round(USABLE * self._profile.memory)

    def _fitted(self, candidate: Candidate, traces: _Traces) -> Setup:
        """The setup of a strategy, with as many states on the device as fit there, as a run chooses after its first
        step.
        """
        offload = candidate.offload
        setup = Setup(
            zero=candidate.zero,
            offload=offload,
            precision=self._precision,
            sequence=traces.sequence,
            num_ranks=self._machine.num_ranks,
            ranks_per_node=self._machine.ranks_per_node,
            flows=offload is not None and offload.weights == "flow",
            micro_batches=self._step.micro_batches,
        )
        return fit_states(self._model, traces.steps[0], setup, self._usable)

    def _why_not(self, peak: Moment, host_bytes: int) -> str | None:
        profile = self._profile
        if profile.shares_cores:  # one memory for both
            return _too_much("memory", peak.total + host_bytes, self._usable)
        return _too_much("device memory", peak.total, self._usable) or _too_much(
            "host memory", host_bytes, profile.host_memory
        )


def _too_much(memory: str, needed: int, limit: int) -> str | None:
    return None if needed <= limit else f"{format_bytes(needed)} of {memory}, of {format_bytes(limit)}"


def seconds_on(profile: DeviceProfile) -> Seconds:
    """Gives the seconds of an operation on a profile's device: on this machine by running it."""
    rates = roofline(profile)
    return MeasuredOperations(rates) if profile.name == THIS_MACHINE else rates


def trace_in(
    precision: PrecisionChoices, model: nn.Module, batch: Any, loss: Loss, *, watched: Sequence[nn.Module] = ()
) -> StepTrace:
    """Trace one step in a precision; see `trace_step`."""
    is_cast = precision.name.endswith("-true")
    weights = precision.weights if is_cast else None
    return trace_step(model, batch, loss, weights=weights, autocast=precision.autocast, watched=watched)


def assumptions_of(profile: DeviceProfile, micro_batches: int = 1) -> list[str]:
    """What an estimate takes for granted, in sentences."""
    steps = "one micro-batch a step" if micro_batches == 1 else f"{micro_batches} micro-batches a step"
    told = [f"{USABLE:.0%} of the device's memory can be used", f"{steps}, AdamW"]
    if profile.name == THIS_MACHINE:
        return ["rates are measured here, each operation by itself", *told]
    reach = profile.reach
    return [
        f"rates are the data sheet's; assumed to be reached: {reach.products:.0%} of floating-point operations, "
        f"{reach.memory:.0%} of device memory's, {reach.links:.0%} of links', {reach.host:.0%} of host memory's",
        *told,
    ]
