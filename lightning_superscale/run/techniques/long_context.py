"""The long-context kit of one run: what a rank keeps of its tokens between forward and backward, on its device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from lightning_superscale.comm.communicator import Communicator
from lightning_superscale.config import SequenceConfig
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.offload.link.link import Link, LinkEvent
from lightning_superscale.run.report.plan import ByteClass, format_bytes
from lightning_superscale.run.techniques.technique import ModuleTechnique, TechniqueFacts
from lightning_superscale.sequence.memory.activation_offload import ActivationLink, ActivationOffload, Fence
from lightning_superscale.sequence.memory.boundary import BoundaryStore, is_boundary
from lightning_superscale.sequence.memory.caches import configs_with_caches, without_caches
from lightning_superscale.sequence.memory.checkpointing import BlockCheckpoints, RecomputePolicy
from lightning_superscale.sequence.memory.deferred_logits import LEAST_CLASSES, TiledLosses, settled, settled_or_held
from lightning_superscale.sequence.memory.eight_bit import EightBitCodec, EightBitStore
from lightning_superscale.sequence.memory.host_pool import Buffer
from lightning_superscale.sequence.memory.losses_seen import LossesSeen
from lightning_superscale.sequence.memory.tiled_modules import TiledModules, mlps_of
from lightning_superscale.sequence.tokens.tensor import plain
from lightning_superscale.torch_private import behind_compile
from lightning_superscale.zero.fsdp2.wrap import blocks_with_own_params, wrap_plan

INPUTS_OF_BLOCKS = "activations (blocks' inputs)"
"""The class of bytes of activations in host memory."""


class LongContext(ModuleTechnique):
    """One run's kit. It stands between blocks and the store of their inputs, which it counts (`BoundaryStore`)."""

    def __init__(self, facts: TechniqueFacts, config: SequenceConfig) -> None:
        self._facts = facts
        self._config = config
        self._losses: TiledLosses | None = None
        self._why_no_losses = ""
        self._wrap = facts.zero.wrap or (None if facts.offload is None else facts.offload.wrap)
        self._tiles: TiledModules | None = None
        self._tiled: list[str] = []
        self._checkpoints: BlockCheckpoints | None = None
        self._why_not_recomputed = ""
        self._num_blocks = 0
        self._kept: dict[int, tuple[int, int]] = {}
        self._codec = EightBitCodec() if config.boundary_bits == 8 else None
        self._store: BoundaryStore | None = None
        self._offload: ActivationOffload | None = None
        self._configs: list[Any] = []
        self._handles: list[Any] = []

    @property
    def recomputes_blocks(self) -> bool:
        """Whether blocks are computed again in backward, once the module was prepared."""
        return self._checkpoints is not None

    def prepare(self, module: nn.Module) -> None:
        """Hook the module.

        Raises:
            SuperScaleError: there are no blocks, or no MLPs, or they can't be hooked.
        """
        if self._config.tile_mlp is not None:
            self._tile(module, self._config.tile_mlp)
        if self._config.checkpoint_blocks is not False:
            self._recompute(module)
        if self._config.tile_loss is not False:
            self._defer_logits(module, self._config.tile_loss)

    def _tile(self, module: nn.Module, tile: int) -> None:
        if self._config.mlps is not None:
            named = blocks_with_own_params(module, self._config.mlps, "SequenceConfig.mlps")
            mlps = {name: one for name, one, _ in named}
        else:
            mlps = mlps_of((name, block) for name, block, _ in blocks_with_own_params(module, self._wrap))
        if not mlps:
            raise SuperScaleError(
                f"tile_mlp={tile}: found no MLP in the repeated blocks of {type(module).__name__}, a part with two "
                "matrices at least that has no attention in it. Name modules that treat every token alike with "
                "SequenceConfig.mlps."
            )
        self._tiles = TiledModules(mlps, tile)
        self._tiled = list(mlps)

    def _recompute(self, module: nn.Module) -> None:
        found = {name: block for name, block, _ in blocks_with_own_params(module, self._wrap)}
        inner = {part for block in found.values() for part in block.modules() if part is not block}
        blocks = {name: block for name, block in found.items() if block not in inner}
        why_not = self._why_no_checkpoints(module, blocks)
        is_asked = self._config.checkpoint_blocks is True
        if why_not and is_asked and not why_not.startswith("the model recomputes"):
            raise SuperScaleError(f"checkpoint_blocks=True: {why_not}")
        if why_not:
            self._why_not_recomputed = why_not
            return
        if self._codec is not None and not self._config.offload_activations:
            store = EightBitStore()
            self._codec, self._store = store.codec, store
        self._configs = configs_with_caches(module)
        self._checkpoints = BlockCheckpoints(blocks, RecomputePolicy(), self)
        self._num_blocks = len(blocks)

    def _why_no_checkpoints(self, module: nn.Module, blocks: dict[str, nn.Module]) -> str:
        if not blocks:
            return (
                f"{type(module).__name__} has no repeated blocks, a ModuleList or Sequential with two or more alike, "
                "or _no_split_modules. Name them with ZeroConfig.wrap."
            )
        recomputing = [name for name, one in module.named_modules() if _recomputes(one)]
        if recomputing:
            return (
                f"the model recomputes its blocks itself ({recomputing[0] or type(module).__name__} has gradient "
                "checkpointing on), and is left alone"
            )
        if self._facts.is_compiled:
            return (
                "part of the module is compiled, and a compiled graph chooses for itself what it keeps. Compile with "
                "sequence.memory.checkpointing.memory_budget_backend, or not at all."
            )
        return ""

    def _defer_logits(self, module: nn.Module, which: Any) -> None:
        if self._facts.is_compiled:
            self._why_no_losses = "part of the module is compiled"
            return
        self._losses = TiledLosses(which)
        # These hooks run first, before those that free the weights.
        if self._facts.shards_weights:
            for group in wrap_plan(module, self._facts.zero.wrap, include_root=False):
                self._handles.append(group.register_forward_hook(_hold_output, prepend=True))
        elif self._facts.offload is not None and self._facts.offload.weights != "stationary":
            for _, block, _ in blocks_with_own_params(module, self._facts.offload.wrap):
                self._handles.append(block.register_forward_hook(_settle_output, prepend=True))

    def uses_link(self) -> bool:
        return self._checkpoints is not None and self._config.offload_activations

    def connect(self, ranks: Communicator, link: Link | None) -> None:
        if link is not None and self.uses_link():
            self.offload_to(_ActivationsOnLink(link))

    def offload_to(self, link: ActivationLink, make: Callable[[int], Buffer] | None = None) -> ActivationOffload:
        """Keep the inputs of blocks behind a link, in memory that `make` makes; see `ActivationOffload`."""
        self._store = self._offload = ActivationOffload(link, self._facts.device, codec=self._codec, make=make)
        return self._offload

    def saving(self, block: int, inputs: Sequence[Tensor]) -> AbstractContextManager[object]:
        """Count a block's inputs, and let the store keep them; see `BoundaryStore`."""
        kept = [plain(tensor) for tensor in inputs if is_boundary(tensor)]
        if kept:
            rows = kept[0].numel() // kept[0].shape[-1]
            self._kept[block] = max(self._kept.get(block, (0, 0)), (rows, sum(tensor.nbytes for tensor in kept)))
        return nullcontext() if self._store is None else self._store.saving(block, inputs)

    @contextmanager
    def around_forward(self, *, trains: bool) -> Iterator[None]:
        with ExitStack() as stack:
            if trains and self.recomputes_blocks:
                stack.enter_context(without_caches(self._configs))
            if self._losses is not None:
                stack.enter_context(self._losses)
            yield
        if self._losses is not None:
            self._losses.settle()

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        kept = dict(self._kept)
        with nullcontext() if self._losses is None else self._losses.forgetting():
            yield
        self._kept = kept
        for part in (self._codec, self._offload):
            if part is not None:
                part.forget()

    def output(self, output: Any, *, trains: bool) -> Any:
        """What the step returned, with logits that have elements."""
        return settled(output)

    def rest(self, *, is_visible: bool) -> None:
        if self._losses is not None:
            self._losses.let_go("weights may have been stepped")

    def reasons(self) -> list[str]:
        lines = []
        if self._losses is not None:
            lines += how_losses_were_tiled(self._losses.seen, self._config.tile_loss)
        elif self._why_no_losses:
            lines.append(f"tile_loss: losses have all their logits, because {self._why_no_losses}")
        if self._tiled:
            lines.append(
                f"tile_mlp={self._config.tile_mlp}: {len(self._tiled)} modules ({self._tiled[0]}, ...) take so many "
                "tokens at a time, and keep only their inputs for backward, which computes them again"
            )
        return lines + self._how_recomputed()

    def _how_recomputed(self) -> list[str]:
        if self._checkpoints is None:
            why_not = self._why_not_recomputed
            return [f"checkpoint_blocks: no block is recomputed: {why_not}"] if why_not else []
        lines = [f"checkpoint_blocks: {self._num_blocks} blocks are recomputed in backward"]
        if self._kept:
            rows, nbytes = max(self._kept.values())
            lines[0] += (
                f"; the inputs of one take {nbytes / max(rows, 1):.4g} bytes per token, {format_bytes(nbytes)} of "
                f"{rows} tokens here"
            )
        if self._offload is not None:
            done = self._offload.report()
            lines.append(
                f"offload_activations: {format_bytes(done.bytes_out)} went to the host and "
                f"{format_bytes(done.bytes_in)} came back, {format_bytes(done.host_bytes)} of host memory is held"
            )
        if self._codec is not None:
            report = self._codec.report()
            lines.append(
                f"boundary_bits=8: inputs of blocks take {report.bytes_per_element:.3f} bytes per element, and come "
                f"back with an error of at most {report.largest:.2%} of a block's norm (first batch); gradients are "
                "approximate, the loss is exact"
            )
        return lines

    def bytes(self) -> list[ByteClass]:
        if self._offload is None:
            return []
        return [ByteClass(INPUTS_OF_BLOCKS, "", 0, self._offload.report().host_bytes)]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for part in (self._checkpoints, self._tiles, self._offload):
            if part is not None:
                part.close()
        self._checkpoints = self._tiles = self._offload = self._store = self._losses = None


class _ActivationsOnLink:
    """The run's link for activations, which it counts apart. Satisfies `ActivationLink`."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def d2h(self, dst: Tensor, src: Tensor) -> LinkEvent:
        return self._link.d2h(dst, src, "activations")

    def h2d(self, dst: Tensor, src: Tensor, after: Fence | None = None) -> LinkEvent:
        return self._link.h2d(dst, src, after, "activations")

    def allocating(self) -> AbstractContextManager[object]:
        return self._link.allocating()

    def needs_pinned_host(self) -> bool:
        return self._link.needs_pinned_host()


def _settle_output(_module: nn.Module, _args: Any, output: Any) -> Any:
    return settled(output)


def _hold_output(_module: nn.Module, _args: Any, output: Any) -> Any:
    return settled_or_held(output)


def _recomputes(module: nn.Module) -> bool:
    """Whether a module checkpoints itself: by transformers' flag, or torch's wrapper."""
    is_wrapper = any(cls.__name__ == "CheckpointWrapper" for cls in type(behind_compile(module)).__mro__)
    return is_wrapper or getattr(module, "gradient_checkpointing", False) is True


def how_losses_were_tiled(seen: LossesSeen, asked: object) -> list[str]:
    """The sentences of `explain()` on losses that did without logits, and on those that did not."""
    lines = []
    if seen.num_tiled:
        lines.append(
            f"tile_loss: {seen.num_tiled} losses ran without their logits; for {seen.num_tokens} tokens of "
            f"{seen.num_classes} classes, {seen.kept_bytes} bytes per token ({seen.num_features} features) and "
            f"{format_bytes(seen.weight_bytes)} once are kept in place of {seen.logit_bytes} bytes per token"
        )
    lines += [f"tile_loss: {num} losses had all their logits: {why}" for why, num in seen.not_tiled.items()]
    if seen.reads:
        readers = ", ".join(f"{name} ({num})" for name, num in seen.reads.most_common(3))
        lines.append(f"tile_loss: logits were computed all the same for {readers}")
    if seen.num_held:
        lines.append(
            f"tile_loss: {seen.num_held} products left the module whose weights are freed when it returns (zero=3), "
            "with a copy of the weight that lives as long as they do; a loss inside of its forward needs none, if the "
            "module does not return logits"
        )
    if seen.num_in_checkpoints:
        lines.append(
            f"tile_loss: {seen.num_in_checkpoints} products are inside of checkpoints, which compute them again, and "
            "had all their logits"
        )
    if not lines and asked == "auto":
        lines.append(
            f"tile_loss='auto': no loss of at least {LEAST_CLASSES} classes, and more tokens than features, met the "
            "output of a linear layer"
        )
    return lines


def long_context(facts: TechniqueFacts) -> LongContext | None:
    """The kit of one run; None where nothing of it is asked for."""
    config = facts.sequence
    if config is None:
        return None
    is_asked = config.tile_loss is not False or config.tile_mlp is not None or config.checkpoint_blocks is not False
    return LongContext(facts, config) if is_asked else None
