"""Runs `superscale estimate`."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from rich.console import Console
from torch import nn

from lightning_superscale.cli.estimate.model import build_model
from lightning_superscale.cli.estimate.picture import draw
from lightning_superscale.cli.estimate.table import show
from lightning_superscale.errors import SettingError
from lightning_superscale.estimation.api import estimate
from lightning_superscale.estimation.devices import PROFILES, THIS_MACHINE


class _Result(Protocol):
    def to_dict(self) -> dict[str, Any]: ...


_Found = TypeVar("_Found", bound=_Result)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a model, its batches and a device."""
    names = ", ".join([*PROFILES, THIS_MACHINE])
    parser.add_argument("model", metavar="MODEL", help="package.module:Class, or a Hugging Face folder or config.json")
    parser.add_argument("--arg", action="append", default=[], metavar="KEY=VALUE", help="keyword of the class; JSON")
    parser.add_argument("--device", default="H100 SXM", help=f"{names} (default: H100 SXM)")
    parser.add_argument("--device-memory", metavar="SIZE", help='of each device, such as "80GiB"')
    parser.add_argument("--host-memory", metavar="SIZE", help="for each device")
    parser.add_argument("--precision", default="bf16-true", help="the Trainer's (default: bf16-true)")
    parser.add_argument("--batch-size", type=int, default=1, help="of a Hugging Face model's tokens, on each rank")
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument(
        "--sequence",
        type=_sequence,
        metavar="N",
        help='ranks that share every sample\'s sequence, or a SequenceConfig as JSON: {"size": 4, "tile_mlp": 4096}',
    )
    parser.add_argument(
        "--input", action="append", default=[], metavar="SHAPE", help="of other models: float32[8,3,224,224], in order"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_model_arguments(parser)
    parser.add_argument("--devices", type=int, default=1, help="of each node (default: 1)")
    parser.add_argument("--num-nodes", type=int, default=1)
    parser.add_argument("--zero", type=int, help="one strategy instead of all: the stage")
    parser.add_argument("--offload", help="one strategy instead of all: cpu, superoffload or zenflow")
    parser.add_argument("--accumulate-grad-batches", type=int, default=1, metavar="N", help="batches in one step")
    parser.add_argument("--json", action="store_true", help="all of it as JSON")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="memory of each strategy, stacked by class")


def model_of(chosen: argparse.Namespace) -> nn.Module:
    """The model that a command line names, on the meta device.

    Raises:
        SettingError: there is no such model, or it can't be built; says why.
    """
    return build_model(chosen.model, dict(_keyword(text) for text in chosen.arg))


def model_options(chosen: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `estimate` and `simulate` that the arguments of `add_model_arguments` give, but for the model.

    Raises:
        SettingError: a text of --input that names no tensor.
    """
    inputs = [_tensor(text) for text in chosen.input]
    batch = None if not inputs else inputs[0] if len(inputs) == 1 else tuple(inputs)
    names = ("device", "device_memory", "host_memory", "precision", "batch_size", "sequence_length", "sequence")
    return {"batch": batch} | {name: getattr(chosen, name) for name in names}


def put_out(
    found: _Found,
    chosen: argparse.Namespace,
    draw: Callable[[_Found, Path], None],
    show: Callable[[_Found, Console], None],
) -> None:
    """Draw what was found where a command line has --picture, and print it, as JSON with --json."""
    if chosen.picture is not None:
        draw(found, chosen.picture)
    if chosen.json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        show(found, Console(file=sys.stdout))


def run(chosen: argparse.Namespace) -> int:
    """Print the estimate that a command line asks for; returns 1 where nothing fits.

    Raises:
        SuperScaleError: an argument that can't be used.
    """
    found = estimate(
        model_of(chosen),
        devices=chosen.devices,
        num_nodes=chosen.num_nodes,
        zero=chosen.zero,
        offload=chosen.offload,
        accumulate_grad_batches=chosen.accumulate_grad_batches,
        **model_options(chosen),
    )
    put_out(found, chosen, draw, show)
    return 0 if found.recommended is not None else 1


def _keyword(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key.isidentifier():
        raise SettingError(f"--arg takes KEY=VALUE, found {text!r}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value  # a text without quotes


def _sequence(text: str) -> Any:
    """A number of ranks, or the options of a SequenceConfig."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if isinstance(found, bool) or not isinstance(found, (int, dict)):
        raise argparse.ArgumentTypeError(
            f'takes a number of ranks, or a SequenceConfig as JSON such as {{"size": 4}}; found {text!r}'
        )
    return found


def _tensor(text: str) -> torch.Tensor:
    found = re.fullmatch(r"([a-z0-9]+)\[(\d+(?:,\d+)*)\]", text.replace(" ", ""))
    dtype = getattr(torch, found[1], None) if found is not None else None
    if found is None or not isinstance(dtype, torch.dtype):
        raise SettingError(f"--input takes a dtype and a shape such as int64[4,2048], found {text!r}")
    return torch.empty([int(size) for size in found[2].split(",")], dtype=dtype, device="meta")
