"""How rules' figures are named and said."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lightning_superscale.optim.step_rule import Figure
from lightning_superscale.run.report.figures import figures_of, sentence_of


def test_figures_of_several_optimizers_have_names_of_their_own():
    figure = Figure("late", "steps late", "steps", expected=2.0, measured=1.5)
    rules = [SimpleNamespace(figures=lambda told=told: told) for told in ((figure,), (), (figure,))]
    engines = [SimpleNamespace(rule=rule) for rule in rules]
    found = figures_of(SimpleNamespace(engines=dict(enumerate(engines))))
    assert [one.name for one in found] == ["late-0", "late-2"]
    assert sentence_of(found[1]) == "optimizer 2: steps late: 2.00 steps expected, 1.50 steps measured"
    assert figures_of(SimpleNamespace(engines={0: engines[1], 1: engines[0]})) == [figure]


@pytest.mark.parametrize(
    ("figure", "said"),
    [
        (Figure("b", "bytes", "bytes", expected=0), "bytes: 0 B expected"),
        (Figure("b", "bytes", "bytes", 1024, 1536.0), "bytes: 1.0 KiB expected, 1.5 KiB measured"),
        (Figure("s", "share", "share", measured=0.25), "share: 25.0% measured"),
        (Figure("s", "share", "share"), "share: not measured yet"),
    ],
)
def test_a_sentence_says_what_is_known(figure, said):
    assert sentence_of(figure) == said
