"""A unit of whole parameters that view one flat buffer, with this rank's rows of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from lightning_superscale.comm.collectives import AxisCollectives
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.layout.rows import ParamSpec, UnitLayout, kept_strides, shard_rows, unit_layout
from lightning_superscale.ops.cpu.memory import RecycledMemory
from lightning_superscale.ops.events import note_use
from lightning_superscale.optim.unit import shaped, slice_view
from lightning_superscale.optim.weights.store import OnDevice, WeightStore
from lightning_superscale.torch_private import num_owners_of, version_of
from lightning_superscale.zero.packing import RankedRows


class BucketUnit:
    """Parameters of one dtype and device, and the flat buffer that their weights view.

    Two layouts describe a unit. `full` places whole parameters in `weights` and is the same on every rank. `shard`
    places this rank's rows. On one rank the layouts are equal, so nothing is copied between them. On several, gradients
    are packed into [shard_world_size, shard_numel] before they are reduced, and new weights are unpacked from a buffer
    of this shape after they were gathered; the buffer exists only in between.

    A unit whose weights stream to the device is given `streams_to`: its parameters keep the memory they have, the
    storage of `weights` is empty, and the store that fills it lets parameters view it while it is filled.

    Attributes:
        weights: flat buffer [full.shard_numel], of the parameters' dtype, on their device or on `streams_to`.
        views: each parameter's whole weight, as a view of `weights`.
        is_streamed: whether it was given `streams_to`.
        store: keeps the weights between their uses.
        is_aliased: whether user code keeps views of `weights`, as far as `take_edits` has seen.
    """

    def __init__(
        self,
        index: int,
        named_params: Sequence[tuple[str, nn.Parameter]],
        shard_rank: int,
        shard_world_size: int,
        memory: RecycledMemory,
        *,
        streams_to: torch.device | None = None,
    ) -> None:
        specs = [
            ParamSpec(fqn, tuple(param.shape), _strides_of(param, shard_world_size)) for fqn, param in named_params
        ]
        self.index = index
        self.params = tuple(param for _, param in named_params)
        self.full: UnitLayout = unit_layout(index, specs, 0, 1)
        self.shard: UnitLayout = unit_layout(index, specs, shard_rank, shard_world_size)
        self.is_whole = shard_world_size == 1
        self.has_whole_weights = True
        self.is_streamed = streams_to is not None
        self._shard_rank = shard_rank
        self._shard_world_size = shard_world_size
        self._ranked = RankedRows(self.shard, shard_world_size)
        self._memory = memory
        self._gathered: Tensor | None = None
        self._rows_of_ranks: list[list[Tensor]] = []
        self._num_steps = [0] * len(self.params)
        first = self.params[0]
        self.weights = torch.zeros(self.full.shard_numel, dtype=first.dtype, device=streams_to or first.device)
        self.views = tuple(shaped(slice_view(self.weights, piece), piece) for piece in self.full.slices)
        self._num_owners = 0
        self.is_aliased = False
        if streams_to is not None:
            self.store: WeightStore = OnDevice()
            self.weights.untyped_storage().resize_(0)
            return
        for view, param in zip(self.views, self.params, strict=True):
            view.copy_(param.detach())
            param.data = view
        self.store = OnDevice(self.params)

    def keep_in(self, store: WeightStore) -> None:
        """Set the store, which fills the buffer of a streamed unit."""
        self.store = store

    @property
    def weight_numel(self) -> int:
        return 0 if self.is_streamed else self.full.shard_numel

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.dtype

    @property
    def device(self) -> torch.device:
        return self.weights.device

    def local_rows(self, i: int) -> Tensor:
        start = self.full.slices[i].offset + self.shard.slices[i].global_offset
        return self.weights[start : start + self.shard.slices[i].numel]

    def mark_stepped(self, stepped: Iterable[int]) -> None:
        """Raise the version of weights that a step changed ([Note: Graphs of old weights] in optim/transport.py)."""
        for i in stepped:
            increment_version(self.params[i])
            self._num_steps[i] += 1

    def edits_of(self, i: int) -> int:
        """A number that grows when anything but a step changes weight i in place."""
        return version_of(self.params[i]) - self._num_steps[i]

    def seal(self) -> None:
        """Note that all views of `weights` are this package's own, before user code can make any."""
        self._num_owners = num_owners_of(self.weights.untyped_storage())

    def take_edits(self) -> list[nn.Parameter]:
        """The parameters that user code may have changed without raising their versions, since the last call.

        Called between a backward and its step, when no new weights are under way. A parameter that was given other
        memory (`param.data = ...`) is given the unit's again, with the values that it has.

        Raises:
            SuperScaleError: it was given another shape, dtype or device; names the parameter.
        """
        if self.is_streamed:
            return self.store.watch.take_edited()
        self.is_aliased = num_owners_of(self.weights.untyped_storage()) > self._num_owners
        if self.is_aliased:  # any of the weights may be read or written through such a view at any time
            self._take_assigned()
            return list(self.params)
        return [*self.store.watch.take_edited(), *self._take_assigned()]

    def _take_assigned(self) -> list[nn.Parameter]:
        assigned = []
        for param, view, piece in zip(self.params, self.views, self.full.slices, strict=True):
            if param.data_ptr() == view.data_ptr() or not piece.numel:
                continue
            if (param.shape, param.dtype, param.device) != (view.shape, view.dtype, view.device):
                raise SuperScaleError(
                    f"parameter {piece.fqn!r} was given other memory (param.data = ...) of shape {tuple(param.shape)}, "
                    f"{param.dtype}, on {param.device}; expected {tuple(view.shape)}, {view.dtype}, on {view.device}."
                )
            view.copy_(param.detach())
            param.data = view
            assigned.append(param)
        return assigned

    # Gradients out

    def packed(self, grads: Mapping[int, Tensor], scale: float, dtype: torch.dtype) -> Tensor:
        """Gradients times `scale` in the buffer that a reduce-scatter reads, [shard_world_size, shard_numel].

        Rows of parameters without a gradient here are zero; alignment gaps hold any values.

        Args:
            grads: whole gradients by index of the parameter, 1D.
            dtype: of the buffer.
        """
        packed = self._memory.empty(self._shard_world_size, self.shard.shard_numel, dtype=dtype, device=self.device)
        return self._ranked.pack(packed, grads, scale)

    def grads_of_rows(self, rows: Tensor, axis: AxisCollectives) -> dict[int, Tensor]:
        """Whole averaged gradients of all parameters, 1D. Every rank of the axis calls it.

        Args:
            rows: this rank's rows of them, [shard_numel]; overwritten.
            axis: collectives over the ranks that have the other rows.
        """
        if self.is_whole:
            return {i: slice_view(rows, piece) for i, piece in enumerate(self.full.slices)}
        packed = self._memory.empty(
            self._shard_world_size, self.shard.shard_numel, dtype=rows.dtype, device=rows.device
        )
        packed[self._shard_rank].copy_(rows)
        gathered = axis.all_gather(packed).wait()
        flat = self._memory.empty(self.full.shard_numel, dtype=rows.dtype, device=rows.device)
        grads = {i: slice_view(flat, piece) for i, piece in enumerate(self.full.slices)}
        for i, column in enumerate(self._ranked.columns(gathered)):
            for there, here in self._ranked.blocks(column, grads[i], i):
                here.copy_(there)
        return grads

    # Weights in

    def inbox(self) -> Tensor:
        if self.is_whole:
            return self.weights
        if self._gathered is None:
            shape = (self._shard_world_size, self.shard.shard_numel)
            self._gathered = self._memory.empty(*shape, dtype=self.dtype, device=self.device)
        return self._gathered[self._shard_rank]

    def pack_rows(self, stepped: Sequence[int]) -> None:
        """Copy this rank's rows of the stepped weights into the inbox, for the gather."""
        inbox = self.inbox()
        for i in stepped:
            piece = self.shard.slices[i]
            inbox[piece.offset : piece.offset + piece.numel].copy_(self.local_rows(i))

    def gathered(self) -> Tensor:
        """The buffer that a gather fills with every rank's inbox, [shard_world_size, shard_numel]."""
        self.inbox()
        if self._gathered is None:
            raise AssertionError("a whole unit gathers nothing")
        return self._gathered

    def unpack_gathered(self, stepped: Sequence[int]) -> None:
        """Copy the stepped weights' rows of all ranks from the gathered buffer into `weights`; frees that buffer."""
        packed = self._gathered
        if packed is None:
            return  # it was unpacked before an interrupt
        is_whole = len(stepped) == len(self.params)
        columns = self._ranked.columns(packed)
        with self.store.filling(is_whole=is_whole):
            for i in stepped:
                for there, here in self._ranked.blocks(columns[i], slice_view(self.weights, self.full.slices[i]), i):
                    here.copy_(there)
        note_use(packed)
        self._gathered = None

    def rows_of_ranks(self) -> list[list[Tensor]]:
        """Every rank's rows of every weight, by rank and parameter: 1D views of `weights`."""
        if not self._rows_of_ranks:
            for rank in range(self._shard_world_size):
                spans = []
                for piece in self.full.slices:
                    start, stop = shard_rows(piece.spec.num_rows, rank, self._shard_world_size)
                    row_numel = piece.spec.row_numel
                    spans.append(self.weights[piece.offset + start * row_numel : piece.offset + stop * row_numel])
                self._rows_of_ranks.append(spans)
                self._num_owners += len(spans)
        return self._rows_of_ranks

    def release(self) -> None:
        """Copy every parameter's weight into a storage of its own."""
        self.store.close()
        for param in self.params:
            param.data = param.detach().clone()


def _strides_of(param: nn.Parameter, shard_world_size: int) -> tuple[int, ...] | None:
    """The strides of a parameter that keeps a memory format of its own, such as channels_last; None elsewhere."""
    if param.is_contiguous() and param.stride() == torch.empty(param.shape, device="meta").stride():
        return None
    return kept_strides(param.shape, param.stride(), shard_world_size)
