"""Bugs to plant: each makes the package wrong in a way that most runs would not show. The checker has to find it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch

from lightning_superscale.offload.link import dtype as link_dtype
from lightning_superscale.offload.link import link
from lightning_superscale.offload.superoffload import state, step
from lightning_superscale.offload.weight_flow import weights
from lightning_superscale.offload.zenflow import step as zenflow_step
from lightning_superscale.offload.zenflow.host_work import HostWork
from lightning_superscale.ops.cpu import memory
from lightning_superscale.ops.events import StreamEvent
from lightning_superscale.ops.threads import one_thread
from lightning_superscale.zero.buckets import all_gather
from lightning_superscale.zero.buckets import unit as buckets_unit
from lightning_superscale.zero.fsdp2 import unit as fsdp2_unit
from tests.helpers.programs import extra_backward_of_a_part
from tests.races import nccl
from tests.races.cases import Case
from tests.races.ranks import Run, run_buckets, run_sharded

Plant = Callable[[pytest.MonkeyPatch], None]
# By name, the bug, and a run that shows it.
PLANTS: dict[str, tuple[Plant, Case]] = {}
PLANTS_OVER_RANKS: dict[str, tuple[Plant, Run, Case]] = {}

STAYS = Case("superoffload", queries="no")
FLOWS = Case("superoffload", flows=True, queries="no")
LATE_GRADIENTS = Case("superoffload", extra_backward_of_a_part, dtype=torch.bfloat16, link_dtype="fp32")
ZENFLOW = Case("zenflow, one step late", queries="no")
LOOKS = Case("superoffload, held", looks=True, queries="no")


def plant(shown_by: Case) -> Callable[[Plant], Plant]:
    def add(function: Plant) -> Plant:
        PLANTS[function.__name__] = (function, shown_by)
        return function

    return add


def plant_over_ranks(run: Run, shown_by: Case) -> Callable[[Plant], Plant]:
    def add(function: Plant) -> Plant:
        PLANTS_OVER_RANKS[f"{function.__name__}, {run.__name__}"] = (function, run, shown_by)
        return function

    return add


@plant(ZENFLOW)
def deferred_weights_are_placed_before_they_arrived(patch):
    patch.setattr(StreamEvent, "wait", lambda self, stream=None: None)


@plant(Case("zenflow, at once", queries="no"))
def gradients_arrive_where_the_host_still_adds_up_the_last_ones(patch):
    patch.setattr(HostWork, "wait_added_of", lambda self, unit: None)


@plant(ZENFLOW)
def a_window_is_applied_before_its_gradients_are_added_up(patch):
    def update(self, arrivals, work):
        self._updating = one_thread("another thread").submit(work)

    patch.setattr(HostWork, "update", update)


@plant(Case("zenflow, one step late", looks=True, queries="no"))
def moments_are_read_while_the_host_steps_them(patch):
    patch.setattr(zenflow_step.LateMoments, "expect", lambda self, index, params: None)


@plant(STAYS)
def gradients_are_copied_before_backward_made_them(patch):
    def d2h(self, dst, src):
        with torch.cuda.stream(self._d2h_stream):
            dst.copy_(src.to(dst.dtype), non_blocking=True)
        src.record_stream(self._d2h_stream)
        return StreamEvent(self._d2h_stream)

    patch.setattr(link.CudaLink, "d2h", d2h)


@plant(STAYS)
def gradients_are_given_back_before_they_are_copied(patch):
    patch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)


@plant(FLOWS)
def weights_are_uploaded_while_forward_reads_the_old_ones(patch):
    real = link.CudaLink.h2d

    class Nothing:
        def wait(self, stream):
            return None

    patch.setattr(link.CudaLink, "h2d", lambda self, dst, src, after=None: real(self, dst, src, Nothing()))


@plant(STAYS)
def forward_does_not_wait_for_uploads(patch):
    patch.setattr(StreamEvent, "wait", lambda self, stream=None: None)


@plant(STAYS)
def the_host_reads_gradients_before_they_arrived(patch):
    def grad(self, i):
        known = self._slices[i]
        return None if known.arrival is None else self._span(self._buffers[known.front], i)

    patch.setattr(state.DeferredState, "grad", grad)


@plant(LATE_GRADIENTS)
def a_late_gradient_is_added_before_it_arrived(patch):
    def add(this_link, here, grad, dtype, arrival):
        staged = link_dtype.torch.empty_like(here)
        link_dtype.send_gradient(this_link, staged, grad, dtype)
        arrival.synchronize()
        link_dtype.accumulate(here, staged)

    patch.setattr(state, "add_late_gradient", add)


@plant(LATE_GRADIENTS)
def a_late_gradient_meets_a_look_ahead(patch):
    real = step.DeferredStep.add_grads

    def add_grads(self, delta, state):
        kept, self._looking = self._looking, {}
        try:
            real(self, delta, state)
        finally:
            self._looking = kept | self._looking

    patch.setattr(step.DeferredStep, "add_grads", add_grads)


@plant(LOOKS)
def gradients_are_zeroed_in_place_while_they_are_copied(patch):
    patch.setattr(state.DeferredState, "order_after_copies", lambda self: None)


@plant(LOOKS)
def moments_are_read_while_the_worker_writes_them(patch):
    patch.setattr(step.LateMoments, "expect", lambda self, index, params: None)


@plant(FLOWS)
def flowing_weights_leave_while_their_copies_arrive(patch):
    real = weights.FlowingWeights.release

    def release(self):
        self._copies = []
        real(self)

    patch.setattr(weights.FlowingWeights, "release", release)


@plant(FLOWS)
def flowing_weights_arrive_in_memory_that_is_still_used(patch):
    real = weights.FlowingWeights._want

    def want(self, *, are_on_host):
        fence = self._link.fence()
        has_memory = bool(self.device_bytes)
        kept, self._link = self._link, _NoCopies(self._link)
        real(self, are_on_host=False)
        self._link = kept
        if not has_memory and self.device_bytes:
            self._fence = fence
        real(self, are_on_host=are_on_host)

    patch.setattr(weights.FlowingWeights, "_want", want)


class _NoCopies:
    def __init__(self, real):
        self.fence = real.fence


@plant(STAYS)
def edits_are_read_before_they_are_on_the_host(patch):
    real = link.CudaLink.d2h

    class Hasty(StreamEvent):
        def synchronize(self):
            return None

    def d2h(self, dst, src):
        real(self, dst, src)
        return Hasty(self._d2h_stream)

    patch.setattr(link.CudaLink, "d2h", d2h)


@plant(STAYS)
def host_buffers_are_unmapped_while_uploads_read_them(patch):
    real = memory.HostBuffer.__init__
    patch.setattr(memory.HostBuffer, "__init__", lambda self, nbytes, pin=False, **rest: real(self, nbytes, **rest))


# Over ranks


@plant_over_ranks(run_buckets, STAYS)
@plant_over_ranks(run_sharded, STAYS)
def the_worker_takes_memory_that_forward_still_uses(patch):
    patch.setattr(link.CudaLink, "allocating", lambda self: contextlib.nullcontext())


@plant_over_ranks(run_buckets, STAYS)
@plant_over_ranks(run_sharded, STAYS)
def memory_of_an_upload_is_given_back_while_it_is_unpacked(patch):
    patch.setattr(buckets_unit, "note_use", lambda tensor: None)
    patch.setattr(fsdp2_unit, "note_use", lambda tensor: None)


@plant_over_ranks(run_buckets, STAYS)
def rows_are_gathered_before_they_arrived(patch):
    def issue(self, unit, event):
        with self._on_stream_of(unit):
            event.is_waitable()
            return self._collectives.all_gather(unit.gathered())

    patch.setattr(all_gather.GatherThread, "_issue", issue)


@plant_over_ranks(run_buckets, STAYS)
def rows_are_unpacked_before_they_are_gathered(patch):
    patch.setattr(nccl.Work, "wait", lambda self, timeout=None: None)


@plant_over_ranks(run_buckets, FLOWS)
def weights_are_read_before_they_are_home(patch):
    patch.setattr(weights.FlowingWeights, "_await_landing", lambda self: None)
