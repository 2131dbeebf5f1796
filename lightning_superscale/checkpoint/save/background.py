"""Saving while training goes on.

[Note: Background saves] `save` takes a snapshot and returns; a thread writes it. One snapshot is in flight: the next
`save` waits for it. Ranks divide the work before they copy anything, so each copies only what it writes. The thread's
collectives go over a group of its own, made at construction, as they must not meet training's. Ranks end at different
times, so while a save is in flight they agree before each step on whether it failed, over the group that training
uses; then all raise its error at the same step. Without a further step it is raised at the next call, or at `close`.
Removals wait for the save in flight, and are forgotten if it fails: what they would have deleted may be the last
checkpoint.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor

from lightning_superscale.checkpoint.phases import attempt
from lightning_superscale.checkpoint.save.writer import OwnItem, PreparedSave, Values, prepare, with_values, write
from lightning_superscale.checkpoint.state import LocalState, TensorKey
from lightning_superscale.checkpoint.storage.local import remove
from lightning_superscale.comm.collectives import control_max
from lightning_superscale.comm.mesh import DataMesh, with_own_control
from lightning_superscale.errors import CheckpointError


class BackgroundSaver:
    """Writes snapshots in a thread. Every rank makes one at the same time, and calls its methods in the same order.

    Args:
        mesh: the run's ranks.
        timeout: of the agreements in which ranks wait for each other to have written; None for torch's.
        is_immutable: which tensors in host memory nobody changes until `release()` was called; they are written from
            where they are. All others are copied by `save`.
    """

    def __init__(
        self,
        mesh: DataMesh,
        timeout: timedelta | None = None,
        *,
        is_immutable: Callable[[TensorKey], bool] = lambda _: False,
    ) -> None:
        self._mesh = with_own_control(mesh, timeout)
        self._is_immutable = is_immutable
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._removals: list[str] = []
        self._lock = threading.Lock()  # of the above
        self._is_writing = False
        self._borrowed: list[_BorrowedValues] = []
        self._slabs = _Slabs()

    @property
    def is_busy(self) -> bool:
        """Whether a save is in flight on this rank."""
        with self._lock:
            return self._is_writing

    def save(self, path: str, state: LocalState, *, step: int | None = None) -> None:
        """Snapshot a state and start writing it to `path`. Every rank calls it.

        When it returns, host tensors may change, but for those that `is_immutable` names; tensors on devices may
        change in what the current stream runs after `order_after_snapshot()`.

        Raises:
            CheckpointError: the save before failed, or this state can't be saved; on every rank.
        """
        self.wait()
        prepared = prepare(state, self._mesh, step=step)
        self._borrowed = []
        values: list[Values] = []

        def copy() -> None:
            values.extend(self._snapshot(one, prepared) for one in prepared.own)
            self._slabs.record()

        attempt(self._mesh, copy, "the snapshot failed")
        snapshot = with_values(prepared, values)
        self._is_writing = True
        self._thread = threading.Thread(
            target=self._write, args=(path, snapshot), name="lightning-superscale checkpoint", daemon=True
        )
        self._thread.start()

    def order_after_snapshot(self) -> None:
        """Let the current stream go on only after the copies from devices; call it before weights or states change."""
        self._slabs.order()

    def release(self) -> None:
        """Take back immutable tensors: what is not written yet is copied, and what is being written is waited for.

        Call it before they change. Costs nothing where the save is done.
        """
        for values in self._borrowed:
            values.release()
        self._borrowed = []

    def remove(self, path: str) -> None:
        """Delete a checkpoint: at once, or when the save in flight has succeeded. Only rank 0 deletes."""
        if self._mesh.world.rank != 0:
            return
        with self._lock:
            if self._is_writing or self._error is not None:
                self._removals.append(path)
                return
        remove(path)

    def raise_if_failed(self, mesh: DataMesh) -> None:
        """Raise the error of the save in flight as soon as any rank has one. Every rank calls it, before each step.

        Does nothing while none is in flight; else it is one small agreement, which waits for no save that may succeed.

        Args:
            mesh: the run's ranks, with a control group that the caller's thread may use.

        Raises:
            CheckpointError: the save failed; on every rank at the same call, once, as by `wait`.
        """
        if self._thread is None:
            return
        with self._lock:
            told = torch.tensor([self._is_writing, self._error is not None], dtype=torch.int32)
        is_anyone_writing, has_failed = control_max(mesh, told, "whether the save in flight failed").tolist()
        if has_failed or not is_anyone_writing:
            self.wait()

    def wait(self) -> None:
        """Until the save in flight is done. Every rank calls it.

        Raises:
            CheckpointError: the save failed; on every rank, once. Names the removals that were forgotten therefore.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        self._borrowed = []
        with self._lock:
            error, self._error = self._error, None
            kept, self._removals = self._removals, []

        def raise_error() -> None:
            if error is not None:
                raise CheckpointError(f"{error}{' Not removed: ' if kept else ''}{', '.join(kept)}") from error

        attempt(self._mesh, raise_error, "an earlier save failed")

    def close(self) -> None:
        """Wait, and end. Raises what `wait` raises."""
        self.wait()
        self._slabs.clear()

    def _write(self, path: str, snapshot: PreparedSave) -> None:
        try:
            attempt(self._mesh, self._slabs.synchronize, "the snapshot failed")
            write(path, snapshot, self._mesh)
            while removals := self._next_removals():
                for old in removals:
                    remove(old)
        except BaseException as error:  # raised at the next call
            with self._lock:
                self._error, self._is_writing = error, False

    def _next_removals(self) -> list[str]:
        """What to delete after a save that succeeded; with nothing left the save is done."""
        with self._lock:
            removals, self._removals = self._removals, []
            self._is_writing = bool(removals)
            return removals

    def _snapshot(self, one: OwnItem, prepared: PreparedSave) -> Values:
        with one.values.use() as tensor:
            if tensor.device.type != "cpu":
                # Forward may change a buffer at once, without asking whether it was copied.
                is_buffer = prepared.tensors[one.item.key].role == "buffer"
                return _CopiedValues(self._slabs.copy(one.item, tensor.clone() if is_buffer else tensor))
            if self._is_immutable(one.item.key):
                self._borrowed.append(_BorrowedValues(tensor))
                return self._borrowed[-1]
            return _CopiedValues(tensor.detach().clone(memory_format=torch.contiguous_format))


class _CopiedValues:
    """Values of the snapshot's own."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    @contextmanager
    def use(self) -> Iterator[Tensor]:
        yield self._tensor


class _BorrowedValues:
    """Values that stay where they are until they are written, or taken back."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._lock = threading.Lock()
        self._is_done = False

    @contextmanager
    def use(self) -> Iterator[Tensor]:
        with self._lock:
            yield self._tensor
            self._is_done = True

    def release(self) -> None:
        with self._lock:  # held while it is being written
            if not self._is_done:
                self._tensor = self._tensor.clone()
                self._is_done = True


class _Slabs:
    """Pinned host memory that snapshots of device tensors go to, on a stream of their own; kept for the next ones."""

    def __init__(self) -> None:
        self._free: dict[object, Tensor] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._events: list[torch.cuda.Event] = []

    def copy(self, place: object, tensor: Tensor) -> Tensor:
        """Start copying; the result is complete after `synchronize`."""
        slab = self._free.get(place)
        if slab is None or slab.shape != tensor.shape or slab.dtype != tensor.dtype:
            slab = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._free[place] = slab
        if not tensor.is_cuda:
            slab.copy_(tensor)
            return slab
        stream = self._streams.get(tensor.device)
        if stream is None:
            stream = self._streams[tensor.device] = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            slab.copy_(tensor.detach(), non_blocking=True)
        tensor.record_stream(stream)
        return slab

    def record(self) -> None:
        """All copies of a snapshot have been started."""
        self._events = []
        for stream in self._streams.values():
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
            self._events.append(event)

    def order(self) -> None:
        for stream in self._streams.values():
            torch.cuda.current_stream(stream.device).wait_stream(stream)

    def synchronize(self) -> None:
        for event in self._events:
            event.synchronize()

    def clear(self) -> None:
        self._free.clear()
