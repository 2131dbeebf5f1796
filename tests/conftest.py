"""What holds for every test: it leaves no process group behind, in which the tests that follow it would run, and fails
for what is wrong, not because the machine is busy; runs choose by a hardware profile that is the same everywhere.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings

# A machine on which other processes run takes longer than hypothesis allows an example by default, 200 ms.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


def pytest_configure(config: pytest.Config) -> None:
    """Give all tests one cache folder; workers of pytest-xdist inherit that of the process that starts them."""
    if hasattr(config, "workerinput") or config.option.collectonly:
        return
    from tests.helpers.hardware import keep_profiles_in

    folder = tempfile.TemporaryDirectory(prefix="lss-tests-cache-")
    config.add_cleanup(folder.cleanup)
    keep_profiles_in(Path(folder.name))


def _has_group() -> bool:
    distributed = sys.modules.get("torch.distributed")  # most tests need no torch: it is not imported for them
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _end_group(had_group: bool) -> bool:
    """Destroy a process group that was made since; whether there was one. Groups of fixtures are theirs to destroy."""
    if had_group or not _has_group():
        return False
    sys.modules["torch.distributed"].destroy_process_group()
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Fail a test that makes a process group and leaves it, so that the failure stays with it."""
    had_group = _has_group()
    try:
        result = yield
    except BaseException:
        _end_group(had_group)
        raise
    if _end_group(had_group):
        pytest.fail(f"{item.nodeid} left its process group behind. Tear down what made it.", pytrace=False)
    return result
