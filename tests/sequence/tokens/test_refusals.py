"""Models that can't be shared are refused with the function, the shape, the module and the line of the user's file.

The ranks have no group: what is refused before a collective needs none, and no rank waits for another one.
"""

from __future__ import annotations

import inspect
import re

import pytest
import torch

from lightning_superscale.comm.in_graph import AxisLink
from lightning_superscale.comm.mesh import MeshAxis
from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.sequence.tokens.custom_functions import CustomFunctions
from lightning_superscale.sequence.tokens.layout import Replicated, Sharing, TokenDim
from lightning_superscale.sequence.tokens.tensor import with_layout
from tests.sequence.tokens.unshardable import MODELS


@pytest.fixture
def guard():
    functions = CustomFunctions()
    functions.install()
    yield
    functions.remove()


@pytest.mark.parametrize("model", MODELS)
def test_a_model_that_cannot_be_shared_is_refused_by_function_module_and_line(guard, model):
    sharing = Sharing(link=AxisLink(MeshAxis("sequence", 0, 2, None)))
    ids = with_layout(torch.arange(16).view(2, 8), Replicated(TokenDim(1, 8), sharing))
    with pytest.raises(SequenceParallelError) as refusal:
        model()(ids)
    message = str(refusal.value)
    lines, first = inspect.getsourcelines(model)
    line = first + next(at for at, text in enumerate(lines) if text.rstrip().endswith("# refused"))
    assert message.startswith(f"{model.refused}([")
    assert f"unshardable.py:{line}." in message
    assert re.search(rf" in ({model.__name__}|LSTM|GRU|Conv1d|BatchNorm1d|MultiheadAttention) at /", message)
    assert "with tokens on dim" in message
    assert "is not known" not in message
