"""Whatever Lightning and its users keep beside tensors, as JSON."""

import argparse
import collections
import dataclasses
import datetime
import enum
import json
import math
import pathlib
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lightning_superscale.checkpoint.format import json_codec
from lightning_superscale.checkpoint.format.malformed import parse
from lightning_superscale.errors import CheckpointError

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
)
KEYS = st.text() | st.integers() | st.tuples(st.integers(), st.text()) | st.none() | st.booleans() | st.just("$")
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(KEYS, inner)
        | st.dictionaries(st.text(), inner).map(collections.OrderedDict)
        | st.sets(st.integers())
    ),
    max_leaves=20,
)


class Color(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Point:
    x: int
    y: tuple


@dataclasses.dataclass
class WithCache:
    x: int
    cache: list = dataclasses.field(init=False, default_factory=list)


Pair = collections.namedtuple("Pair", "a b")


class Text(str):
    pass


def round_trip(value):
    tensors = {}
    encoded = json_codec.encode(value, "rest", tensors)
    text = json.dumps(encoded, allow_nan=False).encode()
    return json_codec.decode(parse(text, "rest"), "rest", lambda name: tensors[name].clone())


@given(VALUES)
def test_any_nesting_comes_back_equal_and_of_the_same_types(value):
    found = round_trip(value)
    assert found == value
    assert repr(found) == repr(value) or isinstance(value, (set, dict, list, tuple))


@pytest.mark.parametrize(
    "value",
    [
        float("inf"), -0.0, 5e-324, 2**80, (1, (2, [3])), {1, 2}, frozenset({3}), collections.deque([1, 2], maxlen=5),
        collections.Counter("aab"), collections.defaultdict(list, {"a": [1]}), collections.defaultdict(None, {1: 2}),
        pathlib.Path("/a/b"), datetime.datetime(2026, 1, 2, 3, 4, 5, 6),
        datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=2))),
        datetime.date(2026, 1, 2), datetime.time(3, 4), datetime.timedelta(days=-1, microseconds=3), slice(1, None, 2),
        range(3, 9, 2), np.float32(0.1), np.int64(-5), np.bool_(True), np.datetime64("2026-01-02"), torch.bfloat16,
        torch.device("cuda:1"), torch.Size([2, 3]), argparse.Namespace(a=(1,), b=None), bytearray(b"\0\xff"), 1 + 2j,
        {"$": 1, "a": 2}, random.Random(3).getstate(),
    ],
)  # fmt: skip
def test_a_value_of_every_kind_comes_back_equal_and_of_its_type(value):
    found = round_trip({"a": value})["a"]
    assert found == value
    assert type(found) is type(value)
    assert repr(found) == repr(value)
    if isinstance(value, collections.defaultdict):
        assert found.default_factory is value.default_factory


def test_nan_comes_back_as_nan():
    assert math.isnan(round_trip([float("nan")])[0])


@pytest.mark.parametrize("dtype", ["<f8", ">f4", "bool", "<i2", "<c8", "<U3", "<M8[s]"])
def test_arrays_come_back_bit_for_bit_and_writable(dtype):
    value = np.arange(6).reshape(2, 3).astype("<M8[s]" if "M8" in dtype else dtype).T
    found = round_trip(value)
    assert found.dtype == value.dtype
    assert np.array_equal(found, value)
    found[0, 0] = found[1, 1]


def test_tensors_leave_their_names_and_come_back():
    parameter = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    tensors = {}
    value = {"a": [torch.arange(3), torch.arange(4)], "a[0]": torch.ones(1), "p": parameter}
    encoded = json_codec.encode(value, "rest", tensors)
    assert set(tensors) == {"rest/a[0]", "rest/a[1]", "rest/a[0]~1", "rest/p"}
    found = json_codec.decode(encoded, "rest", tensors.__getitem__)
    assert torch.equal(found["a"][1], torch.arange(4))
    assert torch.equal(found["a[0]"], torch.ones(1))
    assert isinstance(found["p"], torch.nn.Parameter)
    assert not found["p"].requires_grad


def test_omegaconf_keeps_interpolations_and_flags():
    config = OmegaConf.create({"a": 1, "b": "${a}", "c": [1, {"d": None}]})
    OmegaConf.set_struct(config, True)
    found = round_trip(config)
    assert found == config
    assert OmegaConf.is_struct(found)
    assert OmegaConf.to_yaml(found) == OmegaConf.to_yaml(config)


@pytest.mark.parametrize("value", [Color.RED, Point(1, (2,)), Pair(1, 2)])
def test_a_class_is_constructed_only_if_it_is_known_as_safe(value):
    with pytest.raises(CheckpointError, match=rf"rest/x.*{type(value).__name__}.*add_safe_globals"):
        round_trip({"x": value})
    with torch.serialization.safe_globals([type(value)]):
        assert round_trip({"x": value})["x"] == value


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (object(), "builtins.object"), (lambda: 1, "function"), (Text("a"), "Text"), (torch.nn.Linear(1, 1), "Linear"),
        (WithCache(1), "init fields"), (collections.defaultdict(lambda: 1), "factory"),
        (np.array([object()]), "ndarray"), (torch.ones(2, device="meta"), "meta"),
        (torch.ones(2).to_sparse(), "sparse"),
    ],
)  # fmt: skip
def test_what_would_need_pickle_is_refused_where_it_lies(value, what):
    with pytest.raises(CheckpointError, match=rf"rest/callbacks\[1\].*{what}"):
        json_codec.encode({"callbacks": [0, value]}, "rest", {})


def test_a_value_that_contains_itself_is_refused():
    value = [1]
    value.append(value)
    with pytest.raises(CheckpointError, match="contains itself"):
        json_codec.encode(value, "rest", {})
    same = [1]
    assert json_codec.encode([same, same], "rest", {}) == [[1], [1]]


@pytest.mark.parametrize(
    "value",
    [{"$": "pickle", "v": ""}, {"$": "enum"}, {"$": "dtype", "v": "load"}, {"$": "numpy", "dtype": "O", "v": ""}],
)
def test_a_strange_tag_is_an_error_that_says_where(value):
    with pytest.raises(CheckpointError, match="rest/a"):
        json_codec.decode({"a": value}, "rest", {}.__getitem__)
