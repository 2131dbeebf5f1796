"""The contract of events, held against every class that implements it ([Note: Events])."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from lightning_superscale.comm.collectives import InFlight
from lightning_superscale.offload.link.link import CpuLink
from lightning_superscale.offload.superoffload.step import SettledWeights, _Settled
from lightning_superscale.offload.weight_flow.weights import LateUpload
from lightning_superscale.ops.cpu.pool import Pool
from lightning_superscale.ops.events import AllOf, Done, FutureEvent, StreamEvent
from lightning_superscale.ops.update import HostUpdate, QueuedUpdate
from lightning_superscale.timeline import Timeline

WAIT_S = 20.0
STILL_S = 0.02


class Case(NamedTuple):
    """An event whose work is under way.

    Attributes:
        finish: lets the work complete.
        blocks: `wait` blocks the calling thread until then; otherwise it orders a stream, and is possible at once.
        has_result: what `wait` returns is to be compared with "result".
    """

    event: Any
    finish: Callable[[], object]
    blocks: bool = True
    has_result: bool = False


class Device:
    """What a GPU's streams and events do, without one: work is through when the test says so."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", 1)
        self.entered: list[torch.device] = []
        self.is_through = threading.Event()
        self.ordered: list[object] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = self

        class DeviceEvent:
            def record(self, stream) -> None:
                assert stream is device

            def query(self) -> bool:
                return device.is_through.is_set()

            def synchronize(self) -> None:
                device.synchronize()

        monkeypatch.setattr(torch.cuda, "Event", DeviceEvent)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _device=None: device)
        monkeypatch.setattr(torch.cuda, "device", lambda index: self.entered.append(index) or nullcontext())

    def wait_event(self, event) -> None:
        self.ordered.append(event)

    def synchronize(self) -> None:
        assert self.is_through.wait(WAIT_S)


class Work:
    """A collective of torch's, of a backend that blocks in `wait` (gloo) or one that orders streams (NCCL)."""

    def __init__(self, device: Device, *, blocks: bool) -> None:
        self._device, self._blocks = device, blocks

    def is_completed(self) -> bool:
        return self._device.is_through.is_set()

    def wait(self) -> None:
        if self._blocks:
            self._device.synchronize()


def done(_device: Device) -> Case:
    return Case(Done("result"), lambda: None, has_result=True)


def future(_device: Device) -> Case:
    of: Future[str] = Future()
    return Case(FutureEvent(of), lambda: of.set_result("result"), has_result=True)


def ticket(_device: Device) -> Case:
    flag = Pool(1).flag()
    return Case(flag, flag.release)


def all_of(_device: Device) -> Case:
    first, second = Pool(1).flag(), Future()
    return Case(
        AllOf([Done(None), first, FutureEvent(second)]), lambda: (first.release(), second.set_result(None)), blocks=True
    )


def stream(device: Device) -> Case:
    return Case(StreamEvent(device), device.is_through.set, blocks=False)


def collective(device: Device) -> Case:
    works = [Work(device, blocks=True) for _ in range(2)]
    event = InFlight(works, lambda: torch.ones(1), None, "test", can_look=False, orders_streams=False)
    return Case(event, device.is_through.set)


def collective_on_a_stream(device: Device) -> Case:
    result = SimpleNamespace(device=torch.device("cuda"))
    works = [Work(device, blocks=False)]
    event = InFlight(works, lambda: result, None, "test", can_look=False, orders_streams=True)
    return Case(event, device.is_through.set, blocks=False)


def update(_device: Device) -> Case:
    flag = Pool(1).flag()
    return Case(HostUpdate(flag), flag.release)


def queued_update(device: Device) -> Case:
    return Case(QueuedUpdate(list), device.is_through.set, blocks=False)


def settled(_device: Device) -> Case:
    of, upload = Future(), Future()
    return Case(
        SettledWeights(of),
        lambda: (of.set_result(_Settled([], 0, False, FutureEvent(upload))), upload.set_result(None)),
    )


def late_upload(device: Device) -> Case:
    return Case(LateUpload(lambda: [StreamEvent(device)]), device.is_through.set, blocks=False)


EVENTS = [done, future, ticket, all_of, stream, collective, collective_on_a_stream]
WAITABLES = [update, queued_update, settled, late_upload]


@pytest.fixture
def device(monkeypatch) -> Device:
    made = Device()
    made.install(monkeypatch)
    return made


def named(makers):
    return pytest.mark.parametrize("make", makers, ids=lambda make: make.__name__)


def assert_blocks_until(verb: Callable[[], object], finish: Callable[[], object]) -> None:
    returned = threading.Event()
    thread = threading.Thread(target=lambda: (verb(), returned.set()), daemon=True)
    thread.start()
    assert not returned.wait(STILL_S)
    finish()
    assert returned.wait(WAIT_S)
    thread.join()


@named(EVENTS + WAITABLES)
def test_wait_blocks_exactly_where_the_event_is_not_waitable(make, device):
    case = make(device)
    if make is done:
        assert case.event.is_waitable()
    elif case.blocks:
        assert not case.event.is_waitable()
        assert_blocks_until(case.event.wait, case.finish)
    else:
        assert case.event.is_waitable()
        case.event.wait()
        case.finish()
    assert case.event.is_waitable()


@named([make for make in EVENTS if make is not done])
def test_synchronize_blocks_exactly_until_the_event_is_complete(make, device):
    case = make(device)
    assert not case.event.is_complete()
    assert_blocks_until(case.event.synchronize, case.finish)
    assert case.event.is_complete()
    assert case.event.is_waitable()


@named(EVENTS + WAITABLES)
def test_what_has_completed_can_be_asked_and_waited_for_again(make, device):
    case = make(device)
    case.finish()
    for _ in range(2):
        found = case.event.wait()
        assert found == "result" or not case.has_result
        assert case.event.is_waitable()
        if make in EVENTS:
            case.event.synchronize()
            assert case.event.is_complete()


def test_collectives_make_their_result_once():
    made = []
    event = InFlight([], lambda: made.append(1) or torch.ones(1), None, "test", can_look=False, orders_streams=False)
    assert event.wait() is event.wait()
    assert made == [1]


@pytest.mark.parametrize("verb", ["wait", "synchronize"])
def test_a_failure_is_raised_by_whoever_waits(verb):
    failed: Future[None] = Future()
    failed.set_exception(ValueError("broken"))
    for event in (FutureEvent(failed), AllOf([Done(None), FutureEvent(failed)])):
        assert event.is_complete()
        with pytest.raises(ValueError, match="broken"):
            getattr(event, verb)()
    cancelled = Pool(1).flag()
    cancelled.cancel()
    assert cancelled.is_complete()
    with pytest.raises(RuntimeError, match="cancelled"):
        getattr(cancelled, verb)()


def test_a_stream_event_orders_the_stream_that_it_is_given_and_keeps_a_tensor(device):
    other = Device()
    kept = torch.ones(1)
    event = StreamEvent(device, keep=kept)
    event.wait(other)
    event.wait()
    assert len(other.ordered) == len(device.ordered) == 1
    # A thread's first call of CUDA makes a context, of half a gigabyte, on the device that is current there.
    assert not device.entered
    event.is_complete()
    device.is_through.set()
    event.synchronize()
    assert device.entered == [device.device] * 2
    assert any(value is kept for value in vars(event).values())


@pytest.mark.parametrize("is_recorded", [False, True], ids=["by the pool", "by the link's thread"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["bytes", "cast"])
def test_copies_of_a_link_are_events(is_recorded, dtype):
    timeline = Timeline(torch.device("cpu"))
    if is_recorded:
        timeline.open()
    link, host = CpuLink(timeline), torch.arange(4096.0)
    there = torch.zeros(4096, dtype=dtype)
    event = link.h2d(there, host)
    event.wait()
    event.synchronize()
    assert event.is_complete()
    assert event.is_waitable()
    assert torch.equal(there, host.to(dtype))
    back = torch.zeros(4096, dtype=dtype)
    event = link.d2h(back, there)
    assert event.is_complete()
    assert torch.equal(back, there)
