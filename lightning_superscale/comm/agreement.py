"""Agreements between ranks: on the parameters that have gradients, on late ones, on failures, and on equal facts.

[Note: One agreement per step] An error on one rank must not leave the others in a collective that it
never enters. A rank with an error therefore still enters the agreement, and every rank raises the same
error after it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_superscale.comm.collectives import control_max, gather_objects
from lightning_superscale.comm.mesh import DataMesh
from lightning_superscale.errors import SuperScaleError

# Length of a vector's head: status, then label, step and order, each with its negative, so that the maximum over ranks
# tells whether all are equal.
_HEADER = 7
_HASH_RANGE = 2**31 - 1
# A rank's status: it wants all ranks to end after this step, or it has an error.
_END, _ERROR = 1, 2


def short_hash(text: str) -> int:
    """A hash that is the same in every process, in [0, 2^31 - 1)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") % _HASH_RANGE


class Agreement:
    """The agreements of one run. Every rank calls each, in the same order.

    Args:
        num_flags: length of the flag vector, the same on every rank and at every call.
    """

    def __init__(self, mesh: DataMesh, num_flags: int) -> None:
        self.mesh = mesh
        self.num_flags = num_flags

    def new_flags(self) -> Tensor:
        """A vector for `agree` with all flags 0, int32 on the host."""
        return torch.zeros(_HEADER + self.num_flags, dtype=torch.int32)

    def flags_of(self, vector: Tensor) -> Tensor:
        """The flags in a vector of `new_flags`, [num_flags]: a view for callers to fill."""
        return vector[_HEADER:]

    def agree(
        self,
        vector: Tensor,
        *,
        label: str,
        step: int,
        order: str = "",
        error: BaseException | None = None,
        what: str | None = None,
    ) -> Tensor:
        """The elementwise maximum of every rank's flags, int32 [num_flags]. Every rank calls it.

        Args:
            vector: a vector of `new_flags`, filled through `flags_of`; overwritten.
            label: names the action that ranks agree on, e.g. the step of an optimizer.
            step: number of times that the action was done before.
            order: a text that must be equal on all ranks, e.g. a digest of the order in which modules ran.
            error: the error of this rank, which all ranks raise; None without.
            what: names the place of this rank while it waits, in errors; None for the step of the label.

        Raises:
            SuperScaleError: on every rank, when any had an error, or label, step or order differ.
        """
        if self.mesh.is_single:
            if error is not None:
                raise error
            return self.flags_of(vector)
        facts = [short_hash(label), step, short_hash(order)]
        status = _ERROR if error is not None else _END if self.mesh.end.wanted_at is not None else 0
        vector[:_HEADER] = torch.tensor([status, *(f for fact in facts for f in (fact, -fact))], dtype=torch.int32)
        control_max(self.mesh, vector, what or f"step {step} of {label}")
        head = vector[:_HEADER].tolist()
        is_equal = all(head[i] == -head[i + 1] for i in range(1, _HEADER, 2))
        self.mesh.end.is_agreed |= head[0] == _END
        if head[0] == _ERROR or not is_equal:
            self._raise_on_all(label, step, order, error)
        return self.flags_of(vector)

    def _raise_on_all(self, label: str, step: int, order: str, error: BaseException | None) -> None:
        said = gather_objects(self.mesh, (label, step, order, None if error is None else str(error)))
        failed = [(rank, what[3]) for rank, what in enumerate(said) if what[3] is not None]
        if failed:
            text = "; ".join(f"rank {rank}: {what}" for rank, what in failed)
            raise SuperScaleError(text) from error
        for name, k in (("what is done", 0), ("how often it was done before", 1), ("the order of modules", 2)):
            values = [what[k] for what in said]
            if len(set(values)) > 1:
                other = next(rank for rank, value in enumerate(values) if value != values[0])
                raise SuperScaleError(
                    f"ranks went apart: {name} is {values[0]!r} on rank 0 and {values[other]!r} on rank {other}. "
                    "Every rank must step the same optimizers the same number of times; no weight was changed."
                )
        raise AssertionError("an agreement failed, and no rank says why")


def raise_together(mesh: DataMesh, error: Exception | None) -> None:
    """Raise the errors of any ranks on every rank. Every rank calls it.

    Args:
        error: the error of this rank; None without.

    Raises:
        SuperScaleError: any rank has an error; names the ranks and each one's message.
        Exception: in a run of one rank, `error` itself.
    """
    if mesh.is_single:
        if error is not None:
            raise error
        return
    anybody = torch.tensor([int(error is not None)], dtype=torch.int32)
    if not control_max(mesh, anybody, "the checks before setup"):
        return
    said = gather_objects(mesh, None if error is None else str(error))
    failed = [rank for rank, what in enumerate(said) if what is not None]
    if len(failed) == mesh.world.size and len(set(said)) == 1:
        raise SuperScaleError(said[0]) from error
    raise SuperScaleError("; ".join(f"rank {rank}: {said[rank]}" for rank in failed)) from error


def check_equal_on_all_ranks(mesh: DataMesh, facts: Mapping[str, str]) -> None:
    """Refuse to go on when ranks differ in their facts. Every rank calls it.

    Args:
        facts: values to compare, by the name that an error gives each.

    Raises:
        SuperScaleError: on every rank; names the first fact that differs, the ranks and their values.
    """
    if mesh.is_single:
        return
    own = short_hash(repr(sorted(facts.items())))
    seen = control_max(mesh, torch.tensor([own, -own], dtype=torch.int64), "the comparison of ranks").tolist()
    if seen[0] == -seen[1]:
        return
    everybody = gather_objects(mesh, dict(facts))
    for key in everybody[0] | everybody[-1]:
        values = [theirs.get(key, "absent") for theirs in everybody]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise SuperScaleError(
                f"ranks differ: {key} is {values[0]} on rank 0 and {values[other]} on rank {other}. "
                "Every rank must build the same model and configuration; only data may depend on the rank."
            )
    raise SuperScaleError("ranks differ in what they build; see the ranks' logs.")
