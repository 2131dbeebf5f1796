"""Pages of techniques: each has the same sections, and tables of settings that are those of the code."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from datetime import timedelta
from typing import Any, NamedTuple

import pytest

import lightning_superscale as lss
from tests.docs.markdown import DOCS, ROOT, name_of, section_of

PAGES = sorted((DOCS / "techniques").glob("*.md"))
SECTIONS = ("When to use it", "What it costs", "What it is held to", "Source")
# Arguments that are Lightning's own, of its DDPStrategy.
OF_LIGHTNING = {
    "accelerator",
    "parallel_devices",
    "cluster_environment",
    "checkpoint_io",
    "precision_plugin",
    "process_group_backend",
    "start_method",
}
WITH_SETTINGS = (
    "CheckpointConfig",
    "OffloadConfig",
    "ScaleMonitor",
    "SequenceConfig",
    "ShardedEMA",
    "SuperScalePrecision",
    "SuperScaleStrategy",
    "ZenFlowConfig",
    "ZeroConfig",
)


class Setting(NamedTuple):
    """A row of a page's table: | `name` | `default` | unit | what it does |."""

    page: str
    name: str
    default: str
    unit: str


def settings_of(text: str, page: str) -> dict[str, list[Setting]]:
    """The rows of a page's tables of settings, by the class that heads the table."""
    found: dict[str, list[Setting]] = {}
    owner = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) != 4:
            owner = None
        elif cells[1] == "default":
            owner = cells[0].strip("`")
            found.setdefault(owner, [])
        elif owner is not None and not cells[0].startswith("-"):
            found[owner].append(Setting(page, cells[0].strip("`"), cells[1].strip("`"), cells[2]))
    return found


def _defaults(owner: str) -> dict[str, tuple[Any, str]]:
    """By name, the default and the annotation of each setting of a class."""
    cls = getattr(lss, owner)
    if dataclasses.is_dataclass(cls):
        return {field.name: (field.default, str(field.type)) for field in dataclasses.fields(cls)}
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return {p.name: (p.default, str(p.annotation)) for p in parameters if p.name not in OF_LIGHTNING}


def _takes_numbers(annotation: str) -> bool:
    words = set(re.findall(r"\w+", annotation))
    numbers = {
        "int",
        "float",
        "PositiveInt",
        "PositiveFloat",
        "Share",
        "Steps",
        "Factor",
        "ThreadCount",
        "NumBatches",
        "Seed",
        "Stage",
    }
    return bool(words & numbers)


def _docstring_of(owner: str, name: str) -> str:
    """What the class or its constructor says of one setting."""
    cls = getattr(lss, owner)
    texts = [inspect.getdoc(one) or "" for base in cls.__mro__ for one in (base, base.__init__)]
    entry = re.compile(
        rf"^\s*(?:\w+, )*{name}(?:, \w+)*:(.*?)(?=^\s*\w+(?:, \w+)*:|^\s*$|\Z)", re.DOTALL | re.MULTILINE
    )
    return next((found[1] for text in texts if (found := entry.search(text))), "")


def _has_other_unit(row: Setting, owner: str) -> bool:
    """Whether the measure of a row's unit ("MiB" of "MiB of weights") is none that the docstring or the name has."""
    measure = re.split(r",| of | per ", row.unit)[0].split()[-1]
    said = f"{row.name.replace('_', ' ')} {_docstring_of(owner, row.name)}"
    return re.search(rf"\b{measure}", said) is None


def _value_of(cell: str) -> object:
    seconds = re.fullmatch(r"datetime\.timedelta\(seconds=(\d+)\)", cell)
    return timedelta(seconds=int(seconds[1])) if seconds else ast.literal_eval(cell)


@pytest.fixture(scope="module")
def documented() -> dict[str, list[Setting]]:
    """All settings of all pages, by class."""
    found: dict[str, list[Setting]] = {}
    for page in [*PAGES, DOCS / "strategies.md"]:
        for owner, rows in settings_of(page.read_text(), name_of(page)).items():
            found.setdefault(owner, []).extend(rows)
    return found


@pytest.mark.parametrize("owner", WITH_SETTINGS)
def test_settings_of_the_pages_are_those_of_the_code(owner, documented):
    known = _defaults(owner)
    rows = documented[owner]
    names = [row.name for row in rows]
    assert sorted(names) == sorted(known), "each setting stands in one table of one page"
    for row in rows:
        default, annotation = known[row.name]
        value = _value_of(row.default)
        assert (type(value), value) == (type(default), default), f"{row.page}: {owner}.{row.name}"
        if _takes_numbers(annotation):
            assert row.unit not in ("", "-"), f"{row.page}: say in what unit {owner}.{row.name} counts"
        if row.unit not in ("", "-"):
            assert not _has_other_unit(row, owner), f"{row.page}: {row.unit}: {owner}.{row.name} says another unit"


def test_tables_are_of_classes_that_are_compared(documented):
    assert set(documented) == set(WITH_SETTINGS)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_says_when_what_it_costs_and_what_holds_it(page):
    text = page.read_text()
    sections = {heading: section_of(text, heading) for heading in SECTIONS}
    assert all(body.strip() for body in sections.values())
    oracles = re.findall(r"`(tests/[\w./]+)", sections["What it is held to"])
    assert oracles
    assert all((ROOT / path).exists() for path in oracles)
    is_own = "ours" in sections["Source"]
    assert is_own or re.search(r"arXiv:\d{4}\.\d{5}|https://|`lightning_superscale/", sections["Source"])


def test_a_table_is_read_row_by_row():
    text = (
        "| `ZeroConfig` | default | unit | what it does |\n|---|---|---|---|\n| `stage` | `0` | - | shards |\n"
        '| `no_sync` | `"auto"` | - | one of true \\| false |\n\n| a | default |\n|---|---|\n| `b` | `1` |\n'
    )
    rows = settings_of(text, "page.md")
    assert rows == {"ZeroConfig": [Setting("page.md", "stage", "0", "-"), Setting("page.md", "no_sync", '"auto"', "-")]}
