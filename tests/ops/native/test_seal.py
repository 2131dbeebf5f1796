"""A library that was cut short or changed is told from a whole one without loading it."""

from __future__ import annotations

import pytest

from lightning_superscale.ops.native.loader import library_candidates
from lightning_superscale.ops.native.seal import sealed, why_cut_short, why_seal_broken
from tests.ops.paths import NATIVE

CONTENT = bytes(range(256)) * 40


def test_a_sealed_library_is_whole():
    assert why_seal_broken(sealed(CONTENT)) is None


def test_every_length_but_the_whole_is_told():
    whole = sealed(CONTENT)
    for length in [0, 1, 42, 43, 44, *range(len(whole) - 60, len(whole))]:
        assert "cut short" in why_seal_broken(whole[:length])
    assert why_seal_broken(whole + b"\0") is not None
    assert "cut short, or an earlier version built it" in why_seal_broken(CONTENT)


def test_every_changed_byte_is_told():
    whole = sealed(CONTENT)
    for place in [*range(0, len(whole), 97), *range(len(whole) - 45, len(whole))]:
        changed = bytearray(whole)
        changed[place] ^= 1
        assert why_seal_broken(bytes(changed)) is not None


@pytest.mark.skipif(not NATIVE, reason="no native library")
def test_a_library_of_an_installer_is_measured_by_its_own_headers():
    library = next(library_candidates()).read_bytes()
    assert why_cut_short(library) is None
    for length in (10, 30, 70, 200, 4096, len(library) // 2):
        assert "cut short" in why_cut_short(library[:length]), length
    assert why_cut_short(b"no library") is None
