"""Hugging Face models with LoRA, experts and gradient checkpointing have plain AdamW's bits under our strategies."""

from __future__ import annotations

import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from peft import PeftModel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from examples.finetune_hf import experts, lora
from examples.finetune_hf.training import FineTuner, build_llama
from tests.helpers.ranks import run_ranks

SEQ_LEN, NUM_STEPS = 16, 6
STRATEGIES = ("superoffload", "zero3")


def base():
    torch.manual_seed(0)
    return build_llama(SEQ_LEN, hidden_size=24, num_layers=2)


def lora_module() -> FineTuner:
    return FineTuner(lora.adapted(base(), rank=4), 1e-2, 2)


def checkpointed_module() -> FineTuner:
    model = base()
    model.gradient_checkpointing_enable()
    return FineTuner(model, 1e-2, 2)


def experts_module() -> FineTuner:
    torch.manual_seed(0)
    return experts.FillIn(experts.build_encoder(num_experts=32, width=16, num_layers=2), 1e-2, 2)


MODULES = {"lora": lora_module, "checkpointing": checkpointed_module, "experts": experts_module}


class SaveAdapter(L.Callback):
    """Saves the adapter in the middle of training, from whole weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == NUM_STEPS:
            with trainer.strategy.full_params() as weights:
                if trainer.is_global_zero:
                    prefix = "model."
                    named = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
                    pl_module.model.save_pretrained(self.folder, state_dict=named)


def fit(name, strategy, rank=0, world_size=1, callbacks=()):
    module = MODULES[name]()
    # Each sample has few of the bytes, so that steps leave experts out.
    low = torch.arange(8 * NUM_STEPS)[:, None] * 5 % 240
    texts = low + torch.randint(0, 16, (8 * NUM_STEPS, SEQ_LEN + 1), generator=torch.Generator().manual_seed(1))
    data = TensorDataset(texts[:, :-1], texts[:, 1:])
    trainer = L.Trainer(
        strategy=strategy, devices=world_size, accelerator="cpu", max_epochs=1, logger=False,
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
        gradient_clip_val=None, callbacks=list(callbacks),
    )  # fmt: skip
    sampler = DistributedSampler(data, world_size, rank, shuffle=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, DataLoader(data, batch_size=8 // world_size, sampler=sampler))
    return module, {key: value.detach().clone() for key, value in module.state_dict().items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key in expected:
        assert torch.equal(found[key], expected[key]), key


@pytest.mark.parametrize("name", MODULES)
def test_one_process_has_the_bits_of_adamw(name, tmp_path):
    module, expected = fit(name, "auto")
    assert_changed(name, expected)
    if name == "experts":
        assert 0 < min(module.num_left_out) < 32
        assert len(set(module.num_left_out)) > 1
    for strategy in STRATEGIES:
        found = fit(name, strategy, callbacks=[SaveAdapter(tmp_path / strategy)] if name == "lora" else ())[1]
        assert_equal(found, expected)
        if name == "lora":
            assert_loads(tmp_path / strategy, expected)


def assert_changed(name, weights):
    before = MODULES[name]().state_dict()
    changed = [key for key in weights if not torch.equal(weights[key], before[key])]
    assert changed
    if name == "lora":
        assert all("lora_" in key for key in changed)


def assert_loads(folder, expected):
    """Peft puts the adapter on a base model of its own, with the weights that were trained."""
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) < 60_000
    loaded = PeftModel.from_pretrained(base(), folder).state_dict()
    assert_equal(loaded, {key.removeprefix("model."): value for key, value in expected.items()})


def over_ranks(rank, world_size, folder):
    found = {}
    for name in MODULES:
        expected = fit(name, DDPStrategy(find_unused_parameters=True), rank, world_size)[1]
        found[name, "ddp"] = expected
        for strategy in STRATEGIES:
            saves = [SaveAdapter(Path(folder, strategy))] if name == "lora" else ()
            found[name, strategy] = fit(name, strategy, rank, world_size, saves)[1]
    return found


def test_two_processes_have_the_bits_of_ddp_and_save_a_whole_adapter(tmp_path):
    for found in run_ranks(2, over_ranks, str(tmp_path), limit_s=240.0):
        for name in MODULES:
            assert_changed(name, found[name, "ddp"])
            for strategy in STRATEGIES:
                assert_equal(found[name, strategy], found[name, "ddp"])
        for strategy in STRATEGIES:
            assert_loads(tmp_path / strategy, found["lora", "ddp"])
