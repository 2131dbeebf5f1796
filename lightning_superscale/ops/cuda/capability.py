"""Which cards our kernels run on."""

from __future__ import annotations

import torch

# The oldest architecture in CMakeLists.txt: Turing, such as T4. Its kernels also run on every later one.
LEAST_FOR_CUDA = (7, 5)
# Triton compiles bf16 for Ampere and later.
LEAST_FOR_TRITON = (8, 0)


def why_too_old(least: tuple[int, int], kernels: str) -> str | None:
    """Why kernels do not run on the current CUDA device; None where they do.

    Args:
        least: the oldest compute capability that they are built for.
        kernels: names them, for the reason.
    """
    found = torch.cuda.get_device_capability()
    if found >= least:
        return None
    name = torch.cuda.get_device_name()
    return f"{kernels} need compute capability {least[0]}.{least[1]} or later, and {name} has {found[0]}.{found[1]}"
