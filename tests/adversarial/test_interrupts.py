"""An interrupted run leaves a checkpoint of a whole step, or none: never weights of one step and states of another."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
import weakref

import lightning as L
import pytest
import torch

import lightning_superscale as lss
from lightning_superscale.offload.superoffload.plan import PlanChooser
from lightning_superscale.run.interrupts import StepInterrupts
from tests.adversarial.reading_modules import Reads
from tests.helpers.extent import IS_ALL
from tests.helpers.interrupts import RaisesAtLine
from tests.helpers.trainers import loader, trainer

STRATEGIES = {
    "superscale": lambda: "superscale",
    "cpu": lambda: lss.SuperScaleStrategy(offload="cpu"),
    "superoffload": lambda: "superoffload",
    "superoffload, awaited": lambda: "superoffload",
    "flow": lambda: lss.SuperScaleStrategy(offload={"engine": "superoffload", "weights": "flow", "wrap": ["Linear"]}),
    "zenflow": lambda: lss.SuperScaleStrategy(
        offload={"engine": "zenflow", "zenflow": {"topk": 0.3, "update_interval": 2}}
    ),
}
EACH = pytest.mark.parametrize("name", STRATEGIES)
NUM_STEPS = 6
FLAGS = {"max_steps": NUM_STEPS, "max_epochs": -1, "gradient_clip_val": 0.5}


class Small(Reads):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Sequential(torch.nn.Linear(17, 40), torch.nn.GELU(), torch.nn.Linear(40, 5))


@pytest.fixture(autouse=True)
def heeds_ctrl_c():
    """A shell's background job ignores Ctrl-C, and what it starts does."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def awaits_where_the_name_says_so(request, monkeypatch):
    """The steps of a new run are not awaited."""
    name = request.node.callspec.params.get("name", "") if hasattr(request.node, "callspec") else ""
    if name.endswith("awaited"):
        monkeypatch.setattr(PlanChooser, "_is_better_awaited", lambda chooser: True)


def snapshot(run):
    """What a checkpoint has: counters, weights, moments and masters."""
    saved = run._checkpoint_connector.dump_checkpoint(weights_only=False)
    [states] = saved["optimizer_states"]
    tensors = dict(saved["state_dict"])
    for index, state in states["state"].items():
        tensors |= {f"{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    return saved["global_step"], {key: value.detach().clone() for key, value in tensors.items()}


class SavesEachStep(L.Callback):
    def __init__(self, only: int | None = None) -> None:
        self.steps = {}
        self.only = only

    def on_train_batch_end(self, trainer, *_):
        if self.only in (None, trainer.global_step):
            number, tensors = snapshot(trainer)
            self.steps[number] = tensors


class SavesOnException(L.Callback):
    """What a user's OnExceptionCheckpoint would have written, or the error that said why it would not."""

    found = None

    def on_exception(self, trainer, module, exception):
        try:
            self.found = snapshot(trainer)
        except lss.SuperScaleError as error:
            self.found = error


def whole_steps(name):
    keeper = SavesEachStep()
    trainer(STRATEGIES[name](), callbacks=[keeper], **FLAGS).fit(Small(), loader())
    return keeper.steps


def is_whole(found, steps) -> bool:
    number, tensors = found
    if os.environ.get("SHOW_TORN"):
        print(
            "TORN", number, [(other, [k for k in t if not torch.equal(t[k], tensors[k])]) for other, t in steps.items()]
        )
    if number == 0:
        return not any(key.split(".")[-1].startswith("exp") for key in tensors)
    expected = steps[number]
    return expected.keys() == tensors.keys() and all(torch.equal(expected[key], tensors[key]) for key in expected)


class Traced(L.Callback):
    """Traces one step: from the start of its batch to the start of the next."""

    def __init__(self, tracer: RaisesAtLine) -> None:
        self.tracer = tracer

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        sys.settrace(self.tracer if trainer.global_step == self.tracer.number else None)

    def on_train_batch_end(self, *_):
        sys.settrace(None)


def run_traced(name, error, place):
    tracer, saver = RaisesAtLine(error, place, 3), SavesOnException()
    run = trainer(STRATEGIES[name](), callbacks=[Traced(tracer), saver], **FLAGS)
    try:
        run.fit(Small(), loader())
    except (error, SystemExit):
        pass
    finally:
        sys.settrace(None)
    return tracer, saver.found


@EACH
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_at_any_line_of_a_step_saves_a_whole_step_or_nothing(name, error):
    steps = whole_steps(name)
    tracer, _ = run_traced(name, error, None)
    places = set(random.Random(name).sample(range(1, tracer.num_lines), 120 if IS_ALL else 10))
    # Between the optimizer's step and Lightning's count of it, every line.
    places |= set(range(tracer.last_in_step - 16, min(tracer.last_in_step + 5, tracer.num_lines)))
    torn, refused = [], []
    for place in sorted(places):
        tracer, found = run_traced(name, error, place)
        if isinstance(found, Exception):
            refused.append(tracer.where)
        elif found is not None and not is_whole(found, steps):
            torn.append(tracer.where)
    assert torn == [], f"{len(torn)} of {len(places)}; {refused} refused"


@EACH
def test_ctrl_c_at_any_moment_ends_a_run_at_a_whole_step(name):
    steps = whole_steps(name)
    chooser = random.Random(name)
    for _ in range(60 if IS_ALL else 6):
        saver, delay = SavesOnException(), chooser.uniform(0, 0.02)

        class Starts(L.Callback):
            def on_train_batch_start(self, trainer, module, batch, batch_idx, delay=delay):
                if trainer.global_step == 2:
                    threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()

        run = trainer(STRATEGIES[name](), callbacks=[Starts(), saver], **{**FLAGS, "max_steps": 100_000})
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run.fit(Small(), Endless())
        assert signal.getsignal(signal.SIGINT) == before
        assert not isinstance(saver.found, Exception), saver.found
        number, tensors = saver.found
        steps |= {} if number in steps else more_steps(name, number)
        assert is_whole(saver.found, steps), f"step {number} after {delay} s"


class Endless:
    """The loader's batches, again and again."""

    def __iter__(self):
        batches = list(loader())
        while True:
            yield from batches


def more_steps(name, number):
    keeper = SavesEachStep(number)
    run = trainer(STRATEGIES[name](), callbacks=[keeper], **{**FLAGS, "max_steps": number})
    run.fit(Small(), Endless())
    return keeper.steps


class Given:
    """Is given up with an interrupt in it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        if kind == "finalizer":
            weakref.finalize(self, interrupt)

    def __del__(self):
        if self.kind == "__del__":
            interrupt()


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):  # Python heeds a signal between two instructions
        pass


@pytest.mark.parametrize("kind", ["__del__", "finalizer"])
def test_ctrl_c_while_an_object_is_given_up_comes_afterwards(kind):
    interrupts = StepInterrupts()
    interrupts.open()
    try:
        given = Given(kind)
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 # it may come at any moment
            del given
            time.sleep(5)
    finally:
        interrupts.close()


def test_a_second_ctrl_c_does_not_wait_for_a_step_that_is_stuck():
    class Stuck(Small):
        def on_train_start(self):
            engine = next(iter(self.trainer.strategy.assembly.engines.values()))

            def collect():
                for delay in (0.1, 0.3):
                    threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()
                time.sleep(30)

            engine.transport.collect = collect

    start = time.monotonic()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer("superoffload", **FLAGS).fit(Stuck(), loader())
    assert time.monotonic() - start < 20
