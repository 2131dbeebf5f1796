"""The CUDA driver binding: clean refusal without a GPU, copies and callbacks with one."""

from __future__ import annotations

import pytest
import torch

from lightning_superscale.ops.cpu import flat
from lightning_superscale.ops.cpu.memory import HostBuffer
from lightning_superscale.ops.cpu.pool import Pool
from lightning_superscale.ops.cuda import runtime
from lightning_superscale.ops.native import loader
from tests.ops.paths import NATIVE, values

needs_native = pytest.mark.skipif(not NATIVE, reason="no native library")


def test_device_count_agrees_with_torch():
    expected = torch.cuda.device_count() if NATIVE else 0
    assert runtime.device_count() == expected
    with loader.without_native():
        assert runtime.device_count() == 0


@needs_native
@pytest.mark.skipif(runtime.device_count() > 0, reason="needs a machine without CUDA")
def test_calls_without_cuda_say_so():
    ticket = Pool(1).flag()
    for call in (
        lambda: runtime.pin(torch.zeros(4)),
        lambda: runtime.unpin(torch.zeros(4)),
        lambda: runtime.copy_d2h(0, 0, []),
        lambda: runtime.copy_h2d(0, 0, []),
        lambda: runtime.record_event(0, 0, 0),
        lambda: runtime.stream_wait_event(0, 0, 0),
        lambda: runtime.launch_notify(0, 0, ticket),
    ):
        with pytest.raises(RuntimeError, match="no CUDA"):
            call()
    assert not ticket.is_complete()


def test_copy_of_wrong_tensors_is_refused_by_index():
    with pytest.raises(ValueError, match="pair 0: expected a CPU and a CUDA tensor"):
        runtime.copy_d2h(0, 0, [(torch.zeros(4), torch.zeros(4))])
    with pytest.raises(ValueError, match="pair 0"):
        runtime.copy_h2d(0, 0, [(torch.zeros(4), torch.zeros(4))])
    with pytest.raises(ValueError, match="contiguous CPU tensor"):
        runtime.pin(torch.zeros(4, 4).t())


@pytest.mark.gpu
@needs_native
@pytest.mark.skipif(runtime.device_count() == 0, reason="needs a CUDA device")
def test_copies_and_notify_on_a_stream():
    device = torch.device("cuda", 0)
    stream = torch.cuda.Stream(device)
    numel = 1_000_000
    host = HostBuffer(numel * 4, pin=True).tensor(torch.float32, numel)
    back = HostBuffer(numel * 4, pin=True).tensor(torch.float32, numel)
    assert host.is_pinned()
    host.copy_(values(numel))
    remote = torch.empty(numel, device=device)
    stream.wait_stream(torch.cuda.current_stream())
    runtime.copy_h2d(0, stream.cuda_stream, [(remote, host)])
    runtime.copy_d2h(0, stream.cuda_stream, [(back, remote)])
    result = torch.empty(numel)
    ticket = flat.submit_copy(result, back, held=True)
    runtime.launch_notify(0, stream.cuda_stream, ticket)
    ticket.wait()
    assert torch.equal(result, host)
    event = torch.cuda.Event()
    event.record(stream)
    runtime.record_event(0, event.cuda_event, stream.cuda_stream)
    runtime.stream_wait_event(0, torch.cuda.current_stream().cuda_stream, event.cuda_event)
    torch.cuda.synchronize()
