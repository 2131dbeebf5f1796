"""The example's module in a Trainer: parameter groups, schedule, and resumption bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import lightning_superscale as lss
from examples.language_model.data import TextData
from examples.language_model.model import GPTConfig
from examples.language_model.module import LanguageModel
from examples.language_model.report import ProgressLines, read_history
from tests.helpers.trainers import assert_same_weights, trainer

TINY = GPTConfig(context=16, num_layers=1, dim=16, num_heads=2, num_kv_heads=1)


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.txt").write_text(f"line {i} of a text that repeats itself. " * 30)
    return folder


def parts(texts, **flags):
    torch.manual_seed(0)
    return LanguageModel(TINY, **flags), TextData(texts, seq_len=16, batch_size=4, num_val_windows=8)


def test_matrices_decay_and_norms_and_embedding_do_not(texts):
    module, data = parts(texts)
    run = trainer("superoffload", max_steps=1, max_epochs=-1)
    run.fit(module, data)
    decayed, rest = run.optimizers[0].param_groups
    names = {param: name for name, param in module.named_parameters()}
    assert decayed["weight_decay"] == 0.1
    assert rest["weight_decay"] == 0.0
    assert {names[p] for p in rest["params"]} == {n for n in names.values() if "norm" in n or "embedding" in n}
    assert {*decayed["params"], *rest["params"]} == set(names)


def test_schedule_rises_to_the_peak_and_falls_to_the_minimum():
    module = LanguageModel(TINY, warmup_steps=10, min_lr_ratio=0.1)
    ratios = [module.lr_ratio(step, 100) for step in range(101)]
    assert ratios[0] == pytest.approx(0.1)
    assert max(ratios) == ratios[9] == ratios[10] == 1.0
    assert ratios[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(ratios[10:], ratios[11:], strict=False))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_weights_that_flow_train_to_the_same_bits(texts, precision):
    trained = {}
    for weights in ("stationary", "flow"):
        torch.manual_seed(0)
        module = LanguageModel(replace(TINY, num_layers=4), warmup_steps=2)
        data = TextData(texts, seq_len=16, batch_size=4, num_val_windows=8)
        strategy = lss.SuperScaleStrategy(offload={"engine": "superoffload", "weights": weights})
        run = trainer(strategy, max_steps=6, max_epochs=-1, precision=precision, gradient_clip_val=0.5)
        run.fit(module, data)
        trained[weights] = module
    assert_same_weights(trained["flow"], trained["stationary"])


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_resuming_in_mid_epoch_equals_training_straight_through(texts, tmp_path, precision):
    flags = {"max_epochs": -1, "precision": precision, "gradient_clip_val": 0.5, "enable_checkpointing": True}
    straight, data = parts(texts)

    def every_seven_steps():
        return [ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=7, save_top_k=-1)]

    run = trainer("superoffload", max_steps=14, callbacks=every_seven_steps(), **flags)
    run.fit(straight, data)
    assert len(data.train_dataloader()) > 14

    resumed, data = parts(texts)
    torch.nn.init.zeros_(resumed.gpt.head.weight)  # all of it comes from the checkpoint
    run = trainer("superoffload", max_steps=14, callbacks=every_seven_steps(), **flags)
    run.fit(resumed, data, ckpt_path=tmp_path / "step=7.ckpt", weights_only=True)
    assert run.global_step == 14
    assert_same_weights(resumed, straight)


def test_resuming_from_the_end_of_a_run_equals_one_long_run(texts, tmp_path):
    # The demo's way: the first run ends at max_steps. With a constant learning rate the two must be equal.
    flags = {"max_epochs": -1, "precision": "bf16-true", "gradient_clip_val": 0.5, "enable_checkpointing": True}
    constant = {"warmup_steps": 0, "min_lr_ratio": 1.0}

    def fit(max_steps, ckpt_path=None):
        module, data = parts(texts, **constant)
        saver = ModelCheckpoint(
            tmp_path, save_last=True, save_top_k=0, save_on_train_epoch_end=True, enable_version_counter=False
        )
        logger = CSVLogger(tmp_path, name="logs")
        run = trainer(
            "superoffload", max_steps=max_steps, callbacks=[saver], **flags | {"logger": logger, "log_every_n_steps": 1}
        )
        run.fit(module, data, ckpt_path=ckpt_path)
        assert run.global_step == max_steps
        return module

    fit(5)
    resumed = fit(10, ckpt_path=tmp_path / "last.ckpt")
    history = read_history(tmp_path / "logs")
    assert [step for step, _ in history.train] == list(range(1, 11))
    assert history.resumed_at == [5]
    assert_same_weights(resumed, fit(10))


def test_checkpoint_gives_the_module_back(texts, tmp_path):
    module, data = parts(texts)
    run = trainer("superoffload", max_steps=2, max_epochs=-1)
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = LanguageModel.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert again.gpt.config == TINY
    assert_same_weights(again, module)


def test_progress_lines_come_once_per_block_of_steps(capsys):
    lines = ProgressLines(max_steps=200, every_n_steps=50)
    for step in range(4, 201, 5):  # never a multiple of 50, as after a resume
        lines.log_metrics({"train_loss": 1.0, "tokens_per_s": 1234.0}, step)
    lines.log_metrics({"val_bits_per_byte": 2.5}, 200)
    assert capsys.readouterr().out.splitlines() == [
        "step    54 of 200  training    1.443 bits/byte  1,234 tokens/s",
        "step   104 of 200  training    1.443 bits/byte  1,234 tokens/s",
        "step   154 of 200  training    1.443 bits/byte  1,234 tokens/s",
        "step   200 of 200  validation  2.500 bits/byte",
    ]
