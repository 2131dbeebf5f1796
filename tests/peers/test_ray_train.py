"""Ray Train starts the ranks: `make test-peers`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
from tests.peers.ray_workers import cluster, run
from tests.soak.one_run import samples_of_steps

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not here: make test-peers"),
    pytest.mark.filterwarnings("ignore"),  # of Ray's own
]
ROOT = Path(__file__).resolve().parents[2]
ZERO3 = {"zero": 3, "offload": "superoffload"}


@pytest.fixture(scope="module")
def ray():
    with cluster(ROOT):
        yield


@pytest.fixture(scope="module")
def undisturbed(ray, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run(1, folder, strategy={}, steps=20)
    return folder


def samples(folder: Path) -> dict[int, tuple[int, ...]]:
    import json

    lines = [line for path in folder.glob("seen-*.jsonl") for line in path.read_text().splitlines()]
    return samples_of_steps([json.loads(line) for line in lines])


def assert_same_end(folder: Path, ranks: int, undisturbed: Path) -> None:
    found, expected = torch.load(folder / f"end-{ranks}.pt"), torch.load(undisturbed / "end-1.pt")
    assert (found["ranks"], found["strategy_ranks"], found["step"]) == (ranks, ranks, 20)
    for name, value in expected["weights"].items():
        assert torch.equal(found["weights"][name], value), name


@pytest.mark.parametrize("strategy", [{"offload": "superoffload"}, {"zero": 3}, ZERO3], ids=str)
def test_two_workers_train_and_one_goes_on(strategy, undisturbed, tmp_path):
    run(2, tmp_path, strategy=strategy, steps=10)
    assert torch.load(tmp_path / "end-2.pt")["strategy_ranks"] == 2
    assert {step: len(used) for step, used in samples(tmp_path).items()} == dict.fromkeys(range(10), 8)
    run(1, tmp_path, strategy={"offload": "superoffload"}, steps=20)
    assert_same_end(tmp_path, 1, undisturbed)
    assert samples(tmp_path) == samples(undisturbed)


def test_a_worker_that_is_killed_is_started_again_and_goes_on(undisturbed, tmp_path):
    run(2, tmp_path, strategy=ZERO3, steps=20, dies=True, max_failures=1)
    assert (tmp_path / "died").exists()
    assert_same_end(tmp_path, 2, undisturbed)


def test_ray_takes_the_strategy_for_its_own():
    from ray.train.lightning import RayDDPStrategy

    import lightning_superscale as lss
    from lightning_superscale.plugins.ray_train import RaySuperScaleStrategy

    assert issubclass(RaySuperScaleStrategy, (lss.SuperScaleStrategy, RayDDPStrategy))
    assert RaySuperScaleStrategy.root_device is RayDDPStrategy.root_device
    assert RaySuperScaleStrategy.distributed_sampler_kwargs is lss.SuperScaleStrategy.distributed_sampler_kwargs
