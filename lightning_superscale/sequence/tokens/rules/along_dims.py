"""Functions that work along one dim, and treat every place of the others by itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from lightning_superscale.sequence.tokens.call import Call
from lightning_superscale.sequence.tokens.layout import Sharded
from lightning_superscale.sequence.tokens.rules.elementwise import beside, common, in_place
from lightning_superscale.sequence.tokens.rules.registry import rule
from lightning_superscale.sequence.tokens.tensor import is_sharded, ndim_of, plain, with_layout
from lightning_superscale.sequence.tokens.traced import is_tensor

# The parameters of each function, up to its dim, and the dim that it takes where none is given.
_ALONG: dict[str, tuple[str, int | None]] = {
    "softmax": ("input dim", None),
    "softmin": ("input dim", None),
    "log_softmax": ("input dim", None),
    "normalize": ("input p dim", 1),
    "glu": ("input dim", -1),
    "chunk": ("input chunks dim", 0),
    "split": ("input split_size dim", 0),
    "split_with_sizes": ("input split_sizes dim", 0),
    "tensor_split": ("input indices_or_sections dim", 0),
    "unbind": ("input dim", 0),
    "index_select": ("input dim index", None),
    "cumsum": ("input dim", None),
    "cumprod": ("input dim", None),
    "cummax": ("input dim", None),
    "cummin": ("input dim", None),
    "logcumsumexp": ("input dim", None),
    "diff": ("input n dim", -1),
    "quantile": ("input q dim", None),
    "sort": ("input dim", -1),
    "argsort": ("input dim", -1),
    "topk": ("input k dim", -1),
    "flip": ("input dims", None),
    "roll": ("input shifts dims", None),
    "repeat_interleave": ("input repeats dim", None),
}
_WHY = {
    "softmax": "compares every token with every other",
    "cumsum": "adds up all tokens before each one",
    "cumprod": "multiplies all tokens before each one",
    "cummax": "compares each token with all before it",
    "cummin": "compares each token with all before it",
    "logcumsumexp": "adds up all tokens before each one",
    "diff": "subtracts each token from the next one, which another rank may have",
    "quantile": "orders tokens among one another",
    "roll": "moves tokens to other places",
    "flip": "moves tokens to other places",
    "sort": "orders tokens among one another",
    "argsort": "orders tokens among one another",
    "topk": "chooses among all tokens",
    "unbind": "takes tokens one by one",
}
_INSTEAD = {
    "softmax": "Use torch.nn.functional.scaled_dot_product_attention for attention.",
    "unbind": "Keep them together: a loop over tokens, as recurrent layers have, can't be shared.",
}


def _dims(call: Call) -> list[int]:
    """The dims along which a call works, from 0; all dims where it works on the flattened tensor."""
    names, default = _ALONG[call.name]
    given = call.named(names)
    dim, num_dims = given.get("dim", given.get("dims")), ndim_of(call.sharded[0])
    if call.name == "flip":
        dim = call.sizes("dims")
    dim = default if dim is None else dim
    if dim is None:
        return list(range(num_dims))
    return [one % num_dims for one in ([dim] if isinstance(dim, int) else dim)]


def along(call: Call) -> Any:
    x, layout = call.args[0], call.sharded[0].placement
    if not is_sharded(x) or not isinstance(layout, Sharded):
        call.refuse("looks up a whole tensor by tokens' values", "Use torch.nn.functional.embedding.")
    if len(call.sharded) > 1:
        call.refuse("works along a dim as each token's values say", "Use torch.gather().")
    dims = _dims(call)
    if layout.tokens.dim in dims:
        call.refuse(
            f"along the dim of tokens {_WHY.get(call.name, 'needs all of them')}",
            _INSTEAD.get(call.name, "Compute it from whole tensors of the batch, before the model's first layer."),
        )
    if call.name == "quantile":
        call.refuse("gives several values for each token", "Use .amax(), .amin() or .mean().")
    if call.name == "unbind":
        layout = layout.at(layout.tokens.dim - (dims[0] < layout.tokens.dim))
    return call.wrap(call.run(), layout)


for _name in _ALONG:
    rule(_name)(along)


@rule("gather", "take_along_dim", "scatter", "scatter_add", "scatter_", "scatter_add_")
def picked(call: Call) -> Any:
    """Each token's own elements, by an index of the same tokens."""
    dim = call.bind("input indices dim" if call.name == "take_along_dim" else "input dim index")
    dim = dim[2] if call.name == "take_along_dim" else dim[1]
    from_right, layout = common(call, call.sharded)
    num_dims = ndim_of(call.sharded[0])
    if dim is None or dim % num_dims == num_dims + from_right:
        call.refuse("picks among all tokens", "Use whole tensors of the batch, before the model's first layer.")
    args, kwargs = _beside(call, from_right, layout)
    if call.is_in_place:
        return in_place(call, tuple(args), kwargs)
    return with_layout(call.run(*args, **kwargs), layout)


def _beside(call: Call, from_right: int, layout: Sharded) -> tuple[list[Any], dict[str, Any]]:
    args = [beside(call, one, from_right, layout) for one in call.args]
    return args, {key: beside(call, one, from_right, layout) for key, one in call.kwargs.items()}


@rule("one_hot")
def one_hot(call: Call) -> Any:
    """As many classes as all tokens need, where none are given."""
    x, num_classes = call.bind("tensor num_classes", num_classes=-1)
    if num_classes == -1:
        num_classes = int(x.max()) + 1
    return with_layout(functional.one_hot(plain(x), num_classes), x.placement)


@rule("cosine_similarity", "pairwise_distance")
def similarity(call: Call) -> Any:
    """Of the features of two tensors' tokens."""
    dim = call.bind("x1 x2 dim", dim=1)[2] if call.name == "cosine_similarity" else -1
    from_right, layout = common(call, call.sharded)
    num_dims = max(ndim_of(x) for x in (*call.args, *call.kwargs.values()) if is_tensor(x))
    at = num_dims + from_right
    if dim % num_dims == at:
        call.refuse("compares sequences of tokens", "Compare features: dim=-1.")
    args, kwargs = _beside(call, from_right, layout)
    keeps = call.name == "pairwise_distance" and bool(call.bind("x1 x2 p eps keepdim")[4])
    return with_layout(call.run(*args, **kwargs), layout.at(at - (dim % num_dims < at and not keeps)))


@rule("pad", "constant_pad_nd")
def pad(call: Call) -> Any:
    x, widths = call.bind("input pad")
    widths = list(widths)
    dims = range(ndim_of(x) - 1, ndim_of(x) - 1 - len(widths) // 2, -1)
    wide = [dim for dim, pair in zip(dims, zip(widths[::2], widths[1::2], strict=True), strict=True) if any(pair)]
    if x.placement.tokens.dim in wide:
        call.refuse("adds tokens", "Pad the batch's tensors, before the model's first layer.")
    return with_layout(call.run(), x.placement)


@rule("cat", "concat", "concatenate", "stack", "hstack", "dstack")
def cat(call: Call) -> Any:
    """Joined along a dim of features; whole tensors are joined with their part."""
    tensors, dim = call.bind("tensors dim", dim=-1 if call.name in ("hstack", "dstack") else 0)
    if call.name != "stack":  # torch leaves out [0], with which caches of keys and values begin
        tensors = [x for x in tensors if is_sharded(x) or x.shape != (0,)]
    from_right, layout = common(call, [x for x in tensors if is_sharded(x)])
    num_dims = ndim_of(tensors[0])
    at = dim % (num_dims + (call.name == "stack"))
    token_dim = num_dims + from_right
    joins_tokens = call.name in ("hstack", "dstack") or (call.name != "stack" and at == token_dim)
    if joins_tokens and len(tensors) > 1:
        call.refuse(
            "joins tensors along the dim of tokens",
            "Join ids before the embedding; prefixes and soft prompts can't be shared yet.",
        )
    parts = [beside(call, x, from_right, layout) for x in tensors]
    moved = token_dim + (call.name == "stack" and at <= token_dim)
    return with_layout(call.run(parts, dim), layout.at(moved))


@rule("broadcast_tensors", "meshgrid")
def broadcast(call: Call) -> Any:
    given: list[Tensor] = [x for one in call.args for x in (one if isinstance(one, (list, tuple)) else [one])]
    from_right, layout = common(call, call.sharded)
    if call.name == "meshgrid":
        call.refuse("pairs every token with every other", "Make it of whole tensors of the batch.")
    results = call.run(*(beside(call, x, from_right, layout) for x in given))
    return type(results)(with_layout(x, layout.at(x.dim() + from_right)) for x in results)
