"""Lightning's own strategies: every argument of DeepSpeedStrategy and FSDPStrategy, and the registered names.

DeepSpeedStrategy builds a configuration of DeepSpeed from its arguments, so each has a key of that configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_superscale.cli.migrate.deepspeed import Migration
from lightning_superscale.cli.migrate.rows import Fate, Row, became, none, same
from lightning_superscale.cli.migrate.source import read
from lightning_superscale.cli.migrate.target import Target
from lightning_superscale.errors import SettingError, did_you_mean

_Z = "zero_optimization"
# Argument of DeepSpeedStrategy -> key of the configuration that it makes.
DEEPSPEED_KEYS: dict[str, str] = {
    "stage": f"{_Z}.stage",
    "offload_optimizer_device": f"{_Z}.offload_optimizer.device",
    "offload_params_device": f"{_Z}.offload_param.device",
    "nvme_path": f"{_Z}.offload_optimizer.nvme_path",
    "params_buffer_count": f"{_Z}.offload_param.buffer_count",
    "params_buffer_size": f"{_Z}.offload_param.buffer_size",
    "max_in_cpu": f"{_Z}.offload_param.max_in_cpu",
    "optimizer_buffer_count": f"{_Z}.offload_optimizer.buffer_count",
    "pin_memory": f"{_Z}.offload_optimizer.pin_memory",
    "sub_group_size": f"{_Z}.sub_group_size",
    "contiguous_gradients": f"{_Z}.contiguous_gradients",
    "overlap_comm": f"{_Z}.overlap_comm",
    "allgather_partitions": f"{_Z}.allgather_partitions",
    "reduce_scatter": f"{_Z}.reduce_scatter",
    "allgather_bucket_size": f"{_Z}.allgather_bucket_size",
    "reduce_bucket_size": f"{_Z}.reduce_bucket_size",
    "zero_allow_untested_optimizer": "zero_allow_untested_optimizer",
    "loss_scale": "fp16.loss_scale",
    "initial_scale_power": "fp16.initial_scale_power",
    "loss_scale_window": "fp16.loss_scale_window",
    "hysteresis": "fp16.hysteresis",
    "min_loss_scale": "fp16.min_loss_scale",
    "partition_activations": "activation_checkpointing.partition_activations",
    "cpu_checkpointing": "activation_checkpointing.cpu_checkpointing",
    "contiguous_memory_optimization": "activation_checkpointing.contiguous_memory_optimization",
    "synchronize_checkpoint_boundary": "activation_checkpointing.synchronize_checkpoint_boundary",
    "block_size": "aio.block_size",
    "queue_depth": "aio.queue_depth",
    "single_submit": "aio.single_submit",
    "overlap_events": "aio.overlap_events",
    "thread_count": "aio.thread_count",
}
# Arguments that only say whether others count.
_SWITCHES = {"zero_optimization", "offload_optimizer", "offload_parameters", "config"}
_OWN_ARGUMENTS = {
    "remote_device": same("a module that configure_model() builds on the meta device is initialized shard by shard"),
    "load_full_weights": same("fit(ckpt_path=...) takes one file or a folder of shards"),
    "exclude_frozen_parameters": none("checkpoints hold frozen weights too"),
    "logging_batch_size_per_gpu": none("the ScaleMonitor callback tells samples and seconds"),
    "logging_level": none("use Python's logging"),
}
# Arguments that SuperScaleStrategy has under the same name.
_SHARED = {
    "accelerator",
    "parallel_devices",
    "cluster_environment",
    "precision_plugin",
    "process_group_backend",
    "timeout",
}
_FSDP_FATES = {
    "activation_checkpointing_policy": none("SequenceConfig(checkpoint_blocks=True) recomputes the repeated blocks"),
    "state_dict_type": same("checkpoint={} writes whole tensors from all ranks: one checkpoint for any layout"),
    "backward_prefetch": same("the next block's weights are gathered ahead"),
    "forward_prefetch": same("the next block's weights are gathered ahead"),
    "limit_all_gathers": same("no more than the blocks in use and the next are gathered"),
    "use_orig_params": same("the optimizer's groups hold the module's own parameters"),
    "sync_module_states": same("ranks start from rank 0's weights"),
    "ignored_modules": none("all parameters are sharded; what is frozen costs no state"),
    "ignored_states": none("all parameters are sharded; what is frozen costs no state"),
    "param_init_fn": same("modules on the meta device are initialized by their own reset_parameters()"),
    "device_id": same("the Trainer's devices"),
    "process_group": none("the strategy makes its groups: ZeroConfig(shard_size=N), sequence=N, tensor_parallel=N"),
    "mixed_precision": none("Trainer(precision=...) says it; SuperScalePrecision(gradient_reduction=...) reductions"),
    "device_mesh": same("its size of shards is used with HYBRID_SHARD only"),
}
_FSDP_STAGES = {
    "FULL_SHARD": 3,
    "HYBRID_SHARD": 3,
    "SHARD_GRAD_OP": 2,
    "_HYBRID_SHARD_ZERO2": 2,
    "NO_SHARD": 0,
}
# Arguments of the names that Lightning registers.
NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepspeed": ("DeepSpeedStrategy", {}),
    "deepspeed_stage_1": ("DeepSpeedStrategy", {"stage": 1}),
    "deepspeed_stage_1_offload": ("DeepSpeedStrategy", {"stage": 1, "offload_optimizer": True}),
    "deepspeed_stage_2": ("DeepSpeedStrategy", {"stage": 2}),
    "deepspeed_stage_2_offload": ("DeepSpeedStrategy", {"stage": 2, "offload_optimizer": True}),
    "deepspeed_stage_3": ("DeepSpeedStrategy", {"stage": 3}),
    "deepspeed_stage_3_offload": (
        "DeepSpeedStrategy",
        {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
    ),
    "deepspeed_stage_3_offload_nvme": (
        "DeepSpeedStrategy",
        {
            "stage": 3,
            "offload_optimizer": True,
            "offload_parameters": True,
            "remote_device": "nvme",
            "offload_params_device": "nvme",
            "offload_optimizer_device": "nvme",
        },
    ),
    "fsdp": ("FSDPStrategy", {}),
    "fsdp_cpu_offload": ("FSDPStrategy", {"cpu_offload": True}),
}


def known_arguments(class_name: str) -> set[str]:
    """Every argument of one of Lightning's strategies that is known here."""
    if class_name == "DeepSpeedStrategy":
        return {*DEEPSPEED_KEYS, *_SWITCHES, *_OWN_ARGUMENTS, *_SHARED}
    return {*_FSDP_FATES, *_FSDP_RULES, *_SHARED, "checkpoint_io"}


# What Lightning calls a strategy's class -> the function that migrates its arguments.
Migrate = Callable[[Mapping[str, Any], Target, Path], list[Row]]


def migrate_deepspeed(arguments: Mapping[str, Any], target: Target, folder: Path) -> list[Row]:
    """Migrate arguments of DeepSpeedStrategy.

    Args:
        arguments: by name.
        target: where settings go; its precision is the Trainer's.
        folder: where a relative path in `config` starts.

    Raises:
        SettingError: as `Migration` does, or `config` can't be read.
    """
    # Lightning gives DeepSpeed 16-bit weights under a "-mixed" precision too (its DeepSpeedPrecision).
    if target.precision in ("bf16-mixed", "16-mixed"):
        target.precision = target.precision.replace("mixed", "true")
    config = arguments.get("config")
    if config is not None:
        if isinstance(config, str):
            config, _ = read(str(folder / config))
        if not isinstance(config, Mapping):
            raise SettingError(f"DeepSpeedStrategy.config must be a path or a section, found {config!r}")
        rows = [Row("config", "...", became("the keys below"))]
        rows += _others(arguments, target, ignored="Lightning ignores it beside config")
        return rows + Migration(config, target).rows
    built = _config_of(arguments, target.precision)
    migration = Migration(built, target)
    fates = {row.key: row.fate for row in migration.rows}
    rows = []
    for name, value in arguments.items():
        if name in ("zero_optimization", "offload_optimizer", "offload_parameters"):
            rows.append(Row(name, value, _fate_of_switch(name, fates)))
        elif name in DEEPSPEED_KEYS:
            why = same("off: no other argument asks for it")
            rows.append(Row(name, value, fates.get(DEEPSPEED_KEYS[name], fates.get("aio", why))))
    return rows + _others(arguments, target)


def _others(arguments: Mapping[str, Any], target: Target, ignored: str = "") -> list[Row]:
    rows = []
    for name, value in arguments.items():
        if ignored and (name in DEEPSPEED_KEYS or name in _SWITCHES - {"config"}):
            rows.append(Row(name, value, same(ignored)))
        elif name in _OWN_ARGUMENTS:
            rows.append(Row(name, value, _OWN_ARGUMENTS[name]))
        elif name in _SHARED:
            rows.append(Row(name, value, _share(target, name, value)))
        elif name not in known_arguments("DeepSpeedStrategy"):
            hint = did_you_mean(name, known_arguments("DeepSpeedStrategy"))
            rows.append(Row(name, value, Fate("unknown", f"DeepSpeedStrategy has no such argument{hint}")))
    return rows


def _share(target: Target, name: str, value: Any) -> Fate:
    if value is None:
        return same("the default")
    if isinstance(value, Mapping):
        return none(f"SuperScaleStrategy takes the same {name}, which no line of Python stands for here: pass it on")
    target.strategy[name] = value
    return became(f"{name}, the same argument of SuperScaleStrategy")


def _config_of(arguments: Mapping[str, Any], precision: str | None) -> dict[str, Any]:
    """The configuration that DeepSpeedStrategy makes of the arguments that are given."""
    config: dict[str, Any] = {_Z: {"stage": arguments.get("stage", 2)}}
    wanted = {"offload_optimizer": "offload_optimizer", "offload_parameters": "offload_param"}
    offs = [section for switch, section in wanted.items() if not arguments.get(switch)]
    for name, key in DEEPSPEED_KEYS.items():
        if name in arguments and not any(f".{section}." in key for section in offs):
            *sections, last = key.split(".")
            place = config
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = arguments[name]
    for switch, section in wanted.items():
        if arguments.get(switch):
            config[_Z].setdefault(section, {}).setdefault("device", "cpu")
    if arguments.get("zero_optimization") is False:
        config[_Z] = {"stage": 0}
    if precision in ("bf16-true", "16-true"):
        config.setdefault("bf16" if precision == "bf16-true" else "fp16", {})["enabled"] = True
    return config


def _fate_of_switch(name: str, fates: Mapping[str, Fate]) -> Fate:
    key = {"offload_optimizer": "offload_optimizer.device", "offload_parameters": "offload_param.device"}.get(
        name, "stage"
    )
    return fates.get(f"{_Z}.{key}", same("off, as it is here"))


def migrate_fsdp(arguments: Mapping[str, Any], target: Target, folder: Path) -> list[Row]:
    """Migrate arguments of FSDPStrategy, and of torch's FullyShardedDataParallel, which it passes on.

    Args:
        arguments: by name.
        target: where settings go; `trainer` may hold the number of devices.
        folder: unused; the signature is that of `migrate_deepspeed`.
    """
    strategy = str(arguments.get("sharding_strategy", "FULL_SHARD")).rsplit(".", 1)[-1]
    target.zero["stage"] = _FSDP_STAGES.get(strategy, 3)
    target.strategy["checkpoint"] = {}
    rows = []
    for name, value in arguments.items():
        if name in _FSDP_RULES:
            fate = _FSDP_RULES[name](arguments, value, target)
        elif name in _FSDP_FATES:
            fate = same("the default") if value in (None, False) else _FSDP_FATES[name]
        elif name in _SHARED or name == "checkpoint_io":
            fate = _share(target, name, value)
            if name == "checkpoint_io" and value is not None:
                del target.strategy["checkpoint"]
        else:
            hint = did_you_mean(name, known_arguments("FSDPStrategy"))
            fate = Fate("unknown", f"neither FSDPStrategy nor FullyShardedDataParallel has such an argument{hint}")
        rows.append(Row(name, value, fate))
    return rows


def _sharding(arguments: Mapping[str, Any], value: Any, target: Target) -> Fate:
    name = str(value).rsplit(".", 1)[-1]
    if name not in _FSDP_STAGES:
        return Fate("unknown", f"no sharding strategy{did_you_mean(name, _FSDP_STAGES)}")
    stage = _FSDP_STAGES[name]
    if "HYBRID" not in name:
        return became(f"zero={stage}")
    mesh = arguments.get("device_mesh")
    if not isinstance(mesh, (list, tuple)) or len(mesh) != 2 or not isinstance(mesh[1], int):
        return none(
            f"zero={stage} shards over all ranks: set shard_size=N, the devices of a node, for replicas by node"
        )
    target.zero["shard_size"] = mesh[1]
    return became(f"zero: stage={stage}, shard_size={mesh[1]}, of device_mesh")


def _cpu_offload(arguments: Mapping[str, Any], value: Any, target: Target) -> Fate:
    if not value:
        return same("off, as it is here")
    target.offload.update(engine="superoffload", weights="flow")
    target.zero["stage"] = min(target.stage, 2)
    return became(
        "offload: weights='flow', with zero=2: optimizer, states and weights in host memory, whole weights for every "
        "rank; zero=3 with offload='superoffload' keeps shards of weights on the devices instead"
    )


def _wrap(arguments: Mapping[str, Any], value: Any, target: Target) -> Fate:
    classes = list(value) if isinstance(value, (list, tuple, set)) else []
    if not classes or not all(isinstance(name, str) for name in classes):
        return same("repeated blocks are found; ZeroConfig.wrap names others")
    if target.stage != 3:
        return same("only stage 3 gathers by block")
    target.zero["wrap"] = sorted(name.rsplit(".", 1)[-1] for name in classes)
    return became(f"zero: wrap={target.zero['wrap']}")


def _recompute(arguments: Mapping[str, Any], value: Any, target: Target) -> Fate:
    if not value:
        return same("off, as it is here")
    target.sequence["checkpoint_blocks"] = "auto"
    return became("sequence: checkpoint_blocks='auto', which recomputes the repeated blocks")


_FSDP_RULES: dict[str, Callable[[Mapping[str, Any], Any, Target], Fate]] = {
    "sharding_strategy": _sharding,
    "cpu_offload": _cpu_offload,
    "auto_wrap_policy": _wrap,
    "activation_checkpointing": _recompute,
}
MIGRATE: dict[str, Migrate] = {"DeepSpeedStrategy": migrate_deepspeed, "FSDPStrategy": migrate_fsdp}
# Older words of Lightning's for precisions.
_PRECISIONS: dict[Any, str] = {
    16: "16-mixed",
    "16": "16-mixed",
    "bf16": "bf16-mixed",
    32: "32-true",
    "32": "32-true",
    64: "64-true",
    "64": "64-true",
}
# Trainer's flags that are printed again, as they say how the strategy trains.
TRAINER_FLAGS = (
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "devices",
    "num_nodes",
    "accelerator",
)


def migrate_trainer(section: Mapping[str, Any], target: Target, folder: Path) -> list[Row]:
    """Migrate a Trainer's arguments: a strategy's name, or class_path and init_args, and what else says how it trains.

    Raises:
        SettingError: the strategy is none of those that are known.
    """
    strategy = section.get("strategy")
    precision = section.get("precision")
    if not isinstance(precision, (str, int, type(None))):
        raise SettingError(f"precision must be a word such as 'bf16-true', found {precision!r}")
    target.precision = None if precision is None else _PRECISIONS.get(precision, str(precision))
    key: dict[str, Any]
    if isinstance(strategy, str) and strategy in NAMES:
        class_name, arguments = NAMES[strategy]
        key = {"strategy": strategy}
    elif isinstance(strategy, str):
        class_name, arguments, key = strategy.rsplit(".", 1)[-1], {}, {"strategy": strategy}
    elif isinstance(strategy, Mapping):
        class_name = str(strategy.get("class_path", "")).rsplit(".", 1)[-1]
        arguments, key = strategy.get("init_args") or {}, {"strategy.class_path": strategy.get("class_path")}
    else:
        raise SettingError("a `strategy` was expected: a name, or class_path and init_args")
    if not isinstance(arguments, Mapping):
        raise SettingError(f"init_args must be arguments by name, found {arguments!r}")
    if class_name not in MIGRATE:
        known = ", ".join([*MIGRATE, *NAMES])
        raise SettingError(f"strategy {class_name!r} is none that is migrated from: {known}")
    rows = MIGRATE[class_name](arguments, target, folder)
    head = [Row(name, value, became("the strategy above")) for name, value in key.items()]
    for flag, value in section.items():
        if flag == "precision" and value is not None:
            head.append(Row(flag, value, _fate_of_precision(class_name, target)))
        elif flag in TRAINER_FLAGS and value is not None:
            target.trainer.setdefault(flag, value)
            head.append(Row(flag, value, became(f"{flag} as it was")))
        elif flag not in ("strategy", "precision", *TRAINER_FLAGS):
            head.append(Row(flag, value, same("stays as it is, and is not printed again")))
    return head + rows


def _fate_of_precision(class_name: str, target: Target) -> Fate:
    text = f"precision={target.precision!r}: 16-bit weights, fp32 masters and optimizer states"
    if class_name == "FSDPStrategy" and target.precision == "bf16-true":
        lower = "SuperScalePrecision('bf16-true', master_weights='bf16', optimizer_states='bf16')"
        return became(f"{text}; FSDP has no masters: plugins=[{lower}] has none either")
    return became(text if target.precision in ("bf16-true", "16-true") else f"precision={target.precision!r}")
