"""Programs that know nothing of ranks give the loss and the gradients of one process, their tokens shared among ranks.

Tolerance: fp64 has roundings of 2^-53; the sums of a model of two layers have some thousand terms, so 1e-12 relative to
the largest gradient is far above what order of summation changes, and far below any wrong term.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from lightning_superscale.comm.in_graph import AxisLink
from lightning_superscale.comm.mesh import MeshAxis
from lightning_superscale.sequence.tokens.layout import Replicated, Sharing, TokenDim
from lightning_superscale.sequence.tokens.tensor import plain, with_layout
from tests.helpers.extent import only_in_test_all
from tests.helpers.ranks import run_ranks
from tests.sequence.tokens.programs import PROGRAMS, assert_of_one_process, batch, made, mean_grads


def of_one_process(name: str):
    program = PROGRAMS[name]
    model = made(program)
    loss = program.loss(model, *batch(program.tokens))
    loss.backward()
    return loss.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def _shared(rank: int, world_size: int, names: list[str]):
    link, found = AxisLink(MeshAxis("sequence", rank, world_size, dist.group.WORLD)), {}
    for name in names:
        program = PROGRAMS[name]
        for mode in program.modes:
            sharing = Sharing(link=link, mode=mode)
            ids, labels = batch(program.tokens)
            model = made(program)
            tokens = Replicated(TokenDim(1, program.tokens), sharing)
            loss = program.loss(model, with_layout(ids, tokens), labels)
            loss.backward()
            found[name, mode] = plain(loss).detach(), mean_grads(model, world_size)
    return found


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=only_in_test_all)])
def shared(request):
    return run_ranks(request.param, _shared, list(PROGRAMS), limit_s=110.0)


@pytest.mark.parametrize("name", PROGRAMS)
def test_loss_and_gradients_are_those_of_one_process(shared, name):
    expected = of_one_process(name)
    for mode in PROGRAMS[name].modes:
        for one in shared:
            assert_of_one_process(one[name, mode], expected, mode)


def _dropping(rank: int, world_size: int):
    from torch.nn import functional

    from lightning_superscale.sequence.tokens.layout import Sharded

    sharing = Sharing(link=AxisLink(MeshAxis("sequence", rank, world_size, dist.group.WORLD)))
    torch.manual_seed(4)
    layout = Sharded(TokenDim(2, 8), sharing, sharing.frame(8))
    whole = torch.randn(1, 1, 8, 4).expand(-1, world_size, -1, -1)  # heads alike, one for each rank
    q = with_layout(layout.take(whole), layout)
    outputs = layout.gather(plain(functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5)))
    return outputs, torch.get_rng_state()


def test_ranks_drop_other_weights_of_attention_and_draw_alike_afterwards():
    found = run_ranks(2, _dropping)
    outputs, state = found[0]
    assert not torch.allclose(outputs[:, 0], outputs[:, 1])
    assert torch.equal(state, found[1][1])
