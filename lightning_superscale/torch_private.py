"""Every private name of torch that this package uses, and its use: a new torch may break this file and no other.

`tests/test_torch_private.py` tests each of them, for the versions below. The attributes that FSDP2 leaves in a module
are named in zero/fsdp2/unwrap.py, which removes them.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Collection, Iterable, MutableMapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    is_traceable_wrapper_subclass,
)
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "AsyncCollectiveTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "is_traceable_wrapper_subclass",
    "tree_leaves",
    "tree_map",
]

VERSIONS = ("2.11", "2.14")
"""The first and the last version with which the tests of these names have passed."""


def version_of(tensor: Tensor) -> int:
    """The number of times that a tensor was changed in place, as autograd counts it."""
    return tensor._version


def num_owners_of(storage: torch.UntypedStorage) -> int:
    """The number of tensors, and of Python's storage objects, that keep a storage alive."""
    return int(torch._C._storage_Use_Count(storage._cdata))


def storage_id_of(storage: torch.UntypedStorage) -> int:
    """A number that identifies a storage, filled or empty."""
    return int(storage._cdata)


def saved_tensor_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """The innermost pair (pack, unpack) of saved-tensor hooks that autograd would call now; None without any."""
    found: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if found is None else (found[0], found[1])


def wrap_checkpointed_blocks(
    wrap: Callable[[Callable[..., Any], tuple[Any, ...]], Callable[..., Any]],
) -> Callable[[], None]:
    """Let `torch.utils.checkpoint.checkpoint` run `wrap(block, inputs)` where it computes a block again.

    Returns:
        a function without arguments that ends it. Wraps end in the opposite order of their beginning.
    """
    from torch.utils import checkpoint

    reentrant: Any = checkpoint.CheckpointFunction

    class Wrapped(reentrant):
        """The autograd function of checkpoints with `use_reentrant=True`."""

        @staticmethod
        def forward(ctx: Any, run: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
            return reentrant.forward(ctx, wrap(run, args), preserve_rng_state, *args)

    # The generator of checkpoints with False takes inputs after five options up to torch 2.13, and then as a tuple.
    name = "_checkpoint_without_reentrant_generator"
    takes_tuple = hasattr(checkpoint, f"{name}_impl")
    name += "_impl" * takes_tuple
    recomputed = vars(checkpoint)[name]

    def wrapped(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return recomputed(wrap(run, args[0] if takes_tuple else args[5:]), *args, **kwargs)

    def end() -> None:
        vars(checkpoint)[name] = recomputed
        checkpoint.CheckpointFunction = reentrant  # type: ignore[misc]

    vars(checkpoint)[name] = wrapped
    checkpoint.CheckpointFunction = Wrapped  # type: ignore[misc]
    return end


def is_in_checkpoint() -> bool:
    """Whether forward runs inside of torch's non-reentrant checkpoint, which will compute it again."""
    hooks = saved_tensor_hooks()
    return hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"


def is_in_functorch() -> bool:
    """Whether a transform of torch.func, such as vmap or grad, is active."""
    return bool(torch._C._are_functorch_transforms_active())


def is_in_backward() -> bool:
    """Whether this thread runs a backward of autograd's."""
    return torch._C._current_graph_task_id() != -1


def without_dispatch_modes() -> AbstractContextManager[object]:
    """A context whose operations are seen by none of the dispatch modes that are active around it."""
    context: AbstractContextManager[object] = _disable_current_modes()
    return context


def has_own_torch_function(cls: type[Any]) -> bool:
    """Whether a tensor class does something of its own when torch is handed one of its tensors."""
    return cls.__torch_function__ not in (torch._C._disabled_torch_function_impl, Tensor.__torch_function__)


def no_torch_function() -> Any:
    """The `__torch_function__` of a tensor class whose operations run as those of plain tensors, at the same cost."""
    return torch._C._disabled_torch_function_impl


def plainly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function in whose extent this thread runs operations without calling any class's `__torch_function__`.

    One call into C++, which an interrupt can't leave half done, as it can a context that a `with` statement opens.
    """
    return torch._C._disabled_torch_function_impl(function, (), args, kwargs)


@functools.cache
def operations_without_reads() -> frozenset[Any]:
    """The operations, as `__torch_function__` is handed them, that read and write no element of a tensor."""
    attributes = (
        *("shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad", "grad_fn", "is_leaf"),
        *("is_cuda", "is_cpu", "is_meta", "grad_dtype", "_version", "_backward_hooks", "_post_accumulate_grad_hooks"),
    )
    methods = (
        *("requires_grad_", "register_hook", "register_post_accumulate_grad_hook", "size", "numel", "nelement"),
        *("element_size", "is_floating_point", "is_complex"),
    )
    accessors = [getattr(Tensor, name) for name in attributes]
    return frozenset(
        [
            *(accessor.__get__ for accessor in accessors),
            *(getattr(Tensor, name).__set__ for name in ("requires_grad", "grad")),
            *(getattr(Tensor, name).__delete__ for name in ("grad",)),
            *(getattr(Tensor, name) for name in methods),
        ]
    )


def backward_hooks_of(param: Tensor) -> MutableMapping[int, Callable[[Tensor], Tensor | None]] | None:
    """The hooks of `register_hook` on a parameter, oldest first; None or empty where there are none."""
    return getattr(param, "_backward_hooks", None)


def has_post_accumulate_hooks(param: Tensor) -> bool:
    """Whether `register_post_accumulate_grad_hook` put any hook on a parameter."""
    return bool(getattr(param, "_post_accumulate_grad_hooks", None))


def make_wrapper(cls: type[Tensor], shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:
    """A tensor of a subclass that has a shape and no memory."""
    return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)


def same_memory_as(tensor: Tensor, cls: type[Tensor]) -> Any:
    """A tensor of a subclass with the memory of another one, which autograd takes for no view of it."""
    return torch.Tensor._make_subclass(cls, tensor)


def add_to_all(tensors: list[Tensor], value: float) -> None:
    """Add a number to every tensor, in place, in one launch."""
    torch._foreach_add_(tensors, value)


def norms_of_all(tensors: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The 2-norm of each tensor, a scalar of `dtype`, in which it is summed up; on a GPU in one launch."""
    return torch._foreach_norm(tensors, 2, dtype=dtype)


def order_of_norms(params: list[Tensor]) -> list[int]:
    """The order in which `torch.nn.utils.get_total_norm` adds up the norms of parameters' gradients, as indices."""
    groups = torch.utils._foreach_utils._group_tensors_by_device_and_dtype([[*params]], with_indices=True)
    return [i for _, indices in groups.values() for i in indices]


def copy_all(targets: list[Tensor], sources: list[Tensor] | tuple[Tensor, ...]) -> None:
    """Copy each source into its target, in place, in one launch."""
    torch._foreach_copy_(targets, sources)


def lerp_all(targets: list[Tensor], ends: list[Tensor], weight: float) -> None:
    """`target += weight * (end - target)`, in place, in one launch."""
    torch._foreach_lerp_(targets, ends, weight)


def is_compiled(root: nn.Module) -> bool:
    """Whether `torch.compile` compiled the model or any module in it."""
    optimized = torch._dynamo.OptimizedModule if hasattr(torch, "_dynamo") else ()
    return any(isinstance(m, optimized) or getattr(m, "_compiled_call_impl", None) is not None for m in root.modules())


def has_compiled_code() -> bool:
    """Whether anything of this process was made by `torch.compile`, modules and functions alike, used or not."""
    if not hasattr(torch, "_dynamo"):
        return False
    # Functions that are kept from being compiled are there too, with None.
    return any(map(callable, torch._dynamo.eval_frame.cached_backends.values()))


def is_compiling() -> bool:
    """Whether this thread compiles a function now, its look at the arguments included.

    `torch.compiler.is_compiling()` of torch 2.11 says so only of what is traced after that.
    """
    return torch.compiler.is_compiling() or torch._guards.CompileContext.try_get() is not None


@torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
def compiles_calls() -> bool:
    """Whether `torch.compile` compiles the functions that the caller calls: the caller runs within something compiled.

    The caller itself is not compiled; `torch.compiler.disable(recursive=False)` keeps it out.
    """
    return torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None


def behind_compile(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` wrapped; a module that is not wrapped is returned itself."""
    inner: nn.Module = getattr(module, "_orig_mod", module)
    return inner


class Compilation(NamedTuple):
    """How `torch.compile` was asked to compile a module.

    Attributes:
        module: the module itself, which may lie behind the compiled one.
        backend: the function that compiles graphs, with the options that were given.
        dynamic: whether shapes are symbols; None where that is found out.
    """

    module: nn.Module
    backend: Callable[..., Callable[..., Any]]
    dynamic: bool | None

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Another function, compiled so."""
        found: Callable[..., Any] = torch.compile(function, backend=self.backend, dynamic=self.dynamic)
        return found


def compilation_of(module: nn.Module) -> Compilation | None:
    """How a module was compiled, by `torch.compile(module)` or `module.compile()`; None where it was not."""
    call = module.__dict__.get("_compiled_call_impl")
    if isinstance(module, torch._dynamo.OptimizedModule):
        inner, context = module._orig_mod, module.dynamo_ctx
    elif call is not None:
        inner, context = module, _context_of(call)
    else:
        return None
    backend: Any = context.callback
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    return Compilation(inner, backend, context._dynamic)


def _context_of(compiled: Any) -> Any:
    """The settings of a function that `torch.compile` made, which it closes over."""
    cells = dict(zip(compiled.__code__.co_freevars, compiled.__closure__, strict=True))
    return cells["self"].cell_contents


def set_compiled_call(module: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
    """Let a compiled module call this; gives what it called before."""
    if isinstance(module, torch._dynamo.OptimizedModule):
        before = module.forward
        module.forward = call
        return before
    before = module._compiled_call_impl  # type: ignore[assignment]
    module._compiled_call_impl = call
    return before


def capture_errors() -> tuple[type[Exception], ...]:
    """What Dynamo raises where it can't capture a function, or has captured it too often."""
    return torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit


def claimed_memory(like: Tensor, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """A tensor of this shape that claims as much memory and has none: it may be asked about, never read.

    Args:
        like: gives dtype and device.
    """
    needed = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    storage = torch._C._construct_storage_from_data_pointer(like.data_ptr(), like.device, needed * like.element_size())
    tensor = torch.empty(0, dtype=like.dtype, device=like.device)
    return tensor.set_(storage, 0, shape, strides)


def checkpointed_region() -> Any:
    """The operator by which a captured graph says that a part of it is computed again in backward."""
    return torch.ops.higher_order.tag_activation_checkpoint


def name_of_higher_order(function: object) -> str:
    """The name of an operator that takes functions, by which a captured graph says what it calls; "" for others."""
    return str(function) if isinstance(function, torch._ops.HigherOrderOperator) else ""


def compiled_from(function: Callable[..., Any]) -> object:
    """The function that `torch.compile` made this one of; None for any other function."""
    return getattr(function, "_torchdynamo_orig_callable", None)


def compile_with_memory_budget(budget: float, inner: str | Callable[..., Any]) -> Callable[..., Any]:
    """A backend of `torch.compile` whose partitioner keeps at most this share of what it would keep for backward.

    torch's setting is global; it holds while the backend compiles, and is as before afterwards.
    """

    def compile_graph(graph: Any, inputs: Any, **options: Any) -> Any:
        with torch._functorch.config.patch(activation_memory_budget=budget):
            return torch._dynamo.lookup_backend(inner)(graph, inputs, **options)

    return compile_graph


def own_params_of(module: nn.Module) -> Iterable[nn.Parameter | None]:
    """A module's parameters without those of its children; a parameter with several names comes once for each."""
    return module._parameters.values()


def tensors_of(module: nn.Module) -> tuple[MutableMapping[str, Any], MutableMapping[str, Any]]:
    """The mappings in which a module has its own parameters and its own buffers, by name."""
    return module._parameters, module._buffers


def transient_buffers_of(module: nn.Module) -> Collection[str]:
    """Names of a module's own buffers that are in no state dict."""
    return module._non_persistent_buffers_set


def loaders_of(module: nn.Module) -> list[object]:
    """The functions that run when a module loads its part of a state dict: its method, and the hooks before it."""
    hooks = module._load_state_dict_pre_hooks.values()
    return [type(module)._load_from_state_dict, *(getattr(hook, "hook", hook) for hook in hooks)]


def all_to_all_in_graph(x: Tensor, group_name: str, size: int) -> Tensor:
    """Send equal parts of dim 0 to the ranks of a group, and get theirs; a collective that compilers see and keep.

    torch's partitioner never computes a collective of this namespace anew in backward.
    """
    splits = [len(x) // size] * size
    ops = torch.ops._c10d_functional
    moved: Tensor = ops.wait_tensor(ops.all_to_all_single(x, splits, splits, group_name))
    return moved


def start_shift_in_graph(x: Tensor, group_name: str, size: int, rank: int) -> Tensor:
    """Begin to send a tensor to the next rank of a group, and to get the one before's, a 1D tensor of as many elements.

    `wait_in_graph` returns it when it is there; until then the caller keeps `x`.
    """
    to, source = [0] * size, [0] * size
    to[(rank + 1) % size] = source[(rank - 1) % size] = x.numel()
    moved: Tensor = torch.ops._c10d_functional.all_to_all_single(x.reshape(-1), source, to, group_name)
    return moved


def wait_in_graph(x: Tensor) -> Tensor:
    """The result of a collective that was begun; later work on the device comes after it."""
    done: Tensor = torch.ops._c10d_functional.wait_tensor(x)
    return done


def cpu_flash_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention on a CPU: the output, and the logarithm of the sum of exponentials of each query's scores.

    Args:
        q, k, v: [batch, heads, tokens, dim], of equal dims.
        mask: of the dtype of q, added to scores.
    """
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    found: tuple[Tensor, Tensor] = op(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)
    return found


def cpu_flash_attention_grads(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, where `output` and `lse` may be those of more keys than these."""
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    found: tuple[Tensor, Tensor, Tensor] = op(grad, q, k, v, output, lse, 0.0, is_causal, attn_mask=mask, scale=scale)
    return found


def all_gather_in_graph(x: Tensor, group_name: str, size: int) -> Tensor:
    """The tensors of a group's ranks one after the other along dim 0; a collective that compilers see and keep."""
    ops = torch.ops._c10d_functional
    gathered: Tensor = ops.wait_tensor(ops.all_gather_into_tensor(x, size, group_name))
    return gathered


def all_reduce_in_graph(x: Tensor, group_name: str) -> Tensor:
    """The sum of a tensor over a group's ranks; a collective that compilers see and keep."""
    ops = torch.ops._c10d_functional
    summed: Tensor = ops.wait_tensor(ops.all_reduce(x, "sum", group_name))
    return summed


def without_torch_function() -> AbstractContextManager[None]:
    """A context in which functions compute with subclasses of Tensor as with plain tensors, and return plain ones."""
    guard: AbstractContextManager[None] = torch._C.DisableTorchFunctionSubclass()
    return guard


def is_fake(x: Any) -> bool:
    """Whether it is a tensor without values, which stands for one."""
    return isinstance(x, FakeTensor)


def is_of_tracer(x: Tensor) -> bool:
    """Whether a tensor is a Python object of torch's tracers, which stands for one that a compiled graph will have."""
    return isinstance(x, (FakeTensor, FunctionalTensor))


def guard_autograd_functions(
    guard: Callable[[Callable[..., Any]], Callable[..., Any]], check: Callable[..., None]
) -> Callable[[], None]:
    """Let `guard(apply)` apply every autograd function, or `check` see the application that comes past it.

    Args:
        guard: gives the function that is called with a class and its arguments. It may call `apply` with the same.
        check: is called with the class and the arguments of an application that passed `guard` by: from torch 2.14 on,
            where `Function.apply` is written in C++, names that were bound to it before.

    Returns:
        a function without arguments that ends it.
    """
    function: Any = torch.autograd.Function
    if inspect.ismethod(function.apply):  # up to torch 2.13 it ends in this class's, which has none of its own
        base: Any = torch.autograd.function._SingleLevelFunction

        def inherited(cls: type[Any], *args: Any, **kwargs: Any) -> Any:
            return super(base, cls).apply(*args, **kwargs)

        base.apply = classmethod(guard(inherited))

        def end() -> None:
            del base.apply

        return end
    return _guard_functions_in_c(function, guard, check)


def _guard_functions_in_c(
    function: Any, guard: Callable[[Callable[..., Any]], Callable[..., Any]], check: Callable[..., None]
) -> Callable[[], None]:
    """As `guard_autograd_functions`, where names are bound to a function of C++: it looks up a class's `forward`."""
    before = vars(function)["apply"]
    kind: Any = type(function)
    guarded = threading.local()  # cls: the class that the guard applies on this thread

    def applied(cls: type[Any], *args: Any, **kwargs: Any) -> Any:
        outer, guarded.cls = getattr(guarded, "cls", None), cls
        try:
            return before.__get__(None, cls)(*args, **kwargs)
        finally:
            guarded.cls = outer

    def looked_up(cls: type[Any], name: str) -> Any:
        found = type.__getattribute__(cls, name)
        if name != "forward" or getattr(guarded, "cls", None) is cls:
            return found

        @functools.wraps(found)
        def checked(*args: Any, **kwargs: Any) -> Any:
            check(cls, *args, **kwargs)
            return found(*args, **kwargs)

        return checked

    def end() -> None:
        function.apply = before
        del kind.__getattribute__

    function.apply = classmethod(guard(applied))
    kind.__getattribute__ = looked_up
    return end


def scripts() -> list[tuple[Any, str]]:
    """The classes of what `torch.jit.script` makes, which run without `__torch_function__`, and their names."""
    return [(torch._C.ScriptFunction, "a script"), (torch._C.ScriptMethod, "a script's method")]


def functions_past_torch_function() -> list[tuple[Any, str]]:
    """Functions that read a tensor's memory and don't call its class's `__torch_function__`, by module."""
    import torch._functorch.eager_transforms
    import torch._functorch.vmap

    return [
        *((torch, name) for name in ("tensor", "as_tensor", "asarray")),
        (torch._functorch.vmap, "_add_batch_dim"),
        (torch._functorch.eager_transforms, "_wrap_tensor_for_grad"),
    ]


def parallel_styles_of(module: nn.Module) -> dict[str, list[Any]]:
    """The styles of tensor parallelism whose hooks a module has: by class name, what those hooks were made with.

    `distribute_module` leaves a mark on the module, and its hooks; a module with the mark alone has the style
    "distribute_module".
    """
    found: dict[str, list[Any]] = {}
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        for cell in getattr(hook, "__closure__", None) or ():
            made = cell.cell_contents
            if isinstance(made, ParallelStyle):
                found.setdefault(type(made).__name__, [])
            elif isinstance(made, functools.partial):
                owner = getattr(made.func, "__qualname__", "").partition(".")[0]
                found.setdefault(owner, []).extend(tree_leaves(made.args))
    if not found and getattr(module, "_distribute_module_applied", False):
        found["distribute_module"] = []
    return found


def composable_states() -> MutableMapping[nn.Module, Any]:
    """The table in which `fully_shard` keeps a module's state."""
    from torch.distributed._composable_state import _module_state_mapping

    return _module_state_mapping


def sharded_tensor_type() -> type[Any]:
    """The tensor class of FSDP1 and of old checkpoints. Imported on the call, because few runs need its module."""
    from torch.distributed._shard.sharded_tensor import ShardedTensor  # type: ignore[attr-defined]

    found: type[Any] = ShardedTensor
    return found
