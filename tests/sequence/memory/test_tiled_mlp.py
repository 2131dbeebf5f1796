"""Tiles of the sequence: the values and gradients of one call, whole gradients once, and no whole intermediate."""

from __future__ import annotations

import copy
from datetime import timedelta

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lightning_superscale.comm.mesh import build_mesh
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.layout.mesh import MeshSpec
from lightning_superscale.sequence.memory.saved_bytes import SavedBytes
from lightning_superscale.sequence.memory.tiled_mlp import TiledForward
from tests.helpers.ranks import run_ranks

B, S, H = 2, 19, 12
TILES = [1, 4, 16, S, 1000]


class Gated(nn.Module):
    """The MLP of Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(H, 4 * H, bias=False), nn.Linear(H, 4 * H, bias=False)
        self.down = nn.Linear(4 * H, H, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """Each token goes to one of three experts, of which a tile may meet none, and the last is never met."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(H, 2)
        self.experts = nn.ModuleList(nn.Linear(H, H) for _ in range(3))

    def forward(self, x):
        weights, out = self.router(x).softmax(-1), torch.zeros_like(x)
        for i in range(2):
            is_here = weights.argmax(-1) == i
            if is_here.any():
                out[is_here] = self.experts[i](x[is_here]) * weights[is_here][:, i : i + 1]
        return out


class Picky(nn.Module):
    """Treats some tokens only; a tile without any has a result without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(H, H)

    def forward(self, x):
        out, is_picked = torch.zeros_like(x), x.detach()[..., 0] > 0.8
        if is_picked.any():
            out[is_picked] = self.layer(x[is_picked])
        return out


class Tied(nn.Module):
    """One weight under two names, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(H, H), nn.Linear(H, H)
        self.second.weight = self.first.weight
        self.second.bias.requires_grad_(False)

    def forward(self, x):
        return self.second(F.gelu(self.first(x)))


def mlp(p: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(H), nn.Linear(H, 4 * H), nn.GELU(), nn.Dropout(p), nn.Linear(4 * H, H))


MODULES = {"mlp": mlp, "gated": Gated, "experts": Experts, "picky": Picky, "tied": Tied}


def make(name, dtype=torch.float32):
    torch.manual_seed(0)
    return MODULES[name]().to(dtype), torch.randn(B, S, H, dtype=torch.float64).to(dtype).requires_grad_()


def run(function, module, x):
    out = function(x)
    (out * out.detach().cos()).sum().backward()
    grads = [x.grad, *(p.grad for p in module.parameters())]
    return [out.detach(), *grads]


# A weight's gradient is a sum over B * S rows, of products of sums over H and 4H; in any order the error of such a sum
# is below its length times eps times its terms' magnitudes (Higham 2002, eq. 4.4), on both sides, and here magnitudes
# add up to at most 20 times the largest result.
def tolerance(dtype):
    return 2 * (B * S + 5 * H) * torch.finfo(dtype).eps * 20


def assert_near(actual, expected, tolerance):
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            assert a.dtype == e.dtype
            assert (a - e).abs().max() <= tolerance * e.abs().max()


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODULES)
def test_values_and_gradients_are_those_of_one_call(name, dtype, tile):
    module, x = make(name, dtype)
    plain, y = make(name, dtype)
    limit = tolerance(dtype)
    assert limit < 1e-12 or dtype == torch.float32
    assert_near(run(TiledForward(module, tile=tile), module, x), run(plain, plain, y), limit)


def by_hand(module, x, tile):
    """Every tile by itself, with a graph of its own, gradients added up in the order of tiles."""
    outs, grads, sums = [], [], None
    tiles = [t.detach().requires_grad_() for t in x.detach().split(tile, dim=-2)]
    outs = [module(t) for t in tiles]
    for out in outs:
        parts = torch.autograd.grad((out * out.detach().cos()).sum(), list(module.parameters()), retain_graph=True)
        sums = parts if sums is None else [s + p for s, p in zip(sums, parts, strict=True)]
        grads.append(torch.autograd.grad((out * out.detach().cos()).sum(), tiles[len(grads)])[0])
    return [torch.cat(outs, -2).detach(), torch.cat(grads, -2), *sums]


@pytest.mark.parametrize("tile", [1, 4, 16, S])
def test_bits_are_those_of_tiles_by_hand_dropout_included(tile):
    MODULES["dropped"] = lambda: mlp(0.3)
    module, x = make("dropped")
    plain = copy.deepcopy(module)
    torch.manual_seed(5)
    actual = run(TiledForward(module, tile=tile), module, x)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    expected = by_hand(plain, x, tile)
    assert torch.equal(torch.get_rng_state(), after), "the check and backward leave the generator alone"
    assert all(map(torch.equal, actual, expected))
    del MODULES["dropped"]


def test_16_bit_gradients_of_tiles_are_summed_in_fp32():
    module = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        module.weight.fill_(1.0)
    x = torch.ones(1024, 1, dtype=torch.bfloat16)
    TiledForward(module, tile=1)(x).sum().backward()
    assert module.weight.grad.item() == 1024  # a sum of ones in bf16 stops at 256


@pytest.mark.parametrize("uses", [1, 2])
def test_hooks_see_each_gradient_once_and_whole(uses):
    module, x = make("gated")
    plain, y = make("gated")
    tiled, seen = TiledForward(module, tile=4), []
    for name, param in module.named_parameters():
        param.register_hook(lambda grad, name=name: seen.append((name, "made", grad.clone())))
        param.register_post_accumulate_grad_hook(
            lambda p, name=name: seen.append((name, "accumulated", p.grad.clone()))
        )
    h, g = x, y
    for _ in range(uses):
        h, g = tiled(h), plain(g)
    h.sum().backward()
    g.sum().backward()
    names = [name for name, _ in module.named_parameters()]
    assert sorted((name, kind) for name, kind, _ in seen) == sorted(
        (name, kind) for name in names for kind in ("made", "accumulated")
    )
    expected = dict(plain.named_parameters())
    assert_near([g for _, _, g in seen], [expected[name].grad for name, _, _ in seen], tolerance(torch.float32))


class Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        shapes = [t.shape for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *(s.numel() for s in shapes if s[-1:] == (4 * H,) and s[:-1].numel() != H)])
        return out


@pytest.mark.parametrize("tile", [1, 4])
def test_no_wider_intermediate_exists_than_that_of_a_tile(tile):
    module, x = make("mlp")
    with Largest() as largest:
        TiledForward(module, tile=tile)(x).sum().backward()
    assert largest.numel == B * tile * 4 * H


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_kept_for_backward_are_those_of_the_note(dtype):
    module, x = nn.Sequential(nn.Linear(H, 4 * H), nn.GELU(), nn.Linear(4 * H, H)).to(dtype), torch.randn(B, S, H)
    x = x.to(dtype).requires_grad_()
    with SavedBytes(module.parameters()) as tiled:
        TiledForward(module, tile=4, checks=False)(x)
    with SavedBytes(module.parameters()) as whole:
        module(x)
    assert tiled.nbytes == B * S * H * dtype.itemsize
    assert whole.nbytes == B * S * (H + 4 * H + 4 * H) * dtype.itemsize


def test_without_gradients_nothing_is_kept_and_the_value_is_the_same():
    module, x = make("mlp")
    tiled = TiledForward(module, tile=4)
    with torch.no_grad():
        out = tiled(x)
    assert not out.requires_grad
    assert torch.equal(out, tiled(x).detach())
    module.requires_grad_(False)
    assert not tiled(x.detach()).requires_grad


def test_a_first_call_in_inference_mode_checks_and_training_follows():
    module, x = make("mlp")
    tiled, layer = TiledForward(module, tile=4), nn.Linear(H, H)
    with torch.inference_mode():
        inside = tiled(x * 1)
        with pytest.raises(SuperScaleError, match="wants a gradient"):
            TiledForward(lambda h: layer(h), tile=4)(x * 1)
    assert torch.equal(inside, tiled(x).detach())


def test_an_input_without_gradient_and_frozen_parameters():
    module, x = make("mlp")
    plain, y = make("mlp")
    for m in (module, plain):
        m[1].requires_grad_(False)
    x, y = x.detach(), y.detach()
    assert_near(run(TiledForward(module, tile=4), module, x), run(plain, plain, y), tolerance(torch.float32))
    x.requires_grad_(), y.requires_grad_()
    for m in (module, plain):
        m.requires_grad_(False)
        m.zero_grad()
    assert_near(run(TiledForward(module, tile=4), module, x), run(plain, plain, y), tolerance(torch.float32))


def test_a_function_without_parameters_runs_in_tiles():
    x = torch.randn(B, S, H, requires_grad=True)
    out = TiledForward(F.relu, tile=4)(x)
    out.sum().backward()
    y = x.detach().requires_grad_()
    F.relu(y).sum().backward()
    assert torch.equal(out, F.relu(x))
    assert torch.equal(x.grad, y.grad)


def test_a_second_backward_gives_the_same_again_and_a_second_derivative_is_refused():
    module, x = make("mlp")
    module[3].p = 0.3
    out = TiledForward(module, tile=4, name="block 3's MLP")(x).square().sum()
    inputs = [x, *module.parameters()]
    first = torch.autograd.grad(out, inputs, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(out, inputs, retain_graph=True)))
    with pytest.raises(SuperScaleError, match="block 3's MLP ran in tiles.*create_graph=True"):
        torch.autograd.grad(out, x, create_graph=True)


def saving_products():
    return create_selective_checkpoint_contexts([torch.ops.aten.addmm.default])


CALLS = {
    "without": lambda f, x: f(x),
    "recomputed": lambda f, x: checkpoint(f, x, use_reentrant=False),
    "selective": lambda f, x: checkpoint(f, x, use_reentrant=False, context_fn=saving_products),
}


def test_inside_of_a_checkpoint_bits_are_equal_also_when_the_first_call_checks_there():
    results = []
    for call in CALLS.values():
        module, x = make("mlp")
        module[3].p = 0.3
        tiled = TiledForward(module, tile=4)
        torch.manual_seed(2)
        results.append(run(lambda z, tiled=tiled, call=call: call(tiled, z), module, x))
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


def test_a_result_that_does_not_depend_on_the_input():
    bias, x = nn.ParameterList([torch.ones(H)]), torch.randn(B, S, H, requires_grad=True)
    module = nn.Module()
    module.bias, module.forward = bias, lambda h: bias[0].expand_as(h)
    TiledForward(module, tile=4)(x).sum().backward()
    assert not x.grad.any()
    assert torch.equal(bias[0].grad, torch.full((H,), float(B * S)))


@pytest.mark.parametrize("tiled_by", [S, 4])
def test_autocast_in_forward_is_that_of_the_recompute_and_loses_no_gradient(tiled_by):
    results = []
    dtypes = set()
    for tile in (None, tiled_by):
        module, x = make("mlp")
        module[1].register_forward_hook(lambda _module, _inputs, out: dtypes.add(out.dtype))
        function = module if tile is None else TiledForward(module, tile=tile)
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(x).float().square().sum() + module[1](x).float().square().sum()  # its weight is used again
        loss.backward()
        results.append([loss.detach(), x.grad, *(p.grad for p in module.parameters())])
    # The same operations on the same bf16 numbers. In tiles the weight that is used twice is cast twice, so that its
    # two gradients add up in fp32 and not in bf16; and products of fewer rows may round otherwise. Either is 2^-9 at
    # most of the sum, and of the larger part.
    assert_near(results[1], results[0], 2**-7)
    assert tiled_by == 4 or torch.equal(results[1][0], results[0][0])
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_module_runs_in_tiles(backend):
    module, x = make("gated")
    plain, y = make("gated")
    compiled = torch.compile(module, backend=backend)
    assert_near(run(TiledForward(compiled, tile=4), module, x), run(plain, plain, y), tolerance(torch.float32))


def test_what_can_not_run_in_tiles_is_refused_by_name():
    x, layer = torch.randn(B, S, H, requires_grad=True), nn.Linear(H, H)
    attention = TiledForward(lambda h: F.scaled_dot_product_attention(h, h, h), tile=4, name="blocks.0.attn")
    for _ in range(2):  # and again
        with pytest.raises(SuperScaleError, match="blocks.0.attn can't run in tiles: it mixes tokens"):
            attention(x)
    with pytest.raises(SuperScaleError, match="wants a gradient"):
        TiledForward(lambda h: F.linear(h, layer.weight), tile=4)(x)
    for tile in (0, -1, True, 2.0):
        with pytest.raises(SuperScaleError, match="a tile has a number of rows of at least 1"):
            TiledForward(F.silu, tile=tile)
    with pytest.raises(SuperScaleError, match=r"expected a floating tensor \[..., S, H\]; found \(3,\)"):
        TiledForward(F.silu, tile=4)(torch.ones(3))
    with pytest.raises(SuperScaleError, match="of torch.int64"):
        TiledForward(F.silu, tile=4)(torch.ones(3, 4, dtype=torch.int64))
    for checks in (True, False):
        with pytest.raises(SuperScaleError, match="changes its input in place"):
            TiledForward(lambda h: h.mul_(2), tile=4, checks=checks)(torch.randn(B, S, H))
    with pytest.raises(SuperScaleError, match=r"returned \(2, 4, 12\) for a tile \(2, 3, 12\)"):
        TiledForward(lambda h: F.pad(h, (0, 0, 0, 4 - h.shape[-2])), tile=4, checks=False)(x)


def test_the_first_call_with_several_rows_is_the_one_that_checks():
    calls, tiled = [], TiledForward(lambda h: calls.append(h.shape) or F.silu(h), tile=4)
    tiled(torch.randn(1, H))
    assert len(calls) == 1
    tiled(torch.randn(3, H))
    assert len(calls) == 1 + 6 + 1
    tiled(torch.randn(3, H))
    assert len(calls) == 1 + 6 + 1 + 1


class Block(nn.Module):
    def __init__(self, mesh, tile=4) -> None:
        super().__init__()
        self.mlp = Gated()
        self.calls = 0
        self.tiled = [TiledForward(self.mlp, tile=tile, mesh=mesh, name="mlp")]
        self.mlp.register_forward_hook(self.count)

    def count(self, *_):
        self.calls += 1

    def forward(self, x):
        return x + self.tiled[0](x)


def _over_ranks(rank, world_size):
    """Under FSDP2, with sequences of different lengths, and what is refused on both ranks though one has the reason."""
    mesh = build_mesh(MeshSpec(shard=world_size), timedelta(seconds=30))
    device_mesh = init_device_mesh("cpu", (world_size,))
    torch.manual_seed(0)
    block, plain = Block(mesh), Block(None, tile=1000)
    plain.load_state_dict(block.state_dict())
    fully_shard(block, mesh=device_mesh)
    calls = []
    for lengths in ((S, S), (S, 3), (1, 9), (0, 5), (1, 1)):
        x = torch.randn(B, lengths[rank], H, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        block.calls = 0
        block(x).square().sum().backward()
        calls.append(block.calls)
        y = x.detach().requires_grad_()
        plain(y).square().sum().backward()
        if y.numel():
            assert_near([x.grad], [y.grad], tolerance(torch.float32))
    for name, param in block.named_parameters():
        whole = param.grad.full_tensor()
        mine = dict(plain.named_parameters())[name].grad
        every = DTensor.from_local(mine[None], device_mesh, [Shard(0)]).full_tensor().mean(0)
        assert_near([whole], [every], 4 * tolerance(torch.float32))
    with pytest.raises(SuperScaleError, match="its parameter 'gate.weight' is sharded|another rank refused"):
        TiledForward(block.mlp if rank == 0 else F.silu, tile=4, mesh=mesh)(x)
    wrong = TiledForward((lambda h: h.cumsum(-2)) if rank == 0 else F.silu, tile=4, mesh=mesh)
    with pytest.raises(SuperScaleError, match="mixes tokens" if rank == 0 else "another rank found"):
        wrong(torch.randn(B, S, H))
    return calls


def test_ranks_call_equally_often_whatever_their_lengths():
    calls = run_ranks(2, _over_ranks, limit_s=100)
    assert calls[0] == calls[1]
    # Forward and recompute of 5 tiles, with 6 calls to check; then of 5, of 3, of 2 and of 1.
    assert calls[0] == [16, 10, 6, 4, 2]
