"""Virtual time: real engines, states and copies, whose durations are arithmetic, so that every run is the same."""

from __future__ import annotations

from concurrent.futures import Executor, Future

import torch
from torch import nn

from lightning_superscale.offload.link.link import CpuLink
from lightning_superscale.offload.superoffload.state import DeferredState
from lightning_superscale.offload.superoffload.worker import Settling, next_to_settle
from lightning_superscale.offload.zenflow.state import SplitState


class VirtualTime:
    """Two actors with a time of their own: what runs the model, and the worker that steps on the host."""

    def __init__(self) -> None:
        self.model = 0.0
        self.worker = 0.0
        self.is_worker = False

    @property
    def now(self) -> float:
        return self.worker if self.is_worker else self.model

    def advance_to(self, when: float) -> None:
        if self.is_worker:
            self.worker = max(self.worker, when)
        else:
            self.model = max(self.model, when)


class VirtualEvent:
    def __init__(self, time: VirtualTime, done_at: float) -> None:
        self._time, self._done_at = time, done_at

    def is_waitable(self) -> bool:
        return self._time.now >= self._done_at

    is_complete = is_waitable

    def wait(self) -> None:
        self._time.advance_to(self._done_at)

    synchronize = wait


class ThrottledLink(CpuLink):
    """Copies at once, and says that it took as long as a link of this speed would: one copy at a time each way."""

    def __init__(self, time: VirtualTime, d2h_seconds_per_byte: float, h2d_seconds_per_byte: float) -> None:
        super().__init__()
        self._time = time
        self._seconds_per_byte = {"d2h": d2h_seconds_per_byte, "h2d": h2d_seconds_per_byte}
        self._free_at = {"d2h": 0.0, "h2d": 0.0}

    def _send(self, way: str, nbytes: int) -> VirtualEvent:
        start = max(self._free_at[way], self._time.now)
        self._free_at[way] = start + nbytes * self._seconds_per_byte[way]
        return VirtualEvent(self._time, self._free_at[way])

    def d2h(self, dst, src):
        super().d2h(dst, src)
        return self._send("d2h", src.nbytes)

    def h2d(self, dst, src, after=None):
        super().h2d(dst, src).wait()
        return self._send("h2d", src.nbytes)


class VirtualFuture(Future):
    """Whoever asks for it lets the worker catch up first."""

    def __init__(self, worker: VirtualWorker) -> None:
        super().__init__()
        self._worker = worker
        self.done_at = 0.0

    def cancel(self) -> bool:
        self._worker.run_until(self._worker.time.model)
        return super().cancel()

    def done(self) -> bool:
        if not super().done():
            self._worker.run_until(self._worker.time.model)
        return super().done() and self.done_at <= self._worker.time.model

    def result(self, timeout=None):
        self._worker.run_for(self)
        return super().result(0)

    def exception(self, timeout=None):
        self._worker.run_for(self)
        return super().exception(0)


class VirtualWorker:
    """The tasks of `StepThread` in its order, run when somebody looks, at the virtual time when it would have."""

    def __init__(self, time: VirtualTime) -> None:
        self.time = time
        self._ahead: list[tuple[float, VirtualFuture, object, object]] = []
        self._settles: list[tuple[float, Settling]] = []

    def look_ahead(self, task, has_arrived):
        future = VirtualFuture(self)
        self._ahead.append((self.time.model, future, task, has_arrived))
        return future

    def settle(self, units):
        added = [Settling(VirtualFuture(self), unit) for unit in units]
        self._settles += [(self.time.model, settling) for settling in added]
        return [settling.future for settling in added]

    def close(self) -> None:
        self.run_until(float("inf"))

    def _at(self, when: float, look):
        """What the worker would see at a time."""
        self.time.worker, before, self.time.is_worker = when, self.time.worker, True
        try:
            return look()
        finally:
            self.time.worker, self.time.is_worker = before, False

    def _next(self):
        """(start, how to run it) of what the worker does next; None without anything."""
        self._ahead = [entry for entry in self._ahead if not entry[1].cancelled()]
        starts = []
        if self._settles:
            start = max(self.time.worker, self._settles[0][0])
            known = [settling for when, settling in self._settles if when <= start]
            chosen, is_early = self._at(start, lambda: next_to_settle(known))
            starts.append((start, lambda: self._settle(start, chosen, is_early)))
        if self._ahead:
            at = max(self.time.worker, self._ahead[0][0])
            seen = [entry for entry in self._ahead if entry[0] <= at]
            arrived = self._at(at, lambda: [entry for entry in seen if entry[3]()])
            starts.append((at, lambda: self._look_ahead(at, arrived[-1] if arrived else seen[0])))
        return min(starts, key=lambda found: found[0]) if starts else None

    def run_until(self, when: float) -> None:
        while (found := self._next()) is not None and found[0] < when:
            found[1]()

    def run_for(self, future: VirtualFuture) -> None:
        while not Future.done(future):
            self._next()[1]()
        self.time.advance_to(future.done_at)

    def _settle(self, start, settling, is_early) -> None:
        settling.is_prepared = is_early
        if is_early:
            self._run(start, settling.unit.prepare)
            return
        self._settles = [entry for entry in self._settles if entry[1] is not settling]
        settling.future.set_running_or_notify_cancel()
        self._finish(start, settling.future, settling.unit.settle)

    def _look_ahead(self, start, entry) -> None:
        self._ahead.remove(entry)
        _, future, task, _ = entry
        future.set_running_or_notify_cancel()
        self._finish(start, future, task)

    def _finish(self, start, future, task) -> None:
        result = self._run(start, task)
        future.done_at = self.time.worker
        future.set_result(result)

    def _run(self, start, task):
        self.time.worker, self.time.is_worker = start, True
        try:
            return task()
        finally:
            self.time.is_worker = False


class TimedState(DeferredState):
    """The kernel takes a time per parameter when it commits and looks, and less in its other passes."""

    def __init__(self, *args, time: VirtualTime, seconds_per_param: float, **kwargs) -> None:
        self._time, self._seconds_per_param = time, seconds_per_param
        super().__init__(*args, **kwargs)

    def _note(self, seconds, numbered, share) -> None:
        virtual = self._seconds_per_param * share * sum(segment.param.numel() for _, segment in numbered)
        super()._note(virtual, numbered, share)
        self._time.advance_to(self._time.now + virtual)


class Tick(torch.autograd.Function):
    """Passes through; its forward and its backward take a virtual time."""

    @staticmethod
    def forward(ctx, x, time, forward_s, backward_s):
        ctx.time, ctx.backward_s = time, backward_s
        time.advance_to(time.now + forward_s)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.time.advance_to(ctx.time.now + ctx.backward_s)
        return grad, None, None, None


class TimedLayers(nn.Module):
    """Equal layers in a row."""

    def __init__(self, time: VirtualTime, num_layers: int, width: int, forward_s: float, backward_s: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(width, width, bias=False, dtype=torch.bfloat16) for _ in range(num_layers)]
        self.layers = nn.ModuleList(layers)
        self._time, self._seconds = time, (forward_s / num_layers, backward_s / num_layers)

    def forward(self, x):
        for layer in self.layers:
            x = Tick.apply(layer(x).tanh(), self._time, *self._seconds)
        return x


class VirtualThread(Executor):
    """One thread of the host, in order: its work is done when it is given, at the virtual time when it would be."""

    def __init__(self, time: VirtualTime) -> None:
        self._time = time

    def submit(self, task, /, *args, **kwargs):
        time, done = self._time, _DoneAt(self._time)
        time.worker, time.is_worker = max(time.worker, time.model), True
        try:
            done.set_result(task(*args, **kwargs))
        finally:
            time.is_worker = False
        done.at = time.worker
        return done


class _DoneAt(Future):
    """Whoever asks for it waits until it is done."""

    def __init__(self, time: VirtualTime) -> None:
        super().__init__()
        self._time = time
        self.at = 0.0

    def done(self) -> bool:
        return self._time.now >= self.at

    def result(self, timeout=None):
        self._time.advance_to(self.at)
        return super().result(0)


class TimedSplitState(SplitState):
    """Adding a gradient up and stepping deferred columns take a time per element each."""

    def __init__(self, *args, time: VirtualTime, adding: float, updating: float, **kwargs) -> None:
        self._time, self._adding, self._updating = time, adding, updating
        super().__init__(*args, **kwargs)

    def _lay_out(self, layouts) -> None:
        super()._lay_out(layouts)
        absorb = self.sums.absorb

        def timed(one, *args, **kwargs) -> None:
            absorb(one, *args, **kwargs)
            self._time.advance_to(self._time.now + self._adding * one.layout.deferred_numel)

        self.sums.absorb = timed

    def _step_host(self, op, hypers, ahead) -> None:
        super()._step_host(op, hypers, ahead)
        numel = sum(self.slices[i].layout.deferred_numel for i in hypers)
        self._time.advance_to(self._time.now + self._updating * numel)
