"""Every catalogued GPU op exists, has an oracle of its name and shape of call, and has a check."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_superscale.ops import reference
from lightning_superscale.ops.gpu_catalog import CUDA_OPS, TRITON_OPS
from lightning_superscale.ops.triton import elementwise, launch
from tests.ops.gpu import cuda_checks, triton_checks
from tests.ops.gpu.helpers import ROOT

ENTRIES = [*CUDA_OPS.items(), *TRITON_OPS.items()]


def _resolve(target: str) -> Callable[..., Any]:
    module, _, function = target.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


@pytest.mark.parametrize(("name", "target"), ENTRIES, ids=[target for _, target in ENTRIES])
def test_entry_takes_what_its_reference_takes(name: str, target: str) -> None:
    ours = inspect.signature(_resolve(target)).parameters
    oracle = inspect.signature(getattr(reference, name)).parameters
    for parameter in oracle.values():
        assert (ours[parameter.name].kind, ours[parameter.name].default) == (parameter.kind, parameter.default)
    extra = [ours[key] for key in ours if key not in oracle]
    assert all(parameter.kind is parameter.KEYWORD_ONLY and parameter.default is None for parameter in extra)


def test_every_entry_has_a_check() -> None:
    assert set(CUDA_OPS) == set(cuda_checks.CHECKS)
    assert set(TRITON_OPS) == set(triton_checks.CHECKS)


def test_every_reference_op_has_a_gpu_path() -> None:
    public = {
        name
        for name, value in vars(reference).items()
        if inspect.isfunction(value) and value.__module__ == reference.__name__ and not name.startswith("_")
    }
    parts_of_oracles = {
        "scaled_grad",
        "philox",
        "random_halves",
        "round_stochastic",
        "copy",
    }  # copy: memory of the host only
    assert public - parts_of_oracles == set(CUDA_OPS) | set(TRITON_OPS)


def test_importing_every_entry_module_imports_no_triton() -> None:
    modules = sorted({target.partition(":")[0] for _, target in ENTRIES} | {"lightning_superscale.ops.gpu_catalog"})
    code = f"import sys\nfor m in {modules!r}: __import__(m)\nassert 'triton' not in sys.modules\n"
    # torch itself must not have imported it either, or this proves nothing.
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_triton_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="cast_scale: Triton is not installed; pip install triton"):
        elementwise.cast_scale(torch.zeros(1), torch.zeros(1))
    assert launch.unavailable_reason() == "Triton is not installed: pip install triton"


def test_triton_cpu_tensor_names_the_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="cast_scale: expected CUDA tensors, found dst on cpu; use the CPU op"):
        elementwise.cast_scale(torch.zeros(1), torch.zeros(1))
