"""The deepest model and the longest sequence that still fit."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from torch import nn

from lightning_superscale.estimation.memory import Param, byte_classes, kept_on_device
from lightning_superscale.estimation.setup import Setup


def largest_params(
    params: Sequence[Param],
    blocks: Sequence[Sequence[str]],
    saved: Sequence[int],
    setup: Setup,
    *,
    device_left: int,
    host_left: int,
    saved_on_host: int = 0,
) -> int | None:
    """Parameters of the deepest such model that fits, with more or fewer of its repeated blocks.

    Args:
        blocks: names of each block's parameters.
        saved: bytes that each block's forward keeps for backward.
        device_left, host_left: bytes that the model as it is leaves free; negative where it does not fit.
        saved_on_host: bytes of a block's activations in host memory.

    Returns:
        None for a model without blocks.
    """
    if not blocks or not saved:
        return None
    by_name = {param.spec.fqn: param for param in params}
    block = [by_name[fqn] for fqn in max(blocks, key=len)]
    classes = byte_classes(nn.Module(), block, setup)
    kept = sum(kept_on_device(classes).values())
    # Gradients that leave during backward are few where the device holds the most; others are there all the time.
    stay = 0 if setup.streams else sum(row.device_bytes for row in classes if row.name == "gradients")
    on_device = kept + stay + round(statistics.median(saved))
    on_host = sum(row.host_bytes for row in classes) + saved_on_host
    more = min(device_left // on_device if on_device else math.inf, host_left // on_host if on_host else math.inf)
    more = max(more, -len(blocks))
    return sum(param.numel for param in params) + int(more) * sum(param.numel for param in block)


def longest_sequence(lengths: Sequence[int], peaks: Sequence[int], limit: int) -> int:
    """The longest sequence whose peak is at most `limit`.

    Args:
        lengths: s, 4 s, 8 s and 16 s.
        peaks: bytes of the device at these. From 4 s on they are taken to be a polynomial of degree 2, which attention
            is with a matrix of scores and without. Shorter sequences may have their peak at another moment.
    """
    s = lengths[1]
    first, second, third = peaks[1:]
    if peaks[0] <= limit < first:
        return int(lengths[0] + (limit - peaks[0]) / (first - peaks[0]) * (s - lengths[0]))
    # peak(s x) = a + b x + c x^2 at x = 1, 2, 4
    c = (third - 3 * second + 2 * first) / 6
    b = second - first - 3 * c
    a = first - b - c
    if c > 1e-9 * max(1, abs(b)):
        x = (-b + math.sqrt(max(0.0, b * b - 4 * c * (a - limit)))) / (2 * c)
    else:
        x = (limit - a) / b if b > 0 else math.inf
    return 0 if x < 0 else int(min(x * s, 2**40))
