"""Places that all ranks must pass together, so that one that is there alone is told what it does, and what to do.

A rank that waits here names the place. Another rank that is in an agreement elsewhere finds the difference at once;
one that is in another collective is found by the watch ([Note: Waiting for other ranks] in comm/watch.py), whose error
has the same words.
"""

from __future__ import annotations

from lightning_superscale.run.assemble import Assembly

_SAVE = "trainer.save_checkpoint() (every rank must call it, also where rank 0 alone writes)"
_EVEN = "where ranks have more or fewer: drop_last=True, a DistributedSampler, or limit_train_batches"


class Meetings:
    """The meetings of one run. Every rank calls each method; all do nothing on one rank and where nothing is trained.

    Raises:
        SuperScaleError: from each method, on every rank that is at a meeting or in another agreement: ranks are at
            different places; names each one's.
    """

    def __init__(self) -> None:
        self._num_batches = 0

    def at_batch(self, assembly: Assembly | None, batch_idx: int) -> None:
        """Begin a batch of training; ranks meet before the first one of each epoch."""
        if batch_idx == 0:
            _meet(assembly, f"the start of an epoch, after one of {self._num_batches} batches ({_EVEN})")
            self._num_batches = 0
        self._num_batches += 1

    def at_end(self, assembly: Assembly | None) -> None:
        """End training."""
        _meet(assembly, f"the end of training, after an epoch of {self._num_batches} batches ({_EVEN})")
        self._num_batches = 0

    @staticmethod
    def at_save(assembly: Assembly | None) -> None:
        """Begin to save a checkpoint."""
        _meet(assembly, _SAVE)


def _meet(assembly: Assembly | None, place: str) -> None:
    if assembly is not None:
        agreement = assembly.ranks.agreement
        agreement.agree(agreement.new_flags(), label=place, step=0, what=place)
