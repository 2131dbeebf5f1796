"""Memory that all ranks of one host map: what one writes there the others read, without a copy or a socket."""

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
    """Where other processes find a rank's memory, and what begins it, so that no other is taken for it."""

    path: str
    token: bytes


def map_host_memory(mesh: DataMesh, nbytes: int) -> list[Tensor] | None:
    """Memory of every rank, by world rank, uint8 [nbytes] each, that all ranks see. Every rank calls it.

    It has no name and no size limit but the host's memory, and is gone with the last tensor that shows it, also when
    ranks are killed. Who reads what another rank wrote must have heard from it since.

    Returns:
        None on every rank, where any can't map another's: on several hosts, in containers of their own, under users
        that may not look at one another, or on other systems than Linux.
    """
    offer, own = None, -1
    with contextlib.suppress(OSError):  # told to all, below
        own, offer = _offer(nbytes)
    offers: list[_Offer | None] = gather_objects(mesh, offer)
    mapped: list[Tensor] = []
    with contextlib.suppress(OSError):  # told to all, below
        mapped = [_map(each, nbytes) for each in offers if each is not None]
    is_mapped = gather_objects(mesh, len(mapped) == mesh.world.size)  # and nobody looks for a descriptor any more
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
