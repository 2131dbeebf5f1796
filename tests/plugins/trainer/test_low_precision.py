"""Low-precision masters, states and gradients through the Trainer, beside loops that are written by hand."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

import lightning_superscale as lss
from tests.helpers.extent import IS_ALL, only_in_test_all
from tests.helpers.plain import PlainLowAdamW, PlainMasterAdamW
from tests.helpers.ranks import run_ranks
from tests.helpers.tensor_parallel import LanguageModel, token_loader
from tests.helpers.trainers import assert_same_weights, loader, trainer

HOMES = {
    "resident": {},
    "cpu": {"offload": "cpu"},
    "superoffload": {"offload": "superoffload"},
    "superoffload, held": {"offload": {"engine": "superoffload", "speculate": False}},
    "half on the device": {"offload": {"engine": "superoffload", "gpu_fraction": 0.5}},
    "flow": {"offload": {"engine": "superoffload", "weights": "flow", "wrap": ["Linear"]}},
}
CHOICES = {
    "all bf16": {"master_weights": "bf16", "optimizer_states": "bf16", "seed": 3},
    "to nearest": {"master_weights": "bf16", "optimizer_states": "bf16", "stochastic_rounding": False},
    "kahan": {"master_weights": "bf16", "optimizer_states": "bf16", "kahan": True},
    "fp32 masters": {"optimizer_states": "bf16"},
    "fp32 states": {"master_weights": "bf16"},
}


class Linear(L.LightningModule):
    """No batch norm, so that a hand-written loop has nothing else to keep."""

    def __init__(self, optimizer=torch.optim.AdamW) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(17, 33), nn.GELU(), nn.Linear(33, 5))
        self.optimizer = optimizer

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.net(x) - y).float().pow(2).mean()

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=1e-2, weight_decay=0.1)


def train(module: L.LightningModule, home: str, precision: lss.SuperScalePrecision, **flags) -> L.Trainer:
    run = trainer(lss.SuperScaleStrategy(**HOMES[home]), plugins=[precision], **flags)
    run.fit(module, loader())
    return run


def by_hand(precision: lss.SuperScalePrecision, *, max_norm: float | None = None, epochs: int = 2) -> nn.Module:
    dtype = precision.choices.weights
    plain = Linear().to(dtype)
    oracle = PlainLowAdamW(plain.named_parameters(), precision.choices.states, max_norm, lr=1e-2, weight_decay=0.1)
    for _ in range(epochs):
        for x, y in loader():
            oracle.zero_grad()
            plain.training_step((x.to(dtype), y.to(dtype)), 0).backward()
            oracle.step()
    return plain


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("choice", CHOICES)
def test_bf16_weights_equal_a_hand_written_loop(home, choice):
    precision = lss.SuperScalePrecision("bf16-true", **CHOICES[choice])
    ours = Linear()
    train(ours, home, precision)
    assert_same_weights(ours, by_hand(precision))


@pytest.mark.parametrize("home", ["resident", "superoffload"])
@pytest.mark.parametrize("choice", ["all bf16", "kahan"])
def test_clipped_steps_equal_a_hand_written_loop(home, choice):
    precision = lss.SuperScalePrecision("bf16-true", **CHOICES[choice])
    ours = Linear()
    train(ours, home, precision, gradient_clip_val=0.05)
    assert_same_weights(ours, by_hand(precision, max_norm=0.05))


@pytest.mark.parametrize("home", HOMES)
def test_fp32_weights_with_bf16_states_equal_a_hand_written_loop(home):
    precision = lss.SuperScalePrecision("32-true", optimizer_states="bf16")
    ours = Linear()
    train(ours, home, precision)
    assert_same_weights(ours, by_hand(precision))


@pytest.mark.parametrize("home", ["resident", "cpu", "superoffload"])
def test_fp16_weights_with_bf16_states_equal_a_hand_written_loop(home):
    precision = lss.SuperScalePrecision("16-true", optimizer_states="bf16")
    ours, plain = Linear(), Linear().half()
    train(ours, home, precision)
    oracle = PlainLowAdamW(plain.named_parameters(), precision.choices.states, lr=1e-2, weight_decay=0.1)
    scale = 65536.0
    for _ in range(2):
        for x, y in loader():
            oracle.zero_grad()
            (plain.training_step((x.half(), y.half()), 0) * torch.tensor(scale)).backward()
            if all(p.grad.isfinite().all() for p in plain.parameters()):
                oracle.grad_scale = 1 / scale
                oracle.step()
            else:
                scale /= 2
    assert oracle.num_steps > 6
    assert_same_weights(ours, plain)


# Over ranks: with the same batch on every rank, 2 or 4 averages of bf16 gradients are exact, so that nothing but the
# rounding could depend on the number of ranks.

LAYOUTS = {
    "replicated": {},
    "zero1": {"zero": 1},
    "zero2": {"zero": 2},
    "zero3": {"zero": 3},
    "zero1 superoffload": {"zero": 1, "offload": "superoffload"},
    "zero3 superoffload": {"zero": 3, "offload": "superoffload"},
    "zero2 cpu": {"zero": 2, "offload": "cpu"},
}


def fit_alike(rank, world_size, runs):
    """Weights after training on the same batches on every rank."""
    results = []
    for layout, choices, flags in runs:
        module = Linear()
        plugin = lss.SuperScalePrecision("bf16-true", **choices)
        flags = {"devices": world_size, "use_distributed_sampler": False, **flags}
        trainer(lss.SuperScaleStrategy(**layout), plugins=[plugin], **flags).fit(module, loader())
        results.append({name: value.clone() for name, value in module.state_dict().items()})
    return results


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=only_in_test_all)])
def test_ranks_change_no_bit(world_size):
    runs = [(layout, CHOICES[choice], {}) for choice in ("all bf16", "kahan") for layout in LAYOUTS.values()]
    runs += [(layout, CHOICES["fp32 masters"], {}) for layout in list(LAYOUTS.values())[:: 1 if IS_ALL else 3]]
    results = run_ranks(world_size, fit_alike, runs, limit_s=120)
    expected = {}
    for k, (layout, choices, _) in enumerate(runs):
        name = f"{layout} {choices}"
        if str(choices) not in expected:
            expected[str(choices)] = by_hand(lss.SuperScalePrecision("bf16-true", **choices)).state_dict()
        for result in results:
            for key, value in expected[str(choices)].items():
                assert torch.equal(result[k][key], value), f"{name}: {key}"


def fit_over_a_tensor_axis(rank, world_size):
    """Weights of tensor-parallel training in bf16, whole, and what each rank has of them."""
    module = LanguageModel("sequence")
    plugin = lss.SuperScalePrecision("bf16-true", **CHOICES["all bf16"])
    plan = lss.SuperScaleStrategy(zero={"stage": 3, "tensor_parallel": 2})
    losses = []

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))

    run = trainer(plan, plugins=[plugin], devices=world_size, max_epochs=4, callbacks=[Losses()])
    run.fit(module, token_loader(8))
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in module.net.named_parameters()}
    cut = {name for name, p in module.net.named_parameters() if isinstance(p, DTensor) and p.placements[0].is_shard()}
    return {name: value.detach().clone() for name, value in whole.items()}, cut, losses


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=only_in_test_all)])
def test_ranks_of_a_tensor_axis_round_alike_what_they_all_have(world_size):
    (first, cut, losses), *others = run_ranks(world_size, fit_over_a_tensor_axis, limit_s=90)
    assert cut
    assert cut < first.keys()  # some are cut, and some are not
    assert losses[-1] < losses[0]
    for weights, _, _ in others:
        for name, value in first.items():
            assert torch.equal(weights[name], value), name


# Resume and change of states


@pytest.mark.parametrize("home", ["resident", "superoffload", "half on the device"])
@pytest.mark.parametrize("choice", ["all bf16", "kahan", "fp32 masters"])
def test_resumed_run_equals_the_uninterrupted_one(home, choice, tmp_path):
    def precision():
        return lss.SuperScalePrecision("bf16-true", **CHOICES[choice])

    straight, first, second = Linear(), Linear(), Linear()
    train(straight, home, precision(), max_epochs=4)
    train(first, home, precision(), max_epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    run = trainer(lss.SuperScaleStrategy(**HOMES[home]), plugins=[precision()], max_epochs=4)
    run.fit(second, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert_same_weights(second, straight)


class Saves(L.Callback):
    def __init__(self, path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("home", HOMES)
def test_a_save_within_training_takes_nothing_from_the_compensation(home, tmp_path):
    """A save reads weights in ways that might be edits, and the compensation of an edited weight is forgotten."""
    saved, undisturbed = Linear(), Linear()
    train(saved, home, lss.SuperScalePrecision("bf16-true", **CHOICES["kahan"]), callbacks=[Saves(tmp_path / "x.ckpt")])
    train(undisturbed, home, lss.SuperScalePrecision("bf16-true", **CHOICES["kahan"]))
    assert_same_weights(saved, undisturbed)


@pytest.mark.parametrize("universal", [False, True], ids=["lightning", "universal"])
@pytest.mark.parametrize("source", ["all bf16", "kahan", "fp32"])
@pytest.mark.parametrize("target", ["all bf16", "kahan", "fp32"])
def test_a_run_goes_on_with_states_of_other_dtypes(source, target, universal, tmp_path):
    choices = {**CHOICES, "fp32": {}}
    checkpoint = lss.CheckpointConfig() if universal else None
    first, second = Linear(), Linear()
    run = trainer(
        lss.SuperScaleStrategy(checkpoint=checkpoint), plugins=[lss.SuperScalePrecision("bf16-true", **choices[source])]
    )
    run.fit(first, loader())
    run.save_checkpoint(tmp_path / "half.ckpt")
    seen, masters = {}, {}

    class Look(L.Callback):
        def on_train_start(self, trainer, module):
            engine = next(iter(trainer.strategy.assembly.engines.values()))
            states = engine.optimizer.state
            for name, p in module.named_parameters():
                master = engine.master_of(p)
                seen[name] = (p.detach().clone(), {key: value.clone() for key, value in states[p].items()})
                masters[name] = None if master is None else master.clone()

    target_plugin = lss.SuperScalePrecision("bf16-true", **choices[target])
    run2 = trainer(
        lss.SuperScaleStrategy(checkpoint=checkpoint), plugins=[target_plugin], max_epochs=3, callbacks=[Look()]
    )
    run2.fit(second, loader(), ckpt_path=tmp_path / "half.ckpt")
    saved = run.optimizers[0].state
    for name, param in first.named_parameters():
        weight, states = seen[name]
        assert torch.equal(weight, param), name  # weights are as they were, whatever keeps the rest
        moments = target_plugin.choices.states.moments
        assert torch.equal(states["exp_avg"], saved[param]["exp_avg"].to(moments)), name
        assert torch.equal(states["exp_avg_sq"], saved[param]["exp_avg_sq"].to(moments)), name
        assert ("compensation" in states) == (target == "kahan")
        exact = param.detach().float()
        if source == "kahan":
            exact = exact + saved[param]["compensation"].float()
        if source == "fp32":
            exact = saved[param]["master_param"]
        if target == "fp32":
            assert torch.equal(masters[name], exact), name
        if target == "kahan":
            kept = weight.float() + states["compensation"].float()
            torch.testing.assert_close(kept, exact, rtol=2**-17, atol=0)  # 8 digits of the weight, 8 of the rest


# Gradients


class Batches(Linear):
    """Manual optimization with three backward calls of one step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.seen = []

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for part in range(3):
            x, y = batch
            self.manual_backward((self.net(x * (part + 1)) - y).float().pow(2).mean() * 0.1)
        optimizer.step()
        self.seen += [p.grad.dtype for p in self.parameters() if p.grad is not None]


def summed_in_fp32(num_parts: int, *, epochs: int = 2, parts=None) -> nn.Module:
    """fp32 masters, and the gradients of several backward calls added up in fp32."""
    plain = Linear().bfloat16()
    oracle = PlainMasterAdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(epochs):
        sums = None
        for k, (x, y) in enumerate(loader()):
            losses = parts(plain, x.bfloat16(), y.bfloat16()) if parts else [None]
            for loss in losses:
                whole = plain.training_step((x.bfloat16(), y.bfloat16()), 0) / num_parts if loss is None else loss
                oracle.zero_grad()
                whole.backward()
                grads = [p.grad.float() for p in plain.parameters()]
                sums = grads if sums is None else [a + b for a, b in zip(sums, grads, strict=True)]
            if parts or (k + 1) % num_parts == 0:
                for master, total in zip(oracle.masters, sums, strict=True):
                    master.grad = total
                oracle.optimizer.step()
                with torch.no_grad():
                    for param, master in zip(plain.parameters(), oracle.masters, strict=True):
                        param.copy_(master)
                sums = None
    return plain


def test_micro_batches_are_summed_in_fp32():
    ours = Linear()
    precision = lss.SuperScalePrecision("bf16-true", gradient_accumulation="fp32")
    train(ours, "resident", precision, accumulate_grad_batches=3)
    assert_same_weights(ours, summed_in_fp32(3))
    narrow = Linear()
    train(narrow, "resident", lss.SuperScalePrecision("bf16-true"), accumulate_grad_batches=3)
    assert not torch.equal(narrow.net[0].weight, ours.net[0].weight)
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in ours.parameters())  # as plain PyTorch has it again


def test_backward_calls_are_summed_in_fp32():
    ours = Batches()
    precision = lss.SuperScalePrecision("bf16-true", gradient_accumulation="fp32")
    train(ours, "resident", precision)
    assert set(ours.seen) == {torch.float32}

    def parts(plain, x, y):
        return [(plain.net(x * (part + 1)) - y).float().pow(2).mean() * 0.1 for part in range(3)]

    assert_same_weights(ours, summed_in_fp32(1, parts=parts))


def test_a_layer_that_is_unfrozen_later_sums_in_fp32_too():
    class Unfrozen(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.net[0].requires_grad_(False)
            self.seen = []

        def on_train_epoch_start(self):
            self.net[0].requires_grad_(self.current_epoch > 0)

        def on_before_optimizer_step(self, optimizer):
            self.seen.append({name: p.grad.dtype for name, p in self.named_parameters() if p.grad is not None})

    module = Unfrozen()
    train(module, "resident", lss.SuperScalePrecision("bf16-true", gradient_accumulation="fp32"))
    assert "net.0.weight" not in module.seen[0]
    assert module.seen[-1].keys() == {name for name, _ in module.named_parameters()}
    assert {dtype for step in module.seen for dtype in step.values()} == {torch.float32}


@pytest.mark.parametrize("home", ["cpu", "superoffload"])
def test_a_sum_in_fp32_is_rounded_once_on_its_way_to_the_host(home):
    ours, wide = Linear(), summed_in_fp32(3, epochs=0)
    precision = lss.SuperScalePrecision("bf16-true", gradient_accumulation="fp32")
    train(ours, home, precision, accumulate_grad_batches=3, max_epochs=1, limit_train_batches=3)
    oracle = PlainMasterAdamW(wide.parameters(), lr=1e-2, weight_decay=0.1)
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in wide.parameters()]
    for (x, y), _ in zip(loader(), range(3), strict=False):
        oracle.zero_grad()
        (wide.training_step((x.bfloat16(), y.bfloat16()), 0) / 3).backward()
        sums = [a + p.grad.float() for a, p in zip(sums, wide.parameters(), strict=True)]
    for param, total in zip(wide.parameters(), sums, strict=True):
        param.grad = total.bfloat16()
    oracle.step()
    assert_same_weights(ours, wide)


class Reduced(Linear):
    """Gradients whose average needs more digits than bf16 has."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.net(x) - y).float().pow(2).mean() * (1 + 0.37 * self.global_rank)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.norm = self.trainer.strategy.grad_norm().item()


def averages(rank, world_size, runs):
    """The gradient norm of one step, by way of reducing."""
    found = []
    for layout, precision, choices in runs:
        run = trainer(
            lss.SuperScaleStrategy(**layout),
            plugins=[lss.SuperScalePrecision(precision, **choices)],
            devices=world_size,
            limit_train_batches=1,
            max_epochs=1,
        )
        module = Reduced()
        run.fit(module, loader())
        found.append(module.norm)
        assert all(p.grad is None or p.grad.dtype == p.dtype for p in module.parameters())
    return found


def test_ranks_reduce_in_the_dtype_that_was_asked_for():
    runs = [
        (layout, precision, choices)
        for layout in ({"zero": 1}, {"zero": 3}, {"zero": 2, "offload": "superoffload"})
        for precision, choices in (
            ("32-true", {}),
            ("32-true", {"gradient_reduction": "bf16"}),
            ("bf16-true", {}),
            ("bf16-true", {"gradient_reduction": "fp32"}),
        )
    ]
    norms = run_ranks(3, averages, runs, limit_s=90)[0]
    for k in range(0, len(runs), 4):
        fp32, fp32_by_bf16, bf16, bf16_by_fp32 = norms[k : k + 4]
        assert fp32 != fp32_by_bf16
        assert fp32_by_bf16 == pytest.approx(fp32, rel=2**-8)  # one rounding of each gradient and each average
        assert bf16 != bf16_by_fp32
        assert bf16_by_fp32 == pytest.approx(bf16, rel=2**-7)


def accumulated(rank, world_size, layouts):
    results = []
    for layout in layouts:
        module = Linear()
        plugin = lss.SuperScalePrecision("bf16-true", gradient_accumulation="fp32")
        flags = {"devices": world_size, "use_distributed_sampler": False, "accumulate_grad_batches": 3}
        trainer(lss.SuperScaleStrategy(**layout), plugins=[plugin], **flags).fit(module, loader())
        results.append({name: value.clone() for name, value in module.state_dict().items()})
    return results


def test_micro_batches_are_summed_in_fp32_on_ranks():
    layouts = [{}, {"zero": 1}, {"zero": 2}, {"zero": 3}, {"zero": {"stage": 3, "no_sync": True}}]
    expected = summed_in_fp32(3).state_dict()
    for results in run_ranks(2, accumulated, layouts, limit_s=90):
        for layout, result in zip(layouts, results, strict=True):
            for key, value in expected.items():
                assert torch.equal(result[key], value), f"{layout}: {key}"


# What is kept, and what is refused


def test_explain_tells_bytes_and_dtypes(capsys):
    class Look(L.Callback):
        def on_train_end(self, trainer, module):
            self.table = trainer.strategy.explain()
            self.rows = {(row.name, row.dtype): row for row in trainer.strategy.plan.bytes}

    look = Look()
    train(Linear(), "resident", lss.SuperScalePrecision("bf16-true", **CHOICES["all bf16"]), callbacks=[look])
    assert "bf16-true, masters in bf16, optimizer states in bf16, rounded stochastically, seed 3" in look.table
    assert ("master weights", "float32") not in look.rows
    numel = sum(p.numel() for p in Linear().parameters())
    states = look.rows["optimizer states", "bfloat16"]
    assert states.arithmetic.startswith("4 B x")
    assert 4 * numel <= states.device_bytes <= 4 * numel + 4 * 64 * 4  # each slice may be padded


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"master_weights": "bf16", "optimizer_states": "bf16"}, "SGD steps through its own code .* to nearest"),
        ({"optimizer_states": "bf16"}, "SGD .* expected master_weights and optimizer_states alike"),
    ],
)
def test_other_optimizers_are_refused_by_name(choices, message):
    with pytest.raises(lss.SuperScaleError, match=message):
        train(Linear(torch.optim.SGD), "resident", lss.SuperScalePrecision("bf16-true", **choices))


@pytest.mark.parametrize("home", ["resident", "cpu"])
def test_other_optimizers_step_bf16_masters_to_nearest_if_told(home):
    choices = {"master_weights": "bf16", "optimizer_states": "bf16", "stochastic_rounding": False}
    ours, plain = Linear(torch.optim.SGD), Linear(torch.optim.SGD).bfloat16()
    train(ours, home, lss.SuperScalePrecision("bf16-true", **choices))
    optimizer = plain.configure_optimizers()
    for _ in range(2):
        for x, y in loader():
            optimizer.zero_grad()
            plain.training_step((x.bfloat16(), y.bfloat16()), 0).backward()
            optimizer.step()
    assert_same_weights(ours, plain)


def refused(rank, world_size):
    plugin = lss.SuperScalePrecision("bf16-true", gradient_accumulation="fp32")
    run = trainer(lss.SuperScaleStrategy(zero=2, offload="superoffload"), plugins=[plugin], devices=world_size)
    with pytest.raises(lss.SuperScaleError, match="gradient_accumulation='fp32' can't work with zero=2.*no_sync=True"):
        run.fit(Linear(), loader())


def test_sums_that_a_host_would_take_in_16_bits_are_refused():
    run_ranks(2, refused, limit_s=60)
