"""What a fit asks of its host: chosen from rank 0's profile on every rank, bound to each rank's own CPUs."""

from __future__ import annotations

import dataclasses
import os

import lightning as L
import pytest
import torch
from torch import nn

import lightning_superscale as lss
from lightning_superscale.offload.link import arena
from lightning_superscale.offload.planner.numa import Topology
from lightning_superscale.offload.planner.profile import key_of
from lightning_superscale.ops.cpu.memory import HostBuffer
from lightning_superscale.run import host_plan
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import Regressor, assert_same_weights, fit, loader, trainer
from tests.offload.planner.test_choices import H100


class Explained(L.Callback):
    """What `explain()` says at the start and at the end, and the host plan."""

    def on_train_start(self, trainer, module):
        self.start = trainer.strategy.explain()
        self.host = trainer.strategy.assembly.host

    def on_train_end(self, trainer, module):
        self.end = trainer.strategy.explain()


@pytest.fixture
def profile(monkeypatch):
    """A profile of another machine, so that nothing here depends on this one's speed."""
    monkeypatch.delenv("LSS_CPU_THREADS", raising=False)
    found = dataclasses.replace(H100, key=key_of(torch.device("cpu"), range(16)))
    monkeypatch.setattr(host_plan, "cached_profile", lambda device, cpus: found)
    return found


def test_choices_and_reasons_are_in_explain_and_change_no_bit(profile):
    plain, module, seen = Regressor(), Regressor(), Explained()
    fit(plain)
    fit(module, "superoffload", callbacks=[seen])
    assert_same_weights(module, plain)
    assert "buckets hold at most 1 MiB of weights: smaller ones make copies slower (bucket_mb='auto')" in seen.start
    assert "cpu_threads='auto'" in seen.start
    assert f"hardware profile: {profile.summary()}" in seen.start
    assert seen.host.pool.num_threads == max(1, min(8, len(os.sched_getaffinity(0)) - 1))


def test_a_larger_model_gets_16_buckets():
    class Wide(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Sequential(*[nn.Linear(512, 1024, bias=False) for _ in range(34)])  # 68 MiB

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    seen = Explained()
    fit(Wide(), "superoffload", callbacks=[seen], max_steps=1)
    assert seen.host.unit_bytes == 4 * 2**20
    assert "about 16 of them keep link, host and device busy at once" in seen.start


def test_what_is_asked_for_is_what_is_taken(profile):
    seen = Explained()
    strategy = lss.SuperScaleStrategy(offload={"engine": "superoffload", "bucket_mb": 3, "cpu_threads": 5})
    fit(Regressor(), strategy, callbacks=[seen])
    assert seen.host.unit_bytes == 3 * 2**20
    assert seen.host.pool.num_threads == 5
    assert "buckets hold at most 3 MiB of weights: bucket_mb=3" in seen.start
    assert "5 threads step on the host: cpu_threads=5" in seen.start


def test_switched_off_says_so(monkeypatch):
    monkeypatch.setenv("LSS_PROFILE", "off")
    seen = Explained()
    fit(Regressor(), "superoffload", callbacks=[seen])
    assert "no hardware profile: LSS_PROFILE=off skips measuring, and nothing is forecast" in seen.start
    assert seen.host.profile is None


def test_without_offload_nothing_is_measured(monkeypatch):
    def never(device, cpus):
        raise AssertionError("measured for nothing")

    monkeypatch.setattr(host_plan, "cached_profile", never)
    seen = Explained()
    fit(Regressor(), "superscale", callbacks=[seen])
    assert "bucket" not in seen.start


def test_threads_are_bound_to_the_share_and_leave_its_first_core(monkeypatch, profile):
    """Eight CPUs, four cores, as though this process had them; the pool is asked for, not made."""
    asked = []

    def pool(num_threads, *, cpus=()):
        asked.append((num_threads, tuple(cpus)))
        return host_plan.default_pool()

    monkeypatch.setattr(host_plan, "available_cpus", lambda: tuple(range(8)))
    topology = Topology(dict.fromkeys(range(8), 0), {cpu: cpu % 4 for cpu in range(8)})
    monkeypatch.setattr(host_plan, "read_topology", lambda cpus: topology)
    monkeypatch.setattr(host_plan, "Pool", pool)
    seen = Explained()
    fit(Regressor(), "superoffload", callbacks=[seen])
    assert asked == [(6, (1, 5, 2, 6, 3, 7))]
    assert "those threads run on CPUs 1-3,5-7, and leave the rest to the launching thread" in seen.start


def _need_more_together(rank, world_size, is_shared):
    """Ranks whose states fit the host one by one: first both of them together, then not."""
    if not is_shared:
        host_plan.sharing_host_memory = lambda: f"host {rank}"
    found = []
    numel = sum(param.numel() for param in Regressor().parameters() if param.requires_grad)
    for available in (2 * 16 * numel, 2 * 16 * numel - 1):
        arena.available_host_bytes = lambda available=available: available
        try:
            fit(Regressor(), lss.SuperScaleStrategy(zero=0, offload="cpu"), devices=world_size, max_steps=1)
            found.append("")
        except lss.SuperScaleError as error:
            found.append(str(error))
    return found


def test_what_ranks_of_one_host_need_is_added_up():
    for fits, told in run_ranks(2, _need_more_together, True):
        assert fits == ""
        assert "transfer buffers of 2 processes on this host" in told


def test_ranks_of_two_hosts_need_their_own():
    assert run_ranks(2, _need_more_together, False) == [["", ""]] * 2


@pytest.mark.parametrize("engine", ["cpu", "superoffload"])
def test_the_threads_that_step_touch_the_states_first(monkeypatch, engine):
    pools = []

    def buffer(nbytes, *, pool, **rest):
        pools.append(pool)
        return HostBuffer(nbytes, pool=pool, **rest)

    monkeypatch.setattr(arena, "HostBuffer", buffer)
    seen = Explained()
    fit(Regressor(), lss.SuperScaleStrategy(offload={"engine": engine, "cpu_threads": 2}), callbacks=[seen])
    assert len(pools) >= 4
    assert all(pool is seen.host.pool for pool in pools)


def _on_ranks(rank: int, world_size: int):
    """Ranks with profiles of their own, and one that can't measure."""
    found = []
    for own in (dataclasses.replace(H100, adamw_ns_per_param=1.0 + rank), None if rank else H100):
        host_plan.cached_profile = lambda device, cpus, own=own: own
        seen = Explained()
        trainer("superoffload", devices=world_size, callbacks=[seen]).fit(Regressor(), loader())
        found.append((seen.host.unit_bytes, seen.host.profile))

    def broken(device, cpus):
        raise OSError("no home")

    host_plan.cached_profile = broken if rank else lambda device, cpus: H100
    with pytest.raises(lss.SuperScaleError, match="rank 1: no home"):
        trainer("superoffload", devices=world_size).fit(Regressor(), loader())
    return found


def test_every_rank_takes_rank_0s_profile_and_a_rank_that_fails_is_named():
    for found in run_ranks(2, _on_ranks, limit_s=60):
        assert [profile for _, profile in found] == [dataclasses.replace(H100, adamw_ns_per_param=1.0), H100]
        assert [unit_bytes for unit_bytes, _ in found] == [2**20] * 2
