"""torch's flex_attention of tokens that ranks share is that of one process, with any scores and masks.

torch refuses a backward of it on the CPU by a look at the device alone (`_validate_device`). The tests lift that: what
then runs are the operations by which torch defines the function's gradient. Most cases run them on the ranks without
torch.compile, which takes seconds.

Tolerance: see test_tensor.py.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import flex_attention as torchs
from torch.nn.attention.flex_attention import AuxRequest, and_masks, create_block_mask, flex_attention

from lightning_superscale.comm.in_graph import AxisLink
from lightning_superscale.comm.mesh import MeshAxis
from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.sequence.tokens.flex_attention import FlexAttention, whole_of
from lightning_superscale.sequence.tokens.layout import Replicated, Sharing, TokenDim
from lightning_superscale.sequence.tokens.tensor import plain, with_layout
from tests.helpers.ranks import run_ranks

VOCABULARY, DIM, BATCH = 11, 4, 2
compiled = torch.compile(flex_attention, backend="eager")


def causal(b, h, i, j):
    return i >= j


def block_mask(mask_mod, x, heads=None):
    return create_block_mask(mask_mod, BATCH, heads, x.shape[1], x.shape[1], device="cpu", BLOCK_SIZE=4)


def plainly(model, ids, x, q, k, v):
    return model.attend(q, k, v, enable_gqa=True)


def alibi(model, ids, x, q, k, v):
    slopes = 2.0 ** -torch.arange(q.shape[1], dtype=torch.float64)

    def score(s, b, h, i, j):
        return s + slopes[h] * (j - i)

    return model.attend(q, k, v, score, block_mask(causal, x), enable_gqa=True)


def documents(model, ids, x, q, k, v):
    """Documents end at small ids, which are tokens of the batch."""
    document = (ids < 3).cumsum(1)

    def same(b, h, i, j):
        return document[b, i] == document[b, j]

    return model.attend(q, k, v, block_mask=block_mask(and_masks(causal, same), x), enable_gqa=True, scale=0.3)


def windows(model, ids, x, q, k, v):
    """Each head has a window of its own."""
    widths = torch.arange(q.shape[1]) + 2

    def near(b, h, i, j):
        return (i >= j) & (i - j < widths[h])

    return model.attend(q, k, v, block_mask=block_mask(near, x, q.shape[1]), enable_gqa=True)


def importance(model, ids, x, q, k, v):
    """A number that the model computes of each token, which ranks share."""
    weight = model.importance(x).squeeze(-1).detach()

    def score(s, b, h, i, j):
        return s + weight[b, j]

    return model.attend(q, k, v, score_mod=score, enable_gqa=True)


def learned(model, ids, x, q, k, v):
    """Parameters that score functions read get gradients."""
    slopes = model.slopes

    def score(s, b, h, i, j):
        return s + slopes[h] * (j - i)

    return model.attend(q, k, v, score, enable_gqa=True)


def with_sums(model, ids, x, q, k, v):
    """The logarithm of the sum of scores is a result too."""
    output, aux = model.attend(q, k, v, None, block_mask(causal, x), enable_gqa=True, return_aux=AuxRequest(lse=True))
    return output * torch.sigmoid(aux.lse)[..., None]


# Program, heads, key-value heads, tokens.
CASES = {
    "plain": (plainly, 4, 4, 16),
    "alibi": (alibi, 4, 2, 16),
    "documents": (documents, 4, 2, 13),
    "windows": (windows, 3, 1, 16),
    "importance": (importance, 4, 4, 10),
    "learned": (learned, 4, 2, 12),
    "sums": (with_sums, 2, 2, 16),
}
MODES = ("ulysses", "allgather")


class Model(nn.Module):
    def __init__(self, heads: int, kv_heads: int, attend) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.heads, self.kv_heads, self.attend = heads, kv_heads, attend
        self.embed = nn.Embedding(VOCABULARY, 8, dtype=torch.float64)
        self.qkv = nn.Linear(8, (heads + 2 * kv_heads) * DIM, dtype=torch.float64)
        self.importance = nn.Linear(8, 1, dtype=torch.float64)
        self.slopes = nn.Parameter(torch.linspace(0, 1, heads, dtype=torch.float64))
        self.out = nn.Linear(heads * DIM, VOCABULARY, dtype=torch.float64)

    def forward(self, program, ids):
        x = self.embed(ids)
        sizes = [self.heads * DIM, self.kv_heads * DIM, self.kv_heads * DIM]
        q, k, v = (y.unflatten(-1, (-1, DIM)).transpose(1, 2) for y in self.qkv(x).split(sizes, -1))
        return self.out(program(self, ids, x, q, k, v).transpose(1, 2).flatten(2))


def batch(tokens: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (BATCH, tokens), generator=torch.Generator().manual_seed(4))


def found(name: str, attend, sharing: Sharing | None = None):
    program, heads, kv_heads, num_tokens = CASES[name]
    model, ids = Model(heads, kv_heads, attend), batch(num_tokens)
    install = FlexAttention()
    if sharing is not None:
        ids = with_layout(ids, Replicated(TokenDim(1, num_tokens), sharing))
        install.install(model)
    try:
        loss = F.cross_entropy(model(program, ids).flatten(0, 1), plain(ids).flatten())
    finally:
        install.remove()
    loss.backward()
    return plain(loss).detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def _shared(rank: int, world_size: int):
    torchs._validate_device = lambda *tensors: None
    link, results = AxisLink(MeshAxis("sequence", rank, world_size, dist.group.WORLD)), {}
    for name in CASES:
        for mode in MODES:
            sharing = Sharing(link=link, mode=mode)
            # Without torch.compile torch makes no gradients of tensors that functions close over.
            torchs._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = name != "learned"
            loss, grads = found(name, compiled if name == "alibi" else flex_attention, sharing)
            for grad in grads.values():
                dist.all_reduce(grad)  # noqa: TID251 # as a strategy does in the end
                grad /= world_size
            results[name, mode] = loss, grads
            assert [met.mode for met in sharing.seen.attention] == [mode]
            assert all(sharing.seen.attention.values())
    logits = {}
    torchs._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    for mode in MODES if find_spec("transformers") else ():
        sharing = Sharing(link=link, mode=mode)
        logits[mode] = _transformers(sharing)
        assert [met.mode for met in sharing.seen.attention] == [mode]
    return results, _refusals(link), logits


def _transformers(sharing: Sharing | None):
    """Logits of a model that attends by flex_attention, with padding: in evaluation, since torch trains no other."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    sizes = {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, attn_implementation="flex_attention")).double()
    ids, install = batch(14), FlexAttention()
    kept = torch.ones_like(ids)
    kept[1, 9:] = 0
    if sharing is not None:
        ids, kept = (with_layout(x, Replicated(TokenDim(1, 14), sharing)) for x in (ids, kept))
        install.install(model)
    try:
        # What transformers compiles runs as it is.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            logits = model(input_ids=ids, attention_mask=kept, use_cache=False).logits
    finally:
        install.remove()
    return logits if sharing is None else logits.placement.gather(plain(logits))


def _refusals(link: AxisLink):
    told = {}
    for name, mode in (("plain", "ring"), ("short mask", "ulysses")):
        sharing = Sharing(link=link, mode=mode)
        model, install = Model(4, 4, flex_attention), FlexAttention()
        install.install(model)
        ids = with_layout(batch(16), Replicated(TokenDim(1, 16), sharing))
        mask = create_block_mask(causal, None, None, 8, 8, device="cpu") if name == "short mask" else None
        try:
            model(lambda model, ids, x, q, k, v: model.attend(q, k, v, block_mask=mask), ids)  # noqa: B023
        except SequenceParallelError as error:
            told[name] = str(error)
        finally:
            install.remove()
    return told


@pytest.fixture(scope="module")
def shared():
    return run_ranks(2, _shared, limit_s=110.0)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, of what it does where nobody compiles
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_one_process(shared, name, monkeypatch):
    monkeypatch.setattr(torchs, "_validate_device", lambda *tensors: None)
    loss, grads = found(name, flex_attention)
    largest = max(float(g.abs().max()) for g in grads.values())
    for mode in MODES:
        for results, _, _ in shared:
            found_loss, found_grads = results[name, mode]
            assert abs(found_loss - loss) <= 1e-12 * abs(loss), mode
            assert found_grads.keys() == grads.keys()
            for key, grad in grads.items():
                torch.testing.assert_close(found_grads[key], grad, rtol=0, atol=1e-12 * largest, msg=f"{mode} {key}")


def test_models_of_transformers_attend_by_it(shared, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(torchs, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    logits = _transformers(None)
    for mode in MODES:
        for _, _, found_logits in shared:
            torch.testing.assert_close(found_logits[mode], logits, rtol=0, atol=1e-12 * float(logits.abs().max()))


def test_what_cant_be_shared_is_refused_by_name(shared):
    for _, told, _ in shared:
        assert "flex_attention([2, 4, 16, 4] with tokens on dim 2" in told["plain"]
        assert "which a ring has not" in told["plain"]
        assert "a block mask of (8, 8) queries and keys for 16 tokens" in told["short mask"]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_names_are_replaced_and_put_back():
    model, install = Model(1, 1, compiled), FlexAttention()
    before = flex_attention, compiled, model.attend
    install.install(model)
    assert not any(now is then for now, then in zip((flex_attention, compiled, model.attend), before, strict=True))
    assert torchs.flex_attention is not before[0]
    q = torch.ones(1, 1, 2, 4)
    assert torch.equal(flex_attention(q, q, q), q)
    install.remove()
    assert (flex_attention, compiled, model.attend) == before
    assert torchs.flex_attention is before[0]


def test_names_that_are_no_functions_are_not_touched():
    """Modules of Python have names of which a deprecated one, such as torch.distributed.reduce_op, warns when asked."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hook = FlexAttention()
        hook.install(nn.Linear(2, 2))
        hook.remove()
        with pytest.raises(FutureWarning, match="reduce_op"):
            isinstance(dist.reduce_op, int)


def test_functions_without_tokens_are_the_same_ones():
    number = torch.ones(())

    def score(s, b, h, i, j):
        return s * number

    assert whole_of(score) is score
    assert whole_of(and_masks(causal, causal)).__closure__ is not None
    assert whole_of(causal) is causal
