"""Weight flow through the Trainer: plain Lightning's bits, wherever weights are read, changed, saved or resumed."""

from __future__ import annotations

import re

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightning_superscale as lss
from lightning_superscale.config import OffloadConfig
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.optim.weights.param_classes import set_data
from lightning_superscale.plugins.trainer.sharded_ema import ShardedEMAMixin
from lightning_superscale.run.weight_flow import place_resident
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import assert_same_weights, loader, trainer

BUCKET_MB = 1
FLOW = OffloadConfig(weights="flow")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(33)
        self.up = nn.Linear(33, 40)
        self.down = nn.Linear(40, 33)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Deep(L.LightningModule):
    """Blocks with buffers, one of them frozen and one partly, groups, a scheduler, and what no block owns."""

    def __init__(self, use_reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inp = nn.Linear(17, 33)
        self.blocks = nn.ModuleList(Residual() for _ in range(5))
        self.blocks[2].requires_grad_(False)
        self.blocks[3].up.requires_grad_(False)
        self.out = nn.Linear(33, 5)
        self.use_reentrant = use_reentrant
        self.most_device_bytes = 0

    def forward(self, x):
        h = self.inp(x)
        for block in self.blocks:
            if self.use_reentrant is None or not self.training:
                h = block(h)
            else:
                h = checkpoint(block, h, use_reentrant=self.use_reentrant)
            self.most_device_bytes = max(self.most_device_bytes, device_bytes(self))
        return self.out(h)

    def loss(self, batch) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self(x).float(), y.float())

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        decayed = [p for p in self.parameters() if p.ndim > 1]
        rest = [p for p in self.parameters() if p.ndim < 2]
        optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.3}, {"params": rest, "lr": 3e-3}], lr=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def device_bytes(module) -> int:
    """Bytes of flowing weights on the device: of the storages that units were given, and nothing else."""
    strategy = module._trainer.strategy if module._trainer is not None else None
    flow = strategy.run.flow if isinstance(strategy, lss.SuperScaleStrategy) else None
    if flow is None:
        return 0
    return sum(weights.device_bytes for block in flow._blocks for weights in block.weights)


def strategy(engine: str = "superoffload", weights: str = "flow", **options) -> lss.SuperScaleStrategy:
    return lss.SuperScaleStrategy(offload=OffloadConfig(engine=engine, weights=weights, bucket_mb=BUCKET_MB, **options))


def fit(module, how, *, validate: bool = False, **flags) -> L.Trainer:
    run = trainer(how, **flags)
    run.fit(module, loader(), loader() if validate else None)
    return run


ENGINES = ("cpu", "superoffload")
FLAGS = {
    "plain": {},
    "clip": {"gradient_clip_val": 0.05},
    "accumulate and clip by value": {
        "accumulate_grad_batches": 4,
        "gradient_clip_val": 0.003,
        "gradient_clip_algorithm": "value",
    },
    "validate": {"validate": True},
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS.keys())
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("engine", ENGINES)
def test_fit_equals_the_run_whose_weights_stay(engine, precision, flags):
    """With fp32 weights that is plain Lightning; with bf16 weights, superscale with masters on the device."""
    plain, ours = Deep(), Deep()
    fit(plain, "superscale" if precision == "bf16-true" else "auto", precision=precision, **flags)
    run = fit(ours, strategy(engine), precision=precision, **flags)
    assert 0 < ours.most_device_bytes < run.num_training_batches * 10**9
    assert_same_weights(ours, plain)
    assert all(type(p) is nn.Parameter and p.untyped_storage().nbytes() == p.nbytes for p in ours.blocks.parameters())


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("precision", ["16-true", "16-mixed"])
@pytest.mark.parametrize("engine", ENGINES)
def test_fp16_with_steps_that_overflow(engine, precision):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)  # some steps overflow
    plain, ours = Deep(), Deep()
    for module, how in ((plain, "superscale"), (ours, strategy(engine))):
        plugin = lss.SuperScalePrecision(precision, scaler=scaler)
        fit(module, how, plugins=[plugin], gradient_clip_val=0.05)
    assert_same_weights(ours, plain)
    assert not torch.equal(ours.out.weight, Deep().out.weight.to(ours.out.weight.dtype))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("engine", ENGINES)
def test_activation_checkpointing(engine, use_reentrant):
    plain, ours = Deep(use_reentrant), Deep(use_reentrant)
    fit(plain, "auto", accumulate_grad_batches=2)
    fit(ours, strategy(engine), accumulate_grad_batches=2)
    assert_same_weights(ours, plain)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_no_more_than_three_blocks_are_on_the_device(precision):
    class Watched(Deep):
        def on_fit_start(self):
            self.bound = self.trainer.strategy.plan

        def on_train_batch_end(self, *_):
            assert device_bytes(self) == 0

    module = Watched()
    run = trainer(strategy(), precision=precision)
    run.fit(module, loader(), loader())
    row = next(row for row in module.bound.bytes if row.name == "weights (flowing)")
    assert row.arithmetic == "at most 3 of 5 blocks at a time"
    assert row.device_bytes == module.most_device_bytes


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("engine", ENGINES)
def test_resumed_run_equals_the_uninterrupted_one(engine, precision, tmp_path):
    straight, first, resumed = Deep(), Deep(), Deep()
    fit(straight, strategy(engine, "stationary"), precision=precision, max_epochs=4)
    fit(first, strategy(engine), precision=precision, max_epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    run = trainer(strategy(engine), precision=precision, max_epochs=4)
    run.fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert_same_weights(resumed, straight)


def test_a_checkpoint_in_the_middle_holds_the_weights_and_is_plain_lightnings(tmp_path):
    class Saving(Deep):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.global_step == 3:
                self.trainer.save_checkpoint(tmp_path / f"{type(self.trainer.strategy).__name__}.ckpt")

    plain, ours = Saving(), Saving()
    fit(plain, "auto")
    fit(ours, strategy())
    saved = [torch.load(path, weights_only=False)["state_dict"] for path in sorted(tmp_path.iterdir())]
    assert len(saved) == 2
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])
    resumed = []
    for path in sorted(tmp_path.iterdir()):
        resumed.append(Deep())
        trainer("auto", max_epochs=2).fit(resumed[-1], loader(), ckpt_path=path)
    assert_same_weights(*resumed)


def test_evaluation_streams_without_training(tmp_path):
    plain, ours = Deep(), Deep()
    expected, run = trainer("auto"), trainer(strategy())
    assert expected.validate(plain, loader(), verbose=False) == run.validate(ours, loader(), verbose=False)
    assert 0 < ours.most_device_bytes < sum(p.nbytes for p in ours.blocks.parameters())
    assert expected.test(plain, loader(), verbose=False) == run.test(ours, loader(), verbose=False)
    assert all(map(torch.equal, expected.predict(plain, loader()), run.predict(ours, loader())))
    run.fit(ours, loader())
    assert_same_weights(ours, fit_again(plain, expected))


def fit_again(module, run):
    run.fit(module, loader())
    return module


class Clamped(Deep):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            for param in self.blocks[1].parameters():
                param.clamp_(-0.05, 0.05)
            self.blocks[2].up.weight.mul_(0.99)  # frozen


class Summed(Deep):
    """Reads every weight where no block runs."""

    def training_step(self, batch, batch_idx):
        penalty = sum(p.square().sum() for p in self.parameters() if p.requires_grad)
        return self.loss(batch) + 1e-2 * penalty


class Halved(Deep):
    def on_after_backward(self):
        for param in self.blocks[1].parameters():
            param.grad.mul_(0.5)
            param.grad.add_(param.detach(), alpha=0.01)


class Looking(Deep):
    """Runs the model between backward and step, and may change weights while they are still there."""

    def on_before_optimizer_step(self, optimizer):
        with torch.no_grad():
            self(torch.ones(4, 17))
            if self.global_step % 2:
                for block in self.blocks:
                    block.up.weight.mul_(0.99)


class Manual(Deep):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()
        first, second = self.loss(batch), self.loss([t * 0.5 for t in batch])
        self.manual_backward(first, retain_graph=True)
        second.backward()
        first.backward()
        self.clip_gradients(optimizer, 0.05)
        optimizer.step()
        scheduler.step()


class Alternating(Deep):
    """Two optimizers in turn, as adversarial training has."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        one = torch.optim.AdamW(self.blocks[:3].parameters(), lr=1e-2)
        return one, torch.optim.SGD([*self.blocks[3:].parameters(), *self.out.parameters()], lr=1e-2, momentum=0.9)

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()


class Foreign(Deep):
    def configure_optimizers(self):
        return torch.optim.Adagrad(self.parameters(), lr=1e-2)


class Skipping(Deep):
    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        return None if batch_idx % 2 else loss


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`")
@pytest.mark.parametrize("cls", [Clamped, Summed, Halved, Looking, Manual, Alternating, Foreign, Skipping])
@pytest.mark.parametrize("engine", ENGINES)
def test_what_users_read_and_change(engine, cls):
    plain, ours = cls(), cls()
    fit(plain, "auto", max_epochs=3)
    fit(ours, strategy(engine), max_epochs=3)
    assert_same_weights(ours, plain)


class Thaw(BaseFinetuning):
    def freeze_before_training(self, module):
        self.freeze([module.blocks[0], module.blocks[4].down], train_bn=False)

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(
                [module.blocks[0], module.blocks[4].down], optimizer, lr=1e-2, train_bn=False
            )


class OfTrained(Deep):
    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


@pytest.mark.parametrize(
    "callback", [Thaw, lambda: EMAWeightAveraging(decay=0.5), lambda: EMA(0.5)], ids=["thaw", "ema", "ours"]
)
@pytest.mark.parametrize("engine", ENGINES)
def test_callbacks_that_change_weights(engine, callback):
    plain, ours = OfTrained(), OfTrained()
    expected = fit(plain, "auto", validate=True, max_epochs=3, callbacks=[callback()])
    run = fit(ours, strategy(engine), validate=True, max_epochs=3, callbacks=[callback()])
    assert_same_weights(ours, plain)
    assert torch.equal(run.callback_metrics["val_loss"], expected.callback_metrics["val_loss"])


class EMA(ShardedEMAMixin, L.Callback):
    pass


def test_weights_made_on_the_meta_device_start_in_host_memory():
    with torch.device("meta"):
        ours = Deep()
    torch.manual_seed(5)
    fit(ours, strategy())
    with torch.device("meta"):
        plain = Deep()
    torch.manual_seed(5)
    fit(plain, strategy(weights="stationary"))
    assert_same_weights(ours, plain)


def test_what_flows_is_never_moved_to_the_device():
    """The meta device stands for one that is not the host."""
    module = Deep()
    flowing = list(module.blocks.parameters())
    kept = [(param, param.data_ptr(), param.detach().clone()) for param in flowing]
    place_resident(module, flowing, torch.device("meta"))
    assert all(p.data_ptr() == pointer and torch.equal(p, weight) for p, pointer, weight in kept)
    rest = [*module.inp.parameters(), *module.out.parameters(), *module.buffers()]
    assert all(tensor.is_meta for tensor in rest)
    assert module.device.type == "meta"


def test_too_little_host_memory_counts_what_is_copied(monkeypatch):
    needed = []
    monkeypatch.setattr("lightning_superscale.run.host_plan.check_host_memory", lambda nbytes, _: needed.append(nbytes))
    module = Deep()
    fit(module, strategy(), max_steps=1)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert needed == [trained * (12 + 2 * 4)]  # the third buffer takes the place of the parameters' own memory


def test_explain_says_what_flows_and_counts_its_bytes():
    class Told(Deep):
        def on_train_end(self):
            self.told, self.plan = self.trainer.strategy.explain(), self.trainer.strategy.plan

    module = Told()
    fit(module, strategy(), precision="bf16-true")
    assert "weights of 5 blocks" in module.told
    assert "weights (flowing)" in module.told
    rows = {row.name: row for row in module.plan.bytes}
    trained = sum(p.numel() for p in module.blocks.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in module.blocks.parameters() if not p.requires_grad)
    assert rows["weights (host copy)"].host_bytes >= 2 * trained
    assert rows["weights (host copy)"].arithmetic == f"2 B x {trained:,}"
    assert rows["frozen (host copy)"].host_bytes == 2 * frozen
    resident = sum(p.numel() for p in [*module.inp.parameters(), *module.out.parameters()])
    assert rows["weights"].arithmetic == f"2 B x {resident:,}"
    plain = Told()
    fit(plain, strategy(weights="auto"))
    assert "weights stay on the device: device memory is host memory here" in plain.told


class Blockless(L.LightningModule):
    loss, training_step, configure_optimizers = Deep.loss, Deep.training_step, Deep.configure_optimizers

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(17, 5)

    def forward(self, x):
        return self.out(x)


@pytest.mark.parametrize(
    ("module", "share_of_need", "options", "flows", "reason"),
    [
        (Deep, 1.3, {}, True, "of the device, in forward and in backward.* they take .* of .* that are free there"),
        (Deep, 1.4, {}, False, "weights stay on the device: they take .* that are free there"),
        (Deep, 1.0, {"gpu_fraction": 0.5}, False, r"free there, but gpu_fraction=0\.5 keeps states there"),
        (Blockless, 1.0, {}, False, "free there, but the model has no repeated blocks to stream"),
    ],
)
def test_auto_lets_weights_flow_that_would_crowd_the_device(monkeypatch, module, share_of_need, options, flows, reason):
    """The device's free memory is made up."""
    trained = module()
    needed = sum(p.nbytes for p in trained.parameters())
    free = int((share_of_need - 1) * needed)  # beside the weights, which are in this device's memory already
    monkeypatch.setattr("lightning_superscale.run.weight_flow.free_device_bytes", lambda device: free)
    told = []

    class Tells(L.Callback):
        def on_train_end(self, trainer, pl_module):
            told.append((trainer.strategy.explain(), trainer.strategy.run.flow is not None))

    fit(trained, strategy(weights="auto", **options), callbacks=[Tells()])
    [(explained, has_flow)] = told
    assert has_flow == flows
    assert re.search(reason, explained)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lss.SuperScaleStrategy(zero=3, offload=FLOW), "zero=3 shards them"),
        (lambda: trainer(lss.SuperScaleStrategy(zero=3, offload=FLOW), devices=2), "zero=3 shards them"),
        (lambda: strategy(wrap=["Residuals"]), "wrap='Residuals' matches no module"),
    ],
)
def test_what_cannot_flow_is_refused_before_training(make, message):
    with pytest.raises(SuperScaleError, match=message):
        fit(Deep(), make())


def test_compiled_models_and_models_without_blocks_are_refused():
    compiled = Deep()
    compiled.blocks[0].compile()
    with pytest.raises(SuperScaleError, match="without torch.compile.*weights='stationary'"):
        fit(compiled, strategy())
    whole = torch.compile(Deep(), backend="eager")
    with pytest.raises(SuperScaleError, match="without torch.compile"):
        fit(whole, strategy())
    single = Deep()
    single.blocks = nn.ModuleList([Residual()])
    single.configure_optimizers = lambda: torch.optim.AdamW(single.parameters())
    with pytest.raises(SuperScaleError, match="Deep has none.*OffloadConfig.wrap"):
        fit(single, strategy())


class Backwards(Deep):
    """Runs its blocks in another order than it registered them, so that units move after the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.ModuleList(reversed(self.blocks))

    def forward(self, x):
        h = self.inp(x)
        for block in self.used:
            h = block(h)
        return self.out(h)

    def on_train_batch_start(self, *_):
        strategy = self.trainer.strategy
        if isinstance(strategy, lss.SuperScaleStrategy):
            (engine,) = strategy.assembly.engines.values()
            of_blocks = [{strategy.run.flow.block_of.get(p) for p in unit.params} for unit in engine.transport.units]
            assert all(len(blocks) == 1 for blocks in of_blocks)
            self.order = [blocks.pop() for blocks in of_blocks]
            frozen = 2  # one block, and a layer of another
            held = [weights for block in strategy.run.flow._blocks for weights in block.weights]
            assert len(held) == sum(block is not None for block in self.order) + frozen


@pytest.mark.parametrize("engine", ENGINES)
def test_units_that_move_after_the_first_step_stay_within_their_blocks(engine):
    plain, ours = Backwards(), Backwards()
    fit(plain, "auto")
    fit(ours, strategy(engine))
    assert_same_weights(ours, plain)
    assert [block for block in ours.order if block is not None] == [0, 1, 3, 4]  # as backward meets them


def test_an_interrupted_fit_leaves_a_whole_module():
    class Failing(Deep):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            if self.global_step == 2:
                raise ValueError("stop")
            return loss

    module = Failing()
    with pytest.raises(ValueError, match="stop"):
        fit(module, strategy())
    plain = Deep()
    fit(plain, "auto", max_steps=2)
    for (fqn, ours), expected in zip(module.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, expected), fqn
        assert ours.untyped_storage().nbytes() == ours.nbytes


def test_named_modules_flow_and_the_rest_stays():
    plain, ours = Deep(), Deep()
    fit(plain, "auto")
    fit(ours, strategy(wrap=["inp", "Residual"]))
    assert_same_weights(ours, plain)


def _on_ranks(rank: int, world_size: int):
    """What differs between DDP and flowing weights, each rank with batches of its own."""
    differing = []
    for engine in ENGINES:
        for flags in (FLAGS["plain"], FLAGS["clip"], FLAGS["accumulate and clip by value"]):
            plain, ours = Deep(), Deep()
            fit(plain, DDPStrategy(), devices=world_size, **flags)
            fit(ours, strategy(engine), devices=world_size, **flags)
            assert ours.most_device_bytes > 0
            for (name, expected), found in zip(plain.state_dict().items(), ours.state_dict().values(), strict=True):
                if "running" not in name and not torch.equal(found, expected):
                    differing.append((engine, flags, name))
    return differing


def test_several_ranks_with_states_of_their_own_equal_ddp():
    assert run_ranks(2, _on_ranks) == [[], []]


class Repeated(Deep):
    """Uses its blocks three times in a forward, so that they leave the device and come back in between."""

    def forward(self, x):
        h = self.inp(x)
        for block in [*self.blocks, *self.blocks, *self.blocks]:
            h = block(h)
        return self.out(h)


class RepeatedWithSGD(Repeated):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.fixture
def forgets_accumulators(monkeypatch):
    """Data of another dtype in between does to autograd what data of another device does: it drops accumulators."""

    def through_float64(param, value):
        set_data(param, value.to(torch.float64))
        set_data(param, value)

    monkeypatch.setattr("lightning_superscale.offload.weight_flow.weights.set_data", through_float64)


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_of_a_block_that_left_between_its_uses_add_up(engine, forgets_accumulators):
    flowing, expected = Repeated(), Repeated()
    flags = {"gradient_clip_val": 0.05}
    fit(flowing, strategy(engine), **flags)
    fit(expected, strategy(engine, "stationary"), **flags)
    assert_same_weights(flowing, expected)


def test_micro_batches_of_such_a_block_add_up_but_for_the_order(forgets_accumulators):
    """Plain autograd adds up the uses of one backward first. Here each is added to the sum of micro-batches.

    That sum has six terms, each of which rounds by half an ulp of a partial sum; weights of SGD with lr=1 show it.
    """
    flowing, expected = RepeatedWithSGD(), RepeatedWithSGD()
    flags = {"accumulate_grad_batches": 2, "max_steps": 1}
    fit(flowing, strategy("cpu"), **flags)
    fit(expected, strategy("cpu", "stationary"), **flags)
    for ours, its in zip(flowing.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, its, rtol=6 * 2**-24, atol=6 * 2**-24)


class OtherDevice(Deep):
    """Raises what torch raises on a GPU where host tensors meet those of the device."""

    def __init__(self, where):
        super().__init__()
        self.where = where

    def on_a_gpu(self, where):
        if where == self.where:
            raise RuntimeError("Expected all tensors to be on the same device, but found cuda:0 and cpu!")

    def training_step(self, batch, batch_idx):
        self.on_a_gpu("training")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.on_a_gpu("validation")

    def on_before_optimizer_step(self, optimizer):
        self.on_a_gpu("hook")


@pytest.mark.parametrize("where", ["training", "validation"])
def test_a_weight_outside_of_its_block_is_named_where_it_meets_the_device(where):
    with pytest.raises(SuperScaleError, match="a weight of a block was used outside of the block.*weight_decay.*Torch"):
        fit(OtherDevice(where), strategy(), validate=True)


@pytest.mark.skipif(not hasattr(BaseException, "add_note"), reason="exceptions take notes from Python 3.11 on")
def test_a_weight_that_a_hook_uses_outside_of_its_block_is_named_in_a_note():
    with pytest.raises(RuntimeError, match="same device") as caught:
        fit(OtherDevice("hook"), strategy())
    assert len(caught.value.__notes__) == 1
    assert "a weight of a block was used outside of the block" in caught.value.__notes__[0]
