"""The loss of a sequence whose tokens are on several ranks: the mean over all of them, on every rank.

[Note: One loss contract] Under every strategy gradients are averaged over the ranks of the mesh that see other tokens,
those of the sequence axis among them. A rank's own mean over its tokens would then weigh each rank alike, whatever the
number of tokens that count there, and would miss nothing but the weights: the error that other packages make. So a loss
here is the sum over the tokens of all ranks, divided by their number. Each rank's gradient is that of its own tokens'
part, times the number of ranks, and the mean that follows is the gradient of the whole sequence's loss.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lightning_superscale.comm.in_graph import AxisLink, sum_over_ranks


def mean_over_tokens(total: Tensor, num_tokens: Tensor, link: AxisLink) -> Tensor:
    """The mean over the tokens of all ranks, on every rank. Every rank of the axis calls it.

    Args:
        total: scalar, the sum of the losses of this rank's tokens.
        num_tokens: scalar, the number of them, or the sum of their weights; 0 where none counts.

    Returns:
        scalar of the dtype of `total`; NaN where no rank has a token that counts, as in torch.
    """
    if link.size == 1:
        return total / num_tokens
    sums = sum_over_ranks(torch.stack([total, num_tokens.detach().to(total.dtype)]), link)
    return sums[0] / sums[1].detach()


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    link: AxisLink,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of the tokens of all ranks, the mean over those that count. Every rank of the axis calls it.

    Args:
        logits: [..., classes], of this rank's tokens.
        labels: [...] int64, the class of each of these tokens: shifted before the sequence was cut, so that a rank's
            last token knows the first one of the next rank.
        ignore_index: the label of tokens that don't count.

    Returns:
        scalar, the same on every rank. Its gradient is this rank's part times the number of ranks ([Note: One loss
        contract]).
    """
    flat, classes = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    total = functional.cross_entropy(
        flat, classes, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="sum"
    )
    return mean_over_tokens(total, (classes != ignore_index).sum(), link)
