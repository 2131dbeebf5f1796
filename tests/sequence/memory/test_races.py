"""On a device with streams: no copy of an activation touches memory that other work may use, and planted bugs show."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch

from lightning_superscale.offload.link.link import CudaLink
from lightning_superscale.ops.events import StreamEvent
from lightning_superscale.sequence.memory import activation_offload
from lightning_superscale.sequence.memory.activation_offload import ActivationOffload
from lightning_superscale.sequence.memory.checkpointing import BlockCheckpoints
from lightning_superscale.sequence.memory.eight_bit import EightBitCodec
from tests.helpers.extent import IS_ALL
from tests.races.stand_in import playing
from tests.races.world import World
from tests.sequence.memory.test_activation_offload import CPU, POLICIES, PROGRAMS, Model, one_batch, two_backwards


def run(program, *, plant=lambda patch: None, queries="random", num_in_flight=2, codec=None) -> World:
    world = World(queries)
    with playing(world), pytest.MonkeyPatch.context() as patch:
        plant(patch)
        torch.manual_seed(0)
        model = Model()
        offload = ActivationOffload(CudaLink(CPU), CPU, num_in_flight=num_in_flight, codec=codec)
        checkpoints = BlockCheckpoints(dict(enumerate(model.blocks)), POLICIES["inputs"], offload)
        for _ in range(3):
            program(model, torch.float32)
        checkpoints.close()
        offload.close()
        del offload, checkpoints, model
        gc.collect()  # host buffers are unmapped while the checker looks
    return world


EVERY = list(itertools.product(PROGRAMS, ("no", "random", "yes"), (1, 2)))
# Each program twice, with both numbers; the answers of queries take turns.
FEW = [(program, ("no", "random", "yes")[(i + n) % 3], n) for i, program in enumerate(PROGRAMS) for n in (1, 2)]


@pytest.mark.parametrize(("program", "queries", "num_in_flight"), EVERY if IS_ALL else FEW)
def test_no_access_is_without_an_order(program, queries, num_in_flight):
    world = run(program, queries=queries, num_in_flight=num_in_flight)
    assert world.num_accesses > 100
    assert not world.races, "\n".join(map(str, world.races))


def test_no_access_in_8_bits_is_without_an_order():
    world = run(two_backwards, codec=EightBitCodec())
    assert not world.races, "\n".join(map(str, world.races))


def a_dropped_graph(model, dtype):
    """The first blocks' inputs are under way to the device when backward ends at a block that wants no more."""
    for block in model.blocks:
        block.watch = lambda: None
    loss = model(torch.ones(2, 8, 3)).square().mean()
    last = model.blocks[-1]
    torch.autograd.grad(loss, [last.up.weight])  # recomputes the last block, for which the others' inputs come


def test_copies_that_nobody_waits_for_are_ordered_before_their_memory_is_used_again():
    world = run(a_dropped_graph)
    assert not world.races, "\n".join(map(str, world.races))


def does_not_say_that_it_used_it(patch):
    patch.setattr(activation_offload, "note_use", lambda tensor: None)


def does_not_wait_for_copies_back(patch):
    patch.setattr(StreamEvent, "wait", lambda self, stream=None: None)


def copies_back_what_has_not_left(patch):
    real = activation_offload._OnHost.start

    def start(self):
        self._parts = [part._replace(has_left=Never()) for part in self._parts]
        return real(self)

    patch.setattr(activation_offload._OnHost, "start", start)


def lets_go_of_copies_under_way(patch):
    def delete(self):
        for part in self._parts:
            self._pool.put_back(part.buffer)

    patch.setattr(activation_offload._OnHost, "__del__", delete)


class Never:
    def wait(self):
        return


@pytest.mark.parametrize(
    ("bug", "program"),
    [
        (does_not_say_that_it_used_it, one_batch),
        (does_not_wait_for_copies_back, one_batch),
        (copies_back_what_has_not_left, one_batch),
        (lets_go_of_copies_under_way, a_dropped_graph),
    ],
    ids=lambda value: value.__name__,
)
def test_a_planted_bug_is_found(bug, program):
    assert run(program, plant=bug, queries="no").races
