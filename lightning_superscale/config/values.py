"""Checks of given values against annotations, with the errors that every config and every plugin gives.

An annotation says all: `bool` takes true and false only, `int` no fractions, `float` finite numbers, `Literal` its
values, `list[str]` names but no text, `dict[str, int]` whole numbers by name, and `Annotated[int, Between(1, 8)]` a
range.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from datetime import timedelta
from types import FunctionType, NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lightning_superscale.errors import SettingError, did_you_mean

_C = TypeVar("_C")


@dataclass(frozen=True, slots=True)
class Between:
    """The range of a number, both ends included unless `below` says that the upper one is not."""

    least: float
    most: float
    below: bool = False

    def holds(self, number: Any) -> bool:
        """Whether a number lies in the range; NaN lies in none."""
        return bool(self.least <= number < self.most if self.below else self.least <= number <= self.most)


@dataclass(frozen=True, slots=True)
class OrClasses:
    """Says of a list of names that Python code may give classes themselves."""


# Sizes that are multiplied by 2**20 and numbers of ranks stay far inside 64 bits.
PositiveInt = Annotated[int, Between(1, 2**30)]
# The native thread pool takes no more.
ThreadCount = Annotated[int, Between(1, 4096)]
Share = Annotated[float, Between(0, 1)]
PositiveFloat = Annotated[float, Between(1e-30, 1e30)]
ModuleNames = Annotated[list[str], OrClasses()]


@dataclass(frozen=True, slots=True)
class _Kind:
    """One alternative of an annotation.

    Attributes:
        phrases: what it takes, in words, given the value that was found.
        is_type: whether a value has its type.
        is_value: whether a value of its type lies in its range.
        given: converts an accepted value to the annotated type.
        choices: the words that it takes, for a hint.
    """

    phrases: Callable[[object], list[str]]
    is_type: Callable[[object], bool]
    is_value: Callable[[object], bool] = lambda value: True
    given: Callable[[Any], object] = lambda value: value
    choices: tuple[str, ...] = ()


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return bool(abs(value) <= sys.float_info.max)  # also integers that no float can hold are refused


def _power(number: float) -> str:
    """A number in decimal, or as a power of 2 where that is easier to read."""
    for offset, text in ((0, ""), (1, " - 1")):
        if number > 2**20 and float(number).is_integer() and (int(number) + offset).bit_count() == 1:
            return f"2**{(int(number) + offset).bit_length() - 1}{text}"
    return str(number)


def _range_phrases(noun: str, span: Between) -> Callable[[object], list[str]]:
    is_whole = noun == "a whole number"

    def phrases(value: object) -> list[str]:
        if span.below:
            return [f"{noun} of at least {span.least} and below {span.most}"]
        if is_whole and span.most - span.least < 4:
            return [str(number) for number in range(int(span.least), int(span.most) + 1)]
        is_above = _is_number(value) and value > span.most  # type: ignore[operator]
        if is_whole and not is_above:
            return [f"{noun} of at least {span.least}"]
        return [f"{noun} from {_power(span.least)} to {_power(span.most)}"]

    return phrases


def _number_kind(hint: type, span: Between | None) -> _Kind:
    noun, is_type = ("a whole number", _is_int) if hint is int else ("a number", _is_number)
    if span is not None:
        return _Kind(_range_phrases(noun, span), is_type, span.holds)
    if hint is int:
        return _Kind(lambda value: [noun], is_type)
    return _Kind(lambda value: ["a finite number"], is_type, _is_finite)


def _literal_kinds(hint: Any) -> list[_Kind]:
    values = get_args(hint)
    texts = [repr(value) for value in values]
    phrase = texts[0] if len(texts) == 1 else f"one of {', '.join(texts)}"
    words = tuple(value for value in values if isinstance(value, str))

    def is_type(value: object) -> bool:
        alike = [choice for choice in values if isinstance(value, type(choice)) and _is_bool(value) == _is_bool(choice)]
        return value in alike

    return [_Kind(lambda value: [phrase], is_type, given=lambda value: values[values.index(value)], choices=words)]


def _sequence_kinds(hint: Any, *, takes_classes: bool = False) -> list[_Kind]:
    convert = get_origin(hint)
    items = (str, type) if takes_classes else (str,)

    def is_type(value: object) -> bool:
        if not isinstance(value, (Sequence, Set)) or isinstance(value, (str, bytes)):
            return False
        return all(isinstance(item, items) for item in value)

    def given(value: Any) -> object:
        return convert(sorted(value, key=str) if isinstance(value, Set) else value)

    return [_Kind(lambda value: ["a list of names"], is_type, given=given)]


def _mapping_kinds(hint: Any) -> list[_Kind]:
    if get_args(hint) != (str, int):
        raise AssertionError(f"fields that map {get_args(hint)} are not known here")

    def is_type(value: object) -> bool:
        return isinstance(value, Mapping) and all(isinstance(k, str) and _is_int(v) for k, v in value.items())

    return [_Kind(lambda value: ["a mapping of names to whole numbers"], is_type, given=lambda value: dict(value))]


def _annotated_kinds(hint: Any) -> list[_Kind]:
    base, *marks = get_args(hint)
    if get_origin(base) is list:
        return _sequence_kinds(base, takes_classes=OrClasses() in marks)
    return [_number_kind(base, next((mark for mark in marks if isinstance(mark, Between)), None))]


def _union_kinds(hint: Any) -> list[_Kind]:
    return [kind for part in get_args(hint) for kind in _kinds_of(part)]


_BY_ORIGIN: dict[object, Callable[[Any], list[_Kind]]] = {
    Literal: _literal_kinds,
    Annotated: _annotated_kinds,
    Union: _union_kinds,
    UnionType: _union_kinds,
    list: _sequence_kinds,
    tuple: _sequence_kinds,
    dict: _mapping_kinds,
}
_BY_CLASS: dict[object, _Kind] = {
    bool: _Kind(lambda value: ["true", "false"], _is_bool),
    int: _number_kind(int, None),
    float: _number_kind(float, None),
    NoneType: _Kind(lambda value: ["None"], lambda value: value is None),
}


def _kinds_of(hint: Any) -> list[_Kind]:
    reader = _BY_ORIGIN.get(get_origin(hint))
    if reader is not None:
        return reader(hint)
    known = _BY_CLASS.get(hint)
    if known is not None:
        return [known]
    cls = get_origin(hint) or hint
    name = "text" if cls is str else f"a {cls.__name__}"
    return [_Kind(lambda value: [name], lambda value: isinstance(value, cls))]


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def shown(value: object) -> str:
    """A value's repr for an error: of at most 200 characters, and of any value."""
    try:
        text = repr(value)
    except Exception:  # a repr is user code, and Python refuses that of integers of some thousand digits
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _hint_for(value: object, kinds: Sequence[_Kind]) -> str:
    """What a reader of the error may have meant."""
    if not isinstance(value, str):
        return ""
    word = value.strip().lower()
    try:
        float(word)
    except ValueError:
        if word in ("true", "false", "yes", "no", "on", "off", "none", "null", "~"):
            return "; it is text: write it without quotes, as true, false or null"
        return did_you_mean(value, [choice for kind in kinds for choice in kind.choices])
    return "; it is text: write the number without quotes (YAML 1.1 takes 1e3 for text, and 1000 or 1.0e+3 for numbers)"


def checked(owner: str, hints: Mapping[str, Any], values: Mapping[str, object]) -> dict[str, Any]:
    """The values, each converted to its annotated type where another one stands for it, as a tuple does for a list.

    Args:
        owner: the class that the values were given to, as an error names it.
        hints: by key, the annotation; unknown classes are checked by isinstance.
        values: by key, the value; each key has an annotation.

    Raises:
        SettingError: a value that its annotation does not allow; names the key, what was expected and what was found.
    """
    return {key: _checked_one(f"{owner}.{key}", _kinds_of(hints[key]), value) for key, value in values.items()}


def _checked_one(where: str, kinds: Sequence[_Kind], value: object) -> object:
    typed = [kind for kind in kinds if kind.is_type(value)]
    for kind in typed:
        if kind.is_value(value):
            return kind.given(value)
    # A number out of range is told the range only, not that a word could stand there.
    expected = typed or [kind for kind in kinds if kind is not _BY_CLASS[NoneType]]
    phrase = _either([phrase for kind in expected for phrase in kind.phrases(value)])
    raise SettingError(f"{where} must be {phrase}, found {shown(value)}{_hint_for(value, kinds)}")


def duration(where: str, value: object) -> timedelta | None:
    """A time given as a timedelta or as a number of seconds; None stays None.

    Raises:
        SettingError: another type, or a time of less than a millisecond or more than 30 years.
    """
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if seconds is None:
        return None
    if not _is_number(seconds) or not Between(0.001, 1e9).holds(seconds):
        expected = "a timedelta or a number of seconds, from 0.001 to 1e9"
        raise SettingError(f"{where} must be {expected}, found {shown(value)}{_hint_for(value, [])}")
    return timedelta(seconds=seconds)  # type: ignore[arg-type]


def check_fields(config: Any) -> None:
    """Check every field of a frozen dataclass against its annotation, from its `__post_init__`.

    Raises:
        SettingError: as `checked` does, with the class's name as owner.
    """
    hints = get_type_hints(type(config), include_extras=True)
    found = checked(type(config).__name__, hints, {key: getattr(config, key) for key in hints})
    for key, value in found.items():
        object.__setattr__(config, key, value)


def check_arguments(owner: str, function: Callable[..., Any], **values: object) -> dict[str, Any]:
    """Check arguments against the annotations of the function that takes them.

    Annotations of other arguments are not evaluated, so they may name what is imported for type checkers only.

    Returns:
        The values, as `checked` does.

    Raises:
        SettingError: as `checked` does.
    """
    if not isinstance(function, FunctionType):
        raise AssertionError(f"expected a function in Python, found {function!r}")
    asked = SimpleNamespace(__annotations__={key: function.__annotations__[key] for key in values})
    return checked(owner, get_type_hints(asked, function.__globals__, include_extras=True), values)


def config_from_mapping(config_class: type[_C], values: Mapping[str, Any], where: str) -> _C:
    """Build a config from a mapping, refusing keys that it does not have.

    Args:
        config_class: a dataclass.
        values: the config's fields, by name.
        where: name of the mapping, for messages.

    Raises:
        SettingError: a key is unknown, or a value is not allowed; names an unknown key, the known keys and the
            closest one.
    """
    known = [f.name for f in fields(config_class)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise SettingError(
                f"{where} has no key {shown(key)}: expected one of {', '.join(map(repr, known))}"
                f"{did_you_mean(str(key), known)}"
            )
    return config_class(**values)
