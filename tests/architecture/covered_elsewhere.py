"""Sources without a test file of their own, by the tests that hold them instead.

Most are parts of one thing that only shows whole: a format that is written and read, an engine that steps, a strategy
that trains. A new source file gets a test file beside it, or a line here under the test that would fail without it.
"""

from __future__ import annotations

BY_TEST: dict[str, list[str]] = {
    # Rules only show in a program whose tokens are shared.
    "sequence/tokens/test_tensor.py": [
        "sequence/tokens/call.py",
        "sequence/tokens/dispatch.py",
        "sequence/tokens/layout.py",
        *[
            f"sequence/tokens/rules/{name}.py"
            for name in [
                *["along_dims", "attention", "elementwise", "indexing", "losses", "metadata", "products"],
                *["reductions", "refused", "registry", "views"],
            ]
        ],
    ],
    # A checkpoint is saved, loaded, damaged and killed as a whole.
    "checkpoint/test_save_load.py": [
        "checkpoint/format/blocks.py",
        "checkpoint/format/dtypes.py",
        "checkpoint/load/reader.py",
        "checkpoint/save/writer.py",
        "checkpoint/state.py",
    ],
    "checkpoint/test_over_ranks.py": ["checkpoint/load/exchange.py", "checkpoint/phases.py"],
    "checkpoint/storage/test_local.py": ["checkpoint/storage/files.py", "checkpoint/storage/rename.py"],
    "checkpoint/foreign/test_deepspeed.py": [
        "checkpoint/foreign/deepspeed_files.py",
        "checkpoint/foreign/deepspeed_native.py",
        "checkpoint/foreign/deepspeed_universal.py",
        "checkpoint/foreign/registry.py",
    ],
    "checkpoint/foreign/test_export.py": [
        "checkpoint/foreign/deepspeed_export.py",
        "checkpoint/foreign/hf_export.py",
        "checkpoint/foreign/lightning_export.py",
        "checkpoint/foreign/staging.py",
        "checkpoint/foreign/torch_optimizer.py",
    ],
    "checkpoint/foreign/test_lightning_dirs.py": ["checkpoint/foreign/dcp.py"],
    "sequence/attention/test_shared.py": ["sequence/attention/replacement.py"],
    "sequence/attention/test_over_ranks.py": [
        "sequence/attention/all_gather.py",
        "sequence/attention/block.py",
        "sequence/attention/ring.py",
        "sequence/attention/sdpa.py",
        "sequence/attention/ulysses.py",
    ],
    "cli/test_checkpoint.py": [
        "checkpoint/tools/convert.py",
        "checkpoint/tools/diff.py",
        "checkpoint/tools/summary.py",
        "checkpoint/tools/view.py",
        "cli/command.py",
    ],
    "cli/test_doctor.py": ["cli/__main__.py"],
    # Real ranks: agreement, collectives and meshes only show over processes.
    "plugins/trainer/test_faults.py": ["comm/agreement.py"],
    "zero/test_reducer.py": ["comm/collectives.py", "comm/communicator.py", "zero/replicated.py"],
    "zero/test_tensor_parallel.py": ["comm/dtensor.py"],
    "plugins/trainer/test_strategy_over_ranks.py": ["zero/meta_init.py"],
    "plugins/trainer/test_sequence_axis.py": ["plugins/trainer/sample_ranks.py"],
    "config/test_config.py": [
        "config/checkpoint.py",
        "config/offload.py",
        "config/sequence.py",
        "config/zenflow.py",
        "config/zero.py",
        "errors.py",
    ],
    "extending/test_offload_engine.py": [
        "offload/cpu/engine.py",
        "offload/engine.py",
        "optim/step_rule.py",
        "optim/unit_state.py",
    ],
    "adversarial/test_interrupts.py": ["run/interrupts.py"],
    "adversarial/test_sharded_weights.py": ["optim/weights/sharded_operations.py"],
    "optim/weights/test_watch.py": ["optim/weights/param_classes.py"],
    "run/test_memory.py": ["offload/memory.py", "run/report/memory.py", "zero/memory.py"],
    "offload/cpu/test_state.py": ["offload/host_state.py"],
    "offload/planner/test_profile.py": ["offload/planner/profile_cache.py"],
    "offload/superoffload/test_step.py": [
        "offload/late_moments.py",
        "offload/superoffload/engine.py",
        "offload/superoffload/state.py",
    ],
    "offload/zenflow/test_step.py": [
        "offload/zenflow/engine.py",
        "offload/zenflow/deferred.py",
        "offload/zenflow/host_work.py",
        "offload/zenflow/saved.py",
        "offload/zenflow/split_slice.py",
        "offload/zenflow/state.py",
        "offload/zenflow/sums.py",
    ],
    "run/test_host_plan.py": ["offload/link/arena.py"],
    "ops/cpu/test_adamw.py": ["ops/reference.py", "ops/types.py"],
    "ops/test_low_precision.py": ["ops/state_dtypes.py"],
    "ops/native/test_loader.py": ["ops/native/build.py", "ops/native/torch_root.py"],
    "ops/gpu/test_gpu_catalog.py": ["ops/gpu_catalog.py", "ops/triton/launch.py"],
    "ops/gpu/test_cuda_kernels_on_host.py": ["ops/cuda/abi.py", "ops/cuda/kernels.py"],
    "ops/gpu/test_triton_interpreted.py": [
        "ops/triton/adamw_low.py",
        "ops/triton/elementwise.py",
        "ops/triton/index.py",
        "ops/triton/reductions.py",
        "ops/triton/kernels/adamw_low.py",
        "ops/triton/kernels/bits.py",
        "ops/triton/kernels/elementwise.py",
        "ops/triton/kernels/index.py",
        "ops/triton/kernels/reductions.py",
    ],
    # The engine's parts have no use of their own: all programs of backward run through them.
    "optim/test_engine.py": [
        "optim/adamw_step.py",
        "optim/bucketing.py",
        "optim/mixed_step.py",
        "optim/param_update.py",
        "optim/state_dict.py",
        "optim/torch_step.py",
        "optim/transport.py",
        "optim/unit.py",
        "optim/verdict.py",
        "zero/buckets/transport.py",
        "zero/buckets/unit.py",
        "zero/grads_in_param.py",
    ],
    "plugins/trainer/test_low_precision.py": ["optim/grad_dtypes.py"],
    "zero/fsdp2/test_transport.py": [
        "zero/fsdp2/accumulated_grads.py",
        "zero/fsdp2/all_gather.py",
        "zero/fsdp2/grouping.py",
        "zero/fsdp2/module.py",
        "zero/fsdp2/shard.py",
        "zero/fsdp2/unit.py",
    ],
    "zero/fsdp2/test_contract.py": ["zero/fsdp2/unwrap.py"],
    "plugins/trainer/test_backward_patterns.py": ["zero/fsdp2/autograd.py", "zero/fsdp2/user_errors.py"],
    "plugins/test_registry.py": [
        "plugins/pytorch.py",
        "plugins/pytorch_lightning.py",
    ],
    "plugins/checkpoint/test_io.py": [
        "plugins/binder.py",
        "plugins/checkpoint/lightning_strategies.py",
        "plugins/checkpoint/load_from_checkpoint.py",
        "run/state/collect.py",
        "run/state/restore.py",
    ],
    "plugins/checkpoint/test_universal_checkpoints.py": ["run/state/optimizer_states.py"],
    "plugins/trainer/test_strategy.py": [
        "run/assemble.py",
        "run/state/module_state.py",
        "run/report/plan.py",
        "run/report/reasons.py",
        "run/settings.py",
    ],
    "plugins/trainer/test_traps.py": ["plugins/trainer/visibility.py", "run/visibility.py"],
    "extending/test_module_technique.py": [
        *(f"run/techniques/{name}.py" for name in ("collection", "registry", "technique")),
    ],
    "run/test_weight_flow.py": ["run/techniques/weight_flow.py"],
    "cli/test_trace.py": ["run/report/phases.py", "run/report/recorder.py"],
}
