"""A run's module techniques around a traced step: sequences that ranks share, and what a rank keeps of its tokens.

[Note: One rank of many] A step is traced as one rank of a run computes it, under the techniques that the run has: each
rank's part of the tokens, the blocks that are recomputed, losses without all their logits. Exchanges between ranks are
operations of the trace, of tensors without values, so that no other rank and no process group is needed; all ranks do
the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_superscale.comm.communicator import single_rank
from lightning_superscale.comm.in_graph import AxisLink
from lightning_superscale.comm.mesh import single_mesh
from lightning_superscale.config import SequenceConfig, ZeroConfig
from lightning_superscale.estimation.tracing.host_memory import TracedBuffer, TracedLink
from lightning_superscale.estimation.tracing.step import HostActivations, Loss
from lightning_superscale.run.techniques.collection import Techniques
from lightning_superscale.run.techniques.long_context import LongContext, long_context
from lightning_superscale.run.techniques.sequence_parallel import SequenceParallel
from lightning_superscale.run.techniques.technique import TechniqueFacts
from lightning_superscale.sequence.memory.activation_offload import ActivationOffload


class TracedTechniques:
    """The techniques that a SequenceConfig gives a run, ready for its module.

    Attributes:
        recomputes_blocks: whether blocks are computed again in backward.
    """

    def __init__(self, techniques: Techniques, offload: ActivationOffload | None = None) -> None:
        self._techniques = techniques
        self._offload = offload
        self.recomputes_blocks = any(
            one.recomputes_blocks for one in techniques.values() if isinstance(one, LongContext)
        )

    def around(self, loss: Loss) -> Loss:
        """The loss of a batch of whole sequences, as this rank computes it."""

        def shared(module: nn.Module, batch: Any) -> Tensor:
            techniques = self._techniques
            with techniques.around_forward(trains=True):
                value: Tensor = techniques.output(loss(module, techniques.batch(batch, trains=True)), trains=True)
            return value

        return shared

    @contextmanager
    def counting(self) -> Iterator[HostActivations]:
        """While open, one step is traced; afterwards the result says what it kept in host memory."""
        found = HostActivations()
        if self._offload is None:
            yield found
            return
        self._offload.close()  # what an earlier step has held
        self._offload.forget()
        yield found
        done = self._offload.report()
        found.nbytes, found.to_host, found.to_device = done.host_bytes, done.bytes_out, done.bytes_in


@contextmanager
def techniques_of(module: nn.Module, config: SequenceConfig | None, zero: ZeroConfig) -> Iterator[TracedTechniques]:
    """While open, the module is hooked as a run hooks it; see [Note: One rank of many].

    Args:
        config: None for a run without.
        zero: says by `wrap` what the repeated blocks are.

    Raises:
        SuperScaleError: the module can't be trained with these options; says why.
    """
    made = Techniques()
    kit: LongContext | None = None
    if config is not None:
        config = replace(config, check_batches=0, verify=None)  # both look at values
        facts = _facts(config, zero)
        if config.size > 1:
            made["sequence"] = SequenceParallel(facts, config, AxisLink.without_ranks(config.size))
        kit = long_context(facts)
        if kit is not None:
            made["long context"] = kit
    try:
        made.prepare(module)
        for technique in made.values():
            technique.connect(single_rank(), None)
        offload = kit.offload_to(TracedLink(), TracedBuffer) if kit is not None and kit.uses_link() else None
        yield TracedTechniques(made, offload)
    finally:
        made.close()


def _facts(config: SequenceConfig, zero: ZeroConfig) -> TechniqueFacts:
    return TechniqueFacts(
        zero=zero,
        offload=None,
        sequence=config,
        mesh=single_mesh(),
        device=torch.device("cpu"),
        trains=True,
        is_compiled=False,
        is_compiled_whole=False,
        shards_weights=False,
        free_bytes=None,
    )
