"""Work that every rank does at once, and that fails on all ranks or on none.

[Note: Phases] Saving and loading are a few phases. Between two of them ranks agree on whether anybody failed; if so all
of them give up and raise the same error. No rank raises in between, so none is left waiting for another.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TypeVar

from lightning_superscale.comm.collectives import gather_objects
from lightning_superscale.comm.mesh import DataMesh
from lightning_superscale.errors import CheckpointError

_Answer = TypeVar("_Answer")


def attempt(mesh: DataMesh, work: Callable[[], _Answer], failed: str) -> list[_Answer]:
    """Do one phase, and learn how it went on the other ranks ([Note: Phases]). Every rank calls it.

    Args:
        work: this rank's part of the phase; its answer must be picklable.
        failed: the beginning of the error's message, e.g. "the snapshot failed".

    Returns:
        Every rank's answer, by rank.

    Raises:
        CheckpointError: on every rank, when any rank failed or was lost; names that rank and its reason.
    """
    answer, error = None, None
    try:
        answer = work()
    except Exception as raised:
        error = raised
    said = None if error is None else f"{type(error).__name__}: {error}"
    if isinstance(error, CheckpointError):
        said = str(error)
    try:
        answers = gather_objects(mesh, (said, socket.gethostname(), answer))
    except RuntimeError as lost:
        reason = mesh.watch.explain(lost) if mesh.watch is not None else lost
        raise CheckpointError(f"{failed}: another rank was lost: {reason}") from lost
    wrong = [(rank, host, said) for rank, (said, host, _) in enumerate(answers) if said is not None]
    if wrong and mesh.is_single:
        raise CheckpointError(f"{failed}: {wrong[0][2]}") from error
    if wrong:
        alike = len(wrong) == len(answers) and len({said for _, _, said in wrong}) == 1
        named = (
            f"every rank: {wrong[0][2]}"
            if alike
            else "; ".join(f"rank {rank} ({host}): {said}" for rank, host, said in wrong)
        )
        raise CheckpointError(f"{failed}: {named}") from error
    return [answer for _, _, answer in answers]
