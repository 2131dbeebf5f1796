"""Tensor-parallel modules under stage 3, through a Trainer on real ranks.

Two oracles. Plain PyTorch on the same ranks (parallelize_module, with fully_shard where there are several data-parallel
ranks, and torch.optim) sums in the same order: bits. One process on the global batch sums in another: a tolerance.
"""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import lightning_superscale as lss
from tests.helpers.extent import IS_ALL
from tests.helpers.ranks import run_ranks
from tests.helpers.tensor_parallel import (
    LanguageModel,
    loss_of,
    optimizer_of,
    parallelize,
    rank_batches,
    token_loader,
    train_plain,
)
from tests.helpers.trainers import trainer

NUM_SAMPLES, STEPS_PER_EPOCH = 16, 2


def batch_size_of(world_size: int) -> int:
    return NUM_SAMPLES // (world_size // 2) // STEPS_PER_EPOCH


def strategy(offload=None, no_sync="auto"):
    return lss.SuperScaleStrategy(zero={"stage": 3, "tensor_parallel": 2, "no_sync": no_sync}, offload=offload)


class Norms(L.Callback):
    """The global gradient norm of every step."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.norms.append(float(trainer.strategy.grad_norm()))


class Peeks(LanguageModel):
    """Reads averaged gradients and scales them, so that they stay in param.grad until the step."""

    def on_before_optimizer_step(self, optimizer):
        for param in self.parameters():
            param.grad.mul_(0.5)


class Manual(LanguageModel):
    """Steps by hand, and throws away the gradients of a first backward."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(loss_of(self.net, batch[0]).square())
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()
        optimizer.zero_grad()


def fit(world_size, module, *, offload=None, no_sync="auto", **flags):
    """The strategy and the weights after training, whole, on every rank."""
    own = strategy(offload, no_sync)
    runner = trainer(own, devices=world_size, **flags)
    runner.fit(module, token_loader(batch_size_of(world_size)))
    return own, {name: whole_of(param) for name, param in module.net.named_parameters()}


def whole_of(param: torch.Tensor) -> torch.Tensor:
    return (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()


def torch_alone(rank, world_size, kind, *, optimizer="AdamW", scale=1.0, clip_value=None, accumulate=1):
    """Losses and whole weights of plain PyTorch's own tensor parallelism, with fully_shard on several data ranks."""
    num_data = world_size // 2
    mesh = init_device_mesh("cpu", (num_data, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    net = LanguageModel(None).net
    parallelize(net, mesh["tensor_parallel"], kind)
    if num_data > 1:
        for block in net.blocks:
            fully_shard(block, mesh=mesh["data_parallel"])
        fully_shard(net, mesh=mesh["data_parallel"])
    own, losses = optimizer_of(net, optimizer), []
    for epoch in range(2):
        for k, batches in enumerate(rank_batches(epoch, num_data, batch_size_of(world_size))):
            loss = loss_of(net, batches[rank // 2])
            (loss / accumulate).backward()
            losses.append(float(loss.detach()))
            if (k + 1) % accumulate:
                continue
            for param in net.parameters() if scale != 1.0 else ():
                param.grad.mul_(scale)
            if clip_value is not None:
                nn.utils.clip_grad_value_(net.parameters(), clip_value, foreach=False)
            own.step()
            own.zero_grad()
    return losses, {name: whole_of(param) for name, param in net.named_parameters()}


def differing(mine: dict, theirs: dict) -> list[str]:
    return [name for name, value in theirs.items() if not torch.equal(mine[name], value)]


# What one rank does in a shared spawn: every function returns plain data, which a test below judges.


def _against_torch(rank, world_size):
    """Names of weights that differ from plain PyTorch's, and whether losses do not, by case."""
    found = {}
    places = {"rowwise": [None], "vocabulary": ["cpu"], "sequence": [None, "superoffload"]}
    for kind, offloads in places.items():
        losses, expected = torch_alone(rank, world_size, kind)
        for offload in offloads:
            module = LanguageModel(kind)
            _, weights = fit(world_size, module, offload=offload)
            found[f"{kind}, {offload}"] = differing(weights, expected), module.losses == losses
    if world_size == 4:
        _, expected = torch_alone(rank, world_size, "sequence", scale=0.5, optimizer="SGD")
        found["gradients in param.grad"] = differing(fit(world_size, Peeks("sequence", "SGD"))[1], expected), True
        return found
    _, expected = torch_alone(rank, world_size, "vocabulary", optimizer="SGD", clip_value=0.01)
    by_value = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
    _, weights = fit(world_size, LanguageModel("vocabulary", "SGD"), **by_value)
    found["clipped by value"] = differing(weights, expected), True
    module = Manual("sequence")
    losses, expected = torch_alone(rank, world_size, "sequence")
    found["manual"] = differing(fit(world_size, module)[1], expected), module.losses == losses
    # On several data-parallel ranks torch averages each micro-batch and then adds.
    for kind, no_sync in (("vocabulary", False), ("sequence", True)):
        _, expected = torch_alone(rank, world_size, kind, accumulate=2)
        flags = {"no_sync": no_sync, "accumulate_grad_batches": 2}
        found[f"accumulated, {flags}"] = differing(fit(world_size, LanguageModel(kind), **flags)[1], expected), True
    return found


# Kind of plan, optimizer, place of its states, clip by norm. SGD knows norms from clipping only; one case never clips.
CASES = [
    ("rowwise", "AdamW", "superoffload", None),
    ("sequence", "AdamW", None, 0.3),
    ("sequence", "SGD", None, 0.3),
    ("vocabulary", "SGD", "cpu", 100.0),
]


def _against_one_process(rank, world_size):
    """Losses, norms and weights, by case."""
    found = {}
    for kind, optimizer, offload, max_norm in CASES:
        module, norms = LanguageModel(kind, optimizer), Norms()
        _, weights = fit(world_size, module, offload=offload, callbacks=[norms], gradient_clip_val=max_norm)
        found[kind, optimizer, offload, max_norm] = module.losses, norms.norms, weights
    return found


class Bytes(L.Callback):
    """Bytes that this rank holds after the first of two micro-batches."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 0:
            engine = next(iter(trainer.strategy.assembly.engines.values()))
            states = [t for own in engine.optimizer.state.values() for key, t in own.items() if key != "step"]
            grads = [g for state in engine.states for i in range(99) if (g := state.grad(i)) is not None]
            self.held = {
                "weights": sum(p.to_local().nbytes for p in module.net.parameters()),
                "gradients": sum(g.nbytes for g in grads),
                "optimizer states": sum(t.nbytes for t in states),
            }
            self.planned = {row.name: (row.device_bytes, row.arithmetic) for row in trainer.strategy.plan.bytes}
            self.explained = trainer.strategy.explain()


def _bytes(rank, world_size):
    look = Bytes()
    fit(world_size, LanguageModel("vocabulary"), callbacks=[look], accumulate_grad_batches=2)
    return look.held, look.planned, look.explained


def _bf16(rank, world_size):
    """Weights under bf16 with fp32 masters, by place of the states."""
    return [
        fit(world_size, LanguageModel("sequence"), offload=offload, precision="bf16-true")[1]
        for offload in (None, "superoffload")
    ]


def _norms_only(rank, world_size):
    """Gradient norms and weights where all that is trained is alike on the ranks of a tensor axis."""
    module, norms = LanguageModel("rowwise"), Norms()
    for name, param in module.named_parameters():
        param.requires_grad_("norm" in name)
    _, weights = fit(world_size, module, callbacks=[norms])
    return norms.norms, weights


def _meta(rank, world_size):
    """Whole initial weights of a module built on the meta device, after a step with a learning rate of zero."""
    module = LanguageModel("vocabulary", on_meta=True)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    torch.manual_seed(40 + rank)
    return fit(world_size, module, max_steps=1)[1]


_ALWAYS = (_against_torch, _against_one_process, _bytes)
PARTS = {2: (*(_ALWAYS if IS_ALL else ()), _norms_only), 4: (*_ALWAYS, _bf16, _meta)}


def everything(rank, world_size):
    return {part.__name__: part(rank, world_size) for part in PARTS[world_size]}


@pytest.fixture(scope="module")
def two():
    """What `everything` returned on both ranks of a tensor axis."""
    return run_ranks(2, everything, limit_s=150)


@pytest.fixture(scope="module")
def four():
    """The same on two by two ranks."""
    return run_ranks(4, everything, limit_s=150)


@pytest.fixture(params=["four", "two"] if IS_ALL else ["four"])
def ran(request):
    return request.getfixturevalue(request.param)


def test_training_equals_plain_tensor_parallelism_bit_for_bit(ran):
    for rank, results in enumerate(ran):
        for case, (names, same_losses) in results["_against_torch"].items():
            assert not names, f"rank {rank}, {case}: {names} differ"
            assert same_losses, f"rank {rank}, {case}: losses differ"


def roundoff(optimizer, max_norm, num_data, batch_size):
    """One process in fp32, and how far from fp64 that is: by losses, norms and weights, the largest difference.

    Tensor parallelism adds the same products in another order, halves of each row-parallel sum apart. It is one more
    fp32 evaluation of the training that fp64 gives exactly, so roundoff takes it about as far from that as it takes
    one process. Four times as far is allowed from one process: twice for two such runs, and twice for luck.
    """
    how = {"optimizer": optimizer, "max_norm": max_norm}
    net, losses, norms = train_plain(num_data, batch_size, **how)
    exact, exact_losses, exact_norms = train_plain(num_data, batch_size, dtype=torch.float64, **how)
    far = lambda a, b: 4 * max(abs(x - y) for x, y in zip(a, b, strict=True))  # noqa: E731
    weights = {name: param.detach() for name, param in net.named_parameters()}
    of_weights = 4 * max(float((weights[n].double() - w).abs().max()) for n, w in exact.state_dict().items())
    return (losses, far(losses, exact_losses)), (norms, far(norms, exact_norms)), (weights, of_weights)


def test_training_equals_one_process_up_to_roundoff(ran):
    num_data, batch_size = len(ran) // 2, batch_size_of(len(ran))
    for case in CASES:
        _, optimizer, _, max_norm = case
        of_losses, of_norms, of_weights = roundoff(optimizer, max_norm, num_data, batch_size)
        per_rank = [results["_against_one_process"][case] for results in ran]
        means = [sum(per_rank[2 * d][0][k] for d in range(num_data)) / num_data for k in range(2 * STEPS_PER_EPOCH)]
        assert means == pytest.approx(of_losses[0], rel=0, abs=of_losses[1]), case
        for _, norms, weights in per_rank:
            assert norms == pytest.approx(of_norms[0], rel=0, abs=of_norms[1]), case
            for name, expected in of_weights[0].items():
                torch.testing.assert_close(weights[name], expected, rtol=0, atol=of_weights[1], msg=name)
            assert not differing(weights, per_rank[0][2]), f"{case}: ranks end with different weights"


def test_bytes_per_rank_equal_the_arithmetic(ran):
    num_data = len(ran) // 2
    net = LanguageModel(None).net
    whole = {"blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2", "norm"}
    plain = [
        p for n, p in net.named_parameters() if n.rpartition(".")[0] in whole or n.endswith(("out.bias", "down.bias"))
    ]
    cut = sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in plain)
    share = (cut // 2 + sum(p.numel() for p in plain)) / num_data
    # A rank may hold one row more of each parameter than its share.
    slack = 0 if num_data == 1 else sum(p.numel() // len(p) for p in net.parameters())
    for held, planned, explained in (results["_bytes"] for results in ran):
        for name, copies in (("weights", 1), ("gradients", 1), ("optimizer states", 2)):
            assert abs(held[name] - 4 * copies * share) <= 4 * copies * slack, name
            assert f"{4 * copies} B x {cut // 2 + sum(p.numel() for p in plain):,}" in planned[name][1]
            assert planned[name][0] >= held[name]
        assert f"3: 2 tensor-parallel parts, each over {num_data} rank" in explained


def test_every_place_of_states_gives_the_same_bf16_weights(four):
    for results in four:
        resident, *others = results["_bf16"]
        assert all(not differing(weights, resident) for weights in others)
        assert all(w.dtype == torch.bfloat16 for w in resident.values())
        assert not differing(resident, four[0]["_bf16"][0])


def test_parameters_that_are_alike_on_the_tensor_axis_count_once(two):
    net, _, norms = train_plain(1, batch_size_of(2), trained="norm")
    for results in two:
        assert results["_norms_only"][0] == pytest.approx(norms, rel=1e-5)
        for name, expected in net.state_dict().items():
            atol = 2e-6 if "norm" in name else 0.0
            torch.testing.assert_close(results["_norms_only"][1][name], expected, rtol=0, atol=atol, msg=name)


def test_a_module_on_the_meta_device_starts_from_one_whole_model(four):
    """Every rank had other random numbers; the weights are rank 0's, drawn whole."""
    torch.manual_seed(40)
    with torch.device("meta"):
        net = LanguageModel(None).net
    expected = drawn(net)
    for results in four:
        assert not differing(results["_meta"], expected)


def drawn(net: nn.Module) -> dict[str, torch.Tensor]:
    net.to_empty(device="cpu")
    torch.manual_seed(40)
    groups = [*net.blocks, *(m for m in net.children() if not isinstance(m, nn.ModuleList))]
    for module in (m for group in groups for m in group.modules()):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return {name: param.detach() for name, param in net.named_parameters()}
