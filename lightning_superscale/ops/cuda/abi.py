"""ctypes mirror of `csrc/include/lss_cuda.h`, and the search for `liblss_cuda.so`.

Nothing here initialises CUDA on import.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_uint8, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_superscale.ops.native import loader
from lightning_superscale.ops.types import AdamWHyper

ABI_VERSION = 1
LIBRARY_NAME = "liblss_cuda.so"
LIBRARY_ENV = "LSS_CUDA_LIB"

DTYPE_CODES: dict[torch.dtype | None, int] = {None: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
COMMIT, PEEK, COMMIT_PEEK = 0, 1, 2
_DECOUPLED_DECAY, _L2, _CLIP, _MAXIMIZE = 1, 2, 4, 8


class Hyper(ctypes.Structure):
    _fields_ = [
        ("weight_decay_factor", c_float),
        ("l2", c_float),
        ("lerp_weight", c_float),
        ("beta2", c_float),
        ("one_minus_beta2", c_float),
        ("bias_correction2_sqrt", c_float),
        ("eps", c_float),
        ("neg_step_size", c_float),
        ("grad_scale", c_float),
        ("clip_value", c_float),
        ("flags", c_uint32),
    ]


class Segment(ctypes.Structure):
    _fields_ = [
        ("param", c_void_p),
        ("exp_avg", c_void_p),
        ("exp_avg_sq", c_void_p),
        ("grad", c_void_p),
        ("weight_out", c_void_p),
        ("next_grad", c_void_p),
        ("numel", c_int64),
        ("exp_avg_dtype", c_uint8),
        ("exp_avg_sq_dtype", c_uint8),
        ("grad_dtype", c_uint8),
        ("weight_out_dtype", c_uint8),
        ("next_grad_dtype", c_uint8),
        ("reserved", c_uint8 * 3),
        ("hyper", Hyper),
        ("next_hyper", Hyper),
    ]


class GradStatsStruct(ctypes.Structure):
    _fields_ = [("sumsq", c_double), ("nonfinite", c_int64)]


class StatsOut(ctypes.Structure):
    _fields_ = [
        ("block_sums", c_void_p),
        ("block_nonfinite", c_void_p),
        ("stats", c_void_p),
        ("num_blocks", c_int64),
    ]


class Call(ctypes.Structure):
    _fields_ = [
        ("segments", POINTER(Segment)),
        ("num_segments", c_int64),
        ("mode", c_int32),
        ("device", c_int32),
        ("grad_scale", c_void_p),
        ("next_grad_scale", c_void_p),
        ("skip", c_void_p),
        ("stats_out", StatsOut),
    ]


class TensorStruct(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("numel", c_int64), ("dtype", c_int32), ("reserved", c_int32)]


_SIZES: dict[str, type[ctypes.Structure]] = {
    "lss_cuda_sizeof_adamw_hyper": Hyper,
    "lss_cuda_sizeof_adamw_segment": Segment,
    "lss_cuda_sizeof_adamw_call": Call,
    "lss_cuda_sizeof_grad_stats": GradStatsStruct,
    "lss_cuda_sizeof_stats_out": StatsOut,
    "lss_cuda_sizeof_tensor": TensorStruct,
}


@functools.lru_cache(maxsize=256)
def to_struct(hyper: AdamWHyper) -> Hyper:
    """The kernel's coefficients; ctypes rounds each double to fp32, once. The result is shared: do not modify it."""
    s = hyper.scalars()
    flags = _MAXIMIZE if hyper.maximize else 0
    if hyper.weight_decay != 0:
        flags |= _DECOUPLED_DECAY if hyper.decoupled else _L2
    if hyper.clip_value is not None:
        flags |= _CLIP
    return Hyper(*s, hyper.grad_scale, hyper.clip_value or 0.0, flags)


@dataclass(frozen=True)
class CudaLibrary:
    """A loaded library whose ABI was checked.

    Attributes:
        path: the file it came from.
        dll: its functions, with their C signatures set.
        device_type: type of the devices whose tensors its kernels can reach; other than "cuda" only in tests.
    """

    path: Path
    dll: ctypes.CDLL
    device_type: str = "cuda"

    def check(self, error: int, where: str) -> None:
        """Raise RuntimeError for a CUDA error code other than 0."""
        if error:
            text = self.dll.lss_cuda_error_string(error).decode()
            raise RuntimeError(f"{where}: CUDA error {error} ({text}) from {self.path}")

    def stream_of(self, device: torch.device) -> int:
        """The current stream's handle on `device`."""
        return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def open_library(path: Path, device_type: str = "cuda") -> CudaLibrary:
    """Load the library at `path` and check its ABI.

    Raises:
        OSError: the file is no loadable library.
        RuntimeError: the library was built for another version of this package.
    """
    dll = loader.open_library(path)
    try:
        dll.lss_cuda_abi_version.restype = c_int32
        found = dll.lss_cuda_abi_version()
        if found != ABI_VERSION:
            raise RuntimeError(
                f"{path}: expected ABI version {ABI_VERSION}, found {found}; "
                "rebuild the native libraries of this version"
            )
        for name, struct in _SIZES.items():
            function = getattr(dll, name)
            function.restype = c_uint64
            if function() != ctypes.sizeof(struct):
                raise RuntimeError(
                    f"{path}: expected {name}() = {ctypes.sizeof(struct)}, found {function()}; "
                    "rebuild the native libraries of this version"
                )
        dll.lss_cuda_error_string.restype = c_char_p
        dll.lss_cuda_error_string.argtypes = [c_int]
        dll.lss_cuda_adamw.argtypes = [POINTER(Call), c_void_p]
        dll.lss_cuda_sumsq.argtypes = [POINTER(TensorStruct), c_int64, c_float, POINTER(StatsOut), c_int32, c_void_p]
        dll.lss_cuda_count_nonfinite.argtypes = [POINTER(TensorStruct), c_int64, c_void_p, c_int32, c_void_p]
    except AttributeError as error:
        raise RuntimeError(f"{path}: {error}; this is not a {LIBRARY_NAME} of this version") from error
    return CudaLibrary(path, dll, device_type)


def candidate_paths(search: Sequence[str] | None = None) -> list[Path]:
    """Paths at which the library may be, best first.

    The environment variable, if set, is the only candidate. Otherwise the library may be wherever the CPU
    library may be; `search` replaces `sys.path` and site-packages there.
    """
    override = os.environ.get(LIBRARY_ENV)
    if override:
        return [Path(override)]
    return list(loader.library_candidates(LIBRARY_NAME, search))
