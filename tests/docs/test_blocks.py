"""Every code block of README and of the pages runs as it is printed, or is named with what holds it instead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs import prepared
from tests.docs.commands import CHECKED, commands_of, faults_of
from tests.docs.markdown import PAGES, ROOT, Block, blocks_of, name_of

RUN = ("python", "yaml", "json", "bash")
# What a program printed, and drawings of folders: (page, first line) -> what holds it.
TEXT = {
    ("docs/checkpoint-format.md", "<name>.ckpt/"): "tests/checkpoint/test_golden.py",
    ("docs/migrate.md", "# Paste where the Trainer is made:"): "tests/cli/migrate/test_docs.py",
    (
        "docs/techniques/sequence.md",
        "- verify: on the first 14 of 14 tokens of the first batch, loss 25.4753 and gradient norm",
    ): "tests/run/techniques/test_first_batch.py",
}
# Python that needs what the default suite has not: (page, first line) -> the test that runs the same.
OF_PEERS = {
    (
        "docs/elastic.md",
        "from ray.train import FailureConfig, RunConfig, ScalingConfig",
    ): "tests/peers/test_ray_train.py"
}
WITH_BLOCKS = [page for page in PAGES if any(block.language in RUN for block in blocks_of(page.read_text()))]


class Runner:
    """The process that runs pages, and what it says of each."""

    def __init__(self) -> None:
        env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",  # the examples of a page are the same on every machine
            "LSS_PROFILE": "off",  # which would measure the machine for seconds
            "PYTHONUTF8": "1",
            "COLUMNS": "120",
        }
        command = [sys.executable, "-m", "tests.docs.runner"]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def failure(self, page: str, blocks: list[Block], folder: Path) -> str | None:
        """What failed of a page's blocks in a folder; None where all of them ran."""
        request = {"page": page, "folder": str(folder), "blocks": [vars(block) for block in blocks]}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the process that runs pages has ended"
        return json.loads(answer)["failure"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    made = Runner()
    yield made
    made.close()


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=name_of)
def test_blocks_run_as_they_are_printed(page, runner, tmp_path):
    blocks = [block for block in blocks_of(page.read_text()) if block.language in RUN]
    for block in [block for block in blocks if (name_of(page), block.text.splitlines()[0]) in OF_PEERS]:
        compile(block.text, str(page), "exec")
        blocks.remove(block)
    failure = runner.failure(name_of(page), blocks, tmp_path)
    output = tmp_path / "output.txt"
    assert failure is None, f"{failure}\n{output.read_text()[-3000:] if output.exists() else ''}"


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=name_of)
def test_commands_that_no_test_runs_are_what_they_seem(page):
    faults = [
        fault
        for block in blocks_of(page.read_text())
        if block.language == "bash"
        for fault in faults_of(block.text, page)
    ]
    assert not faults


def unheld(page: str, blocks: list[Block]) -> list[str]:
    """Blocks that nothing runs and that no line of TEXT names."""
    found = []
    for block in blocks:
        first = block.text.splitlines()[0].rstrip()
        is_held = block.language == "text" and any(
            page == there and first.startswith(text) and (ROOT / test).is_file() for (there, text), test in TEXT.items()
        )
        if block.language not in RUN and not is_held:
            found.append(f"line {block.line}: a block of {block.language or 'no'} language, {first!r}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_is_run_or_held_by_another_test(page):
    assert not unheld(name_of(page), blocks_of(page.read_text()))


def test_names_of_pages_with_stand_ins_are_those_of_pages():
    names = {name_of(page) for page in PAGES}
    assert prepared.NAMES.keys() <= names
    assert prepared.PREPARE.keys() <= names
    assert {page for page, _ in TEXT} <= names
    for (page, first), test in OF_PEERS.items():
        assert any(block.text.splitlines()[0] == first for block in blocks_of((ROOT / page).read_text()))
        assert (ROOT / test).is_file()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```python\nx = 1\ny = absent\n```", "NameError(\"name 'absent' is not defined\")"),
        ("```python\ndef f(self):\n    return absent(self)\n```", "nothing defines absent"),
        ("```python\nx = 1\n```\n```python\nassert x == 2\n```", "the block of line 4: AssertionError"),
        ("```yaml\ntrainer:\n  strategy: superofload\n```", "the block of line 1: "),
        ("```yaml\ntrainer:\n  strategys: superoffload\n```", "the block of line 1: "),
        (
            '```json\n{"zero_optimisation": {"stage": 2}}\n```',
            "`superscale migrate ds_config.json` ended with exit code 1",
        ),
        ("```bash\nsuperscale checkpoint inspect absent.ckpt\n```", "ended with exit code"),
        ("```bash\nsuperscale doctors\n```", "ended with exit code 2"),
        ("```python\nimport os\nos._exit(3)\n```", "ended with status 768"),
    ],
)
def test_a_block_that_fails_is_told(text, said, runner, tmp_path):
    assert said in runner.failure("page.md", blocks_of(text), tmp_path)
    assert runner.failure("page.md", blocks_of("```python\nassert 'x' not in globals()\n```"), tmp_path) is None


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("make demos", "the Makefile has no target demos"),
        ("pip install absent-package", "pip installs absent-package"),
        ("python examples/absent.py", "there is no examples/absent.py"),
        ("python examples/language_model/demo.py --trainer.absent 3", "has no flag --trainer.absent"),
        ("LSS_TEST_ALL=1 pytest tests/zero \\\n  tests/absent", "there is no tests/absent"),
        ("bash benchmarks/absent.sh", "there is no benchmarks/absent.sh"),
        ("numactl --cpunodebind=0 python examples/absent.py", "there is no examples/absent.py"),
        ("torchrun --nproc_per_node=2 absent.py", "there is no absent.py"),
        ("rm -r x", "nothing is known of rm"),
    ],
)
def test_a_command_that_is_wrong_is_told(command, fault):
    (found,) = faults_of(command, Path("page.md"))
    assert fault in found


def test_commands_are_read_as_a_shell_reads_them():
    text = "# a comment\nA=1 B='2 3' make demo  # sets itself up\nsuperscale trace -- python train.py\n"
    make, trace = commands_of(text)
    assert make.words == ("make", "demo")
    assert not make.is_run
    assert trace.words == ("superscale", "trace", "--", "python", "train.py")
    assert trace.is_run
    assert all(reason for reason, _ in CHECKED.values())


@pytest.mark.parametrize("text", ["```\nmake demo\n```", "```ruby\nputs 1\n```", "```text\nnobody knows it\n```"])
def test_a_block_that_nothing_holds_is_told(text):
    assert unheld("README.md", blocks_of(text))
    with pytest.raises(ValueError, match="is not closed"):
        blocks_of(text[:-4])
