"""Every Triton op in Triton's interpreter, on CPU tensors, against the oracle."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.ops.gpu.helpers import ROOT
from tests.ops.gpu.triton_checks import CHECKS

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str | None]:
    """What each check said, in a process in which Triton interprets."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.ops.gpu.triton_checks", "cpu"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    loaded: dict[str, str | None] = json.loads(done.stdout)
    return loaded


@pytest.mark.parametrize("name", CHECKS)
def test_op_interpreted_equals_reference(name: str, outcomes: dict[str, str | None]) -> None:
    assert outcomes[name] is None, outcomes[name]
