"""Errors that users meet; each message says what was expected, what was found, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SuperScaleError(RuntimeError):
    """A setting, a model or a state that lightning-superscale can't train with."""


class SettingError(SuperScaleError, ValueError):
    """A value that a setting does not take; names the key, what was expected and what was found."""


class CheckpointError(SuperScaleError):
    """A checkpoint that can't be written, or whose content can't be trusted or does not fit; names file and tensor."""


class SequenceParallelError(SuperScaleError):
    """A model or a batch whose sequences can't be shared among ranks; names the operation, its shapes and its line."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A hint such as `; did you mean 'cpu'?`, or an empty string when no choice is close."""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
