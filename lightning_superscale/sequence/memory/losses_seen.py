"""Counts what became of the losses of a run: those that did without logits, and why others did not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class LossesSeen:
    """What became of the losses of a run.

    Attributes:
        num_tiled: losses of a training step that were computed without their logits.
        num_tokens, num_features, num_classes: of the largest of them, on this rank.
        logit_bytes: bytes that the largest one's logits would have kept per token: what `F.cross_entropy` saves.
        kept_bytes: bytes per token that the tiled loss kept in their place, without the weight's gradient.
        weight_bytes: bytes of the weight's gradient, which it kept once.
        not_tiled: by reason, losses whose logits were computed all the same.
        reads: by function, how often it was given logits in a training step.
        num_in_checkpoints: products in checkpoints, which were not deferred.
        num_held: products whose logits left a module that frees its weight, with a copy of it.
    """

    num_tiled: int = 0
    num_tokens: int = 0
    num_features: int = 0
    num_classes: int = 0
    logit_bytes: int = 0
    kept_bytes: int = 0
    weight_bytes: int = 0
    not_tiled: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)
    num_in_checkpoints: int = 0
    num_held: int = 0

    def add(self, hidden: Tensor, weight: Tensor) -> None:
        """Count a loss of [..., H] hidden states and a [V, H] weight."""
        self.num_tiled += 1
        num_tokens = hidden.numel() // hidden.shape[-1]
        if num_tokens >= self.num_tokens:
            wide = torch.promote_types(hidden.dtype, torch.float32).itemsize
            self.num_tokens, self.num_features, self.num_classes = num_tokens, hidden.shape[-1], weight.shape[0]
            self.logit_bytes, self.kept_bytes = weight.shape[0] * wide, hidden.shape[-1] * hidden.element_size()
            self.weight_bytes = weight.numel() * wide
