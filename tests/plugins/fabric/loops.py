"""A Fabric loop that accumulates, clips and steps, the same under every strategy."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader

from tests.helpers.trainers import dataset


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(17, 33), nn.BatchNorm1d(33), nn.GELU(), nn.Linear(33, 5))


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    first, rest = list(module[0].parameters()), [p for part in list(module)[1:] for p in part.parameters()]
    return torch.optim.AdamW([{"params": first, "weight_decay": 0.3}, {"params": rest, "lr": 3e-3}], lr=1e-2)


def launched(strategy: Any, devices: int = 1, **flags: Any) -> Fabric:
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=strategy, **flags)
    fabric.launch()
    return fabric


def loop(
    fabric: Fabric,
    module: Any,
    optimizer: Any,
    *,
    clip: dict[str, Any] | None = None,
    num: int = 48,
    micro_batches: int = 2,
) -> list[Any]:
    """Steps of some micro-batches over all samples; gives every step's clip result."""
    clipped = []
    loader = fabric.setup_dataloaders(DataLoader(dataset(num), batch_size=8))
    for number, (x, y) in enumerate(loader):
        is_accumulating = (number + 1) % micro_batches != 0
        with fabric.no_backward_sync(module, enabled=is_accumulating):
            out = module(x)
            fabric.backward(nn.functional.mse_loss(out, y.to(out.dtype)) / micro_batches)
        if not is_accumulating:
            if clip is not None:
                clipped.append(fabric.clip_gradients(module, optimizer, **clip))
            optimizer.step()
            optimizer.zero_grad()
    return clipped


def trained(strategy: Any, *, clip: dict[str, Any] | None = None, **flags: Any) -> tuple[dict[str, Any], list[Any]]:
    """Weights after a loop, and its norms."""
    fabric = launched(strategy, **flags)
    plain = model()
    module, optimizer = fabric.setup(plain, adamw(plain))
    norms = loop(fabric, module, optimizer, clip=clip)
    state = fabric.strategy.get_module_state_dict(module._forward_module)
    weights = {name: value.clone() for name, value in state.items()}
    fabric.strategy.teardown()
    return weights, norms


def assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs"
