"""Checkpoints that earlier versions wrote: each is read forever, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_superscale.checkpoint.format.manifest import MAJOR, MINOR
from lightning_superscale.checkpoint.load.reader import open_checkpoint
from lightning_superscale.checkpoint.tools.verify import verify
from tests.checkpoint.golden import write
from tests.helpers.checkpoints import assert_filled, read_requests

VERSIONS = sorted(Path(write.__file__).parent.glob("v*"))


def test_the_present_version_has_one():
    assert f"v{MAJOR}.{MINOR}" in [path.name for path in VERSIONS]


@pytest.mark.parametrize("path", VERSIONS, ids=lambda path: path.name)
def test_what_an_earlier_version_wrote_is_read_bit_for_bit(path):
    folder = str(path / "golden.ckpt")
    assert verify(folder) == []
    source = open_checkpoint(folder)
    assert source.manifest.schema == f"lucp/{path.name[1:]}"
    assert dict(source.tensors) == write.state(path.name).tensors
    requests = read_requests(source.tensors)
    source.read(requests)
    assert_filled(requests, write.tensors(path.name))
    rest = source.rest
    assert torch.equal(rest.pop("best"), torch.tensor([1.0, 2.5]))
    assert rest == write.REST
    assert repr(rest["hyper_parameters"]["lr"]) == "0.30000000000000004"
    assert (source.step, dict(source.aliases), source.optimizers) == (write.STEP, write.ALIASES, (write.OPTIMIZER,))
