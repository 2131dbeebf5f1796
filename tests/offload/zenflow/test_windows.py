"""When windows end, and when columns are chosen."""

from __future__ import annotations

import pytest
import torch

from lightning_superscale.config import ZenFlowConfig
from lightning_superscale.offload.zenflow.windows import Absorbed, Schedule, packed, staggered, unpacked
from lightning_superscale.ops.types import AdamWHyper


def test_each_step_has_as_much_to_do_where_windows_end_at_different_steps():
    sizes = {(0, i): (numel, f"layers.{i}.weight") for i, numel in enumerate([400, 100, 300, 300, 200, 100])}
    offsets = staggered(sizes, 3)
    loads = [sum(sizes[place][0] for place, at in offsets.items() if at == offset) for offset in range(3)]
    assert loads == [500, 500, 400]
    renamed = {(1, 5 - i): size for (_, i), size in sizes.items()}  # other units, in another order
    assert {renamed[place][1]: at for place, at in staggered(renamed, 3).items()} == {
        sizes[place][1]: at for place, at in offsets.items()
    }


@pytest.mark.parametrize("warmup", [0, 1, 3])
@pytest.mark.parametrize("offset", range(4))
def test_windows_have_their_length_from_the_first_whole_one_on(warmup, offset):
    place = (0, 0)
    schedule = Schedule(ZenFlowConfig(update_interval=4, warmup_steps=warmup), 4, {place: offset})
    ends = [step for step in range(1, 30) if schedule.ends(place, step)]
    num_warm = max(1, warmup)
    assert ends[:num_warm] == list(range(1, num_warm + 1))
    assert all(b - a == 4 for a, b in zip(ends[num_warm:], ends[num_warm + 1 :], strict=False))
    assert [schedule.waits(step) for step in (num_warm, num_warm + 1)] == [True, False]


@pytest.mark.parametrize("offset", range(4))
def test_columns_are_chosen_after_warm_up_and_then_in_first_steps_of_windows(offset):
    place, chosen_at, chosen = (0, 0), None, []
    schedule = Schedule(ZenFlowConfig(update_interval=4, select_interval=6, warmup_steps=2), 4, {place: offset})
    for step in range(1, 40):
        if schedule.chooses(place, step, chosen_at):
            chosen_at = step
            chosen.append(step)
    assert chosen[0] == 3
    assert all(schedule.ends(place, step - 1) for step in chosen)
    assert all(6 <= b - a <= 6 + 4 for a, b in zip(chosen, chosen[1:], strict=False))


def test_numbers_of_a_window_survive_a_checkpoint():
    like = AdamWHyper(lr=0.0, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0, step=1, maximize=True, ieee_sqrt=True)
    hyper = AdamWHyper(
        lr=0.1,
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        weight_decay=0.3,
        step=7,
        maximize=True,
        ieee_sqrt=True,
        grad_scale=1 / 3,
        absorbed=3,
    )
    for one in (hyper, AdamWHyper(**{**{f: getattr(hyper, f) for f in hyper.__slots__}, "clip_value": 0.25})):
        assert unpacked(packed(one), like) == one
        window = Absorbed(3, 0.25, one)
        assert Absorbed.unpacked(window.packed(), like) == window
        assert window.packed().dtype == torch.float64
