"""The traps of a third-party sharded strategy that Fabric's loops meet, with one rank. Each test names its trap.

Those of several ranks are in test_traps_over_ranks.py. Trap 2, compiled modules, is in test_strategy.py.
"""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from lightning_superscale import SuperScaleError
from lightning_superscale.plugins.fabric.lightning import UniversalCheckpointIO
from tests.helpers.trainers import dataset
from tests.plugins.fabric.loops import adamw, assert_equal, launched, loop, model

NAMES = ("superscale", "superoffload")


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def test_trap_1_one_rank_keeps_the_users_sampler(name):
    fabric = launched(name)
    loader = fabric.setup_dataloaders(DataLoader(dataset(16), shuffle=True))
    assert isinstance(loader.sampler, RandomSampler)
    fabric.strategy.teardown()


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_trap_3_evaluation_between_steps_leaves_training_exact(name, context):
    def weights(strategy):
        fabric, plain = launched(strategy), model()
        module, optimizer = fabric.setup(plain, adamw(plain))
        outputs = []
        for _ in range(2):
            loop(fabric, module, optimizer)
            with context():
                outputs.append(module.eval()(torch.ones(4, 17)).clone())
            module.train()
        if strategy != "auto":
            fabric.strategy.teardown()
        return dict(plain.state_dict()), outputs

    (own, outputs), (theirs, expected) = weights(name), weights("auto")
    assert_equal(own, theirs)
    assert all(map(torch.equal, outputs, expected))


def test_trap_4_one_process_has_no_launcher_and_runs_in_notebooks(name, monkeypatch):
    monkeypatch.setattr("lightning.fabric.connector._IS_INTERACTIVE", True)
    fabric = launched(name)
    assert fabric.strategy.launcher is None
    fabric.strategy.teardown()


def test_trap_5_after_teardown_the_module_holds_whole_plain_weights(name):
    fabric, plain = launched(name), model()
    module, optimizer = fabric.setup(plain, adamw(plain))
    loop(fabric, module, optimizer)
    fabric.strategy.teardown()
    storages = set()
    for key, tensor in plain.state_dict().items():
        assert type(tensor) is torch.Tensor, key
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), key
        storages.add(tensor.untyped_storage().data_ptr())
    assert len(storages) == len(plain.state_dict())


@pytest.mark.parametrize("flag", [None, True, False])
def test_trap_6_a_checkpoint_of_plain_values_loads_whatever_weights_only_says(name, tmp_path, flag):
    fabric, plain = launched(name), model()
    module, optimizer = fabric.setup(plain, adamw(plain))
    state = {"model": module, "optimizer": optimizer, "best": 0.5, "rates": [1e-3, 1e-4]}
    fabric.save(tmp_path / "saved", state)
    found = {**state, "best": 0.0, "rates": []}
    fabric.load(tmp_path / "saved", found, weights_only=flag)
    assert (found["best"], found["rates"]) == (0.5, [1e-3, 1e-4])
    fabric.strategy.teardown()


class CountingIO(UniversalCheckpointIO):
    saved = 0

    def save_on_all_ranks(self, *args, **kwargs):
        CountingIO.saved += 1
        super().save_on_all_ranks(*args, **kwargs)


def test_trap_7_the_users_checkpoint_io_is_used_and_one_that_writes_on_rank_0_alone_is_refused(name, tmp_path):
    CountingIO.saved = 0
    fabric, plain = launched(name, plugins=[CountingIO()]), model()
    module, optimizer = fabric.setup(plain, adamw(plain))
    fabric.save(tmp_path / "saved", {"model": module, "optimizer": optimizer})
    assert CountingIO.saved == 1
    fabric.strategy.teardown()
    with pytest.raises(SuperScaleError, match="was given a TorchCheckpointIO"):
        launched(name, plugins=[TorchCheckpointIO()])


def test_trap_8_optimizer_objects_groups_and_schedulers_stay_the_users(name):
    fabric, plain = launched(name), model()
    own = adamw(plain)
    params = [list(group["params"]) for group in own.param_groups]
    module, optimizer = fabric.setup(plain, own)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    loop(fabric, module, optimizer)
    scheduler.step()
    assert optimizer.optimizer is own
    assert own.param_groups[0]["lr"] < 1e-2
    for group, before in zip(own.param_groups, params, strict=True):
        assert all(a is b for a, b in zip(group["params"], before, strict=True))
    fabric.strategy.teardown()


@pytest.mark.parametrize("is_added_before", [True, False])
def test_trap_8_a_parameter_group_that_is_added_trains(name, is_added_before):
    def weights(strategy):
        fabric, plain = launched(strategy), model()
        optimizer = torch.optim.AdamW(plain[3].parameters(), lr=1e-2)
        if is_added_before:
            optimizer.add_param_group({"params": list(plain[0].parameters()), "lr": 3e-3})
        module, optimizer = fabric.setup(plain, optimizer)
        loop(fabric, module, optimizer)
        if not is_added_before:
            optimizer.add_param_group({"params": list(plain[0].parameters()), "lr": 3e-3})
        loop(fabric, module, optimizer)
        if strategy != "auto":
            fabric.strategy.teardown()
        return dict(plain.state_dict())

    assert_equal(weights(name), weights("auto"))


def test_trap_8_a_state_dict_of_the_optimizer_alone_is_taken_over(name):
    def weights(strategy):
        fabric, plain = launched(strategy), model()
        module, optimizer = fabric.setup(plain, adamw(plain))
        loop(fabric, module, optimizer)
        kept = optimizer.state_dict()
        loop(fabric, module, optimizer)
        optimizer.load_state_dict(kept)
        loop(fabric, module, optimizer)
        if strategy != "auto":
            fabric.strategy.teardown()
        return dict(plain.state_dict())

    assert_equal(weights(name), weights("auto"))


def test_trap_9_setup_leaves_initial_weights_bit_for_bit(name):
    fabric, plain = launched(name), model()
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    fabric.setup(plain, adamw(plain))
    assert_equal(dict(plain.state_dict()), before)
    fabric.strategy.teardown()


@pytest.mark.parametrize("strategy", ["superscale", "zero3", "superoffload"])
def test_trap_9_a_module_on_the_meta_device_is_initialised_with_its_optimizer(strategy):
    fabric = launched(strategy)
    with torch.device("meta"):
        plain = nn.Sequential(nn.Linear(17, 8), nn.Linear(8, 5))
    module, optimizer = fabric.setup(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2))
    before = {key: value.clone() for key, value in fabric.strategy.get_module_state_dict(plain).items()}
    assert all(value.abs().sum() > 0 for value in before.values())
    loop(fabric, module, optimizer)
    fabric.strategy.teardown()
    for key, value in plain.state_dict().items():
        assert value.device.type == "cpu"
        assert not torch.equal(value, before[key]), key


def test_trap_10_the_sampler_arguments_are_those_of_one_rank(name):
    fabric = launched(name)
    assert fabric.strategy.distributed_sampler_kwargs is None
    fabric.strategy.teardown()


class Callback:
    def __init__(self) -> None:
        self.seen: list[object] = []

    def on_after_optimizer_step(self, strategy, optimizer):
        self.seen.append((strategy.run.phases.num_steps, type(optimizer)))

    def on_epoch_end(self, number):
        self.seen.append(number)


def test_trap_11_callbacks_are_called_after_whole_steps(name):
    callback = Callback()
    fabric, plain = launched(name, callbacks=[callback]), model()
    module, optimizer = fabric.setup(plain, adamw(plain))
    loop(fabric, module, optimizer)
    fabric.call("on_epoch_end", number=7)
    assert callback.seen == [(1, torch.optim.AdamW), (2, torch.optim.AdamW), (3, torch.optim.AdamW), 7]
    fabric.strategy.teardown()


def test_trap_13_collectives_of_one_process_give_what_they_were_given(name):
    fabric = launched(name)
    assert fabric.broadcast({"a": 1}) == {"a": 1}
    assert torch.equal(fabric.all_reduce(torch.tensor(3.0)), torch.tensor(3.0))
    assert torch.equal(fabric.all_gather(torch.tensor([3.0])), torch.tensor([3.0]))
    fabric.barrier()
    fabric.strategy.teardown()
    assert not torch.distributed.is_initialized()
