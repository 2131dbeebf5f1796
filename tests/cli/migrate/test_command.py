"""`superscale migrate` on configurations as people have them: what is printed trains, in Python and through YAML."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader

import lightning_superscale as lss
from lightning_superscale.cli import main
from lightning_superscale.cli.migrate.command import migrate
from lightning_superscale.cli.migrate.source import read
from tests.helpers.ranks import run_ranks

DATA = Path(__file__).parent / "data"
QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "max_steps": 3,  # the rates of DeepSpeed's warm-up are zero twice
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "logger": False,
}
FLOW = {"engine": "superoffload", "weights": "flow"}
ZENFLOW = {"engine": "zenflow", "zenflow": {"topk": 0.05, "update_interval": 4, "overlap": True}}
LOW = {"master_weights": "bf16", "optimizer_states": "bf16", "gradient_reduction": "fp32"}
# By file: arguments of the strategy, precision, other arguments of the Trainer.
CASES: dict[str, tuple[dict, str | None, dict]] = {
    "zero1.json": ({"zero": {"stage": 1, "bucket_mb": 9}}, "bf16-true", {"gradient_clip_val": 1.0}),
    "zero2_fp16_offload.json": (
        {"zero": 2, "offload": "superoffload"}, "16-true", {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}
    ),
    "zero3_accelerate.json": ({"zero": 3}, None, {}),
    "zero3_offload_both.json": (
        {"zero": 2, "offload": FLOW, "sequence": {"checkpoint_blocks": "auto", "offload_activations": True}},
        "bf16-true", {"accumulate_grad_batches": 4},
    ),
    "zero3_infinity_nvme.json": ({"zero": 2, "offload": FLOW}, "bf16-true", {}),
    "superoffload.json": (
        {"zero": 3, "offload": {"engine": "superoffload", "gpu_fraction": 0.1}}, "bf16-true", {"gradient_clip_val": 1.0}
    ),
    "zenflow.json": ({"zero": 2, "offload": ZENFLOW}, "bf16-true", {}),
    "autosp.json": ({"zero": 1, "sequence": 2}, "bf16-true", {}),
    "fp32_ddp.json": ({}, None, {}),
    "zero2_autocast_cosine.json": ({"zero": 2}, "bf16-mixed", {}),
    "zeropp_mics.json": ({"zero": {"stage": 3, "shard_size": 2}}, "bf16-true", {}),
    "deprecated_cpu_offload.json": (
        {"zero": 2, "offload": {"engine": "superoffload", "pin_memory": False}}, "16-true", {}
    ),
    "deepspeed_strategy.yaml": (
        {"zero": 2, "offload": FLOW}, "bf16-true", {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
    ),
    "fsdp.yaml": (
        {"zero": {"stage": 3, "shard_size": 2}, "sequence": {"checkpoint_blocks": "auto"}, "checkpoint": {}}, None, {}
    ),
    "fsdp_cpu_offload.yaml": ({"zero": 2, "offload": FLOW, "checkpoint": {}}, "32-true", {}),
    "deepspeed_call.txt": ({"zero": 2, "offload": "superoffload"}, None, {}),
}  # fmt: skip
TWO_RANKS = ("autosp.json", "zeropp_mics.json", "fsdp.yaml")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Language(L.LightningModule):
    """A small causal language model with the hyperparameters that accelerate would fill in."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters(
            {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "warmup_num_steps": 2}
        )
        torch.manual_seed(3)
        self.embed, self.head = nn.Embedding(11, 16), nn.Linear(16, 11)
        self.blocks = nn.ModuleList(Block(16) for _ in range(3))

    def training_step(self, batch, batch_idx):
        x = self.embed(batch["input_ids"])
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1).float(), batch["labels"].flatten())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self):
        ids = torch.randint(0, 11, (32, 9), generator=torch.Generator().manual_seed(5))
        return DataLoader([{"input_ids": row[:-1], "labels": row[1:]} for row in ids], batch_size=2)


def train(python: str, optimizers: str, **flags) -> L.Trainer:
    """Train with lines as they were printed; the Trainer gets a CPU and quiet beside its own arguments."""
    module_class = Language
    if optimizers:
        names: dict = {}
        exec(optimizers, names)
        module_class = type("Migrated", (Language,), {"configure_optimizers": names["configure_optimizers"]})
    module = module_class()
    names, plain = {}, L.Trainer
    L.Trainer = lambda **given: plain(**{**QUIET, **flags, **given})
    try:
        exec(python, names)
    finally:
        L.Trainer = plain
    trainer = names["trainer"]
    weights: list[dict[str, torch.Tensor]] = []

    def keep() -> None:
        with trainer.strategy.full_params() as found:
            weights.append({name: value.clone() for name, value in found.items()})

    module.on_train_start = module.on_train_end = keep
    trainer.fit(module)
    assert trainer.global_step == 3
    before, after = weights
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
    return trainer


def printed(capsys, name: str, *options: str) -> dict:
    assert main(["migrate", str(DATA / name), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def assert_settings(trainer: L.Trainer, name: str) -> None:
    arguments, precision, flags = CASES[name]
    expected = lss.SuperScaleStrategy(**arguments)
    strategy = trainer.strategy
    assert strategy.zero_config == expected.zero_config
    assert strategy.offload_config == expected.offload_config
    assert strategy.sequence_config == expected.sequence_config
    assert trainer.precision_plugin.precision == (precision or "32-true")
    for key, value in flags.items():
        assert getattr(trainer, key) == value


def test_every_file_has_a_case():
    assert sorted(CASES) == sorted(path.name for path in DATA.iterdir())


@pytest.mark.parametrize("name", [name for name in CASES if name not in TWO_RANKS])
def test_the_printed_line_trains(name, capsys):
    told = printed(capsys, name)
    trainer = train(told["python"], told["configure_optimizers"] or "")
    assert_settings(trainer, name)


def _train_all(rank: int, world_size: int, lines: dict) -> None:
    for name, (python, optimizers) in lines.items():
        trainer = train(python, optimizers, devices=world_size)
        assert_settings(trainer, name)


def test_the_printed_line_trains_on_two_ranks(capsys):
    told = {name: printed(capsys, name) for name in TWO_RANKS}
    run_ranks(2, _train_all, {name: (one["python"], one["configure_optimizers"] or "") for name, one in told.items()})


@pytest.mark.parametrize("name", CASES)
def test_the_printed_yaml_is_read_by_lightning_cli(name, capsys, tmp_path, monkeypatch):
    section = yaml.safe_load(printed(capsys, name)["yaml"])
    monkeypatch.setattr("sys.argv", ["train.py"])
    path = tmp_path / "config.yaml"
    devices = 2 if name in TWO_RANKS else 1
    path.write_text(yaml.safe_dump({"trainer": {**QUIET, "devices": devices, **section["trainer"]}}))
    cli = LightningCLI(
        Language, args=["--config", str(path)], run=False, save_config_callback=None, seed_everything_default=1
    )
    assert_settings(cli.trainer, name)


@pytest.mark.parametrize(
    ("name", "dtypes"), [("zeropp_mics.json", LOW), ("zero1.json", {"gradient_accumulation": "fp32"})]
)
def test_dtypes_reach_the_plugin(name, dtypes, capsys):
    told = printed(capsys, name)
    plugin = lss.SuperScalePrecision("bf16-true", **dtypes)
    names: dict = {}
    exec(told["python"].replace("L.Trainer", "dict"), names)
    assert names["trainer"]["plugins"][0].choices == plugin.choices


def test_the_scaler_starts_where_the_configuration_says(capsys):
    for name, scale, interval in (
        ("zero2_fp16_offload.json", 2.0**12, 500),
        ("deprecated_cpu_offload.json", 128.0, 2**31 - 1),
    ):
        names: dict = {}
        exec(printed(capsys, name)["python"].replace("L.Trainer", "dict"), names)
        state = names["trainer"]["plugins"][0].scaler.state_dict()
        assert (state["scale"], state["growth_interval"]) == (scale, interval)


OUTCOMES = {
    ("zeropp_mics.json", "zero_optimization.mics_shard_size"): "retired",
    ("zeropp_mics.json", "elasticity"): "retired",
    ("zeropp_mics.json", "nebula"): "retired",
    ("zeropp_mics.json", "compression_training"): "retired",
    ("zeropp_mics.json", "optimizer.type"): "retired",
    ("zeropp_mics.json", "zero_optimization.zero_quantized_weights"): "none",
    ("zeropp_mics.json", "zero_optimization.zero_hpz_partition_size"): "became",
    ("zero1.json", "zero_optimization.overlap_comm"): "same",
    ("zero1.json", "wall_clock_breakdown"): "same",
    ("zero1.json", "gradient_clipping"): "became",
    ("zero3_accelerate.json", "gradient_clipping"): "left",
    ("zero3_accelerate.json", "bf16.enabled"): "left",
    ("zero3_accelerate.json", "optimizer.params.lr"): "left",
    ("zero3_infinity_nvme.json", "zero_optimization.offload_optimizer.device"): "none",
    ("zero3_infinity_nvme.json", "aio"): "none",
    ("superoffload.json", "zero_optimization.offload_optimizer.super_offload"): "became",
    ("zenflow.json", "zero_optimization.zenflow.select_interval"): "none",
    ("zenflow.json", "zero_optimization.zenflow.topk_ratio"): "became",
    ("fp32_ddp.json", "data_efficiency"): "same",
    ("deepspeed_strategy.yaml", "remote_device"): "same",
    ("fsdp.yaml", "sharding_strategy"): "became",
}


def test_keys_are_in_their_groups():
    for name in CASES:
        rows = {row.key: row.fate for row in migrate(*read(str(DATA / name))).rows}
        assert all(fate.text and fate.outcome != "unknown" for fate in rows.values())
        for (file, key), outcome in OUTCOMES.items():
            if file == name:
                assert rows[key].outcome == outcome, key


def test_every_key_of_a_file_has_a_row():
    for path in DATA.glob("*.json"):
        text = json.loads(path.read_text())
        rows = [row.key for row in migrate(text, DATA).rows]
        for section, value in text.items():
            assert any(row == section or row.startswith(f"{section}.") for row in rows), section
            for key in value if isinstance(value, dict) and section == "zero_optimization" else ():
                assert any(row == f"{section}.{key}" or row.startswith(f"{section}.{key}.") for row in rows), key


def test_text_for_a_terminal(capsys):
    assert main(["migrate", str(DATA / "zero1.json")]) == 0
    out = capsys.readouterr().out
    for part in (
        "strategy=SuperScaleStrategy(zero={'stage': 1, 'bucket_mb': 9})",
        "Became:",
        "def configure_optimizers",
    ):
        assert part in out
    assert main(["migrate", str(DATA / "deepspeed_call.txt"), "--yaml"]) == 0
    out = capsys.readouterr().out
    assert "class_path: lightning_superscale.SuperScaleStrategy" in out
    assert "timedelta(minutes=10) is Python code" in out


def test_an_unknown_key_is_named_with_the_closest(tmp_path, capsys):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "overlap_com": True}, "gradient_cliping": 1.0}))
    assert main(["migrate", str(path)]) == 1
    out, err = capsys.readouterr()
    assert "strategy='zero2'" in out
    assert "zero_optimization.overlap_com: " in err
    assert "did you mean 'zero_optimization.overlap_comm'?" in err
    assert "did you mean 'gradient_clipping'?" in err
    path.write_text(json.dumps({"overlap_comm": True, "zero_optimization": {"stage": 1}}))
    assert main(["migrate", str(path)]) == 1
    assert "did you mean 'zero_optimization.overlap_comm'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1,', "neither JSON, YAML nor"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "the key 'stage' twice"),
        ('{"zero_optimization": {"stage": 5}}', "must be 0, 1, 2 or 3, found 5"),
        ('{"zero_optimization": 3}', "must be a section with a stage"),
        ("[1, 2]", "should hold keys and values"),
        ("strategy: ddp", "is none that is migrated from"),
        ("FSDPStrategy(None, cpu_offload=True)", "Name them"),
        ("{strategy: fsdp, precision: transformer-engine}", "precision='transformer-engine' is not one of"),
        (
            '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "zenflow": {"topk_ratio": 7}}}',
            "ZenFlowConfig.topk must be",
        ),
    ],
)
def test_what_cannot_be_migrated_is_refused(text, says, tmp_path, capsys):
    path = tmp_path / "config"
    path.write_text(text)
    assert main(["migrate", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("superscale migrate: ")
    assert says in err


def test_a_missing_file_and_standard_input(monkeypatch, capsys, tmp_path):
    assert main(["migrate", str(tmp_path / "none.json")]) == 2
    assert "can't be read" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO((DATA / "zenflow.json").read_text()))
    assert main(["migrate", "-"]) == 0
    assert "'topk': 0.05" in capsys.readouterr().out


def test_a_configuration_with_comments_is_read(tmp_path, capsys):
    (tmp_path / "ds.json").write_text('{\n  # as DeepSpeed reads it\n  "zero_optimization": {"stage": 1},\n}')
    assert main(["migrate", str(tmp_path / "ds.json")]) == 0
    assert "strategy='zero1'" in capsys.readouterr().out


def test_a_config_path_in_a_strategy_is_read_beside_the_file(tmp_path):
    (tmp_path / "ds.json").write_text((DATA / "zero1.json").read_text())
    rows = partial(migrate, folder=tmp_path)
    config = {"class_path": "DeepSpeedStrategy", "init_args": {"config": "ds.json", "stage": 3, "logging_level": 1}}
    told = rows(config)
    assert told.target.init_args() == {"zero": {"stage": 1, "bucket_mb": 9}}
    fates = {row.key: row.fate for row in told.rows}
    assert "ignores it beside config" in fates["stage"].text
    assert fates["logging_level"].outcome == "none"
    assert fates["optimizer.type"].outcome == "became"
