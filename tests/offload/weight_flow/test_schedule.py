"""Weights that flow: every program right, bit for bit, in bounded device memory, with copies under way in time."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.offload.link.link import CpuLink
from lightning_superscale.offload.weight_flow.schedule import BLOCKS_AHEAD, BlockParams, WeightFlow
from lightning_superscale.offload.weight_flow.weights import FlowingWeights
from lightning_superscale.ops.cpu.memory import RecycledMemory
from lightning_superscale.ops.events import Done
from lightning_superscale.optim.clipping import ClipByNorm
from lightning_superscale.zero.buckets.unit import BucketUnit
from lightning_superscale.zero.fsdp2.wrap import blocks_with_own_params
from tests.helpers.engines import build_engine
from tests.helpers.plain import PlainMasterAdamW, assert_equal_states
from tests.helpers.programs import PROGRAMS, Programs

ADAMW = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)}
WAYS = {
    "cpu, held": {},
    "cpu": {"is_streamed": True},
    "deferred, held": {"is_deferred": True},
    "deferred": {"is_streamed": True, "is_deferred": True},
}
TIMEOUT_S = 20.0


@pytest.fixture(params=WAYS, ids=str)
def way(request):
    return WAYS[request.param]


def flow_of(model: nn.Module, wrap: list[str] | None, **options) -> WeightFlow:
    return WeightFlow([BlockParams(*block) for block in blocks_with_own_params(model, wrap)], **options)


def flowing(model: nn.Module, wrap: list[str] | None = None, *, num_ahead: int = 2, **options):
    """An optimizer, its engine and the flow of the model's blocks."""
    flow = flow_of(model, wrap, num_ahead=num_ahead)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    return optimizer, build_engine(model, optimizer, is_offloaded=True, flow=flow, **options), flow


def enter(engine, flow) -> None:
    """As a training step begins: resident weights are awaited, flowing ones see to it themselves."""
    flow.enter()
    engine.transport.wait_published([unit for unit in engine.transport.units if not unit.is_streamed])


def close(engine, flow) -> None:
    flow.rest()
    engine.transport.wait_all_published()
    engine.close()
    flow.close()


PARTS = ["inp", "block", "branch", "out"]


def batches(num: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(8, 12, generator=generator).to(dtype) for _ in range(num)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_every_backward_program_equals_plain_adamw(way, program, dtype):
    plain, model = Programs(dtype), Programs(dtype)
    oracle = PlainMasterAdamW(plain.parameters(), max_norm=0.3, **ADAMW)
    optimizer, engine, flow = flowing(model, PARTS, **way)
    for x in batches(6, dtype):
        oracle.zero_grad()
        program(plain, x)
        oracle.step()
        enter(engine, flow)
        optimizer.zero_grad()
        program(model, x)
        flow.rest()
        engine.request_clip(ClipByNorm(0.3))
        engine.step()
    close(engine, flow)
    states = [oracle.optimizer.state.get(master, {}) for master in oracle.masters]
    assert_equal_states(list(model.parameters()), optimizer, list(plain.parameters()), states)
    masters = [optimizer.state.get(p, {}).get("master_param", p) for p in model.parameters()]
    for param, master, expected in zip(plain.parameters(), masters, oracle.masters, strict=True):
        assert param.grad is None or torch.equal(master, expected)


class Block(nn.Module):
    """A residual block that shows what is on the device while it runs, and may fail or wait."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width, bias=False)
        self.watch = lambda: None

    def forward(self, x):
        self.watch()
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


BLOCK_NUMEL = 16 + 16 + 16 * 16 + 16 + 16 * 16
BLOCK_FLAT_NUMEL = 3 * 64 + 2 * 256  # each slice starts at a multiple of 64 elements


class Stack(nn.Module):
    """Embedding, equal blocks, head: what a language model looks like."""

    def __init__(self, num: int = 6, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp = nn.Linear(12, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(num))
        self.out = nn.Linear(16, 4)
        self.call = lambda block, h: block(h)
        self.to(dtype)

    def forward(self, x):
        h = self.inp(x)
        for block in self.blocks:
            h = self.call(block, h)
        return self.out(h)

    def loss(self, x):
        return self(x).float().pow(2).mean()


def device_bytes(engine) -> int:
    """Bytes of flowing weights that exist on the device, counted from storages."""
    return sum(unit.weights.untyped_storage().nbytes() for unit in engine.transport.units if unit.is_streamed)


def assert_trains_like_plain(model, plain, run, *, num: int = 4, dtype=torch.float32, **options):
    """Train both and compare; `run(model, x)` leaves gradients behind. Returns what was built, closed."""
    optimizer, engine, flow = flowing(model, **options)
    oracle = PlainMasterAdamW(plain.parameters(), **ADAMW)
    for x in batches(num, dtype):
        oracle.zero_grad()
        run(plain, x)
        oracle.step()
        enter(engine, flow)
        optimizer.zero_grad()
        run(model, x)
        flow.rest()
        assert device_bytes(engine) == 0
        engine.step()
    close(engine, flow)
    states = [oracle.optimizer.state.get(master, {}) for master in oracle.masters]
    assert_equal_states(list(model.parameters()), optimizer, list(plain.parameters()), states)
    return optimizer, engine, flow


def before_backward(module, call):
    """Call something when backward reaches the module's output."""

    def hook(_module, _inputs, output):
        if output.requires_grad:
            output.register_hook(lambda _grad: call())

    return module.register_forward_hook(hook)


def train(model, x) -> None:
    model.loss(x).backward()


# Memory


@pytest.mark.parametrize("num_ahead", [0, 1, 2])
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["saved", "reentrant", "recomputed"])
def test_no_more_blocks_are_on_the_device_than_are_used_and_expected(num_ahead, checkpointing):
    model, plain, seen = Stack(), Stack(), []
    if checkpointing is not None:
        for some in (model, plain):
            some.call = lambda block, h: checkpoint(block, h, use_reentrant=checkpointing)
    optimizer, engine, flow = flowing(model, num_ahead=num_ahead, is_streamed=True, is_deferred=True)
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: seen.append(device_bytes(engine)))
        module.register_forward_hook(lambda *_: seen.append(device_bytes(engine)))
        before_backward(module, lambda: seen.append(device_bytes(engine)))
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda _: seen.append(device_bytes(engine)))
    for x in batches(3, torch.float32):
        enter(engine, flow)
        train(model, x)
        flow.rest()
        engine.step()
    block_bytes = BLOCK_FLAT_NUMEL * 4
    assert max(seen) == (1 + num_ahead) * block_bytes == flow.most_device_bytes
    assert device_bytes(engine) == 0
    close(engine, flow)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["saved", "reentrant", "recomputed"])
def test_each_weight_comes_once_for_forward_and_once_for_backward(way, checkpointing, dtype):
    """Gradients go out, nothing else comes in. What backward uses first is still there: as many blocks as may be, or
    the last one where checkpoints hide from forward that a backward follows."""
    model, link = Stack(dtype=dtype), CpuLink()
    if checkpointing is not None:
        model.call = lambda block, h: checkpoint(block, h, use_reentrant=checkpointing)
    optimizer, engine, flow = flowing(model, link=link, unit_bytes=2**20, **way)
    for step, x in enumerate(batches(4, dtype)):
        link.bytes.h2d = link.bytes.d2h = 0
        enter(engine, flow)
        optimizer.zero_grad()
        train(model, x)
        flow.rest()
        came_in_passes = link.bytes.h2d
        engine.step()
        engine.transport.wait_all_published()
        resident = [u for u in engine.transport.units if not u.is_streamed]
        gradients = sum(p.numel() for p in model.parameters()) * dtype.itemsize
        assert link.bytes.d2h == gradients
        assert link.bytes.h2d - came_in_passes == sum(u.shard.shard_numel for u in resident) * dtype.itemsize
        if step:  # the first step has seen no order yet
            num_kept = 1 if checkpointing else 1 + BLOCKS_AHEAD
            assert came_in_passes == (6 + 6 - num_kept) * BLOCK_FLAT_NUMEL * dtype.itemsize
    close(engine, flow)


class CountingLink(CpuLink):
    """Counts the copies of each block's weights that were started, and says when."""

    def __init__(self) -> None:
        super().__init__()
        self.changed = threading.Condition()
        self.starts: dict[int, int] = {}
        self.block_of_storage: dict[int, int] = {}

    def h2d(self, dst, src, after=None):
        with self.changed:
            block = self.block_of_storage.get(dst.untyped_storage()._cdata)
            self.starts[block] = self.starts.get(block, 0) + 1
            self.changed.notify_all()
        return super().h2d(dst, src, after)

    def wait_for(self, block: int, num: int, timeout: float) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: self.starts.get(block, 0) >= num, timeout)


@pytest.mark.parametrize("way", ["cpu", "deferred"])
@pytest.mark.parametrize(
    ("num_ahead", "timeout", "is_hidden"), [(2, TIMEOUT_S, True), (1, TIMEOUT_S, True), (0, 0.05, False)]
)
def test_the_next_block_is_under_way_while_one_runs(way, num_ahead, timeout, is_hidden):
    """A gate, not a clock: each block waits inside its forward, and before its backward, for the next one's copies."""
    model, link, came = Stack(), CountingLink(), []
    optimizer, engine, flow = flowing(model, num_ahead=num_ahead, link=link, unit_bytes=2**20, **WAYS[way])
    for unit in engine.transport.units:
        if unit.is_streamed:
            link.block_of_storage[unit.weights.untyped_storage()._cdata] = flow.block_of[unit.params[0]]
    xs = batches(3, torch.float32)
    for step, x in enumerate(xs):
        link.starts.clear()
        enter(engine, flow)
        train(model, x)
        flow.rest()
        engine.step()
        if step == 0:
            for i, block in enumerate(model.blocks):
                if i < 5:
                    block.watch = lambda i=i: came.append(link.wait_for(i + 1, 1, timeout))
                if 0 < i <= 6 - (1 + num_ahead):  # the blocks after these are still there from forward
                    before_backward(block, lambda i=i: came.append(link.wait_for(i - 1, 2, timeout)))
    assert came == [is_hidden] * 2 * (5 + 6 - (1 + num_ahead))
    close(engine, flow)


# Programs that leave a block by side doors


def recompute_in_segments(model, x):
    """Two blocks per checkpoint: the first one's weights leave while the second is recomputed."""
    h = model.inp(x)
    for i in range(0, 6, 3):
        h = checkpoint(
            lambda h, i=i: model.blocks[i + 2](model.blocks[i + 1](model.blocks[i](h))), h, use_reentrant=False
        )
    model.out(h).pow(2).mean().backward()


def recompute_inside_of_blocks(model, x):
    for block in model.blocks:
        block.forward = lambda h, b=block: h + checkpoint(b.down, b.up(b.norm(h)).tanh(), use_reentrant=False)
    train(model, x)
    for block in model.blocks:
        del block.forward


def keep_on_the_host(model, x):
    with save_on_cpu():
        train(model, x)


def side_door(model, x):
    """The loss reads what blocks keep to themselves, so that backward reaches no block through its output."""
    side, h = [], model.inp(x)
    for block in model.blocks:
        block.up.register_forward_hook(lambda _m, _i, out: side.append(out.square().sum()))
        h = block(h).detach()
    torch.stack(side).sum().backward()
    for block in model.blocks:
        block.up._forward_hooks.clear()


def retained_and_again(model, x):
    loss = model.loss(x)
    for _ in range(3):
        loss.backward(retain_graph=True)


def two_graphs_interleaved(model, x):
    first, second = model.loss(x[:4]), model.loss(x[4:])
    second.backward()
    first.backward()


def no_grad_in_between(model, x):
    with torch.no_grad():
        model(x)
    loss = model.loss(x)
    with torch.inference_mode():
        model(x)
    loss.backward()


def weights_read_elsewhere(model, x):
    penalty = sum(p.square().sum() for p in model.parameters())
    (model.loss(x) + penalty).backward()


def only_some_blocks(model, x):
    h = model.inp(x)
    for block in list(model.blocks)[:: 2 if x.sum() > 0 else 1]:
        h = block(h)
    model.out(h).pow(2).mean().backward()


DOORS = [
    recompute_in_segments,
    recompute_inside_of_blocks,
    keep_on_the_host,
    side_door,
    retained_and_again,
    two_graphs_interleaved,
    no_grad_in_between,
    weights_read_elsewhere,
    only_some_blocks,
]


class TorchLink(CpuLink):
    """Copies as a CUDA link does: with torch, which counts them as changes of what they write."""

    def h2d(self, dst, src, after=None):
        self.bytes.h2d += dst.nbytes
        dst.copy_(src)
        return Done(None)


@pytest.mark.parametrize("program", DOORS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("way", "link"), [("cpu, held", CpuLink), ("deferred", CpuLink), ("deferred", TorchLink)])
def test_programs_with_side_doors_equal_plain_adamw(way, link, program):
    assert_trains_like_plain(Stack(), Stack(), program, link=link(), **WAYS[way])


class OnlyDevice(TorchDispatchMode):
    """What a GPU does by itself: refuse to compute with a weight that is in host memory."""

    def __init__(self, flow: WeightFlow) -> None:
        super().__init__()
        self._weights = [weights for block in flow._blocks for weights in block.weights]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_bookkeeping = func is torch.ops.aten._has_compatible_shallow_copy_type.default  # of `param.data = ...`
        if not func.is_view and not is_bookkeeping:
            for t in tree_leaves((args, kwargs)):
                if isinstance(t, torch.Tensor):
                    self._check(func, t)
        return func(*args, **(kwargs or {}))

    def _check(self, func, t) -> None:
        for weights in self._weights:
            for i, piece in enumerate(weights.unit.shard.slices):
                on_host = weights.of(i)
                inside = on_host.data_ptr() <= t.data_ptr() < on_host.data_ptr() + on_host.nbytes
                assert not inside, f"{func} read {piece.fqn} in host memory"


@pytest.mark.parametrize(
    "program", [*PROGRAMS, *(p for p in DOORS if p is not weights_read_elsewhere)], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("num_ahead", [0, 2])
def test_nothing_is_computed_with_weights_in_host_memory(program, num_ahead):
    model = Programs() if program in PROGRAMS else Stack()
    wrap = PARTS if program in PROGRAMS else None
    optimizer, engine, flow = flowing(model, wrap, num_ahead=num_ahead, is_streamed=True, is_deferred=True)
    for x in batches(3, torch.float32):
        enter(engine, flow)
        optimizer.zero_grad()
        with OnlyDevice(flow):
            program(model, x)
        flow.rest()
        engine.step()
    close(engine, flow)


def test_reading_a_weight_where_no_block_runs_is_what_the_check_above_sees():
    model = Stack()
    optimizer, engine, flow = flowing(model)
    enter(engine, flow)
    with OnlyDevice(flow), pytest.raises(AssertionError, match=r"read blocks.0.norm.weight in host memory"):
        weights_read_elsewhere(model, batches(1, torch.float32)[0])
    close(engine, flow)


@pytest.mark.parametrize("num_ahead", [0, 2])
def test_a_block_in_a_block_leaves_the_outer_one_alone(num_ahead):
    model, plain = Stack(), Stack()
    optimizer, engine, flow = flowing(model, ["Block", *(f"blocks.{i}.up" for i in range(6))], num_ahead=num_ahead)
    expected = torch.optim.AdamW(plain.parameters(), **ADAMW)
    assert flow.num_blocks == 12
    for x in batches(3, torch.float32):
        expected.zero_grad()
        train(plain, x)
        expected.step()
        enter(engine, flow)
        optimizer.zero_grad()
        with OnlyDevice(flow):
            train(model, x)
        flow.rest()
        engine.step()
    close(engine, flow)
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_a_backward_of_a_backward_is_refused_by_name():
    model = Stack()
    optimizer, engine, flow = flowing(model)
    enter(engine, flow)
    x = batches(1, torch.float32)[0].requires_grad_()
    loss = model.loss(x)
    with pytest.raises(SuperScaleError, match=r"create_graph=True went through 'blocks.5'.*weights='stationary'"):
        torch.autograd.grad(loss, x, create_graph=True)
    close(engine, flow)


def test_hooks_around_a_block_still_see_what_it_saves():
    """A checkpoint around a block saves nothing of it, and activations go to the host where that was asked for."""
    packed = []

    def pack(t):
        packed.append(t)
        return t

    model = Stack()
    optimizer, engine, flow = flowing(model, is_streamed=True)
    enter(engine, flow)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model.loss(batches(1, torch.float32)[0])
    with_flow = len(packed)
    loss.backward()
    close(engine, flow)
    packed.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.loss(batches(1, torch.float32)[0])
    assert with_flow == len(packed) > 0
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def test_a_saved_tensor_that_changed_in_place_is_an_error_as_in_plain_pytorch():
    model = Stack()
    optimizer, engine, flow = flowing(model, is_streamed=True)
    enter(engine, flow)
    h = model.inp(batches(1, torch.float32)[0])
    inside = []
    handle = model.blocks[0].up.register_forward_hook(lambda _m, _i, out: inside.append(out))
    out = model.blocks[0](h)
    handle.remove()
    inside[0].detach().zero_()  # gelu saved it
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    close(engine, flow)


# Interruptions


@pytest.mark.parametrize("where", ["forward", "backward", "interrupt"])
@pytest.mark.parametrize("way", ["cpu", "deferred"])
def test_after_an_exception_the_next_step_is_right(way, where):
    model, plain = Stack(), Stack()
    optimizer, engine, flow = flowing(model, **WAYS[way])
    oracle = PlainMasterAdamW(plain.parameters(), **ADAMW)

    def fail(*_):
        raise KeyboardInterrupt if where == "interrupt" else ValueError("stop")

    for step, x in enumerate(batches(5, torch.float32)):
        enter(engine, flow)
        optimizer.zero_grad()
        if step in (1, 3):
            block = model.blocks[2]
            handle = before_backward(block.up, fail) if where == "backward" else None
            block.watch = fail if where != "backward" else block.watch
            with pytest.raises((ValueError, KeyboardInterrupt)):
                train(model, x)
            block.watch = lambda: None
            if handle is not None:
                handle.remove()
            flow.rest()
            engine.discard_gradients()
            assert device_bytes(engine) == 0
            assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
            continue
        oracle.zero_grad()
        train(plain, x)
        oracle.step()
        train(model, x)
        flow.rest()
        engine.step()
    close(engine, flow)
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


# What users see and change


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_between_steps_parameters_read_and_take_edits_as_always(way, dtype):
    model, plain = Stack(dtype=dtype), Stack(dtype=dtype)
    optimizer, engine, flow = flowing(model, **way)
    oracle = PlainMasterAdamW(plain.parameters(), **ADAMW)
    for x in batches(5, dtype):
        oracle.zero_grad()
        train(plain, x)
        oracle.step()
        enter(engine, flow)
        optimizer.zero_grad()
        train(model, x)
        flow.rest()
        engine.step()
        engine.transport.wait_all_published()
        flow.synchronize()
        assert all(map(torch.equal, model.state_dict().values(), plain.state_dict().values()))
        with torch.no_grad():
            model.blocks[1].up.weight.clamp_(-0.1, 0.1)
            plain.blocks[1].up.weight.clamp_(-0.1, 0.1)
            edited = plain.blocks[1].up.weight
            master = oracle.masters[[p is edited for p in oracle.params].index(True)]
            master.copy_(torch.where(master.to(dtype) == edited, master, edited.float()))
    close(engine, flow)
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def step_both(plain, expected, model, optimizer, engine, flow, x) -> None:
    """One step of the oracle, then one of the model whose weights flow."""
    expected.zero_grad()
    train(plain, x)
    expected.step()
    enter(engine, flow)
    optimizer.zero_grad()
    train(model, x)
    flow.rest()
    engine.step()


def test_an_edit_inside_of_a_forward_is_kept(way):
    """As spectral normalisation does: the module changes its own weight before it uses it."""
    model, plain = Stack(), Stack()
    for some in (model, plain):
        block = some.blocks[3]

        def shrink(block=block):
            with torch.no_grad():
                block.up.weight.mul_(0.9)

        block.watch = shrink
    optimizer, engine, flow = flowing(model, **way)
    expected = torch.optim.AdamW(plain.parameters(), **ADAMW)
    for x in batches(4, torch.float32):
        step_both(plain, expected, model, optimizer, engine, flow, x)
    close(engine, flow)
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_memory_that_a_parameter_is_given_is_taken_over():
    plain, model = Stack(), Stack()
    expected = torch.optim.AdamW(plain.parameters(), **ADAMW)
    optimizer, engine, flow = flowing(model)
    for i, x in enumerate(batches(6, torch.float32)):
        for stack in (plain, model):
            weight = stack.blocks[2].up.weight
            if i == 2:  # between steps
                weight.data = torch.full((16, 16), 0.01)
            # while the block runs
            halve = lambda weight=weight: setattr(weight, "data", weight.detach() * 0.5)  # noqa: E731
            stack.blocks[2].watch = halve if i == 4 else (lambda: None)
        step_both(plain, expected, model, optimizer, engine, flow, x)
    close(engine, flow)
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_memory_of_another_shape_is_refused_by_name():
    model = Stack()
    optimizer, engine, flow = flowing(model)
    model.blocks[2].up.weight.data = torch.zeros(16, 8)
    enter(engine, flow)
    with pytest.raises(SuperScaleError, match=r"'blocks.2.up.weight' was given other memory.*\(16, 8\)"):
        train(model, batches(1, torch.float32)[0])
    model.blocks[2].up.weight.data = torch.zeros(16, 16)
    flow.rest()
    engine.discard_gradients()
    close(engine, flow)


def test_a_deep_copy_is_a_model_of_its_own():
    model = Stack()
    optimizer, engine, flow = flowing(model)
    twin = copy.deepcopy(model)
    x = batches(1, torch.float32)[0]
    with torch.no_grad():
        twin(x)
    assert device_bytes(engine) == 0
    close(engine, flow)
    assert torch.equal(twin(x), model(x))


def test_parameters_that_are_unfrozen_later_flow_on(way):
    model, plain = Stack(), Stack()
    for some in (model, plain):
        some.blocks[0].requires_grad_(False)
    optimizer, engine, flow = flowing(model, **way)
    expected = torch.optim.AdamW(plain.parameters(), **ADAMW)
    for step, x in enumerate(batches(5, torch.float32)):
        if step == 2:
            for some in (model, plain):
                some.blocks[0].requires_grad_(True)
        step_both(plain, expected, model, optimizer, engine, flow, x)
    close(engine, flow)
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_tied_weights_and_what_no_block_owns_stay_on_the_device():
    model = Stack()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    owned = {fqn for _, _, params in blocks_with_own_params(model) for fqn in params}
    assert "blocks.0.up.weight" not in owned
    assert {"blocks.0.up.bias", "blocks.1.down.weight", "blocks.5.up.weight"} <= owned
    assert not any(fqn.startswith(("inp", "out")) for fqn in owned)
    plain = Stack()
    plain.blocks[1].up.weight = plain.blocks[0].up.weight
    assert_trains_like_plain(model, plain, train, is_streamed=True, is_deferred=True)


class LateLink(CpuLink):
    """Copies to the host happen when somebody waits for them on the host, and not before."""

    class Event:
        def __init__(self, dst, src) -> None:
            self.dst, self.src, self.is_over = dst, src.clone(), False

        def is_complete(self) -> bool:
            return self.is_over

        is_waitable = is_complete

        def wait(self) -> None:
            return

        def synchronize(self) -> None:
            if not self.is_over:
                self.dst.copy_(self.src)
            self.is_over = True

    def d2h(self, dst, src):
        super().d2h(dst.clone(), src)
        return self.Event(dst, src)


@pytest.fixture
def shared():
    """Weights of a unit that this rank shares with another one, and the unit."""
    layer = nn.Linear(6, 6)
    unit = BucketUnit(0, list(layer.named_parameters()), 1, 2, RecycledMemory(), streams_to=torch.device("cpu"))
    return FlowingWeights(unit, LateLink(), [torch.zeros(unit.full.shard_numel)]), unit


def fill(weights, unit, value: float, *, is_whole: bool = True) -> None:
    with weights.filling(is_whole=is_whole):
        for view in unit.views if is_whole else unit.views[:1]:
            view.fill_(value)


def test_gathered_weights_are_used_where_they_are_and_then_come_home(shared):
    weights, unit = shared
    fill(weights, unit, 2.0)
    weights.prefetch()
    weights.acquire()
    for param, view in zip(unit.params, unit.views, strict=True):
        assert (param == 2).all()
        assert param.data_ptr() == view.data_ptr()
    assert weights._link.bytes.h2d == 0
    weights.release()
    weights.synchronize()
    assert weights.device_bytes == 0
    assert all((param == 2).all() for param in unit.params)


@pytest.mark.parametrize("look", ["acquire", "settled", "synchronize", "fill again"])
def test_whoever_needs_the_host_copy_waits_until_it_has_landed(shared, look):
    weights, unit = shared
    fill(weights, unit, 2.0)
    weights.wait_new()
    assert weights.device_bytes == 0
    weights.prefetch()
    assert weights._link.bytes.h2d == 0  # the old weights are still there
    if look == "acquire":
        weights.acquire()
    elif look == "settled":
        assert (weights.rows_with_edits(0) == 2).all()
    elif look == "synchronize":
        weights.synchronize()
    else:
        fill(weights, unit, 3.0, is_whole=False)
        weights.acquire()
        assert (unit.params[0] == 3).all()
        assert (unit.params[1] == 2).all()
        return
    assert all((param == 2).all() for param in unit.params)


def test_this_ranks_rows_are_those_of_the_whole(shared):
    weights, unit = shared
    for i, param in enumerate(unit.params):
        own = unit.shard.slices[i]
        assert torch.equal(weights.of(i), param.detach().reshape(-1)[own.global_offset :][: own.numel])
        assert own.numel == param.numel() // 2


def test_a_gather_that_fails_leaves_the_weights_as_they_were(shared):
    weights, unit = shared
    before = [param.detach().clone() for param in unit.params]

    def broken(view):
        view.fill_(5.0)
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"), weights.filling(is_whole=True):
        broken(unit.views[0])
    assert weights.device_bytes == 0
    assert all(map(torch.equal, unit.params, before))
