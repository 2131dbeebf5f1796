"""What checkpoints cost: `python benchmarks/checkpoint.py [--mib 800] [--rounds 3] [--peers DIR] [--json FILE]`.

One training state (16-bit weights, fp32 masters and two moments) is saved, loaded into memory that is there already,
and read on 3 ranks by columns after 2 ranks saved it by rows. Ours, torch.save, torch's distributed checkpoint (DCP)
and safetensors take turns, each in a process of its own, on the same file system. A save is timed until it returns
and until its files are durable, which ours always are. Memory is what a loading process' peak grew by. The files are
in the page cache when they are read. With --peers, DeepSpeed ZeRO-3 saves on 2 ranks, converts to its universal
checkpoint and loads on 3, beside ours (`benchmarks/checkpoint_peers.py`). The last line is JSON. Exits with 1 when ours
misses a limit: bytes read by all ranks together 1.05 times the state, 256 MiB of memory to load, disk 1.02 times the
state.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.checkpoint_peers import COLUMNS, READERS, ROWS, WRITERS, PeakDisk, rank_bytes_read, through_universal
from benchmarks.step_cost import find_peers, hardware, peer_environment
from lightning_superscale.checkpoint import state as states
from lightning_superscale.checkpoint.load.reader import open_checkpoint
from lightning_superscale.checkpoint.load.scatter import READ_THREADS
from lightning_superscale.checkpoint.save.background import BackgroundSaver
from lightning_superscale.checkpoint.save.writer import save
from lightning_superscale.comm.mesh import DataMesh, build_mesh, single_mesh
from lightning_superscale.layout.box import Box, row_box, whole_box
from lightning_superscale.layout.mesh import MeshSpec

warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")

Tensors = dict[str, Tensor]
SHAPE = (ROWS, COLUMNS)
# What takes long to import, once for all processes that are measured.
PRELOADED = [
    "torch.distributed.checkpoint",
    "torch.distributed.tensor",
    "lightning_superscale.checkpoint.save.background",
]


def num_weights(mib: int) -> int:
    """Weights whose state takes about `mib` MiB, 14 bytes per element."""
    return max(1, round(mib * 2**20 / (ROWS * COLUMNS * 14)))


def state_tensors(mib: int) -> Tensors:
    """About `mib` MiB, by arithmetic that is quick and gives no two tensors the same bytes."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(SHAPE, generator=generator)
    tensors: Tensors = {}
    for i in range(num_weights(mib)):
        master = base + i
        tensors |= {f"{i}.weight": master.bfloat16(), f"{i}.master": master}
        tensors |= {f"{i}.exp_avg": base * (i + 1), f"{i}.exp_avg_sq": base.square() + i}
    return tensors


def nbytes_of(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def key_of(name: str) -> states.TensorKey:
    return states.TensorKey("model", name)


def local_state(tensors: Tensors, rank: int = 0, num_ranks: int = 1) -> states.LocalState:
    """This rank's rows of each tensor."""
    box = row_box(SHAPE, SHAPE[0] * rank // num_ranks, SHAPE[0] * (rank + 1) // num_ranks)
    return states.LocalState(
        {key_of(name): states.TensorInfo(t.dtype, SHAPE, "model") for name, t in tensors.items()},
        {key_of(name): (states.LocalShard(box, t[box.within(whole_box(SHAPE))]),) for name, t in tensors.items()},
    )


# Contestants: save(path, tensors) and load(path, outs).


def load_ours(path: str, outs: Tensors, *, check_first: bool = True) -> None:
    source = open_checkpoint(path, check_first=check_first)
    source.read([states.ReadRequest(key_of(name), whole_box(SHAPE), out) for name, out in outs.items()])
    source.close()


def copy_all(outs: Tensors, found: Tensors) -> None:
    for name, out in outs.items():
        out.copy_(found[name])


def load_bytes(path: str, outs: Tensors) -> None:
    """Nothing but what the kernel does to read a file's bytes into tensors, with as many threads as ours."""
    with open(f"{path}/state.safetensors", "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(size))

        def read(name: str) -> None:
            data = outs[name].view(-1).view(torch.uint8).numpy().data
            start = 8 + size + entries[name]["data_offsets"][0]
            for at in range(0, len(data), 2**22):
                os.preadv(file.fileno(), [data[at : at + 2**22]], start + at)

        with ThreadPoolExecutor(READ_THREADS) as threads:
            list(threads.map(read, outs))


def made(path: str) -> str:
    os.makedirs(path, exist_ok=True)
    return path


SAVES: dict[str, Callable[[str, Tensors], Any]] = {
    "ours": lambda path, tensors: save(path, local_state(tensors), single_mesh()),
    "torch.save": lambda path, tensors: torch.save(tensors, f"{made(path)}/state.pt"),
    "DCP": lambda path, tensors: dcp.save(tensors, checkpoint_id=path),
    "safetensors": lambda path, tensors: save_file(tensors, f"{made(path)}/state.safetensors"),
}
LOADS: dict[str, tuple[str, Callable[[str, Tensors], Any]]] = {
    "ours, checked before": ("ours", load_ours),
    "ours, checked as read": ("ours", lambda path, outs: load_ours(path, outs, check_first=False)),
    "torch.load": ("torch.save", lambda path, outs: copy_all(outs, torch.load(f"{path}/state.pt"))),
    "torch.load(mmap=True)": (
        "torch.save",
        lambda path, outs: copy_all(outs, torch.load(f"{path}/state.pt", mmap=True)),
    ),
    "DCP": ("DCP", lambda path, outs: dcp.load(outs, checkpoint_id=path)),
    "safetensors": ("safetensors", lambda path, outs: copy_all(outs, load_file(f"{path}/state.safetensors"))),
    "bytes alone": ("safetensors", load_bytes),
}


# What runs in a process of its own; each answers with one line of JSON.


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def sync_files(path: str) -> None:
    for folder, _, files in os.walk(path):
        for name in files:
            descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def time_save(name: str, path: str, mib: int) -> dict[str, Any]:
    tensors = state_tensors(mib)
    SAVES[name](f"{path}-small", {"0.weight": tensors["0.weight"]})  # imports and thread pools
    shutil.rmtree(f"{path}-small")
    start = time.perf_counter()
    SAVES[name](path, tensors)
    seconds = time.perf_counter() - start
    sync_files(path)
    disk = sum(os.path.getsize(os.path.join(at, file)) for at, _, files in os.walk(path) for file in files)
    return {
        "seconds": seconds,
        "durable_seconds": time.perf_counter() - start,
        "disk": disk / nbytes_of(tensors),
    }


def time_background(name: str, path: str, mib: int) -> dict[str, Any]:
    """How long training stands still for a background save: with a copy, and of tensors that stay as they are."""
    tensors = state_tensors(mib)
    answer = {}
    for how, stays in (("copied", False), ("borrowed", True)):
        saver = BackgroundSaver(single_mesh(), is_immutable=lambda _, stays=stays: stays)
        start = time.perf_counter()
        saver.save(path, local_state(tensors))
        answer[f"{how}_stall_seconds"] = time.perf_counter() - start
        saver.close()
        answer[f"{how}_seconds"] = time.perf_counter() - start
    return answer


def time_load(name: str, path: str, mib: int) -> dict[str, Any]:
    expected = state_tensors(mib)
    outs = {key: torch.zeros_like(tensor) for key, tensor in expected.items()}
    before, start = peak_bytes(), time.perf_counter()
    LOADS[name][1](path, outs)
    seconds = time.perf_counter() - start
    extra = peak_bytes() - before
    if not all(torch.equal(outs[key], expected[key]) for key in expected):
        raise SystemExit(f"{name} did not load what was saved")
    return {"seconds": seconds, "extra_bytes": extra}


def part_of(rank: int, size: int, dim: int) -> Box:
    """This rank's part along a dim, as DTensor cuts."""
    first, stop = (min(SHAPE[dim], r * -(-SHAPE[dim] // size)) for r in (rank, rank + 1))
    offset, extent = [0, 0], list(SHAPE)
    offset[dim], extent[dim] = first, stop - first
    return Box((offset[0], offset[1]), (extent[0], extent[1]))


def run_rank(what: str, name: str, path: str, mib: int, folder: str) -> dict[str, Any]:
    """One rank that saves rows ("write"), or one that reads columns ("read") or rows ("read rows")."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(minutes=5))
    mesh = build_mesh(MeshSpec(shard=size), timedelta(minutes=5))
    tensors = state_tensors(mib)
    is_writer = what == "write"
    wanted = part_of(rank, size, 0 if what == "read rows" else 1)
    at = wanted.within(whole_box(SHAPE))
    if name == "DCP":
        work = _dcp_at_rank(path, tensors, size, is_writer, dim=1 if what == "read" else 0)
    else:
        work = _ours_at_rank(path, tensors, mesh, wanted, is_writer, check_first="before" in name)
    dist.barrier()
    peak, start, before = peak_bytes(), time.perf_counter(), rank_bytes_read()
    outs, counted = work()
    nbytes = rank_bytes_read() - before if counted is None else counted
    dist.barrier()
    seconds = time.perf_counter() - start
    extra = peak_bytes() - peak
    if not is_writer and not all(torch.equal(outs[key], tensors[key][at]) for key in tensors):
        raise SystemExit(f"{name} did not read what was saved")
    dist.destroy_process_group()
    return {"seconds": seconds, "bytes": nbytes, "extra_bytes": extra}


_Work = Callable[[], tuple[Tensors, "int | None"]]


def _ours_at_rank(
    path: str, tensors: Tensors, mesh: DataMesh, wanted: Box, is_writer: bool, *, check_first: bool
) -> _Work:
    outs = {} if is_writer else {key: torch.zeros(wanted.size, dtype=t.dtype) for key, t in tensors.items()}

    def work() -> tuple[Tensors, int | None]:
        if is_writer:
            save(path, local_state(tensors, mesh.world.rank, mesh.world.size), mesh)
            return {}, 0
        source = open_checkpoint(path, mesh, check_first=check_first)
        source.read([states.ReadRequest(key_of(key), wanted, out) for key, out in outs.items()])
        return outs, source.bytes_read + source.bytes_checked

    return work


def _dcp_at_rank(path: str, tensors: Tensors, size: int, is_writer: bool, dim: int) -> _Work:
    mesh = init_device_mesh("cpu", (size,))
    rank = dist.get_rank()
    parts = {}
    for key, tensor in tensors.items():
        part = torch.chunk(tensor, size, dim)[rank] if is_writer else None
        local = part if part is not None else torch.zeros_like(torch.chunk(tensor, size, dim)[rank])
        parts[key] = DTensor.from_local(local, mesh, [Shard(dim)], shape=tensor.shape, stride=tensor.stride())

    def work() -> tuple[Tensors, int | None]:
        if is_writer:
            dcp.save(parts, checkpoint_id=path)
            return {}, 0
        dcp.load(parts, checkpoint_id=path)
        return {key: part.to_local() for key, part in parts.items()}, None

    return work


# The controller


def ask(*args: str, ranks: int = 1) -> list[dict[str, Any]]:
    """What fresh processes answered, one per rank. They are forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    answers: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        processes, receivers = [], []
        for rank in range(ranks):
            receiver, sender = context.Pipe(duplex=False)
            processes.append(context.Process(target=_answer, args=(sender, rank, ranks, folder, *args)))
            processes[-1].start()
            sender.close()
            receivers.append(receiver)
        for receiver in receivers:
            with contextlib.suppress(EOFError):  # it ended without an answer
                answers.append(receiver.recv())
        for process in processes:
            process.join()
    if len(answers) < ranks:
        raise SystemExit(f"{' '.join(args)} failed")
    return answers


def _answer(sender: Connection, rank: int, ranks: int, folder: str, what: str, name: str, path: str, mib: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
    if what.startswith(("write", "read")):
        sender.send(run_rank(what, name, path, int(mib), folder))
    else:
        timed = {"save": time_save, "load": time_load, "background": time_background}[what]
        sender.send(timed(name, path, int(mib)))


def ours_at_other_size(folder: str, mib: int) -> dict[str, dict[str, Any]]:
    """What DeepSpeed's universal checkpoint is for: saved by some ranks, loaded by others."""
    return _at_other_size(folder, mib, "ours", ("ours, checked before", "ours, checked as read"))


def library_at_other_size(folder: str, mib: int) -> dict[str, dict[str, Any]]:
    """The same by calls of a library on tensors that are there: ours, and torch's distributed checkpoint."""
    return ours_at_other_size(folder, mib) | _at_other_size(folder, mib, "DCP", ("DCP",))


def _at_other_size(folder: str, mib: int, writer: str, readers: Sequence[str]) -> dict[str, dict[str, Any]]:
    path = f"{folder}/other-size"
    os.makedirs(path)
    with PeakDisk(path) as peak:
        saved = ask("write", writer, f"{path}/ckpt", str(mib), ranks=WRITERS)
    found = {}
    for name in readers:
        loaded = ask("read rows", name, f"{path}/ckpt", str(mib), ranks=READERS)
        found[name] = {
            "save_seconds": saved[0]["seconds"],
            "convert_seconds": 0.0,
            "load_seconds": loaded[0]["seconds"],
            "load_bytes": sum(answer["bytes"] for answer in loaded),
            "peak_disk": peak.bytes,
        }
    shutil.rmtree(path)
    return found


def deepspeed_at_other_size(folder: str, mib: int, peers: Path) -> dict[str, Any]:
    path = f"{folder}/deepspeed"
    os.makedirs(path)
    environment = {**os.environ, **peer_environment(peers)}
    found = through_universal(environment, str(peers / "bin" / "python"), path, num_weights(mib))
    shutil.rmtree(path)
    return found


def measure(folder: str, mib: int, rounds: int, peers: Path | None) -> dict[str, Any]:
    parts = ("save", "load", "reshard", "other size", "background")
    runs: dict[str, dict[str, list[Any]]] = {part: {} for part in parts}
    for _ in range(rounds):
        for name in SAVES:
            shutil.rmtree(f"{folder}/{name}", ignore_errors=True)
            runs["save"].setdefault(name, []).append(ask("save", name, f"{folder}/{name}", str(mib))[0])
        for name, (saved, _) in LOADS.items():
            runs["load"].setdefault(name, []).append(ask("load", name, f"{folder}/{saved}", str(mib))[0])
        for name in ("ours", "DCP"):
            path = f"{folder}/{name}-ranks"
            shutil.rmtree(path, ignore_errors=True)
            ask("write", name, path, str(mib), ranks=WRITERS)
            answers = ask("read", name, path, str(mib), ranks=READERS)
            found = {
                "seconds": answers[0]["seconds"],
                "bytes": sum(answer["bytes"] for answer in answers),
                "extra_bytes": max(answer["extra_bytes"] for answer in answers),
            }
            runs["reshard"].setdefault(name, []).append(found)
        for name, found in ours_at_other_size(folder, mib).items():
            runs["other size"].setdefault(name, []).append(found)
        if peers is not None:
            found = deepspeed_at_other_size(folder, mib, peers)
            runs["other size"].setdefault(f"DeepSpeed {found['deepspeed']}, ZeRO-3", []).append(found)
        runs["background"].setdefault("ours", []).append(ask("background", "ours", f"{folder}/bg", str(mib))[0])
    return {
        part: {
            name: {key: statistics.median(one[key] for one in answers) for key in answers[0] if key != "deepspeed"}
            for name, answers in names.items()
        }
        for part, names in runs.items()
    }


def report(results: dict[str, Any], nbytes: int) -> list[str]:
    """Print tables; which limits were missed."""
    for part in ("save", "load", "reshard", "other size"):
        print(f"\n{part}")
        for name, found in results[part].items():
            if part == "other size":
                found |= {"read": found["load_bytes"] / nbytes, "disk": found["peak_disk"] / nbytes}
            else:
                found["gb_per_second"] = nbytes / found["seconds"] / 1e9
            if part == "reshard":
                found["read"] = found["bytes"] / nbytes
            shown = (f"{key} {value:.4g}" for key, value in found.items())
            print(f"  {name:24s} {'   '.join(shown)}")
    print(f"\nbackground\n  {results['background']['ours']}")
    missed = []
    if results["reshard"]["ours"]["read"] > 1.05:
        missed.append("bytes read")
    if max(found["extra_bytes"] for name, found in results["load"].items() if name.startswith("ours")) > 2**28:
        missed.append("memory to load")
    if results["reshard"]["ours"]["extra_bytes"] > 2**28:
        missed.append("memory to reshard")
    if results["other size"]["ours, checked as read"]["read"] > 1.05:
        missed.append("bytes read by rows")
    if results["save"]["ours"]["disk"] > 1.02:
        missed.append("disk")
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default="none", help="environment of benchmarks/peers.sh, or none")
    parser.add_argument("--quick", action="store_true", help="28 MiB, one round")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # Of every process that is measured. Threads that wait spin otherwise, on cores that others need.
    os.environ.update(OMP_NUM_THREADS="2", OMP_WAIT_POLICY="passive")
    if options.quick:
        options.mib, options.rounds = 28, 1
    peers = find_peers(parser, options.peers)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="checkpoint-bench-") as at:
        results = measure(at, options.mib, options.rounds, peers)
    nbytes = nbytes_of(state_tensors(options.mib))
    missed = report(results, nbytes)
    facts = {
        "torch": torch.__version__,
        "hardware": hardware(),
        "load_before_and_after": [round(load, 2), round(os.getloadavg()[0], 2)],
    }
    line = json.dumps({"bytes": nbytes, "rounds": options.rounds, "missed": missed, **facts, **results})
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(line + "\n")
    print(line)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
