"""The plan that a strategy resolved to: the place, dtype and size of each class of bytes, and the reasons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ByteClass:
    """One class of bytes that training keeps between steps, or moves through.

    Attributes:
        device_bytes, host_bytes: bytes counted from tensors, padding included.
        arithmetic: the bytes that the memory model expects, as a product in words; empty where it expects none.
    """

    name: str
    dtype: str
    device_bytes: int
    host_bytes: int
    arithmetic: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelPlan:
    """The resolved plan of one rank.

    Attributes:
        shard_size: ranks that share one copy of sharded tensors; of tensor-parallel ones, one part of a copy.
        num_params, num_trainable: elements of all parameters and of the trainable ones.
        unit_bytes: upper bound of a unit's weights.
        engine: name of the offload engine, such as "superoffload"; "resident" where nothing is offloaded.
        kernel: the kernel that steps the optimizer, in words.
        bytes: one row per class.
        reasons: one sentence per choice that was made for the user.
        tensor_size: ranks that compute each batch together (tensor parallelism).
        sequence_size: ranks that share every sample's sequence (sequence parallelism).
    """

    device: str
    world_size: int
    shard_size: int
    zero_stage: int
    engine: str
    precision: str
    num_params: int
    num_trainable: int
    num_units: int
    unit_bytes: int
    cpu_threads: int
    kernel: str
    bytes: Sequence[ByteClass]
    reasons: Sequence[str]
    tensor_size: int = 1
    sequence_size: int = 1

    @property
    def device_bytes(self) -> int:
        return sum(row.device_bytes for row in self.bytes)

    @property
    def host_bytes(self) -> int:
        return sum(row.host_bytes for row in self.bytes)

    def _stage(self) -> str:
        if self.world_size == 1:
            return str(self.zero_stage)
        if self.tensor_size > 1:
            return (
                f"{self.zero_stage}: {self.tensor_size} tensor-parallel parts, each over {self.shard_size} "
                f"rank{'s' if self.shard_size > 1 else ''}"
            )
        num_replicas = self.world_size // self.shard_size
        copies = f"{num_replicas} cop{'ies' if num_replicas > 1 else 'y'}"
        return f"{self.zero_stage}: {copies}, each over {self.shard_size} rank{'s' if self.shard_size > 1 else ''}"

    def table(self) -> str:
        """The plan as text, for `strategy.explain()`."""
        facts = [
            ("device", f"{self.device}, {self.world_size} rank{'s' if self.world_size > 1 else ''}"),
            ("zero stage", self._stage()),
            *([("sequences", f"each over {self.sequence_size} ranks")] if self.sequence_size > 1 else []),
            ("optimizer engine", self.engine),
            ("optimizer kernel", self.kernel),
            ("precision", self.precision),
            ("parameters", f"{self.num_params:,}, of which {self.num_trainable:,} trainable"),
            ("units", f"{self.num_units} of at most {format_bytes(self.unit_bytes)} of weights"),
            ("host threads", str(self.cpu_threads)),
        ]
        width = max(len(key) for key, _ in facts)
        lines = [f"{key:<{width}}  {value}" for key, value in facts]
        lines += ["", f"{'bytes':<24}{'dtype':<10}{'device':>12}{'host':>12}"]
        for row in self.bytes:
            cells = f"{format_bytes(row.device_bytes):>12}{format_bytes(row.host_bytes):>12}"
            lines.append(f"{row.name:<24}{row.dtype:<10}{cells}  {row.arithmetic}".rstrip())
        lines.append(f"{'total':<34}{format_bytes(self.device_bytes):>12}{format_bytes(self.host_bytes):>12}")
        if self.reasons:
            lines += ["", *(f"- {reason}" for reason in self.reasons)]
        return "\n".join(lines)


def format_bytes(nbytes: float) -> str:
    """A size with a binary unit, such as `1.5 GiB`; `-` for none."""
    if nbytes == 0:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} TiB"
