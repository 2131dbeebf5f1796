"""What each choice of dtypes takes: `python benchmarks/precision.py [--size 120M] [--peers .venv-peers]`.

Every setting trains a few steps in a process of its own. Three figures per parameter: what its dtypes predict for
weights, gradients, masters and optimizer states; what `explain()` counts in the tensors that exist; and the peak of the
process's memory while it trains, less what it held before the model was built (activations included; with
`--device cuda` the allocator's own peak). Beside ours: Lightning's DDP with fp32 states under autocast, which the limit
refers to, and DeepSpeed with the same dtypes. With `--ranks 2` the ZeRO stages, for the rank with most.

The last line is JSON. Exits with 1 when a limit is missed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils.data import DataLoader

from benchmarks.contestants import ADAMW, WithLoss, build_model
from benchmarks.models import SHAPES, Shape, batches, num_params
from benchmarks.step_cost import BenchmarkError, conclude, find_peers, free_port, hardware, peer_environment

STEPS = 4
LOW = {"master_weights": "bf16", "optimizer_states": "bf16"}
MOST_OF_DDP = 0.6  # "at least 40 % lower peak than fp32 states with autocast"

# By name: (label, predicted bytes per parameter, Lightning's precision, SuperScalePrecision's arguments)
OURS: dict[str, tuple[str, float, str, dict[str, Any]]] = {
    "32-true": ("ours 32-true", 16, "32-true", {}),
    "32-true low states": ("ours 32-true, states bf16", 12, "32-true", {"optimizer_states": "bf16"}),
    "bf16-mixed": ("ours bf16-mixed", 16, "bf16-mixed", {}),
    "bf16-mixed low states": ("ours bf16-mixed, states bf16", 12, "bf16-mixed", {"optimizer_states": "bf16"}),
    "bf16-true": ("ours bf16-true", 16, "bf16-true", {}),
    "bf16-true fp32 sums": ("ours bf16-true, gradients fp32", 18, "bf16-true", {"gradient_accumulation": "fp32"}),
    "bf16-true low states": ("ours bf16-true, states bf16", 12, "bf16-true", {"optimizer_states": "bf16"}),
    "bf16-true low masters": ("ours bf16-true, masters bf16", 12, "bf16-true", {"master_weights": "bf16"}),
    "kahan": ("ours all bf16, compensated", 10, "bf16-true", {**LOW, "kahan": True}),
    "all bf16": ("ours all bf16", 8, "bf16-true", LOW),
    "all bf16 autocast": ("ours all bf16, autocast", 8, "bf16-true", {**LOW, "autocast": True}),
}
PEERS: dict[str, tuple[str, float | None]] = {
    "ddp-autocast": ("Lightning DDP bf16-mixed", 20),  # and its own buckets of gradients
    "auto-autocast": ("Lightning single device bf16-mixed", 16),
    "deepspeed-bf16": ("DeepSpeed ZeRO-1 bf16, fp32 states", None),
    "deepspeed-all-bf16": ("DeepSpeed ZeRO-1 all bf16, autocast", None),
}
STAGES = {
    f"zero{stage} {name}": (f"ours zero{stage}, {label}", stage, choices)
    for name, label, choices in (("fp32", "bf16-true", {}), ("low", "all bf16", LOW))
    for stage in (1, 2, 3)
}


class Memory:
    """Peak of this process's memory since `begin`, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    def begin(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is held now
        self._before = _status("VmRSS")

    def peak(self) -> int:
        now = torch.cuda.max_memory_allocated() if self._device.type == "cuda" else _status("VmHWM")
        return now - self._before


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def warm_up(device: torch.device) -> None:
    """Load what the first step would load: kernels, threads, autograd."""
    layer = torch.nn.Linear(64, 64, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            layer(torch.randn(8, 64, device=device)).float().sum().backward()


def train_in_lightning(name: str, shape: Shape, memory: Memory, device: torch.device, ranks: int) -> dict[str, Any]:
    import lightning as L

    import lightning_superscale as lss

    facts: dict[str, Any] = {}
    batch_of = batches(shape)

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = build_model(shape, "32-true")

        def training_step(self, ids: torch.Tensor, batch_idx: int) -> torch.Tensor:
            facts["loss"] = self.model.loss(ids)
            return facts["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), **ADAMW)

        def on_train_end(self) -> None:
            facts["peak"] = memory.peak()
            plan = getattr(self.trainer.strategy, "plan", None)
            if plan is not None:
                facts["counted"] = plan.device_bytes + plan.host_bytes
                facts["plan"] = plan.precision

    plugins: list[Any] = []
    precision, strategy = None, "ddp" if name == "ddp-autocast" else "auto"
    if name in PEERS:
        precision = "bf16-mixed"
    elif name in STAGES:
        _, stage, choices = STAGES[name]
        plugins, strategy = [lss.SuperScalePrecision("bf16-true", **choices)], f"zero{stage}"
    else:
        _, _, own_precision, choices = OURS[name]
        plugins, strategy = [lss.SuperScalePrecision(own_precision, **choices)], "superscale"
    trainer = L.Trainer(
        strategy=strategy,
        precision=precision,  # type: ignore[arg-type]
        plugins=plugins,
        accelerator="cpu" if device.type == "cpu" else "gpu",
        devices=ranks,
        use_distributed_sampler=ranks > 1,  # DDP shuffles even for one
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    memory.begin()
    module = Module()
    trainer.fit(module, DataLoader([batch_of(step) for step in range(STEPS)], batch_size=None))
    return facts | {"loss": float(facts["loss"]), "num_params": num_params(module)}


def train_in_deepspeed(name: str, shape: Shape, memory: Memory, device: torch.device) -> dict[str, Any]:
    import deepspeed

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": shape.batch,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 1, "overlap_comm": False, "reduce_bucket_size": 5_000_000},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
    }
    if name == "deepspeed-all-bf16":
        config["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    batch_of = batches(shape)
    memory.begin()
    model = WithLoss(build_model(shape, "bf16-true", device))
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    engine, _, _, _ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), optimizer=optimizer, config=config
    )
    for step in range(STEPS):
        loss = engine(batch_of(step).to(device))
        engine.backward(loss)
        engine.step()
    return {"peak": memory.peak(), "loss": float(loss), "num_params": num_params(model)}


def one(name: str, options: argparse.Namespace) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    device = torch.device(options.device)
    shape = SHAPES[options.size]
    warm_up(device)
    memory = Memory(device)
    if name.startswith("deepspeed"):
        return train_in_deepspeed(name, shape, memory, device)
    return train_in_lightning(name, shape, memory, device, int(os.environ.get("WORLD_SIZE", "1")))


def run(name: str, options: argparse.Namespace, ranks: int = 1) -> dict[str, Any]:
    """One setting in processes of its own; the rank with the highest peak."""
    python, environment = sys.executable, {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
    if name.startswith("deepspeed"):
        python = str(options.peers / "bin" / "python")
        environment |= peer_environment(options.peers)
    command = [python, "-W", "ignore", __file__, "--one", name, "--size", options.size, "--device", options.device]
    port, processes = str(free_port()), []
    for rank in range(ranks):
        place = {} if ranks == 1 else {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
        if ranks > 1:
            place |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks))
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "benchmark"}
        processes.append(
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment | place
            )
        )
    found = []
    for process in processes:
        out, err = process.communicate(timeout=900)
        if process.returncode:
            raise BenchmarkError(f"{name} failed; its last words:\n{err[-2000:]}")
        found.append(json.loads(out.strip().splitlines()[-1]))
    worst: dict[str, Any] = max(found, key=lambda facts: facts["peak"])
    return worst | {"loss": found[0]["loss"]}  # ranks see different batches


def predicted(stage: int, choices: dict[str, Any], ranks: int) -> float:
    """Bytes per parameter of one rank: weights, gradients as held between micro-batches, masters and states."""
    states = 4 if choices else 12
    weights, gradients = (2, 2) if stage == 1 else (2, 2 / ranks) if stage == 2 else (2 / ranks, 2 / ranks)
    return weights + gradients + states / ranks


def rows_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []

    def add(name: str, label: str, expected: float | None, ranks: int = 1) -> None:
        print(f"[{options.size}] {label}", file=sys.stderr, flush=True)
        facts = run(name, options, ranks)
        count = facts["num_params"]
        row = {"name": name, "label": label, "ranks": ranks, "predicted": expected, "loss": round(facts["loss"], 4)}
        row["counted"] = round(facts["counted"] / count, 3) if "counted" in facts else None
        row["peak_mib"], row["peak_per_param"] = round(facts["peak"] / 2**20), round(facts["peak"] / count, 2)
        rows.append(row | {"num_params": count})

    for name, (label, expected) in PEERS.items():
        if options.peers or not name.startswith("deepspeed"):
            add(name, label, expected)
    for name, (label, expected, _, _) in OURS.items():
        add(name, label, expected)
    if options.ranks > 1:
        for name, (label, stage, choices) in STAGES.items():
            add(name, label, predicted(stage, choices, options.ranks), options.ranks)
    return rows


def show(rows: list[dict[str, Any]], size: str) -> None:
    base = rows[0]["peak_mib"]
    print(f"\n{size} ({rows[0]['num_params']:,} parameters), bytes per parameter on the rank with most\n")
    print(f"{'':40}{'ranks':>6}{'predicted':>10}{'counted':>9}{'peak':>8}{'MiB':>8}{'/ DDP':>7}{'loss':>9}")
    for row in rows:
        said = f"{row['predicted']:.1f}" if row["predicted"] is not None else "-"
        counted = f"{row['counted']:.2f}" if row["counted"] is not None else "-"
        print(
            f"{row['label']:40}{row['ranks']:6}{said:>10}{counted:>9}{row['peak_per_param']:8.2f}{row['peak_mib']:8}"
            f"{row['peak_mib'] / base:7.2f}{row['loss']:9.4f}"
        )


def checks_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    row_of = {row["name"]: row for row in rows}
    checks: list[dict[str, Any]] = []

    def add(check: str, limit: float, measured: float) -> None:
        checks.append({"check": check, "limit": limit, "measured": round(measured, 4), "met": measured <= limit})

    ddp = row_of["ddp-autocast"]["peak_mib"]
    add("ours all bf16 / DDP with fp32 states under autocast, peak", MOST_OF_DDP, row_of["all bf16"]["peak_mib"] / ddp)
    if "deepspeed-all-bf16" in row_of:
        theirs = row_of["deepspeed-all-bf16"]["peak_mib"]
        add("ours all bf16 / DeepSpeed all bf16, peak", 1.0, row_of["all bf16 autocast"]["peak_mib"] / theirs)
    off = max(abs(row["counted"] / row["predicted"] - 1) for row in rows if row["counted"] is not None)
    add("counted bytes off the predicted ones, as a share", 0.02, off)
    return checks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="120M")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, default=1, help="also the ZeRO stages on so many")
    parser.add_argument("--peers", default="none", help="environment of benchmarks/peers.sh, or none")
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # libraries print what they like
        print(json.dumps(one(options.one, options)), file=answers, flush=True)
        return 0
    options.peers = find_peers(parser, options.peers)
    start = time.perf_counter()
    rows = rows_of(options)
    show(rows, options.size)
    report = {
        "hardware": hardware(),
        "device": options.device,
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "size": options.size,
        "seconds": round(time.perf_counter() - start, 1),
        "rows": rows,
        "checks": checks_of(rows),
    }
    return conclude(report, options.json)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchmarkError as error:
        print(f"precision: {error}", file=sys.stderr)
        sys.exit(2)
