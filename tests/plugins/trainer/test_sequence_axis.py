"""Ranks that share sequences, under every stage and engine, against one process on whole samples.

The model cuts sequences by hand, and needs nothing of its neighbours but the loss: what is tested is all around it, the
mesh, samplers, gradient means, norms, logs and checkpoints.
"""

from __future__ import annotations

from itertools import product

import lightning as L
import pytest
import torch
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lightning_superscale as lss
from lightning_superscale.run.techniques.registry import TECHNIQUES
from tests.helpers.ranks import run_ranks
from tests.helpers.shared_tokens import SharedTokens, dealt_loader, samples, shared_loader, train_plain
from tests.helpers.trainers import trainer

ENGINES = (None, "cpu", "superoffload", "zenflow")
MAX_NORM = 0.05
# Options of the strategy and flags of the Trainer, by what is special about them.
EVERY = [({"stage": stage}, engine, {}) for stage, engine in product(range(4), ENGINES)]
TWO = [
    *EVERY,
    *(({"stage": stage}, engine, {"accumulate_grad_batches": 2}) for stage, engine in ((0, None), (2, "superoffload"))),
    *(
        ({"stage": stage}, engine, {"gradient_clip_val": MAX_NORM})
        for stage, engine in zip(range(4), ENGINES, strict=True)
    ),
    *(({"stage": stage}, None, {"precision": "bf16-true"}) for stage in (0, 2, 3)),
]
FOUR = [
    *(({"stage": stage}, engine, {}) for stage, engine in zip(range(4), ENGINES, strict=True)),
    *(({"stage": stage, "shard_size": 2}, None, {}) for stage in (1, 2, 3)),
    ({"stage": 2, "shard_size": 2}, None, {"gradient_clip_val": MAX_NORM}),
    ({"stage": 3}, None, {"gradient_clip_val": MAX_NORM}),
    ({"stage": 3, "tensor_parallel": 2}, None, {}),
    ({"stage": 3, "tensor_parallel": 2}, "superoffload", {"gradient_clip_val": MAX_NORM}),
]


class Parallel(SharedTokens):
    """Cut over a tensor axis too."""

    is_parallel = False

    def configure_model(self):
        if not self.is_parallel:
            for block in self.net.blocks:
                parallelize_module(
                    block, self.device_mesh["tensor_parallel"], {"up": ColwiseParallel(), "down": RowwiseParallel()}
                )
        self.is_parallel = True


class Norms(L.Callback):
    """The global gradient norm of every step; none where a step that does not clip measures none."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        zenflow = trainer.strategy.offload_config is not None and trainer.strategy.offload_config.engine == "zenflow"
        if trainer.global_step > len(self.norms) and not (zenflow and trainer.gradient_clip_val is None):
            self.norms.append(float(trainer.strategy.grad_norm()))


def strategy(zero, engine, sequence, **options):
    offload = {"engine": engine, "zenflow": {"topk": 1}} if engine == "zenflow" else engine
    return lss.SuperScaleStrategy(zero=zero, offload=offload, sequence=sequence, **options)


def num_data_of(zero, world_size: int, sequence: int = 2) -> int:
    return world_size // sequence // zero.get("tensor_parallel", 1)


def batch_size_of(num_data: int, flags) -> int:
    """Two steps in an epoch of sixteen samples."""
    return 16 // num_data // 2 // flags.get("accumulate_grad_batches", 1)


def fit(rank, world_size, zero, engine, flags, sequence: int = 2):
    """Losses, norms, weights and logged metrics of one rank."""
    module, norms = (Parallel if "tensor_parallel" in zero else SharedTokens)(), Norms()
    runner = trainer(strategy(zero, engine, sequence), devices=world_size, callbacks=[norms], **flags)
    num_data = num_data_of(zero, world_size, sequence)
    loader = shared_loader if num_data > 1 else dealt_loader  # where all ranks have one batch, samplers are kept
    runner.fit(module, loader(batch_size_of(num_data, flags)))
    state = runner.strategy.run.module_state(module, is_local=False)
    weights = {name.removeprefix("net."): value.clone() for name, value in state.items()}
    metrics = {key: float(value) for key, value in runner.callback_metrics.items()}
    return module.losses, norms.norms, weights, metrics, runner.strategy.explain()


def train_all(rank, world_size, cases):
    # These modules take their part of the tokens themselves: the axis is tested, and not how activations are shared.
    del TECHNIQUES["sequence"]
    return [fit(rank, world_size, *case) for case in cases]


@pytest.fixture(scope="module")
def two():
    return run_ranks(2, train_all, TWO, limit_s=240)


@pytest.fixture(scope="module")
def four():
    return run_ranks(4, train_all, FOUR, limit_s=240)


def in_one_process(num_data: int, flags):
    """The same training in one process, and how far from fp64 that is: (losses, norms, weights) and three numbers.

    Ranks add the same gradients of tokens in another order. That is one more evaluation, in the same precision, of the
    training that fp64 gives exactly, and roundoff takes it about as far from that as it takes one process. Four times
    as far is allowed from one process: twice for two such runs, and twice for luck; and where one process happens to
    be nearer, the four roundings to fp32 of the two values that are compared and of the two last sums.

    AdamW makes a whole step of a gradient whatever its size, also of one that is roundoff alone. In fp32 there is none
    here. In bf16 there are some, so that the largest difference of weights says nothing, and their mean is compared.
    """
    accumulate, max_norm = flags.get("accumulate_grad_batches", 1), flags.get("gradient_clip_val")
    how = {"batch_size": batch_size_of(num_data, flags), "max_norm": max_norm, "accumulate": accumulate}
    exact, exact_losses, exact_norms = train_plain(num_data, dtype=torch.float64, **how)
    if "precision" in flags:
        losses, norms, weights, _, _ = fit(0, 1, {"stage": 0}, None, flags, sequence=1)
        weights = {name: weights[name] for name in exact.state_dict()}
    else:
        net, losses, norms = train_plain(num_data, **how)
        weights = {name: param.detach() for name, param in net.named_parameters()}
    far = lambda a, b: max(4 * max(abs(x - y) for x, y in zip(a, b, strict=True)), 4 * 2**-24 * max(a))  # noqa: E731
    of_weights = 4 * difference(weights, exact.state_dict(), flags)
    return (losses, norms, weights), (far(losses, exact_losses), far(norms, exact_norms), of_weights)


def difference(weights, others, flags) -> float:
    """The largest difference of two models' weights, or its mean in bf16."""
    each = torch.cat([(weights[name].double() - other).abs().flatten() for name, other in others.items()])
    return float(each.mean() if "precision" in flags else each.max())


def check(per_rank, cases, world_size):
    oracles = {}
    for number, (zero, engine, flags) in enumerate(cases):
        name, num_data = str(cases[number]), num_data_of(zero, world_size)
        key = (num_data, str(flags))
        oracles[key] = oracles.get(key) or in_one_process(num_data, flags)
        (losses, norms, weights), (of_losses, of_norms, of_weights) = oracles[key]
        results = [of_rank[number] for of_rank in per_rank]
        own = [results[rank * world_size // num_data][0] for rank in range(num_data)]
        means = [sum(step) / num_data for step in zip(*own, strict=True)]
        assert means == pytest.approx(losses, rel=0, abs=of_losses), name
        for rank, (_, found_norms, found, _, _) in enumerate(results):
            if engine != "zenflow" or "gradient_clip_val" in flags:
                assert found_norms == pytest.approx(norms, rel=0, abs=of_norms), name
            if rank > 0 and "tensor_parallel" in zero:  # the first rank alone is given whole weights
                continue
            assert {fqn: value.dtype for fqn, value in found.items()} == {f: v.dtype for f, v in weights.items()}, name
            assert difference(found, weights, flags) <= of_weights, name
            for fqn, value in found.items():
                assert torch.equal(value, results[0][2][fqn]), f"{name}: ranks end with other weights of {fqn}"


def test_two_ranks_that_share_sequences_train_as_one_process(two):
    check(two, TWO, 2)


def test_four_ranks_that_share_sequences_train_as_one_process(four):
    check(four, FOUR, 4)


def test_what_is_logged_counts_every_sample_once(two, four):
    """Also along the tensor axis, whose ranks have the same samples too."""
    largest = float(samples().tensors[0].max())
    for per_rank, cases in ((two, TWO), (four, FOUR)):
        for results in per_rank:
            for (_, _, _, metrics, _), case in zip(results, cases, strict=True):
                assert metrics["num_samples"] == 16, case
                assert metrics["largest"] == largest, case
        for *results, case in zip(*per_rank, cases, strict=True):
            last = [sum(step) / len(results) for step in zip(*(losses for losses, *_ in results), strict=True)]
            epoch = last[len(last) // 2 :]
            for _, _, _, metrics, _ in results:  # sums of at most 16 values of about 3 in fp32, in another order
                assert metrics["mean_loss"] == pytest.approx(sum(epoch) / len(epoch), rel=16 * 2**-24), case
                assert metrics["mean_loss"] == results[0][3]["mean_loss"], case


def test_ranks_that_share_sequences_have_one_loss_and_divide_states(two, four):
    for case, first, second in zip(TWO, *two, strict=True):
        assert first[0] == second[0], case
    for case, *results in zip(FOUR, *four, strict=True):
        assert results[0][0] == results[1][0], case
    assert "0: 2 copies, each over 1 rank" in two[0][0][4]
    assert "3: 1 copy, each over 2 ranks" in two[0][12][4]
    assert "2: 1 copy, each over 4 ranks" in four[0][2][4]
    assert "2: 2 copies, each over 2 ranks" in four[0][5][4]
    assert "each over 2 ranks" in two[0][0][4].split("sequences")[1].splitlines()[0]
