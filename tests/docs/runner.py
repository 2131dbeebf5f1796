"""Runs the blocks of pages as they are printed: imports torch and Lightning once, and forks for each page.

Each line of standard input is a page as JSON: its name, a folder to run in, and its blocks. The answer is a line that
says what failed, or null. Blocks of a page share one module, in the page's order.
"""

from __future__ import annotations

import dis
import io
import json
import linecache
import os
import signal
import sys
import traceback
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningCLI

import lightning_superscale  # noqa: F401 # a page's blocks use it
from lightning_superscale.cli import main
from tests.docs import prepared
from tests.docs.commands import commands_of

# A page of commands that each import torch takes long on slow cores. Less than pytest gives a test, so that a page that
# hangs is named with what it printed.
SECONDS_PER_PAGE = 220


def _unknown_names(code: CodeType, known: set[str]) -> set[str]:
    """Global names that code within functions and classes loads, and nothing defines."""
    found = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"} - known
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            found |= _unknown_names(inner, known)
    return found


def _superscale(words: tuple[str, ...]) -> None:
    try:
        code = main(list(words[1:]))
    except SystemExit as left:
        code = left.code
    # What `superscale doctor` finds missing is this machine's affair: it ends with 1 then, and not by an error.
    if code not in (0, None) and (words[1], code) != ("doctor", 1):
        raise RuntimeError(f"`{' '.join(words)}` ended with exit code {code}")


def _run_bash(text: str) -> None:
    for command in commands_of(text):
        if command.is_run:
            _superscale(command.words)


def _run_yaml(text: str) -> None:
    """A configuration of LightningCLI: the Trainer that it describes is made, in both parser modes."""
    Path("block.yaml").write_text(text)
    for mode in ("yaml", "omegaconf"):
        cli = LightningCLI(
            prepared.MyModule,
            run=False,
            args=["--config", "block.yaml"],
            save_config_callback=None,
            parser_kwargs={"parser_mode": mode},
        )
        if not isinstance(cli.trainer, L.Trainer):
            raise RuntimeError("no Trainer was made")


def _run_json(text: str) -> None:
    """A configuration of DeepSpeed, which `superscale migrate` reads."""
    Path("ds_config.json").write_text(text)
    _superscale(("superscale", "migrate", "ds_config.json"))


class _Page:
    """The module that the Python blocks of a page make, one after the other."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.module = ModuleType("page")
        sys.modules["page"] = self.module
        self.code: list[CodeType] = []
        self.module.__dict__.update(prepared.names_for(name))

    def run_python(self, text: str, line: int) -> None:
        where = f"{self.name}, the block of line {line}"
        linecache.cache[where] = (len(text), None, text.splitlines(keepends=True), where)
        code = compile(text, where, "exec")
        self.code.append(code)
        exec(code, self.module.__dict__)

    def check_names(self) -> None:
        known = {*self.module.__dict__, *dir(__builtins__), *vars(__import__("builtins"))}
        for code in self.code:
            unknown = _unknown_names(code, known)
            if unknown:
                raise NameError(f"{code.co_filename}: nothing defines {', '.join(sorted(unknown))}")


def run_page(name: str, blocks: list[dict[str, Any]]) -> None:
    """Run the blocks of a page, in order, in the current folder.

    Raises:
        Exception: what a block raises.
    """
    page = _Page(name)
    prepared.prepare(name)
    for block in blocks:
        language, text = block["language"], block["text"]
        try:
            if language == "python":
                page.run_python(text, block["line"])
            else:
                {"bash": _run_bash, "yaml": _run_yaml, "json": _run_json}[language](text)
        except BaseException as error:
            raise RuntimeError(f"{name}, the block of line {block['line']}: {error!r}") from error
    page.check_names()


def _in_child(request: dict[str, Any], answer: int) -> None:
    """Run a page in this forked process, and write what failed into a pipe."""
    signal.alarm(SECONDS_PER_PAGE)
    os.chdir(request["folder"])
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdin = io.StringIO()
    failure = None
    try:
        run_page(request["page"], request["blocks"])
    except BaseException:
        failure = traceback.format_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(answer, json.dumps(failure).encode())
    os._exit(0)


def serve() -> None:
    """Answer requests until standard input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            _in_child(request, write)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            said = pipe.read()
        _, status = os.waitpid(child, 0)
        ended = f"the process of {request['page']} ended with status {status}, of 14 after {SECONDS_PER_PAGE} s"
        print(json.dumps({"failure": json.loads(said) if said else ended}), flush=True)


if __name__ == "__main__":
    serve()
    os._exit(0)  # taking torch down takes seconds
