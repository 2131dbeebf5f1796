"""`superscale migrate`: what another strategy's configuration is here, key by key, and the lines to paste."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_superscale.cli.migrate.deepspeed import Migration
from lightning_superscale.cli.migrate.lightning_strategies import migrate_trainer
from lightning_superscale.cli.migrate.old_checkpoint import describe
from lightning_superscale.cli.migrate.rows import HEADINGS, Row
from lightning_superscale.cli.migrate.source import read
from lightning_superscale.cli.migrate.target import Source, Target
from lightning_superscale.config import resolve_offload, resolve_sequence, resolve_zero
from lightning_superscale.run.precision import choose


@dataclass(frozen=True, slots=True)
class Migrated:
    """The result of migrating one configuration.

    Attributes:
        target: what is printed.
        rows: what became of every key.
    """

    target: Target
    rows: list[Row]

    @property
    def unknown(self) -> list[Row]:
        """The keys that neither DeepSpeed nor Lightning documents, or whose values they do not take."""
        return [row for row in self.rows if row.fate.outcome == "unknown"]


def migrate(config: Mapping[str, Any], folder: Path) -> Migrated:
    """Migrate a configuration of DeepSpeed, a Trainer's section, or one strategy.

    Args:
        config: content of the file.
        folder: where relative paths in it start.

    Raises:
        SettingError: the configuration can't be what it says it is, or asks for what can't work; says what.
    """
    target = Target()
    if isinstance(config.get("trainer"), Mapping):
        rows = migrate_trainer(config["trainer"], target, folder)
    elif "class_path" in config:
        rows = migrate_trainer({"strategy": config}, target, folder)
    elif "strategy" in config:
        rows = migrate_trainer(config, target, folder)
    else:
        rows = Migration(config, target).rows
    # A value that no config of ours takes is told here, not where the lines are pasted.
    resolve_zero(target.zero)
    resolve_offload(target.offload or None)
    resolve_sequence(target.sequence or None)
    choose(target.precision or "32-true", **target.dtypes)
    return Migrated(target, rows)


def run(path: str, *, checkpoint: str | None, is_yaml: bool, is_json: bool) -> int:
    """Print what a configuration becomes.

    Args:
        path: file, or `-` for standard input.
        checkpoint: a checkpoint of the old run, to say what of it can be loaded.
        is_yaml: whether a section for LightningCLI is printed instead of Python.
        is_json: whether everything is printed as JSON.

    Returns:
        The exit code: 1 where a key or its value is unknown, else 0.

    Raises:
        SuperScaleError: as `migrate` and `describe` do.
    """
    migrated = migrate(*read(path))
    told: list[str] = []
    if checkpoint is not None:
        told = describe(checkpoint)
        migrated.target.strategy.setdefault("checkpoint", {})
    if is_json:
        print(json.dumps(_as_json(migrated, told), indent=2, default=str))
    else:
        _print(migrated, told, is_yaml=is_yaml)
    for row in migrated.unknown:
        print(f"superscale migrate: {path}: {row.key}: {row.fate.text}", file=sys.stderr)
    return 1 if migrated.unknown else 0


def _as_json(migrated: Migrated, told: list[str]) -> dict[str, Any]:
    target = migrated.target
    return {
        "python": target.python(),
        "yaml": target.yaml(),
        "configure_optimizers": "\n".join(target.optimizers) or None,
        "keys": [
            {"key": row.key, "value": row.value, "outcome": row.fate.outcome, "text": row.fate.text}
            for row in migrated.rows
        ],
        "checkpoint": told or None,
    }


def _print(migrated: Migrated, told: list[str], *, is_yaml: bool) -> None:
    target = migrated.target
    print("# Paste into the YAML of LightningCLI:" if is_yaml else "# Paste where the Trainer is made:")
    print(target.yaml() if is_yaml else target.python())
    code_only = {**target.strategy, **target.trainer} if is_yaml else {}
    for key, value in code_only.items():
        if isinstance(value, Source):
            print(f"# {key}: {value!r} is Python code, which YAML can't say")
    if target.optimizers:
        print("\n# Paste into the LightningModule (imports at the top of its file):")
        print("\n".join(target.optimizers))
    print("\n".join(_key_lines(migrated.rows)))
    if told:
        print("\nThe checkpoint:")
        print("\n".join(told))


def _key_lines(rows: list[Row]) -> list[str]:
    lines = []
    for outcome, heading in HEADINGS.items():
        of_outcome = [row for row in rows if row.fate.outcome == outcome]
        lines += ["", f"{heading}:"] if of_outcome else []
        for row in of_outcome:
            text = textwrap.wrap(row.fate.text, 114, initial_indent="      ", subsequent_indent="      ")
            lines += [f"  {row.key} = {_shown(row.value)}", *text]
    return lines


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."
