"""Which share of the states stays on the device, and what the first step teaches, as users meet it."""

from __future__ import annotations

import lightning as L
import pytest
import torch

import lightning_superscale as lss
from lightning_superscale.run import placement
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import Regressor, assert_same_weights, fit, loader, trainer

SHARES = (0.0, 0.4, 1.0)


class Shares(L.Callback):
    """After each step, the share of trainable parameters whose states are on the device; what `explain()` says last."""

    def __init__(self) -> None:
        self.shares: list[float] = []
        self.text = ""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self._note(trainer)

    def on_train_end(self, trainer, module):
        self._note(trainer)
        self.text = trainer.strategy.explain()

    def _note(self, trainer):
        (engine,) = trainer.strategy.assembly.engines.values()
        here = total = 0
        for unit, state in zip(engine.transport.units, engine.states, strict=True):
            numel = sum(param.numel() for param in unit.params)
            total += numel
            here += 0 if "host" in state.homes else numel
        self.shares.append(here / total)


def strategy_of(fraction, engine="superoffload", **more):
    offload = lss.OffloadConfig(engine=engine, gpu_fraction=fraction, bucket_mb=1)
    return lss.SuperScaleStrategy(offload=offload, **more)


@pytest.mark.parametrize("engine", ["superoffload", "cpu"])
@pytest.mark.parametrize("fraction", SHARES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_any_share_on_the_device_trains_as_plain_adamw(engine, fraction, precision):
    flags = {"gradient_clip_val": 0.05, "precision": precision, "accumulate_grad_batches": 2}
    plain, module, shares = Regressor(), Regressor(), Shares()
    fit(plain, lss.SuperScaleStrategy(), **flags) if precision == "bf16-true" else fit(plain, **flags)
    fit(module, strategy_of(fraction, engine), callbacks=[shares], **flags)
    assert_same_weights(module, plain)
    assert all(share <= fraction for share in shares.shares)
    assert (max(shares.shares) > 0) == (fraction > 0)
    assert f"of the trainable parameters step on the device (gpu_fraction={fraction})" in shares.text


def test_auto_uses_what_the_first_step_left_free(monkeypatch):
    free_bytes = 12 * 500
    monkeypatch.setattr(placement, "free_device_bytes", lambda device: free_bytes)
    plain, module, shares = Regressor(), Regressor(), Shares()
    fit(plain)
    fit(module, "superoffload", callbacks=[shares])
    assert_same_weights(module, plain)
    assert shares.shares[0] == 0.0
    assert 0 < shares.shares[-1] < 1
    assert shares.shares[-1] * 949 * 12 <= free_bytes


def test_auto_leaves_states_on_the_host_where_device_memory_is_host_memory():
    shares = Shares()
    fit(Regressor(), "superoffload", callbacks=[shares])
    assert set(shares.shares) == {0.0}
    assert "0% of the trainable parameters step on the device (gpu_fraction='auto', and device memory is host" in (
        shares.text
    )


def test_bytes_of_both_homes_are_counted():
    class Bytes(L.Callback):
        def on_train_end(self, trainer, module):
            self.rows = {row.name: row for row in trainer.strategy.plan.bytes}

    found = Bytes()
    fit(Regressor(), strategy_of(0.4), callbacks=[found], precision="bf16-true")
    states = found.rows["optimizer states"]
    assert states.device_bytes > 0
    assert states.host_bytes > 0


def test_a_run_with_another_share_resumes_exactly(tmp_path):
    once = Regressor()
    fit(once, strategy_of(0.4), max_epochs=2)
    first = fit(Regressor(), strategy_of(0.4), max_epochs=1)
    first.save_checkpoint(tmp_path / "one.ckpt")
    module = Regressor()
    runner = trainer(strategy_of(1.0), max_epochs=2)
    runner.fit(module, loader(), ckpt_path=str(tmp_path / "one.ckpt"))
    assert_same_weights(module, once)


@pytest.mark.parametrize("fraction", [-0.1, 1.5, "most", True])
def test_a_share_that_is_none_is_refused_by_name(fraction):
    with pytest.raises(lss.SuperScaleError, match=r"OffloadConfig.gpu_fraction must be a number from 0 to 1"):
        lss.OffloadConfig(gpu_fraction=fraction)


def _on_ranks(rank: int, world_size: int):
    results = []
    for zero in (0, 1, 2, 3):
        for fraction in SHARES:
            module, shares = Regressor(), Shares()
            strategy = strategy_of(fraction, zero=zero)
            trainer(strategy, devices=world_size, callbacks=[shares], gradient_clip_val=0.05).fit(module, loader())
            results.append((shares.shares[-1], {k: v.clone() for k, v in module.state_dict().items()}))
    return results


def test_ranks_agree_and_every_share_gives_the_same_weights():
    for rank_results in run_ranks(2, _on_ranks, limit_s=120):
        for i in range(0, len(rank_results), len(SHARES)):
            shares, weights = zip(*rank_results[i : i + len(SHARES)], strict=True)
            assert shares[0] == 0.0
            assert 0 < shares[1] <= 0.4
            assert shares[2] == 1.0
            for other in weights[1:]:
                assert all(torch.equal(value, other[key]) for key, value in weights[0].items())
