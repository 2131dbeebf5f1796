"""Names of dtypes in files, which are those of safetensors."""

from __future__ import annotations

import torch

from lightning_superscale.errors import CheckpointError

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def dtype_name(dtype: torch.dtype, where: object) -> str:
    """The name of a dtype in files.

    Args:
        where: the tensor of that dtype, for the message.

    Raises:
        CheckpointError: safetensors has no such dtype.
    """
    if dtype not in _NAMES:
        raise CheckpointError(
            f"{where} has dtype {dtype}, which safetensors can't hold. Convert it, or keep it out of the state; "
            f"dtypes that can be saved: {', '.join(sorted(str(d) for d in _NAMES))}."
        )
    return _NAMES[dtype]


def dtype_of(name: str, where: object) -> torch.dtype:
    """The dtype of a name in a file.

    Args:
        where: the tensor of that dtype, for the message.

    Raises:
        CheckpointError: no dtype has that name.
    """
    if name not in _DTYPES:
        raise CheckpointError(f"{where} has dtype {name!r}, which this version does not know.")
    return _DTYPES[name]
