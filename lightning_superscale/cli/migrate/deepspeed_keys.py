"""What DeepSpeed's configuration keys are here: a row per key whose fate does not depend on its value.

Keys whose value is carried over are in `deepspeed.RULES`. Both together know every key of DeepSpeed 0.19's ZeRO,
offload, ZenFlow, precision, clipping, compile and sequence sections (https://www.deepspeed.ai/docs/config-json/).
DeepSpeed retired features in September 2026: https://github.com/deepspeedai/DeepSpeed/issues/8489.
"""

from __future__ import annotations

from lightning_superscale.cli.migrate.rows import Fate, left, none, retired, same

_RETIRED = "DeepSpeed removed it in 2026-09 (its issue 8489)"
_NVME = "of NVMe, which nothing is offloaded to here: host memory holds it"
_GATHERED = "stage 3 gathers the weights of one repeated block ahead of its use, whatever the sizes of its parameters"
_LOGGERS = "pass a logger to Trainer(logger=...)"

_ZERO = {
    "contiguous_gradients": same("gradients always lie in buckets"),
    "reduce_scatter": same("each rank gets its part of the mean only, from stage 2 on"),
    "use_multi_rank_bucket_allreduce": same("buckets of all ranks are reduced together"),
    "allgather_partitions": same("new weights are all-gathered by bucket"),
    "overlap_comm": same("reductions always overlap with backward"),
    "load_from_fp32_weights": same("fp32 masters are always restored from a checkpoint that has them"),
    "sub_group_size": same("the optimizer steps bucket by bucket"),
    "stage3_prefetch_bucket_size": same(_GATHERED),
    "stage3_param_persistence_threshold": same(_GATHERED),
    "stage3_model_persistence_threshold": same(_GATHERED),
    "stage3_max_live_parameters": same(_GATHERED),
    "stage3_max_reuse_distance": same(_GATHERED),
    "stage3_module_granularity_threshold": same(
        "repeated blocks are found and gathered whole; ZeroConfig.wrap names others"
    ),
    "stage3_use_all_reduce_for_fetch_params": same(_GATHERED),
    "stage3_allgather_sequential": same(_GATHERED),
    "stage3_gather_16bit_weights_on_model_save": same(
        "checkpoints hold whole tensors; `superscale checkpoint export CKPT DIR --to hf` writes weights alone"
    ),
    "stage3_gather_fp16_weights_on_model_save": same(
        "checkpoints hold whole tensors; `superscale checkpoint export CKPT DIR --to hf` writes weights alone"
    ),
    "ignore_unused_parameters": same("parameters without a gradient are never an error"),
    "legacy_stage1": same("there is one stage 1"),
    "round_robin_gradients": same("every rank has rows of every parameter, so all copy and step alike"),
    "zero_quantized_weights": none("weights travel in their own dtype: nothing is rounded on the way"),
    "zero_quantized_nontrainable_weights": none("frozen weights keep their dtype"),
    "zero_quantized_gradients": none(
        "gradients are averaged exactly; SuperScalePrecision(gradient_reduction='bf16') halves what fp32 ones send"
    ),
    "zeropp_loco_param": retired(f"{_RETIRED}; no reduction is quantized here"),
    "mics_hierarchical_params_gather": retired(f"{_RETIRED}; ranks of one group gather among themselves"),
    "memory_efficient_linear": same("backward gathers weights again, and keeps no copy of them"),
    "pipeline_loading_checkpoint": same("ranks read each block of a checkpoint once, together"),
    "compute_grad_norm": same("a norm is taken where clipping, a check or strategy.grad_norm() asks for it"),
    "parameter_alignment": none("parameters lie close together in their bucket"),
    "override_module_apply": same(
        "the module's methods are left alone; configure_model() builds it on the meta device"
    ),
    "log_trace_cache_warnings": same("no order of modules is traced that could be invalid"),
    "enable_sanity_checks": same("SuperScaleStrategy(error_if_nonfinite=True) checks gradients before each step"),
    "save_muon_momentum_buffer_in_memory": none(f"the state is {_NVME}"),
    "leaf_module.classes": same("repeated blocks are gathered whole, with all experts in them"),
    "leaf_module.names": same("repeated blocks are gathered whole, with all experts in them"),
    "leaf_module.name_suffixes": same("repeated blocks are gathered whole, with all experts in them"),
    "offload_param.nvme_path": none(f"a path {_NVME}"),
    "offload_param.buffer_count": none(f"buffers {_NVME}"),
    "offload_param.buffer_size": none(f"buffers {_NVME}"),
    "offload_param.max_in_cpu": none(f"a limit {_NVME}"),
    "offload_optimizer.nvme_path": none(f"a path {_NVME}"),
    "offload_optimizer.buffer_count": none(f"buffers {_NVME}"),
    "offload_optimizer.pipeline_read": none(f"reads {_NVME}"),
    "offload_optimizer.pipeline_write": none(f"writes {_NVME}"),
    "offload_optimizer.fast_init": none(f"files {_NVME}"),
    "offload_optimizer.cpuadam_cores_perc": same(
        "OffloadConfig.cpu_threads='auto' measures how many threads step as fast as all cores; a number fixes it"
    ),
    "zenflow.offload": none("states of selected columns stay on the device: 12 bytes per selected parameter"),
    "zenflow.auto_ratio": none(
        "ZenFlowConfig(update_interval='auto') measures device and host, and needs no threshold"
    ),
    "zenflow.pt_reserved_cores_perc": same(
        "OffloadConfig.cpu_threads='auto' measures how many threads the host needs; a number fixes it"
    ),
    "zenflow.steps_per_epoch": same("intervals are counted in steps; DeepSpeed sets this key itself"),
}

# DeepSpeed takes these fields by their names in its class too, which lack the prefix.
_ZERO.update({key.removeprefix("stage3_"): fate for key, fate in _ZERO.items() if key.startswith("stage3_")})

_FP16 = {
    "auto_cast": same("inputs of a 16-bit module are converted"),
    "hysteresis": none("the loss scale halves at the first overflow, as torch's GradScaler does"),
    "consecutive_hysteresis": none("the loss scale halves at the first overflow, as torch's GradScaler does"),
    "min_loss_scale": none("the loss scale has no floor, as in torch's GradScaler"),
    "fp16_master_weights_and_grads": none(
        "fp16 has no numbers between 6e-8 and 0, where most updates are: masters are fp32"
    ),
}

_BF16 = {
    "immediate_grad_update": same("gradients leave during backward"),
    "check_grad_overflow": none(
        "a step with such gradients is not skipped; SuperScaleStrategy(error_if_nonfinite=True) raises and names them"
    ),
    "check_overflow": none(
        "a step with such gradients is not skipped; SuperScaleStrategy(error_if_nonfinite=True) raises and names them"
    ),
}

_COMPILE = "compile the module or its blocks with torch.compile in configure_model()"
_COMPILE_KEYS = {
    "enabled": none(_COMPILE),
    "backend": none(_COMPILE),
    "kwargs": none(_COMPILE),
    "deepcompile": none(f"{_COMPILE}; gathers of stage 3 are scheduled by FSDP2"),
    "autoep_non_moe": none(_COMPILE),
    "free_activation": none("what backward keeps is torch.compile's choice"),
    "free_activation_threshold": none("what backward keeps is torch.compile's choice"),
    "offload_activation": none(
        "SequenceConfig(checkpoint_blocks='auto', offload_activations=True) keeps blocks' inputs in host memory"
    ),
    "offload_activation_pin_memory": same("host memory of activations is page-locked"),
    "offload_opt_states": none("offload='superoffload' keeps and steps optimizer states in host memory"),
    "double_buffer": same("gathers of stage 3 are double-buffered by FSDP2"),
    "symmetric_memory": none("collectives are torch.distributed's"),
    "debug_log": none("`superscale trace -- COMMAND` draws a step"),
    "offload_parameters": none("OffloadConfig(weights='flow') streams weights from host memory"),
    "sync_before_reduce": none("it debugs DeepSpeed's compiler"),
    "sync_after_reduce": none("it debugs DeepSpeed's compiler"),
    "sync_before_allgather": none("it debugs DeepSpeed's compiler"),
    "sync_after_allgather": none("it debugs DeepSpeed's compiler"),
    "keep_int_input_tensors": none(_COMPILE),
    "keep_all_input_tensors": none(_COMPILE),
}

_ACTIVATIONS = {
    "partition_activations": none(
        "ranks that share activations share the sequence: sequence=N; or SequenceConfig(checkpoint_blocks='auto')"
    ),
    "number_checkpoints": none("SequenceConfig(checkpoint_blocks='auto') keeps one input per repeated block"),
    "contiguous_memory_optimization": same("torch's allocator keeps them"),
    "synchronize_checkpoint_boundary": same("nothing waits at the boundary of a block"),
    "profile": none("`superscale trace -- COMMAND` draws a step"),
}

_TOP = {
    "managed_gradient_accumulation": same("the Trainer counts micro-batches; manual optimization works too"),
    "zero_allow_untested_optimizer": same(
        "torch's optimizers are known; one of your own that treats every element by itself needs "
        "ZeroConfig(assume_elementwise=True)"
    ),
    "zero_force_ds_cpu_optimizer": same("the optimizer stays yours; Adam and AdamW take the native kernel"),
    "prescale_gradients": same("the mean over ranks is the same"),
    "gradient_predivide_factor": same("the mean over ranks is the same"),
    "sparse_gradients": retired(f"{_RETIRED}; gradients are dense: use torch.nn.Embedding(sparse=False)"),
    "disable_allgather": same("new weights are all-gathered"),
    "seq_parallel_communication_data_type": same("tokens travel in their own dtype"),
    "steps_per_print": none("Trainer(log_every_n_steps=...), or the ScaleMonitor callback"),
    "wall_clock_breakdown": none("the ScaleMonitor callback, or `superscale trace -- COMMAND`"),
    "disable_python_gc": none("call gc.disable() in on_train_start()"),
    "memory_breakdown": none("strategy.explain() lists memory by class of bytes"),
    "dump_state": none("strategy.explain() prints what was resolved"),
    "log_level": none("use Python's logging"),
    "dataloader_drop_last": none("DataLoader(drop_last=...)"),
    "graph_harvesting": none(_COMPILE),
    "vocabulary_size": same("tiles of the loss need no hint: SequenceConfig.tile_loss"),
    "ddp_bf16": same("stage 0 takes every precision"),
    "use_data_before_expert_parallelism": none("there is no expert parallelism"),
    "torch_autocast.lower_precision_safe_modules": none("torch.autocast chooses by operation"),
    "data_types.param_dtype": same("the precision says in which dtype weights are"),
    "data_types.buffer_dtype": same("the precision converts floating-point buffers with the weights"),
    "checkpoint.tag_validation": same("all ranks agree on a checkpoint before any writes"),
    "checkpoint.use_node_local_storage": none("a checkpoint is one folder that all ranks see"),
    "checkpoint.parallel_write.pipeline_stage": same("every rank writes its part"),
    "checkpoint.checkpoint_serialization": same("tensors are written as safetensors"),
    "data_parallel_size": same("ranks that share no sequence share batches: the Trainer's devices divided by sequence"),
}

KEYS: dict[str, Fate] = {
    **_TOP,
    **{f"zero_optimization.{key}": fate for key, fate in _ZERO.items()},
    **{f"fp16.{key}": fate for key, fate in _FP16.items()},
    **{f"{name}.{key}": fate for name in ("bf16", "bfloat16") for key, fate in _BF16.items()},
    **{f"compile.{key}": fate for key, fate in _COMPILE_KEYS.items()},
    **{f"activation_checkpointing.{key}": fate for key, fate in _ACTIVATIONS.items()},
}

# Sections that are one row, whatever is in them.
SECTIONS: dict[str, Fate] = {
    "aio": none(f"settings {_NVME}"),
    "amp": retired(f"{_RETIRED}; precision='16-mixed' is torch's own"),
    "autotuning": none("'auto' values of OffloadConfig and ZenFlowConfig are measured on this machine"),
    "checkpoint.writer": same("CheckpointConfig(asynchronous=True) writes while training goes on"),
    "comet": none(_LOGGERS),
    "comms_logger": none("`superscale trace -- COMMAND` draws collectives; strategy.explain() says what they send"),
    "compression_training": retired(f"{_RETIRED}; torchao quantizes and prunes"),
    "csv_monitor": none(f"{_LOGGERS}: CSVLogger"),
    "curriculum_learning": none(
        "a schedule of data is the DataModule's: reload_dataloaders_every_n_epochs, or a sampler"
    ),
    "data_efficiency": none("a schedule of data is the DataModule's: reload_dataloaders_every_n_epochs, or a sampler"),
    "datastates_ckpt": same("CheckpointConfig(asynchronous=True) writes while training goes on"),
    "eigenvalue": retired(_RETIRED),
    "elasticity": retired(f"{_RETIRED}; checkpoints resume at any number of ranks, and batch sizes are yours"),
    "expert_parallel": none("there is no expert parallelism; stage 3 shards experts as other weights"),
    "flops_profiler": none("torch.utils.flop_counter.FlopCounterMode counts; Lightning's ThroughputMonitor logs"),
    "hybrid_engine": none("generate with weights of strategy.full_params() or of a checkpoint"),
    "nebula": retired(f"{_RETIRED}; CheckpointConfig(asynchronous=True) writes while training goes on"),
    "pipeline": none("there is no pipeline parallelism: stage 3, or ZeroConfig(stage=3, tensor_parallel=N)"),
    "progressive_layer_drop": retired(_RETIRED),
    "quantize_training": retired(_RETIRED),
    "sparse_attention": retired(f"{_RETIRED}; torch's flex_attention takes block masks, also over sequence=N"),
    "tensorboard": none(f"{_LOGGERS}: TensorBoardLogger"),
    "timers": none("the ScaleMonitor callback"),
    "wandb": none(f"{_LOGGERS}: WandbLogger"),
    "weight_quantization": none("it is of inference"),
}

# Values "auto", which transformers and accelerate replace by their own arguments before DeepSpeed sees them.
AUTO: dict[str, Fate] = {
    "gradient_clipping": left("Trainer(gradient_clip_val=...): max_grad_norm of TrainingArguments, 1.0 by default"),
    "gradient_accumulation_steps": left("Trainer(accumulate_grad_batches=...)"),
    "train_micro_batch_size_per_gpu": left("batch_size of the DataLoader"),
    "train_batch_size": left("batch_size of the DataLoader x accumulate_grad_batches x devices"),
    "bf16.enabled": left("Trainer(precision='bf16-true') for bf16=True of TrainingArguments"),
    "bfloat16.enabled": left("Trainer(precision='bf16-true') for bf16=True of TrainingArguments"),
    "fp16.enabled": left("Trainer(precision='16-true') for fp16=True of TrainingArguments"),
}
AUTO_ELSEWHERE = left("the default here; accelerate fills it in from the model")
