"""ScaleMonitor: what it counts and what it prints."""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from lightning.pytorch.loggers import Logger

import lightning_superscale as lss
from lightning_superscale.offload.zenflow.sums import GradientSums
from tests.helpers.trainers import Regressor, fit


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Other tests of this process compile, and where anything is compiled nothing is counted."""
    torch._dynamo.reset()


def test_tables_say_where_bytes_live_and_time_went(capsys):
    fit(Regressor(), "superoffload", precision="bf16-true", callbacks=[lss.ScaleMonitor(every_n_steps=3)])
    out = capsys.readouterr().out
    for words in ("Where the bytes live", "optimizer states", "Where the time went", "optimizer: update", "tokens/s"):
        assert words in out
    # 2 bytes per trained parameter: gradients of 17 * 33 + 33 + 33 + 33 + 33 * 5 + 5 elements. Weights go back
    # in the same dtype; whole units are sent slice by slice here, because `unused` has no gradient.
    assert "1.6 KiB of gradients to the host and 1.6 KiB of weights back per step" in " ".join(out.split())


class Metrics(Logger):
    """What was logged, by name, and the steps."""

    name, version = "metrics", "0"

    def __init__(self):
        self.logged, self.steps = {}, []

    def log_metrics(self, metrics, step=None):
        if "tokens_per_s" in metrics:
            self.steps.append(step)
            for name, value in metrics.items():
                self.logged.setdefault(name, []).append(value)

    def log_hyperparams(self, *args, **kwargs):
        pass


def logged(strategy, module=None, flops_per_token="auto", peak_flops="auto", **flags) -> dict[str, list[float]]:
    monitor = lss.ScaleMonitor(every_n_steps=4, flops_per_token=flops_per_token, peak_flops=peak_flops)
    metrics = Metrics()
    fit(module or Regressor(), strategy, callbacks=[monitor], logger=metrics, log_every_n_steps=1000, **flags)
    assert metrics.steps == list(range(3, 4 * len(metrics.steps), 4))
    return metrics.logged


# No data sheet says what a CPU can do, so that no MFU is logged.
ALWAYS = {"tokens_per_s", "model_flops_per_s", "process_bytes"}
OFFLOADED = ALWAYS | {"exposed_s_per_step", "stall_share", "link_bytes_per_step"}


def test_what_is_logged_follows_from_where_states_are():
    assert logged("auto").keys() == ALWAYS
    assert logged("superscale").keys() == ALWAYS | {"exposed_s_per_step"}
    found = logged("superoffload", precision="bf16-true")
    assert found.keys() == OFFLOADED | {"ahead_share", "redone_share", "direct_share"}
    assert len(found["stall_share"]) == 3
    assert all(0 <= share <= 1 for share in found["stall_share"])
    # In steps 1 to 4 the last step's weights may not have left yet.
    assert all(
        3 / 4 <= nbytes / (4 * (17 * 33 + 33 * 3 + 33 * 5 + 5)) <= 5 / 4 for nbytes in found["link_bytes_per_step"]
    )


ZENFLOW = {"topk": 0.3, "update_interval": 2, "select_interval": 4}


def test_zenflow_logs_and_explains_its_figures():
    strategy = lss.SuperScaleStrategy(offload={"engine": "zenflow", "gpu_fraction": 0, "zenflow": ZENFLOW})
    found = logged(strategy, max_steps=12)
    own = {"gradient_bytes_per_step", "weight_bytes_per_step", "host_bytes", "deferred_age_steps"}
    of_selections = {"selection_bytes_per_step", "selected_energy_share", "kept_energy_share"}
    assert found.keys() == OFFLOADED | own | of_selections
    deferred = 4 * ((17 - 5) * 33 + (33 - 10) * 5)  # of the columns that are not selected, in fp32
    assert found["gradient_bytes_per_step"] == [deferred] * 2  # no window had passed at the first logging
    assert found["weight_bytes_per_step"] == [deferred / 2] * 2
    assert found["deferred_age_steps"][-1] == pytest.approx(0.5 + 1, rel=0.02)  # one first window is shorter
    assert 0.3 < found["selected_energy_share"][-1] < 1
    assert found["kept_energy_share"][-1] <= found["selected_energy_share"][-1]
    told = strategy.explain()
    kib = f"{deferred / 1024:.1f} KiB"
    assert f"- gradients of deferred columns over the link per step: {kib} expected, {kib} measured" in told
    assert "are applied late: 1.50 steps expected, 1.49 steps measured" in told
    assert "- the host kept the model waiting" in told


def test_a_slow_host_of_zenflow_is_seen_in_the_stall_share(monkeypatch):
    """Its sums are awaited in backward, its windows in the optimizer's step; neither counts as forward or backward."""
    real = GradientSums.absorb

    def slow(self, *args, **kwargs):
        time.sleep(0.1)
        real(self, *args, **kwargs)

    strategy = lss.SuperScaleStrategy(offload={"engine": "zenflow", "gpu_fraction": 0, "zenflow": ZENFLOW})
    with monkeypatch.context() as patch:
        patch.setattr(GradientSums, "absorb", slow)
        found = logged(strategy, max_steps=12)
    # Two matrices wait at each step; the rest of a step takes a few ms, or more on a machine that is busy.
    assert statistics.median(found["stall_share"]) > 0.25
    steady = strategy.phase_seconds.steady()
    assert steady.stall_share > 0.25
    assert steady.stalled > 0.07
    assert steady.backward < steady.stalled
    assert steady.exposed > 0.9 * steady.stalled


def test_phases_add_up_to_the_wall_time():
    monitor = lss.ScaleMonitor()
    seen = {}

    class Spy(lss.ScaleMonitor):
        pass

    class Check(type(monitor)):
        def on_train_end(self, trainer, pl_module):
            table = self.time_table(trainer)
            shares = [float(cell.rstrip("%")) for cell in table.columns[2]._cells]
            seen["total"] = sum(shares)
            seen["negative"] = [s for s in shares if s < 0]

    fit(Regressor(), "superoffload", callbacks=[Check()])
    assert seen["total"] == pytest.approx(100, abs=1.0)
    assert not seen["negative"]


def test_monitor_works_under_a_stock_strategy(capsys):
    fit(Regressor(), "auto", callbacks=[lss.ScaleMonitor()])
    out = capsys.readouterr().out
    assert "Where the time went" in out
    assert "Where the bytes live" not in out


def test_operations_of_the_model_are_counted_once_and_scale_with_tokens(capsys):
    metrics = logged("superscale", peak_flops=1e6)
    forward = 2 * 8 * (17 * 33 + 33 * 5 + 5 * 5)  # the frozen layer too
    # Inputs need no gradient, and the frozen weights neither.
    backward = 2 * 8 * (17 * 33 + 2 * 33 * 5 + 5 * 5)
    rates, tokens = metrics["model_flops_per_s"], metrics["tokens_per_s"]
    assert [rate / per_s for rate, per_s in zip(rates, tokens, strict=True)] == pytest.approx(
        [(forward + backward) / 8] * len(rates)
    )
    assert metrics["mfu"] == pytest.approx([rate / 1e6 for rate in rates])
    out = capsys.readouterr().out
    assert f"the model's floating-point operations: {forward + backward:.3g} a batch" in out
    assert "MFU " in out
    assert "% of the time" in out


def test_given_operations_are_taken_and_none_are_counted_where_code_is_compiled(capsys):
    metrics = logged("superscale", flops_per_token=100)
    assert metrics["model_flops_per_s"] == pytest.approx([100 * rate for rate in metrics["tokens_per_s"]])
    try:
        torch.compile(lambda x: x + 1, backend="eager")  # anywhere in the process: the step may call it
        assert "model_flops_per_s" not in logged("superscale")
    finally:
        torch._dynamo.reset()
    assert "MFU is not known: operations of compiled code can't be counted; pass flops_per_token" in (
        capsys.readouterr().out
    )


def test_the_bar_shows_speed_and_callbacks_see_all():
    run = fit(
        Regressor(),
        "superoffload",
        callbacks=[lss.ScaleMonitor(every_n_steps=4, peak_flops=1e6)],
        precision="bf16-true",
    )
    assert {"tokens_per_s", "mfu", "stall_share", "process_bytes"} <= run.callback_metrics.keys()
    assert {"tokens_per_s", "mfu"} <= run.progress_bar_metrics.keys()


def test_a_monitored_run_has_the_bits_of_another():
    for strategy in ("auto", "superoffload"):
        modules = [Regressor(), Regressor()]
        fit(modules[0], strategy)
        fit(modules[1], strategy, callbacks=[lss.ScaleMonitor()])
        assert "training_step" not in vars(modules[1])
        for key, value in modules[0].state_dict().items():
            assert torch.equal(modules[1].state_dict()[key], value)


def test_a_step_that_fails_leaves_the_module_as_it_was():
    class Fails(Regressor):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("no step")

    class FailsBefore(lss.ScaleMonitor):
        def on_train_batch_start(self, *args):
            raise RuntimeError("no step")

    for module, monitor in ((Fails(), lss.ScaleMonitor()), (Regressor(), FailsBefore())):
        with pytest.raises(RuntimeError, match="no step"):
            fit(module, "superscale", callbacks=[monitor])
        assert "training_step" not in vars(module)


def test_the_step_of_an_instance_stays_its_own():
    module = Regressor()
    own = module.training_step
    module.training_step = lambda batch, batch_idx: own(batch, batch_idx)
    before = module.training_step
    fit(module, "superscale", callbacks=[lss.ScaleMonitor()])
    assert module.training_step is before


def test_exposed_time_is_that_of_the_phases(monkeypatch):
    """A step that takes 20 ms more is exposed, whatever the machine does besides."""
    from lightning_superscale.optim.engine import OptimizerEngine

    real = OptimizerEngine.step

    def slow(self, *args, **kwargs):
        time.sleep(0.02)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(OptimizerEngine, "step", slow)
    found = logged("superscale")["exposed_s_per_step"]
    assert len(found) == 3
    assert all(seconds >= 0.02 for seconds in found)


@pytest.mark.parametrize("name", ["flops_per_token", "peak_flops"])
def test_a_rate_of_nothing_is_refused(name):
    with pytest.raises(ValueError, match=f"ScaleMonitor.{name} must be .*found 0"):
        lss.ScaleMonitor(**{name: 0})


def test_a_period_below_one_is_refused():
    with pytest.raises(ValueError, match="ScaleMonitor.every_n_steps must be a whole number of at least 1, found 0"):
        lss.ScaleMonitor(every_n_steps=0)
