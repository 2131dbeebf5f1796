"""Every value is checked where it is given: the error names the key, what was expected and what was found."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Literal, Optional, Union

import omegaconf
import pytest
import torch
import yaml
from torch import nn

import lightning_superscale as lss
from lightning_superscale.config import resolve_checkpoint, resolve_offload, resolve_sequence, resolve_zero
from lightning_superscale.config.values import Between, check_arguments, checked, duration, shown
from lightning_superscale.errors import SettingError

INF, NAN = float("inf"), float("nan")
# By kind of field, values of every other kind: what careless YAML and careless Python give.
NOT_BOOL = [0, 1, 1.0, "true", "yes", "", [], {}, torch.tensor(True)]
NOT_INT = [True, 1.0, 2.5, 1e30, NAN, INF, "1", "1e3", "", [], [1], {}, None, 0, -1, 2**64, 10**5000]
NOT_SHARE = [True, NAN, INF, -0.5, 1.5, "0.5", "1e-3", [], None, 10**400]
NOT_NAMES = ["Block", b"Block", 3, [1], [None], [["Block"]], {"Block": 1}.values(), True]
NOT_WORD = [None, 0, True, "", "none", ["auto"], {}, NAN]

FIELDS = [
    (lss.ZeroConfig, "stage", [v for v in NOT_INT if v != 0 or v is True] + [4, 3.0], {}),
    (lss.ZeroConfig, "bucket_mb", NOT_INT, {}),
    (lss.ZeroConfig, "shard_size", [v for v in NOT_INT if v is not None], {"stage": 2}),
    (lss.ZeroConfig, "no_sync", [*NOT_BOOL, None], {}),
    (lss.ZeroConfig, "wrap", NOT_NAMES, {"stage": 3}),
    (lss.ZeroConfig, "assume_elementwise", [*NOT_BOOL, None], {}),
    (lss.ZeroConfig, "tensor_parallel", NOT_INT, {"stage": 3}),
    (lss.OffloadConfig, "bucket_mb", NOT_INT, {}),
    (lss.OffloadConfig, "pin_memory", [*NOT_BOOL, None], {}),
    (lss.OffloadConfig, "cpu_threads", [*NOT_INT, 4097, 2**40], {}),
    (lss.OffloadConfig, "speculate", [v for v in NOT_BOOL if v != "auto"] + [None, "on"], {}),
    (lss.OffloadConfig, "weights", NOT_WORD, {}),
    (lss.OffloadConfig, "wrap", NOT_NAMES, {"weights": "flow"}),
    (lss.OffloadConfig, "gpu_fraction", NOT_SHARE, {}),
    (lss.OffloadConfig, "link_dtype", NOT_WORD, {}),
    (lss.OffloadConfig, "zenflow", [0, True, "", "none", [], 0.1], {"engine": "zenflow"}),
    (lss.ZenFlowConfig, "topk", NOT_SHARE, {}),
    (lss.ZenFlowConfig, "update_interval", NOT_INT, {}),
    (lss.ZenFlowConfig, "select_interval", NOT_INT, {}),
    (lss.ZenFlowConfig, "overlap", [*NOT_BOOL, None], {}),
    (lss.ZenFlowConfig, "deferred_lr", [v for v in NOT_WORD if v not in (0, "none")] + [-1, INF], {"topk": 0}),
    (lss.ZenFlowConfig, "warmup_steps", [v for v in NOT_INT if v != 0 or v is True], {}),
    (lss.ZenFlowConfig, "delay_correction", [-0.1, 2.1, True, None, "linear", NAN], {}),
    (lss.ZenFlowConfig, "accumulate_on", [*NOT_WORD, "cpu", "gpu"], {}),
    (lss.ZenFlowConfig, "exclude", NOT_NAMES, {}),
    (lss.SequenceConfig, "size", NOT_INT, {}),
    (lss.SequenceConfig, "mode", [*NOT_WORD[:5], ["ring"], {}, NAN, "all-gather"], {}),
    (lss.SequenceConfig, "head_chunks", NOT_INT, {}),
    (lss.SequenceConfig, "dims", [0, 1, True, "", "input_ids", ["input_ids"], {1: 1}, {"a": 1.0}, {"a": True}], {}),
    (lss.SequenceConfig, "check_batches", [v for v in NOT_INT if v != 0 or v is True], {}),
    (lss.SequenceConfig, "token_wise", NOT_NAMES, {}),
    (lss.SequenceConfig, "verify", [*NOT_WORD[1:], "first"], {"size": 2}),
    (lss.SequenceConfig, "tile_loss", NOT_BOOL, {}),
    (lss.SequenceConfig, "tile_mlp", [v for v in NOT_INT if v is not None], {}),
    (lss.SequenceConfig, "mlps", NOT_NAMES, {"tile_mlp": 4}),
    (lss.SequenceConfig, "checkpoint_blocks", NOT_BOOL, {}),
    (lss.SequenceConfig, "offload_activations", [*NOT_BOOL, None], {"checkpoint_blocks": True}),
    (lss.SequenceConfig, "boundary_bits", [4, 32, True, None, "8", NAN], {"checkpoint_blocks": True}),
    (lss.CheckpointConfig, "asynchronous", [*NOT_BOOL, None], {}),
    (lss.CheckpointConfig, "allow", [*NOT_NAMES, None], {}),
    (lss.SuperScaleStrategy, "error_if_nonfinite", [*NOT_BOOL, None], {}),
    (lss.SuperScaleStrategy, "start_method", [*NOT_WORD, "popem"], {}),
    (lss.SuperScaleStrategy, "process_group_backend", [3, True, ["gloo"]], {}),
    (lss.SuperScaleStrategy, "timeout", [0, -1, True, NAN, INF, "30", "0:30:00", [], timedelta(0), timedelta(-1)], {}),
    (lss.SuperOffloadStrategy, "error_if_nonfinite", [1, "no"], {}),
    (lss.ZeroStrategy, "start_method", ["thread"], {}),
    (lss.SuperScalePrecision, "scaler", [5, "16-mixed", {}], {"precision": "16-mixed"}),
    (lss.SuperScalePrecision, "stochastic_rounding", NOT_BOOL, {}),
    (lss.SuperScalePrecision, "kahan", [*NOT_BOOL, None], {}),
    (lss.SuperScalePrecision, "autocast", NOT_BOOL, {"precision": "bf16-true"}),
    (lss.SuperScalePrecision, "seed", [v for v in NOT_INT if v != 0 or v is True], {}),
    (lss.SuperScalePrecision, "master_weights", NOT_WORD, {}),
    (lss.SuperScalePrecision, "optimizer_states", NOT_WORD, {}),
    (lss.SuperScalePrecision, "gradient_accumulation", NOT_WORD, {}),
    (lss.SuperScalePrecision, "gradient_reduction", NOT_WORD, {}),
    (lss.ScaleMonitor, "every_n_steps", NOT_INT, {}),
    (lss.ScaleMonitor, "flops_per_token", [True, 0, -1.0, NAN, INF, "6e9", "", None, [], 10**5000], {}),
    (lss.ScaleMonitor, "peak_flops", [False, 0, -1.0, NAN, INF, "989e12", None, {}], {}),
    (lss.ShardedEMA, "decay", [*NOT_SHARE, 1, 1.0], {}),
    (lss.ShardedEMA, "every_n_steps", NOT_INT, {}),
    (lss.ShardedEMA, "validates", [*NOT_BOOL, None], {}),
]


def name_of(public: type) -> str:
    return "SuperScaleStrategy" if public.__name__.endswith("Strategy") else public.__name__


@pytest.mark.parametrize(("public", "key", "wrong", "others"), FIELDS, ids=[f"{f[0].__name__}.{f[1]}" for f in FIELDS])
def test_a_wrong_value_is_refused_by_key_with_what_was_expected_and_found(public, key, wrong, others):
    accepted = []
    for value in wrong:
        try:
            public(**{**others, key: value})
        except SettingError as error:
            message = str(error)
            assert message.startswith(f"{name_of(public)}.{key} must be "), message
            assert f"found {shown(value)}" in message
        else:
            accepted.append(value)
    assert not accepted


def test_every_field_of_every_config_is_tried():
    tried = {(public, key) for public, key, _, _ in FIELDS}
    for config in (lss.ZeroConfig, lss.OffloadConfig, lss.SequenceConfig, lss.ZenFlowConfig, lss.CheckpointConfig):
        missing = {field.name for field in dataclasses.fields(config) if (config, field.name) not in tried}
        assert missing <= {"engine"}


@pytest.mark.parametrize("engine", [3, None, True, ["cpu"], ""])
def test_an_engine_that_is_no_name_is_refused(engine):
    with pytest.raises(SettingError, match="unknown offload engine .*: expected one of 'cpu', 'superoffload'"):
        lss.OffloadConfig(engine=engine)


@pytest.mark.parametrize(
    ("precision", "meant"), [(16, "16-mixed"), ("16", "16-mixed"), (32, "32-true"), ("bf16", "bf16-mixed")]
)
def test_lightnings_short_precision_is_refused_with_the_long_one(precision, meant):
    with pytest.raises(SettingError, match=rf"precision={precision!r} is not one of .*did you mean '{meant}'"):
        lss.SuperScalePrecision(precision)


def test_right_values_of_other_types_are_taken_and_kept_as_annotated():
    assert lss.ZeroConfig(stage=3, wrap=("A", "B")).wrap == ["A", "B"]
    assert lss.ZeroConfig(stage=3, wrap={"B", "A"}).wrap == ["A", "B"]
    assert lss.ZeroConfig(stage=3, wrap=[nn.Linear]).wrap == [nn.Linear]
    assert lss.OffloadConfig(gpu_fraction=1).gpu_fraction == 1
    assert lss.OffloadConfig(bucket_mb=2**30, cpu_threads=4096).bucket_mb == 2**30
    assert lss.CheckpointConfig(allow=["a*"]).allow == ("a*",)
    assert lss.SuperScaleStrategy(timeout=90)._timeout == timedelta(seconds=90)
    assert lss.SuperScaleStrategy(timeout=0.5)._timeout == timedelta(milliseconds=500)
    assert lss.SuperScaleStrategy(timeout=None)._timeout == lss.SuperScaleStrategy()._timeout


def loaded(text: str, parser: str) -> Mapping:
    return yaml.safe_load(text) if parser == "yaml" else omegaconf.OmegaConf.create(text)


@pytest.mark.parametrize("parser", ["yaml", "omegaconf"])
def test_mappings_of_both_yaml_parsers(parser):
    right = loaded("{stage: 3, no_sync: true, wrap: [Block, Head], bucket_mb: 8, shard_size: null}", parser)
    assert resolve_zero(right) == lss.ZeroConfig(stage=3, no_sync=True, wrap=["Block", "Head"], bucket_mb=8)
    assert resolve_checkpoint(loaded("allow: [a, b]", parser)).allow == ("a", "b")
    assert resolve_offload(loaded("gpu_fraction: 1.0e-3", parser)).gpu_fraction == 1e-3
    sequence = resolve_sequence(loaded("{size: 2, dims: {input_ids: 1, '0': -2}}", parser))
    assert sequence == lss.SequenceConfig(size=2, dims={"input_ids": 1, "0": -2})
    assert type(sequence.dims) is dict
    with pytest.raises(SettingError, match="dims must be a mapping of names to whole numbers, found .*"):
        resolve_sequence(loaded("{size: 2, dims: {input_ids: one}}", parser))
    with pytest.raises(SettingError, match=r"ZeroConfig.wrap must be a list of names, found 'Block'"):
        resolve_zero(loaded("{stage: 3, wrap: Block}", parser))
    with pytest.raises(
        SettingError, match="ZeroConfig.no_sync must be true, false or 'auto', found 'true'; it is text"
    ):
        resolve_zero(loaded("no_sync: 'true'", parser))
    with pytest.raises(SettingError, match=r"ZeroConfig.stage must be 0, 1, 2 or 3, found 2.0"):
        resolve_zero(loaded("stage: 2.0", parser))


def test_a_number_that_yaml_1_1_takes_for_text_is_told_so():
    with pytest.raises(SettingError, match=r"gpu_fraction must be .*, found '1e-3'; it is text: .*1e3 for text"):
        resolve_offload(yaml.safe_load("gpu_fraction: 1e-3"))


def test_a_shard_size_needs_a_stage_that_shards():
    with pytest.raises(lss.SuperScaleError, match="shard_size=2 .* stage 0 shards nothing. Use stage 1, 2 or 3"):
        lss.ZeroConfig(shard_size=2)


def takes(
    self,
    whole: Annotated[int, Between(2, 5)] = 2,
    number: float = 0.5,
    text: Optional[str] = None,
    word: Union[Literal["a", "b"], None] = None,
    unchecked: Missing = None,  # noqa: F821 # as names that are imported for type checkers only
) -> None:
    pass


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("whole", 1, "X.whole must be 2, 3, 4 or 5, found 1"),
        ("number", NAN, "X.number must be a finite number, found nan"),
        ("number", -INF, "X.number must be a finite number, found -inf"),
        ("number", 10**400, f"X.number must be a finite number, found 1{'0' * 199}..."),
        ("text", 3, "X.text must be text, found 3"),
        ("word", "c", "X.word must be one of 'a', 'b', found 'c'"),
        ("word", [1] * 300, f"X.word must be one of 'a', 'b', found {str([1] * 300)[:200]}..."),
    ],
)
def test_phrases(key, value, message):
    with pytest.raises(SettingError) as refused:
        check_arguments("X", takes, **{key: value})
    assert str(refused.value) == message


def test_arguments_are_returned_and_unknown_names_are_not_evaluated():
    assert check_arguments("X", takes, whole=3, number=2, text="t", word="a") == {
        "whole": 3,
        "number": 2,
        "text": "t",
        "word": "a",
    }


def test_a_value_whose_comparison_or_repr_fails_is_refused_too():
    class Odd:
        def __repr__(self):
            raise ValueError("no repr")

    with pytest.raises(SettingError, match="X.key must be one of 'a', 'b', found a value of type Odd"):
        checked("X", {"key": Literal["a", "b"]}, {"key": Odd()})


def test_load_from_checkpoint_checks_its_arguments_first():
    with pytest.raises(SettingError, match="load_from_checkpoint.strict must be true or false, found 'no'"):
        lss.load_from_checkpoint(nn.Module, "nowhere", strict="no")
    with pytest.raises(SettingError, match=r"load_from_checkpoint.hparams must be a Mapping, found \[1\]"):
        lss.load_from_checkpoint(nn.Module, "nowhere", hparams=[1])


@pytest.mark.parametrize("taken", [lambda v: lss.SuperScaleStrategy(checkpoint=v), lss.UniversalCheckpointIO])
def test_a_checkpoint_setting_that_is_no_config_is_refused(taken):
    with pytest.raises(SettingError, match="checkpoint takes None, a CheckpointConfig or a mapping, found 5"):
        taken(5)


def test_a_duration_is_a_timedelta_or_seconds():
    assert duration("X.timeout", timedelta(minutes=2)) == timedelta(minutes=2)
    assert duration("X.timeout", 120) == timedelta(minutes=2)
    with pytest.raises(SettingError, match=r"X.timeout must be a timedelta or a number of seconds, .*found '0:10:00'"):
        duration("X.timeout", "0:10:00")
