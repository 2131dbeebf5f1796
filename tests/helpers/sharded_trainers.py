"""Real checkpoints of Lightning's ModelParallelStrategy, on the CPU; and FSDP's, which needs a GPU, by hand."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader


class Small(LightningModule):
    """Odd rows, a buffer that counts, a frozen weight, two groups in another order than the module's."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 7)
        self.still = nn.Linear(7, 7)
        self.two = nn.Linear(7, 7)
        self.still.requires_grad_(False)
        self.register_buffer("counter", torch.tensor(0, dtype=torch.int64))

    def training_step(self, batch, batch_idx):
        self.counter += 1
        return self.two(self.still(torch.relu(self.one(batch)))).square().mean()

    def configure_optimizers(self):
        weights = [p for p in self.parameters() if p.requires_grad and p.dim() > 1]
        weights.reverse()
        biases = [p for p in self.parameters() if p.requires_grad and p.dim() == 1]
        groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "lr": 1e-3, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer)]


class Sharded(Small):
    """Under ModelParallelStrategy modules shard themselves."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.one, self.two, self.still):
            fully_shard(layer, mesh=mesh)
        fully_shard(self, mesh=mesh)


def fit_and_save(rank: int, world_size: int, folder: str) -> None:
    """Train two steps and save, in four ways, and what was held as truth.safetensors.

    model-parallel: by Lightning's ModelParallelStrategy, sharded. whole.ckpt: by the same, in one file.
    fsdp: the same state under the keys of Lightning's FSDPStrategy (`FSDPStrategy.save_checkpoint`), which needs a GPU.
    app: as in torch's tutorial on torch.distributed.checkpoint; plain: a module's state_dict alone.
    """
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for name, is_sharded in (("whole.ckpt", False), ("model-parallel", True)):
        torch.manual_seed(0)
        strategy = ModelParallelStrategy(
            data_parallel_size=world_size,
            tensor_parallel_size=1,
            save_distributed_checkpoint=is_sharded,
            process_group_backend="gloo",
        )
        module = Sharded()
        trainer = Trainer(
            accelerator="cpu", devices=world_size, strategy=strategy, max_steps=2, logger=False,
            default_root_dir=folder, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        batches = torch.randn(4, 4, generator=torch.Generator().manual_seed(rank)).split(1)
        trainer.fit(module, DataLoader(list(batches), batch_size=None))
        trainer.save_checkpoint(str(Path(folder, name)))
    model, optimizer = get_model_state_dict(module), get_optimizer_state_dict(module, trainer.optimizers[0])
    dcp.save({"model": model, "optimizer_0": optimizer}, checkpoint_id=Path(folder, "fsdp"))
    dcp.save({"app": {"model": model, "optim": optimizer}, "epoch": 7}, checkpoint_id=Path(folder, "app"))
    dcp.save(model, checkpoint_id=Path(folder, "plain"))
    held = {f"model/{name}": _whole(value) for name, value in model.items()}
    for name, state in optimizer["state"].items():
        held.update({f"{key}/{name}": _whole(value) for key, value in state.items()})
    if rank == 0:
        torch.save({"epoch": 1, "global_step": 2, "lr_schedulers": []}, Path(folder, "fsdp", "meta.pt"))
        save_file(held, Path(folder, "truth.safetensors"))


def _whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().contiguous().clone()
