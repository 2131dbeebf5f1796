"""DeepSpeed itself against our readers and exports: `make test-peers`, in an environment of its own."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_superscale.checkpoint.foreign.deepspeed_export import TAG, export_deepspeed_universal
from lightning_superscale.checkpoint.foreign.registry import open_foreign
from tests.checkpoint.foreign.test_deepspeed import FROZEN, expected
from tests.helpers.foreign import read_all, truth, unpack
from tests.peers.deepspeed_ranks import GROUPS, load, on_ranks
from tests.peers.make_fixtures import CASES, make

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not here: make test-peers"),
]


@pytest.mark.parametrize("name", CASES)
def test_what_deepspeed_writes_now_is_read_bit_for_bit(tmp_path, name):
    make(name, tmp_path / name)
    held = truth(tmp_path / name)
    for path in [tmp_path / name, *(tmp_path / name).glob("universal")]:
        source = open_foreign(path)
        found, wanted = read_all(source), expected(held, source)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], value) for key, value in wanted.items())


# From what, in which dialect, into which engine.
ROUTES = [
    ("zero1", "zero12", {"stage": 1, "bf16": True}),
    ("zero1", "zero3", {"stage": 3, "bf16": True}),
    ("zero3", "zero12", {"stage": 2, "bf16": True}),
    ("zero3", "zero3", {"stage": 3, "bf16": True, "zero": {"sub_group_size": 20}}),
    ("zero2-cpu-adam", "zero12", {"stage": 2, "bf16": False, "cpu_adam": True}),
    ("zero2-cpu-adam", "zero3", {"stage": 3, "bf16": False, "cpu_adam": True}),
]


@pytest.mark.parametrize(
    ("name", "dialect", "engine"), ROUTES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_deepspeed_loads_what_we_export(tmp_path: Path, name, dialect, engine):
    case = unpack(name, tmp_path)
    held = truth(case)
    optimizer = "deepspeed" if "cpu_adam" in engine else "torch"
    export_deepspeed_universal(open_foreign(case), tmp_path / "out", dialect, optimizer=optimizer)
    assert (tmp_path / "out" / TAG).is_dir()
    on_ranks(
        str(tmp_path / "store"), load, str(tmp_path / "out"), {**engine, "universal": True}, str(tmp_path / "loaded")
    )
    loaded = load_file(tmp_path / "loaded")
    assert loaded.keys() == held.keys()
    for label, value in held.items():
        kind, _, of = label.partition("/")
        if kind in ("master", "exp_avg", "exp_avg_sq", "step") or (kind == "model" and of not in FROZEN):
            assert torch.equal(loaded[label], value), label
    for index, group in enumerate(GROUPS):
        # Stage 3 would give all groups the first one's options: so each keeps what its optimizer was built with.
        factor = 0.5 if dialect == "zero3" else 1.0
        assert loaded[f"group/{index}/lr"] == factor * group["lr"]
        assert loaded[f"group/{index}/weight_decay"] == factor * group["weight_decay"]


def test_deepspeed_still_loses_what_our_readers_keep(tmp_path):
    """If this fails, DeepSpeed loads frozen weights and buffers of universal checkpoints now: say so in the docs."""
    case = unpack("zero1", tmp_path)
    (case / "latest_universal").write_text("universal")
    engine = {"stage": 1, "bf16": True, "universal": True}
    on_ranks(str(tmp_path / "store"), load, str(case), engine, str(tmp_path / "loaded"))
    held, loaded = truth(case), load_file(tmp_path / "loaded")
    assert torch.equal(loaded["master/inner.weight"], held["master/inner.weight"])
    assert not torch.equal(loaded["model/frozen.weight"], held["model/frozen.weight"])
    assert not torch.equal(loaded["buffer/counter"], held["buffer/counter"])
