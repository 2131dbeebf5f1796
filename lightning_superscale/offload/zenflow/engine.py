"""`OffloadConfig(engine="zenflow")`: the device steps important columns at once, the host the others in windows."""

from __future__ import annotations

import difflib
import fnmatch
from typing import Literal, cast

import torch
from torch.optim import Optimizer

from lightning_superscale.config import OffloadConfig, ZenFlowConfig
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.layout.memory import MemoryModel
from lightning_superscale.layout.rows import ParamSlice
from lightning_superscale.offload.engine import Forecast, LeftBehind, OffloadContext, RunFacts, StepParts
from lightning_superscale.offload.link.dtype import dtype_on_link
from lightning_superscale.offload.memory import ParamKind
from lightning_superscale.offload.planner.forecast import HostSchedule, StepTimes
from lightning_superscale.offload.weight_flow.weights import StreamedUnit
from lightning_superscale.offload.zenflow.auto import least_selected, most_selected
from lightning_superscale.offload.zenflow.columns import ColumnLayout, bytes_by_owner, layout_of, layouts_of
from lightning_superscale.offload.zenflow.forecast import forecast_of, predicted_seconds, predicted_work
from lightning_superscale.offload.zenflow.report import LowEnergyWarning
from lightning_superscale.offload.zenflow.state import SplitState
from lightning_superscale.offload.zenflow.step import STATE_KEYS, ZenFlowStep
from lightning_superscale.offload.zenflow.windows import Absorbed
from lightning_superscale.ops.state_dtypes import bytes_of
from lightning_superscale.optim.param_update import why_not_native
from lightning_superscale.optim.step_rule import RuleState, StepGuard
from lightning_superscale.optim.unit import ShardUnit

# Where gradients add up on the device in fp32: a cast writes, scaling reads and writes, adding reads both and writes.
_SUMMED_BYTES = 6 * 4


class ZenFlowEngine:
    """The engine that trades bounded staleness of some columns for a device that waits for no host.

    Satisfies `OffloadEngine`; see [Note: Owners] in state.py and [Note: Windows] in windows.py.
    """

    weights_arrive: Literal["at step"] = "at step"
    equals_adamw = False
    why_no_flow = "zenflow steps columns of weights that are on the device"

    def __init__(self) -> None:
        self._warning = LowEnergyWarning()

    def refuse(self, facts: RunFacts) -> None:
        for optimizer in facts.optimizers:
            reason = why_not_native(optimizer)
            if reason is not None:
                raise SuperScaleError(
                    f"zenflow steps Adam and AdamW by columns; {reason}. Use offload='cpu', which steps any optimizer."
                )
        for pattern in _options(facts.config).exclude or ():
            if not fnmatch.filter(facts.fqns, pattern):
                close = difflib.get_close_matches(pattern, facts.fqns, n=3, cutoff=0.3)
                raise SuperScaleError(
                    f"ZenFlowConfig.exclude takes patterns of names of parameters; {pattern!r} matches none of "
                    f"{len(facts.fqns)}. Names like it: {', '.join(map(repr, close or facts.fqns[:3]))}."
                )

    def memory(self, kind: ParamKind) -> MemoryModel:
        """Bytes per element, by the share of the parameter's columns that the device steps: all of what has one dim,
        and none of what `exclude` names.

        A share that is "auto" is the one that the rule has now. Before there is a rule, each memory is counted for the
        choice that fills it most: the host's for the smallest share, and the device's for the largest, as a selected
        column takes more of it than a sum does.
        """
        config, master, moments = _options(kind.config), kind.dtypes.master_of(kind.weights), kind.dtypes.moments
        least, most = least_selected(config), most_selected(config)
        if kind.rule is not None:
            least = most = cast(ZenFlowStep, kind.rule).topk
        selected, on_host = _selected_of(kind, most), 1 - _selected_of(kind, least)
        sums = on_host if config.accumulate_on == "host" else 1 - selected
        on_link = dtype_on_link(kind.link_dtype, kind.weights)
        kept = [
            bytes_of("deferred gradients", torch.float32, config.accumulate_on, share=sums),
            bytes_of("transfer buffers", on_link, "host", copies=3, share=on_host),
            bytes_of("selected masters", master, "device", share=selected),
            bytes_of("selected states", moments, "device", copies=2, share=selected),
        ]
        if kind.dtypes.compensates(kind.weights):
            kept.append(bytes_of("selected compensation", torch.bfloat16, "device", share=selected))
        return kind.dtypes.memory(kind.weights, has_moments=True, home="host") + MemoryModel(tuple(kept))

    def device_bytes(self, kind: ParamKind) -> float:
        config, itemsize = _options(kind.config), kind.weights.itemsize
        # What "auto" will choose is known once warm-up has measured; the default stands for it.
        interval = config.update_interval if config.update_interval != "auto" else ZenFlowConfig.update_interval
        layout = _layout_of(kind, most_selected(config))
        selected = layout.selected_share
        states = kind.dtypes.memory(kind.weights, has_moments=True, home="device").per_param("device", "shard")
        sums = (1 - selected) * (itemsize + _SUMMED_BYTES) if config.accumulate_on == "device" else 0.0
        steps = selected * (2 * states + 2 * itemsize)
        return bytes_by_owner(layout, itemsize, cast(int, interval)) + sums + steps

    def make_state(
        self, unit: ShardUnit, context: OffloadContext, *, has_moments: bool, streamed: StreamedUnit | None
    ) -> SplitState:
        if not has_moments or streamed is not None:
            raise AssertionError("zenflow steps Adam, on weights that stay")
        config = _options(context.config)
        layouts = layouts_of(unit, config, most_selected(config))
        return SplitState(unit, context, layouts, sums_home=config.accumulate_on)

    def make_step(self, optimizer: Optimizer, guard: StepGuard, context: OffloadContext) -> ZenFlowStep:
        return ZenFlowStep(optimizer, guard, _options(context.config), context, self._warning)

    def how_it_steps(self, config: OffloadConfig, *, streams: bool) -> str:
        options = _options(config)
        meanwhile = "during the step after it" if options.overlap else "while the device waits"
        share = (
            "the share of the columns that warm-up shows"
            if options.topk == "auto"
            else f"{options.topk:.0%} of the columns"
        )
        steps = (
            "as many steps as warm-up shows"
            if options.update_interval == "auto"
            else f"{options.update_interval} steps"
        )
        return (
            f"{share} step on the device at every step, the others on the host in windows of {steps}, {meanwhile} "
            "(ZenFlow: another result than AdamW's)"
        )

    def left_behind(self, saved: RuleState) -> LeftBehind:
        windows = [Absorbed.num_steps_of(entry) for name, entry in saved.items() if name.startswith("zenflow.open.")]
        dropped = None
        if windows:
            num = max(windows)
            dropped = (
                "the checkpoint was saved by engine='zenflow' within windows: gradients of up to "
                f"{num} {'step' if num == 1 else 'steps'} in columns that the host steps have been added up and not "
                "applied, and this run drops them. Resume with engine='zenflow' to lose nothing."
            )
        weights_lag = any(name.startswith(("zenflow.late.", "zenflow.ahead.")) for name in saved)
        return LeftBehind(STATE_KEYS, weights_lag, dropped)

    def predict_exposed(self, times: StepTimes, config: OffloadConfig) -> float:
        return predicted_seconds(times, _options(config))

    def predict_work(self, times: StepTimes, config: OffloadConfig) -> float:
        return predicted_work(times, _options(config))

    def host_schedule(self, times: StepTimes, config: OffloadConfig) -> HostSchedule | None:
        return None  # windows of several steps

    def forecast(self, parts: StepParts) -> Forecast:
        rule = cast(ZenFlowStep, parts.rule)
        return forecast_of(parts, rule.schedule, is_warm=rule.is_warm)


def _selected_of(kind: ParamKind, share: float) -> float:
    """The share of a whole parameter's elements that are in selected columns."""
    return _layout_of(kind, share).selected_share


def _layout_of(kind: ParamKind, share: float) -> ColumnLayout:
    """The columns of a whole parameter."""
    return layout_of(ParamSlice(kind.spec, (0, kind.spec.num_rows), 0), _options(kind.config), share)


def _options(config: OffloadConfig) -> ZenFlowConfig:
    return config.zenflow or ZenFlowConfig()
