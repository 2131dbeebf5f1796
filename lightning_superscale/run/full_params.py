"""Whole weights by name, wherever they are, to read or to edit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_superscale.comm.dtensor import gather_whole
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.run.assemble import Assembly
from lightning_superscale.torch_private import version_of
from lightning_superscale.zero.replicated import broadcast_from_first


@contextmanager
def full_params(assembly: Assembly | None, *, writes: bool) -> Iterator[dict[str, Tensor]]:
    """Give every weight whole, by name; with `writes`, take rank 0's edits of them. Every rank calls it.

    The caller has waited for new weights and let techniques rest. Weights that every rank has whole are the module's
    own memory; of sharded ones each rank gets copies in host memory. Edits go into weights and masters on every rank.

    Raises:
        SuperScaleError: nothing is trained, or a tensor was edited without `writes`.
    """
    if assembly is None:
        raise SuperScaleError("full_params() gives weights while trainer.fit() runs; before and after, they are whole.")
    module, sharded, mesh = assembly.module, assembly.sharded, assembly.mesh
    own = dict(module.named_parameters())
    if sharded is not None:
        sharded.wait_all_uploads()
    whole = {name: _whole(assembly, name, param) for name, param in own.items()}
    seen = {name: (version_of(tensor), tensor.data_ptr()) for name, tensor in whole.items()}
    with torch.no_grad():
        yield whole
    changed = [name for name, tensor in whole.items() if seen[name] != (version_of(tensor), tensor.data_ptr())]
    if not writes:
        if changed:
            raise SuperScaleError(
                f"{', '.join(changed[:5])} changed within full_params(), which reads. Pass writes=True to edit weights."
            )
        return
    broadcast_from_first(mesh, whole.values())
    if sharded is not None:
        sharded.load_whole({name: tensor for name, tensor in whole.items() if isinstance(own[name], DTensor)})
    for engine in assembly.engines.values():
        engine.reload_masters()


def _whole(assembly: Assembly, name: str, param: nn.Parameter) -> Tensor:
    return gather_whole(assembly.ranks, name, param) if isinstance(param, DTensor) else param.detach()
