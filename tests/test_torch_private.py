"""Each private name of torch that we use does what we take it for; a failure here explains the others."""

from __future__ import annotations

import ast
import re
import typing
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import PrepareModuleInput, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_superscale
from lightning_superscale import torch_private

PACKAGE = Path(lightning_superscale.__file__).parent
ROOT = Path(__file__).resolve().parents[1]


def test_this_torch_is_one_of_those_that_were_tried():
    first, last = (tuple(map(int, version.split("."))) for version in torch_private.VERSIONS)
    found = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2]))
    assert first <= found <= last, (
        f"torch {torch.__version__} has not been tried: run the tests of this file, then widen torch_private.VERSIONS"
    )


def test_the_package_asks_for_the_versions_that_were_tried():
    asked = re.search(r'"torch>=([\d.]+),<([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    first, last = torch_private.VERSIONS
    major, minor = last.split(".")
    assert asked is not None
    assert asked.groups() == (first, f"{major}.{int(minor) + 1}")


def test_versions_count_changes_in_place_and_none_through_data():
    tensor = torch.zeros(3)
    before = torch_private.version_of(tensor)
    tensor.add_(1)
    tensor.data.add_(1)
    assert torch_private.version_of(tensor) == before + 1


def test_operations_hide_from_dispatch_modes():
    seen = []

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.ones(3)
    with Seeing():
        x.exp()
        with torch_private.without_dispatch_modes():
            x.log()
        x.sin()
    assert seen == [torch.ops.aten.exp.default, torch.ops.aten.sin.default]


def test_a_memory_budget_holds_while_a_graph_is_compiled():
    seen = []

    def inner(graph, inputs):
        seen.append(torch._functorch.config.activation_memory_budget)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(torch.exp, backend=torch_private.compile_with_memory_budget(0.25, inner))(torch.ones(2))
    assert (seen, torch._functorch.config.activation_memory_budget) == ([0.25], 1.0)


def test_storages_are_told_apart_also_when_they_are_empty():
    tensor, other = torch.zeros(3), torch.zeros(3)
    found = torch_private.storage_id_of(tensor.untyped_storage())
    tensor.untyped_storage().resize_(0)
    assert torch_private.storage_id_of(tensor.detach().untyped_storage()) == found
    assert torch_private.storage_id_of(other.untyped_storage()) != found


def test_the_innermost_saved_tensor_hooks_are_found():
    assert torch_private.saved_tensor_hooks() is None

    def pack(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, pack):
        assert torch_private.saved_tensor_hooks() == (pack, pack)
    assert torch_private.saved_tensor_hooks() is None


def test_hooks_of_parameters_are_found():
    param = nn.Parameter(torch.zeros(2))
    assert not torch_private.backward_hooks_of(param)
    assert not torch_private.has_post_accumulate_hooks(param)

    def double(grad):
        return grad * 2

    param.register_hook(double)
    assert list(torch_private.backward_hooks_of(param).values()) == [double]
    param.register_post_accumulate_grad_hook(lambda param: None)
    assert torch_private.has_post_accumulate_hooks(param)


def test_a_wrapper_has_a_shape_and_no_memory():
    class Shape(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError

    wrapper = torch_private.make_wrapper(Shape, (1 << 40, 2), torch.bfloat16, torch.device("cpu"))
    assert (type(wrapper), tuple(wrapper.shape), wrapper.dtype) == (Shape, (1 << 40, 2), torch.bfloat16)
    assert torch_private.is_traceable_wrapper_subclass(wrapper) is False


def test_launches_for_many_tensors_change_each_in_place():
    ones, twos = [torch.ones(2), torch.ones(3)], [torch.full((2,), 2.0), torch.full((3,), 2.0)]
    torch_private.add_to_all(ones, 3.0)
    assert all(torch.equal(t, torch.full_like(t, 4.0)) for t in ones)
    torch_private.lerp_all(ones, twos, 0.5)
    assert all(torch.equal(t, torch.full_like(t, 3.0)) for t in ones)
    torch_private.copy_all(ones, twos)
    assert all(torch.equal(t, u) for t, u in zip(ones, twos, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_norms_of_many_tensors_are_those_of_each_on_a_cpu(dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in ((3,), (0,), (70000,), (33, 65), ())]
    tensors += [tensors[3].t(), torch.full((4,), torch.inf).to(dtype), torch.full((4,), torch.nan).to(dtype)]
    found = torch_private.norms_of_all(tensors, torch.float32)
    expected = [torch.linalg.vector_norm(tensor, 2, dtype=torch.float32) for tensor in tensors]
    assert torch.equal(torch.stack(found).view(torch.int32), torch.stack(expected).view(torch.int32))


def _counting(graph, inputs):
    _counting.calls += 1
    return graph.forward


_counting.calls = 0


def test_how_a_module_was_compiled_is_known_and_its_call_can_be_replaced():
    module = nn.Linear(2, 2)
    assert torch_private.compilation_of(module) is None
    for compiled in (torch.compile(module, backend=_counting, dynamic=False), module):
        if compiled is module:
            module.compile(backend=_counting, dynamic=False)
        compilation = torch_private.compilation_of(compiled)
        assert compilation.module is module
        assert compilation.dynamic is False
        torch._dynamo.reset()
        before = _counting.calls
        compilation.compiled(lambda x: x + 1)(torch.ones(2))
        assert _counting.calls == before + 1
        call = torch_private.set_compiled_call(compiled, lambda x: "replaced")
        assert compiled(torch.ones(2)) == "replaced"
        torch_private.set_compiled_call(compiled, call)
        assert compiled(torch.ones(2)).shape == (2,)


def test_operators_that_take_functions_are_known_by_name():
    assert (
        torch_private.name_of_higher_order(torch.ops.higher_order.autograd_function_apply) == "autograd_function_apply"
    )
    assert torch_private.name_of_higher_order(torch.add) == ""


def test_a_break_in_a_graph_raises_a_capture_error():
    def breaks(x):
        torch._dynamo.graph_break()
        return x

    with pytest.raises(torch_private.capture_errors()):
        torch.compile(breaks, backend="eager", fullgraph=True)(torch.ones(2))


def test_a_tracers_tensors_are_known_and_a_checkpoint_is_one_function_of_a_graph():
    seen, targets = [], []

    def square(x):
        seen.append(torch_private.is_of_tracer(x))
        return x * x

    def backend(graph, inputs):
        targets.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    assert not torch_private.is_of_tracer(torch.ones(2))
    torch._functorch.aot_autograd.aot_function(square, fw_compiler=lambda graph, inputs: graph)(torch.ones(2))
    assert seen
    assert all(seen)

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False)

    torch.compile(checkpointed, backend=backend)(torch.ones(2, requires_grad=True))
    assert torch_private.checkpointed_region() in targets


def test_a_tensor_of_a_class_shares_memory_and_is_no_view():
    class Marked(torch.Tensor):
        pass

    x = torch.ones(2)
    marked = torch_private.same_memory_as(x, Marked)
    assert type(marked) is Marked
    assert marked._base is None
    x.fill_(3.0)
    assert marked.tolist() == [3.0, 3.0]


def test_memory_is_claimed_that_is_not_there():
    like = torch.zeros(2, dtype=torch.bfloat16)
    claimed = torch_private.claimed_memory(like, (10**5, 10**4), (10**4, 1))
    assert (claimed.shape, claimed.stride(), claimed.dtype) == ((10**5, 10**4), (10**4, 1), torch.bfloat16)
    assert claimed.untyped_storage().nbytes() == 2 * 10**9
    assert claimed.is_contiguous()


def test_compiled_modules_are_known_and_seen_through():
    module = nn.Sequential(nn.Linear(2, 2))
    assert not torch_private.is_compiled(module)
    assert torch_private.behind_compile(module) is module
    wrapped = torch.compile(module)
    assert torch_private.is_compiled(wrapped)
    assert torch_private.behind_compile(wrapped) is module
    module[0].compile()
    assert torch_private.is_compiled(module)


def test_compiled_code_is_known_wherever_it_is():
    torch._dynamo.reset()
    assert not torch_private.has_compiled_code()
    try:
        torch.compile(lambda x: x + 1, backend="eager")
        assert torch_private.has_compiled_code()
    finally:
        torch._dynamo.reset()


class Watched(torch.Tensor):
    """Notes whether it was looked at by a compilation."""

    seen: typing.ClassVar[list[bool]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(torch_private.is_compiling())
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_compilation_is_known_from_its_first_look_at_an_argument():
    torch._dynamo.reset()
    x = torch.ones(2).as_subclass(Watched)
    Watched.seen.clear()
    assert not torch_private.is_compiling()
    try:
        torch.compile(lambda x: x + 1, backend="eager")(x)
    except Exception as error:  # whether such a tensor can be compiled is not what is asked here
        print(error)
    finally:
        torch._dynamo.reset()
    assert Watched.seen[0]
    assert not torch_private.is_compiling()


def test_a_backward_is_known_from_within():
    seen = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: seen.append(torch_private.is_in_backward()))
    assert not torch_private.is_in_backward()
    x.sum().backward()
    assert seen == [True]
    assert not torch_private.is_in_backward()


def test_what_runs_past_torch_functions_is_where_we_look():
    for module, name in torch_private.functions_past_torch_function():
        assert callable(vars(module)[name])
    for owner, _ in torch_private.scripts():
        assert callable(owner.__call__)


class Doubled(torch.autograd.Function):
    """Its context is set up apart, and an argument has a default."""

    @staticmethod
    def forward(x, times=2):
        return x * times

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.times = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.times, None


DOUBLED = Doubled.apply


def test_autograd_functions_are_guarded_by_every_name():
    guarded, checked = [], []

    def guard(apply):
        def through(cls, *args, **kwargs):
            guarded.append((cls, args))
            return apply(cls, *args, **kwargs)

        return through

    x = torch.ones(2, requires_grad=True)
    end = torch_private.guard_autograd_functions(guard, lambda cls, *args, **kwargs: checked.append((cls, args)))
    try:
        Doubled.apply(x).sum().backward()
        assert [cls for cls, _ in guarded] == [Doubled]
        assert checked == []
        DOUBLED(x, 3).sum().backward()
        assert [cls for cls, _ in guarded + checked] == [Doubled] * 2  # one of both sees a name that was bound before
    finally:
        end()
    assert torch.equal(x.grad, torch.full((2,), 5.0))
    Doubled.apply(x)
    DOUBLED(x)
    assert len(guarded + checked) == 2


def test_what_a_module_owns_is_found():
    module = nn.Linear(2, 2)
    module.again = module.weight
    module.register_buffer("kept", torch.zeros(1))
    module.register_buffer("transient", torch.zeros(1), persistent=False)
    assert [param is module.weight for param in torch_private.own_params_of(module)] == [True, False, True]
    assert set(torch_private.transient_buffers_of(module)) == {"transient"}


def test_what_loads_a_module_is_found():
    module = nn.Linear(2, 2)
    assert [loader.__module__ for loader in torch_private.loaders_of(module)] == ["torch.nn.modules.module"]

    def hook(module, *args):
        return None

    module.register_load_state_dict_pre_hook(hook)
    assert hook in torch_private.loaders_of(module)


def test_types_of_torch_distributed():
    assert issubclass(torch_private.AsyncCollectiveTensor, torch.Tensor)
    assert torch_private.sharded_tensor_type().__name__ == "ShardedTensor"
    assert torch_private.tree_leaves({"a": [1, (2,)], "b": 3}) == [1, 2, 3]
    assert torch_private.tree_map(lambda x: x + 1, {"a": [1, (2,)]}) == {"a": [2, (3,)]}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_what_checkpoints_run_again_can_be_wrapped(use_reentrant):
    calls, inputs_again = [], []

    def wrap(run, inputs):
        calls.append((run, inputs))
        return lambda *args: inputs_again.append(args) or run(*args)

    def exponential():
        x = torch.ones(2, requires_grad=True)
        torch.utils.checkpoint.checkpoint(torch.exp, x, use_reentrant=use_reentrant).sum().backward()
        return x

    end = torch_private.wrap_checkpointed_blocks(wrap)
    try:
        x = exponential()
    finally:
        end()
    assert calls == [(torch.exp, (x,))]
    assert len(inputs_again) == (2 if use_reentrant else 1)  # a reentrant one runs the same function at first
    exponential()
    assert len(calls) == 1
    torch.testing.assert_close(x.grad, x.exp().detach())


def test_fully_shard_keeps_its_state_where_we_look(tmp_path):
    from torch.distributed.fsdp import fully_shard

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        module = nn.Linear(2, 2)
        assert module not in torch_private.composable_states()
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        assert module in torch_private.composable_states()
    finally:
        torch.distributed.destroy_process_group()


def test_modules_tell_the_styles_of_a_plan_and_what_they_were_made_with(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        cut = parallelize_module(
            nn.Linear(2, 2), mesh, RowwiseParallel(output_layouts=Shard(1), use_local_output=False)
        )
        assert torch_private.parallel_styles_of(cut) == {"RowwiseParallel": [Shard(-1), Shard(-1), Shard(1), False]}
        same = {"input_layouts": Replicate(), "desired_input_layouts": Replicate()}
        prepared = parallelize_module(nn.Sequential(), mesh, PrepareModuleInput(**same))
        assert torch_private.parallel_styles_of(prepared) == {"PrepareModuleInput": []}
        assert torch_private.parallel_styles_of(distribute_module(nn.Linear(2, 2), mesh)) == {"distribute_module": []}
        assert torch_private.parallel_styles_of(nn.Linear(2, 2)) == {}
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_file_imports_private_names_of_torch(path):
    if path.name == "torch_private.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            assert not [name for name in names if name.startswith("_")], f"line {node.lineno}"
        if isinstance(node, ast.Attribute) and node.attr in ("_version", "_cdata", "_parameters"):
            raise AssertionError(f"line {node.lineno}: {node.attr} belongs in torch_private.py")


def test_what_was_compiled_tells_its_function():
    def function(x):
        return x

    assert torch_private.compiled_from(torch.compile(function)) is function
    assert torch_private.compiled_from(function) is None


def test_norms_are_added_up_in_the_order_of_clip_grad_norm():
    """Sums of many norms of two dtypes differ in their last bit where the order does."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        params = [nn.Parameter(torch.zeros(3, dtype=(torch.float64, torch.float32)[i % 2])) for i in range(12)]
        for param in params:
            param.grad = torch.rand(3, generator=generator).to(param.dtype)
        norms = torch.stack([torch.linalg.vector_norm(param.grad).double() for param in params])
        total = nn.utils.get_total_norm([param.grad for param in params])
        assert torch.equal(torch.linalg.vector_norm(norms[torch_private.order_of_norms(params)]), total)


def test_a_forward_that_is_left_out_knows_whether_what_it_calls_is_compiled():
    seen = []

    class Outer(torch.nn.Module):
        @torch.compiler.disable(recursive=False)
        def forward(self, x):
            seen.append(torch_private.compiles_calls())
            return x + 1

    outer = Outer()
    outer(torch.ones(2))
    torch.compile(outer, backend="eager")(torch.ones(2))
    outer(torch.ones(2))
    assert seen == [False, True, False]


def test_fake_tensors_have_shapes_storages_of_their_own_and_no_memory():
    with torch_private.FakeTensorMode():
        large = torch.empty(2**40)
        assert large.device.type == "cpu"
        assert large.untyped_storage().nbytes() == 4 * 2**40
        assert torch_private.storage_id_of(large.untyped_storage()) == torch_private.storage_id_of(
            large.view(2, -1).untyped_storage()
        )
        assert torch_private.storage_id_of(large.untyped_storage()) != torch_private.storage_id_of(
            (large + 1).untyped_storage()
        )


def test_a_modules_own_tensors_can_be_replaced():
    module = nn.BatchNorm1d(3)
    params, buffers = torch_private.tensors_of(module)
    params["weight"] = other = nn.Parameter(torch.zeros(3))
    assert module.weight is other
    assert buffers["running_mean"] is module.running_mean
