"""What user code asks about a tensor: it hears of all tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_superscale.sequence.tokens.call import Call, global_shape, is_called_by_torch
from lightning_superscale.sequence.tokens.rules.registry import rule
from lightning_superscale.sequence.tokens.tensor import behind, plain, with_layout


@rule("get shape")
def shape(call: Call) -> torch.Size:
    return torch.Size(global_shape(call.args[0]))


@rule("size")
def size(call: Call) -> Any:
    sizes = torch.Size(global_shape(call.args[0]))
    (dim,) = call.bind("input dim")[1:]
    return sizes if dim is None else sizes[dim]


@rule("numel", "nelement")
def numel(call: Call) -> int:
    return torch.Size(global_shape(call.args[0])).numel()


@rule("__len__")
def length(call: Call) -> int:
    return global_shape(call.args[0])[0]


@rule("get nbytes")
def num_bytes(call: Call) -> int:
    return torch.Size(global_shape(call.args[0])).numel() * plain(call.args[0]).element_size()


@rule("is_same_size")
def is_same_size(call: Call) -> bool:
    first, second = (global_shape(x) for x in (*call.args, *call.kwargs.values()))
    return first == second


@rule("get grad")
def grad(call: Call) -> Any:
    """The true gradient of this rank's tokens: autograd's is times the number of ranks ([Note: One loss contract])."""
    found, layout = call.run(), call.sharded[0].placement
    return found if found is None or is_called_by_torch() else with_layout(found / layout.sharing.link.size, layout)


@rule("register_hook")
def register_hook(call: Call) -> Any:
    """The hook gets and gives the true gradient, as a tensor with tokens.

    It is registered on the tensor of which this is only another view, if there is one: writing to a view in place takes
    the view's hooks from the graph, and user code sees no view here.
    """
    x, hook = call.bind("input hook")
    if is_called_by_torch():
        return call.run(behind(x), hook)
    layout: Any = x.placement
    size = layout.sharing.link.size

    def on_part(found: Tensor) -> Tensor | None:
        changed = hook(with_layout(found / size, layout))
        return None if changed is None else plain(changed) * size

    return call.run(behind(x), on_part)


@rule("_is_view", "get _base")
def view(call: Call) -> Any:
    """Of the tensor that user code takes it for."""
    return call.run(behind(call.args[0]))


@rule("stride", "storage_offset", "set grad")
def memory_order(call: Call) -> Any:
    if not is_called_by_torch():
        call.refuse("is of this rank's part", "Ask for .shape or .is_contiguous().")
    return call.run()


@rule("__reduce_ex__", "__deepcopy__", "share_memory_", "__reduce__")
def copied(call: Call) -> Any:
    call.refuse(
        "copies or pickles a tensor, of which this rank has a part",
        "Use .clone(); save what every rank has, such as losses and parameters.",
    )


@rule("__repr__", "__str__", "__format__")
def shown(call: Call) -> str:
    x = call.args[0]
    return f"TokenTensor({plain(x)}, {x.placement})"


@rule(
    "dim",
    "ndimension",
    "element_size",
    "get_device",
    "is_contiguous",
    "is_complex",
    "is_floating_point",
    "is_signed",
    "is_inference",
    "is_pinned",
    "register_post_accumulate_grad_hook",
    "retain_grad",
    "__hash__",
    "get ndim",
    "get dtype",
    "get device",
    "get layout",
    "get requires_grad",
    "set requires_grad",
    "get grad_fn",
    "get is_leaf",
    "get is_cuda",
    "get is_cpu",
    "get is_meta",
    "get is_sparse",
    "get is_quantized",
    "get is_nested",
    "get is_mps",
    "get is_xpu",
    "get itemsize",
    "get names",
    "get output_nr",
    "get retains_grad",
    "get _version",
    "get _backward_hooks",
    "get _post_accumulate_grad_hooks",
    "has_names",
    "is_neg",
    "is_conj",
    "is_shared",
)
def as_of_the_part(call: Call) -> Any:
    """What does not depend on the number of tokens."""
    return call.run()


def elements_read(call: Call) -> Any:
    call.refuse(
        "reads elements, of which this rank has a part",
        "Reduce them first, with .sum() or .mean(), or read them in validation_step's outputs.",
    )


rule(
    "item",
    "tolist",
    "numpy",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "__array__",
    "__contains__",
    "equal",
    "allclose",
    "is_nonzero",
    "__complex__",
)(elements_read)


def memory_read(call: Call) -> Any:
    call.refuse(
        "takes the memory of a tensor, of which this rank has a part: a kernel would compute with that part alone",
        "Use torch's own functions, or name the autograd function in SequenceConfig.token_wise if it treats every "
        "token by itself.",
    )


rule(
    "data_ptr", "untyped_storage", "storage", "__cuda_array_interface__", "__dlpack__", "get __cuda_array_interface__"
)(memory_read)
