"""The memory model against the tensors that exist: every engine, stage and precision, on one rank and on two."""

from __future__ import annotations

import re

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_superscale as lss
from lightning_superscale.comm.dtensor import local_of
from lightning_superscale.offload.zenflow import auto
from lightning_superscale.run.memory import host_bytes_needed
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import trainer

WIDTH = 128  # a multiple of every alignment, halved too, so that nothing is padded
PRECISIONS = {
    "fp32": {"precision": "32-true"},
    "bf16": {"precision": "bf16-true"},
    "mixed": {"precision": "bf16-mixed"},
    "fp32 gradients": {"precision": "bf16-true", "gradient_accumulation": "fp32"},
    "bf16 moments": {"precision": "bf16-true", "optimizer_states": "bf16", "stochastic_rounding": True},
    "bf16 states": {"precision": "bf16-true", "master_weights": "bf16", "optimizer_states": "bf16", "kahan": True},
}


class Blocks(L.LightningModule):
    """Layers that FSDP2 wraps and that flow, a frozen one, a buffer."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.register_buffer("scale", torch.ones(WIDTH))
        self.optimizer = optimizer

    def training_step(self, batch, batch_idx):
        for block in self.blocks:
            batch = block(batch).relu()
        return (self.frozen(batch) * self.scale).float().square().mean()

    def configure_optimizers(self):
        return getattr(torch.optim, self.optimizer)([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class Measure(L.Callback):
    """What is there at the end of training, and what should be.

    Attributes:
        rows: of the plan, by name.
        states: bytes of all memory that states hold.
        weights: bytes of this rank's trained weights.
        needed: host bytes that were checked before work started.
    """

    def on_train_end(self, trainer, module):
        assembly = trainer.strategy.assembly
        self.rows = {row.name: row for row in trainer.strategy.plan.bytes}
        self.states = sum(state_bytes(state) for engine in assembly.engines.values() for state in engine.states)
        self.weights = sum(local_of(p.detach()).nbytes for p in module.parameters() if p.requires_grad)
        optimizers = list(assembly.engines)
        self.needed = host_bytes_needed(module, optimizers, assembly.settings, assembly.host.link_dtype)


def state_bytes(state) -> int:
    """Bytes of the distinct tensors that one state keeps."""
    found = {}
    for value in vars(state).values():
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, torch.Tensor):
                found[tensor.data_ptr()] = tensor.nbytes
    return sum(found.values())


def expected_bytes(arithmetic: str) -> int:
    """The value of such as `8 B x 49,536 / 2 ranks`."""
    each, numel, shares = re.fullmatch(r"(\d+) B x ([\d,]+)(?: / (\d+) ranks)?", arithmetic).groups()
    return int(each) * int(numel.replace(",", "")) // int(shares or 1)


def measured(engine, precision, *, stage=0, optimizer="AdamW", devices=1, num_epochs=1, **offload) -> Measure:
    measure = Measure()
    # "auto" goes by a measurement of the machine, which buffers of another dtype would follow.
    offload = {"link_dtype": "weights", **offload}
    how = None if engine is None else lss.OffloadConfig(engine=engine, bucket_mb=1, **offload)
    strategy = lss.SuperScaleStrategy(zero=stage, offload=how)
    plugin = lss.SuperScalePrecision(**PRECISIONS[precision])
    run = trainer(strategy, callbacks=[measure], plugins=[plugin], devices=devices, max_epochs=num_epochs)
    run.fit(Blocks(optimizer), DataLoader(torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1)), 4))
    return measure


def check(found: Measure, *, flows: bool = False) -> None:
    for name, row in found.rows.items():
        if name != "weights (flowing)":
            assert row.device_bytes + row.host_bytes == expected_bytes(row.arithmetic), (name, row)
    kept = ("master weights", "compensation", "optimizer states", "transfer buffers", "weights (host copy)")
    assert sum(r.device_bytes + r.host_bytes for name, r in found.rows.items() if name in kept) == found.states
    host = sum(row.host_bytes for row in found.rows.values())
    if flows:
        # Where device memory is host memory the copies take the place of weights that are there already.
        copies = sum(row.host_bytes for name, row in found.rows.items() if name.endswith("(host copy)"))
        assert found.needed == host - copies
    else:
        assert found.needed == host
        assert found.rows["weights"].device_bytes == found.weights


# Each engine with each precision; stages divide nothing on one rank.
@pytest.mark.parametrize("engine", [None, "cpu", "superoffload"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_rank_has_what_the_model_says(engine, precision):
    stage = list(PRECISIONS).index(precision) % 4
    check(measured(engine, precision, stage=stage))


@pytest.mark.parametrize("engine", ["cpu", "superoffload"])
def test_fp32_on_the_link_is_in_the_model(engine):
    check(measured(engine, "bf16", link_dtype="fp32"))


@pytest.mark.parametrize("accumulate_on", ["host", "device"])
@pytest.mark.parametrize("exclude", [None, ["blocks.1.weight", "blocks.2.*"]])
def test_columns_of_both_homes_are_in_the_model(exclude, accumulate_on):
    """A quarter of a matrix' columns, of which `exclude` leaves none, and all of the biases, is on the device."""
    found = measured("zenflow", "bf16", zenflow={"topk": 0.25, "exclude": exclude, "accumulate_on": accumulate_on})
    for name, row in found.rows.items():
        each, numel = re.fullmatch(r"([\d.]+) B x ([\d,]+)", row.arithmetic).groups()
        # `:g` prints six digits.
        assert row.device_bytes + row.host_bytes == pytest.approx(
            float(each) * int(numel.replace(",", "")), rel=1e-5
        ), name
    matrices, biases = WIDTH * WIDTH, WIDTH
    deferred = (1 if exclude else 3) * 0.75 * matrices + (2 * matrices if exclude else 0)
    sums = 4 if accumulate_on == "host" else 0
    assert found.needed == 12 * 3 * (matrices + biases) + (sums + 3 * 2) * deferred
    assert found.needed == sum(row.host_bytes for row in found.rows.values())


@pytest.mark.parametrize(("num_epochs", "selected"), [(1, 32), (5, 13)], ids=["warm-up", "chosen"])
def test_columns_of_an_auto_share_are_those_that_are_there(num_epochs, selected, monkeypatch):
    """Of 128 columns warm-up has a quarter. What is checked before is the most that the host may have, with 6 of them.

    Epochs have two steps, and warm-up has eight.
    """
    monkeypatch.setattr(auto, "choose_share", lambda energies: auto.Chosen(0.1, "topk=0.1"))
    found = measured("zenflow", "bf16", num_epochs=num_epochs, zenflow={"topk": "auto"})
    for name, row in found.rows.items():
        each, numel = re.fullmatch(r"([\d.]+) B x ([\d,]+)", row.arithmetic).groups()
        # `:g` prints six digits.
        assert row.device_bytes + row.host_bytes == pytest.approx(
            float(each) * int(numel.replace(",", "")), rel=1e-5
        ), name
    assert found.rows["selected masters"].device_bytes == 4 * 3 * (selected * WIDTH + WIDTH)
    held = sum(row.host_bytes for row in found.rows.values())
    assert found.needed - held == (4 + 3 * 2) * 3 * (selected - 6) * WIDTH


def test_states_of_both_homes_are_in_the_model():
    found = measured("cpu", "bf16", gpu_fraction=0.5)
    for name, row in found.rows.items():
        assert row.device_bytes + row.host_bytes == expected_bytes(row.arithmetic), name
    states, trained = found.rows["optimizer states"], 3 * (WIDTH * WIDTH + WIDTH)
    assert 0 < states.device_bytes <= states.host_bytes
    assert found.needed == round(trained * (12 + 2) * 0.5)


@pytest.mark.parametrize("engine", ["cpu", "superoffload"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_that_flow_are_in_the_model(engine, precision):
    check(measured(engine, precision, weights="flow"), flows=True)


def test_an_optimizers_own_states_are_its_own():
    """The check before work starts takes them for moments, because nobody knows them yet."""
    found = measured("superoffload", "bf16", optimizer="RMSprop")
    assert "optimizer states" not in found.rows
    trained = 3 * (WIDTH * WIDTH + WIDTH)
    assert found.rows["master weights"].arithmetic == f"4 B x {trained:,}"
    assert found.rows["transfer buffers"].arithmetic == f"2 B x {trained:,}"
    assert found.needed == trained * (4 + 8 + 2 * 2)


OVER_RANKS = [
    (1, None, "bf16"),
    (2, None, "bf16 states"),
    (3, None, "bf16"),
    (1, "cpu", "fp32"),
    (2, "cpu", "bf16 moments"),
    (2, "superoffload", "bf16"),
    (3, "superoffload", "fp32"),
    (3, "cpu", "mixed"),
]


def _on_ranks(rank: int, world_size: int) -> int:
    for stage, engine, precision in OVER_RANKS:
        found = measured(engine, precision, stage=stage, devices=world_size)
        check(found)
        states = found.rows["optimizer states"]
        assert states.arithmetic.endswith(f" / {world_size} ranks")
        assert found.rows["weights"].arithmetic.endswith(" ranks") == (stage == 3)
        assert found.rows["gradients"].arithmetic.endswith(" ranks") == (stage > 1)
    return len(OVER_RANKS)


def test_two_ranks_have_what_the_model_says():
    assert run_ranks(2, _on_ranks) == [len(OVER_RANKS)] * 2
