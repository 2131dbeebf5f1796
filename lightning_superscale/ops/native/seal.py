"""Tells whole libraries from broken ones before they are loaded: mapping a file that was cut short ends the process.

A library in a build cache ends with a checksum of what comes before it, which loaders of ELF files ignore. One that an
installer wrote has none; of it, only the length that its own headers ask for is checked.
"""

from __future__ import annotations

import hashlib
import struct

_MARK = b"\0lss-sha256:"
_SEAL_BYTES = len(_MARK) + 32
_ELF64_LITTLE = b"\x7fELF\x02\x01"


def sealed(library: bytes) -> bytes:
    """A library with its checksum behind it."""
    return library + _MARK + hashlib.sha256(library).digest()


def why_seal_broken(content: bytes) -> str | None:
    """Why a sealed library can't be trusted; None if it is whole."""
    library, seal = content[:-_SEAL_BYTES], content[-_SEAL_BYTES:]
    if not seal.startswith(_MARK):
        return "it does not end with its checksum: it is cut short, or an earlier version built it"
    if seal[len(_MARK) :] != hashlib.sha256(library).digest():
        return "it is damaged: its content does not match its checksum"
    return None


def why_cut_short(content: bytes) -> str | None:
    """Why a library can't be mapped: an ELF file that ends before its segments do; None if it does not."""
    if not content.startswith(_ELF64_LITTLE):
        return None  # the loader has words of its own for what is no ELF file of this machine
    try:
        (offset,) = struct.unpack_from("<Q", content, 0x20)
        size, number = struct.unpack_from("<HH", content, 0x36)
        segments = [struct.unpack_from("<QQQQ", content, offset + index * size + 8) for index in range(number)]
    except struct.error:
        return "it is cut short within its headers"
    end = max((start + length for start, _, _, length in segments), default=0)
    return None if end <= len(content) else f"it is cut short: its segments need {end} bytes, found {len(content)}"
