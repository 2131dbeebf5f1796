"""Whether a checkpoint fits: everything that does not, at once."""

from types import SimpleNamespace

import pytest
import torch

from lightning_superscale.checkpoint.match import match
from lightning_superscale.checkpoint.state import TensorInfo, TensorKey
from lightning_superscale.errors import CheckpointError


def weights(aliases=None, /, **shapes):
    tensors = {
        TensorKey("model", name.replace("__", ".")): TensorInfo(torch.float32, s, "model") for name, s in shapes.items()
    }
    return SimpleNamespace(path="last.ckpt", tensors=tensors, aliases=aliases or {})


def test_what_fits_is_found_under_its_name():
    source = weights(a=(2, 3), b__weight=())
    assert match(source.tensors, source) == {key: key for key in source.tensors}


def test_everything_that_does_not_fit_is_listed_at_once():
    source = weights(a=(2, 3), old=(1,), layer__weight=(4,))
    wanted = weights(a=(3, 2), new=(1,), layer__weigth=(4,)).tensors
    with pytest.raises(CheckpointError) as error:
        match(wanted, source)
    text = str(error.value)
    for part in (
        "last.ckpt does not fit, and nothing was changed",
        "lacks model: new",
        "model: layer.weigth (did you mean 'layer.weight'?)",
        "nothing takes model: old, model: layer.weight",
        "model: a has shape (3, 2) here and (2, 3) in the checkpoint",
        "allow=['new']",
    ):
        assert part in text


def test_what_is_allowed_to_lack_may_lack_on_either_side():
    source = weights(a=(2,), head__old=(1,))
    wanted = weights(a=(2,), head__new=(1,)).tensors
    for allow in (["head.*"], ["model/head.*"], ["*new", "*old"]):
        assert match(wanted, source, allow=allow) == {TensorKey("model", "a"): TensorKey("model", "a")}
    with pytest.raises(CheckpointError, match="nothing takes model: head.old"):
        match(wanted, source, allow=["head.new"])
    with pytest.raises(CheckpointError, match="shape"):  # what is on both sides must fit all the same
        match(weights(a=(3,)).tensors, source, allow=["*"])


def test_tied_tensors_are_found_under_any_of_their_names():
    source = weights({"head.weight": "embed.weight"}, embed__weight=(5, 2))
    here = TensorKey("model", "embed.weight")
    assert match({TensorKey("model", "head.weight"): source.tensors[here]}, source) == {
        TensorKey("model", "head.weight"): here
    }
    source = weights({"a": "b"}, a=(1,))  # written under the other name
    assert match({TensorKey("model", "b"): TensorInfo(torch.float32, (1,), "model")}, source)


def test_sections_that_nobody_wants_are_not_compared():
    source = weights(a=(2,))
    wanted = dict(source.tensors)
    source.tensors[TensorKey("optimizer.0", "a", "exp_avg")] = TensorInfo(torch.float32, (2,), "state")
    assert len(match(wanted, source)) == 1


@pytest.mark.parametrize(
    ("here", "there", "fits"),
    [
        (torch.float32, torch.bfloat16, True), (torch.float16, torch.float64, True), (torch.int64, torch.int64, True),
        (torch.int64, torch.float32, False), (torch.bool, torch.uint8, False),
    ],
)  # fmt: skip
def test_floating_point_converts_and_nothing_else(here, there, fits):
    source = weights(a=(2,))
    source.tensors[TensorKey("model", "a")] = TensorInfo(there, (2,), "model")
    wanted = {TensorKey("model", "a"): TensorInfo(here, (2,), "model")}
    if fits:
        assert match(wanted, source)
    else:
        with pytest.raises(CheckpointError, match=f"{here} here and {there} in"):
            match(wanted, source)


def test_a_long_list_is_cut():
    with pytest.raises(CheckpointError, match="and 5 more"):
        match(weights(**{f"w{i}": (1,) for i in range(25)}).tensors, weights())
