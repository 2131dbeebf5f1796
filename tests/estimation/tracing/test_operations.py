"""What one operation costs."""

from __future__ import annotations

import torch

from lightning_superscale.estimation.tracing.operations import TensorSpec, traced

aten = torch.ops.aten


def meta(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cost(op, *args, **kwargs):
    return traced("forward", op, args, kwargs, op(*args, **kwargs))


def test_a_product_counts_multiplications_and_additions():
    found = cost(aten.addmm.default, meta(5), meta(3, 4), meta(4, 5))
    assert found.flops == 2 * 3 * 4 * 5
    assert found.nbytes == 2 * (5 + 3 * 4 + 4 * 5 + 3 * 5)
    assert found.dtype == torch.bfloat16


def test_a_repeated_element_is_read_once():
    assert cost(aten.add.Tensor, meta(1, 4).expand(8, 4), meta(8, 4)).nbytes == 2 * (4 + 32 + 32)


def test_attention_has_two_products_and_half_of_each_under_a_causal_mask():
    heads = [meta(2, 3, 16, 8, dtype=torch.float32) for _ in range(3)]
    op = aten._scaled_dot_product_flash_attention_for_cpu.default
    whole, causal = cost(op, *heads), cost(op, *heads, 0.0, True)
    assert whole.flops == 2 * 2 * (2 * 3 * 16 * 16) * 8
    assert causal.flops == whole.flops // 2


def test_attentions_backward_has_five_products():
    q, k, v = (meta(2, 3, 16, 8, dtype=torch.float32) for _ in range(3))
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v)
    found = cost(aten._scaled_dot_product_flash_attention_for_cpu_backward.default, out, q, k, v, out, lse, 0.0, False)
    assert found.flops == 5 * 2 * (2 * 3 * 16 * 16) * 8


def test_an_operation_that_moves_elements_has_no_operations():
    found = cost(aten.clone.default, meta(7, dtype=torch.int64))
    assert (found.flops, found.nbytes, found.dtype) == (0, 2 * 7 * 8, None)


def test_samples_are_equal_where_shapes_strides_dtypes_and_values_are():
    first = cost(aten.mul.Tensor, meta(2, 3), 2.0).sample
    assert first == cost(aten.mul.Tensor, meta(2, 3), 2.0).sample
    assert len({first, cost(aten.mul.Tensor, meta(2, 3), 2.0).sample}) == 1
    for other in ((meta(3, 2).t(), 2.0), (meta(2, 3, dtype=torch.float32), 2.0), (meta(2, 3), 3.0)):
        assert first != cost(aten.mul.Tensor, *other).sample
    assert first.args == (TensorSpec((2, 3), (3, 1), torch.bfloat16), 2.0)
