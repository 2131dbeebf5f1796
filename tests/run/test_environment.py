"""The mesh that the configs ask for, and what does not fit the ranks. Connections are held by tests over ranks."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lightning_superscale as lss
from lightning_superscale.config import SequenceConfig, ZeroConfig
from lightning_superscale.layout.mesh import MeshSpec
from lightning_superscale.run.environment import mesh_spec_of
from tests.helpers.trainers import trainer


@pytest.mark.parametrize(
    ("zero", "size", "world_size", "expected"),
    [
        ({"stage": 3}, None, 8, MeshSpec(shard=8)),
        ({"stage": 3}, 8, 8, MeshSpec(sequence=8)),
        ({"stage": 1}, 2, 8, MeshSpec(shard=4, sequence=2)),
        ({"stage": 0}, 2, 8, MeshSpec(replicate=4, sequence=2, shards_states=False)),
        ({"stage": 2, "shard_size": 4}, 2, 8, MeshSpec(replicate=2, shard=2, sequence=2)),
        ({"stage": 2, "shard_size": 4}, 4, 8, MeshSpec(replicate=2, sequence=4)),
        ({"stage": 3, "tensor_parallel": 2}, 2, 8, MeshSpec(shard=2, sequence=2, tensor=2)),
        ({"stage": 2, "shard_size": 2}, 1, 4, MeshSpec(replicate=2, shard=2)),
    ],
)
def test_the_axes_divide_the_ranks(zero, size, world_size, expected):
    sequence = None if size is None else SequenceConfig(size=size)
    spec = mesh_spec_of(ZeroConfig(**zero), sequence, world_size)
    assert spec == expected
    assert spec.world_size == world_size
    divides = world_size // zero.get("tensor_parallel", 1) if zero["stage"] else 1
    assert spec.size_of(*spec.shard_axes) == zero.get("shard_size", divides), "shard_size counts all that divide"


@pytest.mark.parametrize(
    ("zero", "size", "world_size", "message"),
    [
        ({"stage": 2}, 3, 8, "SequenceConfig.size=3 does not divide the 8 ranks of the Trainer. Use one of 1, 2, 4, 8"),
        ({"stage": 0}, 2, 1, "SequenceConfig.size=2 does not divide the 1 rank of the Trainer. Use one of 1, or other"),
        (
            {"stage": 3, "tensor_parallel": 4},
            4,
            8,
            "SequenceConfig.size=4 does not divide the 2 ranks that tensor_parallel=4 leaves of 8. Use one of 1, 2, or",
        ),
        (
            {"stage": 2, "shard_size": 2},
            4,
            8,
            "shard_size=2 counts the ranks that share a sequence, .* no multiple of SequenceConfig.size=4. "
            "Use one of 4, 8, or None",
        ),
        ({"stage": 2, "shard_size": 3}, 2, 8, "shard_size=3 does not divide the 8 .* Use one of 2, 4, 8, or None"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_sizes_that_do(zero, size, world_size, message):
    with pytest.raises(lss.SuperScaleError, match=message):
        mesh_spec_of(ZeroConfig(**zero), SequenceConfig(size=size), world_size)


def test_a_sequence_that_does_not_fit_is_refused_before_processes_start():
    with pytest.raises(lss.SuperScaleError, match=r"SequenceConfig.size=3 does not divide the 4 ranks"):
        trainer(lss.ZeroStrategy(sequence=3), devices=4)


def test_the_end_of_a_group_of_one_says_nothing_where_another_backend_is_registered():
    """FSDP2's imports register one, and torch then warns of a group whose default it does not know."""
    program = """
import torch.testing._internal.distributed.fake_pg
from lightning_superscale.run.environment import RankEnvironment
environment = RankEnvironment()
environment.open_alone()
assert environment._group_of_one is not None
environment.close()
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert "No backend of type" not in ended.stderr
