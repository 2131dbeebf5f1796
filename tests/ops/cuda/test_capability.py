"""Cards that kernels are too new for are named, before anything is launched."""

from __future__ import annotations

import pytest
import torch

from lightning_superscale.ops import update
from lightning_superscale.ops.cuda import kernels
from lightning_superscale.ops.cuda.capability import LEAST_FOR_CUDA, LEAST_FOR_TRITON, why_too_old


@pytest.fixture
def card(monkeypatch):
    """Pretends that the machine has a card of a compute capability."""

    def pretend(name: str, capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
        kernels._find.cache_clear()

    yield pretend
    kernels._find.cache_clear()


@pytest.mark.parametrize(
    ("name", "capability", "has_cuda", "has_triton"),
    [
        ("V100", (7, 0), False, False),
        ("T4", (7, 5), True, False),
        ("A100", (8, 0), True, True),
        ("H100", (9, 0), True, True),
    ],
)
def test_the_least_capability_is_compared(card, name, capability, has_cuda, has_triton):
    card(name, capability)
    for least, runs in ((LEAST_FOR_CUDA, has_cuda), (LEAST_FOR_TRITON, has_triton)):
        reason = why_too_old(least, "these kernels")
        assert (reason is None) is runs
        if reason is not None:
            assert f"these kernels need compute capability {least[0]}.{least[1]}" in reason
            assert f"{name} has {capability[0]}.{capability[1]}" in reason


def test_an_older_card_steps_with_torch_and_explain_says_why(card):
    card("V100", (7, 0))
    path = update.update_path(torch.device("cuda"))
    assert path.name.startswith(
        "PyTorch operations on the GPU, not fused (the CUDA kernels need compute capability 7.5"
    )
