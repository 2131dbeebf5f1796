"""The matrix of AdamW cases, shared by the test on the CPU and the test on a GPU."""

from __future__ import annotations

import dataclasses
import itertools

import torch

from lightning_superscale.ops.types import GRAD_DTYPES, STATE_DTYPES, WEIGHT_DTYPES, AdamWSegment
from tests.ops.gpu.helpers import BASE_HYPER, make_segment

MODES = ("adamw_commit", "adamw_peek", "adamw_commit_peek")

HYPERS = {
    "adamw": BASE_HYPER,
    "adam_l2": dataclasses.replace(BASE_HYPER, decoupled=False, weight_decay=0.1),
    "no_decay": dataclasses.replace(BASE_HYPER, weight_decay=0.0),
    "low_beta1": dataclasses.replace(BASE_HYPER, beta1=0.3),
    "scaled": dataclasses.replace(BASE_HYPER, grad_scale=0.37),
    "clipped_maximize": dataclasses.replace(BASE_HYPER, grad_scale=3.0, clip_value=0.8, maximize=True),
    "first_step": dataclasses.replace(BASE_HYPER, step=1, eps=1e-6),
}

# One whole block of 4096 and a tail that is no multiple of 4, a tail only, one element, none; and
# runs that no vector access can take.
SIZES = ((4096 + 1235, 0), (77, 0), (1, 0), (0, 0), (4097, 1), (4096, 3))


def dtype_segments(mode: str) -> list[AdamWSegment]:
    """Every combination of dtypes, at mixed sizes and alignments, in one call."""
    weights: tuple[torch.dtype | None, ...] = WEIGHT_DTYPES if mode != "adamw_commit" else (None, *WEIGHT_DTYPES)
    combinations = itertools.product(STATE_DTYPES, STATE_DTYPES, GRAD_DTYPES, weights)
    segments = []
    for index, (m, v, grad, weight) in enumerate(combinations):
        numel, misalign = SIZES[index % len(SIZES)] if index % 3 else SIZES[0]
        segments.append(
            make_segment(
                numel,
                seed=index,
                hyper=list(HYPERS.values())[index % len(HYPERS)],
                moments=(m, v),
                grad=grad,
                weight_out=weight,
                next_grad=GRAD_DTYPES[(index + 1) % 3] if mode == "adamw_commit_peek" else None,
                misalign=misalign,
            )
        )
    return segments


def hostile_segment(mode: str) -> AdamWSegment:
    """NaN, infinities, zeros, denormals and the largest numbers, in gradients and state."""
    seg = make_segment(
        4096 + 64,
        seed=5,
        hyper=HYPERS["clipped_maximize"],
        next_grad=torch.float32 if mode == "adamw_commit_peek" else None,
    )
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-42, 3.3e38, -1e-38])
    seg.grad[::9] = special.repeat(1000)[: len(seg.grad[::9])]
    seg.param[3::31] = special.repeat(1000)[: len(seg.param[3::31])]
    seg.exp_avg_sq[5::37] = special.abs().repeat(1000)[: len(seg.exp_avg_sq[5::37])]
    if seg.next_grad is not None:
        seg.next_grad[7::11] = special.repeat(1000)[: len(seg.next_grad[7::11])]
    return seg
