"""The launching thread waits for no more of the device's work than a step needs."""

from __future__ import annotations

import threading

import pytest
import torch

from lightning_superscale.offload.link.link import CpuLink
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

    def is_ready(self) -> bool:
        return True

    def is_done(self) -> bool:
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
    assert by_verdict[0] > 0  # nobody knew that a norm would be wanted
    assert by_verdict[1:] == [0, 0, 0]
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
