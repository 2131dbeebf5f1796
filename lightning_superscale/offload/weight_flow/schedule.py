"""Brings weights that live on the host to the device for their uses, by hooks on blocks of modules.

[Note: Weight flow] A block's weights arrive before its forward and before its backward, and leave when the next block
is used. The order of blocks is predicted from earlier steps, and the copies of the next ones start meanwhile. A wrong
prediction only costs time: every use waits for its own weights. There are three kinds of use:

- the block is called (forward pre-hook), also when activation checkpointing calls it during backward;
- backward reaches one of its outputs (tensor hook);
- backward unpacks a saved view of one of its weights that are not there (saved-tensor hooks around its forward): a
  loss that reads a block's weights without calling it, several backward passes over one graph, an unusual order.

Only the first two make other weights leave. An autograd node may have unpacked a weight already when it unpacks the
next, so no weight leaves during a node.

Saved-tensor hooks hide those around them. So the hooks here call those that are active already (a checkpoint's,
activations kept on the host), and without any do what PyTorch does: raise where a saved tensor was changed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.offload.weight_flow.weights import FlowingWeights
from lightning_superscale.torch_private import (
    plainly,
    saved_tensor_hooks,
    storage_id_of,
    tree_leaves,
    version_of,
)

# Number of blocks whose copies may be under way while another one is used.
BLOCKS_AHEAD = 2


class BlockParams(NamedTuple):
    """A module whose weights flow together.

    Attributes:
        fqn: name of the module from the root.
        params: parameters that no module outside it owns, by name from the root.
    """

    fqn: str
    module: nn.Module
    params: dict[str, nn.Parameter]


class _Use(NamedTuple):
    """A use of a block in the order of uses: in forward or in backward. Block -1 is the start of a forward."""

    block: int
    is_backward: bool


_START = _Use(-1, False)


@dataclass(slots=True, eq=False)
class _Block:
    """One block whose weights flow, during a run.

    Attributes:
        guards: the saved-tensor hooks to close when a forward of it ends, innermost last; None for a forward without.
    """

    index: int
    fqn: str
    module: nn.Module
    weights: list[FlowingWeights] = field(default_factory=list)
    guards: list[torch.autograd.graph.saved_tensors_hooks | None] = field(default_factory=list)


class WeightFlow:
    """Brings blocks' weights to the device when they are used, and a little before.

    Args:
        blocks: blocks with disjoint sets of parameters; their modules may be nested.
        num_ahead: number of blocks whose copies may be under way while another one is used.

    Attributes:
        named_params: every parameter that flows, with its name.
        block_of: by parameter, the number of the block that owns it.
    """

    def __init__(self, blocks: Sequence[BlockParams], *, num_ahead: int = BLOCKS_AHEAD) -> None:
        self.named_params = [item for block in blocks for item in block.params.items()]
        self.block_of = {param: i for i, block in enumerate(blocks) for param in block.params.values()}
        self._num_ahead = num_ahead
        self._blocks = [_Block(i, block.fqn, block.module) for i, block in enumerate(blocks)]
        self._owner: dict[nn.Parameter, FlowingWeights] = {}
        self._place: dict[int, _Block] = {}  # by storage, filled or not
        self._on_device: dict[int, _Block] = {}
        self._successor: dict[_Use, _Use] = {}
        self._last = _START
        self._is_backward = False
        self._hooks: list[RemovableHandle] = []
        for block in self._blocks:
            before, after = self._forward_hooks(block)
            self._hooks.append(block.module.register_forward_pre_hook(before, prepend=True))
            self._hooks.append(block.module.register_forward_hook(after, always_call=True))

    # What flows

    def add(self, weights: FlowingWeights) -> None:
        """Let the weights of a unit flow with the block that owns them.

        Units that held the same parameters before forget them: parameters move into other units, or are unfrozen.
        """
        params = weights.unit.params
        block = self._blocks[self.block_of[params[0]]]
        for param in params:
            before = self._owner.get(param)
            if before is not None:
                before.forget(param)
                if before.is_empty:
                    before.release()
                    block.weights.remove(before)
                    del self._place[before.storage_id]
            self._owner[param] = weights
        block.weights.append(weights)
        self._place[weights.storage_id] = block

    def holds(self, param: nn.Parameter) -> bool:
        """Whether a unit that was added owns this parameter."""
        return param in self._owner

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    @property
    def most_blocks(self) -> int:
        """Number of blocks that are on the device at one time, unless they are nested."""
        return min(1 + self._num_ahead, len(self._blocks))

    @property
    def most_device_bytes(self) -> int:
        """Device memory, in bytes, of the largest blocks that can be on the device at one time."""
        sizes = sorted(sum(w.full_bytes for w in block.weights) for block in self._blocks)
        return sum(sizes[-self.most_blocks :])

    # Passes

    def enter(self) -> None:
        """Begin a forward of the whole model: start the copies of the blocks that it will use first."""
        self.rest()
        self._last = _START
        for block in self._coming(_START):
            self._want(block)

    def rest(self) -> None:
        """Bring every weight back to the host, with parameters that view it there; no forward or backward runs."""
        self._is_backward = False
        for block in self._blocks:
            while block.guards:  # a forward was interrupted by something that runs no hooks
                _close(block.guards.pop())
        for block in list(self._on_device.values()):
            self._leave(block)

    def synchronize(self) -> None:
        """Block the host until no copy reads or writes host weights, so that users may edit them."""
        for block in self._blocks:
            for weights in block.weights:
                weights.synchronize()

    def close(self) -> None:
        """Remove every hook, and let parameters own their weights, in host memory."""
        self.rest()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for block in self._blocks:
            for weights in block.weights:
                weights.close()

    # Uses

    def _use(self, block: _Block, *, is_backward: bool) -> None:
        now = _Use(block.index, is_backward)
        if now != self._last:
            self._successor[self._last] = now
            self._last = now
        coming = self._coming(now)
        for other in list(self._on_device.values()):
            if other is not block and other not in coming and not other.guards:
                self._leave(other)
        self._arrive(block)
        for other in coming:
            self._want(other)

    def _coming(self, now: _Use) -> list[_Block]:
        """The blocks that followed this use the last time, at most `num_ahead`, without the block itself."""
        coming: list[_Block] = []
        seen = {now}
        while len(coming) < self._num_ahead:
            following = self._successor.get(now)
            if following is None or following in seen:
                break
            if following.is_backward and not torch.is_grad_enabled() and not self._is_backward:
                break  # no backward follows
            seen.add(following)
            now = following
            block = self._blocks[now.block]
            if block.index not in {use.block for use in seen - {now}}:
                coming.append(block)
        return coming

    def _want(self, block: _Block) -> None:
        self._on_device[block.index] = block
        for weights in block.weights:
            weights.prefetch()

    def _arrive(self, block: _Block) -> None:
        self._on_device[block.index] = block
        for weights in block.weights:
            weights.acquire()

    def _leave(self, block: _Block) -> None:
        del self._on_device[block.index]
        for weights in block.weights:
            weights.release()

    # Hooks are closures, because a deep copy of the module would copy a bound method's object too.

    def _forward_hooks(self, block: _Block) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(module: nn.Module, _inputs: object) -> None:
            if module is block.module:
                self._use(block, is_backward=self._is_backward)
                block.guards.append(self._guard())

        def after(module: nn.Module, _inputs: object, outputs: object) -> None:
            if module is not block.module or not block.guards:
                return
            _close(block.guards.pop())
            if torch.is_grad_enabled():
                for output in tree_leaves(outputs):
                    if isinstance(output, Tensor) and output.requires_grad:
                        output.register_hook(reached)  # type: ignore[no-untyped-call]

        def reached(_grad: Tensor) -> None:
            self._check_first_order(block)
            self._is_backward = True
            self._use(block, is_backward=True)

        return before, after

    def _guard(self) -> torch.autograd.graph.saved_tensors_hooks | None:
        """Open saved-tensor hooks for tensors that autograd saves from now on.

        Returns:
            the hooks, to be closed; None where autograd saves nothing, or a block around this one has opened them.
        """
        if not torch.is_grad_enabled():
            return None
        around = saved_tensor_hooks()
        if around is not None and isinstance(getattr(around[0], "__self__", None), _SavedTensors):
            return None
        saved = _SavedTensors(self._unpacked, around)
        guard = torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack)
        guard.__enter__()
        return guard

    def _unpacked(self, saved: Tensor) -> None:
        """Bring the block of a saved tensor to the device, if it is a parameter that flows or a view of one."""
        if isinstance(saved, nn.Parameter):
            owner = self.block_of.get(saved)
            block = None if owner is None else self._blocks[owner]
        else:
            # Plainly, because subclasses that refuse to give their memory away are saved too.
            block = self._place.get(storage_id_of(plainly(Tensor.untyped_storage, saved)))
        if block is not None:
            self._check_first_order(block)
            self._arrive(block)

    def _check_first_order(self, block: _Block) -> None:
        """Refuse a backward that builds a graph of its own, whose saved tensors would not be unpacked by these hooks.

        Raises:
            SuperScaleError: names the block and what to do.
        """
        if torch.is_grad_enabled():
            raise SuperScaleError(
                f"a backward with create_graph=True went through {block.fqn!r}, whose weights flow between host and "
                "device; expected one without. Train with OffloadConfig(weights='stationary')."
            )


class _SavedTensors:
    """Saved-tensor hooks inside of a block, which call those around the block.

    Args:
        unpacked: called with each saved tensor that is about to be read.
        around: the pair (pack, unpack) of hooks around the block; None without any.
    """

    def __init__(
        self,
        unpacked: Callable[[Tensor], None],
        around: tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None,
    ) -> None:
        self._unpacked = unpacked
        self._around = around

    def pack(self, saved: Tensor) -> Any:
        return (saved, version_of(saved)) if self._around is None else self._around[0](saved)

    def unpack(self, packed: Any) -> Tensor:
        if self._around is not None:
            saved = self._around[1](packed)
        else:
            saved, version = packed
            if version_of(saved) != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"{saved.dtype} {tuple(saved.shape)} is at version {version_of(saved)}; expected version {version}"
                )
        if saved.layout == torch.strided:
            self._unpacked(saved)
        return saved


def _close(guard: torch.autograd.graph.saved_tensors_hooks | None) -> None:
    if guard is not None:
        guard.__exit__()
