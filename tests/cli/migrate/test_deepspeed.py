"""Single keys of DeepSpeed, where their fate depends on their value or on others."""

from __future__ import annotations

import pytest

from lightning_superscale.cli.migrate.deepspeed import RULES, Migration, known_keys
from lightning_superscale.cli.migrate.deepspeed_keys import KEYS, SECTIONS
from lightning_superscale.cli.migrate.target import Target
from lightning_superscale.errors import SettingError


def migrated(config: dict) -> tuple[Target, dict]:
    target = Target()
    return target, {row.key: row.fate for row in Migration(config, target).rows}


def test_a_key_has_one_fate():
    assert not KEYS.keys() & RULES.keys()
    assert not SECTIONS.keys() & RULES.keys()
    assert all(fate.text for fate in (KEYS | SECTIONS).values())
    assert known_keys() >= KEYS.keys() | RULES.keys()


CPU = {"offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("config", "key", "outcome", "says"),
    [
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8}}, "reduce_bucket_size", "same", "64 MiB"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": 5e5}}, "reduce_bucket_size", "same", "block"),
        ({"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 1}}, "zero_hpz_partition_size", "same", "off"),
        ({"zero_optimization": {"stage": 0, **CPU}}, "offload_optimizer.device", "none", "stages 1 to 3"),
        (
            {"zero_optimization": {"stage": 3, **CPU, "zenflow": {}, "offload_param": {"device": "cpu"}}},
            "offload_param.device", "none", "only OffloadConfig",
        ),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zenflow.topk_ratio", "none", "'cpu'"),
        (
            {"zero_optimization": {"stage": 2, **CPU, "zenflow": {"select_strategy": "epoch", "select_interval": 1}}},
            "zenflow.select_interval", "none", "epochs are not counted",
        ),
        (
            {"zero_optimization": {"stage": 2, **CPU, "zenflow": {"select_strategy": "step", "select_interval": 9}}},
            "zenflow.select_interval", "became", "select_interval=9",
        ),
        (
            {"zero_optimization": {"stage": 2, **CPU, "zenflow": {"full_warm_up_rounds": 5}}},
            "zenflow.full_warm_up_rounds", "became", "warmup_steps=5",
        ),
        (
            {"zero_optimization": {"stage": 2, **CPU, "zenflow": {"update_interval": "auto"}}},
            "zenflow.update_interval", "became", "'auto'",
        ),
        ({"zero_optimization": {"stage": 2, "mics_shard_size": -1}}, "mics_shard_size", "same", "off"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, "reduce_bucket_size", "left", "default"),
    ],
)  # fmt: skip
def test_keys_of_zero(config, key, outcome, says):
    _, fates = migrated(config)
    fate = fates[f"zero_optimization.{key}"]
    assert (fate.outcome, says in fate.text) == (outcome, True), fate


BF16 = {"bf16": {"enabled": True}}


@pytest.mark.parametrize(
    ("config", "key", "outcome"),
    [
        ({**BF16, "communication_data_type": "fp32"}, "communication_data_type", "became"),
        ({**BF16, "communication_data_type": "bf16"}, "communication_data_type", "same"),
        ({**BF16, "communication_data_type": "fp16"}, "communication_data_type", "none"),
        ({**BF16, "data_types": {"grad_accum_dtype": "fp32"}}, "data_types.grad_accum_dtype", "became"),
        (
            {**BF16, "data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 2}},
            "data_types.grad_accum_dtype", "none",
        ),
        ({"sequence_parallel_size": 1}, "sequence_parallel_size", "same"),
        ({"compile": {"passes": ["autosp"]}}, "compile.passes", "none"),
        ({"tensor_parallel": {"autotp_size": 4}}, "tensor_parallel", "none"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op", "none"),
        ({"fp16": {"enabled": False, "loss_scale": 0}}, "fp16.enabled", "same"),
        ({"gradient_clipping": 0.0}, "gradient_clipping", "same"),
        ({"sparse_attention": {"mode": "fixed"}}, "sparse_attention", "retired"),
        ({"elasticity": {"enabled": False}}, "elasticity", "same"),
        ({"zero_optimization": True}, "zero_optimization.stage", "became"),
    ],
)  # fmt: skip
def test_other_keys(config, key, outcome):
    _, fates = migrated(config)
    assert fates[key].outcome == outcome, fates[key]


def test_autocast_of_half_and_of_bf16():
    for dtype, precision in (("float16", "16-mixed"), ("bfloat16", "bf16-mixed"), ("torch.bfloat16", "bf16-mixed")):
        target, _ = migrated({"torch_autocast": {"enabled": True, "dtype": dtype}})
        assert target.precision == precision


def test_optimizer_and_scheduler_must_be_sections():
    for name in ("optimizer", "scheduler"):
        with pytest.raises(SettingError, match=f"{name} must be a section"):
            migrated({name: "AdamW"})
