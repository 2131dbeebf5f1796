"""Variants of a class with other defaults, of classes whose constructors are of any kind."""

from __future__ import annotations

import typing

import pytest

from lightning_superscale.plugins.defaults import with_defaults


class Base:
    def __init__(self, first, second: int = 1, *, third: typing.Optional[str] = None) -> None:
        self.seen = (first, second, third)


def test_defaults_by_name_only_and_defaults_of_defaults():
    @with_defaults(third="c")
    class Once(Base):
        pass

    @with_defaults(second=2)
    class Twice(Once):
        pass

    assert (Base(0).seen, Once(0).seen, Twice(0).seen) == ((0, 1, None), (0, 1, "c"), (0, 2, "c"))
    assert typing.get_type_hints(Twice.__init__) == typing.get_type_hints(Base.__init__)


@pytest.mark.parametrize("wrong", ["secnd", "first"])
def test_a_name_without_a_default_is_refused_where_it_is_written(wrong):
    with pytest.raises(TypeError, match=f"with_defaults of Wrong expects .* are second, third; found {wrong}"):

        @with_defaults(**{wrong: 1})
        class Wrong(Base):
            pass


def test_a_class_without_a_constructor_is_refused():
    with pytest.raises(TypeError, match="found Bare without"):

        @with_defaults(zero=1)
        class Bare:
            pass
