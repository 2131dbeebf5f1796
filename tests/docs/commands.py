"""The commands of `bash` blocks: which of them a test runs, and what is checked of those that it can't run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.docs.markdown import ROOT

# A reader's own program, which pages call so.
OWN_SCRIPTS = ("train.py",)


@dataclass(frozen=True)
class Command:
    """One command line: its words, without leading assignments of variables and the comment behind it."""

    words: tuple[str, ...]

    @property
    def is_run(self) -> bool:
        """Whether a test runs it as it is printed."""
        return self.words[0] == "superscale"


def commands_of(text: str) -> list[Command]:
    """The commands of a block, one a line, where a line that ends in a backslash goes on."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words:
            found.append(Command(tuple(words)))
    return found


def _make(words: tuple[str, ...]) -> str | None:
    targets = re.findall(r"^([\w -]+):(?!=)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    known = {name for line in targets for name in line.split()}
    absent = [word for word in words[1:] if "=" not in word and word not in known]
    return f"the Makefile has no target {absent[0]}" if absent else None


def _pip(words: tuple[str, ...]) -> str | None:
    if words[1] != "install":
        return "pip does something other than install"
    names = {"lightning-superscale", "matplotlib", "mkdocs-material", "peft", "transformers"}
    for word in words[2:]:
        is_ours = word == "." or word.startswith((".[", "dist/lightning_superscale-"))
        if not is_ours and not word.startswith("-") and word.split("=")[0] not in names:
            return f"pip installs {word}, which no list of this test names"
    return None


def _script(words: tuple[str, ...]) -> str | None:
    """A program of this repository and its flags, or the reader's own."""
    if words[1] == "-m" and words[2] == "tests.soak":
        return None  # tests/soak/test_soak.py runs it
    if words[1] == "-m":
        return _pytest(words[2:]) if words[2] == "pytest" else f"module {words[2]} is not known here"
    if words[1] in OWN_SCRIPTS:
        return None
    script = ROOT / words[1]
    if not script.is_file():
        return f"there is no {words[1]}"
    text = "\n".join(file.read_text() for file in sorted(script.parent.glob("*.*")) if file.suffix in (".py", ".yaml"))
    for word in words[2:]:
        if word.startswith("--") and word != "--help":
            name = word.split("=")[0].lstrip("-").split(".")[-1].replace("-", "_")
            if not re.search(rf"\b{name}\b", text):
                return f"{words[1]} has no flag {word}"
    return None


def _pytest(words: tuple[str, ...]) -> str | None:
    paths = [word for word in words[1:] if word.startswith("tests")]
    absent = [path for path in paths if not (ROOT / path).exists()]
    return f"there is no {absent[0]}" if absent else None


def _file(words: tuple[str, ...]) -> str | None:
    script = words[1] if words[0] == "bash" else words[0]
    return None if (ROOT / script).is_file() else f"there is no {script}"


def _starts(words: tuple[str, ...]) -> str | None:
    """A program that starts another one: what it starts is checked."""
    rest = [word for word in words[1:] if not word.startswith("-")]
    return fault_of(Command(tuple(rest))) if rest[0] in CHECKED else _script(("python", *rest))


# Program -> why no test runs it, and what is checked instead.
CHECKED: dict[str, tuple[str, Callable[[tuple[str, ...]], str | None]]] = {
    "make": ("makes an environment, trains for minutes or needs a GPU", _make),
    "pip": ("installs into the environment; .ci/wheel installs the wheel", _pip),
    "python": ("the reader's own program, or one that tests/examples and tests/benchmarks run", _script),
    "pytest": ("parts of this very suite", _pytest),
    "bash": ("makes an environment with DeepSpeed", _file),
    ".ci/run": ("runs this suite", _file),
    "numactl": ("is not on every machine", _starts),
    "torchrun": ("starts a process for each of several devices", _starts),
}


def fault_of(command: Command) -> str | None:
    """What is wrong with a command that no test runs; None where nothing is."""
    program = command.words[0]
    if program not in CHECKED:
        return f"nothing is known of {program}: run it in a test, or say in CHECKED why not and check what can be"
    return CHECKED[program][1](command.words)


def faults_of(text: str, page: Path) -> list[str]:
    """What is wrong with the commands of a block that no test runs."""
    found = [(command, fault_of(command)) for command in commands_of(text) if not command.is_run]
    return [f"{page}: {shlex.join(command.words)}: {fault}" for command, fault in found if fault is not None]
