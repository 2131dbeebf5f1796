"""The CUDA driver binding: clean refusal without a GPU, copies and callbacks with one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

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


# With a driver that only writes down what it is asked for


@pytest.fixture(scope="module")
def fake_driver(tmp_path_factory):
    """The folder of a libcuda.so.1 that has two devices and no memory."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).with_name("fake_driver.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "libcuda.so.1", source], check=True)
    return folder


def calls_of(fake_driver, tmp_path, script: str, **environment: str) -> tuple[list[str], str]:
    """What the driver was asked for by a script, and what the script said on stderr."""
    log = tmp_path / "calls"
    log.touch()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "LD_LIBRARY_PATH": str(fake_driver), "FAKE_CUDA_LOG": str(log), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return log.read_text().splitlines(), done.stderr


@needs_native
def test_pinned_memory_is_unregistered_when_its_device_is_idle_and_on_no_other_device(fake_driver, tmp_path):
    calls, _ = calls_of(
        fake_driver,
        tmp_path,
        """
        import gc, threading
        import torch
        from lightning_superscale.offload.link.arena import HostArena
        kept = []
        worker = lambda: kept.append(HostArena(device=1).zeros(1000, torch.float32, is_pinned=True))
        for work in (worker, kept.clear):  # threads that torch has not used have no context
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        gc.collect()
        """,
    )
    assert calls == ["register on 1", "synchronize on 1", "unregister on 1"]


@needs_native
def test_memory_that_cannot_be_page_locked_is_used_pageable_with_a_warning(fake_driver, tmp_path):
    calls, said = calls_of(
        fake_driver,
        tmp_path,
        """
        import torch
        from lightning_superscale.ops.cpu.memory import HostBuffer
        buffers = [HostBuffer(4096, pin=True) for _ in range(2)]
        assert not any(buffer.is_pinned for buffer in buffers)
        assert not buffers[0].tensor(torch.float32, 1024).any()
        """,
        FAKE_CUDA_REFUSES="1",
    )
    assert calls == []
    assert said.count("Copies to and from the GPU do not overlap") == 1
    assert "cuMemHostRegister failed: NOT_SUPPORTED (801)" in said
    assert "ulimit -l" in said
