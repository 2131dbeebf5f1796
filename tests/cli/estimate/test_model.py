"""Models that a command line names."""

from __future__ import annotations

import json
import sys

import pytest

from lightning_superscale.cli.estimate.model import build_model
from lightning_superscale.errors import SettingError


def test_a_class_a_function_and_a_module_of_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "mine_to_estimate.py").write_text(
        "from torch import nn\nclass Net(nn.Linear):\n    pass\ndef made(width):\n    return nn.Linear(width, width)\n"
        "def nothing():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    try:
        net = build_model("mine_to_estimate:Net", {"in_features": 3, "out_features": 5})
        assert tuple(net.weight.shape) == (5, 3)
        assert net.weight.is_meta
        assert build_model("mine_to_estimate:made", {"width": 7}).in_features == 7
        with pytest.raises(SettingError, match=r"gave an object of type int; expected a torch\.nn\.Module"):
            build_model("mine_to_estimate:nothing", {})
    finally:
        sys.modules.pop("mine_to_estimate", None)
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("name", "message"), [("no_such_package:Net", "can't be imported"), ("Net", "which is neither and no file")]
)
def test_no_model(name, message):
    with pytest.raises(SettingError, match=message):
        build_model(name, {})


CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
}


def test_a_hugging_face_folder(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for path in (tmp_path, tmp_path / "config.json"):
        model = build_model(str(path), {})
        assert type(model).__name__ == "LlamaForCausalLM"
        assert all(param.is_meta for param in model.parameters())


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "none of these"}'])
def test_a_broken_config(tmp_path, content):
    pytest.importorskip("transformers")
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(SettingError, match=r"is no config\.json of a causal language model"):
        build_model(str(path), {})
