"""What Ray Train's workers run, and a cluster of one machine that they run in."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def train(config: dict[str, Any]) -> None:
    """A user's `train_loop_per_worker`: goes on from the last checkpoint of its folder, on all workers."""
    import lightning
    import ray.train
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from ray.train.lightning import RayLightningEnvironment, prepare_trainer

    import lightning_superscale as lss
    from lightning_superscale.plugins.ray_train import RaySuperScaleStrategy
    from tests.soak.model import Loader, Soaked
    from tests.soak.ranks import Leg

    torch.set_num_threads(1)
    context, folder = ray.train.get_context(), Path(config["folder"])
    leg = Leg(0, "fp32", "", context.get_world_size(), False, 0, 20, str(folder), str(folder / "checkpoints"), 0)
    module = Soaked(leg, context.get_world_rank(), lambda step: None)
    dies = folder / "died"
    if config.get("dies") and context.get_world_rank() == 1 and not dies.exists():

        def die() -> None:
            if module.global_step == 12:
                dies.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        module.on_train_batch_start = lambda batch, batch_idx: die()
    trainer = lightning.Trainer(
        strategy=RaySuperScaleStrategy(**config["strategy"]),
        accelerator="cpu",
        devices="auto",
        plugins=[RayLightningEnvironment(), lss.UniversalCheckpointIO()],
        callbacks=[ModelCheckpoint(leg.checkpoints, every_n_train_steps=5, save_top_k=-1)],
        max_steps=config["steps"],
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    prepare_trainer(trainer).fit(module, Loader(leg), ckpt_path=lss.last_checkpoint(leg.checkpoints))
    said = {"ranks": trainer.world_size, "step": trainer.global_step, "strategy_ranks": trainer.strategy.num_ranks}
    if trainer.global_rank == 0:
        torch.save({"weights": module.state_dict(), **said}, folder / f"end-{trainer.world_size}.pt")


@contextmanager
def cluster(root: Path) -> Iterator[None]:
    """A Ray cluster of two CPUs on this machine while open."""
    import ray

    variables = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "RAY_TRAIN_V2_ENABLED": "1"}
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        runtime_env={"env_vars": {**variables, **{k: v for k, v in os.environ.items() if k.startswith("LSS_")}}},
        logging_level="ERROR",
        object_store_memory=100 * 2**20,
    )
    try:
        yield
    finally:
        ray.shutdown()


def run(workers: int, folder: Path, max_failures: int = 0, **config: Any) -> None:
    """Train on so many workers, as a user's script does."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        train,
        train_loop_config={"folder": str(folder), **config},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=False),
        run_config=RunConfig(storage_path=str(folder / "ray"), failure_config=FailureConfig(max_failures=max_failures)),
    ).fit()
