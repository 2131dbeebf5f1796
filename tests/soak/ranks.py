"""One rank of one leg: it trains from the last checkpoint until it is done or something happens to it."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

GLOBAL_BATCH, NUM_SAMPLES = 8, 64
PATIENCE_S = 8.0
# A sample that is NaN in runs with a loss scale: every step that has it is skipped, at any number of ranks.
POISON = 13


@dataclass(frozen=True)
class Leg:
    """What a leg is told.

    Attributes:
        number: of the legs of its run, from 0.
        kind: "fp32", or "fp16" for a loss scale and a sample that is NaN.
        strategy: a name of STRATEGIES.
        ranks: how many.
        asynchronous: whether checkpoints are written in the background.
        workers: processes of each data loader.
        steps: at which step the run ends.
        folder: for records and what ranks print.
        checkpoints: the folder of checkpoints.
        port: where ranks meet.
        trap: what a rank does to itself: "nan", "raise" "kill in a step" or "kill in a save".
        victim: which rank does.
        at: how many steps after the leg's first one, or which operation of the disk.
        pause_s: seconds that a step takes longer, so that something can happen in it.
    """

    number: int
    kind: str
    strategy: str
    ranks: int
    asynchronous: bool
    workers: int
    steps: int
    folder: str
    checkpoints: str
    port: int
    trap: str = ""
    victim: int = 0
    at: int = 0
    pause_s: float = 0.02


def strategies(kind: str) -> dict[str, Any]:
    """By name, what makes a strategy; "lightning" is its own DDP, which writes universal checkpoints too."""
    from lightning.pytorch.strategies import DDPStrategy

    import lightning_superscale as lss

    def ours(zero: int, offload: str | None = None) -> Any:
        refuses_nan = kind == "fp32"  # a loss scale skips such steps
        return lambda: lss.SuperScaleStrategy(zero, offload, refuses_nan, patience=PATIENCE_S)

    return {
        "zero0": ours(0),
        "zero1": ours(1),
        "zero2": ours(2),
        "zero3": ours(3),
        "cpu": ours(0, "cpu"),
        "zero2 cpu": ours(2, "cpu"),
        "superoffload": ours(0, "superoffload"),
        "zero1 superoffload": ours(1, "superoffload"),
        "zero3 superoffload": ours(3, "superoffload"),
        "lightning": lambda: DDPStrategy(timeout=timedelta(seconds=20)),
    }


NAMES = (
    "zero0", "zero1", "zero2", "zero3", "cpu", "zero2 cpu", "superoffload", "zero1 superoffload", "zero3 superoffload",
    "lightning",
)  # fmt: skip


def run_leg(rank: int, leg: Leg, sender: Any) -> None:
    """What the process of a rank does; it sends ("started", *fields of Started), then ("done",) or ("error", text)."""
    out = os.open(f"{leg.folder}/leg-{leg.number}-rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    os.environ.update(
        TORCHELASTIC_RUN_ID=f"soak-{leg.number}", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(leg.ranks),
        LOCAL_WORLD_SIZE=str(leg.ranks), GROUP_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(leg.port),
    )  # fmt: skip
    if leg.ranks == 1:
        for name in ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name)
    import torch

    torch.set_num_threads(1)
    try:
        _train(rank, leg, sender)
        sender.send(("done",))
    except BaseException as error:
        traceback.print_exc()
        notes = "; ".join(getattr(error, "__notes__", []))
        sender.send(("error", f"{type(error).__name__}: {error} {notes}"))


def _train(rank: int, leg: Leg, sender: Any) -> None:
    import torch
    from lightning import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    import lightning_superscale as lss
    from tests.soak.model import Loader, Soaked

    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        path = lss.last_checkpoint(leg.checkpoints)
    passed_over = [str(one.message) for one in said if "passed over" in str(one.message)]
    plugins: list[Any] = [lss.UniversalCheckpointIO({"asynchronous": leg.asynchronous})]
    if leg.kind == "fp16":
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=10**6)
        plugins.append(lss.SuperScalePrecision("16-mixed", scaler=scaler))
    is_plain = leg.strategy == "lightning" and leg.ranks == 1
    module = Soaked(leg, rank, lambda step: sender.send(("started", step, path, passed_over, time.time())))
    trainer = Trainer(
        strategy="auto" if is_plain else strategies(leg.kind)[leg.strategy](),
        accelerator="cpu",
        devices=leg.ranks,
        max_steps=leg.steps,
        max_epochs=-1,
        plugins=plugins,
        callbacks=[ModelCheckpoint(leg.checkpoints, every_n_train_steps=5, save_top_k=3, monitor="step", mode="max")],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, Loader(leg), ckpt_path=path)
    if rank == 0:
        if trainer.global_step != leg.steps:
            raise AssertionError(f"the run ended at step {trainer.global_step} of {leg.steps}")
        torch.save(module.state_dict(), Path(leg.folder, "end.pt"))


def record(leg: Leg, rank: int, step: int, ids: list[int]) -> None:
    """Note which samples a step of this rank uses."""
    with open(f"{leg.folder}/seen-{rank}.jsonl", "a") as file:
        file.write(json.dumps({"leg": leg.number, "step": step, "ids": ids}) + "\n")
