"""A `Run` driven by plain torch loops, as an adapter of any framework would: no Lightning, and the bits of AdamW."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from lightning_superscale.config import resolve_offload, resolve_zero
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.optim.clipping import ClipByNorm
from lightning_superscale.run.precision import choose
from lightning_superscale.run.run import Run
from lightning_superscale.run.visibility import Visibility

NUM_STEPS, NUM_MICRO, MAX_NORM = 4, 2, 0.05
CPU = torch.device("cpu")


def model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(7, 16), nn.GELU(), nn.Linear(16, 5))


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(4, 7, generator=generator) for _ in range(NUM_STEPS * NUM_MICRO)]


def adamw(module: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)


def by_hand() -> nn.Module:
    module = model()
    optimizer = adamw(module)
    for number, batch in enumerate(batches()):
        module(batch).pow(2).mean().backward()
        if number % NUM_MICRO:
            nn.utils.clip_grad_norm_(module.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
    return module


def started(offload: str | None, module: nn.Module, visibility: Visibility) -> tuple[Run, torch.optim.AdamW]:
    run = Run(resolve_zero(0), resolve_offload(offload))
    run.prepare(module, CPU, trains=True, is_compiled_whole=False)
    optimizer = adamw(module)
    run.start_training(module, [optimizer], precision=choose("32-true"), scaler=None, visibility=visibility, rank=0)
    return run, optimizer


def micro_batch(run: Run, module: nn.Module, batch: torch.Tensor) -> None:
    with run.forward():
        loss = module(run.batch(batch, trains=True)).pow(2).mean()
    with run.backward():
        loss.backward()
    run.after_backward()


def by_run(offload: str | None, visibility: Visibility) -> nn.Module:
    module = model()
    run, optimizer = started(offload, module, visibility)
    for number, batch in enumerate(batches()):
        if number % NUM_MICRO == 0:
            with run.accumulating():
                micro_batch(run, module, batch)
            continue

        def closure(batch=batch):
            micro_batch(run, module, batch)
            assert run.clip(optimizer, ClipByNorm(MAX_NORM))

        run.step(optimizer, closure)
        run.end_step()
        optimizer.zero_grad()
    assert run.phases.num_steps == NUM_STEPS
    run.close()
    return module


SEEN = {
    "nothing": Visibility(),
    "gradients": Visibility(why_gradients_stay="a test reads them"),
    "weights": Visibility(why_weights_awaited="a test reads them"),
    "manual": Visibility(why_gradients_stay="a", why_weights_awaited="b", is_automatic=False),
}


@pytest.mark.parametrize("visibility", SEEN.values(), ids=SEEN.keys())
@pytest.mark.parametrize("offload", ["cpu", "superoffload"])
def test_a_torch_loop_equals_adamw(offload, visibility):
    expected = by_hand().state_dict()
    for name, value in by_run(offload, visibility).state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_it_needs_no_lightning():
    lines = [
        "import sys",
        "import tests.run.test_run as t",
        "t.test_a_torch_loop_equals_adamw('superoffload', t.SEEN['nothing'])",
        "found = {'lightning', 'pytorch_lightning', 'lightning_fabric'} & sys.modules.keys()",
        "assert not found, found",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=120)


def test_state_moves_on_to_another_run():
    module, other = model(), model()
    run, optimizer = started("superoffload", module, Visibility())
    for batch in batches()[:2]:
        micro_batch(run, module, batch)
        run.step(optimizer, lambda: None)
        run.end_step()
        optimizer.zero_grad()
    weights = {name: value.clone() for name, value in run.module_state(module, is_local=False).items()}
    states = run.optimizer_state(module, optimizer, is_local=False)
    resumed, its_optimizer = started("cpu", other, Visibility())
    resumed.load_module_state(other, weights, strict=True, allow=None)
    resumed.load_optimizer_states(other, [its_optimizer], [states])
    for batch in batches()[2:]:
        for one, net, opt in ((run, module, optimizer), (resumed, other, its_optimizer)):
            micro_batch(one, net, batch)
            one.step(opt, lambda: None)
            one.end_step()
            opt.zero_grad()
    run.close()
    resumed.close()
    for name, value in module.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_an_evaluation_between_steps_sees_new_weights_and_changes_none():
    module = model()
    run, optimizer = started("superoffload", module, Visibility())
    micro_batch(run, module, batches()[0])
    run.step(optimizer, lambda: None)
    run.before_evaluation()
    with run.evaluating(), torch.no_grad():
        found = module(run.batch(batches()[1], trains=False))
    run.close()
    assert torch.equal(found, module(batches()[1]))


def test_an_optimizer_without_an_engine_steps_itself():
    module = model()
    run, _ = started("superoffload", module, Visibility())
    stray = nn.Parameter(torch.ones(3))
    other = torch.optim.SGD([stray], lr=1.0)
    stray.grad = torch.ones(3)
    assert not run.clip(other, ClipByNorm(1.0))
    run.step(other, lambda: None)
    assert torch.equal(stray, torch.zeros(3))
    run.close()


def test_options_of_a_step_are_refused_by_name():
    module = model()
    run, optimizer = started("cpu", module, Visibility())
    with pytest.raises(SuperScaleError, match="takes only a closure under this strategy, found 'grad_scaler'"):
        run.step(optimizer, lambda: None, grad_scaler=None)
    run.close()
