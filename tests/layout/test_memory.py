"""Sums of what classes of bytes take."""

from __future__ import annotations

from lightning_superscale.layout.memory import BytesPerParam, MemoryModel

MODEL = MemoryModel(
    (
        BytesPerParam("weights", "bfloat16", 2, "device", None),
        BytesPerParam("gradients", "bfloat16", 2, "device"),
        BytesPerParam("master weights", "float32", 4, "host"),
    )
)


def test_bytes_are_divided_over_their_axis_and_rounded_up():
    assert MODEL.per_param("device", None) == MODEL.per_param("device", "shard") == 2
    assert MODEL.per_param("host", None) == 0
    assert MODEL.bytes("device", 10) == 40
    assert MODEL.bytes("device", 10, 3) == 20 + 7  # 20 / 3
    assert MODEL.bytes("host", 10, 3) == 14  # 40 / 3


def test_a_sum_has_the_classes_of_both():
    more = MemoryModel((BytesPerParam("optimizer states", "float32", 8, "host"),))
    assert (MODEL + more).bytes("host", 10) == MODEL.bytes("host", 10) + more.bytes("host", 10) == 120
    assert MemoryModel().bytes("host", 10) == 0
