"""Compares ranks that share the sequences of the first batch with a step that shares nothing, before anything trains.

[Note: The unshared step] The oracle must not take the rules on trust that it is to verify. So it is the user's training
step on the same tokens as plain tensors, all of them on every rank: no tensor knows its tokens then, no rule of
`sequence/tokens` is asked, nothing is sent in forward, and models of transformers attend and mask as they were made.
Both steps end in the same engines, which average gradients over all ranks; every rank's are whole without sharing, so
that their mean is the gradient.

Few tokens show what is wrong with a rule or with a function that was said to be token-wise: an error of a share shows
at any length. They are as far from a number that divides among ranks as the batch's own, so that padding is verified
too. What only shows at the batch's whole length is not verified.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lightning_superscale.comm.collectives import gather_objects
from lightning_superscale.comm.mesh import DataMesh
from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.run.techniques.technique import Rehearse, Rehearsed
from lightning_superscale.sequence.batches import first_tokens, shared, token_lengths
from lightning_superscale.sequence.tokens.layout import Sharing

TOKENS_PER_RANK = 64
"""Tokens of a sequence that each rank has of the piece that is verified, at first."""


def tolerance(eps: float) -> float:
    """The relative difference of loss and gradient norms that rounding may make; half of the digits, and a half more.

    A rounding error is at most eps / 2, and the sums over tokens, features and layers in which it occurs average it
    out: loss and gradient norms of the tests' models differ by 4e-8 in fp32 and by 6e-3, less than an eps, in bf16.
    Wrong shares differ by much more: a mean over ranks in place of one over tokens by about the relative difference of
    the ranks' numbers of tokens, one token that is lost by 1 / tokens, which is 1/128 for two ranks. sqrt(eps) / 3 lies
    between: 5e-9 in fp64, 1.2e-4 in fp32, and in fp16 (1e-2) and bf16 (3e-2) as low as their rounding lets it be, where
    single tokens are not seen: a first run in fp32 sees them.
    """
    return math.sqrt(eps) / 3


@dataclass(frozen=True)
class Comparison:
    """Loss and gradient norms of one step, shared among ranks and not.

    Attributes:
        shared, unshared: with the loss of one group of ranks, that whose losses differ most.
        tokens: of the piece, and of the whole sequence.
        mode: how ranks attend, as the user asked for it.
        num_ranks: that share a sequence.
    """

    shared: Rehearsed
    unshared: Rehearsed
    tokens: tuple[int, int]
    mode: str
    num_ranks: int

    @property
    def loss_difference(self) -> float:
        """Relative to the unshared loss, or to 1 where it is smaller: a loss that cancels out is all roundoff."""
        return _relative(self.shared.loss - self.unshared.loss, max(1.0, abs(self.unshared.loss)))

    @property
    def grad_difference(self) -> float:
        """The 2-norm of the differences of all parameters' gradient norms, relative to the unshared gradient norm."""
        return _relative(math.hypot(*self._differences.values()), self.grad_norms[1])

    @property
    def difference(self) -> float:
        """The larger of both."""
        return max(self.loss_difference, self.grad_difference)

    @property
    def tolerance(self) -> float:
        """The difference that rounding may make."""
        return tolerance(self.unshared.eps)

    @property
    def grad_norms(self) -> tuple[float, float]:
        """Of all parameters, shared and not."""
        return math.hypot(*self.shared.norms.values()), math.hypot(*self.unshared.norms.values())

    @property
    def _differences(self) -> dict[str, float]:
        mine, theirs = self.shared.norms, self.unshared.norms
        return {name: mine.get(name, 0.0) - theirs.get(name, 0.0) for name in {**theirs, **mine}}

    def sentence(self) -> str:
        """What was found, for `explain()`."""
        return (
            f"verify: on the first {self.tokens[0]} of {self.tokens[1]} tokens of the first batch, loss "
            f"{self.shared.loss:.6g} and gradient norm {self.grad_norms[0]:.6g} are those without sharing, but for a "
            f"relative difference of {self.difference:.1e} (at most {self.tolerance:.1e} is rounding)"
        )

    def error(self) -> SequenceParallelError:
        """The refusal to train."""
        worst = max(self._differences, key=lambda name: abs(self._differences[name]), default="")
        most = (
            f" The gradient norm of {worst!r} differs most: {self.shared.norms.get(worst, 0.0):.6g} and "
            f"{self.unshared.norms.get(worst, 0.0):.6g}."
            if self.grad_difference > self.tolerance
            else ""
        )
        return SequenceParallelError(
            f"verify='first_batch': sequence={self.num_ranks} with mode={self.mode!r} computes something else than a "
            f"run that shares nothing. On the first {self.tokens[0]} of {self.tokens[1]} tokens of the first batch, "
            f"loss and gradient norm are {self.shared.loss:.8g} and {self.grad_norms[0]:.8g} with sharing, "
            f"{self.unshared.loss:.8g} and {self.grad_norms[1]:.8g} without: a relative difference of "
            f"{self.loss_difference:.1e} and {self.grad_difference:.1e}, where rounding makes at most "
            f"{self.tolerance:.1e}.{most} Nothing was trained. Look at what SequenceConfig.token_wise names first, and "
            "at code that keeps tensors outside of torch; try another mode=, or train with sequence=1. If none of your "
            "own code is to blame, a rule of this package is: please report it with this message."
        )


def _relative(difference: float, to: float) -> float:
    """Infinite where either is no number."""
    if not (math.isfinite(difference) and math.isfinite(to)):
        return math.inf
    return 0.0 if difference == 0 else abs(difference) / to if to else math.inf


def length_of_piece(length: int, sharing: Sharing, doublings: int = 0) -> int:
    """The number of tokens that are verified of a sequence of `length`, or all of them where it is shorter.

    At most as many as a rank has of it in training are taken beyond the first ones, so that a step on all tokens of the
    piece holds no more activations than a training step does.
    """
    frame = sharing.frame(length)
    num_missing = frame.num_tokens - length
    first = min(length, TOKENS_PER_RANK * sharing.link.size - num_missing)
    most: int = max(first, frame.per_rank)
    return min(most, first << doublings)


def compare_first_batch(
    batch: Any,
    sharing: Sharing,
    mesh: DataMesh,
    rehearse: Rehearse,
    unshared: Callable[[], AbstractContextManager[None]],
) -> Comparison:
    """Rehearse the training step of a batch, shared and not. Every rank calls it.

    Args:
        batch: the first one, as the step would get it.
        unshared: a context in which the step shares nothing.

    Raises:
        SequenceParallelError: on every rank: they differ by more than rounding, or nothing could be compared.
    """
    num_of, alone = _rehearsed_alone(batch, sharing, mesh, rehearse, unshared)
    together = rehearse(lambda: shared(*first_tokens(batch, num_of), sharing))
    length = max(token_lengths(batch))
    own = Comparison(together, alone, (num_of(length), length), sharing.mode, sharing.link.size)
    # Norms are of averages over all ranks, and so the same on each; losses are those of a group.
    everybody = gather_objects(mesh, (own.loss_difference, together.loss, alone.loss, own.tokens))
    _, loss, loss_alone, tokens = max(everybody, key=lambda said: said[0])
    worst = replace(own, shared=replace(together, loss=loss), unshared=replace(alone, loss=loss_alone), tokens=tokens)
    if worst.difference > worst.tolerance:
        raise worst.error()
    return worst


def _front(batch: Any, num_of: Callable[[int], int]) -> Any:
    return first_tokens(batch, num_of)[0]


def _rehearsed_alone(
    batch: Any,
    sharing: Sharing,
    mesh: DataMesh,
    rehearse: Rehearse,
    unshared: Callable[[], AbstractContextManager[None]],
) -> tuple[Callable[[int], int], Rehearsed]:
    """The unshared step of the shortest piece whose loss is a number on every rank, and that piece's length."""
    lengths = token_lengths(batch)
    if not lengths:
        raise SequenceParallelError(
            "verify='first_batch' expected the first batch to have tensors of tokens, as the data loader gave it; "
            f"found {type(batch).__name__} without. A training step that takes a dataloader_iter, or a batch that a "
            "hook has replaced, can't be verified: leave verify out."
        )
    length, doublings = max(lengths), 0
    while True:
        num_of = partial(length_of_piece, sharing=sharing, doublings=doublings)
        with unshared():
            alone = rehearse(partial(_front, batch, num_of))
        doublings += 1
        is_longest = length_of_piece(length, sharing, doublings) == num_of(length)
        everybody = gather_objects(mesh, (alone.loss, num_of(length), is_longest))
        if all(math.isfinite(loss) for loss, _, _ in everybody):
            return num_of, alone
        if all(is_last for _, _, is_last in everybody):
            rank, (loss, num, _) = next((at, one) for at, one in enumerate(everybody) if not math.isfinite(one[0]))
            raise SequenceParallelError(
                f"verify='first_batch' found nothing to compare: the loss of the first {num} tokens of the first batch "
                f"is {loss} on rank {rank}, without sharing. Perhaps no label counts among them. Let the first batch "
                "have labels near its front, or leave verify out."
            )
