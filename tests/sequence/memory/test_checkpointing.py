"""Blocks that are recomputed: bits as without, the bytes that the note says, and every wrong use by name."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed._functional_collectives import all_reduce
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.sequence.memory.checkpointing import (
    BlockCheckpoints,
    RecomputePolicy,
    SavedReport,
    measure_saved_bytes,
    memory_budget_backend,
    must_save_ops,
)
from lightning_superscale.sequence.memory.saved_bytes import SavedBytes
from tests.helpers.ranks import run_ranks

B, S, H, HEADS = 2, 32, 16, 4
aten = torch.ops.aten


class Block(nn.Module):
    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(H), nn.Linear(H, 3 * H), nn.Linear(H, H)
        self.mlp = nn.Sequential(nn.LayerNorm(H), nn.Linear(H, 4 * H), nn.GELU(), nn.Linear(4 * H, H), nn.Dropout(p))
        self.p = p

    def forward(self, x, scale=1.0, *, mask=None):
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        h = x + F.dropout(self.out(attended.transpose(1, 2).flatten(-2)), self.p, self.training) * scale
        return h + self.mlp(h)


class Model(nn.Module):
    def __init__(self, p: float = 0.0, num: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, H)
        self.blocks = nn.ModuleList(Block(p) for _ in range(num))

    def forward(self, ids, **options):
        h = self.embed(ids)
        for block in self.blocks:
            h = block(h, **options)
        return h

    def named_blocks(self):
        return {f"blocks.{i}": block for i, block in enumerate(self.blocks)}


def train(model, seed=1, **options):
    torch.manual_seed(seed)
    ids = torch.randint(0, 20, (B, S))
    loss = model(ids, **options).square().mean()
    loss.backward()
    return [loss.detach(), torch.get_rng_state(), *(p.grad for p in model.parameters())]


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.of[func] += 1
        return func(*args, **(kwargs or {}))


POLICIES = {
    "nothing": RecomputePolicy(save="nothing"),
    "attention": RecomputePolicy(),
    "products": RecomputePolicy(save="products"),
    "gelu too": RecomputePolicy(also_save=(aten.gelu.default,)),
}


@pytest.mark.parametrize("mask", [None, torch.ones(S, S).tril().bool()], ids=["causal", "mask"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_bits_are_those_of_a_run_without_dropout_included(policy, p, mask):
    model, plain = Model(p), Model(p)
    checkpoints = BlockCheckpoints(model.named_blocks(), policy)
    for seed in range(2):
        assert all(map(torch.equal, train(model, seed, mask=mask, scale=0.5), train(plain, seed, mask=mask, scale=0.5)))
    checkpoints.close()


# Of a block's forward: four products with a bias, one attention; backward has products of another kind.
@pytest.mark.parametrize(
    ("save", "products", "attentions"), [("nothing", 8, 2), ("attention", 8, 1), ("products", 4, 1)]
)
def test_what_is_kept_runs_once_and_what_is_not_twice(save, products, attentions):
    model = Model(num=1)
    checkpoints = BlockCheckpoints(model.named_blocks(), RecomputePolicy(save=save))
    with Calls() as calls:
        # A backward may stop before the block's last product, which nothing needs.
        (model(torch.zeros(B, S, dtype=torch.int64)) ** 2).sum().backward()
    assert calls.of[aten.addmm.default] == products - (save != "products")
    assert calls.of[aten._scaled_dot_product_flash_attention_for_cpu.default] == attentions
    checkpoints.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_kept_are_those_of_the_note(dtype):
    e, block, x = dtype.itemsize, Block().to(dtype), torch.randn(B, S, H).to(dtype).requires_grad_()
    tokens = B * S
    reports = {save: measure_saved_bytes(block, RecomputePolicy(save=save), x) for save in ("nothing", "attention")}
    assert reports["nothing"].input_bytes == reports["attention"].input_bytes == tokens * H * e
    assert reports["nothing"].result_bytes == 0
    assert reports["attention"].result_bytes == tokens * (H * e + 4 * HEADS)
    # Inputs of the first norm, of the first product, of attention, of the output's product, of the second norm and of
    # the MLP's layers, 1 + 1 + 3 + 1 + 1 + 1 + 4 + 4 times H; per norm a mean and a deviation; per head a logarithm.
    assert reports["attention"].plain_bytes == tokens * (16 * H * e + 2 * 2 * e + 4 * HEADS)
    report = reports["attention"]
    assert report.saved_bytes == report.plain_bytes - report.input_bytes - report.result_bytes > 0
    assert isinstance(report, SavedReport)


def test_results_that_share_memory_count_once():
    layer, x = nn.Linear(H, 4 * H), torch.randn(B, S, H, requires_grad=True)
    policy = RecomputePolicy(
        save="nothing", also_save=(aten.addmm.default, aten.view.default, aten._unsafe_view.default)
    )
    # The input as rows, the product, and the product as a sequence.
    assert measure_saved_bytes(layer, policy, x).result_bytes == B * S * (H + 4 * H) * 4


def test_measuring_leaves_random_numbers_alone_and_no_graph():
    block, x = Block(0.5), torch.randn(B, S, H, requires_grad=True)
    state = torch.get_rng_state()
    measure_saved_bytes(block, RecomputePolicy(), x)
    assert torch.equal(torch.get_rng_state(), state)
    assert x.grad is None


def test_a_whole_model_keeps_its_blocks_inputs():
    model = Model()
    checkpoints = BlockCheckpoints(model.named_blocks(), RecomputePolicy(save="nothing"))
    ids = torch.zeros(B, S, dtype=torch.int64)
    with SavedBytes([*model.parameters(), ids]) as saved:
        model(ids)
    assert saved.nbytes == 3 * B * S * H * 4
    checkpoints.close()


@torch.library.custom_op("lss_tests::noisy", mutates_args=(), tags=[torch.Tag.nondeterministic_seeded])
def noisy(x: torch.Tensor) -> torch.Tensor:
    return x + torch.rand_like(x)


noisy.register_autograd(lambda ctx, grad: grad)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(H, H)

    def forward(self, x):
        return F.dropout(noisy(self.layer(x)).exp(), 0.5)


def test_an_operation_that_draws_random_numbers_is_recomputed_whatever_the_policy_says():
    """Kept, it would not draw again, and the dropout after it would have another mask."""
    results = []
    for also_save in ((), (torch.ops.lss_tests.noisy.default,)):
        torch.manual_seed(0)
        block = Noisy()
        policy = RecomputePolicy(save="nothing", also_save=also_save)
        checkpoints = BlockCheckpoints({"block": block}, policy) if also_save else None
        torch.manual_seed(1)
        x = torch.randn(4, H, requires_grad=True)
        block(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in block.parameters())])
        if checkpoints:
            checkpoints.close()
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_attention_that_drops_is_recomputed(p):
    ops = must_save_ops("attention")
    keeps = RecomputePolicy().keeps
    for op, place in ops.items():
        if place is not None:
            names = [argument.name for argument in op._schema.arguments]
            assert names[place] == "dropout_p", f"{op} has it elsewhere"
            assert keeps(op, [None] * place + [p], {}) == (p == 0.0)
            assert keeps(op, [], {"dropout_p": p}) == (p == 0.0)
            assert keeps(op, [], {})


def test_the_curated_list_has_every_fused_attention_of_this_torch():
    """Their results are what flash, efficient, cuDNN and CPU attention keep for backward."""
    fused = {
        name
        for name in dir(torch.ops.aten)
        + [op.split("::")[1].split(".")[0] for op in torch._C._dispatch_get_all_op_names()]
        if name.startswith(("_scaled_dot_product_", "_flash_attention", "_efficient_attention", "_cudnn_attention"))
        and "backward" not in name
        # Made of plain operations, of 8 bits, which don't train, and into memory that is given.
        and not name.endswith(("_math", "_math_for_mps", "_quantized", "_inplace"))
    }
    listed = {op.__name__.split(".")[0] for op, place in must_save_ops("attention").items() if place is not None}
    assert fused == listed


def _with_collective(rank, world_size):
    class Reducing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(H, H), nn.Linear(H, H)

        def forward(self, x):
            h = self.first(x)
            return self.second((all_reduce(h.detach(), "sum", list(range(world_size))) * h).exp())

    counts, grads = {}, []
    for save in ("nothing", "attention"):
        torch.manual_seed(0)
        block = Reducing()
        checkpoints = BlockCheckpoints({"block": block}, RecomputePolicy(save=save))
        with Calls() as calls:
            block(torch.ones(2, H, requires_grad=True)).sum().backward()
        counts[save] = calls.of[torch.ops._c10d_functional.all_reduce.default]
        grads.append([p.grad for p in block.parameters()])
        checkpoints.close()
    assert all(map(torch.equal, *grads))
    return counts


def test_functional_collectives_run_once():
    assert run_ranks(2, _with_collective, limit_s=60) == [{"nothing": 2, "attention": 1}] * 2


def test_without_gradients_blocks_run_plainly():
    model, plain = Model(), Model()
    checkpoints = BlockCheckpoints(model.named_blocks(), RecomputePolicy())
    ids = torch.zeros(B, S, dtype=torch.int64)
    with torch.no_grad(), Calls() as calls:
        out = model(ids)
    assert torch.equal(out, plain(ids).detach())
    assert calls.of[aten.addmm.default] == 3 * 4
    checkpoints.close()


def test_hooks_run_once_names_stay_and_close_gives_everything_back():
    model, calls = Model(), []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    model.blocks[0].register_forward_hook(lambda *_: calls.append("after"))
    names, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    checkpoints = BlockCheckpoints(model.named_blocks(), RecomputePolicy())
    assert list(model.state_dict()) == names
    assert all(isinstance(block, Block) and type(block).__name__ == "Block" for block in model.blocks)
    train(model)
    assert calls == ["before", "after"]
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model.embed))
    assert type(copied.blocks[0]) is Block, "a copy is not recomputed"
    assert type(pickled) is nn.Embedding
    assert type(pickle.loads(pickle.dumps(Model().blocks[0]))) is Block
    checkpoints.close()
    assert [type(m) for m in model.modules()] == classes
    assert all(map(torch.equal, train(Model()), train(Model())))


def test_a_graph_outlives_close_and_a_module_dies_with_its_last_reference():
    model, plain = Model(0.3), Model(0.3)
    checkpoints = BlockCheckpoints(model.named_blocks(), RecomputePolicy())
    for m in (model, plain):
        torch.manual_seed(1)
        m.loss = m(torch.zeros(B, S, dtype=torch.int64)).square().mean()
    checkpoints.close()
    for m in (model, plain):
        m.loss.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    kept = Model()
    BlockCheckpoints(kept.named_blocks(), RecomputePolicy())
    gone = weakref.ref(kept.blocks[0])
    del kept
    assert gone() is None


def test_wrong_uses_are_refused_by_name():
    model = Model()
    checkpoints = BlockCheckpoints({"blocks.0": model.blocks[0]}, RecomputePolicy())
    with pytest.raises(SuperScaleError, match="block 'blocks.0' is recomputed already"):
        BlockCheckpoints(model.named_blocks(), RecomputePolicy())
    assert type(model.blocks[1]) is Block, "refused before anything changed"
    checkpoints.close()
    with pytest.raises(SuperScaleError, match="block 'b.mlp' is within block 'b'"):
        BlockCheckpoints({"b": model.blocks[0], "b.mlp": model.blocks[0].mlp}, RecomputePolicy())
    with pytest.raises(SuperScaleError, match="block 'b' is recomputed already"):
        BlockCheckpoints({"a": model.blocks[0], "b": model.blocks[0]}, RecomputePolicy())
    model.blocks[0].forward = model.blocks[0].forward
    with pytest.raises(SuperScaleError, match="block 'b' has a forward of its own"):
        BlockCheckpoints({"b": model.blocks[0]}, RecomputePolicy())
    with pytest.raises(SuperScaleError, match="found save='atention'; did you mean 'attention'"):
        RecomputePolicy(save="atention")
    with pytest.raises(SuperScaleError, match="also_save takes operations such as torch.ops.aten.mm.default"):
        RecomputePolicy(also_save=(torch.mm,))


# A partitioner of torch's that needs no C++ compiler.
INNER = "aot_eager_decomp_partition"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_memory_budget_holds_while_a_block_is_compiled_and_lowers_what_it_keeps():
    import torch._functorch.config as config

    saved, grads = {}, []
    x = torch.randn(B, S, H)
    for budget in (1.0, 0.5, 0.0):
        torch.manual_seed(0)
        torch._dynamo.reset()
        block, y = Block(), x.clone().requires_grad_()
        compiled = torch.compile(block, backend=memory_budget_backend(budget, INNER))
        before = config.activation_memory_budget
        compiled(y)  # compiles
        assert config.activation_memory_budget == before == 1.0
        with SavedBytes([*block.parameters(), y]) as counted:
            out = compiled(y)
        out.square().sum().backward()
        saved[budget] = counted.nbytes
        grads.append([y.grad, *(p.grad for p in block.parameters())])
    assert saved[1.0] > saved[0.5] > saved[0.0]
    # Decomposed in other places, sums of up to 4H terms round otherwise: see the tolerance of tests/test_tiled_mlp.py.
    limit = 2 * (B * S + 5 * H) * torch.finfo(torch.float32).eps * 20
    for other in grads[1:]:
        assert all((a - b).abs().max() <= limit * b.abs().max() for a, b in zip(other, grads[0], strict=True))


@pytest.mark.parametrize("budget", [-0.1, 1.1, True, "half"])
def test_a_budget_is_a_share(budget):
    with pytest.raises(SuperScaleError, match="a memory budget is a share between 0 and 1"):
        memory_budget_backend(budget)
