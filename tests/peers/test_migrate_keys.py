"""Every field of DeepSpeed's own configuration classes is known to `superscale migrate`: `make test-peers`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect

import pytest
import torch
from torch import nn

from lightning_superscale.cli.migrate.deepspeed import Migration, known_keys
from lightning_superscale.cli.migrate.schedulers import PARAMS
from lightning_superscale.cli.migrate.target import Target
from tests.cli.migrate.test_schedulers import ATOL, CASES, LR, RTOL, STEPS, rates

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not here: make test-peers"),
]

# Section -> module and class of its pydantic model; a class that a release has retired may be gone.
MODELS = {
    "zero_optimization": ("runtime.zero.config", "DeepSpeedZeroConfig"),
    "zero_optimization.offload_optimizer": ("runtime.zero.offload_config", "DeepSpeedZeroOffloadOptimizerConfig"),
    "zero_optimization.offload_param": ("runtime.zero.offload_config", "DeepSpeedZeroOffloadParamConfig"),
    "zero_optimization.zenflow": ("runtime.zenflow.zenflow_config", "ZenFlowConfig"),
    "zero_optimization.leaf_module": ("runtime.zero.leaf_module_config", "DeepSpeedZeroLeafModuleConfig"),
    "bf16": ("runtime.precision_config", "DeepSpeedBF16Config"),
    "fp16": ("runtime.precision_config", "DeepSpeedFP16Config"),
    "compile": ("compile.config", "CompileConfig"),
}


def fields(section: str) -> list[str]:
    module, name = MODELS[section]
    model = getattr(importlib.import_module(f"deepspeed.{module}"), name)
    return [f"{section}.{field.alias or key}" for key, field in model.model_fields.items()]


@pytest.mark.parametrize("section", MODELS)
def test_every_field_is_known(section):
    known = known_keys()
    missing = [key for key in fields(section) if key not in known and not any(k.startswith(f"{key}.") for k in known)]
    assert not missing


def test_every_section_that_deepspeed_reads_is_known():
    """Names of sections and of scalars, as constants of DeepSpeed hold them."""
    names = {
        "TRAIN_BATCH_SIZE", "TRAIN_MICRO_BATCH_SIZE_PER_GPU", "GRADIENT_ACCUMULATION_STEPS", "SPARSE_GRADIENTS",
        "GRADIENT_CLIPPING", "COMMUNICATION_DATA_TYPE", "SEQ_PARALLEL_COMMUNICATION_DATA_TYPE", "PRESCALE_GRADIENTS",
        "GRADIENT_PREDIVIDE_FACTOR", "DISABLE_ALLGATHER", "DUMP_STATE", "VOCABULARY_SIZE", "WALL_CLOCK_BREAKDOWN",
        "MEMORY_BREAKDOWN", "DATALOADER_DROP_LAST", "STEPS_PER_PRINT", "ZERO_ALLOW_UNTESTED_OPTIMIZER",
        "ZERO_FORCE_DS_CPU_OPTIMIZER", "USE_DATA_BEFORE_EXPERT_PARALLEL",
    }  # fmt: skip
    constants = importlib.import_module("deepspeed.runtime.constants")
    known = known_keys()
    assert not [name for name in names if hasattr(constants, name) and getattr(constants, name) not in known]


@pytest.mark.parametrize(("name", "formula", "params"), CASES)
def test_rates_are_those_of_deepspeeds_schedulers(name, formula, params):
    schedules = importlib.import_module("deepspeed.runtime.lr_schedules")
    optimizer = torch.optim.AdamW(nn.Linear(1, 1).parameters(), lr=LR)
    scheduler = getattr(schedules, name)(optimizer, **params)
    found = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close(
        torch.tensor(rates(name, params), dtype=torch.float64),
        torch.tensor(found, dtype=torch.float64),
        rtol=RTOL,
        atol=ATOL,
    )


@pytest.mark.parametrize("name", PARAMS)
def test_parameters_and_defaults_of_schedulers_are_deepspeeds(name):
    schedules = importlib.import_module("deepspeed.runtime.lr_schedules")
    found = inspect.signature(getattr(schedules, name).__init__).parameters
    theirs = {key: None if one.default is one.empty else one.default for key, one in found.items()}
    for key in ("self", "optimizer", "last_batch_iteration"):
        del theirs[key]
    assert theirs == PARAMS[name]


def test_defaults_of_every_model_are_migrated():
    for section in ("bf16", "fp16"):
        module, name = MODELS[section]
        model = getattr(importlib.import_module(f"deepspeed.{module}"), name)
        rows = Migration({section: model().model_dump(by_alias=True)}, Target()).rows
        assert "unknown" not in {row.fate.outcome for row in rows}
