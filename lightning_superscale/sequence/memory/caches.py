"""Models of transformers without their caches of keys and values, which every layer adds to when it runs.

A block that is computed again in backward would add its keys and values a second time, and attend to both. transformers
leaves the cache out for its own gradient checkpointing; here too it is left out, in steps that train.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def without_caches(module: nn.Module) -> Iterator[None]:
    """While open, models whose config has `use_cache` make no cache, unless a call asks for one."""
    configs: dict[int, Any] = {}
    for part in module.modules():
        config: Any = getattr(part, "config", None)
        if getattr(config, "use_cache", None) is True:
            configs[id(config)] = config
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs.values():
            config.use_cache = True
