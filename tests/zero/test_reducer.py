"""The reducers: the only rank's by its deltas, that of several through the engine over real ranks.

Those are compared with one process that holds every rank's batch.
"""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from torch import nn

from lightning_superscale.comm import collectives
from lightning_superscale.comm.communicator import ranks_of
from lightning_superscale.comm.mesh import build_mesh
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.layout.mesh import MeshSpec
from lightning_superscale.ops.cpu import memory
from lightning_superscale.optim.clipping import ClipByNorm, ClipByValue
from lightning_superscale.zero.buckets.unit import BucketUnit
from lightning_superscale.zero.reducer import LocalReducer
from tests.helpers.engines import build_engine
from tests.helpers.extent import only_in_test_all
from tests.helpers.plain import PlainMasterAdamW
from tests.helpers.programs import PROGRAMS, Programs, extra_backward_of_a_part, plain_backward
from tests.helpers.ranks import run_ranks

ADAMW = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)}
STEPS = 4
# Whether rows are sharded, where states live, when gradients leave, and how often ranks talk.
WAYS = {
    "replicated": {"is_sharded": False, "is_offloaded": False, "is_streamed": True},
    "sharded": {"is_sharded": True, "is_offloaded": False, "is_streamed": True},
    "sharded-held": {"is_sharded": True, "is_offloaded": False, "is_streamed": False},
    "sharded-host": {"is_sharded": True, "is_offloaded": True, "is_streamed": True},
    "sharded-deferred": {"is_sharded": True, "is_offloaded": True, "is_streamed": True, "is_deferred": True},
    "sharded-host-every-batch": {"is_sharded": True, "is_offloaded": True, "is_streamed": True, "no_sync": False},
}
ONE_GRADIENT_PER_PARAMETER = PROGRAMS[:2] + PROGRAMS[4:5] + PROGRAMS[6:7]
CLIPS = {"none": None, "norm": ClipByNorm(0.05), "value": ClipByValue(0.01)}


def batch(step: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(8 if rank != 1 else 6, 12, generator=generator).to(dtype)  # batches of different size


def run_program(program, model, step: int, rank: int, dtype: torch.dtype) -> None:
    x = batch(step, rank, dtype)
    program(model, x)
    if program is extra_backward_of_a_part and rank == 0:
        plain_backward(model, x)  # one more backward on one rank only


def oracle(program, dtype: torch.dtype, world_size: int, clip, micro_batches: int):
    """Plain PyTorch in one process: every rank's gradients, scaled, summed in rank order."""
    model = Programs(dtype)
    params = list(model.parameters())
    optimizer = PlainMasterAdamW(
        params,
        max_norm=clip.max_norm if isinstance(clip, ClipByNorm) else None,
        clip_value=clip.clip_value if isinstance(clip, ClipByValue) else None,
        **ADAMW,
    )
    norms = []
    for step in range(STEPS):
        totals: list[torch.Tensor | None] = [None] * len(params)
        for rank in range(world_size):
            optimizer.zero_grad()
            for micro in range(micro_batches):
                run_program(program, model, step * micro_batches + micro, rank, dtype)
            for i, param in enumerate(params):
                if param.grad is not None:
                    share = (param.grad * (1.0 / world_size)).float()
                    totals[i] = share if totals[i] is None else totals[i] + share
        for param, total in zip(params, totals, strict=True):
            param.grad = None if total is None else total.to(dtype)
        grads = [p.grad.double().flatten() for p in params if p.grad is not None]
        norms.append(float(torch.cat(grads).norm()))
        optimizer.step()
    return [p.detach() for p in params], [optimizer.state(i) for i in range(len(params))], norms


def train(rank, world_size, program, dtype, way, clip, micro_batches, shard_size=None, *, measured=None):
    """The same on one of several ranks; returns weights, whole optimizer states and norms.

    Args:
        measured: gets the gradient norms of a step that is rehearsed before the first one; None rehearses none.
    """
    way = dict(way)
    sharded = way.pop("is_sharded")
    shard = (shard_size or world_size) if sharded else 1
    mesh = build_mesh(MeshSpec(replicate=world_size // shard, shard=shard), timedelta(seconds=30))
    model = Programs(dtype)
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, **ADAMW)
    engine = build_engine(model, optimizer, ranks=ranks_of(mesh, params), **way)
    norms = []
    if measured is not None:
        with engine.transport.rehearsal():
            run_program(program, model, STEPS, rank, dtype)
            measured.update(engine.measure_gradients())
        assert not engine.transport.observed
    for step in range(STEPS):
        engine.transport.wait_all_published()
        optimizer.zero_grad()
        for micro in range(micro_batches):
            if micro < micro_batches - 1:
                with engine.transport.blocked():
                    run_program(program, model, step * micro_batches + micro, rank, dtype)
            else:
                run_program(program, model, step * micro_batches + micro, rank, dtype)
        if clip is not None:
            engine.request_clip(clip)
        engine.step()
        norms.append(float(engine.grad_norm()))
    engine.transport.wait_all_published()
    state = engine.state_dict()["state"]
    engine.close()
    return [p.detach() for p in params], state, norms


def check(program, dtype, world_size, way, clip_name, micro_batches, shard_size=None):
    clip = CLIPS[clip_name]
    weights, states, norms = oracle(program, dtype, world_size, clip, micro_batches)
    return (weights, states, norms), (program, dtype, WAYS[way], clip, micro_batches, shard_size)


def _run_cases(rank, world_size, cases):
    return [train(rank, world_size, *case) for case in cases]


def assert_near(mine, theirs, start, name, dtype=None) -> None:
    """Equal up to the order of summation.

    Adding k terms in another order changes a gradient by at most k units of roundoff of their magnitudes, k < 8
    here; AdamW's normalised update carries a relative error of the gradient over to the weight's change.
    """
    unit = torch.finfo(dtype or mine.dtype).eps
    change = float((theirs.double() - start.double()).norm())
    assert float((mine.double() - theirs.double()).norm()) <= 16 * unit * max(change, 1e-12), name


def assert_matches(expected, per_rank, *, exact: bool, name: str) -> None:
    weights, states, norms = expected
    start = [p.detach() for p in Programs(weights[0].dtype).parameters()]
    for rank, (ours, _, our_norms) in enumerate(per_rank):
        for i, (mine, theirs) in enumerate(zip(ours, weights, strict=True)):
            if exact:
                assert torch.equal(mine, theirs), f"{name}: weight {i} on rank {rank}"
            else:
                assert_near(mine, theirs, start[i], f"{name}: weight {i} on rank {rank}")
            assert torch.equal(mine, per_rank[0][0][i]), f"{name}: ranks hold different weights {i}"
        assert our_norms == pytest.approx(norms, rel=1e-5 if mine.dtype == torch.float32 else 2**-7)
    saved = per_rank[0][1]
    for i, state in enumerate(states):
        for key, value in state.items():
            if exact:
                assert torch.equal(saved[i][key], value), f"{name}: {key} of parameter {i}"
            elif key != "step":
                assert_near(saved[i][key], value, torch.zeros(()), f"{name}: {key} of parameter {i}", mine.dtype)


def _run_cases_in_recycled_memory(rank, world_size, cases):
    """The same with every temporary buffer recycled, and spoiled as soon as nobody views it."""
    memory._RECYCLED_FROM_BYTES = 1
    collectives._OWN_MESSAGE_NUMEL = 20  # some of the rows travel by themselves, some together
    put_back, num_spoiled = memory.RecycledMemory._put_back, 0

    def spoil(self, block):
        nonlocal num_spoiled
        num_spoiled += 1
        block.tensor(torch.uint8, block.nbytes).fill_(0xFF)  # NaN in every floating dtype
        put_back(self, block)

    memory.RecycledMemory._put_back = spoil
    try:
        results = _run_cases(rank, world_size, cases)
        assert num_spoiled > len(cases) * STEPS
        return results
    finally:
        memory.RecycledMemory._put_back = put_back


def run_matrix(world_size: int, cases, run=_run_cases, *, shard_size: int | None = None) -> None:
    expectations, arguments, names = [], [], []
    for case in cases:
        expected, args = check(case[0], case[1], world_size, *case[2:], shard_size)
        expectations.append(expected)
        arguments.append(args)
        names.append(f"{world_size} ranks, {case[0].__name__}, " + ", ".join(map(str, case[1:])))
    results = run_ranks(world_size, run, arguments)
    for k, (expected, case, name) in enumerate(zip(expectations, cases, names, strict=True)):
        # Clipping by norm: plain torch sums its norm in fp32 and in another order than shards do. A unit that was
        # on its way when a second gradient of it came is summed over ranks first, in one process over backwards first.
        is_late = WAYS[case[2]]["is_streamed"] and case[0] not in ONE_GRADIENT_PER_PARAMETER
        in_rank_order = shard_size is None and WAYS[case[2]]["is_sharded"]
        exact = case[3] != "norm" and not is_late and (world_size == 2 or in_rank_order)
        assert_matches(expected, [r[k] for r in results], exact=exact, name=name)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_program_in_every_way_equals_one_process(world_size):
    cases = []
    for k, program in enumerate(PROGRAMS):
        for j, way in enumerate(WAYS):
            if world_size > 2 and way == "replicated":
                continue  # gloo's all-reduce sums in an order of its own
            dtype = (torch.float32, torch.bfloat16)[(k + j) % 2]
            if way == "replicated":
                dtype = torch.float32
            clip = ("none", "value", "norm")[(k + j) % 3]
            cases.append((program, dtype, way, clip, 1))
    run_matrix(world_size, cases)


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=only_in_test_all)])
def test_recycled_memory_is_never_handed_out_while_somebody_needs_it(world_size):
    ways = [way for way in WAYS if way != "replicated"]
    cases = []
    for k, program in enumerate(PROGRAMS):
        for j, way in enumerate(ways):
            cases.append((program, (torch.float32, torch.bfloat16)[(k + j) % 2], way, ("none", "norm")[k % 2], 1))
    cases += [(plain_backward, torch.float32, way, "none", 3) for way in ways if "every" not in way]
    run_matrix(world_size, cases, _run_cases_in_recycled_memory)


def test_accumulation_equals_one_process():
    run_matrix(2, [(plain_backward, torch.float32, way, "none", 3) for way in WAYS if "every" not in way])


def test_replicas_of_shards_equal_one_process():
    """HSDP: two replicas of two shards each."""
    sharded = [way for way in WAYS if WAYS[way]["is_sharded"]]
    cases = [
        (program, torch.float32, sharded[k % len(sharded)], ("none", "norm")[k % 2], 1)
        for k, program in enumerate(PROGRAMS)
    ]
    run_matrix(4, cases, shard_size=2)


def _run_with_and_without_rehearsal(rank, world_size, cases):
    found = []
    for case in cases:
        measured: dict[str, float] = {}
        found.append((train(rank, world_size, *case), train(rank, world_size, *case, measured=measured), measured))
    return found


def test_a_rehearsed_step_measures_averages_and_leaves_no_trace():
    ways = ["replicated", "sharded", "sharded-held", "sharded-deferred"]
    cases = [
        (program, torch.float32, WAYS[ways[k % len(ways)]], CLIPS[("none", "norm")[k % 2]], 1)
        for k, program in enumerate(PROGRAMS)
    ]
    per_rank = run_ranks(2, _run_with_and_without_rehearsal, cases)
    for k, (program, *_) in enumerate(cases):
        name, model, total = f"{program.__name__}, {ways[k % len(ways)]}", Programs(torch.float32), {}
        for rank in range(2):
            model.zero_grad()
            run_program(program, model, STEPS, rank, torch.float32)
            for fqn, param in model.named_parameters():
                if param.grad is not None:
                    total[fqn] = total.get(fqn, 0) + param.grad.double() / 2
        for found in per_rank:
            (weights, states, norms), (rehearsed_weights, rehearsed_states, rehearsed_norms), measured = found[k]
            expected = {fqn: float(grad.norm()) for fqn, grad in total.items() if grad.any()}
            # Sums of two fp32 gradients, which round by 2^-24 of each element.
            assert measured == pytest.approx(expected, rel=1e-5), name
            assert rehearsed_norms == norms, name
            for mine, theirs in zip(rehearsed_weights, weights, strict=True):
                assert torch.equal(mine, theirs), name
            for i, state in states.items():
                assert all(torch.equal(rehearsed_states[i][key], value) for key, value in state.items()), name


class _Deltas:
    """A local reducer's sink and two units of two parameters each."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, list[tuple[int, float]]]] = []
        self.reducer = LocalReducer(self)
        for index in range(2):
            named = [(f"{index}.{i}", nn.Parameter(torch.zeros(2))) for i in range(2)]
            self.reducer.add_unit(BucketUnit(index, named, 0, 1, memory.RecycledMemory()))

    def __call__(self, delta) -> None:
        self.seen.append((delta.unit.index, [(i, float(grad.sum())) for i, grad in delta.slices]))

    def put(self, index: int, i: int, value: float, *, in_backward: bool = True) -> None:
        self.reducer.put(self.reducer.units[index], i, torch.tensor([value, 0.0]))
        if in_backward:
            self.reducer.launch_complete()

    def take(self) -> list[tuple[int, list[tuple[int, float]]]]:
        seen, self.seen = self.seen, []
        return seen


def test_alone_a_unit_leaves_when_it_is_complete_and_late_gradients_by_themselves():
    deltas = _Deltas()
    deltas.put(1, 1, 1.0)
    deltas.put(1, 1, 2.0)
    assert deltas.take() == []
    deltas.put(1, 0, 4.0)
    assert deltas.take() == [(1, [(0, 4.0), (1, 3.0)])]
    deltas.put(1, 0, 8.0)
    assert deltas.take() == [(1, [(0, 8.0)])]
    deltas.put(0, 1, 16.0)
    assert deltas.reducer.finish(None) == {0, 1}
    assert deltas.take() == [(0, [(1, 16.0)])]


def test_alone_an_unused_parameter_holds_its_unit_back_only_once():
    deltas = _Deltas()
    deltas.put(0, 0, 1.0)
    deltas.put(0, 1, 2.0, in_backward=False)  # of a micro-batch before: it is no sign that the next backward has it
    deltas.reducer.finish(None)
    assert deltas.take() == [(0, [(0, 1.0)]), (0, [(1, 2.0)])]
    deltas.put(0, 0, 1.0)
    assert deltas.take() == [(0, [(0, 1.0)])]


def test_alone_a_rehearsal_says_nothing_of_the_next_backward():
    deltas = _Deltas()
    with deltas.reducer.rehearsal():
        deltas.put(0, 0, 1.0)
        deltas.reducer.finish(None)
    deltas.reducer.discard()
    assert deltas.take() == [(0, [(0, 1.0)])]
    deltas.put(0, 0, 1.0)
    assert deltas.take() == []


def test_alone_an_error_or_an_interruption_delivers_nothing():
    deltas = _Deltas()
    deltas.put(0, 0, 1.0)
    deltas.put(1, 0, 1.0, in_backward=False)
    with pytest.raises(SuperScaleError, match="no good"):
        deltas.reducer.finish(SuperScaleError("no good"))
    deltas.reducer.discard()
    assert deltas.reducer.finish(None) == set()
    assert deltas.take() == []


def test_alone_another_sink_takes_what_the_step_delivers():
    deltas, others = _Deltas(), []
    deltas.put(0, 0, 1.0, in_backward=False)
    deltas.reducer.finish(None, sink=others.append)
    assert deltas.take() == []
    assert [delta.unit.index for delta in others] == [0]
