"""The options of sequence parallelism: the ranks that share every sample's sequence, and how they attend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Optional

from lightning_superscale.config.values import Between, PositiveInt, check_fields

NumBatches = Annotated[int, Between(0, 2**30)]


@dataclass(frozen=True)
class SequenceConfig:
    """Options for sharing the sequence of every sample among ranks (Jacobs et al. 2023, arXiv:2309.14509).

    Args:
        size: number of neighbouring ranks that share every sample's sequence; 1 shares nothing.
        mode: how these ranks attend. "ulysses" has each attend with its share of the heads over the whole sequence,
            "ring" passes keys and values from rank to rank, and "allgather" gathers them on every rank. "auto" is
            ulysses where attention has at least as many query heads as there are ranks, and all-gather elsewhere.
        head_chunks: number of chunks in which ulysses takes the heads one after the other, each along the whole
            sequence: more of them take less memory at a time.
        dims: by place of a tensor in the batch ("input_ids", "0", "images.pixels"), its dim of tokens; None finds it.
        check_batches: number of first batches of every data loader that are compared between the ranks that share
            them; 0 compares none.
        token_wise: classes of autograd functions ("package.module.Class") and operations ("namespace::name") of other
            packages that treat every token by itself. Others that get tokens are refused: what they compute from a part
            is not known.
    """

    size: PositiveInt = 1
    mode: Literal["auto", "ulysses", "ring", "allgather"] = "auto"
    head_chunks: PositiveInt = 1
    dims: Optional[dict[str, int]] = None
    check_batches: NumBatches = 16
    token_wise: Optional[list[str]] = None

    def __post_init__(self) -> None:
        check_fields(self)
