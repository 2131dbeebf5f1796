"""What became of one key of another strategy's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Outcome = Literal["became", "left", "same", "none", "retired", "unknown"]

# In the order in which they are shown.
HEADINGS: dict[Outcome, str] = {
    "became": "Became",
    "left": "Left to the Trainer, the DataLoader or the module",
    "same": "Nothing needed: so by default, or no question here",
    "none": "No counterpart",
    "retired": "Retired by DeepSpeed too",
    "unknown": "Unknown, or not a value that the key takes",
}


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of a key, whatever its value.

    Attributes:
        outcome: the group that the key is shown in.
        text: what it became, or why there is nothing and what to do.
    """

    outcome: Outcome
    text: str


@dataclass(frozen=True, slots=True)
class Row:
    """One key as it was found, and what became of it.

    Attributes:
        key: dotted path of the key in the configuration.
        value: value that it had.
        fate: what became of it.
    """

    key: str
    value: Any
    fate: Fate


def became(text: str) -> Fate:
    """The fate of a key that is part of what is printed."""
    return Fate("became", text)


def same(text: str) -> Fate:
    """The fate of a key that asks for what is done anyway."""
    return Fate("same", text)


def none(text: str) -> Fate:
    """The fate of a key without a counterpart; the text says what to do."""
    return Fate("none", text)


def retired(text: str) -> Fate:
    """The fate of a key that newer releases of DeepSpeed refuse too."""
    return Fate("retired", text)


def left(text: str) -> Fate:
    """The fate of a value that somebody else has to say."""
    return Fate("left", text)
