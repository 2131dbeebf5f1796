"""Loaders with a state of their own, as torchdata's, at another number of ranks."""

from __future__ import annotations

import pytest
from torch.utils.data import DataLoader

import lightning_superscale as lss
from lightning_superscale.errors import SuperScaleError
from tests.helpers.numbered import Numbers, SavesAt, numbers_loader, run
from tests.helpers.ranks import run_ranks


class Stateful(DataLoader):
    """Speaks the protocol of torchdata's StatefulDataLoader: the number of batches that one rank had."""

    yielded = 0
    first = 0

    def __iter__(self):
        skipped, self.first = self.first, 0
        self.yielded = skipped
        for index, batch in enumerate(super().__iter__()):
            if index >= skipped:
                self.yielded += 1
                yield batch

    def state_dict(self):
        return {"yielded": self.yielded}

    def load_state_dict(self, state_dict):
        self.first = state_dict["yielded"]


def stateful(size: int, **options) -> DataLoader:
    return Stateful(Numbers(), batch_size=size, shuffle=True, **options)


def stops_and_goes_on(rank, world_size, strategy, make, path, batches, flags):
    """The samples of each step of this rank, of a run that saves and stops, or without `batches` goes on."""
    seen: dict[int, list[int]] = {}
    plugins = [lss.UniversalCheckpointIO()]
    if batches:
        flags = {**flags, "callbacks": [SavesAt("on_train_batch_end", batches, path)]}
        run(seen, make(), strategy, devices=world_size, plugins=plugins, **flags)
    else:
        run(seen, make(), strategy, devices=world_size, plugins=plugins, ckpt_path=path, **flags)
    return seen


def loader_of_2():
    return numbers_loader(2)


def stateful_of_2():
    return stateful(2)


def stateful_and_resumable():
    return Stateful(Numbers(), batch_size=2, sampler=lss.ResumableSampler(Numbers(), seed=0))


def together(seen: list[dict[int, list[int]]]) -> dict[int, list[int]]:
    """What the steps of all ranks used, in an order that does not depend on their number."""
    return {step: sorted(sample for rank in seen for sample in rank[step]) for step in seen[0]}


@pytest.mark.parametrize("make", [loader_of_2, stateful_of_2])
@pytest.mark.parametrize(
    "strategies", [("zero3", "superoffload"), ("ddp", "zero1"), ("superscale", "ddp")], ids="-".join
)
def test_four_ranks_stop_and_two_go_on_and_then_four_again(make, strategies, tmp_path):
    """Each step uses 16 samples: 4 ranks, 2 batches of 2; or 2 ranks, 4 batches of 2."""
    of_4, of_2 = {"accumulate_grad_batches": 2, "max_epochs": 4}, {"accumulate_grad_batches": 4, "max_epochs": 4}
    first, second = (str(tmp_path / name) for name in ("a.ckpt", "b.ckpt"))
    whole = together(run_ranks(4, stops_and_goes_on, strategies[0], make, first, 99, of_4))
    assert {len(samples) for samples in whole.values()} == {16, 8}  # 24 samples are one step and a half
    seen = together(run_ranks(4, stops_and_goes_on, strategies[0], make, first, 2, of_4))
    seen |= together(run_ranks(2, stops_and_goes_on_and_saves, strategies[1], make, first, second, of_2))
    seen |= together(run_ranks(4, stops_and_goes_on, strategies[0], make, second, None, of_4))
    assert seen == whole


def stops_and_goes_on_and_saves(rank, world_size, strategy, make, path, second, flags):
    seen: dict[int, list[int]] = {}
    saves = SavesAt("on_train_batch_end", 9, second)
    plugins = [lss.UniversalCheckpointIO()]
    run(seen, make(), strategy, devices=world_size, plugins=plugins, ckpt_path=path, callbacks=[saves], **flags)
    return {step: samples for step, samples in seen.items() if step < 4}


def test_a_loader_with_a_state_of_its_own_may_have_a_resumable_sampler(tmp_path):
    path, expected, seen = str(tmp_path / "a.ckpt"), {}, {}
    run(expected, stateful_and_resumable())
    run(seen, stateful_and_resumable(), callbacks=[SavesAt("on_train_batch_end", 5, path)])
    run(seen, stateful_and_resumable(), ckpt_path=path)
    assert seen == expected


def test_a_loaders_own_state_is_used_as_it_is_on_one_rank(tmp_path):
    def make():
        return Stateful(Numbers(), batch_size=4)

    path, expected, seen = str(tmp_path / "a.ckpt"), {}, {}
    run(expected, make())
    run(seen, make(), callbacks=[SavesAt("on_train_batch_end", 2, path)])
    run(seen, make(), ckpt_path=path)
    assert seen == expected


def test_states_of_other_loaders_are_refused(tmp_path):
    own, ours = str(tmp_path / "own.ckpt"), str(tmp_path / "ours.ckpt")
    run({}, Stateful(Numbers(), batch_size=4), callbacks=[SavesAt("on_train_batch_end", 2, own)])
    run({}, numbers_loader(4), callbacks=[SavesAt("on_train_batch_end", 2, ours)])
    with pytest.raises(SuperScaleError, match=r"state of a data loader has the keys \['yielded'\]; expected that of a"):
        run({}, numbers_loader(4), ckpt_path=own)
    with pytest.raises(SuperScaleError, match="a Stateful with a SequentialSampler can't go there"):
        run({}, Stateful(Numbers(), batch_size=4), ckpt_path=ours)
