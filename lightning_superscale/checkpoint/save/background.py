"""Saving while training goes on.

[Note: Background saves] `save` takes a snapshot and returns; a thread writes it. At most one snapshot is in flight: the
next `save` waits for it. Ranks divide the work before they copy anything, so each copies only the items that it writes.
The thread's collectives go over a group of its own, made at construction, as they must not meet training's. Ranks
finish at different times, so while a save is in flight they agree before each step on whether it failed, over the group
that training uses; then all raise its error at the same step. Without a further step the next `save`, `wait` or `close`
raises it. Once a rank has failed, a save that the others can't finish is given up. Removals wait for the save in
flight, and are forgotten if it fails: the checkpoint that they would have deleted may be the last one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor

from lightning_superscale.checkpoint.phases import attempt
from lightning_superscale.checkpoint.save.writer import (
    OwnItem,
    PreparedSave,
    Values,
    check_place,
    prepare,
    with_values,
    write,
)
from lightning_superscale.checkpoint.state import LocalState, TensorKey
from lightning_superscale.checkpoint.storage.local import remove
from lightning_superscale.comm.collectives import control_max
from lightning_superscale.comm.mesh import DataMesh, with_own_control
from lightning_superscale.errors import CheckpointError
from lightning_superscale.ops.cpu.memory import HostBuffer
from lightning_superscale.ops.events import StreamEvent, has_streams

# The interval in seconds in which a rank that waits for its writer looks whether another one failed.
_LOOK_EVERY_S = 0.1


class BackgroundSaver:
    """Writes snapshots in a thread. Every rank makes one at the same time, and calls its methods in the same order.

    Args:
        mesh: the run's ranks.
        timeout: time limit of the agreements in which ranks wait for one another to finish writing; None for torch's.
        is_immutable: whether a tensor in host memory stays unchanged until `release()` is called; it is then written
            from its own memory. All other tensors are copied by `save`.
    """

    def __init__(
        self,
        mesh: DataMesh,
        timeout: timedelta | None = None,
        *,
        is_immutable: Callable[[TensorKey], bool] = lambda _: False,
    ) -> None:
        self._mesh = with_own_control(mesh, timeout)
        self._watch = mesh.watch
        self._is_immutable = is_immutable
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._removals: list[str] = []
        self._lock = threading.Lock()  # guards _error, _removals and _is_writing
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

        When it returns, host tensors may change, but for those that are immutable until `release()`. Kernels that the
        current stream runs after `order_after_snapshot()` may change tensors on devices.

        Args:
            path: a folder that all hosts see, or a URL that fsspec knows; the same on every rank.
            state: this rank's shards, and the description of all tensors.
            step: optimizer steps taken.

        Raises:
            CheckpointError: on every rank: the save before failed, this state can't be saved, or no checkpoint lies at
                `path` but something else.
        """
        self.wait()
        check_place(path, self._mesh)
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
        """Make each device's current stream wait for the snapshot's copies; call it before weights or states change."""
        self._slabs.order()

    def release(self) -> None:
        """Take back immutable tensors: copy those that are not written yet, and wait for those that are being written.

        Call it before these tensors change. It costs nothing once the save is done.
        """
        for values in self._borrowed:
            values.release()
        self._borrowed = []

    def remove(self, path: str) -> None:
        """Delete a checkpoint, at once or when the save in flight has succeeded. Only rank 0 deletes; others return.

        Raises:
            OSError: no save is in flight, and the checkpoint can't be deleted.
        """
        if self._mesh.world.rank != 0:
            return
        with self._lock:
            if self._is_writing or self._error is not None:
                self._removals.append(path)
                return
        remove(path)

    def raise_if_failed(self, mesh: DataMesh) -> None:
        """Raise the error of the save in flight as soon as any rank has one. Every rank calls it, before each step.

        Does nothing while no save is in flight. Otherwise the ranks make one small agreement, and wait for the save
        only once a rank has failed or all have finished.

        Args:
            mesh: the run's ranks, with a control group that the caller's thread may use.

        Raises:
            CheckpointError: the save failed; raised on every rank at the same call, once. Names the removals that were
                forgotten.
        """
        if self._thread is None:
            return
        with self._lock:
            told = torch.tensor([self._is_writing, self._error is not None], dtype=torch.int32)
        is_anyone_writing, has_failed = control_max(mesh, told, "whether the save in flight failed").tolist()
        if has_failed or not is_anyone_writing:
            self.wait()

    def wait(self) -> None:
        """Wait until the save in flight is done. Every rank calls it.

        Raises:
            CheckpointError: the save failed; raised on every rank, once. Names the removals that were forgotten.
        """
        if self._thread is None:
            return
        has_ended = self._join(self._thread)
        self._thread = None
        self._borrowed = []
        with self._lock:
            error, self._error = self._error, None
            kept, self._removals = self._removals, []
        if not has_ended:
            error = CheckpointError("ranks that write it did not come back after a rank had failed.")

        def raise_error() -> None:
            if error is not None:
                raise CheckpointError(f"{error}{' Not removed: ' if kept else ''}{', '.join(kept)}") from error

        if self._has_failed:  # a rank may not answer any more
            raise_error()
        else:
            attempt(self._mesh, raise_error, "an earlier save failed")

    @property
    def _has_failed(self) -> bool:
        return self._watch is not None and self._watch.has_failed

    def _join(self, thread: threading.Thread) -> bool:
        """Wait for the thread; whether it has ended.

        Its collectives can't be woken, and a rank that is stopped leaves them waiting. So once a rank has failed, the
        others have as long to finish as they have to give a sign of life, and then the thread is left behind.
        """
        deadline: float | None = None
        while thread.is_alive():
            thread.join(_LOOK_EVERY_S)
            if self._watch is not None and self._has_failed:
                deadline = deadline or time.monotonic() + self._watch.silence_s
                if time.monotonic() > deadline:
                    return not thread.is_alive()
        return True

    def close(self) -> None:
        """Wait for the save in flight, and free the snapshots' memory. Every rank calls it.

        Raises:
            CheckpointError: the save failed; raised on every rank, once. Names the removals that were forgotten.
        """
        self.wait()
        self._slabs.clear()

    def _write(self, path: str, snapshot: PreparedSave) -> None:
        try:
            attempt(self._mesh, self._slabs.synchronize, "the snapshot failed")
            write(path, snapshot, self._mesh)
        except BaseException as error:  # `wait` raises it on the caller's thread
            self._end(error)
            return
        failed: list[str] = []
        while removals := self._next_removals():
            for old in removals:
                try:
                    remove(old)
                except Exception as error:  # the others can be removed all the same
                    failed.append(f"{old} ({error})")
        if failed:
            self._end(CheckpointError(f"{path} was saved, and older checkpoints can't be removed: {'; '.join(failed)}"))

    def _end(self, error: BaseException) -> None:
        with self._lock:
            self._error, self._is_writing = error, False

    def _next_removals(self) -> list[str]:
        """Take the paths to delete after a save that succeeded; the save is done once there are none."""
        with self._lock:
            removals, self._removals = self._removals, []
            self._is_writing = bool(removals)
            return removals

    def _snapshot(self, one: OwnItem, prepared: PreparedSave) -> Values:
        with one.values.use() as tensor:
            if has_streams(tensor.device):
                # Forward may change a buffer at once, without asking whether it was copied.
                is_buffer = prepared.tensors[one.item.key].role == "buffer"
                return _CopiedValues(self._slabs.copy(one.item, tensor.clone() if is_buffer else tensor))
            if self._is_immutable(one.item.key):
                self._borrowed.append(_BorrowedValues(tensor))
                return self._borrowed[-1]
            return _CopiedValues(tensor.detach().clone(memory_format=torch.contiguous_format))


class _CopiedValues:
    """Values in memory that belongs to the snapshot."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    @contextmanager
    def use(self) -> Iterator[Tensor]:
        yield self._tensor


class _BorrowedValues:
    """Values in memory of the training state, until they are written or `release` copies them."""

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
        with self._lock:  # `use` holds it while the values are being written
            if not self._is_done:
                self._tensor = self._tensor.clone()
                self._is_done = True


class _Slabs:
    """Pinned host memory for snapshots of device tensors, kept for later snapshots, and the streams of the copies."""

    def __init__(self) -> None:
        self._free: dict[object, Tensor] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._events: list[StreamEvent] = []

    def copy(self, place: object, tensor: Tensor) -> Tensor:
        """Start copying a tensor; the result is complete after `record` and `synchronize`.

        Args:
            place: identifies the slab, which a later snapshot uses again.
        """
        slab = self._free.get(place)
        if slab is None or slab.shape != tensor.shape or slab.dtype != tensor.dtype:
            # Not torch's pinned memory, which is handed out in powers of two.
            buffer = HostBuffer(tensor.nbytes, pin=tensor.is_cuda, device=tensor.device.index or 0, in_forks=False)
            slab = self._free[place] = buffer.tensor(tensor.dtype, tensor.numel()).view(tensor.shape)
        if not has_streams(tensor.device):
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
        """Mark the end of a snapshot's copies, once all are started, for `synchronize` to wait for."""
        self._events = [StreamEvent(stream) for stream in self._streams.values()]

    def order(self) -> None:
        for stream in self._streams.values():
            torch.cuda.current_stream(stream.device).wait_stream(stream)

    def synchronize(self) -> None:
        for event in self._events:
            event.synchronize()

    def clear(self) -> None:
        self._free.clear()
