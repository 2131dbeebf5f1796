"""LightningCLI in both parser modes: names, nested mappings, overrides, and misspelt keys refused by name."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

import lightning_superscale as lss
from tests.helpers.trainers import Regressor, loader

BASE = {
    "accelerator": "cpu",
    "devices": 1,
    "max_steps": 2,
    "logger": False,
    "enable_progress_bar": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}


class Trained(Regressor):
    def train_dataloader(self):
        return loader()


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])


def run(tmp_path, trainer: dict, *arguments: str, mode: str = "yaml") -> LightningCLI:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"trainer": {**BASE, **trainer}}))
    return LightningCLI(
        Trained,
        args=["fit", "--config", str(path), *arguments],
        save_config_callback=None,
        seed_everything_default=1,
        parser_kwargs={"parser_mode": mode},
    )


@pytest.fixture(params=["yaml", "omegaconf"])
def mode(request):
    return request.param


def test_strategy_by_name(tmp_path, mode):
    cli = run(tmp_path, {"strategy": "superoffload", "precision": "bf16-true"}, mode=mode)
    assert type(cli.trainer.strategy) is lss.SuperOffloadStrategy
    assert type(cli.trainer.precision_plugin) is lss.SuperScalePrecision
    assert cli.trainer.global_step == 2
    assert cli.model.net[0].weight.dtype == torch.bfloat16


def test_strategy_by_class_path_with_a_nested_config_and_an_override(tmp_path, mode):
    strategy = {"class_path": "lightning_superscale.SuperScaleStrategy", "init_args": {"offload": {"engine": "cpu"}}}
    cli = run(tmp_path, {"strategy": strategy}, "--trainer.strategy.init_args.offload.bucket_mb=5", mode=mode)
    assert cli.trainer.strategy.offload_config == lss.OffloadConfig(engine="cpu", bucket_mb=5)


@pytest.mark.parametrize(
    ("sequence", "override", "expected"),
    [
        (1, [], {"size": 1}),
        ({"mode": "ring"}, ["check_batches=0"], {"mode": "ring", "check_batches": 0}),
        (
            {"dims": {"input_ids": 1, "a.b": 2}},
            ["head_chunks=2"],
            {"dims": {"input_ids": 1, "a.b": 2}, "head_chunks": 2},
        ),
    ],
)
def test_a_sequence_by_number_and_by_mapping_with_an_override(tmp_path, mode, sequence, override, expected):
    strategy = {"class_path": "lightning_superscale.SuperScaleStrategy", "init_args": {"sequence": sequence}}
    overrides = [f"--trainer.strategy.init_args.sequence.{text}" for text in override]
    cli = run(tmp_path, {"strategy": strategy}, *overrides, mode=mode)
    assert cli.trainer.strategy.sequence_config == lss.SequenceConfig(**expected)


def test_short_override_of_a_preset(tmp_path):
    cli = run(
        tmp_path,
        {},
        "--trainer.strategy",
        "lightning_superscale.SuperOffloadStrategy",
        "--trainer.strategy.offload",
        "cpu",
    )
    assert cli.trainer.strategy.offload_config == lss.OffloadConfig(engine="cpu")


def test_class_path_alone_is_a_name(tmp_path):
    cli = run(tmp_path, {"strategy": "lightning_superscale.SuperOffloadStrategy"})
    assert type(cli.trainer.strategy) is lss.SuperOffloadStrategy


def test_omegaconf_resolves_inside_our_configs(tmp_path):
    strategy = {
        "class_path": "lightning_superscale.SuperOffloadStrategy",
        "init_args": {"offload": {"engine": "cpu", "bucket_mb": "${trainer.max_steps}"}},
    }
    cli = run(tmp_path, {"strategy": strategy}, mode="omegaconf")
    assert cli.trainer.strategy.offload_config.bucket_mb == 2


def test_precision_plugin_by_class_path(tmp_path, mode):
    plugin = {"class_path": "lightning_superscale.SuperScalePrecision", "init_args": {"precision": "bf16-mixed"}}
    cli = run(tmp_path, {"strategy": "superscale", "plugins": [plugin]}, mode=mode)
    assert cli.trainer.precision_plugin.precision == "bf16-mixed"


def test_low_precision_states_by_class_path_and_override(tmp_path, mode):
    choices = {"precision": "bf16-true", "master_weights": "bf16", "optimizer_states": "bf16", "kahan": True, "seed": 5}
    plugin = {"class_path": "lightning_superscale.SuperScalePrecision", "init_args": choices}
    cli = run(tmp_path, {"strategy": "superoffload", "plugins": [plugin]}, mode=mode)
    expected = lss.SuperScalePrecision(**choices).choices
    assert cli.trainer.precision_plugin.choices == expected
    assert {state["exp_avg"].dtype for state in cli.trainer.optimizers[0].state.values()} == {torch.bfloat16}


def test_low_precision_that_cannot_work_is_refused_with_the_reason(tmp_path, mode, capsys):
    plugin = {
        "class_path": "lightning_superscale.SuperScalePrecision",
        "init_args": {"precision": "bf16-mixed", "master_weights": "bf16"},
    }
    with pytest.raises((SystemExit, ValueError)) as refused:
        run(tmp_path, {"strategy": "superoffload", "plugins": [plugin]}, mode=mode)
    assert "are fp32 and their own masters" in capsys.readouterr().err + str(refused.value)


@pytest.mark.parametrize(
    ("init_args", "names"),
    [
        ({"offlod": "cpu"}, "offlod"),
        ({"offload": {"engin": "cpu"}}, "engin"),
        ({"offload": "superofload"}, "superofload"),
        ({"offload": {"bucket_mb": 0}}, "OffloadConfig.bucket_mb must be a whole number of at least 1, found 0"),
        ({"zero": {"stage": 2, "tensor_parallel": 2}}, "tensor_parallel=2 works in stage 3 only; found stage 2"),
        ({"sequence": {"size": 0}}, "SequenceConfig.size must be a whole number of at least 1, found 0"),
        ({"sequence": {"mode": "ulyses"}}, "ulyses"),
        ({"zero": 4}, "ZeroConfig.stage must be 0, 1, 2 or 3, found 4"),
        ({"zero": {"stage": 2, "bucket_mb": 2**40}}, "ZeroConfig.bucket_mb must be a whole number from 1 to 2**30"),
        ({"zero": {"stage": 3, "wrap": "Block"}}, "wrap"),
        ({"zero": {"stage": 3, "wrap": [3]}}, "wrap"),
        ({"zero": {"stage": 0, "shard_size": 2}}, "stage 0 shards nothing"),
        ({"offload": {"pin_memory": 1}}, "pin_memory"),
        ({"offload": {"cpu_threads": 2**40}}, "OffloadConfig.cpu_threads must be a whole number from 1 to 4096"),
        ({"offload": {"gpu_fraction": float("nan")}}, "OffloadConfig.gpu_fraction must be a number from 0 to 1"),
        ({"error_if_nonfinite": 3}, "error_if_nonfinite"),
        ({"start_method": "popem"}, "start_method"),
        ({"timeout": -5}, "SuperScaleStrategy.timeout must be a timedelta or a number of seconds"),
    ],
)
def test_misspelt_keys_and_bad_values_are_refused_by_name(tmp_path, mode, init_args, names, capsys):
    strategy = {"class_path": "lightning_superscale.SuperOffloadStrategy", "init_args": init_args}
    with pytest.raises((SystemExit, ValueError, lss.SuperScaleError)) as refused:
        run(tmp_path, {"strategy": strategy}, mode=mode)
    assert names in capsys.readouterr().err + str(refused.value)


def test_a_timeout_in_seconds_or_as_a_time(tmp_path, mode):
    for timeout in (90, 90.0, "0:01:30"):
        strategy = {"class_path": "lightning_superscale.SuperScaleStrategy", "init_args": {"timeout": timeout}}
        assert run(tmp_path, {"strategy": strategy}, mode=mode).trainer.strategy._timeout == timedelta(seconds=90)


def test_misspelt_strategy_name_is_refused(tmp_path):
    with pytest.raises((SystemExit, ValueError), match="invalid strategy name: `strategy='superofload'`"):
        run(tmp_path, {"strategy": "superofload"})
