"""Settings are checked where they are given, and an error names the key and the remedy."""

from __future__ import annotations

import dataclasses
import zipfile
from typing import get_type_hints

import pytest
import torch

import lightning_superscale as lss
from lightning_superscale.config import (
    OffloadConfig,
    SequenceConfig,
    ZenFlowConfig,
    ZeroConfig,
    resolve_offload,
    resolve_sequence,
    resolve_zero,
)
from lightning_superscale.errors import SuperScaleError


def test_option_surface_is_what_the_docs_say():
    assert [f.name for f in dataclasses.fields(ZeroConfig)] == [
        "stage",
        "bucket_mb",
        "shard_size",
        "no_sync",
        "wrap",
        "assume_elementwise",
        "tensor_parallel",
    ]
    assert [f.name for f in dataclasses.fields(OffloadConfig)] == [
        "engine",
        "bucket_mb",
        "pin_memory",
        "cpu_threads",
        "speculate",
        "weights",
        "wrap",
        "gpu_fraction",
        "link_dtype",
        "zenflow",
    ]
    assert [f.name for f in dataclasses.fields(ZenFlowConfig)] == [
        "topk",
        "update_interval",
        "select_interval",
        "overlap",
        "delay_correction",
        "deferred_lr",
        "warmup_steps",
        "accumulate_on",
        "exclude",
    ]
    assert [f.name for f in dataclasses.fields(SequenceConfig)] == [
        "size",
        "mode",
        "head_chunks",
        "dims",
        "check_batches",
        "token_wise",
        "verify",
        "tile_loss",
        "tile_mlp",
        "mlps",
        "checkpoint_blocks",
        "offload_activations",
        "boundary_bits",
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("superofload", "unknown offload engine 'superofload'.*did you mean 'superoffload'"),
        ("gpu", "unknown offload engine 'gpu': expected one of 'cpu', 'superoffload'"),
        ({"engine": "zenflow", "zenflow": {"top": 0.1}}, "offload.zenflow has no key 'top'.*did you mean 'topk'"),
        ({"engine": "cpu", "zenflow": {}}, "OffloadConfig.zenflow holds the options of engine='zenflow'.*engine='cpu'"),
        (
            {"engine": "zenflow", "zenflow": {"deferred_lr": "none"}},
            "deferred_lr='none' counts a window as one step of Adam.*found topk=0.1.*Use 'linear'",
        ),
        ({"engin": "cpu"}, "offload has no key 'engin'.*did you mean 'engine'"),
        ({"bucket_mb": 0}, "OffloadConfig.bucket_mb must be a whole number of at least 1, found 0"),
        ({"cpu_threads": "many"}, "OffloadConfig.cpu_threads must be a whole number"),
        ({"weights": "flows"}, "OffloadConfig.weights must be one of 'auto', .*found 'flows'.*did you mean 'flow'"),
        ({"weights": "flow", "gpu_fraction": 0.5}, "weights='flow' keeps weights off the device.*gpu_fraction=0.5"),
        ({"link_dtype": "fp23"}, "OffloadConfig.link_dtype must be one of 'auto', .*found 'fp23'.*did you mean 'fp32'"),
        (
            {"link_dtype": "fp32", "weights": "flow"},
            "weights='flow' streams weights.*found link_dtype='fp32'",
        ),
        ({"wrap": ["Block"]}, "OffloadConfig.wrap chooses what weights='flow' streams together.*weights='auto'"),
        (3, "offload takes None, 'cpu', 'superoffload', 'zenflow', an OffloadConfig or a mapping, found 3"),
    ],
)
def test_bad_offload_is_refused_with_the_remedy(value, message):
    with pytest.raises(SuperScaleError, match=message):
        resolve_offload(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (4, "ZeroConfig.stage must be 0, 1, 2 or 3, found 4"),
        ({"stage": 2, "shard_size": 0}, "ZeroConfig.shard_size must be a whole number of at least 1, found 0"),
        (
            {"stage": 2, "wrap": ["Block"]},
            "ZeroConfig.wrap chooses what stage 3 gathers together; found it with stage 2",
        ),
        ({"no_sync": "never"}, "ZeroConfig.no_sync must be true, false or 'auto', found 'never'"),
        (
            {"stage": 3, "tensor_parallel": 0},
            "ZeroConfig.tensor_parallel must be a whole number of at least 1, found 0",
        ),
        (
            {"stage": 2, "tensor_parallel": 2},
            r"tensor_parallel=2 works in stage 3 only; found stage 2. Use ZeroConfig\(stage=3\), or remove",
        ),
        (
            {"stage": 3, "tensor_parallel": 2, "shard_size": 2},
            "tensor_parallel=2 can't be combined with shard_size=2.*Remove shard_size",
        ),
        ("zero", "zero takes 0, 1, 2, 3, a ZeroConfig or a mapping, found 'zero'"),
        ({"stag": 0}, "zero has no key 'stag'.*did you mean 'stage'"),
    ],
)
def test_bad_zero_is_refused_with_the_remedy(value, message):
    with pytest.raises(SuperScaleError, match=message):
        resolve_zero(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "SequenceConfig.size must be a whole number of at least 1, found 0"),
        (True, "sequence takes None, a number of ranks, a SequenceConfig or a mapping, found True"),
        ("2", "sequence takes None, a number of ranks, a SequenceConfig or a mapping, found '2'"),
        ({"sise": 2}, "sequence has no key 'sise'.*did you mean 'size'"),
        ({"verify": "first_batch"}, "SequenceConfig.verify='first_batch' compares .* size=1 shares none; set size"),
        ({"size": 2, "mode": "ulyses"}, "SequenceConfig.mode must be one of 'auto', .*did you mean 'ulysses'"),
        (
            {"dims": {"input_ids": "1"}},
            "SequenceConfig.dims must be a mapping of names to whole numbers, found {'input_ids': '1'}",
        ),
    ],
)
def test_bad_sequence_is_refused_with_the_remedy(value, message):
    with pytest.raises(SuperScaleError, match=message):
        resolve_sequence(value)


def test_a_sequence_is_shared_by_a_number_of_ranks_or_by_none():
    assert resolve_sequence(None) is None
    assert resolve_sequence(1) == SequenceConfig() == SequenceConfig(size=1)
    assert resolve_sequence({"size": 4, "mode": "ring"}) == SequenceConfig(size=4, mode="ring")
    assert lss.SuperScaleStrategy().sequence_config is None
    assert lss.ZenFlowStrategy(sequence=2).sequence_config == SequenceConfig(size=2)


def test_a_mapping_is_taken_wherever_a_config_is():
    strategy = lss.SuperScaleStrategy(zero={"stage": 0, "bucket_mb": 7}, offload={"engine": "cpu", "bucket_mb": 3})
    assert lss.ZeroStrategy(sequence={"size": 3}).sequence_config == SequenceConfig(size=3)
    assert strategy.zero_config == ZeroConfig(bucket_mb=7)
    assert strategy.offload_config == OffloadConfig(engine="cpu", bucket_mb=3)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        OffloadConfig().bucket_mb = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "config",
    [
        lss.OffloadConfig(engine="cpu"),
        lss.ZeroConfig(stage=2),
        lss.CheckpointConfig(),
        lss.SequenceConfig(size=2, dims={"input_ids": 1}),
    ],
)
def test_checkpoints_know_configs_by_their_public_module(config, tmp_path):
    """As those do that hold one as a hyperparameter, of versions whose configs were one file."""
    name = type(config).__name__
    torch.save({"hyper_parameters": {"config": config}}, tmp_path / "saved.ckpt")
    with zipfile.ZipFile(tmp_path / "saved.ckpt") as saved:
        written = saved.read(next(entry for entry in saved.namelist() if entry.endswith("data.pkl")))
    assert f"clightning_superscale.config\n{name}\n".encode() in written
    with torch.serialization.safe_globals([type(config)]):
        assert torch.load(tmp_path / "saved.ckpt", weights_only=True)["hyper_parameters"]["config"] == config
    assert get_type_hints(type(config)).keys() == {field.name for field in dataclasses.fields(config)}
