"""Compiled modules compute with shared tokens what they compute uncompiled, or say why they can't.

Tolerance: fp64 as in tokens/test_tensor.py; sums of some hundred terms.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lightning_superscale.comm.in_graph import AxisLink
from lightning_superscale.comm.mesh import MeshAxis
from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.sequence.compiled import CompiledModules
from lightning_superscale.sequence.hugging_face import HuggingFaceAttention
from lightning_superscale.sequence.tokens.layout import Replicated, Sharing, TokenDim
from lightning_superscale.sequence.tokens.outputs import _own_output
from lightning_superscale.sequence.tokens.tensor import plain, with_layout
from tests.helpers.extent import only_in_test_all
from tests.helpers.ranks import run_ranks
from tests.sequence.tokens.programs import PROGRAMS, assert_of_one_process, batch, made, mean_grads
from tests.sequence.tokens.test_tensor import of_one_process

TOKENS, WIDTH = 10, 6
# Of each rank, in forward and backward: query, key, value and output of 2 samples, 5 of the tokens, in fp64.
ALL_TO_ALL = 2 * 4 * (2 * 5 * WIDTH) * 8


class Block(nn.Module):
    """Attends, with a linear layer before and one after."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner, self.outer = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def attend(self, x, dropout_p=0.0):
        q, k, v = self.inner(x).view(*x.shape[:2], 2, -1).transpose(1, 2).chunk(3, -1)
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p)

    def forward(self, x):
        return self.outer(self.attend(x).transpose(1, 2).flatten(2))


class Checkpointed(Block):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False) + x


class Constants(Block):
    def forward(self, x):
        return (
            super().forward(x) * torch.tensor(2.0, dtype=x.dtype) + torch.arange(x.shape[1], device=x.device)[:, None]
        )


class HandsOn(Block):
    def forward(self, x):
        return super().forward(x), x


class AsksForItsOrder(Block):
    def forward(self, x):
        return super().forward(x) if x.is_contiguous() else super().forward(2 * x)


class Grows(Block):
    scale = 0.5

    def forward(self, x):
        self.scale = self.scale + 0.25
        return super().forward(x) * self.scale


class Keeps(Block):
    def forward(self, x):
        self.kept = x
        return super().forward(x)


class Hooks(Block):
    def forward(self, x):
        x.register_hook(lambda grad: grad * 0.5)
        return super().forward(x)


class HooksInside(Block):
    def forward(self, x):
        y = super().forward(x)
        y.register_hook(lambda grad: grad.clamp(-1e-3, 1e-3))
        return y * 2


class Squares(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class Applies(Block):
    def forward(self, x):
        return Squares.apply(super().forward(x))


class Marks(Block):
    def forward(self, x):
        x.scale = 0.5
        return super().forward(x)


class Breaks(Block):
    def forward(self, x):
        torch._dynamo.graph_break()
        return super().forward(x)


class Mixes(Block):
    def forward(self, x):
        return super().forward(torch.fft.fft(x, dim=1).real)  # here


class Drops(Block):
    def forward(self, x):
        return self.outer(self.attend(x, 0.5).transpose(1, 2).flatten(2))


class Thins(Block):
    def forward(self, x):
        return functional.dropout(super().forward(x), 0.5)


def _inputs(tokens: int = TOKENS):
    return torch.randn(2, tokens, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _found(cls, sharing: Sharing | None, *, compiles: bool, lengths=(TOKENS,)):
    """The gradients, counts and compiled kinds of a loss over one block after each of some lengths."""
    torch._dynamo.reset()
    block, modules = cls().double(), CompiledModules()
    first = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        first.weight.copy_(torch.eye(WIDTH))
    if compiles:
        block.compile(backend="aot_eager")
    if sharing is not None:
        modules.install(block, sharing)
    forward = block.forward
    try:
        for length in lengths:
            x = _inputs(length)
            if sharing is not None:
                x = with_layout(x, Replicated(TokenDim(1, length), sharing))
            torch.manual_seed(9)
            found = block(first(x))
            loss = sum(one.square().mean() for one in (found if isinstance(found, tuple) else (found,)))
            loss.backward()
            loss = plain(loss).detach()
    finally:
        modules.remove()
    assert "forward" not in vars(block)
    grads = {}
    for name, param in (*block.named_parameters(), *first.named_parameters()):
        if sharing is not None:
            dist.all_reduce(param.grad)  # noqa: TID251 # as a strategy does in the end
            param.grad /= sharing.link.size
        grads[name] = param.grad
    return loss, grads, getattr(forward, "num_kinds", 0), getattr(forward, "why_not", "")


SAME = (Block, Checkpointed, Constants, HandsOn, Thins, AsksForItsOrder)
REFUSED = (Keeps, Hooks, HooksInside, Applies, Marks, Mixes, Drops)


def _why_not(num: int, sharing: Sharing):
    """Graphs, and why there are none, of some modules of one class, one after the other."""
    torch._dynamo.reset()
    net, modules = nn.Sequential(*(Block().double() for _ in range(num))), CompiledModules()
    for block in net:
        block.compile(backend="aot_eager")
        block.register_forward_hook(_own_output)  # as stage 3 does
    modules.install(net, sharing)
    forwards = [block.forward for block in net]
    try:
        first = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        net(first(with_layout(_inputs(), Replicated(TokenDim(1, TOKENS), sharing))))
    finally:
        modules.remove()
    return [(forward.num_kinds, forward.why_not) for forward in forwards]


def _all(rank: int, world_size: int):
    link = AxisLink(MeshAxis("sequence", rank, world_size, dist.group.WORLD))
    sharing, found = Sharing(link=link), {}
    for cls in SAME:
        of = {}
        for compiles in (False, True):
            link.counts.clear()
            entries = sharing.seen.num_entries
            of[compiles] = (
                *_found(cls, sharing, compiles=compiles),
                dict(link.counts.nbytes),
                sharing.seen.num_entries - entries,
            )
        found[cls.__name__] = of
    for cls in REFUSED:
        with pytest.raises(SequenceParallelError) as refusal:
            _found(cls, sharing, compiles=True)
        found[cls.__name__] = str(refusal.value)
    found["grows"] = _found(Grows, sharing, compiles=True, lengths=(10, 10, 10))
    found["lengths"] = _found(Block, sharing, compiles=True, lengths=(10, 12, 10, 11, 12))
    with torch._dynamo.config.patch(recompile_limit=2):
        found["too many"] = _found(Block, sharing, compiles=True, lengths=(10, 12, 1))
        found["three"] = _why_not(3, sharing)
    found["Breaks"] = _found(Breaks, sharing, compiles=True)
    return found


@pytest.fixture(scope="module")
def found():
    return run_ranks(2, _all)


def _assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("cls", SAME)
def test_a_compiled_module_is_itself(found, cls):
    loss, grads, *_ = _found(cls, None, compiles=False)
    for of in (one[cls.__name__] for one in found):
        for is_compiled in (False, True):
            _assert_equal(of[is_compiled][:2], (loss, grads))
        assert of[True][2] == 1
        assert of[True][5] == of[False][5] == 1  # tensors of which ranks took their parts
        times = 1.5 if cls is Checkpointed else 1  # backward computes the forward again
        assert of[True][4]["all_to_all"] == of[False][4]["all_to_all"] == ALL_TO_ALL * times


def test_each_length_is_compiled_once(found):
    loss, grads, *_ = _found(Block, None, compiles=False, lengths=(10, 12, 10, 11, 12))
    for one in found:
        _assert_equal(one["lengths"][:2], (loss, grads))
        assert one["lengths"][2] == 4  # the first one twice: the second one tells Dynamo that lengths differ


def test_each_number_is_compiled_once(found):
    loss, grads, *_ = _found(Grows, None, compiles=False, lengths=(10, 10, 10))
    for one in found:
        _assert_equal(one["grows"][:2], (loss, grads))
        assert one["grows"][2:] == (3, "")


def test_a_module_that_is_no_one_graph_runs_uncompiled(found):
    loss, grads, *_ = _found(Breaks, None, compiles=False)
    for one in found:
        _assert_equal(one["Breaks"][:2], (loss, grads))
        assert one["Breaks"][2] == 0
        assert "graph_break()" in one["Breaks"][3]


def test_modules_of_one_class_have_the_recompile_limit_each(found):
    for one in found:
        assert one["three"] == [(1, "")] * 3


def test_a_module_over_the_recompile_limit_runs_uncompiled(found):
    loss, grads, *_ = _found(Block, None, compiles=False, lengths=(10, 12, 1))
    for one in found:
        _assert_equal(one["too many"][:2], (loss, grads))
        assert "recompile limit exceeded" in one["too many"][3]


def test_what_cannot_be_shared_is_refused_with_its_line(found):
    source = Path(__file__).read_text().splitlines()
    line = next(number for number, text in enumerate(source, 1) if text.endswith("# here"))
    for one in found:
        assert "fft_fft([2, 10, 6] with tokens on dim 1)" in one["Mixes"]
        assert f"in Mixes at {__file__}:{line}" in one["Mixes"]
        assert "keeps a tensor of tokens that it was given" in one["Keeps"]
        for name in ("Hooks", "Marks"):
            assert "registers a hook, or sets an attribute, on a tensor of tokens that it was given" in one[name]
        # torch 2.11 captures a hook as an autograd function.
        assert "a tensor of tokens, for which torch captures code" in one["HooksInside"]
        assert "Applies is compiled, and applies an autograd function to a tensor of tokens" in one["Applies"]
        assert f" at {__file__}:" in one["Applies"]
        assert "drops weights of attention in a compiled module" in one["Drops"]


def test_a_copy_of_a_compiled_module_has_a_forward_of_its_own():
    block, modules = Block(), CompiledModules()
    block.compile(backend="eager")
    modules.install(block, Sharing(link=AxisLink(MeshAxis("sequence", 0, 1))))
    copied = copy.deepcopy(block)
    with torch.no_grad():
        copied.outer.weight.zero_()
    found = copied(_inputs().float())
    modules.remove()
    assert torch.equal(found, copied.outer.bias.expand_as(found))


def _of_transformers(sharing: Sharing | None, name: str, *, compiles_whole: bool):
    transformers = pytest.importorskip("transformers")
    torch._dynamo.reset()
    torch.manual_seed(7)
    sizes = {"vocab_size": 29, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "use_cache": False}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 5}
    config = getattr(transformers, f"{name}Config")(**sizes, **heads)
    model = getattr(transformers, f"{name}ForCausalLM")(config).double()
    compiled, modules, attention = model, CompiledModules(), HuggingFaceAttention()
    ids = torch.randint(29, (2, 14), generator=torch.Generator().manual_seed(3))
    tokens = ids
    if sharing is not None:
        if compiles_whole:
            compiled = torch.compile(model, backend="aot_eager")
        for layer in () if compiles_whole else model.model.layers:
            layer.compile(backend="aot_eager")
        modules.install(compiled, sharing)
        attention.install(compiled)
        tokens = with_layout(ids, Replicated(TokenDim(1, 14), sharing))
    loss = compiled(input_ids=tokens, labels=tokens).loss
    loss.backward()
    said = modules.reasons()
    attention.remove()
    modules.remove()
    grads = {key: param.grad for key, param in model.named_parameters()}
    return plain(loss).detach(), grads if sharing is None else mean_grads(model, sharing.link.size), said


def _all_of_transformers(rank: int, world_size: int):
    sharing = Sharing(link=AxisLink(MeshAxis("sequence", rank, world_size, dist.group.WORLD)))
    return [_of_transformers(sharing, "Mistral", compiles_whole=is_whole) for is_whole in (True, False)]


def test_models_of_transformers_are_compiled_whole_and_layer_by_layer():
    loss, grads, _ = _of_transformers(None, "Mistral", compiles_whole=False)
    for whole, by_layer in run_ranks(2, _all_of_transformers):
        assert whole[2] == ["compiled, with shared tokens: 1 module, 1 graph"]
        assert by_layer[2] == ["compiled, with shared tokens: 2 modules, 2 graphs"]
        for found_loss, found, _ in (whole, by_layer):
            _assert_equal(found_loss, loss)
            for key, grad in grads.items():
                torch.testing.assert_close(found[key], grad, rtol=0, atol=1e-12)


def _programs(rank: int, world_size: int, backend: str, names: list[str], num_modes: int):
    link, found = AxisLink(MeshAxis("sequence", rank, world_size, dist.group.WORLD)), {}
    for name in names:
        for mode in PROGRAMS[name].modes[:num_modes]:
            torch._dynamo.reset()
            program, sharing, modules = PROGRAMS[name], Sharing(link=link, mode=mode), CompiledModules()
            ids, labels = batch(program.tokens)
            model = made(program)
            compiled = torch.compile(model, backend=backend)
            modules.install(compiled, sharing)
            tokens = Replicated(TokenDim(1, program.tokens), sharing)
            loss = program.loss(compiled, with_layout(ids, tokens), labels)
            loss.backward()
            modules.remove()
            found[name, mode] = plain(loss).detach(), mean_grads(model, world_size)
    return found


@pytest.mark.parametrize(
    ("backend", "names", "num_modes"),
    [
        ("aot_eager", ["odd length, masked"], 1),
        *(pytest.param("aot_eager", list(PROGRAMS)[i::8], 4, marks=only_in_test_all) for i in range(8)),
        *(pytest.param("inductor", [name], 4, marks=only_in_test_all) for name in ("given labels", "grouped")),
    ],
)
def test_compiled_programs_have_the_gradients_of_one_process(backend, names, num_modes):
    for found in run_ranks(2, _programs, backend, names, num_modes, limit_s=230.0):
        for (name, mode), one in found.items():
            assert_of_one_process(one, of_one_process(name), f"{name} {mode}")
