"""Presets: the strategy's own constructor with other defaults, for callers, for inspection and for LightningCLI."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import lightning_superscale as lss
from lightning_superscale.plugins import pytorch, pytorch_lightning
from tests.helpers.trainers import Regressor

PRESETS = {
    "SuperOffloadStrategy": {"zero": 2, "offload": "superoffload"},
    "ZenFlowStrategy": {"zero": 2, "offload": "zenflow"},
    "ZeroStrategy": {"zero": 3},
}


@pytest.fixture(params=PRESETS)
def name(request):
    return request.param


@pytest.mark.parametrize("binding", [pytorch, pytorch_lightning])
def test_the_signature_is_the_strategys_but_for_the_defaults(name, binding):
    preset, strategy = getattr(binding, name), binding.SuperScaleStrategy
    expected = inspect.signature(strategy)
    params = [
        param.replace(default=PRESETS[name].get(param.name, param.default)) for param in expected.parameters.values()
    ]
    assert inspect.signature(preset) == expected.replace(parameters=params)
    assert {"zero", "offload"} <= set(expected.parameters)
    assert inspect.getfullargspec(preset.__init__).defaults == tuple(param.default for param in params)
    assert expected.parameters["zero"].default == 0
    assert preset.__init__.__globals__ is strategy.__init__.__globals__
    assert preset.__init__.__annotations__ == strategy.__init__.__annotations__
    assert preset.__doc__ != strategy.__doc__


@pytest.mark.parametrize("binding", [pytorch, pytorch_lightning])
def test_arguments_by_place_and_by_name(name, binding):
    preset = getattr(binding, name)
    made, other = preset(), preset(1, "cpu", error_if_nonfinite=True)
    assert (made.zero_config.stage, made.error_if_nonfinite) == (PRESETS[name]["zero"], False)
    assert (made.offload_config is not None) == ("offload" in PRESETS[name])
    assert (other.zero_config.stage, other.offload_config.engine, other.error_if_nonfinite) == (1, "cpu", True)
    assert preset(offload=None).offload_config is None
    with pytest.raises(
        TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'zer'; its arguments are zero, offload, "
    ):
        preset(zer=1)


def test_copies_keep_what_was_chosen(name):
    made = getattr(lss, name)(1)
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert type(again) is type(made)
        assert again.zero_config == made.zero_config
        assert again.offload_config == made.offload_config


def test_a_subclass_may_have_a_constructor_of_its_own():
    class Mine(lss.ZeroStrategy):
        def __init__(self, stage: int = 1) -> None:
            super().__init__(stage, error_if_nonfinite=True)

    assert (Mine().zero_config.stage, Mine().error_if_nonfinite) == (1, True)


def test_no_constructor_between_is_skipped():
    class Logged(lss.SuperScaleStrategy):
        def __init__(self, **arguments) -> None:
            super().__init__(**arguments)
            self.logged = arguments["zero"]

    class Both(lss.SuperOffloadStrategy, Logged):
        pass

    made = Both()
    assert (made.logged, made.zero_config.stage, made.offload_config.engine) == (2, 2, "superoffload")


@pytest.mark.parametrize("mode", ["yaml", "omegaconf"])
def test_the_command_line_sees_every_parameter_its_default_and_its_help(name, mode, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])

    def printed(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            LightningCLI(Regressor, args=["fit", *arguments], parser_kwargs={"parser_mode": mode})
        return capsys.readouterr().out

    # Lightning takes a class path alone for a name and prints that.
    flags = (f"--trainer.strategy=lightning_superscale.{name}", "--trainer.strategy.error_if_nonfinite=true")
    init_args = yaml.safe_load(printed(*flags, "--print_config"))["trainer"]["strategy"]["init_args"]
    names = list(inspect.signature(lss.SuperScaleStrategy).parameters)
    assert {key: init_args[key] for key in PRESETS[name]} == PRESETS[name]
    assert set(init_args) == set(names)
    told = printed(f"--trainer.strategy.help=lightning_superscale.{name}")
    assert all(f"--trainer.strategy.{key}" in told for key in names)
    assert "raise before weights or states change when a gradient is NaN" in " ".join(told.split())


@pytest.mark.parametrize("mode", ["yaml", "omegaconf"])
def test_a_file_chooses_among_them(name, mode):
    parser = LightningArgumentParser(parser_mode=mode)
    parser.add_argument("--strategy", type=lss.SuperScaleStrategy)
    chosen = {"class_path": f"lightning_superscale.{name}", "init_args": {"zero": {"stage": 1}}}
    parsed = parser.parse_string(yaml.safe_dump({"strategy": chosen}))
    strategy = parser.instantiate_classes(parsed).strategy
    assert type(strategy) is getattr(lss, name)
    assert strategy.zero_config == lss.ZeroConfig(stage=1)
    assert (strategy.offload_config is not None) == ("offload" in PRESETS[name])
