"""A state that 2 ranks save and 3 load: DeepSpeed ZeRO-3 through its universal checkpoint, beside ours.

`benchmarks/checkpoint.py --peers .venv-peers` calls it; as a script it is one rank of DeepSpeed, in the environment of
`benchmarks/peers.sh`. There the state belongs to an engine with bf16 weights that has made a step, is saved by
`engine.save_checkpoint`, converted by DeepSpeed's `ds_to_universal`, and loaded by `engine.load_checkpoint` into an
engine of other weights. What comes back is compared by checksums of every master and moment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROWS, COLUMNS = 2048, 1024
WRITERS, READERS = 2, 3
LOOK_EVERY_S = 0.02


class Stack(nn.Module):
    """As many weights of one shape as are asked for, each of which gets a gradient."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(COLUMNS, ROWS, bias=False) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x)[:, :COLUMNS]) + torch.tanh(layer(x)[:, COLUMNS:])
        return x.float().square().mean()


def rank_bytes_read() -> int:
    """What this process has read from files so far, page cache included; maps are not counted."""
    return int(Path("/proc/self/io").read_text().split()[1])


def disk_bytes(folder: str) -> int:
    """Room that a folder's files take; files that vanish meanwhile count nothing."""
    total = 0
    for at, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(at, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


class PeakDisk:
    """The most room that a folder took while this was entered."""

    def __init__(self, folder: str) -> None:
        self.bytes = 0
        self._folder = folder
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._done.wait(LOOK_EVERY_S):
            self.bytes = max(self.bytes, disk_bytes(self._folder))

    def __enter__(self) -> PeakDisk:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, disk_bytes(self._folder))


# A rank of DeepSpeed


def make_engine(count: int, seed: int, is_universal: bool) -> Any:
    import deepspeed

    torch.manual_seed(seed)
    model = Stack(count)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "overlap_comm": False},
        "checkpoint": {"load_universal": is_universal},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 * (seed + 1))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def train_one(engine: Any) -> None:
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    engine.backward(engine(torch.randn(2, COLUMNS, generator=generator).bfloat16()))
    engine.step()


def digest(engine: Any) -> list[int]:
    """Of every master and moment; every rank calls it."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    sums = []
    for param in engine.module.parameters():
        states = [safe_get_full_optimizer_state(param, key) for key in ("exp_avg", "exp_avg_sq")]
        for value in (safe_get_full_fp32_param(param), *states):
            bits = value.reshape(-1).contiguous().view(torch.int32).to(torch.int64)
            sums.append(int((bits * torch.arange(1, bits.numel() + 1)).sum()))  # wraps around
    return sums


def run_rank(what: str, folder: str, count: int) -> dict[str, Any]:
    import deepspeed
    import torch.distributed as dist

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=dist.FileStore(os.environ["STORE"], size), rank=rank, world_size=size)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    engine = make_engine(count, 0 if what == "save" else 1, what == "load")
    if what == "save":
        train_one(engine)
    dist.barrier()
    before, start = rank_bytes_read(), time.perf_counter()
    if what == "save":
        engine.save_checkpoint(folder, tag="saved")
    elif engine.load_checkpoint(folder)[0] is None:
        raise SystemExit(f"DeepSpeed loaded nothing from {folder}")
    read = rank_bytes_read() - before
    dist.barrier()
    seconds = time.perf_counter() - start
    answer = {"seconds": seconds, "bytes": read, "digest": digest(engine), "deepspeed": deepspeed.__version__}
    dist.destroy_process_group()
    return answer


def convert(folder: str) -> dict[str, Any]:
    from deepspeed.checkpoint import ds_to_universal

    sys.argv = ["x", "--input_folder", f"{folder}/saved", "--output_folder", f"{folder}/universal"]
    arguments = ds_to_universal.parse_arguments()
    start = time.perf_counter()
    with PeakDisk(folder) as peak:
        ds_to_universal.main(arguments)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_disk": peak.bytes}


# The controller


def ask_deepspeed(
    environment: dict[str, str], python: str, what: str, folder: str, count: int, ranks: int
) -> list[Any]:
    """What processes of this script answered, one per rank."""
    with tempfile.TemporaryDirectory() as store, tempfile.TemporaryFile("w+") as log:
        processes = [
            subprocess.Popen(
                [python, "-W", "ignore", __file__, what, folder, str(count)],
                env={
                    **environment,
                    "STORE": f"{store}/store",
                    **{"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(ranks), "WORLD_SIZE": str(ranks)},
                },
                stdout=subprocess.PIPE,
                stderr=log,
            )
            for rank in range(ranks)
        ]
        answers = [process.communicate()[0] for process in processes]
        if any(process.returncode for process in processes):
            log.seek(0)
            raise SystemExit(f"DeepSpeed could not {what}:\n{''.join(log.readlines()[-25:])}")
    return [json.loads(answer.splitlines()[-1]) for answer in answers]


def through_universal(environment: dict[str, str], python: str, folder: str, count: int) -> dict[str, Any]:
    """Save, convert and load once: seconds, bytes that loading ranks read, the most room that files took."""
    saved = ask_deepspeed(environment, python, "save", folder, count, WRITERS)
    native = disk_bytes(folder)
    converted = ask_deepspeed(environment, python, "convert", folder, count, 1)[0]
    loaded = ask_deepspeed(environment, python, "load", folder, count, READERS)
    if loaded[0]["digest"] != saved[0]["digest"]:
        raise SystemExit("DeepSpeed did not load what it saved")
    return {
        "save_seconds": saved[0]["seconds"],
        "convert_seconds": converted["seconds"],
        "load_seconds": loaded[0]["seconds"],
        "load_bytes": sum(answer["bytes"] for answer in loaded),
        "peak_disk": max(native, converted["peak_disk"]),
        "deepspeed": saved[0]["deepspeed"],
    }


if __name__ == "__main__":
    what, folder, count = sys.argv[1:]
    print("\n" + json.dumps(convert(folder) if what == "convert" else run_rank(what, folder, int(count))), flush=True)
