"""Lightning's strategies: every argument of their constructors is known, and every name that Lightning registers."""

from __future__ import annotations

import inspect

import pytest
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, StrategyRegistry
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_superscale.cli.migrate.deepspeed import known_keys
from lightning_superscale.cli.migrate.lightning_strategies import (
    DEEPSPEED_KEYS,
    NAMES,
    known_arguments,
    migrate_trainer,
)
from lightning_superscale.cli.migrate.source import read_text
from lightning_superscale.cli.migrate.target import Target


def parameters(cls: type) -> set[str]:
    return set(inspect.signature(cls.__init__).parameters) - {"self", "kwargs", "args"}


def test_every_argument_of_deepspeed_strategy_is_known():
    assert parameters(DeepSpeedStrategy) == known_arguments("DeepSpeedStrategy")


def test_every_argument_of_fsdp_strategy_and_of_what_it_passes_on_is_known():
    assert known_arguments("FSDPStrategy") >= parameters(FSDPStrategy)
    passed_on = parameters(FullyShardedDataParallel) - {"module"}
    assert known_arguments("FSDPStrategy") == parameters(FSDPStrategy) | passed_on


def test_every_argument_of_deepspeed_strategy_has_a_key_that_is_known():
    known = known_keys()
    assert all(key in known or key.split(".")[0] in known for key in DEEPSPEED_KEYS.values())


def test_every_registered_name_is_known():
    registered = [name for name in StrategyRegistry.available_strategies() if name.startswith(("deepspeed", "fsdp"))]
    assert set(registered) <= set(NAMES)
    for name in registered:
        _, arguments = NAMES[name]
        found = {key: value for key, value in StrategyRegistry[name]["init_params"].items() if value is not None}
        assert arguments == found, name


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_migrated(name):
    target = Target()
    rows = migrate_trainer({"strategy": name, "precision": "16-mixed"}, target, None)
    assert "unknown" not in {row.fate.outcome for row in rows}
    assert ("offload" in name) == bool(target.offload)
    assert target.precision == ("16-mixed" if name.startswith("fsdp") else "16-true")


def migrated(class_name: str, arguments: dict, **trainer) -> tuple[dict, dict]:
    target = Target()
    strategy = {"class_path": f"lightning.pytorch.strategies.{class_name}", "init_args": arguments}
    rows = migrate_trainer({"strategy": strategy, **trainer}, target, None)
    return target.init_args(), {row.key: row.fate for row in rows}


def test_offload_of_deepspeed_strategy_counts_only_with_its_switch():
    given, fates = migrated("DeepSpeedStrategy", {"offload_optimizer_device": "nvme", "pin_memory": True})
    assert given == {"zero": 2}
    assert fates["offload_optimizer_device"].text == "off: no other argument asks for it"
    given, _ = migrated("DeepSpeedStrategy", {"zero_optimization": False, "offload_optimizer": True})
    assert given == {}


def test_the_loss_scale_of_deepspeed_strategy():
    target = Target()
    strategy = {"class_path": "DeepSpeedStrategy", "init_args": {"initial_scale_power": 10}}
    migrate_trainer({"strategy": strategy, "precision": "16-mixed"}, target, None)
    assert target.scaler == {"init_scale": 1024.0}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {"zero": 3}),
        ({"sharding_strategy": "SHARD_GRAD_OP"}, {"zero": 2}),
        ({"sharding_strategy": "NO_SHARD"}, {}),
        ({"sharding_strategy": "HYBRID_SHARD", "device_mesh": [2, 4]}, {"zero": {"stage": 3, "shard_size": 4}}),
        ({"sharding_strategy": "HYBRID_SHARD"}, {"zero": 3}),
        ({"auto_wrap_policy": ["my.Block"]}, {"zero": {"stage": 3, "wrap": ["Block"]}}),
        ({"cpu_offload": True}, {"zero": 2, "offload": {"engine": "superoffload", "weights": "flow"}}),
        ({"activation_checkpointing": ["a.B"]}, {"zero": 3, "sequence": {"checkpoint_blocks": "auto"}}),
    ],
)
def test_fsdp_arguments(arguments, expected):
    given, fates = migrated("FSDPStrategy", arguments)
    assert given == {**expected, "checkpoint": {}}
    assert "unknown" not in {fate.outcome for fate in fates.values()}


def test_unknown_arguments_are_named():
    for class_name, wrong, right in (
        ("DeepSpeedStrategy", "stages", "stage"),
        ("FSDPStrategy", "cpu_ofload", "cpu_offload"),
    ):
        _, fates = migrated(class_name, {wrong: 1})
        assert fates[wrong].outcome == "unknown"
        assert f"did you mean {right!r}?" in fates[wrong].text


def test_the_trainers_own_arguments_stay():
    target = Target()
    section = {"strategy": "fsdp", "devices": 4, "max_epochs": 3, "gradient_clip_val": 0.5, "precision": "bf16-true"}
    rows = {row.key: row.fate for row in migrate_trainer(section, target, None)}
    assert target.trainer == {"devices": 4, "gradient_clip_val": 0.5}
    assert rows["max_epochs"].text == "stays as it is, and is not printed again"
    assert "FSDP has no masters" in rows["precision"].text


@pytest.mark.parametrize(("given", "expected"), [(16, "16-true"), ("bf16", "bf16-true"), (32, "32-true")])
def test_older_words_of_precisions(given, expected):
    target = Target()
    migrate_trainer({"strategy": "deepspeed_stage_2", "precision": given}, target, None)
    assert target.precision == expected


def test_an_object_of_yaml_is_left_to_the_user():
    environment = {"class_path": "lightning.fabric.plugins.environments.MPIEnvironment"}
    given, fates = migrated("FSDPStrategy", {"cluster_environment": environment})
    assert "cluster_environment" not in given
    assert fates["cluster_environment"].outcome == "none"


def test_the_call_of_a_trainer():
    call = "L.Trainer(devices=8, strategy=DeepSpeedStrategy(stage=1, offload_optimizer=True), precision='16-mixed')"
    target = Target()
    migrate_trainer(read_text(call, "a call")["trainer"], target, None)
    assert target.init_args() == {"zero": 1, "offload": "superoffload"}
    assert (target.precision, target.trainer) == ("16-true", {"devices": 8})


def test_a_set_of_classes_in_a_call():
    target = Target()
    migrate_trainer(read_text("FSDPStrategy(auto_wrap_policy={my.Block, Head})", "a call"), target, None)
    assert target.zero == {"stage": 3, "wrap": ["Block", "Head"]}
