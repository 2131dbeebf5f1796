"""ZenFlow over ranks equals ZenFlow by hand on one, where all ranks have the same batches: sums of equals are exact.

In bf16, as other bits of a matrix product that starts at another address vanish there.
"""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch

import lightning_superscale as lss
from lightning_superscale.config import ZenFlowConfig
from tests.helpers.extent import IS_ALL
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import loader, trainer
from tests.helpers.zenflow_optimizer import Zoo

# What lies with rows inside of its memory is whole on one rank, and contiguous on several.
OPTIONS = {
    name: {**options, "exclude": ["inside"]}
    for name, options in {
        "overlap": {"topk": 0.3, "update_interval": 3, "select_interval": 5, "warmup_steps": 2},
        "half": {"topk": 0.5, "update_interval": 2, "select_interval": 3},
        "sync": {"topk": 0.3, "update_interval": 3, "select_interval": 6, "overlap": False},
        "no column": {"topk": 0.0, "update_interval": 4, "deferred_lr": "sqrt"},
        "all columns": {"topk": 1.0},
    }.items()
}
CLIPS = {"plain": {}, "clipped": {"gradient_clip_val": 0.05}, "16-bit states": {}}
EPOCHS = {"max_epochs": 9, "precision": "bf16-true"}  # of one batch each: Lightning resumes at the start of an epoch
SAVED_AT = 6  # within a window of "overlap", with an update on its way

Case = tuple[int, str, str]
"""Stage, options, and clipping or the dtype of states."""


def precision_of(clip: str) -> lss.SuperScalePrecision:
    low = {"master_weights": "bf16", "optimizer_states": "bf16"} if clip == "16-bit states" else {}
    return lss.SuperScalePrecision("bf16-true", seed=7, **low)


def without_inside(precision: lss.SuperScalePrecision, module: Zoo) -> Zoo:
    """The module without training what has other random numbers on one rank, where rows lie inside of its memory."""
    module.inside.requires_grad_(not precision.choices.states.is_low_precision)
    return module


def flags_of(clip: str) -> dict:
    return {**CLIPS[clip], "precision": None, "plugins": [precision_of(clip)]}


class Notes(L.Callback):
    """Whole weights after each step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer, module, *_):
        with trainer.strategy.full_params() as whole:
            self.weights.append({name: whole[name].clone() for name, _ in module.named_parameters()})


class SavesOnce(L.Callback):
    def __init__(self, path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer, *_):
        if trainer.global_step == SAVED_AT:
            trainer.save_checkpoint(self.path)


def offload(name: str) -> dict:
    return {"engine": "zenflow", "gpu_fraction": 0, "zenflow": OPTIONS[name]}


def trained(world_size: int, zero: int, offload, ckpt_path=None, callbacks=(), **flags):
    notes, module = Notes(), Zoo()
    for plugin in flags.get("plugins", ()):
        module = without_inside(plugin, module)
    module.num_batches = SAVED_AT if ckpt_path else 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*this run drops them")
        run = trainer(
            lss.SuperScaleStrategy(zero=zero, offload=offload),
            devices=world_size,
            use_distributed_sampler=False,
            callbacks=[notes, *callbacks],
            **{**EPOCHS, **flags},
        )
        run.fit(module, loader(8), ckpt_path=ckpt_path)
    return [*notes.weights, {name: value.clone() for name, value in module.state_dict().items()}]


def _ladder(rank: int, world_size: int, cases: list[Case], path: str):
    found = {case: trained(world_size, case[0], offload(case[1]), **flags_of(case[2])) for case in cases}
    for zero in sorted({zero for zero, *_ in cases}):
        found["resumed", zero] = trained(world_size, zero, offload("overlap"), path)
        found["as AdamW", zero] = trained(world_size, zero, None, path)
        found["as superoffload", zero] = trained(world_size, zero, "superoffload", path)
        saves = [SavesOnce(f"{path}.{world_size}.{zero}")]
        trained(world_size, zero, offload("overlap"), callbacks=saves)
    return found if rank == world_size - 1 else None


class PlainNotes(Notes):
    def on_train_batch_end(self, trainer, module, *_):
        self.weights.append({name: param.detach().clone() for name, param in module.named_parameters()})


def by_hand(name: str, clip: str):
    notes, precision = PlainNotes(), precision_of(clip)
    options = {"dtypes": precision.choices.states, **({"max_norm": 0.05} if CLIPS[clip] else {})}
    module = without_inside(precision, Zoo(ZenFlowConfig(**OPTIONS[name]), options))
    trainer(callbacks=[notes], **EPOCHS).fit(module, loader(8))
    return [*notes.weights, {name: value.clone() for name, value in module.state_dict().items()}]


def assert_same(found, expected, where) -> None:
    assert len(found) == len(expected)
    for at, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        differing = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
        assert not differing, f"{where}, {at}: {differing}"


WIDE = {zero: [(zero, name, clip) for name in OPTIONS for clip in CLIPS] for zero in (0, 1, 2, 3)}


@pytest.fixture
def one_thread():
    """As ranks have it, since a matrix product's bits depend on the number of its threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [(size, cases) for size in (2, 4) for cases in WIDE.values()]
    if IS_ALL
    else [(4, [(2, "overlap", "clipped"), (3, "half", "16-bit states")])],
)
def test_any_number_of_ranks_is_zenflow_by_hand(world_size, cases, tmp_path, one_thread):
    """And resumes what one rank saved within a window, as ZenFlow and as other engines, and the other way round."""
    path = str(tmp_path / "one.ckpt")
    straight = trained(1, 2, offload("overlap"), callbacks=[SavesOnce(path)])
    found = run_ranks(world_size, _ladder, cases, path, limit_s=600)[-1]
    for case in cases:
        assert_same(found[case], by_hand(*case[1:]), case)
    as_adamw = trained(1, 0, None, path)
    for zero in sorted({zero for zero, *_ in cases}):
        assert_same(found["resumed", zero], straight[SAVED_AT:], ("resumed", zero))
        assert_same(found["as AdamW", zero], as_adamw, ("as AdamW", zero))
        assert_same(found["as superoffload", zero], as_adamw, ("as superoffload", zero))
        back = trained(1, 2, offload("overlap"), f"{path}.{world_size}.{zero}")
        assert_same(back, straight[SAVED_AT:], ("back on one rank", zero))
