"""The options for long sequences: the ranks that share every sample's, how they attend, and what each rank keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Optional, Union

from lightning_superscale.config.values import Between, ModuleNames, PositiveInt, check_fields
from lightning_superscale.errors import SettingError

NumBatches = Annotated[int, Between(0, 2**30)]


@dataclass(frozen=True)
class SequenceConfig:
    """Options for long sequences: sharing every sample's among ranks (Jacobs et al. 2023, arXiv:2309.14509), and
    keeping less of it on each, with any size (docs/techniques/long-context.md).

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
        verify: "first_batch" runs the training step on a short piece of the first batch, once shared and once with all
            of it on every rank, and stops where loss or gradients differ by more than rounding; None does not.
        tile_loss: compute `F.cross_entropy` of a linear layer's output without ever holding all logits. "auto" does
            for at least 4096 classes and three times as many as features, where there are more tokens than features;
            true does wherever a product ends in a cross entropy. The loss and its gradients round otherwise.
        tile_mlp: tokens of a sequence that each block's MLP takes at a time; it is recomputed in backward. None takes
            all at once.
        mlps: module classes, class names or module names that `tile_mlp` applies to; None finds the largest child of
            each repeated block that has no attention in it.
        checkpoint_blocks: recompute the repeated blocks in backward, keeping their inputs and the results of attention;
            "auto" where there are such blocks and the model does not recompute them itself.
        offload_activations: keep the inputs of recomputed blocks in host memory.
        boundary_bits: bits of an element of these inputs, which `explain()` states the error of; 16 keeps them in
            their own dtype, exactly.
    """

    size: PositiveInt = 1
    mode: Literal["auto", "ulysses", "ring", "allgather"] = "auto"
    head_chunks: PositiveInt = 1
    dims: Optional[dict[str, int]] = None
    check_batches: NumBatches = 16
    token_wise: Optional[list[str]] = None
    verify: Optional[Literal["first_batch"]] = None
    tile_loss: Union[bool, Literal["auto"]] = "auto"
    tile_mlp: Optional[PositiveInt] = None
    mlps: Optional[ModuleNames] = None
    checkpoint_blocks: Union[bool, Literal["auto"]] = False
    offload_activations: bool = False
    boundary_bits: Literal[16, 8] = 16

    def __post_init__(self) -> None:
        check_fields(self)
        keeps = {"offload_activations": self.offload_activations, "boundary_bits": self.boundary_bits == 8}
        for key, is_asked in keeps.items():
            if is_asked and not self.checkpoint_blocks:
                raise SettingError(
                    f"SequenceConfig.{key}={getattr(self, key)} says where the inputs of recomputed blocks are kept, "
                    "and no blocks are recomputed; set checkpoint_blocks=True too."
                )
        if self.verify is not None and self.size == 1:
            raise SettingError(
                f"SequenceConfig.verify={self.verify!r} compares ranks that share sequences with a run without, and "
                "size=1 shares none; set size to the number of ranks that share one, or leave verify out."
            )
        if self.mlps is not None and self.tile_mlp is None:
            raise SettingError("SequenceConfig.mlps names what runs in tiles; say of how many tokens: tile_mlp=4096.")
