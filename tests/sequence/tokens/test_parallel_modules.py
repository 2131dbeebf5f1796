"""What a plan may do to layers whose tokens ranks share, and what is refused before any work.

What such layers compute is in tests/plugins/trainer/test_sequence_beside_tensor_parallel.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from lightning_superscale.comm.in_graph import AxisLink
from lightning_superscale.comm.mesh import single_mesh
from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.sequence.tokens.layout import Reduced, Replicated, Sharing, TokenDim
from lightning_superscale.sequence.tokens.parallel_modules import ParallelModules, why_not_token_wise
from lightning_superscale.sequence.tokens.tensor import is_sharded, layout_of, with_layout
from lightning_superscale.sequence.whole import whole_sequences


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("tensor_parallel",))
    torch.distributed.destroy_process_group()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(5, 4), nn.LayerNorm(4)
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)


REFUSED = {
    "a style that cuts tokens": ({"norm": SequenceParallel()}, ("SequenceParallel", "'norm' (LayerNorm)", "leave it")),
    "DTensors of inputs": (
        {"up": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate())},
        ("PrepareModuleInput", "'up' (Linear)", "leave it out of the plan"),
    ),
    "a layout of tokens": (
        {"up": ColwiseParallel(), "down": RowwiseParallel(output_layouts=Shard(1))},
        ("'down' (Linear)", "Shard(dim=1)", "Shard(-1)"),
    ),
    "DTensors of outputs": (
        {"up": ColwiseParallel(use_local_output=False)},
        ("use_local_output=False for 'up' (Linear)", "output_layouts=Replicate()"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_plan_that_is_not_of_tokens_one_by_one_is_told_with_module_and_remedy(mesh, name):
    plan, told = REFUSED[name]
    why = why_not_token_wise(parallelize_module(Net(), mesh, plan))
    for text in told:
        assert text in why


def test_weights_that_are_dtensors_without_a_style_are_told(mesh):
    assert "distribute_module for '' (LayerNorm)" in why_not_token_wise(distribute_module(nn.LayerNorm(4), mesh))


def plan() -> dict:
    return {
        "embed": RowwiseParallel(input_layouts=Replicate()),
        "up": ColwiseParallel(),
        "down": RowwiseParallel(output_layouts=Replicate()),
    }


def test_layers_cut_by_features_are_let_in(mesh):
    assert why_not_token_wise(parallelize_module(Net(), mesh, plan())) is None
    assert why_not_token_wise(Net()) is None


@pytest.fixture
def net(mesh):
    made, around = parallelize_module(Net(), mesh, plan()), ParallelModules()
    around.install(made)
    yield made
    around.remove()
    assert not is_sharded(made.up(torch.ones(2, 3, 4)))


SHARING = Sharing(link=AxisLink.along_sequence(single_mesh()))


def ids():
    return with_layout(torch.tensor([[1, 2, 4]]), Replicated(TokenDim(1, 3), SHARING))


def test_tokens_go_through_layers_of_a_plan(net):
    before = SHARING.seen.num_entries
    x = net.embed(ids())
    y = net.down(net.up(x))
    assert is_sharded(x)
    assert is_sharded(y)
    assert y.placement.tokens == TokenDim(1, 3)
    assert SHARING.seen.num_entries == before + 1


def test_whole_sequences_and_values_of_all_tokens_keep_what_they_are(net):
    with whole_sequences():
        assert layout_of(net.embed(ids())) is None
    mean = with_layout(torch.ones(2, 4), Reduced(SHARING))
    assert isinstance(layout_of(net.up(mean)), Reduced)
    assert type(net.up(torch.ones(2, 4))) is torch.Tensor


def test_a_layer_that_would_mix_tokens_is_refused_by_its_rule(net):
    mixed = with_layout(torch.ones(2, 4), Replicated(TokenDim(1, 4), SHARING))
    with pytest.raises(SequenceParallelError, match="mixes tokens with one another"):
        net.up(mixed)


def test_a_dtensor_that_a_layer_gives_is_refused(mesh):
    made, around = parallelize_module(Net(), mesh, {"up": ColwiseParallel(use_local_output=False)}), ParallelModules()
    around.install(made)
    with pytest.raises(SequenceParallelError, match="gave DTensor; expected a plain tensor"):
        made.up(with_layout(torch.ones(1, 3, 4), Replicated(TokenDim(1, 3), SHARING)))
