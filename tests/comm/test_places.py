"""Where a rank is, told from its Python frames."""

from __future__ import annotations

import pytest

from lightning_superscale.comm.places import OWN_COLLECTIVES, is_in_collective
from tests.comm.frames import stack_in

WAITS = "torch/distributed/_functional_collectives.py"


@pytest.mark.parametrize(
    ("files", "is_waiting"),
    [
        (["train.py", "torch/distributed/distributed_c10d.py"], True),
        (["train.py", OWN_COLLECTIVES], True),
        (["train.py", "lightning_superscale/comm/collectives.py"], False),  # of somebody else's copy
        # A collective of DTensor's, in forward or in backward: an operator, called through torch's dispatch.
        (["train.py", "torch/distributed/tensor/_api.py", WAITS, "torch/_ops.py", "torch/_library/autograd.py"], True),
        (["train.py", "torch/distributed/tensor/_dispatch.py", "torch/_ops.py"], False),
        (["torch/distributed/run.py", "train.py"], False),
        (["train.py", "torch/_ops.py"], False),
    ],
)
def test_a_rank_in_a_collective_is_told_from_one_that_computes(files, is_waiting):
    assert is_in_collective(stack_in(*files)) is is_waiting


def test_a_thread_that_is_gone_waits_for_nobody():
    assert not is_in_collective(())
