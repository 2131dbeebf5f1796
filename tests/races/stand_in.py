"""Plays a device with streams on CPU tensors, so that the code that runs on CUDA runs here, and is watched.

`playing(world)` replaces torch.cuda's streams and events, storages' `resize_`, host buffers, futures, executors and
the locks of our own threads by stand-ins that keep clocks. The link, the engines and everything above are the real
ones.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
import types
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_superscale.offload import host_state
from lightning_superscale.offload.superoffload import worker
from lightning_superscale.ops import events
from lightning_superscale.ops.cpu import adamw, flat, memory
from lightning_superscale.ops.cpu.pool import Ticket
from lightning_superscale.optim import clipping
from lightning_superscale.optim.weights import store
from lightning_superscale.torch_private import storage_id_of
from tests.races.clocks import Actor, join
from tests.races.dispatch import Watching
from tests.races.streams import Event, Stream
from tests.races.world import World, where_am_i


class _Lock:
    """A lock that orders what was done before its release before what is done after the next acquisition."""

    def __init__(self, world: World, lock: Any) -> None:
        self._world, self._lock, self._clock = world, lock, {}

    def __enter__(self) -> None:
        self._lock.acquire()
        with self._world.lock:
            join(self._world.thread.clock, self._clock)

    def __exit__(self, *_error: object) -> None:
        with self._world.lock:
            join(self._clock, self._world.thread.clock)
        self._lock.release()

    def _is_owned(self) -> bool:
        return self._lock._is_owned()


@contextlib.contextmanager
def playing(world: World) -> Iterator[None]:
    """While open, CPU tensors play a device with streams, and the calling thread is watched."""
    with pytest.MonkeyPatch.context() as patch:
        world.compute = Stream(world, "the stream that computes")
        _play_streams(patch, world)
        _play_memory(patch, world)
        _play_threads(patch, world)
        _play_kernels(patch, world)
        try:
            with Watching(world):
                yield
        finally:
            world.close()


def _play_streams(patch: pytest.MonkeyPatch, world: World) -> None:
    patch.setattr(events, "STREAMED_DEVICE_TYPES", frozenset({"cpu", "cuda"}))
    patch.setattr(torch.cuda, "Stream", lambda device=None: Stream(world, world.new_name("stream")))
    patch.setattr(torch.cuda, "Event", lambda **_options: Event(world))
    patch.setattr(torch.cuda, "current_stream", lambda device=None: world.stream)
    patch.setattr(torch.cuda, "stream", world.on_stream)
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    patch.setattr(torch.cuda, "synchronize", lambda device=None: world.compute.synchronize())

    def record_stream(self: Tensor, stream: Actor) -> None:
        with world.lock:
            known = world.allocation_of(self)
            if stream is not known.owner and stream not in known.recorded:
                known.recorded.append(stream)

    patch.setattr(torch.Tensor, "record_stream", record_stream)

    for name in ("tolist", "cpu", "numpy"):  # on a CPU they read memory without an operation of torch
        patch.setattr(torch.Tensor, name, _reading(world, getattr(torch.Tensor, name), name))


def _reading(world: World, real: Any, name: str) -> Any:
    def read(self: Tensor, *args: Any, **options: Any) -> Any:
        if world.is_known(self) and not world.allocation_of(self).is_on_host:
            with world.lock:
                stream = world.stream
                world.launch(stream)
                world.touch(stream, [self], [], where_am_i(name))
                join(world.thread.clock, stream.clock)
        return real(self, *args, **options)

    return read


def _play_memory(patch: pytest.MonkeyPatch, world: World) -> None:
    real_resize, real_init = torch.UntypedStorage.resize_, memory.HostBuffer.__init__

    def resize_(self: torch.UntypedStorage, nbytes: int) -> torch.UntypedStorage:
        known, before = world._memory.get(storage_id_of(self)), self.nbytes()
        with world.lock:
            if known is not None and before:
                world.give_back(known, before, where_am_i("resize_"))
            real_resize(self, nbytes)
            if known is not None and nbytes:
                world.take(known, nbytes)
        return self

    def init(self: memory.HostBuffer, nbytes: int, pin: bool = False, **options: Any) -> None:
        with world.making_host_memory():
            real_init(self, nbytes, False, **options)
            world.allocation_of(self._bytes, where_am_i("a host buffer")).is_pinned = pin

    patch.setattr(torch.UntypedStorage, "resize_", resize_)
    patch.setattr(memory.HostBuffer, "__init__", init)
    real_on_device = clipping._on_device

    def on_device(item: Any) -> Tensor:
        grad = real_on_device(item)
        if not world.allocation_of(grad).is_on_host:
            return grad
        return torch.empty(grad.shape, dtype=grad.dtype).copy_(grad)  # `to` of a CPU's tensor to a CPU is no copy

    patch.setattr(clipping, "_on_device", on_device)
    # The only tensors that the package makes in host memory with a factory of torch.
    patch.setattr(host_state, "torch", _HostTorch(world))


class _HostTorch(types.ModuleType):
    """torch, whose `empty` makes host memory."""

    def __init__(self, world: World) -> None:
        super().__init__("torch")
        self._world = world

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *args: Any, **options: Any) -> Tensor:
        with self._world.making_host_memory():
            return torch.empty(*args, **options)


def _play_threads(patch: pytest.MonkeyPatch, world: World) -> None:
    future, executor = concurrent.futures.Future, concurrent.futures.ThreadPoolExecutor
    real = {name: getattr(future, name) for name in ("set_result", "set_exception", "result", "exception", "done")}

    def note(self: Any) -> None:
        with world.lock:
            self.__dict__["clock"] = dict(world.thread.clock)

    def follow(self: Any) -> None:
        with world.lock:
            join(world.thread.clock, self.__dict__.get("clock", {}))

    def set_result(self: Any, result: Any) -> None:
        note(self)
        real["set_result"](self, result)

    def set_exception(self: Any, error: Any) -> None:
        note(self)
        real["set_exception"](self, error)

    def result(self: Any, timeout: float | None = None) -> Any:
        try:
            return real["result"](self, timeout)
        finally:
            follow(self)

    def exception(self: Any, timeout: float | None = None) -> Any:
        error = real["exception"](self, timeout)
        follow(self)
        return error

    def done(self: Any) -> bool:
        is_done = real["done"](self)
        if is_done:
            follow(self)
        return is_done

    for name, replacement in (
        ("set_result", set_result),
        ("set_exception", set_exception),
        ("result", result),
        ("exception", exception),
        ("done", done),
    ):
        patch.setattr(future, name, replacement)
    real_submit = executor.submit

    def submit(self: Any, function: Any, /, *args: Any, **options: Any) -> Any:
        with world.lock:
            clock = dict(world.thread.clock)

        def run() -> Any:
            with world.lock:
                join(world.thread.clock, clock)
            with Watching(world):
                return function(*args, **options)

        return real_submit(self, run)

    patch.setattr(executor, "submit", submit)
    locks = types.SimpleNamespace(
        Lock=lambda: _Lock(world, threading.Lock()),
        RLock=lambda: _Lock(world, threading.RLock()),
        get_ident=threading.get_ident,
    )
    patch.setattr(worker, "threading", locks)
    patch.setattr(store, "threading", locks)


def _play_kernels(patch: pytest.MonkeyPatch, world: World) -> None:
    """Kernels of the host are called past torch: note what they touch."""
    real_run, real_submit = adamw._run, adamw._submit

    def touched(mode: Any, segments: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
        reads, writes = [], []
        for segment in segments:
            for name, tensor in adamw._tensors(mode, segment):
                is_written = name == "weight_out" or (mode.writes_state and not name.endswith("grad"))
                (writes if is_written else reads).append(tensor)
        return reads, writes

    def run(mode: Any, segments: Any, stats: bool, pool: Any) -> Any:
        world.touch(world.thread, *touched(mode, segments), where_am_i(mode.name))
        return real_run(mode, segments, stats, pool)

    def submit(mode: Any, segments: Any, *args: Any) -> Any:
        segments = list(segments)
        with world.lock:
            job = Actor(world.new_name("job"))
            join(job.clock, world.thread.clock)
            world.touch(job, *touched(mode, segments), where_am_i(mode.name))
        return _Job(real_submit(mode, segments, *args), world, job)

    patch.setattr(adamw, "_run", run)
    patch.setattr(adamw, "_submit", submit)
    patch.setattr(flat, "loader", types.SimpleNamespace(native=lambda: None))  # torch's operations are seen


class _Job:
    """The ticket of a job of the worker pool, which is over for those who wait for it."""

    def __init__(self, ticket: Ticket[Any], world: World, job: Actor) -> None:
        self._ticket, self._world, self._job = ticket, world, job

    def _follow(self) -> None:
        with self._world.lock:
            join(self._world.thread.clock, self._job.clock)

    def wait(self) -> Any:
        try:
            return self._ticket.wait()
        finally:
            self._follow()

    def synchronize(self) -> None:
        self.wait()

    def is_complete(self) -> bool:
        is_over = self._ticket.is_complete()
        if is_over:
            self._follow()
        return is_over

    is_waitable = is_complete
