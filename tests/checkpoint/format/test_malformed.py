"""Malformed content ends in a CheckpointError, and content that is well formed in its value."""

from __future__ import annotations

import pytest
import torch

from lightning_superscale.checkpoint.format.malformed import malformed_as_error, parse
from lightning_superscale.errors import CheckpointError, SuperScaleError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [1, -2.5, 1e3, true, null, "x"]}', {"a": [1, -2.5, 1000.0, True, None, "x"]}),
        ("[]", []),
        (b'"\\u00e9"', "\u00e9"),
        ("1" + "0" * 400, 10**400),
    ],
)
def test_json_is_parsed(text, value):
    assert parse(text, "f") == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "Infinity",
        "[-Infinity]",
        "NaN",
        "1e999",
        "1" + "0" * 5000,
        "[" * 100_000,
        '{"a":' * 100_000,
        b"\xff\xfe\xff",
    ],
)
def test_what_is_no_json_is_an_error_that_names_the_file(text):
    with pytest.raises(CheckpointError, match=r"^folder/rest.json is no JSON: ") as refused:
        parse(text, "folder/rest.json")
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    "act",
    [
        lambda: {}["a"],
        lambda: [][1],
        lambda: None + 1,
        lambda: int("x"),
        lambda: None.items(),
        lambda: int(float("inf")),
        lambda: torch.eye(2).to_sparse().untyped_storage(),
        lambda: (_ for _ in ()).throw(RecursionError),
    ],
)
def test_what_malformed_structures_raise_becomes_one_error(act):
    with pytest.raises(CheckpointError, match="index is malformed: "), malformed_as_error("index is malformed"):
        act()


@pytest.mark.parametrize(
    "error", [CheckpointError("own"), SuperScaleError("own"), KeyboardInterrupt(), OSError("disk")]
)
def test_errors_that_say_what_is_wrong_pass(error):
    with pytest.raises(type(error)) as passed, malformed_as_error("malformed"):
        raise error
    assert passed.value is error
