"""Trainers that write and read universal checkpoints under every strategy, and what such a checkpoint holds."""

from __future__ import annotations

import os
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard

import lightning_superscale as lss
from lightning_superscale.checkpoint.load.reader import open_checkpoint
from lightning_superscale.checkpoint.state import ReadRequest
from lightning_superscale.layout.box import whole_box
from tests.helpers.trainers import Regressor, loader, trainer


class Mixed(Regressor):
    """Beside Regressor's: a tied weight, a scalar, a buffer of counts, a weight with fewer rows than ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 5, bias=False)
        self.again = nn.Linear(5, 5, bias=False)
        self.again.weight = self.head.weight
        self.scale = nn.Parameter(torch.tensor(1.25))
        self.few = nn.Parameter(torch.full((2, 3), 0.5))
        self.register_buffer("count", torch.tensor([3, 1], dtype=torch.int64))

    def loss(self, batch) -> torch.Tensor:
        x, y = batch
        found = self.again(self.head(self.frozen(self.net(x)))) * self.scale + self.few.sum()
        return nn.functional.mse_loss(found.float(), y.float())

    def training_step(self, batch, batch_idx):
        self.count[1] += 1
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        configured = super().configure_optimizers()
        configured["optimizer"].add_param_group(
            {"params": [self.head.weight, self.scale, self.few], "lr": 5e-3, "betas": (0.8, 0.99)}
        )
        configured["lr_scheduler"]["scheduler"] = torch.optim.lr_scheduler.CosineAnnealingLR(
            configured["optimizer"], 20
        )
        return configured


class Parallel(Mixed):
    """Sharded by hand, as users of ModelParallelStrategy do."""

    def configure_model(self):
        if isinstance(self.net, torch.distributed.fsdp.FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for module in (self.net, self.unused, self.frozen):
            fully_shard(module, mesh=mesh)  # the rest stays whole, and alike: ranks get the same batches


STRATEGIES = {
    "ddp": (lambda world_size: DDPStrategy(find_unused_parameters=True), Mixed),
    "model_parallel": (lambda world_size: ModelParallelStrategy(world_size, 1), Parallel),
    "replicated": (lambda world_size: "superscale", Mixed),
    "zero1": (lambda world_size: "zero1", Mixed),
    "zero2": (lambda world_size: "zero2", Mixed),
    "zero3": (lambda world_size: "zero3", Mixed),
    "superoffload": (lambda world_size: "superoffload", Mixed),
    "zero1 superoffload": (lambda world_size: lss.SuperScaleStrategy(zero=1, offload="superoffload"), Mixed),
    "zero3 superoffload": (lambda world_size: lss.SuperScaleStrategy(zero=3, offload="superoffload"), Mixed),
}
OURS = [name for name in STRATEGIES if name not in ("ddp", "model_parallel")]


def universal_trainer(name: str, world_size: int, *, checkpoint=None, **flags) -> tuple[L.Trainer, Mixed]:
    make, module_class = STRATEGIES[name]
    flags = {"plugins": [lss.UniversalCheckpointIO(checkpoint)], "use_distributed_sampler": False, **flags}
    return trainer(make(world_size), devices=world_size, **flags), module_class()


def train_and_save(rank, world_size, names, folder, precision="32-true", epochs=2) -> None:
    """Each rank trains on its share of the batches and writes `<folder>/<name>-<world_size>.ckpt`."""
    for name in names:
        run, module = universal_trainer(name, world_size, max_epochs=epochs, precision=precision)
        run.fit(module, loader(24))
        run.save_checkpoint(f"{folder}/{name}-{world_size}.ckpt")


class SavesAgain(L.Callback):
    """Writes what was loaded, before any step; then loads and writes others, as resuming does."""

    def __init__(self, path: str, others: list[tuple[str, str]]) -> None:
        self.path = path
        self.others = others

    def on_train_start(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)
        for source, path in self.others:
            trainer._checkpoint_connector.restore(source)
            trainer.save_checkpoint(path)
        trainer.should_stop = True


def load_and_save(rank, world_size, pairs, folder, precision="32-true") -> None:
    """Load each checkpoint with a strategy and write it anew, to `<folder>/<stem>--<name>-<world_size>.ckpt`.

    A strategy is set up once for all that it reads, which takes longer than reading.
    """
    os.fsync = lambda descriptor: None  # nobody crashes here
    for name in dict.fromkeys(name for _, name in pairs):
        (first, written), *others = [
            (path, f"{folder}/{Path(path).stem}--{name}-{world_size}.ckpt") for path, by in pairs if by == name
        ]
        again = SavesAgain(written, others)
        flags = {"max_epochs": 9, "limit_train_batches": 1, "precision": precision, "callbacks": [again]}
        run, module = universal_trainer(name, world_size, **flags)
        run.fit(module, loader(24), ckpt_path=first)


def content(path: str | Path) -> dict:
    """All that a checkpoint says of weights and optimizers, tensors whole.

    But for masters of weights that never took a step: those are the weights, and saved while training runs only.
    """
    source = open_checkpoint(str(path))
    infos = {
        key: info
        for key, info in source.tensors.items()
        if key.state != "master_param" or key._replace(state="step") in source.tensors
    }
    tensors = {key: torch.empty(info.shape, dtype=info.dtype) for key, info in infos.items()}
    source.read([ReadRequest(key, whole_box(tensor.shape), tensor) for key, tensor in tensors.items()])
    found = {
        "tensors": tensors,
        "infos": infos,
        "groups": [record.groups for record in source.optimizers],
        "names": [record.names for record in source.optimizers],
        "aliases": dict(source.aliases),
        "rest": source.rest,
        "step": source.step,
    }
    source.close()
    return found


def assert_same_content(found: dict, expected: dict, *, name: str) -> None:
    differing = sorted(map(str, found["infos"].keys() ^ expected["infos"].keys()))
    assert not differing, f"{name}: {differing}"
    for key, tensor in expected["tensors"].items():
        assert torch.equal(found["tensors"][key], tensor), f"{name}: {key}"
        assert found["infos"][key] == expected["infos"][key], f"{name}: {key}"
    for part in ("groups", "names", "aliases", "step"):
        assert found[part] == expected[part], f"{name}: {part}"


def differing_after_resume(rank, world_size, names, folder, precision="32-true") -> list[str]:
    """What a run that was stopped and went on has otherwise than one that never stopped, on this rank."""
    found = []
    for name in names:
        path, ends = f"{folder}/{name}-half.ckpt", []
        for epochs, ckpt_path in ((4, None), (2, None), (4, path)):
            run, module = universal_trainer(name, world_size, max_epochs=epochs, precision=precision)
            run.fit(module, loader(24), ckpt_path=ckpt_path)
            if epochs == 2:
                run.save_checkpoint(path)
                continue
            run.save_checkpoint(f"{folder}/{name}-{len(ends)}.ckpt")
            ends.append(content(f"{folder}/{name}-{len(ends)}.ckpt"))
        found += [
            f"{name}: {key}" for key, end in ends[0]["tensors"].items() if not torch.equal(end, ends[1]["tensors"][key])
        ]
        found += [f"{name}: {part}" for part in ("groups", "names", "step") if ends[0][part] != ends[1][part]]
    return found
