"""The CUDA driver binding: clean refusal without a GPU, copies and callbacks with one."""

from __future__ import annotations

import pytest
import torch

from lightning_superscale.ops import _lib, cuda_rt, flat
from lightning_superscale.ops.memory import HostBuffer
from lightning_superscale.ops.pool import Pool
from tests.ops.paths import NATIVE, values

needs_native = pytest.mark.skipif(not NATIVE, reason="no native library")


def test_device_count_agrees_with_torch():
    expected = torch.cuda.device_count() if NATIVE else 0
    assert cuda_rt.device_count() == expected
    with _lib.without_native():
        assert cuda_rt.device_count() == 0


@needs_native
@pytest.mark.skipif(cuda_rt.device_count() > 0, reason="needs a machine without CUDA")
def test_calls_without_cuda_say_so():
    ticket = Pool(1).flag()
    for call in (
        lambda: cuda_rt.pin(torch.zeros(4)),
        lambda: cuda_rt.unpin(torch.zeros(4)),
        lambda: cuda_rt.copy_d2h(0, 0, []),
        lambda: cuda_rt.copy_h2d(0, 0, []),
        lambda: cuda_rt.record_event(0, 0, 0),
        lambda: cuda_rt.stream_wait_event(0, 0, 0),
        lambda: cuda_rt.launch_notify(0, 0, ticket),
    ):
        with pytest.raises(RuntimeError, match="no CUDA"):
            call()
    assert not ticket.done()


def test_copy_of_wrong_tensors_is_refused_by_index():
    with pytest.raises(ValueError, match="pair 0: expected a CPU and a CUDA tensor"):
        cuda_rt.copy_d2h(0, 0, [(torch.zeros(4), torch.zeros(4))])
    with pytest.raises(ValueError, match="pair 0"):
        cuda_rt.copy_h2d(0, 0, [(torch.zeros(4), torch.zeros(4))])
    with pytest.raises(ValueError, match="contiguous CPU tensor"):
        cuda_rt.pin(torch.zeros(4, 4).t())


@pytest.mark.gpu
@needs_native
@pytest.mark.skipif(cuda_rt.device_count() == 0, reason="needs a CUDA device")
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
    cuda_rt.copy_h2d(0, stream.cuda_stream, [(remote, host)])
    cuda_rt.copy_d2h(0, stream.cuda_stream, [(back, remote)])
    result = torch.empty(numel)
    ticket = flat.submit_copy(result, back, held=True)
    cuda_rt.launch_notify(0, stream.cuda_stream, ticket)
    ticket.wait()
    assert torch.equal(result, host)
    event = torch.cuda.Event()
    event.record(stream)
    cuda_rt.record_event(0, event.cuda_event, stream.cuda_stream)
    cuda_rt.stream_wait_event(0, torch.cuda.current_stream().cuda_stream, event.cuda_event)
    torch.cuda.synchronize()
