"""Weights of one unit that live on the host, and on the device only while forward or backward uses them.

[Note: Where a weight is] A flowing unit has one flat device buffer, whose storage is empty most of the time, and one
or more flat host buffers. While its weights are on the device, its parameters view the device buffer; otherwise they
view the host's, so that code that reads or edits a parameter between steps finds the current whole weight there. The
storage is emptied and filled again in place: autograd's saved views of a weight (`weight.t()`) keep the storage, and
find it filled between `acquire` and `release`. Weights that arrive twice in a step are the same, because no step writes
the host's current weights before its verdict.

    absent      storage empty, parameters view the host
    arriving    storage allocated, copies under way or about to be; parameters still view the host
    filled      gathered there, on the way to the host; parameters still view the host
    present     parameters view the device

Memory on CUDA: the storage is allocated and freed on the stream that computes, in the order of its work, and copies
run behind a fence taken at the allocation. So copies wait for the work that used that memory before, and an early
allocation lets them overlap with work that was queued since. Before the storage is emptied the computing stream waits
for copies that no use has waited for. The host does not wait.

[Note: Weights of several ranks] Where ranks share a unit's steps, each makes new rows of its own. They meet on the
devices, whose links and network are the fastest way between ranks: a rank sends its rows up, the devices gather, and
each brings the whole weights down into its own host memory (`filling`), while it may use those on the device already.
Ranks can't meet in host memory that they share: it would take an edit of a parameter (`param.mul_(0.5)`) once for every
rank.

[Note: Interrupted copies] Emptying the storage frees memory that tensors still name, so no copy may be under way to it.
An interrupt or an error may come between the start of a copy and the note of its event; from then on nobody knows of
it but the link, which is drained before the storage is emptied.

[Note: Which host buffer] A state whose new weights are written before the verdict gives three buffers per slice, which
take turns: one holds the weights that stream, one the gradient that waits for its commit, one receives this step's
gradient (`offload/superoffload/state.py`). A state whose weights are written after backward gives one buffer, which is
overwritten. Where ranks share steps there is one buffer of whole weights, apart from the state's own buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor, nn

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.layout.rows import ParamSlice, UnitLayout
from lightning_superscale.offload.link.link import Link, LinkEvent, LinkFence
from lightning_superscale.optim.unit import shaped, slice_view
from lightning_superscale.optim.weights.param_classes import data_ptr_of, set_data
from lightning_superscale.optim.weights.store import NewWeights
from lightning_superscale.optim.weights.watch import WeightWatch
from lightning_superscale.torch_private import plainly, storage_id_of


class StreamedUnit(Protocol):
    """The members of a unit that flows: whole parameters, and an empty flat buffer on the device that they can view.

    Attributes:
        weights: flat buffer [full.shard_numel] on the device.
        views: each parameter's weight, as a view of `weights`.
        is_whole: whether this rank steps all rows, so that `full` and `shard` are equal.
    """

    @property
    def full(self) -> UnitLayout: ...
    @property
    def is_whole(self) -> bool: ...

    @property
    def params(self) -> tuple[nn.Parameter, ...]: ...
    @property
    def shard(self) -> UnitLayout: ...

    def edits_of(self, i: int) -> int:
        """A number that grows when anything but a step changes weight i in place."""

    weights: Tensor
    views: tuple[Tensor, ...]


class LateUpload:
    """The upload of new rows that stay on the host until their gather begins: all at once would fill the device.

    `wait` starts the copies and orders the current stream's later work after them. The upload is waitable from the
    start, because the rows are on the host.
    """

    def __init__(self, start: Callable[[], Sequence[LinkEvent]]) -> None:
        self._start = start

    def is_waitable(self) -> bool:
        return True

    def wait(self) -> None:
        for copy in self._start():
            copy.wait()


class FlowingWeights:
    """The store of one unit's weights that flow. Takes over its parameters' present values.

    Satisfies `WeightStore` of optim/weights/store.py: `receive` hands it the step's new weights, and it waits for them
    at their next use. A use is `acquire`, then `release`; `prefetch` comes before a use that is foreseen.

    Args:
        unit: whole parameters of one dtype, in host memory or on the device.
        link: the device's link; counts every byte.
        buffers: host buffers [full.shard_numel] of the parameters' dtype.
        first: index of the buffer that takes the present weights.

    Attributes:
        is_present: whether parameters view the weights on the device.
        watch: lets reads of parameters wait for new weights.
        is_lost: whether new weights did not arrive, because of an error.
    """

    def __init__(self, unit: StreamedUnit, link: Link, buffers: Sequence[Tensor], *, first: int = 0) -> None:
        self.unit = unit
        self.is_present = self.is_lost = False
        self._link = link
        self._buffers = buffers
        self._on_host = [[_view(buffer, piece) for piece in unit.full.slices] for buffer in buffers]
        self._current = [first] * len(unit.params)
        self._params: dict[int, nn.Parameter] = dict(enumerate(unit.params))
        self._storage = unit.weights.untyped_storage()
        self._fence: LinkFence | None = None
        self._copies: list[LinkEvent] = []
        self._is_filled = False
        self._is_sending = False  # whether copies were begun and not noted; see [Note: Interrupted copies]
        self._new: NewWeights | None = None
        self._landing: LinkEvent | None = None
        self._edits: dict[int, int] = {}
        self.watch = WeightWatch(unit.params, self._between_uses)
        for i, param in self._params.items():
            self._on_host[first][i].copy_(param.detach())
        self._bind_host()

    # New weights

    def receive(self, new: NewWeights) -> None:
        """Keep the new weights of the last step; the next use of the unit's weights waits for them."""
        self._new = new
        self.watch.expect()

    def wait_new(self) -> bool:
        """Return when new weights are in host memory or on their way there; gathered ones leave the device.

        Returns:
            whether there were new weights.
        """
        has_new = self._wait_new()
        if self._is_filled:
            self.release()
        return has_new

    def _between_uses(self) -> None:
        """Get ready for code that reads or writes parameters between two uses, where they view host memory."""
        self.watch.arrived()
        self.wait_new()
        if not self.is_present:
            self.release()  # what was copied ahead would miss a write
            self.synchronize()

    def _wait_new(self) -> bool:
        new = self._new
        if new is None:
            return False
        self.watch.arrived()  # before parameters are given other memory below, which is no read
        try:
            new.wait()
        except Exception:
            self._new, self.is_lost = None, True
            raise
        if self.unit.is_whole:
            self._follow_host()
        self._new = None  # last: after an interrupt the next use waits once more
        return True

    def abandon(self) -> None:
        """Wait for no other rank any more, since one failed."""
        if self._new is not None:
            self._new.abandon()

    # Host side

    def of(self, i: int) -> Tensor:
        """This rank's rows of the current host weight i, 1D."""
        own = self.unit.shard.slices[i]
        start = self.unit.full.slices[i].offset + own.global_offset
        return self._buffers[self._current[i]][start : start + own.numel]

    def switch(self, i: int, buffer: int) -> None:
        """Note that slice i's current weights are in another buffer from now on.

        Any thread may call it; parameters view the buffer after the next wait for new weights.
        """
        self._current[i] = buffer

    def _follow_host(self) -> None:
        """Let parameters view the current host weights, which have changed; old weights leave the device.

        Edits of the old weights are on the host by then, because the step began by fetching them (`rows_with_edits`).
        """
        self.release()
        self._bind_host()

    def rows_with_edits(self, i: int) -> Tensor:
        """This rank's rows of the current host weight i, 1D, with edits that were made on the device."""
        self.release()
        self._await_landing()
        return self.of(i)

    def _bind_host(self) -> None:
        for i, param in self._params.items():
            set_data(param, self._on_host[self._current[i]][i])

    def synchronize(self) -> None:
        """Block the host until no copy reads or writes the host weights, so that user code may read or edit them."""
        self._await_unknown()
        for copy in self._copies:
            copy.synchronize()
        self._await_landing()

    def _await_unknown(self) -> None:
        """Wait for copies that an interrupt kept from being noted."""
        if self._is_sending:
            self._link.drain()
            self._is_sending = False

    def _await_landing(self) -> None:
        if self._landing is not None:
            self._landing.synchronize()
            self._landing = None

    def _has_landed(self) -> bool:
        """Whether host memory has what was gathered on the device last."""
        if self._landing is not None and self._landing.is_complete():
            self._landing = None
        return self._landing is None

    @contextmanager
    def filling(self, *, is_whole: bool) -> Iterator[None]:
        """While open, `unit.weights` can be written; on exit a copy of the weights to the host begins.

        The weights stay on the device for their next use, or until `wait_new`.

        Args:
            is_whole: whether all weights will be written; otherwise the old ones are brought to the device first.
        """
        self.release()
        self.synchronize()
        if is_whole:
            self._storage.resize_(self.full_bytes)
        else:
            self._want(are_on_host=True)
            for copy in self._copies:
                copy.wait()
        self._copies = []
        try:
            yield
        except BaseException:
            self.release()
            raise
        self._is_sending = True
        self._landing = self._link.d2h(self._buffers[0], self.unit.weights)
        self._is_filled, self._is_sending = True, False

    def forget(self, param: nn.Parameter) -> None:
        """Let go of a parameter, which another unit owns from now on."""
        self._params = {i: known for i, known in self._params.items() if known is not param}
        self.watch.forget(param)

    @property
    def is_empty(self) -> bool:
        """Whether other units own all of the parameters."""
        return not self._params

    # Device side

    @property
    def storage_id(self) -> int:
        """A number that identifies this unit's device storage, filled or not."""
        return storage_id_of(self._storage)

    @property
    def full_bytes(self) -> int:
        """Device memory, in bytes, that the weights occupy while they are on the device."""
        return self.unit.full.shard_numel * self.unit.weights.element_size()

    @property
    def device_bytes(self) -> int:
        """Device memory, in bytes, that the weights occupy now."""
        return int(self._storage.nbytes())

    def prefetch(self) -> None:
        """Prepare a use: allocate device memory, and start the copies if the host has the current weights."""
        if self._new is not None:
            self._new.begin()
        self._want(are_on_host=self._new is None or self._new.are_on_host())

    def _want(self, *, are_on_host: bool) -> None:
        if self.is_present or self._is_filled:
            return
        if not self.device_bytes:
            self._storage.resize_(self.full_bytes)
            self._fence = self._link.fence()
            self._copies = []
        if are_on_host and self._has_landed() and not self._copies:
            if self._new is None:  # otherwise parameters still view the old weights
                self._take_assigned(self._host_views())
            self.watch.expect()  # a write from now on would miss the copies
            self._is_sending = True
            self._copies = [self._link.h2d(there, here, self._fence) for there, here in self._pairs()]
            self._is_sending = False

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        weights, used = self.unit.weights, set(self._current)
        if len(used) == 1:
            return [(weights, self._buffers[used.pop()])]
        spans = [slice(piece.offset, piece.offset + piece.numel) for piece in self.unit.full.slices if piece.numel]
        places = [i for i, piece in enumerate(self.unit.full.slices) if piece.numel]
        return [(weights[span], self._buffers[self._current[i]][span]) for i, span in zip(places, spans, strict=True)]

    def acquire(self) -> None:
        """Let the device's later work see the weights in the parameters and in saved views of them.

        Raises:
            SuperScaleError: a parameter was given memory of another shape or dtype (`param.data = ...`).
        """
        self._wait_new()
        if self.is_present:
            return
        if not self._is_filled:
            self._await_landing()
            self._want(are_on_host=True)
        for copy in self._copies:
            copy.wait()
        self.watch.arrived()
        self._take_assigned(self._host_views())
        for i, param in self._params.items():
            set_data(param, self.unit.views[i])
        self._edits = {i: self.unit.edits_of(i) for i in self._params}
        self.is_present, self._is_filled = True, False

    def release(self) -> None:
        """Free the device memory, and let parameters view the host. Weights that were edited in place are copied first.

        Raises:
            SuperScaleError: a parameter was given memory of another shape or dtype (`param.data = ...`).
        """
        if not self.device_bytes:
            return
        self._await_unknown()
        for copy in self._copies:
            copy.wait()  # no use may have waited for them, and the memory can be allocated anew at once
        try:
            if self.is_present:
                self._take_assigned(self.unit.views)
                self._keep_edits()
        finally:
            self.is_present = self._is_filled = False
            self._bind_host()
            self._storage.resize_(0)
        if not self._has_landed():
            self.watch.expect()  # a read from now on would meet the copy

    def _keep_edits(self) -> None:
        for i in self._params:
            if self.unit.edits_of(i) != self._edits[i] or self.watch.is_edited(self._params[i]):
                self._link.d2h(self._on_host[self._current[i]][i], self.unit.views[i]).synchronize()

    def _host_views(self) -> list[Tensor]:
        return [self._on_host[at][i] for i, at in enumerate(self._current)]

    def _take_assigned(self, expected: Sequence[Tensor]) -> None:
        """Take over the values of parameters that were given other memory, in the memory that they should view."""
        for i, param in self._params.items():
            if data_ptr_of(param) == expected[i].data_ptr():
                continue
            if (param.shape, param.dtype) != (expected[i].shape, expected[i].dtype):
                raise SuperScaleError(
                    f"parameter {self.unit.full.slices[i].fqn!r} was given other memory (param.data = ...) of shape "
                    f"{tuple(param.shape)} and {param.dtype}; expected {tuple(expected[i].shape)} and "
                    f"{expected[i].dtype}."
                )
            expected[i].copy_(plainly(param.detach))
            set_data(param, expected[i])
            self.watch.note_edit(param)

    def close(self) -> None:
        """Let go of the parameters: each owns its weight from now on, in host memory."""
        self.release()
        self._await_landing()
        self.watch.close()
        for i, param in self._params.items():
            if param.data_ptr() == self._on_host[self._current[i]][i].data_ptr():
                param.data = param.detach().clone()
        self._params = {}


def _view(buffer: Tensor, piece: ParamSlice) -> Tensor:
    return shaped(slice_view(buffer, piece), piece)
