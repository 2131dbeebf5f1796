"""Names reach Lightning with and without an import of ours, under both of its import names."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from tests.helpers.extent import only_in_test_all

ROOT = Path(__file__).resolve().parents[2]
TRAIN = """
import torch
class M(L.LightningModule):
    def __init__(self):
        super().__init__(); self.l = torch.nn.Linear(4, 2)
    def training_step(self, b, i): return self.l(b).pow(2).mean()
    def configure_optimizers(self): return torch.optim.AdamW(self.parameters())
t = L.Trainer(strategy=NAME, accelerator="cpu", devices=1, max_steps=2, logger=False, enable_progress_bar=False,
              enable_checkpointing=False, enable_model_summary=False)
t.fit(M(), torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=4))
print("trained with", type(t.strategy).__module__, type(t.strategy).__name__, t.global_step)
"""


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )


def has_entry_point() -> bool:
    return any(point.name == "lightning_superscale" for point in entry_points(group="torch.backends"))


@pytest.mark.parametrize(
    ("lightning", "binding"),
    [("lightning.pytorch", "pytorch"), ("pytorch_lightning", "pytorch_lightning")],
)
def test_autoload_registers_without_an_import_of_ours(lightning, binding):
    assert has_entry_point(), "the package is not installed: run `make setup`"
    done = python(f"import {lightning} as L\nNAME = 'superoffload'\n{TRAIN}")
    assert done.returncode == 0, done.stderr
    assert f"trained with lightning_superscale.plugins.{binding} SuperOffloadStrategy 2" in done.stdout


@pytest.mark.parametrize(
    "opt_out", ["LSS_AUTOLOAD", pytest.param("TORCH_DEVICE_BACKEND_AUTOLOAD", marks=only_in_test_all)]
)
def test_opting_out_leaves_lightnings_own_error_and_the_import_registers(opt_out):
    code = f"import lightning as L\nNAME = 'superoffload'\n{TRAIN}"
    done = python(code, **{opt_out: "0"})
    assert done.returncode != 0
    assert "You selected an invalid strategy name: `strategy='superoffload'`" in done.stderr
    done = python("import lightning_superscale\n" + code, **{opt_out: "0"})
    assert "SuperOffloadStrategy 2" in done.stdout, done.stderr


@pytest.mark.parametrize("name", ["superscale", "lightning_superscale.SuperOffloadStrategy"])
def test_every_name_and_the_class_path_are_registered(name):
    from lightning.pytorch.strategies import StrategyRegistry

    import lightning_superscale

    assert lightning_superscale.__version__
    assert name.lower() in StrategyRegistry.available_strategies()


def test_import_registers_also_when_lightning_comes_later():
    code = "import lightning_superscale, sys\nassert 'torch' not in sys.modules\n"
    code += f"import lightning as L\nNAME = 'superscale'\n{TRAIN}"
    done = python(code)
    assert "SuperScaleStrategy 2" in done.stdout, done.stderr


def test_a_broken_package_never_breaks_import_torch(tmp_path):
    # The hook's own dependencies fail to import: torch and Lightning must not notice.
    code = (
        "import sys\nsys.modules['lightning_superscale'] = None\n"
        "import torch, lightning as L\nprint('torch', torch.__version__, 'superoffload' in "
        "__import__('lightning.pytorch.strategies', fromlist=['x']).StrategyRegistry)"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch ")
    assert done.stdout.strip().endswith("False")


def test_the_hook_imports_only_the_standard_library():
    done = python(
        "import sys\nbefore = set(sys.modules)\nimport _lightning_superscale_autoload as a\na.install()\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\nprint(sorted(new - sys.stdlib_module_names))",
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )
    assert done.stdout.strip() == "['_lightning_superscale_autoload']", done.stdout + done.stderr


def test_importing_the_package_imports_neither_torch_nor_lightning():
    done = python(
        "import sys, lightning_superscale\n"
        "print([m for m in ('torch', 'lightning', 'pytorch_lightning', 'triton') if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_two_bindings_differ_in_lightnings_name_only():
    plugins = ROOT / "lightning_superscale" / "plugins"
    ours = (plugins / "pytorch.py").read_text().replace("lightning.pytorch", "pytorch_lightning")
    assert ours == (plugins / "pytorch_lightning.py").read_text()


FABRIC = """
import torch
fabric = F.Fabric(strategy=NAME, accelerator="cpu", devices=1)
fabric.launch()
module = torch.nn.Linear(4, 2)
model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters()))
fabric.backward(model(torch.ones(3, 4)).sum())
optimizer.step()
print("trained with", type(fabric.strategy).__module__, type(fabric.strategy).__name__)
"""


@pytest.mark.parametrize(
    ("fabric", "binding", "name", "cls"),
    [
        ("lightning.fabric", "lightning", "superoffload", "SuperOffloadStrategy"),
        ("lightning_fabric", "lightning_fabric", "zenflow", "ZenFlowStrategy"),  # in the middle of a window
    ],
)
def test_fabric_knows_the_names_without_an_import_of_ours_and_the_process_ends(fabric, binding, name, cls):
    done = python(f"import {fabric} as F\nNAME = {name!r}\n{FABRIC}")
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert f"trained with lightning_superscale.plugins.fabric.{binding} {cls}" in done.stdout


def test_fabric_has_every_name_that_the_trainer_has():
    from lightning.fabric.strategies import STRATEGY_REGISTRY

    from lightning_superscale.plugins.registry import STRATEGY_NAMES

    assert STRATEGY_NAMES.keys() <= set(STRATEGY_REGISTRY.available_strategies())


def test_the_two_bindings_of_fabric_differ_in_its_name_only():
    plugins = ROOT / "lightning_superscale" / "plugins" / "fabric"
    ours = (plugins / "lightning.py").read_text().replace("lightning.fabric", "lightning_fabric")
    assert ours == (plugins / "lightning_fabric.py").read_text()


def test_public_names_are_what_the_docs_say():
    import lightning_superscale as lss

    assert lss.__all__ == [
        "CheckpointBinder",
        "CheckpointConfig",
        "CheckpointError",
        "OffloadConfig",
        "ResumableSampler",
        "ScaleMonitor",
        "SequenceConfig",
        "SequenceParallelError",
        "ShardedEMA",
        "SuperOffloadStrategy",
        "SuperScaleError",
        "SuperScalePrecision",
        "SuperScaleStrategy",
        "UniversalCheckpointIO",
        "ZenFlowConfig",
        "ZenFlowStrategy",
        "ZeroConfig",
        "ZeroStrategy",
        "estimate",
        "last_checkpoint",
        "load_from_checkpoint",
        "simulate",
    ]
    assert all(getattr(lss, name).__name__ == name for name in lss.__all__)
    with pytest.raises(AttributeError, match="no attribute 'SuperOfload'"):
        _ = lss.SuperOfload


@pytest.mark.parametrize("lightning", ["lightning.pytorch", pytest.param("pytorch_lightning", marks=only_in_test_all)])
def test_paths_that_users_have_written_down_stay(lightning):
    """In YAML that --print_config gave, in pickles, and in the metadata of an editable install of an older checkout."""
    path = f"lightning_superscale.plugins.{lightning.rpartition('.')[2]}.SuperOffloadStrategy"
    done = python(f"import {lightning} as L\nNAME = '{path}'\n{TRAIN}")
    assert done.returncode == 0, done.stderr
    assert f"trained with {path.rpartition('.')[0]} SuperOffloadStrategy 2" in done.stdout
    done = python("from lightning_superscale.cli import main; raise SystemExit(main(['--help']))")
    assert done.returncode == 0, done.stderr
    found = {point.module for point in entry_points(group=f"{lightning}.callbacks_factory")}
    assert "lightning_superscale.plugins.binder" in found


@pytest.mark.parametrize(
    ("fabric", "binding"),
    [("lightning.fabric", "lightning"), pytest.param("lightning_fabric", "lightning_fabric", marks=only_in_test_all)],
)
def test_fabrics_classes_have_the_trainers_names_and_are_those_of_the_fabric_that_is_imported(fabric, binding):
    done = python(
        f"import {fabric} as F\nimport lightning_superscale as lss, lightning_superscale.fabric as ours\n"
        "for name in ours.__all__:\n"
        "    assert name in lss.__all__ and name in dir(ours)\n"
        f"    assert getattr(ours, name).__module__ == 'lightning_superscale.plugins.fabric.{binding}', name\n"
        "from lightning_superscale.fabric import SuperOffloadStrategy\n"
        "fabric = F.Fabric(strategy=SuperOffloadStrategy(zero=1), accelerator='cpu', devices=1)\n"
        "print(fabric.strategy.zero_config.stage)\n"
        "try:\n    ours.Strategy\nexcept AttributeError as error:\n    print(error)\n"
    )
    assert done.stdout.splitlines() == ["1", "module 'lightning_superscale.fabric' has no attribute 'Strategy'"], (
        done.stdout + done.stderr
    )
