"""Memory that all ranks of one host map: a rank reads there what another wrote, without a copy or a socket."""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_superscale.comm.collectives import gather_objects
from lightning_superscale.comm.mesh import DataMesh

_TOKEN_BYTES = 64


class _Offer(NamedTuple):
    """The path at which other processes find a rank's memory, and the token that it begins with, to recognise it."""

    path: str
    token: bytes


def map_host_memory(mesh: DataMesh, nbytes: int) -> list[Tensor] | None:
    """Map memory of every rank that all ranks see. Every rank calls it.

    The memory has no name and no size limit but the host's, and is freed with the last tensor that views it, also when
    ranks are killed. A rank may read what another wrote only after a message from it that was sent after the write.

    Returns:
        by world rank, the memory of each, uint8 [nbytes]; None on every rank if any can't map another's: on several
        hosts, in containers of their own, under users that may not look at one another, or on other systems than Linux.
    """
    offer, own = None, -1
    with contextlib.suppress(OSError):  # ranks hear of a failure by the exchange below
        own, offer = _offer(nbytes)
    offers: list[_Offer | None] = gather_objects(mesh, offer)
    mapped: list[Tensor] = []
    with contextlib.suppress(OSError):  # ranks hear of a failure by the exchange below
        mapped = [_map(each, nbytes) for each in offers if each is not None]
    is_mapped = gather_objects(mesh, len(mapped) == mesh.world.size)  # after it no rank opens a descriptor
    if own >= 0:
        os.close(own)
    return mapped if all(is_mapped) else None


def _offer(nbytes: int) -> tuple[int, _Offer]:
    if not hasattr(os, "memfd_create"):
        raise OSError("this system has no anonymous files")
    descriptor = os.memfd_create("superscale")
    token = os.urandom(_TOKEN_BYTES)
    os.ftruncate(descriptor, _TOKEN_BYTES + nbytes)
    os.pwrite(descriptor, token, 0)
    return descriptor, _Offer(f"/proc/{os.getpid()}/fd/{descriptor}", token)


def _map(offer: _Offer, nbytes: int) -> Tensor:
    descriptor = os.open(offer.path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.pread(descriptor, _TOKEN_BYTES, 0) != offer.token:
            raise OSError("another process has this number here")
        memory = mmap.mmap(descriptor, _TOKEN_BYTES + nbytes)
    finally:
        os.close(descriptor)
    return torch.frombuffer(memory, dtype=torch.uint8, offset=_TOKEN_BYTES, count=nbytes)
