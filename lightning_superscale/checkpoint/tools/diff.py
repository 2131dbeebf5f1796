"""The differences of two training states in checkpoints of any formats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_superscale.checkpoint.state import OptimizerRecord, ReadRequest, StateSource, TensorKey
from lightning_superscale.checkpoint.tools.chunks import batches

_BATCH_BYTES = 2**24  # values are compared in double precision, in about ten times this memory


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor or an entry of an optimizer in which two states differ.

    Attributes:
        what: name of the tensor or entry.
        found: the difference in words, such as both values.
        num_elements: number of the tensor's elements that differ; None where the difference is not one of values.
        max_abs: largest difference of two elements; nan where one of two is nan; None like `num_elements`.
    """

    what: str
    found: str
    num_elements: int | None = None
    max_abs: float | None = None


def differences(
    a: StateSource,
    b: StateSource,
    *,
    rtol: float = 0.0,
    atol: float = 0.0,
) -> Iterator[Difference]:
    """Compare the weights, buffers, optimizer states and groups of two states; their rest, such as loops, is ignored.

    Elements x of a and y of b are equal where |x - y| <= atol + rtol * |y|, and where both are nan. A tied tensor may
    have another of its names on the other side. The class of an optimizer and the step are compared where both sides
    know them. Memory does not grow with the checkpoints. One process calls it.

    Raises:
        CheckpointError: a checkpoint is damaged, or its optimizers' parameters have no names.
    """
    if None not in (a.step, b.step) and a.step != b.step:
        yield Difference("step", f"{a.step} and {b.step}")
    yield from _optimizer_differences(a.optimizers, b.optimizers)
    pairs: dict[TensorKey, TensorKey] = {}
    for key in sorted(a.tensors):
        other = _counterpart(key, b, a)
        if other is None:
            yield Difference(str(key), "only in A")
        else:
            pairs[key] = other
    seen = set(pairs.values())
    for key in sorted(b.tensors):
        if key not in seen and _counterpart(key, a, b) is None:
            yield Difference(str(key), "only in B")
        elif key not in seen:  # B has two copies of a tensor that is tied in A
            yield from _value_differences(a, b, {_counterpart(key, a, b) or key: key}, rtol, atol)
    yield from _value_differences(a, b, pairs, rtol, atol)


def _counterpart(key: TensorKey, there: StateSource, here: StateSource) -> TensorKey | None:
    """A tensor's key in another state, under its own name or one that it is tied to."""
    names = [key.name]
    for aliases in (there.aliases, here.aliases):
        target = aliases.get(key.name, key.name)
        names += [target, *(alias for alias, name in aliases.items() if name == target)]
    keys = (TensorKey(key.section, name, key.state) for name in names)
    return next((other for other in keys if other in there.tensors), None)


def _value_differences(
    a: StateSource,
    b: StateSource,
    pairs: Mapping[TensorKey, TensorKey],
    rtol: float,
    atol: float,
) -> Iterator[Difference]:
    alike = []
    for key, other in pairs.items():
        mine, theirs = a.tensors[key], b.tensors[other]
        if (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape):
            alike.append(key)
            continue
        one, two = (f"{str(info.dtype).removeprefix('torch.')} {info.shape}" for info in (mine, theirs))
        yield Difference(str(key), f"{one} and {two}")
    counts: dict[TensorKey, tuple[int, float]] = {}
    for batch in batches(a.tensors, alike, _BATCH_BYTES):
        read = [[torch.empty(box.size, dtype=a.tensors[key].dtype) for key, box in batch] for _ in range(2)]
        a.read([ReadRequest(key, box, out) for (key, box), out in zip(batch, read[0], strict=True)])
        b.read([ReadRequest(pairs[key], box, out) for (key, box), out in zip(batch, read[1], strict=True)])
        for (key, _), x, y in zip(batch, *read, strict=True):
            count, largest = _compare(x, y, rtol, atol)
            if count:
                counts[key] = _together(counts.get(key, (0, 0.0)), (count, largest))
    for key, (count, largest) in counts.items():
        numel = torch.Size(a.tensors[key].shape).numel()
        found = f"{count:,} of {numel:,} elements, by at most {largest:.6g}"
        yield Difference(str(key), found, count, largest)


def _together(one: tuple[int, float], two: tuple[int, float]) -> tuple[int, float]:
    largest = [one[1], two[1]]
    return one[0] + two[0], float("nan") if any(x != x for x in largest) else max(largest)


def _compare(x: Tensor, y: Tensor, rtol: float, atol: float) -> tuple[int, float]:
    """Count the elements that differ between two tensors of one dtype and shape, and find the largest difference."""
    if torch.equal(x.view(-1).view(torch.uint8), y.view(-1).view(torch.uint8)):
        return 0, 0.0
    is_integer = not (x.dtype.is_floating_point or x.dtype.is_complex)
    is_same = x.view(torch.int64) == y.view(torch.int64) if is_integer and x.dtype.itemsize == 8 else None
    # Represents all values but those of large integers.
    wide = torch.complex128 if x.dtype.is_complex else torch.float64
    x, y = x.to(wide), y.to(wide)
    gap = (x - y).abs()
    is_same = x == y if is_same is None else is_same
    is_near = gap.isfinite() & (gap <= atol + rtol * y.abs()) if rtol or atol else is_same
    differs = ~(is_same | is_near | (x.isnan() & y.isnan()))
    count = int(differs.sum())
    return count, float(gap[differs].max()) if count else 0.0


def _optimizer_differences(a: tuple[OptimizerRecord, ...], b: tuple[OptimizerRecord, ...]) -> Iterator[Difference]:
    if len(a) != len(b):
        yield Difference("optimizers", f"{len(a)} and {len(b)}")
        return
    for index, (one, two) in enumerate(zip(a, b, strict=True)):
        where = f"optimizer.{index}"
        if one.class_name and two.class_name and one.class_name != two.class_name:
            yield Difference(f"{where}: class", f"{one.class_name} and {two.class_name}")
        if len(one.groups) != len(two.groups):
            yield Difference(f"{where}: groups", f"{len(one.groups)} and {len(two.groups)}")
            continue
        for number, names in enumerate(zip(one.names, two.names, strict=True)):
            if names[0] != names[1]:
                yield Difference(f"{where}: group {number}", _names_differ(*names))
            yield from _entries(f"{where}: group {number}", one.groups[number], two.groups[number])
        yield from _entries(f"{where}: rule", one.rule, two.rule)
        for name in sorted(one.values.keys() | two.values.keys()):
            yield from _entries(f"{where}: {name}", one.values.get(name, {}), two.values.get(name, {}))


def _names_differ(one: Iterable[str], two: Iterable[str]) -> str:
    only_a, only_b = sorted(set(one) - set(two)), sorted(set(two) - set(one))
    if not only_a and not only_b:
        return "the same parameters in another order"
    return f"parameters only in A: {only_a[:5]}, only in B: {only_b[:5]}"


def _entries(where: str, one: dict[str, Any], two: dict[str, Any]) -> Iterator[Difference]:
    for key in sorted(one.keys() | two.keys()):
        if key not in one or key not in two:
            yield Difference(f"{where} [{key}]", f"only in {'A' if key in one else 'B'}: {(one | two)[key]!r}")
        elif not _is_same(one[key], two[key]):
            yield Difference(f"{where} [{key}]", f"{one[key]!r} and {two[key]!r}")


def _is_same(x: Any, y: Any) -> bool:
    if isinstance(x, (list, tuple)) and isinstance(y, (list, tuple)):
        return len(x) == len(y) and all(map(_is_same, x, y))
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y)
    if isinstance(x, Tensor) or isinstance(y, Tensor):
        return False
    return bool(x == y or (x != x and y != y))
