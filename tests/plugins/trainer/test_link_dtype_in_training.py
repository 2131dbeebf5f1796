"""`OffloadConfig.link_dtype` in a Trainer: the same bits, bytes as planned, chosen by rank 0's profile, or refused."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn

import lightning_superscale as lss
from lightning_superscale.run import host_plan
from lightning_superscale.run.report import exposure
from lightning_superscale.run.weight_flow import choose_weights
from tests.helpers.extent import IS_ALL
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import loader, trainer
from tests.offload.planner.test_choices import H100, SUPERCHIP

NUM_STEPS = 6


class Net(L.LightningModule):
    """Two layers, and an optimizer of choice."""

    def __init__(self, optimizer=torch.optim.AdamW) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(17, 32), nn.GELU(), nn.Linear(32, 5))
        self.optimizer_class = optimizer

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x).float(), y.float())

    def configure_optimizers(self):
        return self.optimizer_class(self.parameters(), lr=1e-2)


class Seen(L.Callback):
    """Plan, reasons, states and what crossed the link, at the end of training."""

    def on_train_start(self, trainer, module):
        sent = trainer.strategy.assembly.link.bytes
        self.at_first = (sent.d2h, sent.h2d)  # weights, of which masters were made

    def on_train_end(self, trainer, module):
        strategy = trainer.strategy
        assembly = strategy.assembly
        assembly.wait_all_published()
        sent = assembly.link.bytes
        self.link = (sent.d2h - self.at_first[0], sent.h2d - self.at_first[1])
        self.plan, self.told = strategy.plan, strategy.explain()
        self.work = exposure.host_work(assembly)
        self.numel = sum(unit.shard.shard_numel for e in assembly.engines.values() for unit in e.transport.units)
        (optimizer,) = trainer.optimizers
        self.states = {
            (i, key): value.clone()
            for i, p in enumerate(optimizer.param_groups[0]["params"])
            for key, value in optimizer.state[p].items()
            if isinstance(value, torch.Tensor)
        }
        # After the moments, whose reading commits what waits: a master that is behind would depend on the clock.
        self.masters = [
            state.master.clone() for e in assembly.engines.values() for state in e.states if state.master is not None
        ]
        self.choice = assembly.host.link_dtype


def train(link_dtype, *, engine="superoffload", zero=0, precision="bf16-true", make=Net, options=None, **flags):
    """Weights, and what was seen at the end of training."""
    seen, module = Seen(), make()
    offload = {"engine": engine, "bucket_mb": 1, "link_dtype": link_dtype, **(options or {})}
    strategy = lss.SuperScaleStrategy(zero=zero, offload=offload)
    plugin = precision if not isinstance(precision, str) else lss.SuperScalePrecision(precision)
    trainer(strategy, plugins=[plugin], callbacks=[seen], max_epochs=1, **flags).fit(module, loader(8 * NUM_STEPS))
    return {key: value.clone() for key, value in module.state_dict().items()}, seen


def assert_same_training(a, b) -> None:
    (weights, seen), (expected, other) = a, b
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], value) for key, value in expected.items())
    assert all(map(torch.equal, seen.masters, other.masters))
    assert seen.states.keys() == other.states.keys()
    assert len(seen.states) == 3 * 4  # step and moments, so that nothing is compared with nothing
    assert all(torch.equal(seen.states[key], value) for key, value in other.states.items())


@pytest.fixture(autouse=True)
def profile(monkeypatch):
    """A profile of another machine, so that nothing here depends on this one's speed."""
    monkeypatch.setattr(host_plan, "cached_profile", lambda device, cpus: H100)


FLAGS = [
    {},
    {"gradient_clip_val": 0.05},
    {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
]


@pytest.mark.parametrize("engine", ["cpu", "superoffload"])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_fp32_on_the_link_trains_the_same_bits(engine, flags, precision):
    wide = train("fp32", engine=engine, precision=precision, **flags)
    narrow = train("weights", engine=engine, precision=precision, **flags)
    assert_same_training(wide, narrow)
    assert all(a == 2 * b for a, b in zip(wide[1].link, narrow[1].link, strict=True))


@pytest.mark.parametrize("engine", ["cpu", "superoffload"])
def test_an_optimizers_own_step_reads_and_writes_fp32(engine):
    def make():
        return Net(torch.optim.NAdam)

    (weights, _), (expected, _) = (train(choice, engine=engine, make=make) for choice in ("fp32", "weights"))
    assert all(torch.equal(weights[key], value) for key, value in expected.items())


@pytest.mark.parametrize(("engine", "num_buffers"), [("cpu", 1), ("superoffload", 2)])
@pytest.mark.parametrize(("link_dtype", "width"), [("weights", 2), ("fp32", 4)])
def test_bytes_are_those_of_the_plan(monkeypatch, engine, num_buffers, link_dtype, width):
    needed = []
    monkeypatch.setattr(host_plan, "check_host_memory", lambda nbytes, _: needed.append(nbytes))
    _, seen = train(link_dtype, engine=engine)
    trained = sum(p.numel() for p in Net().parameters())
    (buffers,) = [row for row in seen.plan.bytes if row.name == "transfer buffers"]
    assert buffers.dtype == {2: "bfloat16", 4: "float32"}[width]
    assert buffers.arithmetic == f"{num_buffers * width} B x {trained:,}"
    assert buffers.host_bytes == num_buffers * width * seen.numel
    assert seen.plan.host_bytes == (12 + num_buffers * width) * seen.numel
    assert needed == [(12 + num_buffers * width) * trained]
    assert (seen.work.num_params, seen.work.link_bytes) == (seen.numel, width * seen.numel)
    # Gradients leave parameter by parameter, without padding.
    assert seen.link == (NUM_STEPS * width * trained, NUM_STEPS * width * seen.numel)


def test_weights_of_fp32_are_what_they_were():
    (weights, seen), (expected, other) = (train(choice, precision="32-true") for choice in ("fp32", "weights"))
    assert all(torch.equal(weights[key], value) for key, value in expected.items())
    assert seen.link == other.link
    assert "gradients and new weights travel in the weights' dtype: trainable weights are fp32" in seen.told


@pytest.mark.parametrize(("found", "choice"), [(H100, "weights"), (SUPERCHIP, "fp32"), (None, "weights")])
def test_auto_follows_the_profile_and_explain_says_why(monkeypatch, found, choice):
    monkeypatch.setattr(host_plan, "cached_profile", lambda device, cpus: found)
    _, seen = train("auto", precision="bf16-true")
    assert seen.choice == choice
    (told,) = [line for line in seen.told.splitlines() if "gradients and new weights travel" in line]
    assert ("the device casts" if choice == "fp32" else "the host casts") in told
    if found is not None:
        assert f"(kernel {found.adamw_ns_per_param:.2f} ns)" in told
        assert f"(kernel {found.adamw_fp32_ns_per_param:.2f} ns)" in told


def test_auto_gives_fp32_up_where_only_16_bits_fit_the_host(monkeypatch):
    monkeypatch.setattr(host_plan, "cached_profile", lambda device, cpus: SUPERCHIP)
    trained, asked = sum(p.numel() for p in Net().parameters()), []

    def fits(needed):
        asked.append(needed)
        return needed <= 19 * trained

    monkeypatch.setattr(host_plan, "fits_host_memory", fits)
    _, seen = train("auto")
    assert (asked, seen.choice) == ([20 * trained], "weights")
    assert "fp32 would be faster, and takes more host memory than there is" in seen.told
    _, seen = train("auto", engine="cpu")  # one transfer buffer less
    assert (asked[1:], seen.choice) == ([16 * trained], "fp32")
    asked.clear()
    _, seen = train("fp32")  # what was asked for is not replaced
    assert (asked, seen.choice) == ([], "fp32")


def test_auto_keeps_the_weights_dtype_where_nothing_else_works(monkeypatch):
    monkeypatch.setattr(host_plan, "cached_profile", lambda device, cpus: SUPERCHIP)
    low = lss.SuperScalePrecision("bf16-true", optimizer_states="bf16")
    _, seen = train("auto", precision=low)
    assert seen.choice == "weights"
    assert "travel in the weights' dtype: the host keeps 16-bit states, and rounds them where it steps" in seen.told


@pytest.mark.parametrize("key", ["master_weights", "optimizer_states"])
def test_fp32_is_refused_with_low_precision_states(key):
    low = lss.SuperScalePrecision("bf16-true", **{key: "bf16"})
    with pytest.raises(
        lss.SuperScaleError, match=rf"link_dtype='fp32' can't work with SuperScalePrecision.{key}='bf16'"
    ):
        train("fp32", precision=low)


def test_weights_that_would_flow_stay_for_fp32():
    """A device too small for the model: "auto" weights would flow, but the link's dtype was asked for."""

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])

    chosen = [
        choose_weights(lss.OffloadConfig(link_dtype=dtype), lss.ZeroConfig(), Blocks(), 100)
        for dtype in ("auto", "fp32")
    ]
    assert [choice.flow for choice in chosen] == [True, False]
    assert "link_dtype='fp32' moves new weights to a device that keeps them" in chosen[1].reason


def _over_ranks(rank: int, world_size: int):
    host_plan.cached_profile = lambda device, cpus: H100 if rank else SUPERCHIP
    results = []
    for zero in (0, 2, 3):
        for engine in ("cpu", "superoffload"):
            for flags in (FLAGS[0], FLAGS[3]) if IS_ALL else FLAGS[3:]:  # accumulated and clipped
                runs = [
                    train(choice, engine=engine, zero=zero, devices=world_size, **flags)
                    for choice in ("fp32", "weights")
                ]
                results.append((zero, engine, [(w, s.masters, s.states, s.link) for w, s in runs]))
    choices = []
    for has_room in (True, rank == 0):
        host_plan.fits_host_memory = lambda needed, has_room=has_room: has_room
        _, auto = train("auto", zero=2, devices=world_size)
        choices.append(auto.choice)
    return results, choices


def test_ranks_train_the_same_bits_and_take_rank_0s_choice():
    for results, choices in run_ranks(2, _over_ranks, limit_s=120):
        assert choices == ["fp32", "weights"]  # the second time rank 1 has too little memory
        for zero, engine, (wide, narrow) in results:
            assert all(torch.equal(value, narrow[0][key]) for key, value in wide[0].items()), (zero, engine)
            assert all(map(torch.equal, wide[1], narrow[1])), (zero, engine)
            assert len(wide[2]) == 12
            assert all(torch.equal(value, narrow[2][key]) for key, value in wide[2].items()), (zero, engine)
            assert narrow[3][1] > 0
            assert [2 * b for b in narrow[3]] == list(wide[3]), (zero, engine)
