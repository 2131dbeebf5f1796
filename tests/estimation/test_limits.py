"""The deepest model and the longest sequence that fit."""

from __future__ import annotations

import pytest

from lightning_superscale.estimation.limits import longest_sequence


@pytest.mark.parametrize("coefficients", [(100, 3, 0), (100, 3, 0.25), (0, 7, 0), (50, 0, 0.5)])
@pytest.mark.parametrize("limit", [5_000, 1_000_000])
def test_a_sequence_is_the_longest_whose_peak_fits(coefficients, limit):
    a, b, c = coefficients

    def peak(length: float) -> float:
        return a + b * length + c * length**2

    found = longest_sequence([4, 16, 32, 64], [round(peak(length)) for length in (4, 16, 32, 64)], limit)
    assert peak(found) <= limit * 1.001
    assert peak(found + 1) > limit * 0.999


def test_no_sequence_fits_where_weights_do_not():
    assert longest_sequence([4, 16, 32, 64], [125, 200, 300, 500], 50) == 0


def test_a_short_sequence_may_have_its_peak_at_another_moment():
    assert longest_sequence([4, 16, 32, 64], [1000, 1000, 1160, 1480], 2000) == 116
    assert 4 < longest_sequence([4, 16, 32, 64], [1000, 1120, 1280, 1600], 1060) < 16
