"""Checks of single values of configs, with errors that name the config and the key."""

from __future__ import annotations

from lightning_superscale.errors import SuperScaleError


def check_positive_int(owner: str, key: str, value: object) -> None:
    """Raise a SuperScaleError unless a value is an int, and no bool, of at least 1.

    Args:
        owner: name of the config's class, for the message.
        key: name of the field, for the message.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SuperScaleError(f"{owner}.{key} must be a whole number of at least 1, found {value!r}.")


def check_share(owner: str, key: str, value: object) -> None:
    """Raise a SuperScaleError unless a value is a number, and no bool, from 0 to 1.

    Args:
        owner: name of the config's class, for the message.
        key: name of the field, for the message.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
        raise SuperScaleError(f"{owner}.{key} must be a number from 0 to 1 or 'auto', found {value!r}.")
