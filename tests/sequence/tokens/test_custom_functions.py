"""Code below torch's functions gets no tokens, unless it hands them on or is said to treat every token by itself."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lightning_superscale.comm.in_graph import AxisLink
from lightning_superscale.comm.mesh import MeshAxis
from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.sequence.tokens.custom_functions import CustomFunctions
from lightning_superscale.sequence.tokens.layout import Replicated, Sharing, TokenDim
from lightning_superscale.sequence.tokens.tensor import is_sharded, layout_of, plain, with_layout
from lightning_superscale.torch_private import functions_past_torch_function, scripts
from tests.sequence.tokens import foreign

SINE = foreign.Sine.apply  # before any guard


def applications() -> list[object]:
    """What applying an autograd function comes by."""
    function = torch.autograd.Function
    inherited = [vars(cls).get("apply") for cls in function.__mro__]
    return [*inherited, vars(type(function)).get("__getattribute__")]


def tokens() -> torch.Tensor:
    sharing = Sharing(link=AxisLink(MeshAxis("sequence", 1, 2, None)))
    ids = with_layout(torch.arange(16).view(2, 8), Replicated(TokenDim(1, 8), sharing))
    return F.embedding(ids, torch.randn(16, 6, requires_grad=True))


@pytest.fixture
def guard():
    functions = CustomFunctions(foreign.TOKEN_WISE)
    functions.install()
    yield functions
    functions.remove()


def test_a_function_that_treats_each_token_by_itself_gets_the_part(guard):
    x = tokens()
    y = foreign.Sine.apply(x)
    assert is_sharded(y)
    assert layout_of(y) == layout_of(x)
    assert torch.equal(plain(y), plain(x).sin())


def test_a_function_that_gives_another_number_of_tokens_is_refused(guard):
    with pytest.raises(SequenceParallelError, match=r"Summed.* gave \[2, 6\] for 4 tokens of this rank on dim 1"):
        foreign.Summed.apply(tokens())


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("tests.sequence.tokens.foreign.Unknown", foreign.Unknown.apply),
        ("lss_tests::unknown", foreign.unknown),
        ("lss_tests::unknown", torch.ops.lss_tests.unknown.default),
    ],
)
def test_a_function_of_which_nobody_said_what_it_does_is_refused_with_its_name(guard, name, call):
    with pytest.raises(SequenceParallelError, match=f"name '{name}' in SequenceConfig.token_wise"):
        call(tokens())


def test_names_are_matched_whole():
    functions = CustomFunctions(["tests.sequence.tokens.foreign.Unknow", "Unknown", "foreign.Unknown"])
    functions.install()
    try:
        with pytest.raises(SequenceParallelError, match="Unknown"):
            foreign.Unknown.apply(tokens())
    finally:
        functions.remove()


def test_memory_is_refused_as_kernels_take_it(guard):
    for read in (torch.Tensor.data_ptr, torch.Tensor.untyped_storage, torch.tensor, foreign.scripted):
        with pytest.raises(SequenceParallelError, match="takes the memory of a tensor"):
            read(tokens().detach())


def test_whole_tensors_go_through(guard):
    x = torch.randn(3, requires_grad=True)
    assert torch.equal(foreign.Unknown.apply(x), x * 2)
    assert torch.equal(torch.tensor(x.tolist()), x)


def test_tokens_of_a_name_that_was_bound_before_are_never_taken_for_all(guard):
    """Up to torch 2.13 such a name comes by the guard; later ones are refused, with what to write instead."""
    x = tokens()
    if "__getattribute__" in vars(type(torch.autograd.Function)):  # the guard of torch 2.14
        with pytest.raises(SequenceParallelError, match=r"Call Sine\.apply\(\.\.\.\) where it is used"):
            SINE(x)
    else:
        assert layout_of(SINE(x)) == layout_of(x)
    assert torch.equal(SINE(plain(x)), plain(x).sin())


def test_torch_is_as_before_afterwards_and_one_run_at_a_time_installs(guard):
    with pytest.raises(SequenceParallelError, match="another run of this process"):
        CustomFunctions().install()
    guard.remove()
    places = [*((owner, "__call__") for owner, _ in scripts()), *functions_past_torch_function()]
    before, applied = [vars(owner).get(name) for owner, name in places], applications()
    functions = CustomFunctions()
    functions.install()
    assert all(vars(owner).get(name) is not old for (owner, name), old in zip(places, before, strict=True))
    assert applications() != applied
    functions.remove()
    functions.remove()
    assert applications() == applied
    assert all(vars(owner).get(name) is old for (owner, name), old in zip(places, before, strict=True))
