"""Layers that a plan of tensor parallelism cut over another axis, given the tokens that ranks share.

torch's styles make DTensors of a layer's inputs and plain tensors of its outputs, by hooks. A DTensor knows nothing of
tokens. So hooks around torch's own take this rank's part of the tokens as a plain tensor before, and give what comes
out the layout of what went in. Linear layers and embeddings treat every token by itself, whichever part of their
weights a rank has.

[Note: Two axes] Ranks of the tensor axis have the same tokens, and ranks of the sequence axis the same part of the
weights. A layer's own collectives run over the tensor axis, with equal tokens on all of its ranks; gradients of its
weights are averaged over the data axis, which has the ranks of the sequence axis, as all others are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.sequence.tokens.call import Call
from lightning_superscale.sequence.tokens.layout import Layout, Reduced
from lightning_superscale.sequence.tokens.rules.products import tokens_looked_up, tokens_multiplied
from lightning_superscale.sequence.tokens.tensor import layout_of, plain, reduced, with_layout
from lightning_superscale.sequence.whole import are_whole
from lightning_superscale.torch_private import AsyncCollectiveTensor, own_params_of, parallel_styles_of

_STYLES = frozenset({"ColwiseParallel", "RowwiseParallel"})


def why_not_token_wise(root: nn.Module) -> str | None:
    """Why a module's plan can't be run on a part of the tokens, and what to do; None where it can."""
    for name, module in root.named_modules():
        styles = parallel_styles_of(module)
        if not styles and not any(isinstance(param, DTensor) for param in own_params_of(module)):
            continue
        kind = f"{name!r} ({type(module).__name__})"
        if not styles or not styles.keys() <= _STYLES or not isinstance(module, (nn.Linear, nn.Embedding)):
            return (
                f"the plan has {', '.join(sorted(styles)) or 'DTensors'} for {kind}; expected ColwiseParallel or "
                "RowwiseParallel, of nn.Linear or nn.Embedding. Others cut the tokens, which ranks of the sequence "
                "axis share already, or make DTensors that don't know them: leave it out of the plan."
            )
        made = [one for leaves in styles.values() for one in leaves]
        cut = [one for one in made if isinstance(one, Placement) and one not in (Replicate(), Shard(-1))]
        if cut:
            return (
                f"the plan lays {kind} out as {cut[0]!r}; expected Replicate() or Shard(-1), the features. The tokens "
                "are shared along the sequence axis already: take the layout out of the plan."
            )
        if False in made:
            return (
                f"the plan has use_local_output=False for {kind}, whose output is a DTensor then, which does not know "
                "its tokens; expected True. For logits use output_layouts=Replicate() in place of loss_parallel()."
            )
    return None


class ParallelModules:
    """From `install` to `remove`, layers that a plan cut take and give tensors of tokens."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def install(self, root: nn.Module) -> None:
        """Hook the layers of a module that `why_not_token_wise` has nothing against."""
        for module in root.modules():
            if parallel_styles_of(module):
                around = _Around()
                self._handles.append(module.register_forward_pre_hook(around.enter, prepend=True))
                self._handles.append(module.register_forward_hook(around.leave))

    def remove(self) -> None:
        """Take the hooks away; nothing where none was installed."""
        while self._handles:
            self._handles.pop().remove()


class _Around:
    """The hooks around one layer."""

    def __init__(self) -> None:
        # Of the forward that runs. A checkpoint may stop one before its end; the next one sets it again.
        self._layout: Layout | None = None

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The layer's input as a plain tensor: of tokens, this rank's part."""
        self._layout = None
        if not args or layout_of(args[0]) is None:
            return None
        x, *rest = args
        if not isinstance(x.placement, Reduced) and not are_whole():
            x = _call_of(module, x).args[0]
            self._layout = x.placement
        elif isinstance(x.placement, Reduced):
            self._layout = x.placement
        return plain(x), *rest

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The layer's output with the tokens of its input."""
        layout, self._layout = self._layout, None
        if layout is None:
            return None
        if not isinstance(output, Tensor) or isinstance(output, DTensor):
            raise SequenceParallelError(
                f"{type(module).__name__}, which a plan parallelizes, gave {type(output).__name__}; expected a plain "
                "tensor, of which ranks know the tokens. Use ColwiseParallel or RowwiseParallel with "
                "use_local_output=True, and no other hook that makes DTensors."
            )
        if isinstance(output, AsyncCollectiveTensor):
            output = _Arrived.apply(output)  # type: ignore[no-untyped-call]
        return reduced(output, layout.sharing) if isinstance(layout, Reduced) else with_layout(output, layout)


def _call_of(module: nn.Module, x: Tensor) -> Call:
    """The layer's function, as its rule lets it in."""
    if isinstance(module, nn.Embedding):
        options = (module.padding_idx, module.max_norm, module.norm_type, module.scale_grad_by_freq)
        return tokens_looked_up(Call(functional.embedding, "embedding", (x, module.weight, *options), {}))
    return tokens_multiplied(Call(functional.linear, "linear", (x, module.weight), {}))


class _Arrived(torch.autograd.Function):
    """The value of a collective, once it is there: a tensor with memory, which a subclass can view."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Tensor:
        value: Tensor = x.wait()
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]
