"""Logits that are not computed before something asks for their elements: a cross entropy does without them.

[Note: Deferred logits] While `TiledLosses` is active, a linear layer with many classes returns `DeferredLogits`: the
shape and dtype of its result, and what it is computed from. Views, slices of tokens and casts that lose nothing only
change that shape; `F.cross_entropy` computes its loss from hidden states and weight, tile by tile (`tiled_loss`).
Anything else computes the logits first, by the very call that was deferred, and then runs as always. So a program means
what it means without, and at worst nothing is saved.

[Note: Logits that are changed] All views of one product are one family, like views of one tensor. Their logits are kept
only as long as something else does, and computed again for the next function that reads them. A function that changes
them, returns a view of them or hangs something on them (a hook, a gradient) makes the family keep them: from then on
its members are views of this one tensor.

[Note: Weights that are gone] Logits that are computed late need the weight that the layer saw. Where it is freed when
the layer's module returns, what leaves it holds a copy of the weight (`settled_or_held`, for ZeRO-3), or has its
elements (`settled`, for a flowing block).
Where it changes in place, as in an optimizer's step inside of the training step, reading logits of before is refused.
A checkpoint computes forward again without this mode, so that nothing is deferred inside of one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from lightning_superscale.comm.in_graph import sum_over_ranks
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.sequence.loss import mean_over_tokens
from lightning_superscale.sequence.memory.logit_views import (
    CASTS,
    PRODUCTS,
    cast_to,
    keeps_classes,
    operands_of,
    puts_classes_on_1,
    sizes_of,
)
from lightning_superscale.sequence.memory.losses_seen import LossesSeen
from lightning_superscale.sequence.memory.tiled_loss import cross_entropy_sum
from lightning_superscale.sequence.memory.tiled_mlp import autocast_of
from lightning_superscale.sequence.tokens.call import Call
from lightning_superscale.sequence.tokens.dispatch import name_of
from lightning_superscale.sequence.tokens.layout import Sharded
from lightning_superscale.sequence.tokens.rules.losses import CROSS_ENTROPY, own_targets
from lightning_superscale.sequence.tokens.tensor import is_sharded, layout_of, plain, reduced
from lightning_superscale.sequence.tokens.traced import called, is_tensor
from lightning_superscale.torch_private import (
    is_in_checkpoint,
    is_in_functorch,
    make_wrapper,
    storage_id_of,
    tree_leaves,
    tree_map,
    version_of,
    without_torch_function,
)

LEAST_CLASSES = 4096
"""Classes from which on "auto" defers a product."""

LEAST_RATIO = 3
"""Classes per feature from which on "auto" defers a product."""


# What logits are asked without being read.
_ASKED = frozenset(
    {
        *("size", "dim", "ndimension", "numel", "nelement", "element_size", "is_floating_point", "is_complex"),
        *("__len__", "__hash__", "get shape", "get ndim", "get dtype", "get device", "get itemsize", "get nbytes"),
        *("get is_cuda", "get is_cpu", "get is_meta", "get layout", "get is_sparse", "get is_nested"),
        *("get is_quantized", "get_device", "get requires_grad", "get _base"),
    }
)
# What hangs something on a tensor, or takes its memory.
_HELD = frozenset(
    {
        *("register_hook", "register_post_accumulate_grad_hook", "retain_grad", "requires_grad_", "data_ptr"),
        *("set grad", "get grad", "set data", "get data", "set requires_grad", "untyped_storage", "get grad_fn"),
    }
)


class _Product(NamedTuple):
    """What logits are computed from.

    Attributes:
        call: the call that was deferred.
        hidden: [..., H], plain or of this rank's tokens.
        weight: [V, H].
        param: the parameter that the weight is, or is a view of.
        dtype: of the result.
        versions: of the memory of `hidden` and `weight` when it was deferred.
    """

    call: Callable[[], Tensor]
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    param: Tensor
    dtype: torch.dtype
    versions: tuple[int, int]


class _Family:
    """The logits of one product, or a copy of them; see [Note: Logits that are changed]."""

    def __init__(self, product: _Product, mode: TiledLosses, parent: _Family | None = None) -> None:
        self.product = product
        self.mode = mode
        self.parent = parent
        self.held: tuple[Tensor, Tensor | None] | None = None
        self.is_grad_enabled: bool = torch.is_grad_enabled() and (parent is None or parent.is_grad_enabled)
        self.autocast: Callable[[], AbstractContextManager[object]] = (
            autocast_of(product.hidden) if parent is None else parent.autocast
        )
        self.kept: Tensor | None = None
        self.why_gone = ""
        self.why_unreadable = ""
        self.members: list[weakref.ref[Any]] = []
        self.copies: weakref.WeakSet[_Family] = weakref.WeakSet()
        self._computed: weakref.ref[Tensor] | None = None

    @property
    def is_held(self) -> bool:
        """Whether user code still has some of the logits."""
        return any(member() is not None for member in self.members)

    def check(self) -> None:
        """Refuse to compute from something else than what the layer saw.

        Raises:
            SuperScaleError: says what has changed.
        """
        why = self.why_gone
        if self.product.versions != _versions(self.product.hidden, self.product.weight):
            why = "the weight or the hidden states that they come of were changed in place"
        if why:
            raise SuperScaleError(
                f"tile_loss: logits are needed after {why}. Use them before, or SequenceConfig(tile_loss=False)."
            )

    def logits(self) -> Tensor:
        """The result of the deferred call."""
        if self.kept is not None:
            return self.kept
        computed = None if self._computed is None else self._computed()
        if computed is None:
            self.check()
            if self.why_unreadable:
                raise SuperScaleError(f"tile_loss: {self.why_unreadable} Use SequenceConfig(tile_loss=False).")
            with torch.set_grad_enabled(self.is_grad_enabled), self.autocast(), self.mode.paused():
                computed = self.product.call()
            self._computed = weakref.ref(computed)
        return computed

    def keep(self) -> Tensor:
        """The logits, which from now on are all members' memory."""
        self.kept = self.logits()
        return self.kept

    def hold(self) -> None:
        """Go on with a copy of the weight, and of the bias, which autograd leads back from."""
        if self.parent is not None:
            self.parent.hold()
            return
        product, held = self.product, self.held
        if held is None:
            self.check()
            with torch.set_grad_enabled(self.is_grad_enabled), self.mode.paused():
                held = product.weight.clone(), None if product.bias is None else product.bias.clone()
            self.held = held
            self.mode.seen.num_held += self.is_grad_enabled
        weight, bias = held
        hidden = product.hidden
        self._come_of(weight, bias)
        self.product = self.product._replace(call=lambda: functional.linear(hidden, weight, bias))

    def _come_of(self, weight: Tensor, bias: Tensor | None) -> None:
        versions = _versions(self.product.hidden, weight)
        self.product = self.product._replace(weight=weight, bias=bias, versions=versions)
        for copy in self.copies:
            copy._come_of(weight, bias)

    def note_change(self) -> None:
        """Keep logits that were changed in place; copies of what they were can't be computed any more."""
        self.keep()
        for copy in self.copies:
            if copy.kept is None:
                copy.why_unreadable = (
                    "a copy of logits (.float(), .contiguous(), .reshape()) is read after the logits were changed in "
                    "place, and had not been computed before."
                )


def _versions(hidden: Tensor, weight: Tensor) -> tuple[int, int]:
    return _version(hidden), _version(weight)


class DeferredLogits(Tensor):
    """Logits without elements; see [Note: Deferred logits].

    Attributes:
        family: the product.
        from_product: makes of the product's result what this tensor is.
        hidden: [..., H], which has been viewed and cut as the logits have.
        is_cut: whether it lacks tokens of the product, so that its memory has gaps.
        is_transposed: whether classes are on dim 1, and not on the last one.
    """

    family: _Family
    from_product: Callable[[Tensor], Tensor]
    hidden: Tensor
    is_cut: bool
    is_transposed: bool

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _met(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise SuperScaleError(
            f"tile_loss: logits that are not computed yet went to {op} where torch does not ask their class. Use "
            "SequenceConfig(tile_loss=False), or hand over logits.clone()."
        )


class _Defer(torch.autograd.Function):
    """A product without elements. An autograd function that takes it hands its gradient on here."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: list[int], dtype: torch.dtype
    ) -> Any:
        ctx.has_bias = bias is not None
        ctx.save_for_backward(hidden, weight)
        return make_wrapper(DeferredLogits, shape, dtype, hidden.device)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        grad = grad_outputs[0]
        if grad.shape[:-1] != hidden.shape[:-1]:
            raise SuperScaleError(
                f"tile_loss: an autograd function returned a gradient {tuple(grad.shape)} for logits of hidden states "
                f"{tuple(hidden.shape)}. Use SequenceConfig(tile_loss=False)."
            )
        rows = grad.reshape(-1, grad.shape[-1])
        of_bias = rows.sum(0) if ctx.has_bias else None
        of_hidden = (rows.to(weight.dtype) @ weight).view(hidden.shape).to(hidden.dtype)
        of_weight = rows.t().to(weight.dtype) @ hidden.reshape(-1, hidden.shape[-1]).to(weight.dtype)
        return of_hidden, of_weight, of_bias, None, None


def _made(
    family: _Family,
    view: Callable[[Tensor], Tensor],
    hidden: Tensor,
    dtype: torch.dtype,
    *,
    is_cut: bool = False,
    is_transposed: bool = False,
) -> DeferredLogits:
    shape = [*hidden.shape[:-1], family.product.weight.shape[0]]
    if is_transposed:
        shape.insert(1, shape.pop())
    product = family.product
    with without_torch_function(), torch.set_grad_enabled(family.is_grad_enabled):
        logits: DeferredLogits = _Defer.apply(plain(hidden), product.weight, product.bias, shape, dtype)  # type: ignore[no-untyped-call]
        logits.family, logits.from_product, logits.hidden = family, view, hidden
        logits.is_cut, logits.is_transposed = is_cut, is_transposed
        family.members.append(weakref.ref(logits))
    return logits


def _as_it_is(x: Tensor) -> Tensor:
    return x


def settled(nested: Any) -> Any:
    """The same nested value with the logits in it computed."""
    return tree_map(lambda x: x.from_product(x.family.keep()) if type(x) is DeferredLogits else x, nested)


def settled_or_held(nested: Any) -> Any:
    """The same nested value, which leaves a module that frees its weights: logits hold a copy of theirs."""
    for x in tree_leaves(nested):
        if type(x) is DeferredLogits and x.family.kept is None:
            x.family.hold()
    return nested


def _met(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a function that met deferred logits."""
    call = Call(func, name_of(func), args, kwargs)
    given = [x for x in tree_leaves((args, kwargs)) if type(x) is DeferredLogits]
    first = given[0]
    if call.name == "register_hook" and _gathers(args[1:]):
        return _hooked(first, args[1])
    is_first = bool(args) and args[0] is first and len(given) == 1
    if call.name in _ASKED:
        with without_torch_function():
            return func(*args, **kwargs)
    if first.family.kept is None and is_first:
        derived = _derived(call, first)
        if derived is not None:
            return derived
    if call.name == "cross_entropy":
        why_not = _why_not_tiled(call, given)
        if why_not is None:
            return _tiled(call, first)
        if first.family.is_grad_enabled:
            first.family.mode.seen.not_tiled[why_not] += 1
    return _with_logits(call, given)


def _gathers(hooks: tuple[Any, ...]) -> bool:
    """Whether a hook is one of those that gather weights again before backward reaches a module, FSDP2's or ours."""
    hook = hooks[0] if hooks else None
    modules = (getattr(hook, "__module__", None), type(getattr(hook, "__self__", None)).__module__)
    return any(str(one).startswith(("torch.distributed.fsdp", "lightning_superscale.zero.")) for one in modules)


def _hooked(logits: DeferredLogits, hook: Callable[[Tensor], Any]) -> Any:
    """Call a hook of the logits before backward goes on to what they are computed from: it comes first there too."""
    product = logits.family.product
    handles = [
        plain(one).register_hook(hook)  # type: ignore[no-untyped-call]
        for one in (product.hidden, product.weight, product.bias)
        if one is not None and plain(one).grad_fn is not None
    ]
    return handles[0]


def _with_logits(call: Call, given: list[DeferredLogits]) -> Any:
    """The result of a function that is given the logits themselves."""
    families = list(dict.fromkeys(one.family for one in given))
    roots = {family: family.keep() if call.name in _HELD else family.logits() for family in families}
    for family in families:
        family.mode.note_read(family, call)
    versions = {family: _version(root) for family, root in roots.items()}
    args, kwargs = tree_map(
        lambda x: x.from_product(roots[x.family]) if type(x) is DeferredLogits else x, (call.args, call.kwargs)
    )
    result = called(call.func, args, kwargs)
    shared = {storage_id_of(plain(x).untyped_storage()) for x in tree_leaves(result) if is_tensor(x)}
    for family, root in roots.items():
        if _version(root) != versions[family]:
            family.note_change()
        elif storage_id_of(plain(root).untyped_storage()) in shared:
            family.keep()
    return result


def _version(x: Tensor) -> int:
    return 0 if plain(x).is_inference() else version_of(plain(x))


def _derived(call: Call, x: DeferredLogits) -> DeferredLogits | None:
    """The deferred result of a view, a cut or a cast of logits; None where it is none that can be deferred."""
    product, hidden, shape = x.family.product, x.hidden, list(x.shape)
    if call.name in (*CASTS, "to", "contiguous"):
        wanted = x.dtype if call.name == "contiguous" else cast_to(call, x)
        # Values that would be rounded, or computed wider than the loss does, are read.
        if wanted is None or wanted not in (x.dtype, torch.promote_types(product.dtype, torch.float32)):
            return None
        has_gaps = call.name == "contiguous" and (x.is_cut or x.is_transposed)
        return _copied(x, wanted) if wanted != x.dtype or has_gaps else x
    if x.is_transposed:
        return None
    if call.name in ("view", "reshape", "flatten"):
        sizes = sizes_of(call, shape)
        if not sizes or sizes[-1] != shape[-1]:
            return None
        x = _copied(x, x.dtype) if x.is_cut else x
        return _member(x, lambda y: y.reshape(sizes), hidden.reshape([*sizes[:-1], hidden.shape[-1]]))
    if call.name == "__getitem__" and keeps_classes(call.args[1], len(shape)):
        index = call.args[1]
        cut = hidden[index]
        return _member(x, lambda y: y[index], cut, is_cut=list(cut.shape) != list(hidden.shape) or x.is_cut)
    if call.name in ("transpose", "permute", "get mT", "swapaxes") and len(shape) == 3 and puts_classes_on_1(call):
        return _member(x, lambda y: y.transpose(1, 2), hidden, is_cut=x.is_cut, is_transposed=True)
    return None


def _member(
    x: DeferredLogits,
    view: Callable[[Tensor], Tensor],
    hidden: Tensor,
    *,
    is_cut: bool = False,
    is_transposed: bool = False,
) -> DeferredLogits:
    """A view of a member of a family."""
    before = x.from_product
    return _made(x.family, lambda root: view(before(root)), hidden, x.dtype, is_cut=is_cut, is_transposed=is_transposed)


def _copied(x: DeferredLogits, dtype: torch.dtype) -> DeferredLogits:
    """Logits of a family of their own: what changes the product later does not change them."""
    parent, view = x.family, x.from_product

    def computed() -> Tensor:
        return view(parent.logits()).to(dtype, copy=True).contiguous()

    family = _Family(parent.product._replace(call=computed), parent.mode, parent)
    parent.copies.add(family)
    parent.mode.follow(family)
    return _made(family, _as_it_is, x.hidden, dtype, is_transposed=x.is_transposed)


def _bound(call: Call) -> dict[str, Any]:
    return call.named(CROSS_ENTROPY, ignore_index=-100, reduction="mean", label_smoothing=0.0)


def _why_not_tiled(call: Call, given: list[DeferredLogits]) -> str | None:
    """Why a cross entropy can't do without logits; None if it can."""
    bound = _bound(call)
    logits, target = bound["input"], bound["target"]
    if type(logits) is not DeferredLogits or len(given) > 1:
        return "its targets are logits themselves"
    family = logits.family
    if family.kept is not None:
        return "its logits were changed in place, or something keeps a view of them or a hook on them"
    if bound["weight"] is not None:
        return "it weighs classes"
    if bound["size_average"] is not None or bound["reduce"] is not None or bound["reduction"] not in ("mean", "sum"):
        return "it wants the loss of every token (reduction='none')"
    if not is_tensor(target) or target.dtype != torch.int64:
        return "its targets are shares of classes"
    num_dims = logits.hidden.dim()
    if not (num_dims == 2 or (num_dims == 3 and logits.is_transposed)):
        return "its classes are not where a linear layer puts them"
    if list(target.shape) != list(logits.hidden.shape[:-1]):
        return "it has other targets than one per token"
    if not is_sharded(logits.hidden) and layout_of(logits.hidden) is None and is_sharded(target):
        return "its targets are shared among ranks, and its logits are not"
    return None


def _tiled(call: Call, logits: DeferredLogits) -> Tensor:
    bound, family, hidden = _bound(call), logits.family, logits.hidden
    product, layout = family.product, layout_of(hidden)
    family.check()
    ignored, target = bound["ignore_index"], bound["target"]
    own = plain(target)
    if isinstance(layout, Sharded):
        own = own_targets(call, target, layout, layout.tokens.dim, ignored)
    with family.autocast(), family.mode.paused():
        total, num_valid = cross_entropy_sum(
            plain(hidden),
            product.weight,
            own,
            bias=product.bias,
            ignore_index=ignored,
            label_smoothing=bound["label_smoothing"],
        )
    family.mode.note_tiled(family, plain(hidden))
    # What torch's loss would have: fp32 under autocast, else that of the logits.
    is_autocast = torch.is_autocast_enabled(hidden.device.type)
    dtype = torch.promote_types(logits.dtype, torch.float32) if is_autocast else logits.dtype
    if not isinstance(layout, Sharded):
        return (total if bound["reduction"] == "sum" else total / num_valid).to(dtype)
    link = layout.sharing.link
    is_sum = bound["reduction"] == "sum"
    loss = sum_over_ranks(total, link) if is_sum else mean_over_tokens(total, num_valid, link)
    return reduced(loss.to(dtype), layout.sharing)


class TiledLosses(TorchFunctionMode):
    """Defers products of tokens with the weight of many classes while it is active; see [Note: Deferred logits].

    Args:
        which: "auto" defers products whose logits are worth it, True all of them.

    Attributes:
        seen: what became of losses so far.
    """

    def __init__(self, which: Literal["auto", True]) -> None:
        super().__init__()
        self.seen = LossesSeen()
        self._which = which
        self._is_paused = False
        # Of weights whose products met no loss nothing is deferred any more.
        self._met_a_loss: Any = WeakIdKeyDictionary()
        self._alive: weakref.WeakSet[_Family] = weakref.WeakSet()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._is_paused or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if func in PRODUCTS and DeferredLogits not in types:
            deferred = self._deferred(func, args, kwargs)
            if deferred is not None:
                return deferred
        return func(*args, **kwargs)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which nothing is deferred."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def _deferred(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        operands = operands_of(func, args, kwargs)
        if operands is None or not self._is_worth_it(operands[0], operands[1]):
            return None
        x, weight, bias = operands
        param = weight if weight._base is None else weight._base
        if self._met_a_loss.get(param) is False or is_in_functorch():
            return None
        if is_in_checkpoint():
            self.seen.num_in_checkpoints += weight.shape[0] >= LEAST_CLASSES
            return None
        dtype = torch.promote_types(plain(x).dtype, weight.dtype)
        device_type = weight.device.type
        if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device_type)
        elif not plain(x).dtype == weight.dtype == (weight if bias is None else bias).dtype:
            return None  # torch says that they don't fit
        weight.detach()  # waits for a weight that is on its way, as the product would: autograd functions do not ask
        product = _Product(lambda: func(*args, **kwargs), x, weight, bias, param, dtype, _versions(x, weight))
        family = _Family(product, self)
        self.follow(family)
        return _made(family, _as_it_is, x, dtype)

    def _is_worth_it(self, x: Tensor, weight: Tensor) -> bool:
        num_classes, num_features = weight.shape
        if plain(x).numel() == 0 or self._which is True:
            return plain(x).numel() > 0
        num_tokens = plain(x).numel() // num_features
        is_wide = num_classes >= max(LEAST_CLASSES, LEAST_RATIO * num_features)
        return is_wide and num_tokens > num_features

    def follow(self, family: _Family) -> None:
        """Know a family as long as it lives."""
        self._alive.add(family)

    def note_tiled(self, family: _Family, hidden: Tensor) -> None:
        """Count a loss that did without logits."""
        self._met_a_loss[family.product.param] = True
        if family.is_grad_enabled:
            self.seen.add(hidden, family.product.weight)

    def note_read(self, family: _Family, call: Call) -> None:
        """Note that a function reads logits. A product that met no loss is not deferred any more."""
        if family.is_grad_enabled:
            met = self._met_a_loss.setdefault(family.product.param, False)
            if met or family.product.weight.shape[0] >= LEAST_CLASSES:  # others were no logits
                self.seen.reads[call.name] += 1

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """A context after which it is not known what became of the losses inside of it."""
        seen, met_a_loss = deepcopy(self.seen), self._met_a_loss.copy()
        try:
            yield
        finally:
            self.seen, self._met_a_loss = seen, met_a_loss

    def settle(self) -> None:
        """Compute the logits that somebody still holds, now that the step is over."""
        for family in list(self._alive):
            if family.kept is None and not family.why_gone and family.is_held:
                family.keep()
        self._alive = weakref.WeakSet()

    def let_go(self, why: str) -> None:
        """Refuse to compute logits of before from now on."""
        for family in list(self._alive):
            family.why_gone = family.why_gone or why
        self._alive = weakref.WeakSet()
