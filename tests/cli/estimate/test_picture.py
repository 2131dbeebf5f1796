"""Memory of each strategy as a picture: every byte is in one stack."""

from __future__ import annotations

import sys

import pytest
import torch

import lightning_superscale as lss
from lightning_superscale.cli.estimate.picture import device_parts, draw, host_parts
from lightning_superscale.errors import SettingError
from tests.estimation.models import Images


@pytest.fixture(scope="module")
def found():
    with torch.device("meta"):
        module = Images()
    return lss.estimate(module, batch=Images.batch(8), device_memory="20MiB")


def test_stacks_are_all_bytes(found):
    for one in found.strategies:
        assert sum(device_parts(one).values()) == one.peak.total
        assert sum(host_parts(one).values()) == one.host_bytes
    assert any(host_parts(one) for one in found.strategies)


def test_a_file_that_can_not_be_written_is_named(found, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(SettingError, match="can't be written"):
        draw(found, tmp_path / "no folder" / "a.png")


def test_matplotlib_is_asked_for(found, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SettingError, match="pip install matplotlib"):
        draw(found, tmp_path / "a.png")


def test_a_class_has_one_colour_and_titles_do_not_overlap(found, tmp_path, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure")
    drawn = []
    saved = figures.Figure.savefig
    monkeypatch.setattr(
        figures.Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), saved(figure, *a, **k))
    )
    draw(found, tmp_path / "a.png")
    sides = drawn[0].axes
    colours = [{bars.get_label(): bars.patches[0].get_facecolor() for bars in axes.containers} for axes in sides]
    both = colours[0].keys() & colours[1].keys()
    assert both
    assert all(colours[0][name] == colours[1][name] for name in both)
    merged = colours[0] | colours[1]
    assert len(set(merged.values())) == len(merged)
    left, right = (axes.title.get_window_extent() for axes in sides)
    assert not left.overlaps(right)
