"""Checks of single values, with the errors that every config gives."""

from __future__ import annotations

from lightning_superscale.errors import SuperScaleError


def check_positive_int(owner: str, key: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SuperScaleError(f"{owner}.{key} must be a whole number of at least 1, found {value!r}.")


def check_share(owner: str, key: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
        raise SuperScaleError(f"{owner}.{key} must be a number from 0 to 1 or 'auto', found {value!r}.")
