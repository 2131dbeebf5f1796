"""Predicted bytes by class equal those that a run counts from its tensors: every strategy, on one rank and on two."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_superscale as lss
from lightning_superscale.config import OffloadConfig, ZeroConfig
from lightning_superscale.estimation.memory import byte_classes, params_of
from lightning_superscale.estimation.setup import Setup
from lightning_superscale.run.precision import choose
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import trainer

WIDTH = 67  # divides nothing, so that every slice is padded, and ranks have unequal rows


class Blocks(L.LightningModule):
    """Layers that FSDP2 wraps and that flow, one between them, tied weights, a scalar, a frozen layer, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, 31)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(31, WIDTH), nn.GELU(), nn.Linear(WIDTH, 31)) for _ in "abc")
        self.last = nn.Linear(31, WIDTH)
        self.tied = nn.Linear(31, WIDTH, bias=False)
        self.tied.weight = self.last.weight
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen = nn.Linear(WIDTH, 5).requires_grad_(False)
        self.register_buffer("offset", torch.zeros(WIDTH))

    def training_step(self, batch, batch_idx):
        x = self.first(batch)
        for block in self.blocks:
            x = x + block(x)
        return (self.frozen((self.last(x) + self.tied(x)) * self.scale + self.offset)).float().square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def counted(zero: ZeroConfig, offload: OffloadConfig | None, precision: dict, devices: int):
    """The plan of a run that has ended, and how it moved its gradients."""
    strategy = lss.SuperScaleStrategy(zero=zero, offload=offload)
    run = trainer(strategy, plugins=[lss.SuperScalePrecision(**precision)], devices=devices)
    run.fit(Blocks(), DataLoader(torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1)), 4))
    return strategy.plan


def check(stage: int, engine: str | None, precision: dict, devices: int = 1, *, zenflow=None, **offload) -> None:
    zero = ZeroConfig(stage=stage)
    # "auto" goes by a measurement of the machine, which buffers of another dtype would follow.
    offload = {"link_dtype": "weights", **offload}
    how = None if engine is None else OffloadConfig(engine=engine, bucket_mb=1, zenflow=zenflow, **offload)
    plan = counted(zero, how, precision, devices)
    with torch.device("meta"):
        module = Blocks()
    setup = Setup(
        zero=zero,
        offload=how,
        precision=choose(**precision),
        num_ranks=devices,
        flows=offload.get("weights") == "flow",
        on_device=offload.get("gpu_fraction", 0.0),
        link_dtype=offload["link_dtype"],
    )
    found = byte_classes(module, params_of(module, setup), setup)
    expected = {(row.name, row.dtype): (row.device_bytes, row.host_bytes) for row in plan.bytes}
    expected = {key: value for key, value in expected.items() if any(value)}
    assert {(row.name, row.dtype): (row.device_bytes, row.host_bytes) for row in found} == expected


BF16 = {"precision": "bf16-true"}
PRECISIONS = {
    "fp32": {"precision": "32-true"},
    "bf16": BF16,
    "mixed": {"precision": "bf16-mixed"},
    "fp16": {"precision": "16-true"},
    "fp32 gradients": {"precision": "bf16-true", "gradient_accumulation": "fp32"},
    "bf16 states": {"precision": "bf16-true", "master_weights": "bf16", "optimizer_states": "bf16", "kahan": True},
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("engine", [None, "cpu", "superoffload"])
def test_one_rank(engine, precision):
    check(list(PRECISIONS).index(precision) % 4, engine, PRECISIONS[precision])


@pytest.mark.parametrize("engine", ["cpu", "superoffload"])
def test_weights_that_flow(engine):
    check(0, engine, BF16, weights="flow")


@pytest.mark.parametrize("engine", ["cpu", "superoffload"])
def test_fp32_on_the_link(engine):
    check(0, engine, BF16, link_dtype="fp32")


def test_states_of_both_homes():
    check(0, "superoffload", BF16, gpu_fraction=0.4)


@pytest.mark.parametrize("accumulate_on", ["host", "device"])
def test_columns_of_both_homes(accumulate_on):
    check(0, "zenflow", BF16, zenflow={"topk": 0.25, "accumulate_on": accumulate_on, "exclude": ["blocks.1.*"]})


OVER_RANKS = [
    (0, None, "bf16"),
    (1, None, "bf16"),
    (2, None, "bf16 states"),
    (3, None, "bf16"),
    (1, "cpu", "fp32"),
    (2, "superoffload", "bf16"),
    (3, "superoffload", "fp32"),
    (2, "zenflow", "bf16"),
]


def _on_ranks(rank: int, world_size: int) -> int:
    for stage, engine, precision in OVER_RANKS:
        zenflow = {"topk": 0.25} if engine == "zenflow" else None
        if rank == 0:
            check(stage, engine, PRECISIONS[precision], world_size, zenflow=zenflow)
        else:
            how = (
                None
                if engine is None
                else OffloadConfig(engine=engine, bucket_mb=1, link_dtype="weights", zenflow=zenflow)
            )
            counted(ZeroConfig(stage=stage), how, PRECISIONS[precision], world_size)
    return len(OVER_RANKS)


def test_two_ranks():
    assert run_ranks(2, _on_ranks) == [len(OVER_RANKS)] * 2


def test_fsdp2_gathers_no_parameter_of_a_module_that_it_does_not_wrap():
    setup = Setup(zero=ZeroConfig(stage=3), offload=None, precision=choose(**BF16), num_ranks=2, ranks_per_node=2)
    gathered = {param.spec.fqn: param.is_gathered for param in params_of(Blocks(), setup)}
    assert gathered["first.weight"]
    assert not gathered["scale"], "the root's own parameter is in a bucket, as those that FSDP2 can't take"
    assert not gathered["last.weight"], "tied"
