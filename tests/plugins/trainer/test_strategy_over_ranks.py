"""Trainers on several ranks against DDP with torch.optim.AdamW on the same batches."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn

import lightning_superscale as lss
from tests.helpers.extent import IS_ALL
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import Regressor, loader, trainer


class Losses(L.Callback):
    """This rank's training losses, and the global gradient norm of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def fit(rank, world_size, strategy, flags, module_class=Regressor):
    """Weights, losses, validation metrics and the saved checkpoint's optimizer state of one rank."""
    losses = Losses()
    flags = {"max_epochs": 2, "callbacks": [losses], **flags}
    runner = trainer(strategy, devices=world_size, **flags)
    module = module_class()
    runner.fit(module, loader(46), loader(16))
    metrics = {key: float(value) for key, value in runner.callback_metrics.items()}
    return {name: p.detach().clone() for name, p in module.state_dict().items()}, losses.losses, metrics


def cases(rank, world_size, runs):
    return [fit(rank, world_size, make(), flags, module) for make, flags, module in runs]


def ddp():
    from lightning.pytorch.strategies import DDPStrategy

    return DDPStrategy(find_unused_parameters=True)


def zero1():
    return "zero1"


def zero2():
    return "zero2"


def superoffload():
    return "superoffload"


def zero3():
    return "zero3"


def replicated():
    return "superscale"


STRATEGIES = (replicated, zero1, zero2, zero3, superoffload)


class Manual(Regressor):
    """Manual optimization with a clip and two backward calls."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        optimizer.step()
        return {"loss": loss.detach()}


class Peeking(Regressor):
    """Reads and scales averaged gradients, as a user under DDP would."""

    def on_before_optimizer_step(self, optimizer):
        for param in self.parameters():
            if param.grad is not None:
                param.grad.mul_(0.5)


class Clamping(Regressor):
    """Limits averaged gradients as soon as they are there: an average of limited ones is another."""

    def on_after_backward(self):
        for param in self.parameters():
            if param.grad is not None:
                param.grad.clamp_(-1e-3, 1e-3)


def assert_same(mine, theirs, rank: int, *, exact: bool, name: str) -> None:
    (weights, losses, metrics), (expected_weights, expected_losses, expected_metrics) = mine, theirs
    if exact:
        assert losses == expected_losses, name
        for key, value in expected_weights.items():
            if rank == 0 or "running" not in key:  # DDP leaves every rank with its own last batch's statistics
                assert torch.equal(weights[key], value), f"{name}: {key}"
        assert metrics == expected_metrics or rank > 0, name
        return
    # Another order of summation: a roundoff of every gradient, carried over by AdamW step by step.
    assert losses == pytest.approx(expected_losses, rel=1e-4), name
    for key, value in expected_weights.items():
        if key in ("net.0.bias", "net.1.running_mean") or (rank and "running" in key):
            continue  # batch norm takes it away again: its gradient is roundoff alone, which AdamW makes whole steps of
        torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=1e-4, msg=lambda m, k=key: f"{name}: {k}: {m}")


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_training_equals_ddp(world_size):
    variants = [({}, Regressor), ({"gradient_clip_val": 0.1}, Regressor)]
    if world_size == 2:
        variants += [
            ({"accumulate_grad_batches": 2}, Regressor),
            ({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, Regressor),
            ({}, Manual),
            ({}, Peeking),
            ({}, Clamping),
        ]
    runs = [(make, flags, module) for flags, module in variants for make in (ddp, *STRATEGIES)]
    results = run_ranks(world_size, cases, runs, limit_s=60)
    for k, (make, flags, module) in enumerate(runs):
        if make is ddp:
            expected = k
            continue
        name = f"{make.__name__} {flags} {module.__name__}"
        for rank in range(world_size):
            by_norm = "gradient_clip_val" in flags and "gradient_clip_algorithm" not in flags
            # Stage 2 adds averages of micro-batches, DDP averages their sum.
            each = "accumulate_grad_batches" in flags and make in (zero2, zero3, superoffload)
            exact = world_size == 2 and not by_norm and not each
            assert_same(results[rank][k], results[rank][expected], rank, exact=exact, name=f"rank {rank}: {name}")


class Bytes(L.Callback):
    """What this rank holds after the first of two micro-batches, and what its plan says."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}
        self.plan = None

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 0:
            engine = next(iter(trainer.strategy.assembly.engines.values()))
            grads = [p.grad for p in module.parameters() if p.grad is not None]
            grads += [grad for state in engine.states for i in range(99) if (grad := state.grad(i)) is not None]
            states = [t for own in engine.optimizer.state.values() for key, t in own.items() if key != "step"]
            weights = [p.to_local() if hasattr(p, "to_local") else p for p in module.net.parameters()]
            self.held = {
                "weights": sum(w.nbytes for w in weights),
                "gradients": sum(g.nbytes for g in grads),
                "optimizer states": sum(t.nbytes for t in states),
            }
            self.plan = trainer.strategy.plan


def held_bytes(rank, world_size, strategies):
    reports = []
    for name in strategies:
        look = Bytes()
        fit(rank, world_size, name, {"callbacks": [look], "accumulate_grad_batches": 2})
        reports.append((look.held, look.plan))
    return reports


def test_bytes_per_rank_equal_the_arithmetic_of_the_stage():
    world_size = 2
    trained = sum(p.numel() for p in [*Regressor().net.parameters()])
    for reports in run_ranks(world_size, held_bytes, ["superscale", "zero1", "zero2", "zero3"]):
        for (held, plan), gradient_shares, state_shares in zip(reports, (1, 1, 2, 2), (1, 2, 2, 2), strict=True):
            rows = {row.name: row for row in plan.bytes}
            # A rank may hold one row more of each parameter than its share.
            slack = sum(p.numel() // len(p) for p in Regressor().net.parameters()) * 8
            assert abs(held["gradients"] - 4 * trained / gradient_shares) <= slack
            assert abs(held["optimizer states"] - 8 * trained / state_shares) <= 2 * slack
            assert abs(held["weights"] - 4 * trained / (2 if plan.zero_stage == 3 else 1)) <= slack
            assert ("/ 2 ranks" in rows["weights"].arithmetic) == (plan.zero_stage == 3)
            assert ("/ 2 ranks" in rows["optimizer states"].arithmetic) == (state_shares == 2)
            assert ("/ 2 ranks" in rows["gradients"].arithmetic) == (gradient_shares == 2)


class Counts(L.Callback):
    """Collectives between the end of one step and the end of the next."""

    def __init__(self) -> None:
        self.calls: list[dict[str, int]] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.strategy.assembly.wait_all_published()  # gathers of this step may be issued during the next forward
        counts = trainer.strategy.assembly.mesh.counts
        self.calls.append(dict(counts.calls))
        self.num_units = sum(len(e.transport.units) for e in trainer.strategy.assembly.engines.values())
        counts.clear()


class Smooth(Regressor):
    """No buffers, no unused parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(17, 33), nn.Identity(), nn.GELU(), nn.Linear(33, 5))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters())


def counted(rank, world_size, names):
    reports = []
    for name in names:
        look = Counts()
        fit(rank, world_size, name, {"callbacks": [look], "max_epochs": 1, "gradient_clip_val": 1.0}, Smooth)
        reports.append((look.calls[2], look.num_units))
    return reports


def test_collectives_per_step_equal_theory():
    """Every unit is reduced once and gathered once; ranks agree once, and once more on the norm."""
    replicated, *sharded = run_ranks(2, counted, ["superscale", "zero1", "zero2", "superoffload"])[0]
    assert replicated == ({"all_reduce": replicated[1], "control": 1}, 1)
    for calls, num_units in sharded:
        assert calls == {"reduce_scatter": num_units, "all_gather": num_units, "control": 2}


def settings(zero, offload=None):
    return {"zero": zero, "offload": offload}


def fit_settings(rank, world_size, runs):
    results = []
    for config, flags, module in runs:
        strategy = lss.SuperScaleStrategy(**config)
        results.append(fit(rank, world_size, strategy, flags, module))
    return results


BF16 = {"precision": "bf16-true"}
PLACES = [settings(zero, offload) for zero in (0, 1, 2, 3) for offload in (None, "cpu", "superoffload")]


def test_every_stage_and_place_of_states_gives_the_same_bf16_weights():
    """bf16 weights with fp32 masters: stages and offload move states, and change no bit at two ranks."""
    runs = [(config, BF16, Smooth) for config in PLACES]
    for rank_results in run_ranks(2, fit_settings, runs, limit_s=240):
        for config, result in zip(PLACES[1:], rank_results[1:], strict=True):
            assert_same(result, rank_results[0], 0, exact=True, name=str(config))


class Eager(Smooth):
    """Adagrad makes its states in its constructor, before anything is sharded."""

    def configure_optimizers(self):
        return torch.optim.Adagrad(self.net.parameters(), lr=1e-2, initial_accumulator_value=0.1)


def test_states_that_an_optimizer_made_before_are_sharded_too():
    places = PLACES if IS_ALL else [settings(0), settings(1), settings(2, "superoffload"), settings(3)]
    runs = [(config, {}, Eager) for config in places]
    for rank_results in run_ranks(2, fit_settings, runs, limit_s=120):
        for config, result in zip(places[1:], rank_results[1:], strict=True):
            assert_same(result, rank_results[0], 0, exact=True, name=str(config))


def test_replicas_of_shards_equal_ddp():
    """HSDP: four ranks, two replicas of two shards, in every stage."""
    zeros = [{"stage": stage, "shard_size": 2} for stage in (1, 2, 3)]
    runs = [(settings(zero), {}, Smooth) for zero in zeros]
    expected = run_ranks(4, cases, [(ddp, {}, Smooth)], limit_s=120)
    results = run_ranks(4, fit_settings, runs, limit_s=240)
    for rank in range(4):
        for zero, result in zip(zeros, results[rank], strict=True):
            assert_same(result, expected[rank][0], rank, exact=False, name=str(zero))


class OnMeta(Regressor):
    """Built on the meta device in configure_model: no rank holds memory for the whole model before it is sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            with torch.device("meta"):
                self.net = nn.Sequential(nn.Linear(17, 33), nn.GELU(), nn.Linear(33, 5))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters())


def test_a_model_on_the_meta_device_is_initialised_alike_on_all_ranks():
    alone = {"stage": 3, "shard_size": 1}  # every rank keeps the whole model
    runs = [(settings(zero), {"max_epochs": 1}, OnMeta) for zero in (0, 2, 3, alone)]
    for first, second in zip(*run_ranks(2, fit_settings, runs, limit_s=120), strict=True):
        for key, value in first[0].items():
            assert value.device.type == "cpu"
            assert torch.equal(value, second[0][key])
        assert first[1][0] < 10


def _resumed_on_meta(rank: int, world_size: int, folder: str):
    """Weights after two epochs, once in one piece and once saved after the first and resumed."""
    results = []
    for zero in (0, 2, 3):
        for precision in ("32-true", "bf16-true"):
            flags = {"devices": world_size, "precision": precision}
            once, half, module = OnMeta(), OnMeta(), OnMeta()
            torch.manual_seed(3)
            trainer(lss.SuperScaleStrategy(zero=zero), max_epochs=2, **flags).fit(once, loader(46))
            torch.manual_seed(3)
            first = trainer(lss.SuperScaleStrategy(zero=zero), max_epochs=1, **flags)
            first.fit(half, loader(46))
            path = f"{folder}/{zero}-{precision}.ckpt"
            first.save_checkpoint(path)
            trainer(lss.SuperScaleStrategy(zero=zero), max_epochs=2, **flags).fit(module, loader(46), ckpt_path=path)
            results.append((once.state_dict(), module.state_dict()))
    return results


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_model_on_the_meta_device_resumes_from_a_checkpoint(tmp_path, world_size):
    for result in run_ranks(world_size, _resumed_on_meta, str(tmp_path), limit_s=120):
        for once, resumed in result:
            for key, value in once.items():
                assert torch.equal(value, resumed[key]), key
