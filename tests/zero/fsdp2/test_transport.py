"""ZeRO-3 over real ranks against one process: bits where the arithmetic is the same, whatever the program."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from lightning_superscale.comm.dtensor import local_rows_of
from lightning_superscale.comm.watch import RankWatch
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.layout.rows import shard_rows
from lightning_superscale.zero.fsdp2.shard import ShardingPolicy
from tests.helpers.extent import IS_ALL
from tests.helpers.fsdp import (
    ADAMW,
    Case,
    assert_equals_plain,
    batch,
    build,
    build_all,
    rank_averages,
    train_sharded,
)
from tests.helpers.fsdp_models import (
    Adapted,
    Block,
    Chooser,
    MixedTrainable,
    Stack,
    Tokens,
    Whole,
    loss_of,
    run_itself,
    run_net,
)
from tests.helpers.plain import PlainMasterAdamW
from tests.helpers.programs import (
    PROGRAMS,
    Programs,
    block_applied_three_times_reentrant_checkpoint,
    data_dependent_branch,
    extra_backward_of_a_part,
    plain_backward,
    two_batches_two_backwards,
    two_losses_retained_graph,
)
from tests.helpers.ranks import run_ranks

ROOT = ShardingPolicy(include_root=True)
# What comes after its unit was reduced is reduced apart and added: (a + b) / n against a / n + b / n.
SEVERAL_DELTAS = (
    two_batches_two_backwards,
    two_losses_retained_graph,
    block_applied_three_times_reentrant_checkpoint,
)


def frozen_first() -> nn.Module:
    model = Whole(Stack())
    model.net.first.requires_grad_(False)
    model.net.blocks[1].requires_grad_(False)
    return model


def compiled() -> nn.Module:
    model = Whole(Stack())
    for block in model.net.blocks:
        block.compile(backend="aot_eager")
    return model


def bf16(make):
    return lambda: make().to(torch.bfloat16)


def cases() -> dict[str, Case]:
    whole = lambda **how: lambda: Whole(Stack(**how))  # noqa: E731
    low = {"dtype": torch.bfloat16}
    found = {
        "stack": Case(whole(), run_net),
        "stack as root": Case(Stack, run_itself, policy=ROOT),
        "stack, kept after forward": Case(whole(), run_net, policy=ShardingPolicy(reshard_after_forward=False)),
        "stack, wrapped by name": Case(whole(), run_net, policy=ShardingPolicy(wrap={Block, "Linear"})),
        "stack on the host": Case(whole(), run_net, is_offloaded=True),
        "stack clipped": Case(whole(), run_net, max_norm=0.05),
        "bf16": Case(bf16(whole()), run_net, **low),
        "bf16 on the host": Case(bf16(whole()), run_net, is_offloaded=True, **low),
        "accumulated whole": Case(whole(), run_net, num_micro=3),
        "accumulated whole, bf16 on the host": Case(bf16(whole()), run_net, num_micro=2, is_offloaded=True, **low),
        "accumulated in shards": Case(whole(), run_net, num_micro=3, no_sync=False),
        "tied": Case(whole(is_tied=True), run_net),
        "tied, as root": Case(lambda: Stack(is_tied=True), run_itself, policy=ROOT),
        "tied embedding": Case(lambda: Whole(Tokens()), run_net),
        "tied embedding on the host": Case(lambda: Whole(Tokens()), run_net, is_offloaded=True),
        "frozen": Case(frozen_first, run_net),
        "frozen bf16 base, fp32 adapters": Case(lambda: nn.Sequential(Adapted(), Adapted()), run_itself, policy=ROOT),
        "two trainable dtypes": Case(MixedTrainable, run_itself, policy=ROOT),
        "checkpointed": Case(whole(use_reentrant=False), run_net),
        "checkpointed, reentrant": Case(whole(use_reentrant=True), run_net),
        "branches of one group, by rank": Case(lambda: Whole(Chooser()), run_net),
        "compiled blocks": Case(compiled, run_net, num_steps=2),
    }
    for program in PROGRAMS:
        if program not in (data_dependent_branch, extra_backward_of_a_part):
            found[program.__name__] = Case(Programs, program, is_one_delta=program not in SEVERAL_DELTAS)
    found["extra_backward_of_a_part"] = Case(Programs, extra_backward_of_a_part, is_one_delta=False)
    return found


def _all_cases(rank: int, world_size: int, way: dict[str, bool]) -> list[str]:
    failures = []
    for name, case in cases().items():
        case = replace(case, **way)
        if not case.no_sync and not case.is_streamed:
            continue  # held gradients are whole until the step anyway
        try:
            assert_equals_plain(case, rank, world_size)
        except Exception as error:
            import traceback

            failures.append(f"{name}: {error}\n{traceback.format_exc()}")
            if not isinstance(error, AssertionError):
                break  # the ranks are no longer together
    return failures


WAYS = {
    "streamed": {"is_streamed": True},
    "held": {"is_streamed": False},
    "averaged": {"is_streamed": False, "is_averaged": True},
}


WAYS_AT = [(3, "streamed"), (2, "held"), (2, "streamed"), (2, "averaged")]


@pytest.mark.parametrize(("world_size", "way"), WAYS_AT if IS_ALL else WAYS_AT[1:3])
def test_training_equals_one_process(world_size, way):
    """Bits at 2 and 3 ranks: gradients are scaled and summed in rank order, as the oracle does."""
    failures = run_ranks(world_size, _all_cases, WAYS[way], limit_s=240)
    assert not any(failures), "\n".join(f"rank {r}: {f}" for r, fs in enumerate(failures) for f in fs)


def _hybrid(rank: int, world_size: int) -> None:
    assert_equals_plain(Case(lambda: Whole(Stack()), run_net, is_one_delta=False), rank, world_size, shard_size=2)


def test_hybrid_sharding_equals_one_process():
    """Four ranks, two per copy: the oracle sums in another order."""
    run_ranks(4, _hybrid, limit_s=120)


def _branch(rank: int, world_size: int, folder: str, late: bool) -> str:
    store = dist.FileStore(os.path.join(folder, "order"), world_size)
    case = Case(Programs, plain_backward)
    model = Programs()
    engine, _ = build(model, rank, world_size, case, store=store)
    x = torch.ones(6, 12)
    if late:
        for _ in range(2):
            plain_backward(model, x)
            engine.step()
    try:
        data_dependent_branch(model, x if rank == 0 else -x)
        engine.step()
    except SuperScaleError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("late", [False, True], ids=["first step", "third step"])
def test_rank_dependent_branch_is_refused_on_every_rank(world_size, late):
    with tempfile.TemporaryDirectory() as folder:
        said = run_ranks(world_size, _branch, folder, late, limit_s=30)
    for message in said:
        assert "ranks went apart" in message
        assert "'branch'" in message
        assert "'block'" in message


def _extra_on_one_rank(rank: int, world_size: int, folder: str) -> str:
    store = dist.FileStore(os.path.join(folder, "order"), world_size)
    model = Programs()
    engine, _ = build(model, rank, world_size, Case(Programs, plain_backward), store=store)
    x = torch.ones(6, 12)
    for _ in range(2):
        plain_backward(model, x)
        engine.step()
    try:
        (extra_backward_of_a_part if rank == 0 else plain_backward)(model, x)
        engine.step()
    except SuperScaleError as error:
        return str(error)
    return "no error"


def test_extra_backward_on_one_rank_is_refused_on_every_rank():
    with tempfile.TemporaryDirectory() as folder:
        said = run_ranks(2, _extra_on_one_rank, folder, limit_s=30)
    assert all("ranks went apart" in message for message in said), said


def _same_new_order(rank: int, world_size: int, folder: str) -> str:
    """All ranks take a new way together, validate between steps, and come back."""
    store = dist.FileStore(os.path.join(folder, "order"), world_size)
    model = Programs()
    engine, _ = build(model, rank, world_size, Case(Programs, plain_backward), store=store)
    x = torch.ones(6, 12)
    for step in range(6):
        (data_dependent_branch if step in (2, 3) else plain_backward)(model, x)
        engine.step()
        with torch.no_grad():
            for _ in range(2):
                model.trunk(x)
    engine.close()
    return "done"


def test_ranks_may_change_their_way_together():
    with tempfile.TemporaryDirectory() as folder:
        assert run_ranks(2, _same_new_order, folder, limit_s=30) == ["done"] * 2


def _life(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    case = Case(lambda: Whole(Stack()), run_net, num_steps=2)
    model, sharded, _ = train_sharded(case, rank, world_size)
    # Closed: plain, whole, equal, loadable, callable without the others, and shardable again.
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(weights)
    if rank == 0:
        model.net(torch.ones(2, 12)).sum().backward()
    tables = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_load_state_dict_post_hooks")
    for module in model.modules():
        assert not any(vars(module).get(table) for table in tables)
        assert "FSDP" not in type(module).__name__
        assert not any("fsdp" in name or "composable" in name for name in vars(module))
    model.zero_grad()
    engine, sharded = build(model, rank, world_size, case)
    run_net(model, torch.ones(6, 12))
    engine.step()
    engine.close()
    assert not torch.equal(model.net.head.weight, weights["net.head.weight"])
    return weights


def test_module_is_plain_after_close_and_shards_again():
    first, second = run_ranks(2, _life, limit_s=60)
    assert all(torch.equal(first[name], second[name]) for name in first)


def _inference_first(rank: int, world_size: int) -> None:
    """Lightning validates before it trains, in inference mode."""
    case = Case(lambda: Whole(Stack()), run_net)
    model = case.make()
    engine, _ = build(model, rank, world_size, case)
    plain, oracle = case.make(), None
    oracle = PlainMasterAdamW(plain.parameters(), **ADAMW)
    for step in range(3):
        x = torch.full((2, 12), 0.5)
        with torch.inference_mode():
            assert torch.equal(model.net(x), plain.net(x))
        for param, grad in zip(plain.parameters(), rank_averages(case, plain, step, world_size), strict=True):
            param.grad = grad
        oracle.step()
        run_net(model, batch(case, step, 0, rank))
        engine.step()
    with torch.inference_mode():
        engine.close()
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
    model.net(torch.ones(2, 12)).sum().backward()


def test_inference_mode_before_and_between_steps():
    run_ranks(2, _inference_first, limit_s=60)


def _unlike_sizes_without_store(rank: int, world_size: int) -> str:
    model = Programs()
    engine, _ = build(model, rank, world_size, Case(Programs, plain_backward))
    x = torch.ones(6, 12)
    before = {n: w.clone() for n, w in Programs().named_parameters()}
    try:
        data_dependent_branch(model, x if rank == 0 else -x)
        engine.step()
    except SuperScaleError as error:
        with torch.no_grad():
            assert engine.transport.units[0].local_rows(0).sum() != 0
        assert not engine.optimizer.state, "nothing was stepped"
        assert before
        return str(error)
    return "no error"


def test_without_a_store_a_step_after_different_orders_is_refused():
    """'branch' and 'block' are of one size, so their gathers meet; the step's agreement compares the orders."""
    for message in run_ranks(2, _unlike_sizes_without_store, limit_s=30):
        assert "the order of modules" in message


def _edits(rank: int, world_size: int) -> None:
    """Weights that are edited or loaded whole reach shards, forward and 16-bit weights' masters."""
    case = Case(lambda: Whole(Stack()).to(torch.bfloat16), run_net, is_offloaded=True, dtype=torch.bfloat16)
    model = case.make()
    engine, sharded = build(model, rank, world_size, case)
    run_net(model, batch(case, 0, 0, rank))
    engine.step()
    before = sharded.state_dict(engine.ranks)
    assert (len(before) > 0) == (rank == 0)
    with sharded.summon(), torch.no_grad():
        weights = {name: value.clone() for name, value in model.named_parameters()}
        model.net.head.weight.zero_()  # not written back
    if rank == 0:
        assert all(torch.equal(before[name], weights[name]) for name in weights)
        assert torch.equal(before["net.shift"], model.net.shift)
    with sharded.summon(writeback=True), torch.no_grad():
        assert torch.equal(model.net.head.weight, weights["net.head.weight"])
        model.net.head.weight.add_(1.0)
    named = model.state_dict()
    before_load = local_rows_of(model.net.head.weight).clone()
    with pytest.raises(SuperScaleError, match=r"'net.tiny.weight' has shape \(3,\)"):
        sharded.load_whole(
            {"net.head.weight": torch.zeros(weights["net.head.weight"].shape), "net.tiny.weight": torch.zeros(3)}
        )
    wrong = {name: torch.zeros(3 if name == "net.tiny.weight" else value.shape) for name, value in named.items()}
    with pytest.raises(SuperScaleError, match=r"'net.tiny.weight' has shape \(3,\)"):
        sharded.load_state_dict(wrong, strict=True)
    assert torch.equal(local_rows_of(model.net.head.weight), before_load), "a weight before the wrong one was loaded"
    sharded.load_whole({"net.tiny.weight": weights["net.tiny.weight"] + 2.0, "scale": torch.tensor(3.0)})
    run_net(model, batch(case, 1, 0, rank))
    engine.step()
    engine.transport.wait_all_published()
    masters = {n: s["master_param"] for n, s in zip(weights, engine.state_dict()["state"].values(), strict=False)}
    engine.close()
    for name, shift in (("net.head.weight", 1.0), ("net.tiny.weight", 2.0), ("net.first.weight", 0.0)):
        # One AdamW step of lr 0.01, weight decay 0.1, and the rounding of bf16 weights below 4.
        assert (model.get_parameter(name) - weights[name] - shift).abs().max() < 0.05, name
        if rank == 0:
            assert torch.equal(masters[name].to(torch.bfloat16), model.get_parameter(name)), name


def test_edited_and_loaded_weights_are_followed():
    run_ranks(2, _edits, limit_s=60)


def _two_optimizers(rank: int, world_size: int) -> None:
    """Two optimizers, one group between them."""

    def split(model):
        params = dict(model.named_parameters())
        biases = [p for name, p in params.items() if name.endswith("bias")]
        others = [p for name, p in params.items() if not name.endswith("bias")]
        return torch.optim.AdamW(others, **ADAMW), torch.optim.SGD(biases, lr=0.1, momentum=0.9)

    case = Case(lambda: Whole(Stack()), run_net)
    model, plain = case.make(), case.make()
    engines, sharded = build_all(model, rank, world_size, case, split(model))
    expected = split(plain)
    for step in range(4):
        for param, grad in zip(plain.parameters(), rank_averages(case, plain, step, world_size), strict=True):
            param.grad = grad
        run_net(model, batch(case, step, 0, rank))
        for optimizer, engine in zip(expected, engines, strict=True):
            optimizer.step()
            engine.step()
    for engine in engines:
        engine.close()
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_two_optimizers_share_a_group():
    run_ranks(2, _two_optimizers, limit_s=60)


def _thrown_away(rank: int, world_size: int, set_to_none: bool) -> None:
    """Gradients that zero_grad() throws away between two backward calls, as in a GAN without toggling."""
    case = Case(lambda: Whole(Stack()), run_net, is_streamed=False)
    model, plain = case.make(), case.make()
    engine, _ = build(model, rank, world_size, case)
    oracle = torch.optim.AdamW(plain.parameters(), **ADAMW)
    for step in range(3):
        for param, grad in zip(plain.parameters(), rank_averages(case, plain, step, world_size), strict=True):
            param.grad = grad
        oracle.step()
        run_net(model, batch(case, step, 7, rank))
        assert bool(model.net.head.weight.grad.to_local().eq(1e12).all())
        engine.optimizer.zero_grad(set_to_none=set_to_none)
        run_net(model, batch(case, step, 0, rank))
        engine.step()
        engine.optimizer.zero_grad()
    engine.close()
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_throws_held_gradients_away(set_to_none):
    run_ranks(2, _thrown_away, set_to_none, limit_s=60)


def _shown(rank: int, world_size: int) -> None:
    case = Case(lambda: Whole(Stack()), run_net, is_streamed=False)
    model, plain = case.make(), case.make()
    engine, _ = build(model, rank, world_size, case)
    averages = rank_averages(case, plain, 0, world_size)
    run_net(model, batch(case, 0, 0, rank))
    engine.transport.average_grads()
    for param, average in zip(model.parameters(), averages, strict=True):
        grad = param.grad
        if isinstance(grad, DTensor):
            start, stop = shard_rows(len(average), rank, world_size)
            assert torch.equal(grad.to_local(), average[start:stop])
        else:
            assert torch.equal(grad, average)
        grad.mul_(-1.0)  # what users change is what is stepped
    for param, average in zip(plain.parameters(), averages, strict=True):
        param.grad = -average
    torch.optim.AdamW(plain.parameters(), **ADAMW).step()
    engine.step()
    engine.close()
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_averaged_gradients_can_be_seen_and_changed():
    run_ranks(2, _shown, limit_s=60)


def _freed(rank: int, world_size: int) -> None:
    """No gathered weight outlives its module's forward or backward, and no whole gradient its backward."""
    model = Whole(Stack())
    engine, sharded = build(model, rank, world_size, Case(None, run_net))

    def bytes_gathered() -> list[int]:
        wholes = [whole for group in sharded.groups for whole in group.unsharded.values()]
        assert all(whole.grad is None for whole in wholes)
        return [whole.untyped_storage().nbytes() for group in sharded.groups for whole in group.unsharded.values()]

    for _ in range(2):
        loss = loss_of(model.net(torch.ones(2, 12)))
        inner = sum(len(group.unsharded) for group in sharded.groups if not group.is_top)
        assert sum(bytes_gathered()[:inner]) == 0
        loss.backward()
        assert sum(bytes_gathered()) == 0
        engine.step()
    engine.close()


def test_nothing_whole_outlives_its_use():
    run_ranks(2, _freed, limit_s=60)


def _gates(rank: int, world_size: int) -> None:
    """An upload is waited for by the group that it is for, and by no earlier one."""
    model = Whole(Stack())
    engine, sharded = build(model, rank, world_size, Case(None, run_net, is_offloaded=True))
    run_net(model, torch.ones(2, 12))
    engine.step()
    waiting: list[int] = []

    def num_uploads() -> int:
        return sum(unit.store._new is not None for unit in engine.transport.units)

    for block in model.net.blocks:
        block.register_forward_pre_hook(lambda *_: waiting.append(num_uploads()))
    assert num_uploads() == 4
    run_net(model, torch.ones(2, 12))
    assert waiting == [2, 1, 0]
    engine.close()


def test_uploads_are_waited_for_by_their_own_group():
    run_ranks(2, _gates, limit_s=60)


def _meta(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = Whole(Stack(is_tied=True))
    model.net.register_buffer("shift", torch.zeros(12))
    model.scale = nn.Parameter(torch.tensor(1.5))
    torch.manual_seed(100 + rank)  # rank 0's draws are everybody's
    optimizer = torch.optim.AdamW(model.parameters())
    engine, sharded = build(model, rank, world_size, Case(None, run_net), optimizer=optimizer)
    run_net(model, torch.ones(2, 12))
    engine.step()
    engine.close()
    found = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert not any(p.is_meta for p in found.values())
    assert found["net.blocks.0.up.weight"].std() > 0.1
    assert model.net.head.weight is model.net.first.weight
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    return found


def test_meta_model_is_initialised_group_by_group():
    first, second = run_ranks(2, _meta, limit_s=60)
    assert all(torch.equal(first[name], second[name]) for name in first)


class NoReset(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, 3))


def _meta_refused(rank: int, world_size: int) -> str:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), NoReset())
    try:
        build(model, rank, world_size, Case(None, None), optimizer=torch.optim.AdamW(model.parameters()))
    except SuperScaleError as error:
        return str(error)
    return "no error"


def test_meta_module_without_initialiser_is_refused_by_name():
    for message in run_ranks(2, _meta_refused, limit_s=60):
        assert "'1'" in message
        assert "reset_parameters" in message


def _unfrozen(rank: int, world_size: int) -> None:
    model = Whole(Stack())
    model.net.head.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    engine, _ = build(model, rank, world_size, Case(None, run_net), optimizer=optimizer)
    before = Whole(Stack()).net.head.weight
    run_net(model, torch.ones(2, 12))
    engine.step()
    model.net.head.requires_grad_(True)
    run_net(model, torch.ones(2, 12))
    engine.step()
    engine.close()
    assert (model.net.head.weight - before).abs().min() > 0.05  # one AdamW step of lr 0.1 moves all by about that


def test_parameter_unfrozen_later_is_adopted():
    run_ranks(2, _unfrozen, limit_s=60)


def _one_fails(rank: int, world_size: int, folder: str) -> str:
    watch = RankWatch(dist.FileStore(os.path.join(folder, "watch"), world_size), rank, world_size)
    model = Whole(Stack())
    engine, _ = build(model, rank, world_size, Case(None, run_net), watch=watch)
    run_net(model, torch.ones(2, 12))
    engine.step()
    try:
        if rank == 1:
            watch.report(ValueError("a bad batch"))
            time.sleep(3)
            return "told"
        run_net(model, torch.ones(2, 12))
    except SuperScaleError as error:
        return str(error)
    finally:
        watch.close()
    return "no error"


def test_rank_that_gathers_hears_of_another_that_failed():
    with tempfile.TemporaryDirectory() as folder:
        heard, told = run_ranks(2, _one_fails, folder, limit_s=30)
    assert told == "told"
    assert heard == "rank 1 failed: ValueError: a bad batch"


def _sharded_already(rank: int, world_size: int) -> str:
    model = Whole(Stack())
    mesh = init_device_mesh("cpu", (world_size,))
    model.net.first = parallelize_module(model.net.first, mesh, ColwiseParallel())
    try:
        build(model, rank, world_size, Case(None, run_net))
    except SuperScaleError as error:
        assert type(model.net.blocks[0]) is Block, "refused before anything was changed"
        return str(error)
    return "no error"


def test_tensor_parallel_parameters_are_refused_by_name():
    for message in run_ranks(2, _sharded_already, limit_s=60):
        assert "'net.first.weight' is a DTensor already" in message
