"""Writes tests/checkpoint/foreign/fixtures/deepspeed anew: checkpoints of DeepSpeed, and what it held then.

Run in the environment of benchmarks/peers.sh: `.venv-peers/bin/python -m tests.peers.make_fixtures`.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from tests.peers.deepspeed_ranks import NUM_STEPS, convert, on_ranks, write

FIXTURES = Path(__file__).resolve().parents[1] / "checkpoint" / "foreign" / "fixtures" / "deepspeed"

# What Lightning's DeepSpeedStrategy passes as client state: its checkpoint without weights and optimizer states.
LIGHTNING: dict[str, Any] = {
    "epoch": 1,
    "global_step": NUM_STEPS,
    "pytorch-lightning_version": "2.6.0",
    "callbacks": {},
    "lr_schedulers": [{"last_epoch": NUM_STEPS, "_last_lr": [1e-2, 3e-3]}],
    "hyper_parameters": {"width": 5},
}

# name: (tag, arguments of make_engine, client state, whether DeepSpeed converts it to a universal checkpoint)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], bool]] = {
    "zero1": ("global_step3", {"stage": 1, "bf16": True}, {"note": "mine"}, True),
    # DeepSpeed steps it with another class of its own, BF16_Optimizer, whose partitions keep their padding.
    "zero1-accumulate": ("global_step3", {"stage": 1, "bf16": True, "accumulate": "fp32"}, {}, True),
    "zero2": ("checkpoint", {"stage": 2, "bf16": True}, LIGHTNING, True),
    "zero2-cpu-adam": ("global_step3", {"stage": 2, "bf16": False, "cpu_adam": True}, {}, True),
    "zero2-elastic": ("global_step3", {"stage": 2, "bf16": True, "zero": {"elastic_checkpoint": True}}, {}, False),
    "zero3": ("checkpoint", {"stage": 3, "bf16": True, "zero": {"sub_group_size": 20}}, LIGHTNING, True),
    "zero3-fp32": ("global_step3", {"stage": 3, "bf16": False}, {}, False),
}


def make(name: str, folder: Path) -> None:
    """Have DeepSpeed write one case into `folder`."""
    tag, case, client, is_converted = CASES[name]
    with tempfile.TemporaryDirectory() as store:
        on_ranks(f"{store}/store", write, str(folder), tag, case, client)
    if is_converted:
        convert(str(folder))


def main() -> None:
    shutil.rmtree(FIXTURES, ignore_errors=True)
    FIXTURES.mkdir(parents=True)
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            make(name, Path(folder))
            shutil.make_archive(str(FIXTURES / name), "zip", folder)  # padding and small files: a tenth of the size


if __name__ == "__main__":
    main()
