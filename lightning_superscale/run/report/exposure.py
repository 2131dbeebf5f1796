"""What offloading costs: the exposed part of a step, forecast and measured, its stalls, and what the rules know."""

from __future__ import annotations

from collections.abc import Collection

from lightning_superscale.offload.engine import Forecast, StepParts
from lightning_superscale.offload.planner.choices import HostWork
from lightning_superscale.optim.engine import OptimizerEngine
from lightning_superscale.optim.mixed_step import MixedStep
from lightning_superscale.run.assemble import Assembly
from lightning_superscale.run.report.figures import figures_of, sentence_of
from lightning_superscale.run.report.phases import PhaseSeconds, StepSeconds
from lightning_superscale.run.report.reasons import device_share


def exposure_of(assembly: Assembly, phases: PhaseSeconds) -> list[str]:
    """Sentences for `explain()`: none without offload. Any rank may ask by itself; the times are its own."""
    if assembly.settings.offload is None:
        return []
    return [*map(sentence_of, figures_of(assembly)), *_stalls(phases), *_exposed(assembly, phases)]


def _stalls(phases: PhaseSeconds) -> list[str]:
    steady = phases.steady()
    if steady is None:
        return []
    return [
        f"the host kept the model waiting {_ms(steady.stalled)} a step, {steady.stall_share:.1%} of it, measured over "
        f"{steady.num_steps} steps (host clock)"
    ]


def _exposed(assembly: Assembly, phases: PhaseSeconds) -> list[str]:
    settings, steady = assembly.settings, phases.steady()
    forecasts, said = _forecasts(assembly, steady), []
    if forecasts:
        host, d2h, h2d = (sum(parts) for parts in zip(*((f.host, f.d2h, f.h2d) for f in forecasts), strict=True))
        said.append(
            f"by the hardware profile a step's optimizer takes the host {_ms(host)}, gradients {_ms(d2h)} and weights "
            f"{_ms(h2d)} over the link"
        )
    if settings.device.type != "cpu":
        # The host's clock sees when it queued work, not how long the device took.
        return [*said, "`superscale trace` measures how much of that forward and backward leave exposed"]
    if steady is None or not settings.visibility.is_automatic:
        return said
    measured = f"{_ms(steady.exposed)} a step measured over {steady.num_steps} steps (host clock, hooks included)"
    reasons = [reason for forecast in forecasts if (reason := forecast.why_not) is not None]
    why_not = _why_no_forecast(assembly) or next(iter(reasons), None)
    if why_not is not None:
        return [*said, f"exposed beyond forward and backward: {measured}; no forecast: {why_not}"]
    predicted = _ms(sum(forecast.exposed or 0.0 for forecast in forecasts))
    return [*said, f"exposed beyond forward and backward: {predicted} predicted, {measured}"]


def _forecasts(assembly: Assembly, steady: StepSeconds | None) -> list[Forecast]:
    """What each optimizer whose states are on the host should take, as its offload engine says.

    Args:
        steady: the measured seconds of a step; None before there are any.
    """
    settings, profile = assembly.settings, assembly.host.profile
    if settings.engine is None or settings.offload is None or profile is None:
        return []
    forecasts = []
    for engine in assembly.engines.values():
        work = _work_of([engine])
        if engine.why_not_native is not None or not work.num_params:
            continue  # the profile says nothing of an optimizer's own code
        rule = engine.rule
        parts = StepParts(
            config=settings.offload,
            profile=profile,
            work=work,
            forward=0.0 if steady is None else steady.forward,
            backward=0.0 if steady is None else steady.backward,
            states=[state for state in engine.states if "host" in state.homes],
            rule=rule.host if isinstance(rule, MixedStep) else rule,
            streams=settings.streams,
            weights_awaited=settings.why_weights_awaited is not None,
        )
        forecasts.append(settings.engine.forecast(parts))
    return forecasts


def host_work(assembly: Assembly) -> HostWork:
    """The work of this rank's host in one optimizer step that steps all that it has."""
    return _work_of(assembly.engines.values())


def _work_of(engines: Collection[OptimizerEngine]) -> HostWork:
    on_host = [
        (unit.shard.shard_numel, state.transfer_dtype)
        for engine in engines
        for unit, state in zip(engine.transport.units, engine.states, strict=True)
        if "host" in state.homes
    ]
    return HostWork(
        num_params=sum(numel for numel, _ in on_host),
        link_bytes=sum(numel * dtype.itemsize for numel, dtype in on_host),
        num_buckets=len(on_host),
        device_share=device_share(engines),
    )


def _why_no_forecast(assembly: Assembly) -> str | None:
    """Why nothing is forecast whatever the offload engine; None where the engine is to say."""
    if not host_work(assembly).num_params:
        return "nothing steps on the host"
    own = [engine.why_not_native for engine in assembly.engines.values() if engine.why_not_native is not None]
    if own:
        return f"an optimizer steps through its own code ({own[0]})"
    return "no profile" if assembly.host.profile is None else None


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
