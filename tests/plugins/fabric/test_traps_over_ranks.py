"""The traps of a third-party sharded strategy that Fabric's loops meet, with two ranks. Each test names its trap."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from torch.utils.data import DataLoader, DistributedSampler

from tests.helpers.ranks import run_ranks
from tests.plugins.fabric.loops import adamw, assert_equal, launched, loop, model

STRATEGIES = ("superscale", "zero2", "zero3", "superoffload")
ROOT = Path(__file__).parents[3]


def facts(rank, world_size):
    """What each strategy gives a rank, by trap."""
    found = {}
    for name in STRATEGIES:
        fabric, plain = launched(name, devices=world_size), model()
        with torch.no_grad():
            for param in plain.parameters():
                param.add_(rank)  # trap 9: only rank 0's are to be trained
        sampler = fabric.setup_dataloaders(DataLoader(torch.arange(8), batch_size=2)).sampler
        module, optimizer = fabric.setup(plain, adamw(plain))
        gathered = fabric.all_gather(torch.tensor([float(rank)], requires_grad=True), sync_grads=True)
        found[name] = {
            "sampler": (type(sampler) is DistributedSampler, list(sampler)),
            "sampler arguments": fabric.strategy.distributed_sampler_kwargs,
            "initial": {key: value.clone() for key, value in whole(fabric, module).items()},
            "collectives": (
                fabric.broadcast({"rank": rank}),
                float(fabric.all_reduce(torch.tensor(float(rank)), reduce_op="sum")),
                gathered.detach().flatten().tolist(),
                fabric.strategy.reduce_boolean_decision(rank == 0, all=False),
                fabric.strategy.reduce_boolean_decision(rank == 0, all=True),
            ),
        }
        # Trap 12: a step whose accumulation is asked for and then not asked for again averages all the same.
        x = torch.full((4, 17), float(rank + 1))
        with fabric.no_backward_sync(module, enabled=False):
            fabric.backward(module(x).sum())
        with fabric.no_backward_sync(module):
            fabric.backward(module(x).sum())
        fabric.backward(module(x).sum())
        own = plain[3].bias.grad
        found[name]["gradient"] = (own.full_tensor() if hasattr(own, "full_tensor") else own).clone()
        optimizer.step()
        optimizer.zero_grad()
        with torch.inference_mode():  # trap 3
            module(x)
        loop(fabric, module, optimizer, num=32)
        fabric.strategy.teardown()
        # Trap 5: whole plain weights after the end.
        found[name]["after"] = {key: (type(value), value.clone()) for key, value in plain.state_dict().items()}
    return found


def whole(fabric, module):
    return fabric.broadcast(dict(fabric.strategy.get_module_state_dict(module)))


@pytest.fixture(scope="module")
def found():
    return run_ranks(2, facts)


@pytest.mark.parametrize("name", STRATEGIES)
def test_traps_1_and_10_each_rank_has_samples_of_its_own(found, name):
    for rank, ranks in enumerate(found):
        assert ranks[name]["sampler"] == (True, list(range(rank, 8, 2)))
        assert ranks[name]["sampler arguments"] == {"num_replicas": 2, "rank": rank}


@pytest.mark.parametrize("name", STRATEGIES)
def test_trap_9_every_rank_begins_with_the_weights_of_rank_0(found, name):
    expected = {key: value.detach() for key, value in model().named_parameters()}
    for ranks in found:
        assert_equal({key: ranks[name]["initial"][key] for key in expected}, expected)


@pytest.mark.parametrize("name", STRATEGIES)
def test_trap_12_gradients_are_averages_once_accumulation_is_over(found, name):
    # A bias' gradient of a sum over 4 samples is 4; of three passes 12, on both ranks and in the mean.
    for ranks in found:
        assert torch.equal(ranks[name]["gradient"], torch.full((5,), 12.0))


@pytest.mark.parametrize("name", STRATEGIES)
def test_trap_13_collectives_are_over_both_ranks(found, name):
    for ranks in found:
        assert ranks[name]["collectives"] == ({"rank": 0}, 1.0, [0.0, 1.0], True, False)


@pytest.mark.parametrize("name", STRATEGIES)
def test_traps_3_and_5_after_an_evaluation_and_the_end_weights_are_whole_and_equal(found, name):
    params = [key for key, _ in model().named_parameters()]
    for key in params:
        (kind, first), (_, second) = (ranks[name]["after"][key] for ranks in found)
        assert kind is torch.Tensor
        assert torch.equal(first, second), key


def spawned(fabric, path):
    plain = model()
    module, optimizer = fabric.setup(plain, adamw(plain))
    loop(fabric, module, optimizer, num=32)
    state = fabric.strategy.get_module_state_dict(module._forward_module)
    fabric.strategy.teardown()
    if fabric.is_global_zero:
        torch.save(dict(plain.state_dict()), path)
    return len(state)


def test_trap_5_a_spawned_loop_gives_its_result_back(tmp_path):
    fabric = Fabric(accelerator="cpu", devices=2, strategy="zero3_spawn")
    assert fabric.launch(spawned, str(tmp_path / "weights.pt")) == len(model().state_dict())
    weights = torch.load(tmp_path / "weights.pt")
    assert all(type(value) is torch.Tensor for value in weights.values())
    assert not torch.equal(weights["0.weight"], model()[0].weight)


PROGRAM = """
import sys, time
import lightning_superscale
from pathlib import Path
from lightning.fabric import Fabric
from tests.plugins.fabric.loops import adamw, loop, model
flags = eval(sys.argv[1])
fabric = Fabric(**flags)
if flags:  # `fabric run` launches by itself
    fabric.launch()
plain = model()
module, optimizer = fabric.setup(plain, adamw(plain))
loop(fabric, module, optimizer, num=32)
# torchrun's ranks write unbuffered, where print() writes each argument by itself, between those of the other rank.
sys.stdout.write(f"rank {fabric.global_rank} of {fabric.world_size} {type(fabric.strategy).__name__}\\n")
sys.stdout.flush()
if len(sys.argv) > 2:
    Path(sys.argv[2], str(fabric.global_rank)).touch()
    for _ in range(10000):
        loop(fabric, module, optimizer, num=32)
"""


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def test_fabric_run_starts_both_ranks(tmp_path):
    program = tmp_path / "train.py"
    program.write_text(PROGRAM)
    flags = ["--accelerator=cpu", "--devices=2", "--strategy=superscale"]
    ended = subprocess.run(
        [sys.executable, "-m", "lightning.fabric.cli", *flags, str(program), "{}"],
        capture_output=True, text=True, timeout=180, env=environment(), cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    lines = sorted(line for line in (ended.stdout + ended.stderr).splitlines() if line.startswith("rank "))
    assert lines == [f"rank {rank} of 2 SuperScaleStrategy" for rank in (0, 1)]


def test_ranks_of_torchrun_end_by_its_sigterm(tmp_path):
    program = tmp_path / "train.py"
    program.write_text(PROGRAM)
    flags = "{'accelerator': 'cpu', 'devices': 2, 'strategy': 'superoffload'}"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    running = subprocess.Popen(
        [*launcher, str(program), flags, str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(), cwd=tmp_path,
    )  # fmt: skip
    try:
        end = time.monotonic() + 120
        while not all((tmp_path / str(rank)).exists() for rank in (0, 1)):
            assert time.monotonic() < end, "the ranks did not start"
            assert running.poll() is None, running.stdout.read()
            time.sleep(0.1)
        running.send_signal(signal.SIGTERM)
        output, _ = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode != 0
    assert "SIGTERM" in output, output[-2000:]
    assert output.count("of 2 SuperOffloadStrategy") == 2, output[-2000:]
