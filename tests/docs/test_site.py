"""The check of the built site, on small sites with planted faults; `make docs` runs it on the whole site."""

from __future__ import annotations

import pytest

from tests.docs.site import faults_of, main

HEAD = '<link rel="stylesheet" href="style.css"><link rel="canonical" href="https://host/page.html">'
GOOD = '<h1 id="top">Top</h1><a href="#top">a</a><a href="sub/two.html#there">b</a><a href="mailto:a@b">c</a>'


@pytest.fixture
def site(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "index.html").write_text(f'{HEAD}{GOOD}<img src="a%20picture.png"><a href="https://host/">d</a>')
    (tmp_path / "sub" / "two.html").write_text('<p id="there"></p><a href="..">e</a><a href="../index.html#top">f</a>')
    (tmp_path / "404.html").write_text('<a href="/nowhere.html">g</a>')
    (tmp_path / "style.css").write_text("a { background: url(data:image/png;base64,AA) }")
    (tmp_path / "a picture.png").touch()
    return tmp_path


def test_a_whole_site_has_no_faults_and_its_remote_links_are_told(site, capsys):
    assert faults_of(site) == ([], ["https://host/"])
    assert main([str(site)]) == 0
    assert "https://host/" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("html", "fault"),
    [
        ('<a href="three.html">x</a>', "two.html leads to three.html, which is not there"),
        ('<a href="#nowhere">x</a>', "leads to #nowhere"),
        ('<a href="../index.html#nowhere">x</a>', "leads to ../index.html#nowhere"),
        ('<a href="../../outside.html">x</a>', "leads to ../../outside.html"),
        ('<img src="absent.png">', "leads to absent.png"),
        ('<script src="https://unpkg.com/x.js"></script>', "loads https://unpkg.com/x.js of another host"),
        ('<link rel="stylesheet" href="//fonts.host/x.css">', "loads //fonts.host/x.css of another host"),
    ],
)
def test_a_fault_is_told_with_its_page(site, html, fault, capsys):
    (site / "sub" / "two.html").write_text(f'<p id="there"></p>{html}')
    (found,), _ = faults_of(site)
    assert fault in found
    assert found.startswith("sub/two.html")
    assert main([str(site)]) == 1
    assert fault in capsys.readouterr().err


def test_a_style_that_loads_a_font_of_another_host_is_told(site):
    (site / "style.css").write_text('@import "https://fonts.host/x.css";')
    (found,), _ = faults_of(site)
    assert "style.css loads" in found


def test_an_empty_folder_is_no_site(tmp_path):
    assert "has no pages" in faults_of(tmp_path)[0][0]
