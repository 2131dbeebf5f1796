"""The strategy in workers of Ray Train: `from lightning_superscale.plugins.ray_train import RaySuperScaleStrategy`.

Ray starts the workers, makes their process group and says which device is whose; the Trainer in each sees one device
and one node. So ranks are counted as Ray counts them. All else is SuperScaleStrategy.
"""

from __future__ import annotations

import ray.train
from ray.train.lightning import RayDDPStrategy

from lightning_superscale.plugins.pytorch import SuperScaleStrategy


class RaySuperScaleStrategy(SuperScaleStrategy, RayDDPStrategy):
    """SuperScaleStrategy for `ray.train.torch.TorchTrainer`; takes the same arguments.

    It is a RayDDPStrategy, as `ray.train.lightning.prepare_trainer` demands. Pass it with
    `plugins=[RayLightningEnvironment()]` and `devices="auto"`; `process_group_backend` and `timeout` of the process
    group are those of Ray's TorchConfig, and `num_workers` of its ScalingConfig is the number of ranks.
    """

    @property
    def num_ranks(self) -> int:
        """The number of Ray's workers; one outside of them."""
        return int(ray.train.get_context().get_world_size() or 1)
