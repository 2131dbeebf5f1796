"""The command line in a process that tells when it reads, and reads slowly, so that a signal comes in the middle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_SCRIPT = """
import signal
# A background job's children ignore the one, those of nohup the other.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
import sys, time
from lightning_superscale.checkpoint.load.reader import SavedState
from lightning_superscale.cli import main

read = SavedState.read
def slowly(self, requests):
    print("reading", flush=True)
    time.sleep(0.5)
    read(self, requests)
SavedState.read = slowly
sys.exit(main(sys.argv[1:]))
"""
_ROOT = Path(__file__).resolve().parents[2]


def started_slowly(*arguments: str) -> subprocess.Popen[str]:
    """`superscale` with these arguments; it prints "reading" before each read of a checkpoint."""
    return subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, *arguments],
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
