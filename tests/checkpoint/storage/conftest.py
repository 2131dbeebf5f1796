"""Places in stores, for the tests of this folder."""

from __future__ import annotations

import fsspec
import pytest


@pytest.fixture(params=["memory", "local"])
def url(request, tmp_path):
    if request.param == "local":
        yield f"local://{tmp_path}/run/last.ckpt"
        return
    yield "memory://run/last.ckpt"
    fsspec.filesystem("memory").store.clear()
