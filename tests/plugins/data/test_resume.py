"""A run that goes on within an epoch: its steps use the samples that an undisturbed run's do, in the same order."""

from __future__ import annotations

import warnings

import pytest
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

import lightning_superscale as lss
from lightning_superscale.errors import SuperScaleError
from tests.helpers.extent import only_in_test_all
from tests.helpers.numbered import Numbers, SavesAt, numbers_loader, run

# Six batches of four samples an epoch, three epochs.
HOOKS = {
    "on_train_batch_start": 8,
    "on_train_batch_end": 8,
    "on_train_epoch_start": 2,
    "on_train_epoch_end": 2,
    "on_validation_end": 2,
    "on_train_start": 1,
}
LIMITS = {"epochs": {"max_epochs": 3}, "steps": {"max_epochs": -1, "max_steps": 18}}


def undisturbed(**flags) -> dict[int, list[int]]:
    seen: dict[int, list[int]] = {}
    run(seen, numbers_loader(4), **flags)
    return seen


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("has_val", [False, True])
def test_a_checkpoint_of_any_moment_goes_on_with_the_next_sample(hook, limits, has_val, tmp_path):
    if hook == "on_validation_end" and not has_val:
        pytest.skip("nothing validates")
    expected = undisturbed(**LIMITS[limits])
    val = DataLoader(Numbers(4), batch_size=4) if has_val else None
    for count in {1, HOOKS[hook]}:
        path, seen = str(tmp_path / f"{count}.ckpt"), {}
        run(seen, numbers_loader(4), val=val, callbacks=[SavesAt(hook, count, path)], **LIMITS[limits])
        ended = run(seen, numbers_loader(4), val=val, ckpt_path=path, **LIMITS[limits])
        assert (ended.global_step, seen) == (18, expected)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize(
    "batches", [*range(1, 8), *(pytest.param(count, marks=only_in_test_all) for count in range(8, 18))]
)
def test_every_batch_of_an_epoch_can_be_the_last_of_a_run(batches, limits, tmp_path):
    """The last of an epoch too; in batches of another size, whose number Lightning counts otherwise."""
    expected = undisturbed(**LIMITS[limits])
    path, seen = str(tmp_path / "a.ckpt"), {}
    run(seen, numbers_loader(4), callbacks=[SavesAt("on_train_batch_end", batches, path)], **LIMITS[limits])
    flags = {**LIMITS[limits], "accumulate_grad_batches": 2}
    ended = run(seen, numbers_loader(2, num_workers=batches % 2), ckpt_path=path, **flags)
    assert (ended.global_step, seen) == (18, expected)


@pytest.mark.parametrize("batches", range(1, 7))
def test_a_window_whose_step_is_still_to_come_is_run_again(batches, tmp_path):
    flags = {"accumulate_grad_batches": 3}
    expected: dict[int, list[int]] = {}
    run(expected, numbers_loader(4), **flags)
    path, seen = str(tmp_path / "a.ckpt"), {}
    run(seen, numbers_loader(4), callbacks=[SavesAt("on_train_batch_end", batches, path)], **flags)
    run(seen, numbers_loader(4), ckpt_path=path, **flags)
    assert seen == expected


@pytest.mark.parametrize("steps", [2, 6, 8])
def test_a_run_is_made_longer(steps, tmp_path):
    expected = undisturbed(**LIMITS["steps"])
    seen: dict[int, list[int]] = {}
    first = run(seen, numbers_loader(4), max_epochs=-1, max_steps=steps)
    first.save_checkpoint(tmp_path / "a.ckpt")
    second = run(seen, numbers_loader(4), max_epochs=-1, max_steps=11, ckpt_path=str(tmp_path / "a.ckpt"))
    second.save_checkpoint(tmp_path / "b.ckpt")
    run(seen, numbers_loader(4), **LIMITS["steps"], ckpt_path=str(tmp_path / "b.ckpt"))
    assert seen == expected


@pytest.mark.parametrize("size", [3, 5, 7])
def test_no_sample_comes_twice_and_none_is_left_out_in_batches_that_do_not_fit(size, tmp_path):
    path, seen = str(tmp_path / "a.ckpt"), {}
    run(seen, numbers_loader(4), max_epochs=1, callbacks=[SavesAt("on_train_batch_end", 2, path)])
    done = [sample for step in range(2) for sample in seen[step]]
    seen = {}
    ended = run(seen, numbers_loader(size), max_epochs=2, ckpt_path=path)
    rest = [sample for batch in seen.values() for sample in batch]
    order = list(lss.ResumableSampler(Numbers(), seed=3))
    assert done + rest[:16] == order
    assert sorted(rest[16:]) == list(range(24))
    assert (ended.current_epoch, ended.global_step) == (2, 2 + -(-16 // size) + -(-24 // size))


def test_an_epoch_that_is_cut_short_by_limit_train_batches_is_over_where_it_was(tmp_path):
    flags = {"limit_train_batches": 4}
    expected: dict[int, list[int]] = {}
    run(expected, numbers_loader(4), **flags)
    for batches in (3, 4, 5):
        path, seen = str(tmp_path / f"{batches}.ckpt"), {}
        run(seen, numbers_loader(4), callbacks=[SavesAt("on_train_batch_end", batches, path)], **flags)
        run(seen, numbers_loader(4), ckpt_path=path, **flags)
        assert seen == expected
    seen = {}  # twenty samples are behind, and ten batches of one are over after four
    run(seen, numbers_loader(1), ckpt_path=str(tmp_path / "3.ckpt"), **flags)
    assert list(seen) == list(range(3, 11))


@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size", "max_size"])
@pytest.mark.parametrize("batches", [2, 4, 7])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_several_loaders_go_on_each_where_it_was(mode, batches, accumulate, tmp_path):
    assert_loaders_go_on(mode, 12, batches, accumulate, tmp_path)


def test_a_loader_that_began_anew_within_a_window_goes_back_to_its_end(tmp_path):
    """After five batches: the second window began with the last of the four batches of the short loader."""
    assert_loaders_go_on("max_size_cycle", 16, 5, 3, tmp_path)


def assert_loaders_go_on(mode, num_in_short, batches, accumulate, tmp_path):
    def loaders() -> CombinedLoader:
        return CombinedLoader({"long": numbers_loader(4), "short": numbers_loader(4, num_in_short)}, mode)

    flags = {"accumulate_grad_batches": accumulate}
    expected: dict[int, list[int]] = {}
    run(expected, loaders(), **flags)
    path, seen = str(tmp_path / "a.ckpt"), {}
    run(seen, loaders(), callbacks=[SavesAt("on_train_batch_end", batches, path)], **flags)
    run(seen, loaders(), ckpt_path=path, **flags)
    assert seen == expected


def test_a_loader_that_begins_anew_is_named(tmp_path):
    path, plain = str(tmp_path / "a.ckpt"), DataLoader(Numbers(), batch_size=4)
    run({}, plain, callbacks=[SavesAt("on_train_batch_end", 2, path)])
    with pytest.warns(UserWarning, match=r"after 2 of 6 batches.*the DataLoader over Numbers with a SequentialSampler"):
        run({}, plain, max_epochs=1, ckpt_path=path)


def test_nothing_is_said_where_all_goes_on(tmp_path):
    path = str(tmp_path / "a.ckpt")
    run({}, numbers_loader(4), callbacks=[SavesAt("on_train_batch_end", 2, path)])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run({}, numbers_loader(4), max_epochs=1, ckpt_path=path)
    assert not [str(one.message) for one in said if "resum" in str(one.message) or "begins anew" in str(one.message)]


@pytest.mark.parametrize(
    ("loader", "text"),
    [
        (lambda: numbers_loader(4, 20), "num_in_epoch=20, and the checkpoint's had num_in_epoch=24"),
        (
            lambda: DataLoader(Numbers(), batch_size=4, sampler=lss.ResumableSampler(Numbers(), seed=4)),
            "seed=4, and the checkpoint's had seed=3",
        ),
        (
            lambda: DataLoader(Numbers(), batch_size=4, sampler=lss.ResumableSampler(Numbers(), shuffle=False, seed=3)),
            "shuffle=0, and the checkpoint's had shuffle=1",
        ),
    ],
)
def test_another_dataset_or_order_is_refused(loader, text, tmp_path):
    path = str(tmp_path / "a.ckpt")
    run({}, numbers_loader(4), callbacks=[SavesAt("on_train_batch_end", 2, path)])
    with pytest.raises(SuperScaleError, match=text):
        run({}, loader(), ckpt_path=path)


def test_batches_whose_size_is_not_known_are_refused():
    from torch.utils.data import BatchSampler

    class Buckets(BatchSampler):
        pass

    data = Numbers()
    batches = Buckets(lss.ResumableSampler(data), 4, False)
    with pytest.raises(SuperScaleError, match="drawn from by a Buckets; expected batches of batch_size samples"):
        run({}, DataLoader(data, batch_sampler=batches))
    run(seen := {}, DataLoader(data, batch_sampler=BatchSampler(lss.ResumableSampler(data), 4, False)))
    assert len(seen) == 18


def test_val_loaders_begin_at_their_first_sample(tmp_path):
    path = str(tmp_path / "a.ckpt")
    run({}, numbers_loader(4), callbacks=[SavesAt("on_train_batch_end", 2, path)])
    seen: list[int] = []

    from tests.helpers.numbered import Recorder
    from tests.helpers.trainers import trainer

    class Validates(Recorder):
        def validation_step(self, batch, batch_idx):
            seen.extend(batch.tolist())

    trainer("superscale", max_epochs=1).fit(Validates({}), numbers_loader(4), numbers_loader(4), ckpt_path=path)
    assert sorted(seen) == list(range(24))
