"""What `make test-all` runs and the default suite leaves out, so that it ends within 18 minutes on two cores."""

from __future__ import annotations

import os

import pytest

IS_ALL = bool(os.environ.get("LSS_TEST_ALL"))
only_in_test_all = pytest.mark.skipif(not IS_ALL, reason="takes long; runs in make test-all")
