"""Finds and loads the native CPU library, and turns its status codes into exceptions.

Environment:
    LSS_REQUIRE_NATIVE=1: an error instead of a warning when there is no usable library.
    LSS_NATIVE=0: use the PyTorch fallback although there is a library (for comparison).
    LSS_ISA: the instruction set to use; see csrc/include/lss.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import site
import sys
import warnings
from collections.abc import Iterator, Sequence
from ctypes import POINTER, c_char_p, c_double, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path

import torch

from lightning_superscale.ops.native import build, seal, torch_root
from lightning_superscale.ops.native.own_files import own_file

ABI_VERSION = 5
_PLACE = Path("lightning_superscale", "ops", "native", "_native")

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NO_DTYPE = 3
AS_TORCH, NEAREST, STOCHASTIC = 0, 1, 2

NO_CUDA = -7
_ERRORS: dict[int, type[Exception]] = {-1: ValueError, -2: MemoryError, -3: ValueError}


class AdamWHyperStruct(ctypes.Structure):
    """`lss_adamw_hyper`."""

    _fields_ = (
        ("weight_decay_factor", c_double),
        ("l2", c_double),
        ("lerp_weight", c_double),
        ("beta2", c_double),
        ("one_minus_beta2", c_double),
        ("bias_correction2_sqrt", c_double),
        ("eps", c_double),
        ("neg_step_size", c_double),
        ("grad_scale", c_double),
        ("clip_value", c_double),
        ("has_l2", c_int32),
        ("has_clip", c_int32),
        ("maximize", c_int32),
        ("installed_root", c_int32),
        ("step", c_int64),
    )


class AdamWSegmentStruct(ctypes.Structure):
    """`lss_adamw_segment`."""

    _fields_ = (
        ("param", c_void_p),
        ("exp_avg", c_void_p),
        ("exp_avg_sq", c_void_p),
        ("grad", c_void_p),
        ("next_grad", c_void_p),
        ("weight_out", c_void_p),
        ("numel", c_int64),
        ("exp_avg_dtype", c_int32),
        ("exp_avg_sq_dtype", c_int32),
        ("grad_dtype", c_int32),
        ("next_grad_dtype", c_int32),
        ("weight_out_dtype", c_int32),
        ("param_dtype", c_int32),
        ("compensation", c_void_p),
        ("key", c_uint64),
        ("first_element", c_int64),
        ("rounding", c_int32),
        ("is_compact", c_int32),
        ("rows", c_void_p),
        ("row_numel", c_int64),
        ("row_stride", c_int64),
        ("hyper", AdamWHyperStruct),
        ("next_hyper", AdamWHyperStruct),
        ("sumsq", c_double),
        ("nonfinite", c_int64),
    )


class SubmitStruct(ctypes.Structure):
    """`lss_submit`."""

    _fields_ = (("priority", c_int32), ("held", c_int32))


_HOW = (POINTER(SubmitStruct), POINTER(c_void_p))  # the last two arguments of every op
_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "lss_abi_version": (c_int32, ()),
    "lss_sizeof_adamw_hyper": (c_size_t, ()),
    "lss_sizeof_adamw_segment": (c_size_t, ()),
    "lss_last_error": (c_char_p, ()),
    "lss_isa_name": (c_char_p, ()),
    "lss_isa_supported": (c_char_p, ()),
    "lss_isa_set": (c_int32, (c_char_p,)),
    "lss_pool_create": (c_int32, (c_int32, POINTER(c_int32), c_int32, POINTER(c_void_p))),
    "lss_pool_num_threads": (c_int32, (c_void_p,)),
    "lss_pool_drain": (c_int32, (c_void_p,)),
    "lss_pool_destroy": (c_int32, (c_void_p,)),
    "lss_ticket_create": (c_int32, (c_void_p, POINTER(c_void_p))),
    "lss_ticket_release": (c_int32, (c_void_p,)),
    "lss_ticket_cancel": (c_int32, (c_void_p,)),
    "lss_ticket_done": (c_int32, (c_void_p,)),
    "lss_ticket_wait": (c_int32, (c_void_p,)),
    "lss_ticket_free": (None, (c_void_p,)),
    "lss_ticket_ref": (None, (c_void_p,)),
    "lss_notify": (None, (c_void_p,)),
    "lss_adamw": (c_int32, (c_void_p, c_int32, POINTER(AdamWSegmentStruct), c_int64, c_int32, *_HOW)),
    "lss_sumsq": (c_int32, (c_void_p, c_void_p, c_int32, c_int64, POINTER(c_double), *_HOW)),
    "lss_count_nonfinite": (c_int32, (c_void_p, c_void_p, c_int32, c_int64, POINTER(c_int64), *_HOW)),
    "lss_cast_scale": (c_int32, (c_void_p, c_void_p, c_int32, c_void_p, c_int32, c_int64, c_double, *_HOW)),
    "lss_accumulate": (c_int32, (c_void_p, c_void_p, c_int32, c_void_p, c_int32, c_int64, c_double, *_HOW)),
    "lss_rows_gather": (c_int32, (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, *_HOW)),
    "lss_rows_scatter": (c_int32, (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, *_HOW)),
    "lss_cols_gather": (
        c_int32,
        (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int32, *_HOW),
    ),
    "lss_cols_scatter": (
        c_int32,
        (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int32, *_HOW),
    ),
    "lss_colnorm": (c_int32, (c_void_p, c_void_p, c_int32, c_int64, c_int64, c_void_p, *_HOW)),
    "lss_copy": (c_int32, (c_void_p, c_void_p, c_void_p, c_int64, *_HOW)),
    "lss_bench_roof": (None, (c_void_p, c_void_p, c_void_p, c_void_p, c_int64)),
    "lss_mem_alloc": (c_int32, (c_size_t, c_int32, c_int32, c_void_p, POINTER(c_void_p))),
    "lss_mem_free": (c_int32, (c_void_p, c_size_t)),
    "lss_cu_device_count": (c_int32, (POINTER(c_int32),)),
    "lss_cu_pin": (c_int32, (c_int32, c_void_p, c_size_t)),
    "lss_cu_unpin": (c_int32, (c_int32, c_void_p)),
    "lss_cu_d2h_batch": (
        c_int32,
        (c_int32, c_void_p, POINTER(c_void_p), POINTER(c_uint64), POINTER(c_size_t), c_int64),
    ),
    "lss_cu_h2d_batch": (
        c_int32,
        (c_int32, c_void_p, POINTER(c_uint64), POINTER(c_void_p), POINTER(c_size_t), c_int64),
    ),
    "lss_cu_event_record": (c_int32, (c_int32, c_void_p, c_void_p)),
    "lss_cu_stream_wait_event": (c_int32, (c_int32, c_void_p, c_void_p)),
    "lss_cu_launch_notify": (c_int32, (c_int32, c_void_p, c_void_p)),
}


def library_candidates(name: str = build.LIBRARY_NAME, search: Sequence[str] | None = None) -> Iterator[Path]:
    """Existing files that may be the library, best first.

    They are searched for in the build cache of exactly these sources, beside the package, and in site-packages,
    where an editable install puts it.

    Args:
        search: folders to search in place of `sys.path` and site-packages.
    """
    root = build.source_root()
    places = build.cache_dirs(root) if root is not None else []
    places.append(Path(__file__).resolve().parent / "_native")
    bases = (*sys.path, *site.getsitepackages(), site.getusersitepackages()) if search is None else search
    places += [Path(base) / _PLACE for base in bases if base]
    for path in dict.fromkeys(place / name for place in places):
        if os.path.isfile(path):  # False, where Path.is_file raises, for a folder that can't be read
            yield path


# Descriptors of libraries that were loaded through them; closed ones would give their numbers to other libraries.
_held_open: list[int] = []


def open_library(path: Path) -> ctypes.CDLL:
    """Map one library of `library_candidates`, if it is whole and, in a build cache, this user's.

    Raises:
        OSError: it can't be trusted or mapped; says why.
    """
    root = build.source_root()
    if root is None or path.parent not in build.cache_dirs(root):
        reason = seal.why_cut_short(path.read_bytes())
        if reason is not None:
            raise OSError(reason)
        return ctypes.CDLL(str(path))
    with own_file(path) as descriptor:
        with os.fdopen(os.dup(descriptor), "rb") as file:
            reason = seal.why_seal_broken(file.read())
        if reason is not None:
            raise OSError(f"{reason}. Build it again")
        held = os.dup(descriptor)
    by_descriptor = f"/proc/self/fd/{held}"
    if not os.path.exists(by_descriptor):
        os.close(held)
        return ctypes.CDLL(str(path))
    _held_open.append(held)
    return ctypes.CDLL(by_descriptor)  # the file that was checked, whatever lies at its path by now


def _opened(path: Path) -> ctypes.CDLL:
    """Load one library and check that it speaks this package's ABI."""
    lib = open_library(path)
    found = lib.lss_abi_version()
    if found != ABI_VERSION:
        raise OSError(f"expected ABI version {ABI_VERSION}, found {found}")
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype = result
        function.argtypes = arguments
    for struct, size in (
        (AdamWHyperStruct, lib.lss_sizeof_adamw_hyper()),
        (AdamWSegmentStruct, lib.lss_sizeof_adamw_segment()),
    ):
        if size != ctypes.sizeof(struct):
            raise OSError(f"expected {struct.__doc__} of {ctypes.sizeof(struct)} bytes, found {size}")
    return lib


def _load() -> ctypes.CDLL | None:
    required = os.environ.get("LSS_REQUIRE_NATIVE") == "1"
    if os.environ.get("LSS_NATIVE") == "0" and not required:
        return None
    refused = []
    for path in library_candidates():
        try:
            lib = _opened(path)
        except (OSError, AttributeError) as error:
            refused.append(f"{path}: {error}")
            continue
        if lib.lss_isa_name() is None:
            raise RuntimeError(lib.lss_last_error().decode())
        if refused:
            warnings.warn(f"The native CPU library is taken from {path}, because {'; '.join(refused)}", stacklevel=2)
        torch_root.install(lib)
        return lib
    remedy = (
        "run `python -m lightning_superscale.ops.native.build`"
        if build.source_root() is not None
        else "install a C++17 compiler and reinstall lightning-superscale with LSS_REQUIRE_NATIVE=1 to see why"
    )
    found = "; ".join(refused) if refused else "none"
    if required:
        raise RuntimeError(
            f"LSS_REQUIRE_NATIVE=1 expects the native library {build.LIBRARY_NAME}, found {found}; {remedy}"
        )
    warnings.warn(
        f"The native CPU library {build.LIBRARY_NAME} was not found (found {found}), so CPU optimizer steps use slower "
        f"PyTorch code with the same results. To build it, {remedy}.",
        stacklevel=2,
    )
    return None


class _Loaded:
    """The process's one native library; `disabled` counts the nested `without_native()`."""

    lib: ctypes.CDLL | None = None
    tried = False
    disabled = 0


def native() -> ctypes.CDLL | None:
    """The native library, loaded at the first call; None where the PyTorch fallback is to be used."""
    if not _Loaded.tried:
        _Loaded.lib = _load()
        _Loaded.tried = True
    return None if _Loaded.disabled else _Loaded.lib


def native_or_raise(what: str) -> ctypes.CDLL:
    """The native library.

    Raises:
        RuntimeError: it is not loaded; names `what`, the function that needs it.
    """
    lib = native()
    if lib is None:
        raise RuntimeError(f"{what} needs the native library, which is not loaded: see the warning at its first use")
    return lib


@contextlib.contextmanager
def without_native() -> Iterator[None]:
    """A context in which every op of the process takes its PyTorch fallback, for tests and comparisons."""
    _Loaded.disabled += 1
    try:
        yield
    finally:
        _Loaded.disabled -= 1


def check(lib: ctypes.CDLL, status: int) -> None:
    """Raise the exception that a native status stands for; 0 is success."""
    if status != 0:
        raise _ERRORS.get(status, RuntimeError)(lib.lss_last_error().decode())


def isa_name() -> str | None:
    """The instruction set in use, or None without the native library."""
    lib = native()
    if lib is None:
        return None
    name: bytes = lib.lss_isa_name()
    return name.decode()


def supported_isas() -> tuple[str, ...]:
    """Instruction sets that this processor can use, best first; empty without the native library."""
    lib = native()
    if lib is None:
        return ()
    names: bytes = lib.lss_isa_supported()
    return tuple(names.decode().split(","))


def set_isa(name: str) -> None:
    """Use another instruction set from the next op on. The results do not change by a bit."""
    lib = native_or_raise("set_isa")
    check(lib, lib.lss_isa_set(name.encode()))
