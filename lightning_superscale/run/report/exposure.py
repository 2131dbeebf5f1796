"""What offloading costs: the exposed part of a step, forecast and measured, its stalls, and what the rules know."""

from __future__ import annotations

from lightning_superscale.offload.planner.choices import HostWork, step_times
from lightning_superscale.offload.planner.forecast import exposed_seconds
from lightning_superscale.run.assemble import Assembly
from lightning_superscale.run.report.figures import figures_of, sentence_of
from lightning_superscale.run.report.phases import PhaseSeconds
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
    settings, said = assembly.settings, []
    work = host_work(assembly)
    profile = assembly.host.profile
    if profile is not None and work.num_params:
        alone = step_times(profile, work, forward=0.0, backward=0.0)
        said.append(
            f"by the hardware profile a step's optimizer takes the host {_ms(alone.host)}, gradients {_ms(alone.d2h)} "
            f"and weights {_ms(alone.h2d)} over the link"
        )
    if settings.device.type != "cpu":
        # The host's clock sees when it queued work, not how long the device took.
        return [*said, "`superscale trace` measures how much of that forward and backward leave exposed"]
    steady = phases.steady()
    if steady is None or not settings.visibility.is_automatic:
        return said
    measured = f"{_ms(steady.exposed)} a step measured over {steady.num_steps} steps (host clock, hooks included)"
    why_not = _why_no_forecast(assembly, work)
    if profile is None or why_not is not None:
        return [*said, f"exposed beyond forward and backward: {measured}; no forecast: {why_not or 'no profile'}"]
    times = step_times(profile, work, forward=steady.forward, backward=steady.backward)
    return [*said, f"exposed beyond forward and backward: {_ms(exposed_seconds(times))} predicted, {measured}"]


def host_work(assembly: Assembly) -> HostWork:
    """The work of this rank's host in one optimizer step."""
    on_host = [
        (unit.shard.shard_numel, state.transfer_dtype)
        for engine in assembly.engines.values()
        for unit, state in zip(engine.transport.units, engine.states, strict=True)
        if "host" in state.homes
    ]
    return HostWork(
        num_params=sum(numel for numel, _ in on_host),
        link_bytes=sum(numel * dtype.itemsize for numel, dtype in on_host),
        num_buckets=len(on_host),
        device_share=device_share(assembly.engines.values()),
    )


def _why_no_forecast(assembly: Assembly, work: HostWork) -> str | None:
    """Why nothing is forecast; None where host steps run during backward and weights arrive during the next forward."""
    settings = assembly.settings
    if not work.num_params:
        return "nothing steps on the host"
    own = [engine.why_not_native for engine in assembly.engines.values() if engine.why_not_native is not None]
    if own:
        return f"an optimizer steps through its own code ({own[0]})"
    if settings.engine is None or settings.offload is None:
        return "nothing is offloaded"
    why_not = settings.engine.why_no_forecast(settings.offload)
    if why_not is not None:
        return why_not
    if settings.visibility.why_gradients_stay is not None:
        return "gradients stay in param.grad until the step"
    return None if settings.why_weights_awaited is None else "new weights are awaited right after the step"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
