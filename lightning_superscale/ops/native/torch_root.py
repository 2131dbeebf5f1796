"""torch's own square root, lent to the native kernel where it is not IEEE 754's ([Note: Square root])."""

from __future__ import annotations

import ctypes
import warnings
from pathlib import Path
from typing import Any

import torch

# ATen/cpu/vml.h: high accuracy, denormals kept, errors ignored.
_VML_HA, _VML_FTZDAZ_OFF, _VML_ERRMODE_IGNORE = 0x2, 0x00140000, 0x100
VML_MODE = _VML_HA | _VML_FTZDAZ_OFF | _VML_ERRMODE_IGNORE


def _probe() -> torch.Tensor:
    """About 65536 positive fp32 numbers of every exponent, the same at each call."""
    bits = torch.arange(0, 0x7F800000, 0x7F800000 // 65536, dtype=torch.int64)
    return (bits + (bits * 2654435761 % 4096)).clamp(max=0x7F7FFFFF).to(torch.int32).view(torch.float32)


def is_ieee() -> bool:
    """Whether torch's CPU square root is correctly rounded, as far as a probe of every exponent tells."""
    x = _probe()
    return torch.equal(x.sqrt(), x.double().sqrt().float())


def install(lib: ctypes.CDLL) -> str:
    """Lend torch's root to the library if it needs it; returns in words the root that updates will take.

    Warns once when torch's root is neither IEEE's nor to be found: updates then differ from plain
    AdamW's in the last bit of some parameters.
    """
    if is_ieee():
        return "IEEE, as torch's"
    found = _find()
    if found is None:
        warnings.warn(
            "torch's CPU square root is not correctly rounded here, and the function behind it was not found in "
            "libtorch_cpu; optimizer steps take the correctly rounded root, so some parameters differ from plain "
            "AdamW's in their last bit.",
            stacklevel=2,
        )
        return "IEEE, torch's differs"
    lib.lss_install_root.restype = None
    lib.lss_install_root.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
    root, set_threads = (None if f is None else ctypes.cast(f, ctypes.c_void_p) for f in found)
    lib.lss_install_root(root, VML_MODE, set_threads)
    return "torch's own (MKL)"


def _find() -> tuple[Any, Any | None] | None:
    """MKL's vmsSqrt inside libtorch_cpu, if it is there and gives torch's bits, and its thread-count setter."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        function = library.vmsSqrt
    except (OSError, AttributeError):
        return None
    function.restype = None
    function.argtypes = (ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    x = _probe()
    root = torch.empty_like(x)
    function(x.numel(), x.data_ptr(), root.data_ptr(), VML_MODE)
    if not torch.equal(root, x.sqrt()):
        return None
    return function, getattr(library, "MKL_Set_Num_Threads_Local", None)
