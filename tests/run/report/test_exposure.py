"""The exposed optimizer time that `explain()` and ScaleMonitor print: what counts as exposed, and when it is said."""

from __future__ import annotations

import dataclasses
import re
import time
from types import SimpleNamespace

import pytest
import torch

import lightning_superscale as lss
from lightning_superscale.offload.planner.choices import step_times
from lightning_superscale.offload.planner.forecast import awaited_seconds, exposed_seconds
from lightning_superscale.offload.superoffload import engine as superoffload_engine
from lightning_superscale.offload.superoffload.state import DeferredState
from lightning_superscale.offload.superoffload.step import DeferredStep
from lightning_superscale.offload.zenflow.forecast import WindowTimes
from lightning_superscale.offload.zenflow.forecast import exposed_seconds as zenflow_exposed_seconds
from lightning_superscale.ops.update import HostUpdate
from lightning_superscale.run import host_plan
from lightning_superscale.run.report import exposure
from lightning_superscale.run.report.phases import LEAST_STEPS, WARM_UP_STEPS, PhaseSeconds
from lightning_superscale.run.report.reasons import reasons_of_rules
from lightning_superscale.timeline import Timeline
from lightning_superscale.zero.buckets.transport import BucketTransport
from tests.helpers.trainers import Regressor, fit
from tests.offload.planner.test_choices import H100

DELAY = 0.02
# So slow that what is printed of a forecast is not 0.00.
SLOW_HOST = dataclasses.replace(H100, adamw_ns_per_param=4e6, adamw_fp32_ns_per_param=6e6, accumulate_ns_per_param=2e6)


@pytest.fixture(autouse=True)
def profile(monkeypatch):
    monkeypatch.setattr(host_plan, "cached_profile", lambda device, cpus: H100)


@pytest.fixture
def wait(monkeypatch):
    """Seconds pass where a test says so, and nowhere else, however busy the machine is."""
    now = 0.0

    def passed(seconds: float) -> None:
        nonlocal now
        now += seconds

    for module in ("run.run", "zero.forward_gates", "timeline"):
        monkeypatch.setattr(f"lightning_superscale.{module}.perf_counter", lambda: now)
    return passed


def kept(module=None, strategy="superoffload", **flags) -> SimpleNamespace:
    """What ScaleMonitor, for which nothing waits, sees at the end of a fit; any other callback might read weights."""
    seen = SimpleNamespace()

    def keep(monitor, trainer):
        seen.lines = trainer.strategy.exposure()
        seen.steady = trainer.strategy.phase_seconds.steady()
        seen.work = exposure.host_work(trainer.strategy.assembly)
        seen.text = trainer.strategy.explain()
        seen.rules = [engine.rule for engine in trainer.strategy.assembly.engines.values()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lss.ScaleMonitor, "_report", keep)
        fit(module or Regressor(), strategy, callbacks=[lss.ScaleMonitor()], **flags)
    return seen


@pytest.mark.parametrize(("has_own_cores", "awaits"), [(False, False), (True, False), (True, True)])
def test_predicted_stands_beside_measured(monkeypatch, has_own_cores, awaits):
    monkeypatch.setattr(superoffload_engine, "has_own_cores", lambda update, pool: has_own_cores)
    monkeypatch.setattr(host_plan, "cached_profile", lambda device, cpus: SLOW_HOST)
    num_steps = 12 if awaits else 11  # of the plans' turns the last is a direct step, awaited or not
    seen = kept(precision="bf16-true", max_steps=num_steps)
    steady, chooser = seen.steady, seen.rules[0].host.chooser
    times = step_times(SLOW_HOST, seen.work, forward=steady.forward, backward=steady.backward)
    assert (chooser.plan, chooser.awaits) == ("direct", awaits)
    # A host whose cores are the model's hides nothing of the shortest plan, 28 of the 30 bytes that are measured.
    predicted = 28 / 30 * times.host
    if awaits:
        predicted = awaited_seconds(times, predicted)
    elif has_own_cores:
        predicted = exposed_seconds(times, chooser.plan, chooser.clip_rate)
    assert seen.work.num_params >= 17 * 33 + 33 + 66 + 33 * 5 + 5
    assert seen.work.link_bytes == 2 * seen.work.num_params
    assert seen.lines[-1] == (
        f"exposed beyond forward and backward: {predicted * 1e3:.2f} ms predicted, {steady.exposed * 1e3:.2f} ms a "
        f"step measured over {num_steps - WARM_UP_STEPS} steps (host clock, hooks included)"
    )
    assert all(f"- {line}" in seen.text for line in seen.lines)


def zenflow(**options) -> lss.SuperScaleStrategy:
    """Windows of 2 steps after one step of warm-up, of which a fit has 12."""
    options = {"topk": 0.25, "update_interval": 2, "exclude": ["net.3.*"], **options}
    return lss.SuperScaleStrategy(offload={"engine": "zenflow", "gpu_fraction": 0, "zenflow": options})


@pytest.mark.parametrize("accumulate_on", ["host", "device"])
@pytest.mark.parametrize("overlap", [True, False])
def test_zenflows_windows_are_forecast(monkeypatch, accumulate_on, overlap):
    """Of a host so slow that what it leaves exposed shows beside a forward of milliseconds."""
    monkeypatch.setattr(host_plan, "cached_profile", lambda device, cpus: SLOW_HOST)
    seen = kept(strategy=zenflow(accumulate_on=accumulate_on, overlap=overlap), precision="bf16-true")
    # net.0 has 4 of 17 columns selected, and `unused` 1 of 3; net.3 is excluded. The one unit of a model this small
    # steps them in its own order, the last trained one first.
    deferred = {"net.0": 33 * 13, "net.3": 5 * 33, "unused": 3 * 2}
    numel = sum(deferred.values())
    adding, updating, sent = 2e-3 * numel, 4e-3 * numel, 2 * numel / 50e9
    # The largest matrix of all has its windows to itself.
    alone, others = [deferred["net.0"] / numel], [deferred[name] / numel for name in ("net.3", "unused")]
    times = WindowTimes(
        forward=seen.steady.forward,
        backward=seen.steady.backward,
        d2h=sent,
        adding=adding,
        updating=updating,
        h2d=sent,
        num_matrices=3,
        ends=[alone, others] if overlap else [[*alone, *others], []],
        sums_home=accumulate_on,
        overlap=overlap,
    )
    expected = zenflow_exposed_seconds(times)
    assert expected > 0.1
    assert f"exposed beyond forward and backward: {expected * 1e3:.2f} ms predicted, " in seen.lines[-1]
    host = updating / 2 + (adding if accumulate_on == "host" else 0)
    d2h = sent if accumulate_on == "host" else sent / 2
    assert seen.lines[-2] == (
        f"by the hardware profile a step's optimizer takes the host {host * 1e3:.2f} ms, gradients {d2h * 1e3:.2f} ms "
        f"and weights {sent / 2 * 1e3:.2f} ms over the link"
    )
    assert all(f"- {line}" in seen.text for line in seen.lines)


class ReadsGradients(Regressor):
    def on_before_optimizer_step(self, optimizer):
        assert all(p.grad is not None for p in self.net.parameters())


@pytest.mark.parametrize(
    ("module", "options", "why"),
    [
        (Regressor, {"warmup_steps": 12}, "in warm-up every column steps at every step"),
        (Regressor, {"topk": 1.0, "exclude": None}, "the device steps all columns"),
        (ReadsGradients, {}, "gradients stay in param.grad until the step"),
    ],
)
def test_what_zenflow_cannot_forecast_is_measured_only(module, options, why):
    lines = kept(module(), zenflow(**options)).lines
    assert f"; no forecast: {why}" in lines[-1]
    assert "predicted" not in lines[-1]


def test_superoffload_does_not_forecast_gradients_that_stay():
    assert "; no forecast: gradients stay in param.grad until the step" in kept(ReadsGradients()).lines[-1]


def test_without_a_profile_nothing_is_forecast(monkeypatch):
    monkeypatch.setattr(host_plan, "cached_profile", lambda device, cpus: None)
    lines = kept().lines
    assert "; no forecast: no profile" in lines[-1]
    assert not any("by the hardware profile" in line for line in lines)


def test_what_rules_choose_is_told_by_optimizer_where_several_tell():
    says, quiet = (SimpleNamespace(rule=SimpleNamespace(reasons=lambda told=told: told)) for told in (["topk=0.1"], []))
    assert reasons_of_rules([quiet, says]) == ["topk=0.1"]
    assert reasons_of_rules([says, quiet, says]) == ["optimizer 0: topk=0.1", "optimizer 2: topk=0.1"]


def test_scale_monitor_prints_it(capsys):
    fit(Regressor(), "superoffload", callbacks=[lss.ScaleMonitor()])
    assert re.search(r"- exposed beyond forward and backward: \d+\.\d+ ms predicted", capsys.readouterr().out)


def test_a_slow_forward_is_not_exposed_and_a_slow_hook_of_the_step_is(wait):
    class SlowForward(Regressor):
        def training_step(self, batch, batch_idx):
            wait(DELAY)
            return super().training_step(batch, batch_idx)

    class SlowStep(Regressor):
        def on_before_zero_grad(self, optimizer):
            wait(DELAY)

    slow_forward, slow_step = kept(SlowForward()).steady, kept(SlowStep()).steady
    assert (slow_forward.forward, slow_forward.exposed) == pytest.approx((DELAY, 0))
    assert (slow_step.forward, slow_step.exposed) == pytest.approx((0, DELAY))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_waiting_for_weights_is_exposed_wherever_it_happens(monkeypatch, wait, accumulate):
    """At the root gate and inside forward; with accumulation both lie outside the optimizer step."""
    real = BucketTransport.wait_published

    def late(self, units):
        wait(DELAY)
        return real(self, units)

    monkeypatch.setattr(BucketTransport, "wait_published", late)
    steady = kept(accumulate_grad_batches=accumulate).steady
    # Before each micro-batch's forward, at the gates of the three trained layers, and once when a step begins.
    assert (steady.forward, steady.exposed) == pytest.approx((0, (4 * accumulate + 1) * DELAY))


@pytest.mark.parametrize(
    ("strategy", "why"),
    [
        (lambda: lss.SuperScaleStrategy(offload="cpu"), "no forecast: the host steps after backward"),
        (
            lambda: lss.SuperScaleStrategy(offload={"engine": "superoffload", "gpu_fraction": 1.0}),
            "no forecast: nothing steps on the host",
        ),
    ],
)
def test_what_the_forecast_is_not_of_is_measured_only(strategy, why):
    lines = kept(strategy=strategy()).lines
    assert why in lines[-1]
    assert "predicted" not in lines[-1]


def test_hooks_between_steps_do_not_keep_weights_from_arriving_later():
    class Looks(Regressor):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            pass

    assert "predicted" in kept(Looks()).lines[-1]


def test_an_optimizer_of_its_own_is_not_forecast():
    class Own(Regressor):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=1e-2)

    assert "no forecast: an optimizer steps through its own code" in kept(Own()).lines[-1]


def test_nothing_is_said_too_early_or_without_offload():
    assert not any("exposed" in line for line in kept(max_steps=WARM_UP_STEPS + LEAST_STEPS - 1).lines)
    assert any("exposed" in line for line in kept(max_steps=WARM_UP_STEPS + LEAST_STEPS).lines)
    assert kept(strategy="superscale").lines == []


def test_phases_of_the_warm_up_do_not_count():
    phases = PhaseSeconds()
    for seconds in (100.0, 50.0, 1.0, 2.0, 3.0):
        phases.forward += 3 * seconds
        phases.gates += seconds
        phases.backward += 4 * seconds
        phases.before += 5 * seconds
        phases.step += 6 * seconds
        phases.stalled += 8 * seconds
        phases.stalled_backward += 3 * seconds
        phases.end_step()
    assert phases.steady() == (2 * 2.0, (4 - 3) * 2.0, (1 + 3 + 5 + 6) * 2.0, 8 * 2.0, 3)
    assert phases.steady().stall_share == pytest.approx(8 / (2 + 1 + 15))


def test_nested_stalls_count_once_and_those_outside_of_a_step_do_not(wait):
    timeline, phases = Timeline(torch.device("cpu")), PhaseSeconds()

    def stall():
        with timeline.stalled("host"):
            wait(1.0)

    stall()
    with phases.stalls(timeline):
        stall()
        with phases.stalls(timeline, in_backward=True):
            wait(5.0)
            stall()
        with phases.stalls(timeline):
            stall()
        stall()
    stall()
    assert (phases.stalled, phases.stalled_backward, timeline.stalled_seconds) == (4.0, 1.0, 6.0)


@pytest.mark.parametrize("offload", ["cpu", None])
def test_what_the_host_steps_while_the_model_waits_is_a_stall(monkeypatch, wait, offload):
    """The device's own step is none, also where the device is the host."""
    real = HostUpdate.wait

    def slow(self):
        wait(DELAY)
        return real(self)

    monkeypatch.setattr(HostUpdate, "wait", slow)
    seen = kept(strategy=lss.SuperScaleStrategy(offload=offload))
    assert seen.steady.exposed == pytest.approx(DELAY)  # one unit, and nothing else takes time here
    assert seen.steady.stalled == pytest.approx(0 if offload is None else DELAY)
    said = f"the host kept the model waiting {DELAY * 1e3:.2f} ms a step, 100.0% of it"
    assert any(said in line for line in seen.lines) == (offload is not None)


def test_an_optimizer_of_its_own_on_the_host_stalls(wait):
    class Own(Regressor):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-2)
            optimizer.register_step_post_hook(lambda *_: wait(DELAY))
            return optimizer

    assert kept(Own()).steady.stalled == pytest.approx(DELAY)


def test_a_slow_host_of_superoffload_stalls_where_its_weights_are_awaited(monkeypatch):
    real = DeferredState.settle

    def slow(self, hypers, *, defers):
        time.sleep(DELAY)
        return real(self, hypers, defers=defers)

    monkeypatch.setattr(DeferredState, "settle", slow)
    steady = kept().steady
    assert steady.stalled > 0.5 * DELAY
    assert steady.exposed > 0.5 * DELAY
    assert steady.stall_share > 0.3


def test_what_keeps_backward_waiting_is_exposed(monkeypatch, wait):
    """Late gradients wait for the step before; with two micro-batches, also outside of the optimizer's step."""
    real = DeferredStep.add_grads

    def late(self, delta, state):
        with self._timeline.stalled("host"):
            wait(DELAY)
        real(self, delta, state)

    monkeypatch.setattr(DeferredStep, "add_grads", late)
    steady = kept(accumulate_grad_batches=2).steady
    assert steady.stalled == pytest.approx(steady.exposed)
    assert steady.stalled >= DELAY
    assert steady.backward == pytest.approx(0)
