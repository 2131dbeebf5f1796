"""The batch and the loss of a step to trace, from what a caller says or from the model itself."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_superscale.errors import SettingError, SuperScaleError
from lightning_superscale.torch_private import tree_leaves

if TYPE_CHECKING:  # tracing takes time to load, which code that only counts tokens does not need
    from lightning_superscale.estimation.tracing.step import Loss

# A device has more: a smaller number of bytes is one of GiB whose unit was forgotten.
_LEAST_BYTES = 2**20
_UNITS: dict[str, int] = {"": 1, "b": 1} | {
    f"{letter}{middle}b": base**power
    for power, letter in enumerate("kmgt", 1)
    for middle, base in (("", 1000), ("i", 1024))
}


def parse_bytes(value: int | str, key: str) -> int:
    """Bytes of a number, or of a text such as "80GiB" or "24 GB".

    Raises:
        SettingError: names the key and what it takes. So does a number below 2**20 without a unit: it was meant as GiB.
    """
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        if value < _LEAST_BYTES:
            raise SettingError(f'{key} takes bytes where no unit is given, found {value}; did you mean "{value}GiB"?')
        return value
    found = re.fullmatch(r"\s*([\d.]+)\s*([a-zA-Z]*)\s*", value) if isinstance(value, str) else None
    if found is not None and found[2].lower() in _UNITS and re.fullmatch(r"\d+(\.\d+)?", found[1]):
        size = round(float(found[1]) * _UNITS[found[2].lower()])
        if size > 0:
            return size
    raise SettingError(f'{key} takes bytes, or a size with a unit such as "80GiB" or "24GB", found {value!r}')


def batch_for(model: nn.Module, batch_size: int, sequence_length: int) -> Any:
    """A batch of tokens for a Hugging Face model, or the module's own `example_input_array`.

    Raises:
        SuperScaleError: the model says nothing of its inputs; says what to pass.
    """
    if takes_tokens(model):
        tokens = torch.empty(batch_size, sequence_length, dtype=torch.int64, device="meta")
        return {"input_ids": tokens, "labels": tokens}
    example = getattr(model, "example_input_array", None)
    if example is not None:
        return example
    raise SuperScaleError(
        f"{type(model).__name__} does not say what its batches are. Pass batch=, tensors of the right shapes and "
        "dtypes (on the meta device they take no memory), or set example_input_array."
    )


def takes_tokens(model: nn.Module) -> bool:
    """Whether a model has the inputs of Hugging Face's language models."""
    names = inspect.signature(model.forward).parameters
    return "input_ids" in names and "labels" in names and not hasattr(model, "training_step")


def loss_of(model: nn.Module) -> Loss:
    """The loss of a LightningModule's `training_step`, of a Hugging Face model's output, or the sum of an output."""
    return _training_loss if hasattr(model, "training_step") else _output_loss


def _training_loss(module: nn.Module, batch: Any) -> Any:
    step: Any = module.training_step
    takes_index = len(inspect.signature(step).parameters) > 1
    found = step(batch, 0) if takes_index else step(batch)
    return found["loss"] if isinstance(found, Mapping) else found


def _output_loss(module: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        output = module(**batch)
    else:
        output = module(*batch) if isinstance(batch, (tuple, list)) else module(batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is not None:
        return loss
    floating = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return floating[0].float().sum() if floating else output


def count_tokens(batch: Any) -> tuple[int, str]:
    """The size of a batch and its unit: elements of its first integer tensor with two dims, or its samples."""
    tensors = _tensors_in(batch)
    for tensor in tensors:
        if not tensor.is_floating_point() and tensor.ndim > 1:
            return tensor.numel(), "tokens"
    if not tensors:
        return 0, "samples"
    return (tensors[0].shape[0] if tensors[0].ndim else 1), "samples"


def _tensors_in(batch: Any) -> list[Tensor]:
    """The tensors of a batch in order: of lists, mappings, those of Hugging Face's tokenizers too, and dataclasses."""
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        parts = list(batch.values())
    elif is_dataclass(batch) and not isinstance(batch, type):
        parts = [getattr(batch, field.name) for field in fields(batch)]
    else:
        parts = list(batch) if isinstance(batch, (list, tuple)) else []
    return [tensor for part in parts for tensor in _tensors_in(part)]
