"""Activation checkpointing of a model's blocks: what is recomputed in backward, and what is kept all the same.

[Note: Must-save operations] A block that is recomputed keeps its inputs, H * e bytes per token, where e is the bytes of
an element; otherwise a block of a GPT keeps about 34 H in 16 bits with a fused attention (Korthikanti et al. 2022,
arXiv:2205.05198, equation 1). At long S its attention is most of a block's time, and its output is H numbers per
token; so "attention" keeps attention's results, H * e + 4 a bytes per token more (the output, and in fp32 a logarithm
for each of a heads), and recomputes the rest. It also keeps what functional collectives return, so that they run once.
"products" keeps the results of matrix products too, and recomputes what lies between them.

An operation that draws random numbers is recomputed even so: not running it again would shift the numbers that the
operations after it draw.

[Note: Memory budget] A compiled block has no operations left to choose from when it runs. Its partitioner chooses
instead, by a budget between 0 (as if checkpointed) and 1 (the fastest). torch's setting is global; here it holds while
a block is compiled. A budget below 1 makes compilation solve a knapsack problem, and has no effect where a block keeps
no more than its inputs and parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lightning_superscale.errors import SuperScaleError, did_you_mean
from lightning_superscale.sequence.memory.boundary import BoundaryStore
from lightning_superscale.sequence.memory.rerouting import Rerouting
from lightning_superscale.sequence.memory.saved_bytes import SavedBytes
from lightning_superscale.sequence.tokens.checkpoints import restoring
from lightning_superscale.torch_private import (
    TorchDispatchMode,
    compile_with_memory_budget,
    storage_id_of,
    tree_leaves,
)

Operation = Any  # an operation as dispatch knows it (`torch.ops.aten.mm.default`), whose class torch does not publish

Save = Literal["nothing", "attention", "products"]

# Attention's operations, each with the place of dropout's probability among its arguments.
_ATTENTION = {
    "_scaled_dot_product_flash_attention": 3,
    "_scaled_dot_product_efficient_attention": 5,
    "_scaled_dot_product_cudnn_attention": 5,
    "_scaled_dot_product_flash_attention_for_cpu": 3,
    "_scaled_dot_product_fused_attention_overrideable": 4,
    "_flash_attention_forward": 7,
    "_efficient_attention_forward": 8,
    "_cudnn_attention_forward": 9,
}
_COLLECTIVES = (
    *("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "broadcast"),
    "wait_tensor",
)
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


@functools.cache
def must_save_ops(save: Save) -> dict[Operation, int | None]:
    """The operations whose results are kept, each with the place of dropout's probability; None where it draws nothing.

    Raises:
        SuperScaleError: there is no such choice.
    """
    if save not in ("nothing", "attention", "products"):
        hint = did_you_mean(str(save), ("nothing", "attention", "products"))
        raise SuperScaleError(
            f"activation checkpointing keeps 'nothing', 'attention' or 'products'; found save={save!r}{hint}."
        )
    if save == "nothing":
        return {}
    # Not every version of torch has each; one that it lacks can't run.
    ops: dict[Operation, int | None] = {
        getattr(torch.ops.aten, name).default: place
        for name, place in _ATTENTION.items()
        if hasattr(torch.ops.aten, name)
    }
    collectives = torch.ops._c10d_functional
    ops |= {getattr(collectives, name).default: None for name in _COLLECTIVES if hasattr(collectives, name)}
    ops[torch.ops.higher_order.flex_attention] = None
    if save == "products":
        ops |= {getattr(torch.ops.aten, name).default: None for name in _PRODUCTS}
    return ops


@dataclass(frozen=True, slots=True, kw_only=True)
class RecomputePolicy:
    """What checkpointed blocks keep besides their inputs; see [Note: Must-save operations].

    Attributes:
        save: "nothing"; "attention" and collectives; "products": those and matrix products.
        also_save: further operations, such as `torch.ops.mylib.scan.default`. Those that draw random numbers are
            recomputed.

    Raises:
        SuperScaleError: no such choice, or an entry that is no operation.
    """

    save: Save = "attention"
    also_save: tuple[Operation, ...] = ()

    def __post_init__(self) -> None:
        must_save_ops(self.save)
        for op in self.also_save:
            if not hasattr(op, "namespace") or not hasattr(op, "tags"):
                raise SuperScaleError(
                    "activation checkpointing: also_save takes operations such as torch.ops.aten.mm.default; found "
                    f"{op!r}."
                )

    def contexts(self) -> Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]] | None:
        """The `context_fn` of torch's checkpoint; None where only inputs are kept."""
        if self.save == "nothing" and not self.also_save:
            return None

        def choose(_context: object, op: Operation, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            return CheckpointPolicy.MUST_SAVE if self.keeps(op, args, kwargs) else CheckpointPolicy.PREFER_RECOMPUTE

        return functools.partial(create_selective_checkpoint_contexts, choose)

    def keeps(self, op: Operation, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether the results of one call of an operation are kept."""
        ops = must_save_ops(self.save)
        return (op in ops or op in self.also_save) and not _draws(op, ops.get(op), args, kwargs)


def _draws(op: Operation, place: int | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of an operation draws random numbers."""
    if place is None:
        return torch.Tag.nondeterministic_seeded in getattr(op, "tags", ())
    return bool(kwargs.get("dropout_p", args[place] if len(args) > place else 0.0))


class SavedReport(NamedTuple):
    """Bytes that one block keeps for backward, for one batch.

    Attributes:
        plain_bytes: without checkpointing.
        input_bytes: its inputs, with checkpointing.
        result_bytes: results of must-save operations, with checkpointing.
    """

    plain_bytes: int
    input_bytes: int
    result_bytes: int

    @property
    def saved_bytes(self) -> int:
        """Bytes that checkpointing does without."""
        return self.plain_bytes - self.input_bytes - self.result_bytes


class BlockCheckpoints:
    """Recomputes blocks of a module in backward, from now until `close`.

    A block's forward runs in torch's non-reentrant checkpoint; its hooks run around it, and once. Random numbers
    repeat. A policy that keeps results allows one backward per forward, which torch enforces.

    Args:
        blocks: by name, the modules to recompute, in the order of forward; not within one another.
        policy: what is kept.
        store: keeps the blocks' inputs; None leaves them on the device.

    Raises:
        SuperScaleError: a block is within another one, is recomputed already, or has a `forward` of its own.
    """

    def __init__(
        self, blocks: Mapping[str, nn.Module], policy: RecomputePolicy, store: BoundaryStore | None = None
    ) -> None:
        _check_blocks(blocks)
        self.policy = policy
        self._context_fn = policy.contexts()
        self._store = store
        # As fully_shard does: hooks stay outside, names and state dicts as they are, and copies compute plainly.
        self._releases = [
            _RECOMPUTED.reroute(block, functools.partial(self._call, i)) for i, block in enumerate(blocks.values())
        ]

    def _call(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        options: dict[str, Any] = {} if self._context_fn is None else {"context_fn": self._context_fn}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        names, values = tuple(kwargs), tuple(kwargs.values())

        def run(*given: Any) -> Any:
            # Keywords as positions, because torch saves positional tensors only; others it keeps as they are.
            split = len(given) - len(names)
            return forward(*given[:split], **dict(zip(names, given[split:], strict=True)))

        with nullcontext() if self._store is None else self._store.saving(index, tensors):
            return checkpoint(restoring(run, (*args, *values)), *args, *values, use_reentrant=False, **options)

    def close(self) -> None:
        """Give the blocks their own classes back. Graphs of earlier forwards stay whole."""
        for release in self._releases:
            release()
        self._releases.clear()


_RECOMPUTED = Rerouting()
"""The blocks of all `BlockCheckpoints`."""


def _check_blocks(blocks: Mapping[str, nn.Module]) -> None:
    names: dict[nn.Module, str] = {}
    for name, block in blocks.items():
        if block in _RECOMPUTED or block in names:
            raise SuperScaleError(f"block {name!r} is recomputed already; expected each block once.")
        if "forward" in vars(block):
            raise SuperScaleError(
                f"block {name!r} has a forward of its own, as torch.compile and accelerate set it; expected that of "
                "its class. Compile it with memory_budget_backend, or checkpoint first and wrap afterwards."
            )
        names[block] = name
    for name, block in blocks.items():
        for inner in block.modules():
            if inner is not block and inner in names:
                raise SuperScaleError(
                    f"block {names[inner]!r} is within block {name!r}; expected blocks apart, because it would be "
                    "recomputed twice. Name one of them."
                )


def measure_saved_bytes(block: nn.Module, policy: RecomputePolicy, *args: Any, **kwargs: Any) -> SavedReport:
    """What one call of a block keeps, without and with checkpointing. The block runs twice; random generators stay.

    Args:
        block: not recomputed already.
        args, kwargs: those of its forward, as its model calls it.
    """
    keep = [*block.parameters(), *block.buffers()]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    devices = sorted({tensor.get_device() for tensor in tensors if tensor.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        with SavedBytes(keep) as plain, _ResultBytes(policy) as results:
            block(*args, **kwargs)
        with SavedBytes(keep) as inputs:
            checkpoint(block, *args, use_reentrant=False, **kwargs)
    return SavedReport(plain.nbytes, inputs.nbytes, results.nbytes)


class _ResultBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of results that a policy keeps, each storage once."""

    def __init__(self, policy: RecomputePolicy) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes = 0
        self._policy = policy
        self._counted: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, op: Operation, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = op(*args, **(kwargs or {}))
        if self._policy.keeps(op, args, kwargs or {}):
            for result in tree_leaves(results):
                if isinstance(result, Tensor):
                    storage = result.untyped_storage()
                    key = storage_id_of(storage)
                    self.nbytes += 0 if key in self._counted else storage.nbytes()
                    self._counted[key] = storage
        return results


def memory_budget_backend(budget: float, inner: str = "inductor") -> Callable[..., Any]:
    """A `backend=` for torch.compile that compiles with a memory budget; see [Note: Memory budget].

    Args:
        budget: share of what the fastest program keeps that may be kept, in [0, 1].
        inner: the backend that compiles; it must partition forward and backward itself, as "inductor" does.

    Raises:
        SuperScaleError: no such budget.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0.0 <= budget <= 1.0:
        raise SuperScaleError(f"a memory budget is a share between 0 and 1; found {budget!r}.")
    return compile_with_memory_budget(float(budget), inner)
