"""Models of transformers without their caches of keys and values, which every layer adds to when it runs.

A block that is computed again in backward would add its keys and values a second time, and attend to both. transformers
leaves the cache out for its own gradient checkpointing; here too it is left out, in steps that train.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


def configs_with_caches(module: nn.Module) -> list[Any]:
    """The configs of a module's models that say whether they make caches, each once."""
    found = {id(config): config for part in module.modules() if (config := getattr(part, "config", None)) is not None}
    return [config for config in found.values() if hasattr(config, "use_cache")]


@contextmanager
def without_caches(configs: Sequence[Any]) -> Iterator[None]:
    """While open, models with these configs make no cache, unless a call asks for one."""
    changed = [config for config in configs if config.use_cache is True]
    for config in changed:
        config.use_cache = False
    try:
        yield
    finally:
        for config in changed:
            config.use_cache = True
