"""Operations that are counted while a step runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.estimation.tracing.model_flops import ModelFlops, counting_flops
from lightning_superscale.estimation.tracing.step import trace_step


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Other tests of this process compile, and where anything is compiled nothing is counted."""
    torch._dynamo.reset()


def block() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def count(step) -> int:
    with counting_flops() as seen:
        step()
    return sum(seen.by_dtype.values())


X = torch.ones(5, 8)
PRODUCT = 2 * 5 * 8 * 16


def test_a_gradient_is_a_product_for_each_factor_that_needs_one():
    model = block()
    assert count(lambda: model(X)) == 2 * PRODUCT + 3 * PRODUCT
    model[0].requires_grad_(False)
    assert count(lambda: model(X)) == PRODUCT + 2 * PRODUCT
    with torch.no_grad():
        assert count(lambda: model(X)) == 2 * PRODUCT


def test_backward_and_what_it_does_again_count_once():
    model = block()
    assert count(lambda: model(X).sum().backward()) == 5 * PRODUCT
    again = count(lambda: checkpoint(model, X, use_reentrant=False).sum().backward())
    assert again == 5 * PRODUCT


def test_dtypes_are_kept_apart():
    with torch.autocast("cpu", dtype=torch.bfloat16), ModelFlops() as seen:
        block()(X)
    assert seen.by_dtype == {torch.bfloat16: 5 * PRODUCT}


def test_attention_is_counted_as_two_products_of_two_factors():
    heads = [torch.ones(1, 2, 6, 4, requires_grad=True) for _ in range(3)]
    found = count(lambda: nn.functional.scaled_dot_product_attention(*heads).sum().backward())
    assert found == 3 * (2 * 2 * (2 * 6 * 6) * 4)


def test_it_is_what_a_trace_without_values_says():
    model = block()
    traced = trace_step(model, X, lambda module, batch: module(batch).sum())
    assert traced.model_flops == count(lambda: model(X).sum().backward())


def test_values_are_as_without():
    model = block()
    expected = model(X)
    with counting_flops():
        assert torch.equal(model(X), expected)


def test_compiled_code_is_refused():
    def double(x):
        return 2 * x

    try:
        torch.compile(double, backend="eager")
        with pytest.raises(SuperScaleError, match="has code of torch.compile"), counting_flops():
            pass
    finally:
        torch._dynamo.reset()
