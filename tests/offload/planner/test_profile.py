"""The hardware profile: measured through the real link and kernel, filed, and measured again when the file won't do."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch

from lightning_superscale.offload.link.link import CpuLink
from lightning_superscale.offload.planner import profile as hardware
from lightning_superscale.offload.planner import profile_cache
from lightning_superscale.offload.planner.numa import available_cpus
from lightning_superscale.offload.planner.profile import HardwareProfile, enough_threads, key_of, measure
from lightning_superscale.offload.planner.profile_cache import cached_profile, profile_path, stored_profile
from lightning_superscale.ops.native import loader
from lightning_superscale.ops.native.build import user_cache
from tests.helpers.hardware import quiet_cpu
from tests.helpers.ranks import run_ranks

CPU = torch.device("cpu")


def profile_of(key=None, **changed) -> HardwareProfile:
    values = {"d2h": 1e10, "h2d": 2e10, "d2h_both": 0.9e10, "h2d_both": 1.8e10, "memory": ((1, 2e10), (2, 3e10))}
    values |= {
        "adamw_ns_per_param": 0.5,
        "adamw_fp32_ns_per_param": 0.6,
        "accumulate_ns_per_param": 0.2,
        "adamw_threads": 1,
    }
    return HardwareProfile(key=key or key_of(CPU, available_cpus()), **{**values, **changed})


def test_runs_of_tests_choose_by_a_profile_that_is_the_same_everywhere():
    assert cached_profile(CPU) == quiet_cpu(key_of(CPU, available_cpus()))


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    # The native library stays where it is.
    monkeypatch.setenv("LSS_BUILD_CACHE", os.environ.get("LSS_BUILD_CACHE") or str(user_cache()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LSS_PROFILE", raising=False)


@pytest.fixture
def measured(monkeypatch, empty_cache):
    """An empty cache folder, and the calls of a `measure` that costs nothing."""
    calls = []

    def fake(device, cpus):
        calls.append((device, tuple(cpus)))
        return profile_of(key_of(device, cpus), d2h=1e9 + len(calls))

    monkeypatch.setattr(profile_cache, "measure", fake)
    return calls


def test_measuring_goes_through_the_link_and_counts_every_thread(monkeypatch):
    links = []

    class Spy(CpuLink):
        def __init__(self) -> None:
            super().__init__()
            links.append(self)

    monkeypatch.setattr(hardware, "link_for", lambda device: Spy())
    profile = measure(CPU)
    (link,) = links
    assert link.bytes.d2h == link.bytes.h2d == 2 * (1 + hardware._ROUNDS) * hardware._COPY_BYTES
    num_cpus = len(available_cpus())
    counts = [threads for threads, _ in profile.memory]
    if loader.native() is not None:
        assert counts[0] == 1
        assert counts[-1] == num_cpus
    assert profile.adamw_threads in counts
    assert profile.key == key_of(CPU, available_cpus())


def test_copies_that_take_twice_as_long_give_half_the_rate(monkeypatch):
    monkeypatch.setattr(hardware, "_best", lambda run: 0.5)
    once = measure(CPU)
    monkeypatch.setattr(hardware, "_best", lambda run: 1.0)
    twice = measure(CPU)
    assert once.d2h == hardware._COPY_BYTES / 0.5 == 2 * twice.d2h
    assert once.memory[0][1] == 2 * twice.memory[0][1]
    assert twice.adamw_ns_per_param == 2 * once.adamw_ns_per_param
    assert twice.adamw_fp32_ns_per_param == 2 * once.adamw_fp32_ns_per_param
    assert twice.accumulate_ns_per_param == 2 * once.accumulate_ns_per_param


def test_the_kernel_is_measured_with_16_bit_and_with_fp32_ends(monkeypatch):
    """Each costs what its elements say, so that a figure that belongs to the other is seen."""
    last = []

    def submit(segments, *, stats, pool):
        (segment,) = segments
        dtypes = {tensor.dtype for tensor in (segment.grad, segment.next_grad, segment.weight_out)}
        assert {tensor.dtype for tensor in (segment.param, segment.exp_avg, segment.exp_avg_sq)} == {torch.float32}
        last[:] = [segment.param.numel(), *dtypes]
        return SimpleNamespace(wait=lambda: None)

    def best(run):
        last[:] = [1]
        run()
        return last[0] * {torch.bfloat16: 1e-9, torch.float32: 3e-9}.get(last[-1], 1.0)

    monkeypatch.setattr(hardware, "submit_adamw_commit_peek", submit)
    monkeypatch.setattr(hardware, "_best", best)
    profile = measure(CPU)
    assert (profile.adamw_ns_per_param, profile.adamw_fp32_ns_per_param) == pytest.approx((1.0, 3.0))
    assert "1.00 ns per parameter with 16-bit gradients and weights and 3.00 ns with fp32 ones" in profile.summary()


def test_adding_is_measured_with_16_bit_gradients_into_fp32_sums_and_the_threads_that_step(monkeypatch):
    seen = []

    def note(acc, delta, *, pool):
        seen.append((acc.numel(), acc.dtype, delta.numel(), delta.dtype, pool.num_threads))

    def best(run):
        before = len(seen)
        run()
        return seen[-1][0] * 7e-9 if len(seen) > before else 1.0

    monkeypatch.setattr(hardware, "accumulate", note)
    monkeypatch.setattr(hardware, "_best", best)
    profile = measure(CPU)
    [(numel, acc, num_grads, grad, threads)] = seen
    assert (acc, grad, threads) == (torch.float32, torch.bfloat16, profile.adamw_threads)
    assert numel == num_grads >= hardware._NUMEL_UNFUSED
    assert profile.accumulate_ns_per_param == pytest.approx(7.0)
    assert "adding gradients up 7.00 ns" in profile.summary()


def test_a_file_of_an_older_format_is_neither_read_nor_written_over(measured, monkeypatch):
    current = profile_cache._FORMAT
    monkeypatch.setattr(profile_cache, "_FORMAT", current - 1)
    old = profile_path(cached_profile(CPU).key)
    before = old.read_text()
    monkeypatch.setattr(profile_cache, "_FORMAT", current)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stored_profile(key_of(CPU, available_cpus())) is None
        cached_profile(CPU)
    assert len(measured) == 2
    assert old.read_text() == before


@pytest.mark.parametrize(("num_cpus", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 5, 6]), (8, [1, 2, 4, 7, 8])])
def test_thread_counts_reach_all_cpus_and_all_but_one(num_cpus, counts):
    assert hardware._thread_counts(num_cpus) == counts


@pytest.mark.parametrize(
    ("rates", "at_most", "enough"),
    [
        ({1: 10, 2: 19, 4: 30, 7: 31, 8: 40}, 7, 4),
        ({1: 10, 2: 19, 4: 28, 7: 31, 8: 40}, 7, 7),
        ({1: 10, 2: 5}, 2, 1),
        ({4: 10}, 2, 4),
    ],
)
def test_the_fewest_threads_that_come_near_the_best_are_enough(rates, at_most, enough):
    assert enough_threads(tuple(rates.items()), at_most) == enough


def test_a_profile_is_measured_once_and_read_back_equal(measured):
    first = cached_profile(CPU)
    assert cached_profile(CPU) == first == stored_profile(first.key)
    assert len(measured) == 1


def test_a_profile_that_is_not_trusted_is_measured_again_and_filed(measured):
    first = cached_profile(CPU)
    again = cached_profile(CPU, measures_again=True)
    assert again != first
    assert stored_profile(first.key) == again
    assert len(measured) == 2


def _with_shares(monkeypatch, shares) -> None:
    """Measurements that get these shares of CPU time, one after the other; not one more."""
    left = iter(shares)
    monkeypatch.setattr(profile_cache, "measure", lambda device, cpus: profile_of(cpu_share=next(left)))


def test_a_profile_of_a_busy_time_is_measured_again_until_a_quiet_one_is_filed(monkeypatch, empty_cache):
    _with_shares(monkeypatch, [0.4, 0.3, 0.6, 0.95])
    used = [cached_profile(CPU).cpu_share for _ in range(5)]
    assert used == [0.4, 0.4, 0.6, 0.95, 0.95]
    assert stored_profile(key_of(CPU, available_cpus())).cpu_share == 0.95


def test_a_busy_measurement_that_was_asked_for_is_used_and_not_filed_over_a_quiet_one(monkeypatch, empty_cache):
    _with_shares(monkeypatch, [1.0, 0.5])
    cached_profile(CPU)
    assert cached_profile(CPU, measures_again=True).cpu_share == 0.5
    assert cached_profile(CPU).cpu_share == 1.0


def test_a_summary_says_of_a_busy_time(measured):
    assert "other work took" not in profile_of(cpu_share=0.9).summary()
    assert "; other work took 40% of their CPU time: runs measure anew" in profile_of(cpu_share=0.6).summary()


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_between_0_and_1(share):
    with pytest.raises(ValueError, match="a share of CPU time between 0 and 1"):
        profile_of(cpu_share=share)


def test_the_share_is_of_all_threads_and_all_time_that_was_counted(monkeypatch):
    clocks = {"perf_counter": iter([0.0, 2.0, 10.0, 12.0]), "process_time": iter([0.0, 3.0, 5.0, 6.0])}
    for name, readings in clocks.items():
        monkeypatch.setattr(hardware.time, name, readings.__next__)
    share = hardware._CpuShare(2)
    assert share.value == 1.0
    for expected in (0.75, 0.5):
        with share.counted():
            pass
        assert share.value == expected


@pytest.mark.skipif(loader.native() is None, reason="without the library the step runs in one thread of Python")
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="rivals can't be bound to one CPU here")
def test_a_machine_that_is_busy_is_noticed():
    cpu = available_cpus()[0]
    rivals = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        for rival in rivals:
            os.sched_setaffinity(rival.pid, {cpu})
        assert not measure(CPU, (cpu,)).is_quiet
    finally:
        for rival in rivals:
            rival.kill()
            rival.wait()


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(hardware.HardwareKey)])
def test_another_key_is_measured_anew(measured, monkeypatch, field):
    cached_profile(CPU)
    key = key_of(CPU, available_cpus())
    other = dataclasses.replace(key, **{field: 99 if field == "num_cpus" else "another"})
    monkeypatch.setattr(profile_cache, "key_of", lambda device, cpus: other)
    assert stored_profile(other) is None
    cached_profile(CPU)
    assert len(measured) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"format": 4', '"format": 0'),
        lambda text: text.replace('"d2h": 1000000001.0', '"d2h": -1.0'),
        lambda text: text.replace('"d2h": 1000000001.0', '"d2h": "fast"'),
        lambda text: text.replace('"d2h"', '"speed"'),
        lambda text: text.replace('"device": "cpu"', '"device": "gpu"'),
    ],
)
def test_a_damaged_file_is_measured_again_with_a_warning(measured, damage):
    path = profile_path(cached_profile(CPU).key)
    whole = path.read_text()
    path.write_text(damage(whole))
    assert path.read_text() != whole
    with pytest.warns(UserWarning, match="is damaged and is measured again"):
        again = cached_profile(CPU)
    assert len(measured) == 2
    assert stored_profile(again.key) == again


@pytest.mark.parametrize(
    "content",
    [
        lambda text: text.replace("1000000001.0", "1" + "0" * 400),
        lambda text: text.replace("1000000001.0", "1" + "0" * 5000),
        lambda text: text.replace("1000000001.0", "Infinity"),
        lambda text: text.replace('"adamw_threads": 1', '"adamw_threads": 1' + "0" * 400),
        lambda text: text.replace('"adamw_threads": 1', '"adamw_threads": 1.5'),
        lambda text: "[" * 30_000,
        lambda text: '{"format":' * 6_000,
        lambda text: text + " " * 2**20,
    ],
)
def test_a_crafted_file_is_measured_again_with_a_warning(measured, content):
    path = profile_path(cached_profile(CPU).key)
    path.write_text(content(path.read_text()))
    with pytest.warns(UserWarning, match="is measured again") as seen:
        again = cached_profile(CPU)
    assert len(seen) == 1
    assert len(measured) == 2
    assert stored_profile(again.key) == again


@pytest.mark.timeout(30)
@pytest.mark.parametrize("plant", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)], ids=["pipe", "device"])
def test_what_is_no_file_is_neither_followed_nor_waited_for(measured, plant):
    path = profile_path(cached_profile(CPU).key)
    path.unlink()
    plant(path)
    with pytest.warns(UserWarning, match="can't be read and is measured again"):
        again = cached_profile(CPU)
    assert stored_profile(again.key) == again
    assert not path.is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_folder_of_somebody_else_is_neither_read_nor_written(measured):
    path = profile_path(cached_profile(CPU).key)
    before = path.read_text()
    os.chown(path.parent, 12345, 12345)
    with pytest.warns(UserWarning, match="could not be kept .* belongs to user 12345") as seen:
        assert cached_profile(CPU) is not None
    assert len(seen) == 1
    assert len(measured) == 2
    assert path.read_text() == before


def test_switched_off_measures_nothing(measured, monkeypatch, tmp_path):
    monkeypatch.setenv("LSS_PROFILE", "off")
    assert cached_profile(CPU) is None
    assert not measured
    assert not list(tmp_path.rglob("*.json"))


def test_a_folder_that_takes_no_file_costs_a_warning(measured, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="set XDG_CACHE_HOME or LSS_PROFILE=off"):
        assert cached_profile(CPU) is not None


def test_a_machine_that_cannot_be_measured_costs_a_warning(measured, monkeypatch):
    def refuses(device, cpus):
        raise RuntimeError("cannot pin")

    monkeypatch.setattr(profile_cache, "measure", refuses)
    with pytest.warns(UserWarning, match=r"could not be measured \(LSS_PROFILE=off skips it\): cannot pin"):
        assert cached_profile(CPU) is None


def test_writers_that_race_never_leave_a_torn_file(measured):
    key = key_of(CPU, available_cpus())
    path, is_over, seen = profile_path(key), threading.Event(), []
    profile_cache._write(path, profile_of(key))

    def write(rate):
        while not is_over.is_set():
            profile_cache._write(path, profile_of(key, memory=tuple((i + 1, rate) for i in range(200))))

    writers = [threading.Thread(target=write, args=(rate,)) for rate in (1e9, 2e9)]
    for writer in writers:
        writer.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(200):
            profile = stored_profile(key)
            seen.append({rate for _, rate in profile.memory[:1]} | {rate for _, rate in profile.memory[-1:]})
    is_over.set()
    for writer in writers:
        writer.join()
    assert all(len(rates) == 1 or rates == {2e10, 3e10} for rates in seen)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def _measure_on_rank(rank: int, world_size: int, folder: str, build_cache: str):
    # The server that ranks are forked from has an environment of its own.
    os.environ |= {"XDG_CACHE_HOME": folder, "LSS_BUILD_CACHE": build_cache}
    os.environ.pop("LSS_PROFILE", None)
    return json.dumps(dataclasses.asdict(cached_profile(CPU)))


def test_ranks_measure_at_once_and_one_whole_file_stays(empty_cache, tmp_path):
    found = run_ranks(2, _measure_on_rank, str(tmp_path), os.environ["LSS_BUILD_CACHE"], limit_s=60)
    assert [path.suffix for path in (tmp_path / "lightning_superscale").iterdir()] == [".json"]
    kept = json.dumps(dataclasses.asdict(stored_profile(key_of(CPU, available_cpus()))))
    assert kept in found
