"""How long is a 176B-parameter checkpoint planned? `python benchmarks/layout_176b.py [--ranks 384] [--shards 64]`.

BLOOM-176B's tensors (Le Scao et al. 2022, arXiv:2211.05100: 70 blocks of 14336 features, 250880 embeddings) with bf16
weights, fp32 masters and AdamW's moments, 2.5 TB, by name and shape only: hybrid sharding of so many ranks saves them,
and other numbers of ranks load them. Every plan is the product's own: who writes which boxes, what each file holds, the
manifest with its proof that nothing is missing, written and read back; which chunks and blocks each new rank wants, and
who reads each. No tensor has values, and no file is written.

Ranks plan at once, so what counts is the seconds of one rank: all that every rank computes for itself, rank 0's part of
the save, and one rank's own. What all ranks want is computed too, and has to cover every byte; it is not in them. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import pickle
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.step_cost import hardware
from lightning_superscale.checkpoint.format.blocks import BLOCK_BYTES
from lightning_superscale.checkpoint.format.manifest import REST_NAME, FileRecord, Manifest, blocks_name
from lightning_superscale.checkpoint.load.segments import Blocks, ChunkFinder, ReadItem, Segment, blocks_of, segments_of
from lightning_superscale.checkpoint.save.plan import divide, plan_file, plan_files
from lightning_superscale.checkpoint.save.table import records_of, table_of
from lightning_superscale.checkpoint.state import MASTER, MODEL, TensorInfo, TensorKey, optimizer_section
from lightning_superscale.layout.box import Box, row_box, whole_box
from lightning_superscale.layout.rows import shard_rows

WIDTH, BLOCKS, EMBEDDINGS = 14336, 70, 250880
NUM_PARAMS = 176_247_271_424
LOADERS = ((96, 96), (1000, 125))  # ranks and shards


def shapes(num_blocks: int = BLOCKS) -> dict[str, tuple[int, ...]]:
    """BLOOM's parameters, the head being the embeddings."""
    found: dict[str, tuple[int, ...]] = {"word_embeddings.weight": (EMBEDDINGS, WIDTH)}

    def add(name: str, *weight: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = weight, weight[:1]

    add("word_embeddings_layernorm", WIDTH)
    for i in range(num_blocks):
        add(f"h.{i}.input_layernorm", WIDTH)
        add(f"h.{i}.self_attention.query_key_value", 3 * WIDTH, WIDTH)
        add(f"h.{i}.self_attention.dense", WIDTH, WIDTH)
        add(f"h.{i}.post_attention_layernorm", WIDTH)
        add(f"h.{i}.mlp.dense_h_to_4h", 4 * WIDTH, WIDTH)
        add(f"h.{i}.mlp.dense_4h_to_h", WIDTH, 4 * WIDTH)
    add("ln_f", WIDTH)
    return found


def tensors(num_blocks: int = BLOCKS) -> dict[TensorKey, TensorInfo]:
    """Everything that a checkpoint of a step with AdamW and fp32 masters holds."""
    found, section = {}, optimizer_section(0)
    for name, shape in shapes(num_blocks).items():
        found[TensorKey(MODEL, name)] = TensorInfo(torch.bfloat16, shape, "model", True)
        found[TensorKey(section, name, MASTER)] = TensorInfo(torch.float32, shape, "master")
        for moment in ("exp_avg", "exp_avg_sq"):
            found[TensorKey(section, name, moment)] = TensorInfo(torch.float32, shape, "state")
        found[TensorKey(section, name, "step")] = TensorInfo(torch.float32, (), "scalar")
    return found


Held = Mapping[TensorKey, Sequence[Box]]


def held(all_tensors: Mapping[TensorKey, TensorInfo], shard: int, num_shards: int) -> Held:
    """The boxes of one rank, as every ZeRO stage cuts them; tensors that are cut alike share theirs, as in a save."""
    cuts: dict[tuple[int, ...], tuple[Box, ...]] = {}
    for info in all_tensors.values():
        if info.shape not in cuts:
            start, stop = shard_rows(info.shape[0], shard, num_shards) if info.shape else (0, 1)
            box = row_box(info.shape, start, stop) if info.shape else whole_box(())
            cuts[info.shape] = (box,) if stop > start else ()
    return {key: cuts[info.shape] for key, info in all_tensors.items()}


@dataclass
class Clock:
    """Seconds of each part, and of all that counts."""

    parts: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part; of several of one name, as of several ranks, the longest counts."""
        gc.freeze()  # what other ranks would hold is no burden for this one's garbage collector
        start = time.perf_counter()
        yield
        self.parts[name] = max(time.perf_counter() - start, self.parts.get(name, 0.0))
        gc.unfreeze()

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def save(all_tensors: Mapping[TensorKey, TensorInfo], num_ranks: int, num_shards: int, clock: Clock) -> bytes:
    """The manifest that ranks would write."""
    of_shards = [held(all_tensors, shard, num_shards) for shard in range(num_shards)]
    of_ranks = [of_shards[rank % num_shards] for rank in range(num_ranks)]
    with clock.part("divide the writing"):
        items = divide(all_tensors, of_ranks)
    files, tables = {}, []
    for rank in range(num_ranks):
        with clock.part("plan own files"):
            own = items[rank]
            planned = {
                name: plan_file(name, [own[i] for i in indices], all_tensors, "plan")
                for name, indices in plan_files(rank, own, all_tensors).items()
            }
            table = table_of([pair for file in planned.values() for pair in file.chunks], all_tensors)
            message = pickle.dumps(table)
        for name, file in planned.items():
            files[name] = FileRecord(file.size, "0" * 16)
            files[blocks_name(name)] = FileRecord(8 * -(-file.size // BLOCK_BYTES), "0" * 16)
        tables.append(message)
    files[REST_NAME] = FileRecord(2, "0" * 16)
    with clock.part("make the manifest"):
        manifest = Manifest(
            uuid="plan",
            step=1,
            world=num_ranks,
            writers=num_ranks,
            libs={},
            files=files,
            tensors=records_of([pickle.loads(message) for message in tables], all_tensors, files),
        )
        manifest.check("plan")
        return manifest.to_bytes()


@dataclass
class Load:
    """What ranks would read.

    Attributes:
        requests: by shard, its tensors and boxes.
        items: by shard, the read items of its requests.
        blocks: by shard, the blocks that hold them.
        segments: of files, each with its reader.
    """

    requests: list[list[tuple[TensorKey, Box]]]
    items: list[list[ReadItem]]
    blocks: list[Blocks]
    segments: list[Segment]


def load(manifest: Manifest, num_ranks: int, num_shards: int, clock: Clock) -> Load:
    """What ranks would read of a checkpoint."""
    infos = {key: record.info for key, record in manifest.tensors.items()}
    finder = ChunkFinder(manifest.tensors)
    found = Load([], [], [], [])
    for shard in range(num_shards):
        own = [(key, box) for key, boxes in held(infos, shard, num_shards).items() for box in boxes]
        with clock.part("find what to read"):  # the first makes the finder's tables, as every rank does for itself
            items = finder.read_items(own)
            blocks = blocks_of(items)
        found.requests.append(own), found.items.append(items), found.blocks.append(blocks)
    with clock.part("divide the reading"):
        found.segments = segments_of([found.blocks[rank % num_shards] for rank in range(num_ranks)])
    return found


def check(manifest: Manifest, found: Load) -> int:
    """Each request gets each of its elements once, all requests are all tensors, and each block has one reader.

    Returns:
        bytes of all tensors.

    Raises:
        AssertionError: something is missing, or read twice.
    """
    numel: dict[TensorKey, int] = dict.fromkeys(manifest.tensors, 0)
    for requests, items in zip(found.requests, found.items, strict=True):
        got = [0] * len(requests)
        for item in items:
            got[item.request] += item.box.numel
        for (key, box), count in zip(requests, got, strict=True):
            numel[key] += count
            if count != box.numel:
                raise AssertionError(f"{key}: {count} of the {box.numel} elements of {box} are read")
    total = 0
    for key, record in manifest.tensors.items():
        whole = math.prod(record.info.shape)
        copies = 1 if record.info.shape else len(found.items)  # every rank reads a scalar
        if numel[key] != whole * copies:
            raise AssertionError(f"{key}: {numel[key]} elements are read, expected {whole * copies}")
        total += whole * record.info.dtype.itemsize
    _check_blocks(found)
    return total


def _check_blocks(found: Load) -> None:
    read: dict[str, list[tuple[int, int]]] = {}
    wanted: dict[str, list[tuple[int, int]]] = {}
    for segment in found.segments:
        read.setdefault(segment.file, []).append((segment.first, segment.stop))
    for blocks in found.blocks:
        for file, intervals in blocks.items():
            wanted.setdefault(file, []).extend(intervals)
    for file in sorted({*read, *wanted}):
        ordered = sorted(read.get(file, ()))
        if any(before[1] > after[0] for before, after in zip(ordered, ordered[1:], strict=False)):
            raise AssertionError(f"blocks of {file} are read twice")
        if _union(ordered) != _union(sorted(wanted.get(file, ()))):
            raise AssertionError(f"blocks of {file} are wanted and not read, or read and not wanted")


def _union(ordered: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for first, stop in ordered:
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((first, stop))
    return merged


def main() -> None:
    """Plan a save and loads, and print what it takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=384, help="that save")
    parser.add_argument("--shards", type=int, default=64, help="ranks that share one copy of the states")
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    asked = parser.parse_args()
    rows = []
    saving = Clock()
    everything = tensors()
    data = save(everything, asked.ranks, asked.shards, saving)
    for num_ranks, num_shards in LOADERS:
        clock = Clock(dict(saving.parts))
        with clock.part("read the manifest"):
            manifest = Manifest.from_bytes(data, "plan")
        found = load(manifest, num_ranks, num_shards, clock)
        nbytes = check(manifest, found)
        print(f"{asked.ranks} ranks, {num_ranks} later: {clock.seconds:.1f} s for one rank; {nbytes / 1e12:.2f} TB")
        for name, seconds in clock.parts.items():
            print(f"  {seconds:6.2f} s  {name}")
        rows.append({"loading_ranks": num_ranks, "shards": num_shards, "seconds": clock.seconds, "parts": clock.parts})
    result = {"hardware": hardware(), "saving_ranks": asked.ranks, "shards": asked.shards, "manifest_bytes": len(data)}
    report = json.dumps({**result, "loads": rows})
    if asked.json is not None:
        asked.json.write_text(report + "\n")
    print(report)


if __name__ == "__main__":
    main()
