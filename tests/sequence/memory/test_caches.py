"""Blocks of transformers are computed again without keys and values of the first time."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

import lightning_superscale as lss
from lightning_superscale.sequence.memory.caches import configs_with_caches, without_caches
from tests.helpers.trainers import trainer

transformers = pytest.importorskip("transformers")


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
        self.model = transformers.LlamaForCausalLM(config)
        self.seen: list[bool] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(self.model.config.use_cache)
        return self.model(input_ids=batch, labels=batch).loss

    def validation_step(self, batch, batch_idx):
        self.seen.append(self.model.config.use_cache)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fitted(sequence) -> Module:
    module = Module()
    data = DataLoader(torch.randint(64, (4, 8), generator=torch.Generator().manual_seed(0)), 2)
    run = trainer(lss.SuperScaleStrategy(sequence=sequence), max_epochs=1)
    run.fit(module, data, data)
    return module


def test_a_model_with_its_default_config_trains_as_without_recomputed_blocks():
    plain, again = fitted(None), fitted(lss.SequenceConfig(checkpoint_blocks=True, tile_loss=False))
    for (name, expected), found in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(found, expected), name
    assert plain.seen == [True] * 4
    assert again.seen == [False, False, True, True], "only steps that train do without"


def test_configs_have_their_caches_back_after_an_error():
    module = Module()

    def fails() -> None:
        with without_caches(configs_with_caches(module)):
            assert not module.model.config.use_cache
            raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        fails()
    assert module.model.config.use_cache
