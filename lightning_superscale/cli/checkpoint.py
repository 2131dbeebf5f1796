"""`superscale checkpoint ...`: inspects, verifies, compares and converts checkpoints of any known format."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from lightning_superscale.checkpoint.foreign.chunks import ForeignSource
from lightning_superscale.checkpoint.foreign.deepspeed_export import OptimizerKind, export_deepspeed_universal
from lightning_superscale.checkpoint.foreign.hf_export import export_hf
from lightning_superscale.checkpoint.foreign.lightning_export import export_lightning
from lightning_superscale.checkpoint.foreign.registry import detect
from lightning_superscale.checkpoint.format.malformed import parse
from lightning_superscale.checkpoint.load.reader import is_checkpoint
from lightning_superscale.checkpoint.state import StateSource
from lightning_superscale.checkpoint.storage.files import is_remote, local_path
from lightning_superscale.checkpoint.storage.local import target_at
from lightning_superscale.checkpoint.tools.chunks import num_bytes
from lightning_superscale.checkpoint.tools.convert import convert as write_converted
from lightning_superscale.checkpoint.tools.diff import differences
from lightning_superscale.checkpoint.tools.summary import Summary, TensorSummary, dtype_text, numel_of, summarize
from lightning_superscale.checkpoint.tools.verify import Finding, read_through
from lightning_superscale.checkpoint.tools.verify import verify as verify_ours
from lightning_superscale.checkpoint.tools.view import View, exists, open_state
from lightning_superscale.errors import CheckpointError, SuperScaleError
from lightning_superscale.run.report.plan import format_bytes

ExportFormat = Literal["lightning", "hf", "deepspeed-universal-12", "deepspeed-universal-3"]

_LISTED_FILES = 20


class UsageError(SuperScaleError):
    """A command's arguments do not fit the files that are there; nothing was changed."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Options of a command for reading optimizer states that a file numbers.

    Attributes:
        names_file: a JSON file with a list of parameters' names for each optimizer, in its order; None without.
        drop_optimizer: whether only weights and buffers are read.
    """

    names_file: Path | None = None
    drop_optimizer: bool = False

    def names(self) -> list[list[str]] | None:
        """The content of the names file; None without one.

        Raises:
            UsageError: the file can't be read, or holds no lists of names.
        """
        if self.names_file is None:
            return None
        try:
            found = parse(self.names_file.read_bytes(), "it")
        except (OSError, CheckpointError) as error:
            raise UsageError(f"--names {self.names_file} can't be read: {error}") from error
        if isinstance(found, list) and found and all(isinstance(name, str) for name in found):
            found = [found]  # a flat list is that of the only optimizer
        is_nested = isinstance(found, list) and all(isinstance(one, list) for one in found)
        if not is_nested or not all(isinstance(name, str) for one in found for name in one):
            raise UsageError(
                f"--names {self.names_file} should hold a list of names for each optimizer, such as "
                '[["layer.weight", "layer.bias"]], in the optimizer\'s order.'
            )
        return [list(one) for one in found]


# Subcommands. Each returns the process's exit code.


def inspect(path: str, reading: Reading, *, has_tensors: bool, is_json: bool) -> int:
    """Print the summary of a checkpoint, without reading tensors' values or running any of its code.

    Args:
        has_tensors: whether all tensors are listed.
        is_json: whether the summary is printed as JSON, which lists all tensors.
    """
    _must_exist(path)
    summary = summarize(path, reading.names())
    if is_json:
        print(json.dumps(summary.to_json(), indent=2))
        return 0
    console = Console(file=sys.stdout)
    for line in _head(summary):
        console.print(Text(line), soft_wrap=True)
    console.print(_class_table(summary))
    if has_tensors:
        console.print(_tensor_table(summary))
    for line in _tail(summary):
        console.print(Text(line), soft_wrap=True)
    return 0


def verify(path: str, reading: Reading) -> int:
    """Read all of a checkpoint, and print its defects. Returns 0 where there are none, else 1."""
    _must_exist(path)
    if is_remote(path) or is_checkpoint(path):
        with _bar(f"verifying {path}") as (progress, _):
            findings = verify_ours(path, progress)
        what = "is whole: every file has its size and checksums, and every tensor all of its elements"
    else:
        findings, what = _verify_foreign(path, reading)
    for finding in findings:
        print(finding)
    if findings:
        print(f"superscale checkpoint verify: {path} is damaged: {len(findings)} findings", file=sys.stderr)
        return 1
    print(f"{path} {what}")
    return 0


def _verify_foreign(path: str, reading: Reading) -> tuple[list[Finding], str]:
    with _opened(path, reading, "reading") as source:
        findings = read_through(source)
    what = (
        f"can be read, all of its {len(source.tensors)} tensors. Its format, {detect(local_path(path))}, has no "
        "checksums that would tell whether a value was altered"
    )
    if reading.drop_optimizer:
        what += "; optimizer states were not read"
    return findings, what


def diff(a: str, b: str, reading: Reading, *, rtol: float, atol: float) -> int:
    """Print the differences of two checkpoints. Returns 0 where there are none, else 1.

    Args:
        rtol: relative tolerance of values.
        atol: absolute tolerance of values.
    """
    count = 0
    with _opened(b, reading) as second, _opened(a, reading, "comparing") as first:
        for one in differences(first, second, rtol=rtol, atol=atol):
            print(f"{one.what}: {one.found}")
            count += 1
    within = "" if rtol == atol == 0 else f" within rtol {rtol:g} and atol {atol:g}"
    print(f"A and B differ in {count}" if count else f"A and B are equal{within}: {len(first.tensors)} tensors")
    return 1 if count else 0


def convert(source: str, target: str, reading: Reading, *, should_overwrite: bool) -> int:
    """Write a checkpoint of any known format as a universal one.

    Args:
        should_overwrite: whether a checkpoint at `target` is replaced.

    Raises:
        UsageError: `target` exists and may not be replaced, or is no checkpoint.
    """
    if exists(target):
        if not should_overwrite:
            raise UsageError(f"{target} exists already. Choose another path, or pass --overwrite to replace it.")
        _must_be_checkpoint(target)
    with _opened(source, reading, "converting") as state:
        write_converted(state, target)
    print(f"{target} holds what {source} does, in the format of lightning-superscale")
    return 0


def export(
    source: str,
    target: str,
    to: ExportFormat,
    reading: Reading,
    *,
    strip_prefix: str = "",
    optimizer: OptimizerKind = "torch",
) -> int:
    """Write a checkpoint of any known format as one of another program's.

    Args:
        target: a local path.
        to: the format to write.
        strip_prefix: for "hf", the prefix to drop from weights' names.
        optimizer: for DeepSpeed's formats, the kind of optimizer that DeepSpeed is going to run.

    Raises:
        UsageError: `target` is a URL or exists, or the format can't do without optimizer states that are dropped.
    """
    if is_remote(target):
        raise UsageError(f"{target}: other formats are written to local paths only.")
    if exists(target):
        raise UsageError(f"{target} exists already. Choose another path, or remove it first.")
    if to.startswith("deepspeed") and reading.drop_optimizer:
        raise UsageError("DeepSpeed's universal checkpoints are made of optimizer states; they can't be dropped.")
    place = Path(local_path(target))
    is_hf = to == "hf"
    with _opened(source, Reading(reading.names_file, reading.drop_optimizer or is_hf), "exporting") as state:
        if to == "lightning":
            export_lightning(state, place, weights_only=reading.drop_optimizer)
        elif is_hf:
            export_hf(state, place, strip_prefix=strip_prefix)
        else:
            dialect: Literal["zero12", "zero3"] = "zero12" if to == "deepspeed-universal-12" else "zero3"
            export_deepspeed_universal(state, place, dialect, optimizer=optimizer)
    print(f"{target} holds what {source} does, in the format {to}")
    return 0


# Helpers of the subcommands


def _must_exist(path: str) -> None:
    if not exists(path):
        raise UsageError(f"there is nothing at {path}.")


def _must_be_checkpoint(path: str) -> None:
    """Refuse a path that holds anything but a checkpoint, before the source is read."""
    try:
        target_at(path).check()
    except CheckpointError as error:
        raise UsageError(str(error)) from error


@contextmanager
def _opened(path: str, reading: Reading, doing: str = "") -> Iterator[StateSource]:
    """A context that gives a checkpoint of any format, and closes it. With `doing`, reads move a progress bar.

    Raises:
        UsageError: there is nothing at `path`, or its optimizers' parameters have no names.
    """
    _must_exist(path)
    source = open_state(path, reading.names())
    try:
        if not reading.drop_optimizer and isinstance(source, ForeignSource) and source.names_missing:
            raise UsageError(
                f"{path} numbers the states of its optimizers and does not say which parameter has which number. Pass "
                "--names FILE, a JSON list of names for each optimizer, which parameter_names(module, optimizers) of "
                "lightning_superscale.checkpoint.foreign.torch_optimizer gives; or --drop-optimizer for weights only."
            )
        view = View(source, reading.drop_optimizer)
        if not doing:
            yield view
            return
        total = sum(num_bytes(info) for info in view.tensors.values())
        with _bar(f"{doing} {path}") as (_, advance):
            view.on_read = lambda nbytes: advance(nbytes, total)
            yield view
    finally:
        source.close()


@contextmanager
def _bar(doing: str) -> Iterator[tuple[Callable[[int, int], None], Callable[[int, int], None]]]:
    """A context that shows a progress bar of bytes on stderr.

    It gives two functions that move the bar: of (done, total), with all bytes done so far, and of (more, total), with
    the bytes done since the last call.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr)) as bar:
        task = bar.add_task(doing, total=None)
        yield (
            lambda done, total: bar.update(task, completed=done, total=total),
            lambda more, total: bar.update(task, advance=more, total=total),
        )


# Tables


def _head(summary: Summary) -> Iterator[str]:
    yield f"{summary.path}: {summary.format}" + (f", format {summary.schema}" if summary.schema else "")
    step = "the format does not say" if summary.step is None else f"{summary.step}"
    yield f"optimizer steps: {step}"
    if summary.world is not None:
        yield f"written by {summary.world} rank{'' if summary.world == 1 else 's'}"
    if summary.libraries:
        yield "libraries: " + ", ".join(f"{name} {version}" for name, version in sorted(summary.libraries.items()))


def _class_table(summary: Summary) -> Table:
    table = Table(title="What it holds", title_justify="left")
    for column in ("class", "dtype"):
        table.add_column(column)
    for column in ("tensors", "elements", "bytes"):
        table.add_column(column, justify="right")
    total = 0
    for name, tensors in summary.classes().items():
        for dtype in sorted({dtype_text(one.info) for one in tensors}):
            of_dtype = [one for one in tensors if dtype_text(one.info) == dtype]
            nbytes = sum(num_bytes(one.info) for one in of_dtype)
            numel = sum(numel_of(one.info) for one in of_dtype)
            table.add_row(name, dtype, str(len(of_dtype)), f"{numel:,}", format_bytes(nbytes))
            total += nbytes
    table.add_section()
    table.add_row("all", "", str(len(summary.tensors)), "", format_bytes(total))
    return table


def _tensor_table(summary: Summary) -> Table:
    table = Table(title="Tensors", title_justify="left")
    for column in ("tensor", "dtype", "shape", "role"):
        table.add_column(column, overflow="fold")
    table.add_column("pieces", justify="right")
    for one in summary.tensors:
        pieces = "" if one.num_pieces is None else str(one.num_pieces)
        table.add_row(Text(str(one.key)), dtype_text(one.info), str(one.info.shape), _role(one), pieces)
    return table


def _role(one: TensorSummary) -> str:
    return f"{one.info.role}, trainable" if one.info.trainable else one.info.role


def _tail(summary: Summary) -> Iterator[str]:
    for index, optimizer in enumerate(summary.optimizers):
        yield f"optimizer.{index}: {optimizer.class_name or 'class unknown to the format'}"
        for number, (names, group) in enumerate(zip(optimizer.names, optimizer.groups, strict=True)):
            options = ", ".join(f"{key} {value}" for key, value in group.items() if key != "param_names")
            yield f"  group {number}: {len(names)} parameters; {options}"
    if summary.optimizers_missing:
        yield f"optimizers: {summary.optimizers_missing} On the command line: --names FILE."
    for alias, name in sorted(summary.aliases.items()):
        yield f"tied: {alias} is {name}"
    if summary.rest:
        yield "beside them: " + ", ".join(summary.rest)
    yield f"files: {len(summary.files)}, {format_bytes(sum(summary.files.values()))}"
    for name, size in sorted(summary.files.items())[:_LISTED_FILES]:
        yield f"  {name}: {format_bytes(size)}"
    if len(summary.files) > _LISTED_FILES:
        yield f"  and {len(summary.files) - _LISTED_FILES} more"
