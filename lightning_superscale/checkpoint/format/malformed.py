"""Content that no writer of ours made: JSON that is none, and structures that raise whatever Python raises of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_superscale.errors import CheckpointError, SuperScaleError

# What indexing, converting and walking through a structure of another shape than expected raises. A RuntimeError is
# torch's word for a tensor that has no values, no shape or no storage, and Python's for brackets without end.
_RAISED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)


@contextmanager
def malformed_as_error(what: str) -> Iterator[None]:
    """A context in which what malformed content raises becomes a CheckpointError that begins with `what`."""
    try:
        yield
    except SuperScaleError:
        raise
    except _RAISED as error:
        raise CheckpointError(f"{what}: {type(error).__name__}: {str(error)[:300]}.") from error


def parse(data: bytes | str, where: str) -> Any:
    """A value from JSON text; numbers are finite, as JSON has no others.

    Raises:
        CheckpointError: it is no JSON; `where` names the file.
    """
    with malformed_as_error(f"{where} is no JSON"):
        return json.loads(data, parse_constant=_no_number, parse_float=_finite)


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is no finite number")
    return number
