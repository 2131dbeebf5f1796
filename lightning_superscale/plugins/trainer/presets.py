"""Defaults-only variants of the strategy: the same class with another default, under a name of its own."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Literal, Union

import torch

from lightning_superscale.config import CheckpointConfig, OffloadConfig, ZeroConfig
from lightning_superscale.plugins.trainer.strategy import SuperScaleStrategyMixin
from lightning_superscale.run.environment import DEFAULT_TIMEOUT

if TYPE_CHECKING:
    from lightning.fabric.plugins import ClusterEnvironment
    from lightning.pytorch.accelerators import Accelerator
    from lightning.pytorch.plugins import CheckpointIO, Precision


class SuperOffloadStrategyMixin(SuperScaleStrategyMixin):
    """Master weights, optimizer states and the optimizer step in host memory; the device keeps weights.

    On several ranks, masters, states and gradients are sharded (zero=2), so that no step is done twice.

    Args: as SuperScaleStrategy's.
    """

    def __init__(
        self,
        zero: Union[int, ZeroConfig] = 2,
        offload: Union[Literal["cpu", "superoffload"], OffloadConfig, None] = "superoffload",
        error_if_nonfinite: bool = False,
        checkpoint: Union[CheckpointConfig, None] = None,
        accelerator: Union[Accelerator, None] = None,
        parallel_devices: Union[list[torch.device], None] = None,
        cluster_environment: Union[ClusterEnvironment, None] = None,
        checkpoint_io: Union[CheckpointIO, None] = None,
        precision_plugin: Union[Precision, None] = None,
        process_group_backend: Union[str, None] = None,
        timeout: timedelta = DEFAULT_TIMEOUT,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        super().__init__(
            zero=zero,
            offload=offload,
            error_if_nonfinite=error_if_nonfinite,
            checkpoint=checkpoint,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )


class ZeroStrategyMixin(SuperScaleStrategyMixin):
    """Optimizer states, gradients and weights sharded over ranks (ZeRO), everything on the device.

    Args: as SuperScaleStrategy's.
    """

    def __init__(
        self,
        zero: Union[int, ZeroConfig] = 3,
        offload: Union[Literal["cpu", "superoffload"], OffloadConfig, None] = None,
        error_if_nonfinite: bool = False,
        checkpoint: Union[CheckpointConfig, None] = None,
        accelerator: Union[Accelerator, None] = None,
        parallel_devices: Union[list[torch.device], None] = None,
        cluster_environment: Union[ClusterEnvironment, None] = None,
        checkpoint_io: Union[CheckpointIO, None] = None,
        precision_plugin: Union[Precision, None] = None,
        process_group_backend: Union[str, None] = None,
        timeout: timedelta = DEFAULT_TIMEOUT,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        super().__init__(
            zero=zero,
            offload=offload,
            error_if_nonfinite=error_if_nonfinite,
            checkpoint=checkpoint,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
