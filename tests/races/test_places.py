"""Where things are: gradients leave the device, norms are taken there, and a weight's place changes no bit."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch

from lightning_superscale.checkpoint.save import background
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.offload.link.link import CudaLink
from lightning_superscale.offload.superoffload import step as superoffload_step
from lightning_superscale.optim import adamw_step
from lightning_superscale.optim.clipping import ClipByNorm
from tests.helpers.engines import build_engine
from tests.offload.weight_flow.test_schedule import ADAMW, Stack, batches, enter, flow_of
from tests.races.cases import WAYS
from tests.races.stand_in import playing
from tests.races.world import World


@contextlib.contextmanager
def training(way: str, *, flows: bool = False, dtype: torch.dtype = torch.bfloat16, queries: str = "yes"):
    """A world, and a function that trains one step, clipped or not."""
    world = World(queries)
    with playing(world):
        model = Stack(4, dtype=dtype)
        optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
        flow = flow_of(model, None) if flows else None
        link = CudaLink(torch.device("cpu"))
        engine = build_engine(model, optimizer, is_offloaded=True, link=link, flow=flow, **WAYS[way])

        def backward() -> None:
            if flow is None:
                engine.transport.wait_all_published()
            else:
                enter(engine, flow)
            optimizer.zero_grad()
            model.loss(batches(1, dtype)[0]).backward()
            if flow is not None:
                flow.rest()

        def step(*, clips: bool) -> None:
            if clips:
                engine.request_clip(ClipByNorm(0.05))
            engine.step()

        yield world, engine, backward, step
        engine.quiesce()  # else its threads work on in the world of a later test


@pytest.mark.parametrize("flows", [False, True])
def test_gradients_that_were_copied_leave_the_device(flows):
    with training("superoffload", flows=flows) as (world, engine, backward, step):
        for _ in range(2):
            gc.collect()
            before = world.allocated
            backward()
            for state in engine.states:
                state.has_arrived()
            gc.collect()
            grads = sum(p.numel() * p.element_size() for p in engine.params())
            assert world.peak - before > grads // 8  # some were there at one time
            assert world.allocated - before < grads // 8
            step(clips=False)


@pytest.mark.parametrize("way", ["cpu", "superoffload"])
def test_norms_are_taken_on_the_device_whatever_the_step_before_did(way, monkeypatch):
    where: list[str] = []
    with training(way) as (world, engine, backward, step):
        early = engine._judge._early
        real = early._measure

        def measure(grads):
            where.extend("host" if world.allocation_of(grad).is_on_host else "device" for grad in grads)
            return real(grads)

        monkeypatch.setattr(early, "_measure", measure)
        for clips in (True, True, False, True):
            where.clear()
            backward()
            step(clips=clips)
            assert set(where) == {"device"} or not clips


@pytest.mark.parametrize("way", ["cpu", "superoffload"])
def test_the_square_root_does_not_follow_where_a_weight_lies(way, monkeypatch):
    """It is the one of the device that the model runs on, whether the weight is in host memory now or not."""
    asked: list[torch.device] = []
    for module in (adamw_step, superoffload_step):
        real = module.adamw_hyper

        def adamw_hyper(*args, device, real=real):
            asked.append(device)
            return real(*args, device=device)

        monkeypatch.setattr(module, "adamw_hyper", adamw_hyper)
    elsewhere = torch.device("cpu", 0)  # another spelling of the device, so that it differs from a parameter's
    with training(way, flows=True) as (_, engine, backward, step):
        for unit in engine.transport.units:
            monkeypatch.setattr(type(unit), "device", property(lambda self: elsewhere))
        for _ in range(2):
            backward()
            step(clips=False)
        engine.flush()
    assert set(asked) == {elsewhere}


@pytest.mark.parametrize("way", ["cpu", "superoffload"])
def test_a_copy_in_the_capture_of_a_graph_is_refused_by_name(way, monkeypatch):
    with training(way) as (_, engine, backward, step):
        backward()
        step(clips=False)
        engine.transport.wait_all_published()
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            with pytest.raises(SuperScaleError, match="a CUDA graph is being captured.*strategy='superscale'"):
                backward()
        engine.discard_gradients()
        backward()
        step(clips=False)


def test_a_snapshot_waits_for_the_step_and_keeps_what_it_copies():
    def snapshot(world: World, slabs: background._Slabs) -> None:
        made = torch.ones(100) * 2  # by the stream that computes, just now
        slabs.copy("place", made)
        del made
        slabs.record()
        torch.ones(100) + 1  # forward goes on, in the memory that was given back
        slabs.synchronize()

    class NoWait(background._Slabs):
        def copy(self, place, tensor):
            with torch.cuda.stream(torch.cuda.Stream(tensor.device)):
                return torch.empty_like(tensor).copy_(tensor, non_blocking=True)

    for slabs, is_clean in ((background._Slabs(), True), (NoWait(), False)):
        world = World("no")
        with playing(world):
            snapshot(world, slabs)
            assert (not world.races) is is_clean
