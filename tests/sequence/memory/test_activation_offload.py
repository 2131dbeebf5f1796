"""Inputs of blocks in host memory: bits as without, every byte counted, copies under way in time, and nothing leaks."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.offload.link.link import CpuLink, link_for
from lightning_superscale.ops.events import FutureEvent
from lightning_superscale.sequence.memory.activation_offload import ActivationOffload
from lightning_superscale.sequence.memory.checkpointing import BlockCheckpoints, RecomputePolicy
from lightning_superscale.sequence.memory.saved_bytes import SavedBytes

CPU = torch.device("cpu")
B, S, H, NUM = 2, 8, 16, 5
INPUT_BYTES = B * S * H * 4
TIMEOUT_S = 20.0
POLICIES = {"inputs": RecomputePolicy(save="nothing"), "products": RecomputePolicy(save="products")}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(H), nn.Linear(H, 4 * H), nn.Linear(4 * H, H)
        self.watch = lambda: None

    def forward(self, x, scale, *, other=None):
        self.watch()
        h = torch.nn.functional.dropout(self.down(torch.nn.functional.gelu(self.up(self.norm(x)))), 0.2) * scale
        return x + h if other is None else x + h + other.sin()


class Model(nn.Module):
    def __init__(self, dtype=torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(3, H)
        self.blocks = nn.ModuleList(Block() for _ in range(NUM))
        self.to(dtype)

    def forward(self, x, *, with_other=False):
        h = first = self.embed(x)
        scale = torch.full((1,), 0.5, dtype=x.dtype)
        for block in self.blocks:
            h = block(h, scale, other=first * 1 if with_other else None)
        return h


def offloaded(model, link=None, policy=POLICIES["inputs"], **options):
    offload = ActivationOffload(link or link_for(CPU), CPU, **options)
    blocks = {f"blocks.{i}": block for i, block in enumerate(model.blocks)}
    return offload, BlockCheckpoints(blocks, policy, offload)


def batch(seed=0, dtype=torch.float32):
    return torch.randn(B, S, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)


def grads(model):
    return [p.grad.clone() for p in model.parameters()]


def equal(a, b):
    return all(map(torch.equal, a, b))


# Programs of backward, on a model that is offloaded and on one that is not.


def one_batch(model, dtype):
    model(batch(0, dtype)).square().mean().backward()


def accumulated(model, dtype):
    for seed in range(3):
        model(batch(seed, dtype)).square().mean().backward()


def two_forwards_then_backward(model, dtype):
    (model(batch(0, dtype)).square().mean() + model(batch(1, dtype)).square().mean()).backward()


def backwards_in_the_order_of_forwards(model, dtype):
    losses = [model(batch(seed, dtype)).square().mean() for seed in range(2)]
    for loss in losses:
        loss.backward()


def two_backwards(model, dtype):
    loss = model(batch(0, dtype)).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()


def several_inputs(model, dtype):
    model(batch(0, dtype), with_other=True).square().mean().backward()


def an_evaluation_between(model, dtype):
    loss = model(batch(0, dtype)).square().mean()
    with torch.no_grad():
        model(batch(1, dtype))
    loss.backward()


def part_of_the_graph(model, dtype):
    h = model.embed(batch(0, dtype))
    for block in model.blocks:
        h = block(h, torch.ones(1, dtype=dtype))
        if block is model.blocks[2]:
            h = h.detach()
    h.square().mean().backward()
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad


def inputs_in_another_order_of_memory(model, dtype):
    h = model.embed(batch(0, dtype)).mT.contiguous().mT
    for block in model.blocks:
        h = block(h, torch.ones(1, dtype=dtype)).mT.contiguous().mT
    h.square().mean().backward()


PROGRAMS = [
    one_batch,
    accumulated,
    two_forwards_then_backward,
    backwards_in_the_order_of_forwards,
    two_backwards,
    several_inputs,
    an_evaluation_between,
    part_of_the_graph,
    inputs_in_another_order_of_memory,
]


@pytest.mark.parametrize("num_in_flight", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_bits_are_those_of_a_run_without(program, dtype, num_in_flight):
    model, plain = Model(dtype), Model(dtype)
    offload, checkpoints = offloaded(model, num_in_flight=num_in_flight)
    for m in (model, plain):
        torch.manual_seed(1)
        program(m, dtype)
    assert equal(grads(model), grads(plain))
    assert offload.lent_bytes == 0
    checkpoints.close()
    offload.close()
    assert offload.report().host_bytes == 0


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_every_byte_is_counted_and_none_stays_on_the_device(policy):
    model, link = Model(), CpuLink()
    offload, checkpoints = offloaded(model, link, policy)
    with SavedBytes([*model.parameters()]) as saved:
        loss = model(batch()).square().mean()
    # The embedding's input, a scale for all blocks, and the last block's output.
    assert saved.nbytes == B * S * 3 * 4 + 4 + INPUT_BYTES
    assert link.bytes.d2h == offload.lent_bytes == NUM * INPUT_BYTES
    assert link.bytes.h2d == 0
    loss.backward()
    report = offload.report()
    assert (report.bytes_out, report.bytes_in) == (link.bytes.d2h, link.bytes.h2d) == (NUM * INPUT_BYTES,) * 2
    assert (report.num_blocks_in, report.num_not_ahead) == (NUM, 1), "all but the last block's were under way"
    assert report.host_bytes == NUM * INPUT_BYTES
    model(batch(1)).square().mean().backward()
    assert offload.report().host_bytes == NUM * INPUT_BYTES, "buffers are used again"
    checkpoints.close()


@pytest.mark.parametrize("is_offloaded", [True, False])
def test_the_devices_memory_of_an_input_is_free_once_the_next_block_has_run(is_offloaded):
    model, inputs = Model(), []
    blocks = {str(i): block for i, block in enumerate(model.blocks)}
    store = ActivationOffload(CpuLink(), CPU) if is_offloaded else None
    checkpoints = BlockCheckpoints(blocks, POLICIES["inputs"], store)
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _module, args: inputs.append(weakref.ref(args[0].untyped_storage())))
    gc.disable()
    try:
        loss = model(batch()).square().mean()
        assert [storage() is None for storage in inputs] == [is_offloaded] * NUM
    finally:
        gc.enable()
    loss.backward()
    checkpoints.close()


def test_a_second_backward_copies_anew():
    model, link = Model(), CpuLink()
    offload, checkpoints = offloaded(model, link)
    two_backwards(model, torch.float32)
    assert (link.bytes.d2h, link.bytes.h2d) == (NUM * INPUT_BYTES, 2 * NUM * INPUT_BYTES)
    assert offload.lent_bytes == 0
    checkpoints.close()


def test_a_graph_that_is_kept_is_not_copied_back_for_another():
    model, link = Model(), CpuLink()
    _, checkpoints = offloaded(model, link)
    first = model(batch(0)).square().mean()
    first.backward(retain_graph=True)
    before = link.bytes.h2d
    model(batch(1)).square().mean().backward()
    assert link.bytes.h2d - before == NUM * INPUT_BYTES
    first.backward()
    assert link.bytes.h2d - before == 2 * NUM * INPUT_BYTES
    checkpoints.close()


def test_inputs_come_back_with_their_strides():
    seen = []

    class Noting(nn.Module):
        def forward(self, x):
            seen.append((x.stride(), x.data_ptr()))
            return x.exp().square()

    block = Noting()
    checkpoints = BlockCheckpoints({"block": block}, POLICIES["inputs"], ActivationOffload(CpuLink(), CPU))
    for x in (torch.randn(4, 6).T, torch.randn(4, 6, 2)[..., 0], torch.randn(4, 1).expand(4, 3).contiguous()):
        block(x.requires_grad_()).sum().backward()
        forward, recompute = seen
        assert forward[0] == recompute[0] == x.stride()
        assert forward[1] != recompute[1], "the recompute has the copy"
        seen.clear()
    checkpoints.close()


def test_an_evaluation_keeps_nothing():
    model, link = Model(), CpuLink()
    _, checkpoints = offloaded(model, link)
    with torch.no_grad():
        model(batch())
    with torch.inference_mode():
        model(batch())
    assert (link.bytes.d2h, link.bytes.h2d) == (0, 0)
    checkpoints.close()


class Stop(Exception):
    pass


def stop():
    raise Stop


def test_an_exception_in_a_forward_leaks_nothing_and_training_goes_on():
    model, plain = Model(), Model()
    offload, checkpoints = offloaded(model)
    model.blocks[3].watch = stop
    for _ in range(2):
        with pytest.raises(Stop):
            model(batch())
        assert offload.lent_bytes == 0
    model.blocks[3].watch = lambda: None
    for m in (model, plain):
        torch.manual_seed(1)
        one_batch(m, torch.float32)
    assert equal(grads(model), grads(plain))
    checkpoints.close()


def test_an_exception_in_a_backward_leaks_nothing():
    model = Model()
    offload, checkpoints = offloaded(model)
    loss = model(batch()).square().mean()
    model.blocks[2].watch = stop
    with pytest.raises(Stop):
        loss.backward()
    assert offload.lent_bytes > 0, "the graph is still there"
    del loss
    assert offload.lent_bytes == 0
    checkpoints.close()


def test_a_graph_that_is_dropped_gives_its_memory_back_without_a_collection():
    model = Model()
    offload, checkpoints = offloaded(model)
    gc.disable()
    try:
        loss = model(batch()).square().mean()
        assert offload.lent_bytes == NUM * INPUT_BYTES
        del loss
        assert offload.lent_bytes == 0
    finally:
        gc.enable()
    checkpoints.close()


class GatedLink(CpuLink):
    """Copies on threads, of which each may be held until it is told to go on, and says which were started."""

    def __init__(self, hold=()) -> None:
        super().__init__()
        self.threads = {"d2h": ThreadPoolExecutor(1), "h2d": ThreadPoolExecutor(1)}
        self.gates = {key: threading.Event() for key in hold}
        self.started: list[tuple[str, int]] = []
        self.outcomes: list[bool] = []
        self.changed = threading.Condition()

    def _submit(self, way, dst, src):
        with self.changed:
            key = way, sum(w == way for w, _ in self.started)
            self.started.append(key)
            self.changed.notify_all()
        return FutureEvent(self.threads[way].submit(self._copy_when_told, key, dst, src))

    def _copy_when_told(self, key, dst, src):
        if key in self.gates:
            self.outcomes.append(self.gates[key].wait(TIMEOUT_S))
        with torch.no_grad():
            dst.copy_(src)

    def d2h(self, dst, src):
        return self._submit("d2h", dst, src)

    def h2d(self, dst, src, after=None):
        return self._submit("h2d", dst, src)

    def wait_started(self, key, timeout=TIMEOUT_S) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: key in self.started, timeout)

    def close(self):
        for threads in self.threads.values():
            threads.shutdown()


def test_forward_goes_on_while_inputs_leave():
    """The copy of a block's input ends only once that block runs: if forward waited for it, nobody would go on."""
    model, plain = Model(), Model()
    link = GatedLink(hold=[("d2h", i) for i in range(NUM - 1)])
    _, checkpoints = offloaded(model, link, num_in_flight=1)
    for i in range(NUM - 1):
        # A block's inputs are saved before it runs, and the next block waits for them: one block is in flight.
        model.blocks[i].watch = link.gates["d2h", i].set
    for m in (model, plain):
        torch.manual_seed(1)
        loss = m(batch()).square().mean()
        for block in m.blocks:
            block.watch = lambda: None
        loss.backward()
    assert link.outcomes == [True] * (NUM - 1)
    assert equal(grads(model), grads(plain))
    checkpoints.close()
    link.close()


@pytest.mark.parametrize("num_in_flight", [1, 2])
def test_no_more_blocks_inputs_leave_at_a_time_than_may(num_in_flight):
    """A block past the limit runs only after the oldest copy, which is told to go on once that block waits."""
    model, link = Model(), GatedLink(hold=[("d2h", 0)])
    _, checkpoints = offloaded(model, link, num_in_flight=num_in_flight)
    ran = [threading.Event() for _ in range(NUM)]
    for block, event in zip(model.blocks, ran, strict=True):
        block.watch = event.set
    with ThreadPoolExecutor(1) as forward:
        future = forward.submit(model, batch())
        assert all(event.wait(TIMEOUT_S) for event in ran[:num_in_flight])
        assert not ran[num_in_flight].wait(0.1)
        link.gates["d2h", 0].set()
        future.result(TIMEOUT_S)
    assert all(event.is_set() for event in ran)
    checkpoints.close()
    link.close()


@pytest.mark.parametrize("num_in_flight", [1, 2, 3])
def test_the_next_blocks_inputs_come_while_a_block_is_recomputed(num_in_flight):
    model, plain, link = Model(), Model(), GatedLink()
    _, checkpoints = offloaded(model, link, num_in_flight=num_in_flight)
    torch.manual_seed(1)
    loss = model(batch()).square().mean()
    outcomes = []
    for i, block in enumerate(model.blocks):
        # A block waits in its recompute until copies of those before it are under way; the last block's is number 0.
        last = NUM - 1 - max(i - num_in_flight, 0)
        block.watch = lambda last=last: outcomes.append(
            (link.wait_started(("h2d", last)), ("h2d", last + 1) in link.started)
        )
    loss.backward()
    assert outcomes == [(True, False)] * NUM, "those of so many blocks ahead, and no more"
    torch.manual_seed(1)
    one_batch(plain, torch.float32)
    assert equal(grads(model), grads(plain))
    checkpoints.close()
    link.close()


@pytest.mark.parametrize("number", [0, -1, True, 1.5])
def test_a_number_of_blocks_in_flight_that_is_none_is_refused(number):
    with pytest.raises(SuperScaleError, match="num_in_flight is a number of blocks of at least 1"):
        ActivationOffload(CpuLink(), CPU, num_in_flight=number)


@pytest.mark.filterwarnings("ignore::UserWarning")  # that the store breaks the graph, which it may
@pytest.mark.parametrize("is_whole", [True, False], ids=["model", "blocks"])
def test_compiled_models_and_blocks_keep_their_inputs_on_the_host_too(is_whole):
    torch._dynamo.reset()
    model, plain, link = Model(), Model(), CpuLink()
    offload, checkpoints = offloaded(model, link)
    if not is_whole:
        for block in model.blocks:
            block.compile(backend="aot_eager")
    for run, m in ((torch.compile(model, backend="aot_eager") if is_whole else model, model), (plain, plain)):
        torch.manual_seed(1)
        run(batch()).square().mean().backward()
        assert all(p.grad is not None for p in m.parameters())
    assert equal(grads(model), grads(plain))
    assert link.bytes.d2h == link.bytes.h2d == NUM * INPUT_BYTES
    assert offload.lent_bytes == 0
    checkpoints.close()
