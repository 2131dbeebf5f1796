"""Sequences that are shared among ranks: every rank gets the whole batch, and computes its part of the tokens."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_superscale.comm.collectives import gather_objects
from lightning_superscale.comm.communicator import Communicator
from lightning_superscale.comm.in_graph import AxisLink
from lightning_superscale.config import SequenceConfig
from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.offload.link.link import Link
from lightning_superscale.run.techniques.first_batch import Comparison, compare_first_batch
from lightning_superscale.run.techniques.technique import ModuleTechnique, Rehearse, TechniqueFacts
from lightning_superscale.sequence.batches import find_tokens, fingerprints, shared
from lightning_superscale.sequence.compiled import CompiledModules
from lightning_superscale.sequence.hugging_face import HuggingFaceAttention
from lightning_superscale.sequence.tokens.checkpoints import Checkpoints
from lightning_superscale.sequence.tokens.custom_functions import CustomFunctions
from lightning_superscale.sequence.tokens.flex_attention import FlexAttention
from lightning_superscale.sequence.tokens.layout import AttentionSeen, Sharded, Sharing
from lightning_superscale.sequence.tokens.outputs import OwnOutputs
from lightning_superscale.sequence.tokens.parallel_modules import ParallelModules, why_not_token_wise
from lightning_superscale.sequence.tokens.tensor import layout_of, plain
from lightning_superscale.sequence.tokens.traced import is_tensor
from lightning_superscale.torch_private import compilation_of, tree_map

# After the first batches, one in so many is compared.
_EVERY = 100

_WHY = {"ulysses": "it has a query head for each rank", "allgather": "it has fewer query heads than there are ranks"}


class SequenceParallel(ModuleTechnique):
    """One run's sequences, shared along the mesh's sequence axis.

    Args:
        link: along this axis; None makes it from the mesh.
    """

    def __init__(self, facts: TechniqueFacts, config: SequenceConfig, link: AxisLink | None = None) -> None:
        self._facts = facts
        self._config = config
        self._num_batches = {True: 0, False: 0}
        self._num_equalized = 0
        self._module: nn.Module | None = None
        self._is_unshared = self._is_rehearsing = False
        self._verified: Comparison | None = None
        self._hugging_face = HuggingFaceAttention()
        self._flex = FlexAttention()
        self._guard = CustomFunctions(config.token_wise or ())
        self._checkpoints = Checkpoints()
        self._compiled = CompiledModules()
        self._parallel_modules = ParallelModules()
        self._own_outputs = OwnOutputs()
        link = link or AxisLink.along_sequence(facts.mesh)
        self._sharing = Sharing(link=link, mode=config.mode, num_chunks=config.head_chunks)

    def prepare(self, module: nn.Module) -> None:
        self._refuse_plan(module)
        self._check_compiled(module)
        self._parallel_modules.install(module)
        self._checkpoints.install()
        self._agree_on_random_numbers()
        self._guard.install()
        self._compiled.install(module, self._sharing)
        self._module = module
        self._hugging_face.install(module)
        self._flex.install(module)

    def _refuse_plan(self, module: nn.Module) -> None:
        """Refuse, on every rank, a plan of tensor parallelism that is not of tokens one by one on any rank."""
        if self._facts.mesh.tensor.size == 1:
            return
        refused = gather_objects(self._facts.mesh, why_not_token_wise(module))
        why = next((one for one in refused if one is not None), None)
        if why is not None:
            raise SequenceParallelError(
                f"sequence={self._config.size} with ZeroConfig.tensor_parallel={self._facts.mesh.tensor.size}: {why}"
            )

    def _check_compiled(self, module: nn.Module) -> None:
        """Refuse, on every rank, a LightningModule compiled as a whole, and ranks that compiled other parts of it."""
        own = [name for name, one in module.named_modules() if compilation_of(one) is not None]
        compiled = gather_objects(self._facts.mesh, (self._facts.is_compiled_whole, own))
        whole = [rank for rank, (is_whole, _) in enumerate(compiled) if is_whole]
        if whole:
            raise SequenceParallelError(
                f"sequence={self._config.size} with torch.compile({type(module).__name__}) on "
                f"rank{'s' if len(whole) > 1 else ''} {', '.join(map(str, whole))}: its steps are compiled with the "
                "losses in them, where nothing knows of tensors of which ranks have parts. Compile the modules in it: "
                "self.model = torch.compile(model), or block.compile() for each block."
            )
        for rank, (_, names) in enumerate(compiled):
            if names != compiled[0][1]:
                raise SequenceParallelError(
                    f"sequence={self._config.size}: rank 0 compiled {compiled[0][1] or 'no module'} of "
                    f"{type(module).__name__}, rank {rank} {names or 'none'}; ranks that share tokens run the same "
                    "graphs. Compile the same modules on every rank."
                )

    def connect(self, ranks: Communicator, link: Link | None) -> None:
        if self._module is not None:
            self._own_outputs.install(self._module)

    def batch(self, batch: Any, *, trains: bool) -> Any:
        """The same batch on every rank, whose tensors know their tokens.

        Raises:
            SequenceParallelError: on every rank: ranks of a group got other batches, or no tensor has tokens.
        """
        num, self._num_batches[trains] = self._num_batches[trains], self._num_batches[trains] + 1
        if self._config.check_batches and (num < self._config.check_batches or num % _EVERY == 0):
            self._compare(batch, num, trains=trains)
        return shared(batch, find_tokens(batch, self._config.dims), self._sharing)

    def _compare(self, batch: Any, num: int, *, trains: bool) -> None:
        everybody = gather_objects(self._facts.mesh, (self._facts.mesh.batch.rank, fingerprints(batch)))
        for group in sorted({said[0] for said in everybody}):
            ranks = [(rank, found) for rank, (other, found) in enumerate(everybody) if other == group]
            for rank, found in ranks[1:]:
                _check_equal(*ranks[0], rank, found, num, trains=trains)
        if trains:
            self._agree_on_random_numbers()

    def _agree_on_random_numbers(self) -> None:
        """Give the ranks of each group the random state of its first one, where they differ.

        They draw whole tensors alike: what is dropped, and, where a user's sampler is kept, the order of samples.
        """
        mesh, device = self._facts.mesh, self._facts.device
        own = random_state(device)
        digests = gather_objects(mesh, (mesh.batch.rank, hashlib.blake2b(repr(own).encode()).hexdigest()))
        if len(set(digests)) == len({group for group, _ in digests}):
            return
        self._num_equalized += 1
        states = gather_objects(mesh, (mesh.batch.rank, own if mesh.sequence.rank == mesh.tensor.rank == 0 else None))
        set_random_state(next(one for group, one in states if group == mesh.batch.rank and one is not None), device)

    def around_forward(self, *, trains: bool) -> AbstractContextManager[None]:
        return self._checked(trains=trains)

    @contextmanager
    def _checked(self, *, trains: bool) -> Iterator[None]:
        before = self._sharing.seen.num_entries
        yield
        if trains and not self._is_unshared and self._sharing.seen.num_entries == before:
            raise SequenceParallelError(
                f"sequence={self._config.size}: no layer of the training step met tokens of the batch, so nothing was "
                "shared among ranks. Layers take them from an embedding, a linear layer or a norm of a tensor of the "
                "batch; say which it is with SequenceConfig.dims, and do not copy it out of torch before."
            )

    def first_batch(self, batch: Any, rehearse: Rehearse) -> None:
        if self._config.verify is not None:
            self._verified = compare_first_batch(batch, self._sharing, self._facts.mesh, rehearse, self._unshared)

    @contextmanager
    def _unshared(self) -> Iterator[None]:
        """A context in which a step of plain tensors is one without this technique."""
        if self._module is None:
            raise AssertionError("a technique is prepared before it sees batches")
        self._is_unshared = True
        self._hugging_face.remove()
        try:
            yield
        finally:
            self._hugging_face.install(self._module)
            self._is_unshared = False

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        seen, attention = self._sharing.seen, dict(self._sharing.seen.attention)
        num_entries, self._is_rehearsing = seen.num_entries, True
        yield  # an error leaves it so: `cause_of` tells where it came from
        self._is_rehearsing, seen.num_entries = False, num_entries
        seen.attention.clear()
        seen.attention.update(attention)

    def cause_of(self, error: BaseException) -> str | None:
        if not self._is_rehearsing:
            return None
        return (
            "SequenceConfig.verify='first_batch' was running the training step on the first tokens of the first batch, "
            "in evaluation mode. A step that needs the whole length, or training mode, can't be verified: leave verify "
            "out."
        )

    def output(self, output: Any, *, trains: bool) -> Any:
        """What the step returned: losses as plain tensors, and in evaluation whole tensors of all tokens."""
        return tree_map(lambda x: _returned(x, gathers=not trains) if is_tensor(x) else x, output)

    def close(self) -> None:
        self._module = None
        self._flex.remove()
        self._parallel_modules.remove()
        self._own_outputs.remove()
        self._hugging_face.remove()
        self._compiled.remove()
        self._guard.remove()
        self._checkpoints.remove()

    def reasons(self) -> list[str]:
        verified = [] if self._verified is None else [self._verified.sentence()]
        attention, compiled = _how_ranks_attend(self._sharing), self._compiled.reasons()
        return [*attention, *compiled, *verified, *self._how_random()]

    def _how_random(self) -> list[str]:
        if not self._num_equalized:
            return []
        return [
            "random numbers: the ranks that share a batch drew other ones, and were given the first one's state "
            f"{self._num_equalized} time{'s' if self._num_equalized > 1 else ''}; seed_everything() makes them equal"
        ]


def _how_ranks_attend(sharing: Sharing) -> list[str]:
    """One sentence per kind of attention that ran, of the longest sequence that it had."""
    longest: dict[tuple[str, int, int], tuple[AttentionSeen, int]] = {}
    for met, nbytes in sharing.seen.attention.items():
        kind = (met.mode, met.num_heads, met.num_kv_heads)
        longest[kind] = max((met, nbytes), longest.get(kind, (met, nbytes)), key=lambda one: one[1])
    lines = []
    for met, nbytes in longest.values():
        why = _WHY[met.mode] if sharing.mode == "auto" else "as asked for"
        lines.append(
            f"sequence={sharing.link.size}: {met.num_heads} heads, {met.num_kv_heads} of keys and values, attend by "
            f"{met.mode} ({why}); a forward over {met.shape[1]} tokens sends {nbytes / 2**20:.3g} MiB from "
            "each rank and layer"
        )
    return lines


def _returned(x: Tensor, *, gathers: bool) -> Tensor:
    layout = layout_of(x)
    if isinstance(layout, Sharded):
        return layout.gather(plain(x)) if gathers else x
    return plain(x)


def _check_equal(
    first_rank: int, first: dict[str, str], rank: int, found: dict[str, str], num: int, *, trains: bool
) -> None:
    """Refuse batches of one group that differ. Every rank checks all, so that all refuse alike."""
    for place in first | found:
        if first.get(place) != found.get(place):
            raise SequenceParallelError(
                f"ranks {first_rank} and {rank} share the sequences of one batch, and got other ones: "
                f"{'training' if trains else 'evaluation'} batch {num} has {place or 'one tensor'} "
                f"{first.get(place, 'absent')} on rank {first_rank}, and {found.get(place, 'absent')} on rank {rank}. "
                "Let the strategy's sampler choose samples (use_distributed_sampler=True), or one that depends on "
                "trainer.strategy.distributed_sampler_kwargs alone, and seed what is random in data sets, workers and "
                "collate functions with seed_everything(seed, workers=True)."
            )


def random_state(device: torch.device) -> tuple[object, bytes, bytes]:
    """The states of Python's and torch's generators of random numbers, of the host and of the device."""
    host, on_device = torch.get_rng_state().numpy().tobytes(), b""
    if device.type != "cpu":
        on_device = torch.get_device_module(device).get_rng_state(device).numpy().tobytes()
    return random.getstate(), host, on_device


def set_random_state(state: tuple[Any, bytes, bytes], device: torch.device) -> None:
    """Set what `random_state` gave."""
    of_python, host, on_device = state
    random.setstate(of_python)
    torch.set_rng_state(torch.frombuffer(bytearray(host), dtype=torch.uint8))
    if on_device:
        tensor = torch.frombuffer(bytearray(on_device), dtype=torch.uint8)
        torch.get_device_module(device).set_rng_state(tensor, device)


def sequence_parallel(facts: TechniqueFacts) -> ModuleTechnique | None:
    """The sharing of one run's sequences; None where each rank has its own."""
    config = facts.sequence
    return SequenceParallel(facts, config) if config is not None and config.size > 1 else None
