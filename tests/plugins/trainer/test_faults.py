"""Ranks that misbehave: every rank says who and why, within seconds."""

from __future__ import annotations

import os
import signal
import time

import lightning as L
import pytest
import torch
from torch import nn

import lightning_superscale as lss
from lightning_superscale.checkpoint.save import background
from tests.helpers.extent import only_in_test_all
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import Regressor, loader, trainer
from tests.helpers.universal import universal_trainer

# Far below any timeout of a collective (30 minutes), and above the watch's patience.
SECONDS = 25.0


class Failing(Regressor):
    """Does something wrong on one rank at its third step."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        if what == "another shape" and os.environ["RANK"] == "1":
            self.unused = nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 2 and self.global_rank == 1:
            if self.what == "raise":
                raise ValueError("bad sample 17")
            if self.what == "die":
                os.kill(os.getpid(), signal.SIGKILL)
        return loss


class Sparse(Regressor):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 17, sparse=os.environ["RANK"] == "1")

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

    def training_step(self, batch, batch_idx):
        x, y = batch
        index = torch.arange(len(x)) % 7
        return self.loss((x + self.embedding(index), y))


class SkipsAStep(Regressor):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        if not (batch_idx == 2 and self.global_rank == 1):
            optimizer.step()


class EditsGradients(Regressor):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.loss(batch).backward()  # which Lightning does not see, and no rank averages
        nn.utils.clip_grad_norm_(self.net.parameters(), 0.1)
        optimizer.step()


def misbehave(rank, world_size, strategy, what, module_class=Failing):
    """What this rank's fit raised, and after how many seconds."""
    start = time.monotonic()
    zero = lss.SuperScaleStrategy(zero={"stage": 2, "bucket_mb": 1 + rank}) if what == "config" else strategy
    try:
        trainer(zero, devices=world_size).fit(module_class(what), loader(64))
    except Exception as error:
        return "; ".join([str(error), *getattr(error, "__notes__", [])]), time.monotonic() - start
    return "nothing", time.monotonic() - start


def survivors(world_size, *args):
    """What the ranks that survived said; a rank that was killed says None."""
    from tests.helpers.ranks import RankFailed

    try:
        return run_ranks(world_size, misbehave, *args, limit_s=90)
    except RankFailed as failure:
        return str(failure)


@pytest.mark.parametrize("strategy", ["zero1", "zero3", "superoffload"])
def test_an_exception_on_one_rank_is_told_to_all(strategy):
    said = run_ranks(3, misbehave, strategy, "raise", limit_s=90)
    assert said[1][0] == "bad sample 17"
    for rank in (0, 2):
        assert said[rank][0] == "rank 1 failed: ValueError: bad sample 17"
        assert said[rank][1] < SECONDS


def test_a_model_that_differs_is_refused_on_all_ranks():
    for text, _ in run_ranks(2, misbehave, "zero2", "another shape"):
        assert "ranks differ: parameter 'unused.weight' is (3, 3)" in text
        assert "on rank 0 and (3, 4) torch.float32 trainable on rank 1" in text


def test_a_config_that_differs_is_refused_on_all_ranks():
    for text, _ in run_ranks(2, misbehave, None, "config"):
        assert "ranks differ: zero is ZeroConfig(stage=2, bucket_mb=1" in text
        assert "bucket_mb=2" in text


def test_a_step_that_one_rank_skips_is_not_waited_for_forever():
    (first, seconds), (second, _) = run_ranks(2, misbehave, "zero2", "", SkipsAStep, limit_s=90)
    for text in (first, second):
        assert "ranks went apart and wait for each other: rank 0 at step 2 of optimizer 0, rank 1 at broadcast" in text
        assert "training_epoch_loop.py" in text  # a collective of Lightning's own
    assert seconds < SECONDS


def test_a_gradient_that_is_refused_on_one_rank_is_refused_on_all():
    for text, seconds in run_ranks(2, misbehave, "zero2", "", Sparse):
        assert "'embedding.weight' has a gradient of layout torch.sparse_coo" in text
        assert seconds < SECONDS


class RunsBackwardOnceMore(SkipsAStep):
    def training_step(self, batch, batch_idx):
        self.manual_backward(self.loss(batch))
        if batch_idx == 2 and self.global_rank == 1:
            self.manual_backward(self.loss(batch))


@only_in_test_all
def test_a_backward_that_one_rank_runs_alone_is_named():
    for text, seconds in run_ranks(2, misbehave, "zero2", "", RunsBackwardOnceMore, limit_s=90):
        assert "ranks went apart" in text
        assert "rank 1 at the average of gradients after a backward" in text
        assert seconds < SECONDS


def test_shares_changed_by_hand_are_refused():
    for text, _ in run_ranks(2, misbehave, "zero2", "", EditsGradients):
        assert "was changed in place between backward and step" in text
        assert "self.clip_gradients" in text


def test_a_killed_rank_is_named_by_the_others():
    said = survivors(3, "zero2", "die")
    assert "rank 1:\nthe process ended without an answer" in said


class Branching(Regressor):
    """Two networks, of which each rank runs its own."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(17, 5), nn.Linear(17, 5)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss((self.left if self.global_rank == 0 else self.right)(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW([*self.left.parameters(), *self.right.parameters()])


def test_branches_that_depend_on_the_rank_are_refused_by_name_in_stage_3():
    for text, seconds in run_ranks(2, misbehave, "zero3", "", Branching):
        assert "left" in text
        assert "right" in text
        assert seconds < SECONDS


def test_branches_that_depend_on_the_rank_train_in_stage_2():
    for text, _ in run_ranks(2, misbehave, "zero2", "", Branching):
        assert text == "nothing"


class SavesInVain(L.Callback):
    """Saves in the background after the second step, where rank 1's disk is full, and slows rank 0's writer down."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)
        if trainer.global_step >= 2 and trainer.global_rank == 1:
            trainer.strategy.checkpoint_io._saver._thread.join()  # so that this rank knows, and rank 0 perhaps not


def save_in_vain(rank, world_size, names, folder):
    """At which step each strategy's run ended, and why."""
    write, fsync = background.write, os.fsync

    def late(*args):
        try:
            write(*args)
        finally:
            time.sleep(0.5 if rank == 0 else 0)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    background.write, os.fsync = late, full if rank == 1 else fsync
    ended = []
    for name in names:
        callbacks = [SavesInVain(f"{folder}/{name}.ckpt")]
        run, module = universal_trainer(
            name, world_size, checkpoint={"asynchronous": True}, max_steps=40, max_epochs=-1, callbacks=callbacks
        )
        try:
            run.fit(module, loader(24))
            ended.append((name, run.global_step, "nothing"))
        except Exception as error:
            ended.append((name, run.global_step, f"{type(error).__name__}: {error}"))
    return ended


def test_a_save_in_the_background_that_fails_on_one_rank_ends_all_at_the_next_step(tmp_path):
    names = ["ddp", "model_parallel", "superoffload", "zero1", "zero3 superoffload"]
    first, second = run_ranks(2, save_in_vain, names, str(tmp_path))
    assert first == second
    assert [name for name, _, _ in first] == names
    for name, step, said in first:
        assert step == 2, (name, said)
        assert said.startswith("CheckpointError: an earlier save failed"), name
        assert "rank 1 " in said, name
        assert "No space left on device" in said, name
    assert os.listdir(tmp_path) == []
