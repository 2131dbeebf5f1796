"""The page docs/migrate.md: its configuration gives its output, word for word."""

from __future__ import annotations

import re
from pathlib import Path

from lightning_superscale.cli import main

PAGE = Path(__file__).resolve().parents[3] / "docs" / "migrate.md"


def test_the_output_of_the_page_is_what_is_printed(tmp_path, capsys):
    page = PAGE.read_text()
    (config,) = re.findall(r"```json\n(.*?)```", page, flags=re.DOTALL)
    (output,) = re.findall(r"```text\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "ds_config.json").write_text(config)
    assert main(["migrate", str(tmp_path / "ds_config.json")]) == 0
    assert capsys.readouterr().out == output
