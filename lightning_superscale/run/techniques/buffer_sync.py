"""Buffers that forward changes, made equal on all ranks before each forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn

from lightning_superscale.comm.communicator import Communicator
from lightning_superscale.offload.link.link import Link
from lightning_superscale.run.techniques.technique import ModuleTechnique, TechniqueFacts
from lightning_superscale.zero.replicated import BufferSync


class SynchronizedBuffers(ModuleTechnique):
    """Rank 0's buffers on every rank, in training forwards and at the start of an evaluation."""

    def __init__(self) -> None:
        self._module: nn.Module | None = None
        self._sync: BufferSync | None = None

    def prepare(self, module: nn.Module) -> None:
        self._module = module

    def connect(self, ranks: Communicator, link: Link | None) -> None:
        if self._module is None:
            raise AssertionError("a technique is prepared before it knows the ranks")
        self._sync = BufferSync(ranks, self._module)

    def around_forward(self, *, trains: bool) -> AbstractContextManager[None]:
        return self._synchronized(self._sync) if trains and self._sync is not None else nullcontext()

    @staticmethod
    @contextmanager
    def _synchronized(sync: BufferSync) -> Iterator[None]:
        sync.sync()
        yield

    def before_evaluation(self) -> None:
        if self._sync is not None:
            self._sync.sync()

    def close(self) -> None:
        self._module = self._sync = None


def synchronized_buffers(facts: TechniqueFacts) -> ModuleTechnique | None:
    """The synchronization of one run's buffers; None on a single rank, and in a run that only evaluates."""
    return SynchronizedBuffers() if facts.trains and not facts.mesh.is_single else None
