"""Reads what is migrated: a configuration of DeepSpeed, a Trainer's section, or a strategy's call in Python."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lightning_superscale.cli.migrate.target import Source
from lightning_superscale.errors import SettingError


def read(path: str) -> tuple[dict[str, Any], Path]:
    """The content of a file, or of standard input for `-`, and the folder that its relative paths start from.

    Raises:
        SettingError: it can't be read, or is neither JSON, YAML nor the call of a strategy.
    """
    if path == "-":
        return read_text(sys.stdin.read(), "standard input"), Path()
    try:
        return read_text(Path(path).read_text(encoding="utf-8"), path), Path(path).parent
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} can't be read: {error}") from error


def read_text(text: str, where: str) -> dict[str, Any]:
    """A mapping from JSON, YAML, or `DeepSpeedStrategy(stage=3, ...)`, which becomes `{"strategy": ...}`.

    Args:
        where: name of the text, for errors.

    Raises:
        SettingError: it is none of these, or a key stands twice in one section.
    """
    call = _call(text)
    if call is not None:
        return call
    found: Any = None
    errors: list[Exception] = []
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text, object_pairs_hook=lambda pairs: _once(pairs, where))
        except json.JSONDecodeError as error:
            errors.append(error)  # DeepSpeed reads comments too, as YAML does
    if found is None:
        try:
            found = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
        except (YAMLError, OmegaConfBaseException, TypeError) as error:
            errors.append(error)
            why = " ".join(str(errors[0]).split())
            raise SettingError(f"{where} is neither JSON, YAML nor a strategy's call: {why}") from error
    if not isinstance(found, Mapping) or not found or not all(isinstance(key, str) for key in found):
        raise SettingError(f"{where} should hold keys and values; found {type(found).__name__} without")
    return dict(found)


def _once(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise SettingError(f"{where} has the key {key!r} twice in one section; keep one")
        found[key] = value
    return found


def _call(text: str) -> dict[str, Any] | None:
    """The section that a strategy's call in Python stands for; None where the text is no call."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        return None
    if not isinstance(node, ast.Call):
        return None
    name = ast.unparse(node.func)
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise SettingError(f"{name}(...) is migrated with arguments by name; found others. Name them.")
    arguments = {str(keyword.arg): _value(keyword.value) for keyword in node.keywords}
    if name.rsplit(".", 1)[-1] == "Trainer":
        return {"trainer": arguments}
    return {"strategy": _strategy(name, arguments)}


def _strategy(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"class_path": name, "init_args": arguments}


def _value(node: ast.expr) -> Any:
    """A value of literals as it is, a nested call of a strategy as its section, and anything else as its code."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        pass
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Strategy") and not node.args:
        arguments = {str(keyword.arg): _value(keyword.value) for keyword in node.keywords}
        return _strategy(ast.unparse(node.func), arguments)
    if isinstance(node, ast.Set | ast.List | ast.Tuple) and all(
        isinstance(one, ast.Name | ast.Attribute) for one in node.elts
    ):
        return [ast.unparse(one) for one in node.elts]
    return Source(ast.unparse(node))
