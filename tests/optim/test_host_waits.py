"""The launching thread waits for no more of the device's work than a step needs."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.overrides import TorchFunctionMode

from lightning_superscale.offload.link.link import CpuLink
from lightning_superscale.ops.cuda import kernels
from lightning_superscale.ops.update import update_path
from lightning_superscale.optim.clipping import ClipByNorm
from tests.helpers.engines import build_engine
from tests.helpers.plain import PlainMasterAdamW
from tests.helpers.programs import Programs, plain_backward

ADAMW = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)}


def batch(step: int, dtype=torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 12, generator=generator).to(dtype)


class LazyCopy:
    """A copy to the host that happens when somebody waits for it, and not before."""

    def __init__(self, dst, src, waits) -> None:
        self._dst, self._src, self._waits = dst, src, waits
        self._lock = threading.Lock()

    def is_waitable(self) -> bool:
        return True

    def is_complete(self) -> bool:
        return self._src is None

    def wait(self) -> None:
        """Orders the device after the copy."""
        with self._lock:
            if self._src is not None:
                self._dst.copy_(self._src)
                self._src = None

    def synchronize(self) -> None:
        self._waits.append(threading.current_thread() is threading.main_thread())
        self.wait()


class LazyLink(CpuLink):
    """Copies to the host as late as they may be.

    Attributes:
        waits: of each time that a thread waited for one, whether it was the launching thread.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[bool] = []

    def d2h(self, dst, src):
        return LazyCopy(dst, src, self.waits)


def lazy_engine(model, *, is_deferred: bool, is_streamed: bool):
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    link = LazyLink()
    engine = build_engine(
        model,
        optimizer,
        is_offloaded=True,
        is_streamed=is_streamed,
        is_deferred=is_deferred,
        unit_bytes=300,
        link=link,
    )
    return optimizer, engine, link


@pytest.mark.parametrize("is_deferred", [False, True], ids=["cpu", "superoffload"])
def test_no_copy_is_awaited_before_a_verdict_whose_norms_were_taken_early(is_deferred, monkeypatch):
    plain, model = Programs(torch.bfloat16), Programs(torch.bfloat16)
    oracle = PlainMasterAdamW(plain.parameters(), max_norm=0.05, **ADAMW)
    optimizer, engine, link = lazy_engine(model, is_deferred=is_deferred, is_streamed=True)
    by_verdict: list[int] = []
    judge = engine._judge.judge

    def judged(*args):
        verdict = judge(*args)
        by_verdict.append(sum(link.waits))
        return verdict

    monkeypatch.setattr(engine._judge, "judge", judged)
    by_step = []
    for step in range(4):
        oracle.zero_grad()
        plain_backward(plain, batch(step))
        oracle.step()
        engine.transport.wait_all_published()
        optimizer.zero_grad()
        link.waits.clear()
        plain_backward(model, batch(step))
        engine.request_clip(ClipByNorm(0.05))
        engine.step()
        by_step.append(sum(link.waits))
    engine.transport.wait_all_published()
    engine.close()
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
    assert by_verdict == [0, 0, 0, 0]
    assert all(num > 0 for num in by_step[1:]) is not is_deferred  # another thread steps there, and waits


@pytest.mark.parametrize("is_deferred", [False, True], ids=["cpu", "superoffload"])
def test_gradients_in_param_grad_may_be_zeroed_in_place_right_after_the_step(is_deferred):
    plain, model = Programs(torch.bfloat16), Programs(torch.bfloat16)
    oracle = PlainMasterAdamW(plain.parameters(), **ADAMW)
    optimizer, engine, _ = lazy_engine(model, is_deferred=is_deferred, is_streamed=False)
    for step in range(3):
        oracle.zero_grad()
        plain_backward(plain, batch(step))
        oracle.step()
        plain_backward(model, batch(step))
        engine.step()
        optimizer.zero_grad(set_to_none=False)
        engine.transport.wait_all_published()
    engine.close()
    used = {name for name, param in plain.named_parameters() if param.grad is not None}
    for name, param in model.named_parameters():
        if name in used:
            assert torch.equal(param, plain.get_parameter(name)), name


class DeviceDouble(TorchFunctionMode):
    """Takes every tensor for the device's, but for those that it is told of, and notes who reads one on the host."""

    READS = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__", "__contains__", "equal")

    def __init__(self, on_host) -> None:
        super().__init__()
        self._on_host = {id(tensor) for tensor in on_host}
        self.reads: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        to_host = name == "to" and "cpu" in [str(value) for value in (*args[1:], *(kwargs or {}).values())]
        if (name in self.READS or to_host) and id(args[0]) not in self._on_host:
            self.reads.append(name)
        return func(*args, **(kwargs or {}))


def test_the_double_notes_every_way_of_reading():
    tensor, own = torch.tensor(1.0), torch.tensor(2.0)
    with DeviceDouble([own]) as double:
        assert tensor.item() == 1.0 == float(tensor) == int(tensor)
        assert bool(tensor)
        assert bool(tensor.isfinite())
        assert (tensor.cpu() + tensor.to("cpu") + tensor.to(device="cpu")).tolist() == 3.0
        assert float(own) == 2.0
    assert sorted(double.reads) == sorted(
        ["item", "__float__", "__int__", "__bool__", "__bool__", "cpu", "to", "to", "tolist"]
    )


@pytest.mark.parametrize("make", ["AdamW", "SGD"])
@pytest.mark.parametrize("clip", [None, 0.05, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16-true"])
def test_a_resident_step_reads_nothing_of_the_device(clip, dtype, make, monkeypatch):
    monkeypatch.setattr(kernels, "unavailable_reason", lambda: "a double of the device has no kernels")
    plain, model = Programs(dtype), Programs(dtype)
    oracle = PlainMasterAdamW(plain.parameters(), max_norm=clip, **ADAMW)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    if make == "SGD":
        oracle.optimizer = torch.optim.SGD(oracle.masters, lr=0.1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = update_path(torch.device("cuda"))
    engine = build_engine(model, optimizer, is_offloaded=False, unit_bytes=300, device_path=path)
    for step in range(3):
        oracle.zero_grad()
        plain_backward(plain, batch(step, dtype))
        oracle.step()
        optimizer.zero_grad()
        plain_backward(model, batch(step, dtype))
        if clip is not None:
            engine.request_clip(ClipByNorm(clip))
        with DeviceDouble([state["step"] for state in optimizer.state.values() if "step" in state]) as double:
            engine.step()
        # Counts of steps are made at a parameter's first one, on the host.
        assert double.reads == (["__int__"] * 7 if step == 0 and make == "AdamW" else [])
    engine.close()
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_scaled_losses_cost_one_look_at_the_norm(monkeypatch):
    """Whether a step overflowed decides over counts and the next scale, which are the host's."""
    monkeypatch.setattr(kernels, "unavailable_reason", lambda: "a double of the device has no kernels")
    model = Programs()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    path = update_path(torch.device("cuda"))
    engine = build_engine(model, optimizer, is_offloaded=False, unit_bytes=300, device_path=path)
    for step in range(2):
        engine.scale_losses(1024.0)
        optimizer.zero_grad()
        plain_backward(model, batch(step, torch.float32))
        with DeviceDouble([state["step"] for state in optimizer.state.values()]) as double:
            engine.step()
    engine.close()
    assert double.reads == ["__bool__"]
