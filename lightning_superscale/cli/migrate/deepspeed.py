"""A configuration of DeepSpeed, key by key."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightning_superscale.cli.migrate.deepspeed_keys import AUTO, AUTO_ELSEWHERE, KEYS, SECTIONS
from lightning_superscale.cli.migrate.optimizer import OptimizerSections
from lightning_superscale.cli.migrate.rows import Fate, Row, became, left, none, retired, same
from lightning_superscale.cli.migrate.target import Target
from lightning_superscale.errors import SettingError, did_you_mean

# Elements of a bucket are those of 16-bit weights, unless the run is in fp32.
_DEFAULT_BUCKET_MB = 64
_MIB = 2**20
# Sections in which "auto" is a word of DeepSpeed's own.
_OWN_AUTO = "zero_optimization.zenflow."
_HOST_BYTES = "16 bytes of host memory per parameter, divided over the ranks"


# Keys that DeepSpeed replaced itself; a configuration with them is read as one with those of today.
_DEPRECATED = {
    "cpu_offload": "DeepSpeed replaced it by offload_optimizer",
    "cpu_offload_param": "DeepSpeed replaced it by offload_param",
    "cpu_offload_use_pin_memory": "DeepSpeed replaced it by pin_memory of each section",
}


class Migration:
    """What becomes of a configuration.

    Args:
        config: DeepSpeed's configuration.
        target: where settings go; those that it has stay unless the configuration says otherwise.

    Attributes:
        config: as given, with deprecated forms replaced.
        target: what is printed.
        rows: what became of every key, in the configuration's order.

    Raises:
        SettingError: a section or a stage is not what DeepSpeed takes.
    """

    def __init__(self, config: Mapping[str, Any], target: Target) -> None:
        self.config = _modern(config)
        self.target = target
        self.rows: list[Row] = []
        target.zero["stage"] = self._stage()
        self._set_precision()
        self._set_offload()
        for key, text in _DEPRECATED.items():
            if isinstance(zero := config.get("zero_optimization"), Mapping) and key in zero:
                self.rows.append(Row(f"zero_optimization.{key}", zero[key], same(text)))
        for key, value in _leaves(self.config):
            self.rows.append(Row(key, value, self._fate(key, value)))
        made = OptimizerSections(self.config.get("optimizer") or {}, self.config.get("scheduler") or {})
        self.rows += made.rows
        target.optimizers = made.lines

    def get(self, path: str, default: Any = None) -> Any:
        """The value at a dotted path; the default where there is none."""
        found: Any = self.config
        for part in path.split("."):
            if not isinstance(found, Mapping) or part not in found:
                return default
            found = found[part]
        return found

    # What several keys decide together

    def _stage(self) -> int:
        stage = self.get("zero_optimization.stage", 0)
        if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
            raise SettingError(f"zero_optimization.stage must be 0, 1, 2 or 3, found {stage!r}")
        return int(stage)

    def _set_precision(self) -> None:
        target = self.target
        for name, precision in (("bf16", "bf16-true"), ("bfloat16", "bf16-true"), ("fp16", "16-true")):
            if self.get(f"{name}.enabled") is True:
                target.precision = precision
        if self.get("torch_autocast.enabled") is True:
            is_half = str(self.get("torch_autocast.dtype", "bfloat16")).endswith(("float16", "fp16", "half"))
            is_bf16 = str(self.get("torch_autocast.dtype", "bfloat16")).endswith(("bfloat16", "bf16"))
            target.precision = "16-mixed" if is_half and not is_bf16 else "bf16-mixed"
        if target.precision in ("16-true", "16-mixed"):
            self._set_scaler()
        if target.precision == "bf16-true" and self.get("bf16.bf16_master_weights_and_grads") is True:
            target.dtypes["master_weights"] = "bf16"
            if self.get("bf16.bf16_optimizer_states") is True:
                target.dtypes["optimizer_states"] = "bf16"

    def _set_scaler(self) -> None:
        scale, power = self.get("fp16.loss_scale", 0), self.get("fp16.initial_scale_power")
        window = self.get("fp16.loss_scale_window")
        if _is_number(scale) and scale > 0:
            self.target.scaler = {"init_scale": float(scale), "growth_interval": 2**31 - 1}
            return
        if _is_number(power) and power != 16:
            self.target.scaler["init_scale"] = 2.0**power
        if _is_number(window) and window != 2000:
            self.target.scaler["growth_interval"] = int(window)

    def _set_offload(self) -> None:
        device = self.get("zero_optimization.offload_optimizer.device", "none")
        flows = self.get("zero_optimization.offload_param.device", "none") in ("cpu", "nvme") and self.target.stage == 3
        offload = self.target.offload
        if device in ("cpu", "nvme") and self.target.stage > 0:
            is_zenflow = isinstance(self.get("zero_optimization.zenflow"), Mapping)
            offload["engine"] = "zenflow" if is_zenflow else "superoffload"
        elif flows:
            offload["engine"] = "superoffload"
        if flows and offload["engine"] != "zenflow":
            offload["weights"] = "flow"
            self.target.zero["stage"] = 2
        pins = [self.get(f"zero_optimization.{part}.pin_memory") for part in ("offload_optimizer", "offload_param")]
        if offload and False in pins and True not in pins:
            offload["pin_memory"] = False

    # One key

    def _fate(self, key: str, value: Any) -> Fate:
        if value == "auto" and not key.startswith(_OWN_AUTO) and key in (RULES.keys() | KEYS.keys()):
            return AUTO.get(key, AUTO_ELSEWHERE)
        rule = RULES.get(key)
        if key in _NUMBERS and value not in (None, False) and not _is_number(value):
            return Fate("unknown", f"a number was expected, found {value!r}")
        if rule is not None:
            return rule(self, value)
        section = next((name for name in SECTIONS if key == name or key.startswith(f"{name}.")), None)
        known = KEYS.get(key) or (SECTIONS[section] if section is not None else None)
        if known is None:
            return Fate("unknown", f"DeepSpeed documents no such key{_hint(key)}")
        if known.outcome in ("none", "retired") and _is_off(value):
            return same("off, as it is here")
        return known


def _modern(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with forms that DeepSpeed deprecated replaced by those of today."""
    found = dict(config)
    zero = found.get("zero_optimization")
    if isinstance(zero, bool):
        found["zero_optimization"] = {"stage": int(zero)}
    elif zero is not None and not isinstance(zero, Mapping):
        raise SettingError(f"zero_optimization must be a section with a stage, found {zero!r}")
    elif zero is not None:
        new = dict(zero)
        for old, section in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
            if new.pop(old, False) is True:
                new.setdefault(section, {"device": "cpu"})
        if (pin := new.pop("cpu_offload_use_pin_memory", None)) is not None and "offload_optimizer" in new:
            new["offload_optimizer"] = {"pin_memory": pin, **new["offload_optimizer"]}
        found["zero_optimization"] = new
    for name in ("optimizer", "scheduler"):
        made = found.get(name) or {}
        if not isinstance(made, Mapping) or not isinstance(made.get("params") or {}, Mapping):
            raise SettingError(f"{name} must be a section with type and params, found {made!r}")
    return found


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key with its value, by dotted path; a section that has one fate is one key."""
    for name, value in config.items():
        key = f"{prefix}{name}"
        if key in ("optimizer", "scheduler"):
            continue
        if isinstance(value, Mapping) and value and key not in SECTIONS and key not in RULES:
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_off(value: Any) -> bool:
    if isinstance(value, Mapping):
        return not value or value.get("enabled", value.get("deepcompile")) is False
    return value is None or value is False or value == []


def _hint(key: str) -> str:
    """The closest known key: by its whole path, or a key of the same name in another section."""
    known = known_keys()
    last = key.rsplit(".", 1)[-1]
    elsewhere = sorted(name for name in known if name.rsplit(".", 1)[-1] == last)
    return f"; did you mean {elsewhere[0]!r}?" if elsewhere else did_you_mean(key, known)


def known_keys() -> set[str]:
    """Dotted paths of all keys and sections that are known."""
    deprecated = {f"zero_optimization.{key}" for key in _DEPRECATED}
    return {*KEYS, *SECTIONS, *RULES, *deprecated, "optimizer", "scheduler"}


# Rules of keys whose value is carried over.


def _stage(run: Migration, value: Any) -> Fate:
    if run.target.stage != value:
        return became("zero=2: weights flow through the device from host memory, where stage 3 would shard them")
    return became(f"zero={value}")


def _bucket(run: Migration, value: Any) -> Fate:
    if run.target.stage == 0:
        return same("stage 0 takes buckets of 64 MiB; ZeroConfig.bucket_mb changes them")
    if run.target.stage == 3:
        return same("stage 3 gathers and reduces by repeated block; ZeroConfig.wrap names others")
    nbytes = 2 if run.target.precision in ("bf16-true", "16-true") else 4
    size = max(1, int((value or 5e8) * nbytes / _MIB))
    if size >= _DEFAULT_BUCKET_MB:
        return same("buckets of 64 MiB are large enough to overlap; ZeroConfig.bucket_mb changes them")
    run.target.zero["bucket_mb"] = min(size, run.target.zero.get("bucket_mb", size))
    return became(f"zero: bucket_mb={run.target.zero['bucket_mb']}, of weights in MiB")


def _hpz(run: Migration, value: Any) -> Fate:
    if not _is_number(value) or value <= 1:
        return same("off, as it is here")
    if run.target.stage == 0:
        return none("stage 0 shards nothing")
    run.target.zero["shard_size"] = int(value)
    return became(
        f"zero: shard_size={value}, which shards masters and states over {value} ranks too, where hpZ shards them over "
        "all"
    )


def _mics(run: Migration, value: Any) -> Fate:
    if not _is_number(value) or value <= 0:
        return same("off, as it is here")
    if run.target.stage > 0:
        run.target.zero["shard_size"] = int(value)
    return retired(f"DeepSpeed removed MiCS in 2026-09 (its issue 8489); zero: shard_size={value} does the same")


def _elastic(run: Migration, value: Any) -> Fate:
    return retired("every checkpoint loads at any number of ranks") if value else same("off, as it is here")


def _optimizer_device(run: Migration, value: Any) -> Fate:
    if value in (None, "none"):
        return same("off, as it is here")
    if not run.target.offload:
        return none("DeepSpeed offloads optimizer states in stages 1 to 3; offload='superoffload' does in stage 0 too")
    engine = run.target.offload["engine"]
    if value == "nvme":
        return none(f"nothing is offloaded to NVMe: offload={engine!r} needs {_HOST_BYTES}")
    if engine == "zenflow":
        return became(f"offload='zenflow', which needs {_HOST_BYTES}")
    return became("offload='superoffload': bit for bit what offload='cpu' gives, stepped during backward")


def _param_device(run: Migration, value: Any) -> Fate:
    if value in (None, "none"):
        return same("off, as it is here")
    if run.target.offload.get("weights") != "flow":
        return none("only OffloadConfig(engine='cpu' or 'superoffload', weights='flow') keeps weights in host memory")
    where = "; nothing is offloaded to NVMe" if value == "nvme" else ""
    text = f"offload: weights='flow': the host has the weights of forward, whole for every rank{where}"
    return none(text) if value == "nvme" else became(text)


def _pin(run: Migration, value: Any) -> Fate:
    if value is not False or not run.target.offload:
        return same("host memory of transfers is page-locked")
    if run.target.offload.get("pin_memory") is False:
        return became("offload: pin_memory=False")
    return none("one setting is of weights and states; the other section asks for page-locked memory")


def _ratio(run: Migration, value: Any) -> Fate:
    offload = run.target.offload
    if not offload or not _is_number(value) or value >= 1:
        return same("OffloadConfig.gpu_fraction='auto' keeps on the device what its free memory holds")
    if offload.get("weights") == "flow" or offload["engine"] == "zenflow":
        return none(
            "OffloadConfig.gpu_fraction keeps whole parameters on the device, which this engine or flow decides"
        )
    offload["gpu_fraction"] = round(1 - value, 6)
    return became(f"offload: gpu_fraction={offload['gpu_fraction']}, the share that stays on the device")


def _super_offload(run: Migration, value: Any) -> Fate:
    if not value:
        return same("offload='superoffload' is exact, and the faster of two ways to the same numbers")
    if run.target.offload.get("engine") != "superoffload":
        return none("DeepSpeed takes it with offload_optimizer.device='cpu' and without zenflow only")
    return became("offload='superoffload'")


def _zenflow_options(run: Migration) -> dict[str, Any] | None:
    offload = run.target.offload
    return offload.setdefault("zenflow", {}) if offload.get("engine") == "zenflow" else None


def _zenflow(field: str, text: str, convert: Callable[[Any], Any] = lambda value: value) -> Callable[..., Fate]:
    def rule(run: Migration, value: Any) -> Fate:
        options = _zenflow_options(run)
        if options is None:
            return none("DeepSpeed takes zenflow with offload_optimizer.device='cpu' in stages 1 to 3 only")
        options[field] = convert(value)
        return became(f"offload: zenflow: {field}={options[field]!r}{text}")

    return rule


def _select_interval(run: Migration, value: Any) -> Fate:
    is_epoch = run.get("zero_optimization.zenflow.select_strategy") == "epoch"
    if value == "auto" or is_epoch:
        why = "epochs are not counted" if is_epoch else "there is no 'auto'"
        return none(f"{why}: ZenFlowConfig.select_interval is a number of steps, 64 by default")
    return _zenflow("select_interval", ", in steps")(run, value)


def _select_strategy(run: Migration, value: Any) -> Fate:
    if value == "step":
        return same("select_interval counts steps")
    return none(f"columns are chosen by steps: ZenFlowConfig.select_interval; {value!r} has no counterpart")


def _warm_up_rounds(run: Migration, value: Any) -> Fate:
    options = _zenflow_options(run)
    uses_auto = "auto" in (run.get("zero_optimization.zenflow.update_interval"),)
    least = 8 if uses_auto else 1
    if options is not None and _is_number(value) and value < least:
        return same(f"the first {least} steps step every column")
    return _zenflow("warmup_steps", "")(run, value)


def _precision(run: Migration, value: Any) -> Fate:
    if value is True:
        return became(f"precision={run.target.precision!r}: 16-bit weights, fp32 masters and optimizer states")
    return same("off, as it is here")


def _autocast(run: Migration, value: Any) -> Fate:
    return became(f"precision={run.target.precision!r}") if value else same("off, as it is here")


def _low_masters(run: Migration, value: Any) -> Fate:
    if not value or "master_weights" not in run.target.dtypes:
        return same("masters are fp32")
    return became("SuperScalePrecision(master_weights='bf16'), which rounds stochastically and keeps small updates so")


def _low_states(run: Migration, value: Any) -> Fate:
    if not value or "optimizer_states" not in run.target.dtypes:
        return same("optimizer states are fp32")
    return became("SuperScalePrecision(optimizer_states='bf16')")


def _scales_losses(run: Migration) -> bool:
    return run.target.precision in ("16-true", "16-mixed")


_NOT_SCALED = "no loss is scaled without fp16"


def _loss_scale(run: Migration, value: Any) -> Fate:
    if not _scales_losses(run):
        return same(_NOT_SCALED)
    if not value:
        return same("the loss scale is dynamic")
    return became(f"GradScaler(init_scale={float(value)}), which never grows; it halves where gradients overflow")


def _scale_power(run: Migration, value: Any) -> Fate:
    if not _scales_losses(run):
        return same(_NOT_SCALED)
    scale = run.target.scaler.get("init_scale")
    return became(f"GradScaler(init_scale={scale})") if scale else same("the loss scale starts at 2**16")


def _scale_window(run: Migration, value: Any) -> Fate:
    if not _scales_losses(run):
        return same(_NOT_SCALED)
    interval = run.target.scaler.get("growth_interval", 2000)
    if interval != value:
        return same("the loss scale is not dynamic")
    return became(f"GradScaler(growth_interval={interval})") if value != 2000 else same("2000 steps")


def _clipping(run: Migration, value: Any) -> Fate:
    if not _is_number(value) or value <= 0:
        return same("off, as it is here")
    run.target.trainer["gradient_clip_val"] = float(value)
    return became(f"Trainer(gradient_clip_val={float(value)})")


def _accumulation(run: Migration, value: Any) -> Fate:
    if value in (None, 1):
        return same("one micro-batch per step")
    run.target.trainer["accumulate_grad_batches"] = value
    return became(f"Trainer(accumulate_grad_batches={value})")


def _micro_batch(run: Migration, value: Any) -> Fate:
    return left(f"batch_size={value} of the DataLoader")


def _train_batch(run: Migration, value: Any) -> Fate:
    micro, steps = run.get("train_micro_batch_size_per_gpu"), run.get("gradient_accumulation_steps")
    text = "batch_size of the DataLoader x accumulate_grad_batches x devices"
    if _is_number(micro) and steps is None and _is_number(value):
        text += f": accumulate_grad_batches={value} / ({micro} x devices)"
    return left(f"{value} = {text}")


_DTYPE_NAMES = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "bfp16": "bf16"}


def _reduction_dtype(run: Migration, value: Any) -> Fate:
    dtype = _DTYPE_NAMES.get(str(value).lower())
    weights = {"bf16-true": "bf16", "16-true": "fp16"}.get(str(run.target.precision), "fp32")
    if value is None or dtype == weights:
        return same("gradients travel in their own dtype")
    if dtype is None or (dtype == "fp16" and weights != "fp16") or (dtype, weights) == ("bf16", "fp16"):
        return none(f"gradients of {weights} weights lose range or digits in {value}; they travel in their own dtype")
    run.target.dtypes["gradient_reduction"] = dtype
    return became(f"SuperScalePrecision(gradient_reduction={dtype!r})")


def _accumulation_dtype(run: Migration, value: Any) -> Fate:
    if value is None or str(value).lower() != "fp32" or run.target.precision not in ("bf16-true", "16-true"):
        return same("micro-batches add up in the dtype of param.grad")
    if run.target.stage > 1:
        return none(
            "stages 2 and 3 reduce every micro-batch; SuperScalePrecision(gradient_accumulation='fp32') needs "
            "ZeroConfig(no_sync=True), which keeps whole gradients on every rank"
        )
    run.target.dtypes["gradient_accumulation"] = "fp32"
    return became("SuperScalePrecision(gradient_accumulation='fp32')")


def _sequence(run: Migration, value: Any) -> Fate:
    if not _is_number(value) or value <= 1:
        return same("every rank has samples of its own")
    run.target.sequence["size"] = int(value)
    return became(f"sequence={value}, whose attention is found in the module: no classes to register, nothing to cut")


def _passes(run: Migration, value: Any) -> Fate:
    names = value if isinstance(value, list) else [value]
    if "autotp" in names:
        return none("ZeroConfig(stage=3, tensor_parallel=N) with a plan of parallelize_module() in configure_model()")
    if "autosp" in names and run.get("sequence_parallel_size") not in (None, 1, "auto"):
        return became("sequence, of sequence_parallel_size: compiled models are shared too")
    if "autosp" in names:
        return none(
            "sequence=N: say how many ranks share a sequence, which DeepSpeed takes from sequence_parallel_size"
        )
    return same("stages overlap without a compiler's passes") if value else same("off, as it is here")


def _autotp(run: Migration, value: Any) -> Fate:
    size = value.get("autotp_size", 0) if isinstance(value, Mapping) else 0
    if not size:
        return same("off, as it is here")
    return none(
        f"ZeroConfig(stage=3, tensor_parallel={size}) with a plan of parallelize_module() in configure_model(): no "
        "plan is taken from the model's class"
    )


def _offloaded_activations(run: Migration, value: Any) -> Fate:
    if not value:
        return same("off, as it is here")
    run.target.sequence.update(checkpoint_blocks="auto", offload_activations=True)
    return became("sequence: checkpoint_blocks='auto', offload_activations=True; drop calls of deepspeed.checkpointing")


def _reduce_op(run: Migration, value: Any) -> Fate:
    if str(value).lower() == "mean":
        return same("gradients are averaged over ranks")
    return none("gradients are averaged over ranks: multiply the loss by their number for a sum")


def _universal(run: Migration, value: Any) -> Fate:
    return same("fit(ckpt_path=...) takes DeepSpeed's checkpoints, universal or not; see --checkpoint")


_Z = "zero_optimization"
# Keys that take numbers only, or nothing.
_NUMBERS = {
    f"{_Z}.reduce_bucket_size",
    f"{_Z}.allgather_bucket_size",
    f"{_Z}.zero_hpz_partition_size",
    f"{_Z}.mics_shard_size",
    f"{_Z}.offload_optimizer.ratio",
    f"{_Z}.zenflow.topk_ratio",
    f"{_Z}.zenflow.full_warm_up_rounds",
    "fp16.loss_scale",
    "fp16.initial_scale_power",
    "fp16.loss_scale_window",
    "gradient_clipping",
    "gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu",
    "train_batch_size",
    "sequence_parallel_size",
}
RULES: dict[str, Callable[[Migration, Any], Fate]] = {
    f"{_Z}.stage": _stage,
    f"{_Z}.reduce_bucket_size": _bucket,
    f"{_Z}.allgather_bucket_size": _bucket,
    f"{_Z}.zero_hpz_partition_size": _hpz,
    f"{_Z}.mics_shard_size": _mics,
    f"{_Z}.elastic_checkpoint": _elastic,
    f"{_Z}.offload_optimizer.device": _optimizer_device,
    f"{_Z}.offload_optimizer.pin_memory": _pin,
    f"{_Z}.offload_optimizer.ratio": _ratio,
    f"{_Z}.offload_optimizer.super_offload": _super_offload,
    f"{_Z}.offload_param.device": _param_device,
    f"{_Z}.offload_param.pin_memory": _pin,
    f"{_Z}.zenflow.topk_ratio": _zenflow("topk", ", the share of columns stepped at every step"),
    f"{_Z}.zenflow.select_strategy": _select_strategy,
    f"{_Z}.zenflow.select_interval": _select_interval,
    f"{_Z}.zenflow.update_interval": _zenflow("update_interval", ", in steps"),
    f"{_Z}.zenflow.overlap_step": _zenflow("overlap", "", bool),
    f"{_Z}.zenflow.full_warm_up_rounds": _warm_up_rounds,
    "bf16.enabled": _precision,
    "bf16.bf16_master_weights_and_grads": _low_masters,
    "bf16.bf16_optimizer_states": _low_states,
    "bfloat16.enabled": _precision,
    "fp16.enabled": _precision,
    "fp16.loss_scale": _loss_scale,
    "fp16.initial_scale_power": _scale_power,
    "fp16.loss_scale_window": _scale_window,
    "torch_autocast.enabled": _autocast,
    "torch_autocast.dtype": _autocast,
    "gradient_clipping": _clipping,
    "gradient_accumulation_steps": _accumulation,
    "train_micro_batch_size_per_gpu": _micro_batch,
    "train_batch_size": _train_batch,
    "communication_data_type": _reduction_dtype,
    "data_types.grad_accum_dtype": _accumulation_dtype,
    "sequence_parallel_size": _sequence,
    "compile.passes": _passes,
    "tensor_parallel": _autotp,
    "activation_checkpointing.cpu_checkpointing": _offloaded_activations,
    "gradient_allreduce_op": _reduce_op,
    "checkpoint.load_universal": _universal,
}
