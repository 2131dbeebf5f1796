"""Connects the ranks of a strategy, of the Trainer or of Fabric, over the process group that Lightning makes."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lightning_superscale.run.run import Run

if TYPE_CHECKING:
    from lightning.fabric.plugins import ClusterEnvironment


class ConnectedStrategy(Protocol):
    """The members of a strategy that `connect` uses."""

    run: Run

    @property
    def global_rank(self) -> int: ...
    @property
    def num_ranks(self) -> int: ...
    @property
    def root_device(self) -> torch.device: ...
    def broadcast(self, obj: Any, src: int = 0) -> Any: ...


def connect(
    strategy: ConnectedStrategy,
    cluster: ClusterEnvironment,
    make_group: Callable[[], None],
    timeout: timedelta,
    patience: timedelta,
) -> None:
    """Make the process groups of all ranks, which watch each other meanwhile. Every rank calls it.

    Args:
        make_group: makes the process group as Lightning does.
        timeout: how long collectives wait.
        patience: how long a rank may give no sign of life before the others end.

    Raises:
        RankFailure: another rank failed or died meanwhile.
        SuperScaleError: a mesh axis that does not divide the ranks.
    """
    run, environment = strategy.run, strategy.run.environment

    def meeting() -> tuple[str, int]:
        return cluster.main_address, cluster.main_port

    with environment.connecting(meeting, strategy.global_rank, strategy.num_ranks, timeout, patience):
        make_group()
        environment.open(
            run.zero,
            run.sequence,
            cluster.main_address,
            strategy.broadcast,
            timeout,
            strategy.root_device.type,
            patience,
        )
