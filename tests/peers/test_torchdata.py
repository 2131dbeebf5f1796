"""torchdata's own loader, at one number of ranks and then another: `make test-peers`."""

from __future__ import annotations

import importlib.util

import pytest

import lightning_superscale as lss
from tests.helpers.numbered import Numbers, SavesAt, run
from tests.helpers.ranks import run_ranks
from tests.plugins.data.test_loader import stops_and_goes_on, together

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("torchdata") is None, reason="torchdata is not here: make test-peers"),
    pytest.mark.filterwarnings("ignore"),
]


def loader(workers: int = 0, **options):
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(Numbers(), batch_size=2, num_workers=workers, **options)


def shuffled():
    return loader(shuffle=True)


def test_four_ranks_stop_and_two_go_on(tmp_path):
    path = str(tmp_path / "a.ckpt")
    whole = together(run_ranks(4, stops_and_goes_on, "zero2", shuffled, path, 99, {"accumulate_grad_batches": 2}))
    seen = together(run_ranks(4, stops_and_goes_on, "zero2", shuffled, path, 2, {"accumulate_grad_batches": 2}))
    seen |= together(run_ranks(2, stops_and_goes_on, "zero3", shuffled, path, None, {"accumulate_grad_batches": 4}))
    assert seen == whole
    assert sorted(whole[0] + whole[1]) == list(range(24))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumable_sampler_on_one_rank(workers, tmp_path):
    def make():
        return loader(workers, sampler=lss.ResumableSampler(Numbers(), seed=3))

    path, expected, seen = str(tmp_path / "a.ckpt"), {}, {}
    run(expected, make())
    run(seen, make(), callbacks=[SavesAt("on_train_batch_end", 5, path)])
    run(seen, make(), ckpt_path=path)
    assert seen == expected


def test_its_own_state_goes_on_by_itself_on_one_rank(tmp_path):
    path, expected, seen = str(tmp_path / "a.ckpt"), {}, {}
    run(expected, loader())
    run(seen, loader(), callbacks=[SavesAt("on_train_batch_end", 5, path)])
    run(seen, loader(), ckpt_path=path)
    assert seen == expected
