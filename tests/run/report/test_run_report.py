"""What `explain()`, `plan`, `exposure()` and `grad_norm()` answer once a run is over, and that nothing of it stays."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import lightning as L
import pytest
import torch

import lightning_superscale as lss
from lightning_superscale.config import OffloadConfig
from lightning_superscale.run import host_plan
from lightning_superscale.run.report import run_report
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import Regressor, fit, loader, trainer
from tests.offload.planner.test_choices import H100
from tests.run.test_weight_flow import Deep


@pytest.fixture(autouse=True)
def profile(monkeypatch):
    monkeypatch.setattr(host_plan, "cached_profile", lambda device, cpus: H100)


class Asks(L.Callback):
    """What a run says of itself at its end, and what it was made of."""

    def __init__(self) -> None:
        self.parts: list[weakref.ref] = []

    def on_train_end(self, trainer, pl_module):
        strategy = trainer.strategy
        self.said = (strategy.explain(), strategy.plan, strategy.exposure(), strategy.grad_norm())
        for engine in strategy.assembly.engines.values():
            self.parts += map(weakref.ref, [engine, engine.transport, *engine.states, *engine.transport.units])
        self.parts += [weakref.ref(part) for part in (strategy.assembly.link, *strategy.assembly.gates) if part]
        strategy.assembly.mesh.counts.clear()

    def on_exception(self, trainer, pl_module, exception):
        self.on_train_end(trainer, pl_module)


def answers(strategy):
    return strategy.explain(), strategy.plan, strategy.exposure(), strategy.grad_norm()


RUNS = {
    "superscale": (Regressor, lambda: "superscale"),
    "superoffload": (Regressor, lambda: "superoffload"),
    "flow": (
        Deep,
        lambda: lss.SuperScaleStrategy(offload=OffloadConfig(engine="superoffload", weights="flow", bucket_mb=1)),
    ),
}


@pytest.fixture(params=RUNS.values(), ids=RUNS.keys())
def make(request):
    return request.param


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_run_that_is_over_says_what_it_said_at_its_end(make, clip):
    module_class, strategy = make
    asks, module = Asks(), module_class()
    run = fit(module, strategy(), callbacks=[asks], gradient_clip_val=clip)
    assert answers(run.strategy) == asks.said
    text, plan, exposure, _ = asks.said
    assert bool(exposure) == (plan.engine != "resident")
    assert not exposure or "a step measured over 10 steps" in exposure[-1]
    assert all(f"- {line}" in text for line in exposure)
    run.validate(module, loader(), verbose=False)
    assert answers(run.strategy) == asks.said


def test_nothing_of_the_run_stays_for_it(make):
    module_class, strategy = make
    asks = Asks()
    run = fit(module_class(), strategy(), callbacks=[asks])
    assert answers(run.strategy) == asks.said
    gc.collect()
    assert [type(part()).__name__ for part in asks.parts if part() is not None] == []
    copied = copy.deepcopy(run.strategy.run._report)
    assert (copied.plan, copied.exposure) == asks.said[1:3]
    assert len(pickle.dumps(run.strategy.run._report)) < 20_000


def test_before_any_run_the_error_says_when(make):
    module_class, strategy = make
    module = module_class()
    run = trainer(strategy())
    for _ in range(2):
        with pytest.raises(lss.SuperScaleError, match=r"known once trainer.fit\(\) has set up"):
            run.strategy.explain()
        with pytest.raises(lss.SuperScaleError, match="known after an optimizer step"):
            run.strategy.grad_norm()
        assert run.strategy.exposure() == []
        run.predict(module, loader(), return_predictions=False)  # has no plan


def test_a_second_fit_starts_afresh(make):
    module_class, strategy = make
    asks = Asks()
    run = fit(module_class(), strategy(), callbacks=[asks])
    before = asks.said

    class Next(module_class):
        def configure_optimizers(self):
            with pytest.raises(lss.SuperScaleError, match="the plan is known once"):
                self.trainer.strategy.explain()
            return torch.optim.AdamW(list(self.parameters())[:2])

    run.fit_loop.max_epochs = 3
    run.fit(Next(), loader())
    assert answers(run.strategy) == asks.said
    assert asks.said[1].num_units == 1
    assert asks.said[0] != before[0]


def test_a_run_that_an_error_ended_says_what_it_was(make):
    module_class, strategy = make

    class Breaks(module_class):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.global_step == 7:
                loss.register_hook(lambda _: (_ for _ in ()).throw(RuntimeError("broken on purpose")))
            return loss

    asks = Asks()
    run = trainer(strategy(), callbacks=[asks])
    with pytest.raises(RuntimeError, match="broken on purpose"):
        run.fit(Breaks(), loader())
    assert run.strategy.plan.bytes == asks.said[1].bytes
    assert run.strategy.explain().startswith(asks.said[0].split("exposed beyond")[0])  # backward ended meanwhile
    assert run.strategy.grad_norm() == asks.said[3]


def test_what_cannot_be_noted_hides_no_error_and_is_one_when_asked_for(make, monkeypatch):
    def unknown(assembly, phases):
        raise RuntimeError("a part is gone")

    class Breaks(make[0]):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            monkeypatch.setattr(run_report, "plan_of", unknown)
            raise ValueError("broken on purpose")

    run = trainer(make[1]())
    with pytest.raises(ValueError, match="broken on purpose"):
        run.fit(Breaks(), loader())
    with pytest.raises(lss.SuperScaleError, match=r"plan of the last fit\(\) could not be noted.*a part is gone"):
        run.strategy.explain()
    assert run.strategy.grad_norm() > 0


def test_without_a_step_there_is_no_norm():
    class Own(Regressor):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=1e-2)

    run = fit(Own(), "superoffload")
    assert "its own code" in run.strategy.explain()
    with pytest.raises(lss.SuperScaleError, match="after an optimizer step of Adam or AdamW"):
        run.strategy.grad_norm()


class BreaksOnRank1(Regressor):
    def training_step(self, batch, batch_idx):
        if self.global_step == 2 and self.global_rank == 1:
            raise ValueError("broken on purpose")
        return super().training_step(batch, batch_idx)


class Norms(L.Callback):
    """The last step's norm, asked for too late for the run to keep it."""

    def on_train_end(self, trainer, pl_module):
        self.text = trainer.strategy.explain()
        trainer.strategy.assembly.mesh.counts.clear()


def over_ranks(rank: int, world_size: int, names):
    results = []
    for name in names:
        asks, norms = Asks(), Norms()
        early = fit(Regressor(), name, devices=world_size, callbacks=[asks])
        late = fit(Regressor(), name, devices=world_size, callbacks=[norms])
        assert late.strategy.run.environment.mesh.counts.calls["control"] == 1  # ranks meet at the end of training
        assert answers(early.strategy) == asks.said
        assert late.strategy.explain() == norms.text
        results.append((float(asks.said[3]), float(late.strategy.grad_norm())))
    broken = trainer("zero2", devices=world_size)
    with pytest.raises(lss.SuperScaleError if rank == 0 else ValueError, match="broken on purpose"):
        broken.fit(BreaksOnRank1(), loader())
    told = broken.strategy.explain()
    with pytest.raises(lss.SuperScaleError, match="interrupted before ranks had added up"):
        broken.strategy.grad_norm()
    return results, told


def test_several_ranks_add_up_their_norms_when_asked_and_not_before():
    for results, told in run_ranks(2, over_ranks, ["superscale", "zero2", "zero3", "superoffload"]):
        assert all(during == later for during, later in results)
        assert "2: 1 copy, each over 2 ranks" in told
