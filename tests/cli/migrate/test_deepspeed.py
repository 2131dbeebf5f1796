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
        (
            {"zero_optimization": {"stage": 3, "gather_16bit_weights_on_model_save": True}},
            "gather_16bit_weights_on_model_save", "same", "export",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "offload_param.device", "none", "weights='flow'",
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
        ({"fp16": {"enabled": "auto", "loss_scale_window": 1000}}, "fp16.loss_scale_window", "same"),
        ({"fp16": {"enabled": True, "loss_scale_window": 1000}}, "fp16.loss_scale_window", "became"),
        ({"fp16": {"enabled": True, "loss_scale_window": 2000}}, "fp16.loss_scale_window", "same"),
        ({"fp16": {"enabled": True, "loss_scale": 8, "loss_scale_window": 1000}}, "fp16.loss_scale_window", "same"),
        ({"gradient_clipping": 0.0}, "gradient_clipping", "same"),
        ({"gradient_clipping": "much"}, "gradient_clipping", "unknown"),
        ({"gradient_accumulation_steps": "x"}, "gradient_accumulation_steps", "unknown"),
        ({"sparse_attention": {"mode": "fixed"}}, "sparse_attention", "retired"),
        ({"elasticity": {"enabled": False}}, "elasticity", "same"),
        ({"zero_optimization": True}, "zero_optimization.stage", "became"),
    ],
)  # fmt: skip
def test_other_keys(config, key, outcome):
    _, fates = migrated(config)
    assert fates[key].outcome == outcome, fates[key]


# What DeepSpeed's page of its configuration names in the sections that are known key by key, beside what
# tests/peers/test_migrate_keys.py reads from an installed release (https://www.deepspeed.ai/docs/config-json/).
DOCUMENTED = {
    "zero_optimization": (
        "stage allgather_partitions allgather_bucket_size compute_grad_norm overlap_comm reduce_scatter "
        "reduce_bucket_size contiguous_gradients load_from_fp32_weights round_robin_gradients parameter_alignment "
        "stage3_max_live_parameters stage3_max_reuse_distance stage3_prefetch_bucket_size "
        "stage3_param_persistence_threshold sub_group_size elastic_checkpoint "
        "stage3_gather_16bit_weights_on_model_save stage3_module_granularity_threshold ignore_unused_parameters "
        "zero_hpz_partition_size zero_quantized_weights zero_quantized_gradients log_trace_cache_warnings cpu_offload "
        "offload_param.device offload_param.nvme_path offload_param.pin_memory offload_param.buffer_count "
        "offload_param.buffer_size offload_param.max_in_cpu offload_optimizer.device offload_optimizer.nvme_path "
        "offload_optimizer.pin_memory offload_optimizer.ratio offload_optimizer.buffer_count "
        "offload_optimizer.fast_init save_muon_momentum_buffer_in_memory"
    ),
    "fp16": (
        "enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis "
        "min_loss_scale fp16_master_weights_and_grads"
    ),
    "bf16": "enabled bf16_master_weights_and_grads bf16_optimizer_states",
    "torch_autocast": "enabled dtype lower_precision_safe_modules",
    "compile": "deepcompile passes offload_activation offload_activation_pin_memory",
    "data_types": "grad_accum_dtype",
    "checkpoint": "tag_validation load_universal use_node_local_storage parallel_write.pipeline_stage",
    "activation_checkpointing": (
        "partition_activations cpu_checkpointing contiguous_memory_optimization number_checkpoints "
        "synchronize_checkpoint_boundary profile"
    ),
    "": (
        "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps managed_gradient_accumulation "
        "optimizer scheduler communication_data_type gradient_allreduce_op prescale_gradients "
        "gradient_predivide_factor gradient_clipping aio tensor_parallel hybrid_engine expert_parallel "
        "disable_python_gc steps_per_print wall_clock_breakdown dump_state autotuning flops_profiler data_efficiency "
        "tensorboard wandb comet csv_monitor comms_logger"
    ),
}


def test_every_documented_key_is_known():
    documented = {f"{name}.{key}".lstrip(".") for name, keys in DOCUMENTED.items() for key in keys.split()}
    assert not documented - known_keys()


def test_autocast_of_half_and_of_bf16():
    for dtype, precision in (("float16", "16-mixed"), ("bfloat16", "bf16-mixed"), ("torch.bfloat16", "bf16-mixed")):
        target, _ = migrated({"torch_autocast": {"enabled": True, "dtype": dtype}})
        assert target.precision == precision


def test_optimizer_and_scheduler_must_be_sections():
    for name in ("optimizer", "scheduler"):
        with pytest.raises(SettingError, match=f"{name} must be a section"):
            migrated({name: "AdamW"})
        with pytest.raises(SettingError, match=f"{name} must be a section"):
            migrated({name: {"type": "AdamW", "params": [1]}})
