"""The rows of a run: one JSON object a line, written as soon as it is measured, so that an interrupt leaves it."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.process import Outcome

Row = dict[str, Any]


class Rows:
    """Writes rows to a file of JSON lines and prints them. Threads may share it.

    Args:
        path: the file; an older one is replaced.
        limit_s: seconds for all rows together, from now on.
    """

    def __init__(self, path: Path, limit_s: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w")
        self._start = time.monotonic()
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self.written: list[Row] = []

    @property
    def left_s(self) -> float:
        """Seconds until the end of the run, not less than none."""
        return max(0.0, self._limit_s - (time.monotonic() - self._start))

    @property
    def failed(self) -> list[str]:
        """Names of the rows that are not ok, whether they missed, broke, or had no time left."""
        return [row["row"] for row in self.written if not row["ok"]]

    def write(self, name: str, ok: bool = True, **content: Any) -> None:
        """Write one row at once."""
        with self._lock:
            at = round(time.monotonic() - self._start, 1)
            row = {"row": name, "ok": ok, "at_s": at, **content}
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            self.written.append(row)
            shown = {key: value for key, value in content.items() if not isinstance(value, (list, dict))}
            print(f"{at:6.1f} s {'ok     ' if ok else 'NOT OK '} {name}  {shown or ''}", flush=True)

    def stop(self) -> None:
        """Leave no time for further rows."""
        self._limit_s = 0.0

    def no_time(self, name: str) -> None:
        """Write that the time was used up before this row."""
        self.write(name, ok=False, error="no time was left for this row")

    def outcome(self, name: str, outcome: Outcome, **content: Any) -> None:
        """Write how a process ended."""
        broken = {} if outcome.is_good else {"error": outcome.why, "last_words": outcome.tail}
        self.write(name, ok=outcome.is_good, took_s=round(outcome.seconds, 2), **content, **broken)

    def conclude(self) -> int:
        """Write the last row; returns the exit status: 1 if any row is not ok."""
        failed = self.failed
        self.write("end", ok=not failed, rows=len(self.written), failed=failed)
        for name in failed:
            print(f"not ok: {name}", flush=True)
        self._file.close()
        return 1 if failed else 0
