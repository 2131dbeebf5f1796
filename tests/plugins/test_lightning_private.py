"""Each private name of Lightning that we use does what we take it for; a failure here explains the others."""

from __future__ import annotations

import ast
import csv
import importlib
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_superscale
from lightning_superscale.plugins import lightning_private

PLUGINS = Path(lightning_superscale.__file__).parent / "plugins"
LIGHTNINGS = ("lightning.pytorch", "pytorch_lightning")


def lightning(package: str, name: str):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(f"{package}.{module}" if module else package), attribute)


def test_this_lightning_is_one_of_those_that_were_tried():
    import lightning

    first, last = (tuple(map(int, version.split("."))) for version in lightning_private.VERSIONS)
    found = tuple(map(int, lightning.__version__.split(".")[:2]))
    assert first <= found <= last, (
        f"lightning {lightning.__version__} has not been tried: run the tests of this file, then widen "
        "lightning_private.VERSIONS"
    )


@pytest.fixture(params=LIGHTNINGS)
def package(request):
    return request.param


@pytest.fixture
def module(package):
    class Module(lightning(package, "LightningModule")):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2)
            self.told: list[str] = []

        def training_step(self, batch, batch_idx):
            return self.net(batch).sum()

        def on_before_optimizer_step(self, optimizer):
            self.told.append("before the step")

        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            self.told.append(f"clip at {gradient_clip_val}")

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters())

    return Module()


@pytest.fixture
def trainer(package, tmp_path):
    return lightning(package, "Trainer")(
        accelerator="cpu", devices=1, gradient_clip_val=0.5, logger=False, default_root_dir=tmp_path
    )


def test_the_plain_optimizer_is_the_users(package):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    wrapped = lightning(package, "core.optimizer.LightningOptimizer")(optimizer)
    assert lightning_private.plain_optimizer(wrapped) is optimizer
    assert lightning_private.plain_optimizer(optimizer) is optimizer


def test_the_arguments_of_a_step_are_those_that_it_takes(package, module, trainer):
    class WithoutIndex(type(module)):
        def training_step(self, batch):
            return self.net(batch).sum()

    for one, expected in ((module, ("batch", 3)), (WithoutIndex(), ("batch",))):
        trainer.strategy.connect(one)
        assert lightning_private.arguments_of_step(trainer, "batch", 3) == expected


def test_a_module_of_from_compiled_is_told_from_others(package, module):
    assert not lightning_private.is_compiled_whole(module)
    assert not lightning_private.is_compiled_whole(nn.Linear(1, 1))
    compiled = lightning(package, "utilities.compile.from_compiled")(torch.compile(module, backend="eager"))
    assert lightning_private.is_compiled_whole(compiled)


def test_a_wrapped_closure_calls_the_hooks_and_clips_after_the_closure(module, trainer):
    module.trainer = trainer
    trainer.strategy.connect(module)
    closure = lightning_private.wrapped_closure(
        trainer.precision_plugin, module, module.configure_optimizers(), lambda: module.told.append("closure") or "loss"
    )
    assert closure() == "loss"
    assert module.told == ["closure", "before the step", "clip at 0.5"]


def test_the_device_mesh_is_what_the_module_reads(module):
    mesh = object()
    lightning_private.set_device_mesh(module, mesh)
    assert module.device_mesh is mesh


def test_the_sampler_stays_the_users(module, trainer):
    lightning_private.keep_sampler(None)
    lightning_private.keep_sampler(module)
    module.trainer = trainer
    assert trainer._accelerator_connector.use_distributed_sampler
    lightning_private.keep_sampler(module)
    assert not trainer._accelerator_connector.use_distributed_sampler


def test_a_strategy_gives_up_its_launcher(package, tmp_path):
    strategy = lightning(package, "strategies.DDPStrategy")()
    trainer = lightning(package, "Trainer")(
        accelerator="cpu", devices=2, strategy=strategy, logger=False, sync_batchnorm=True, default_root_dir=tmp_path
    )
    assert trainer.strategy.launcher is not None
    lightning_private.drop_launcher(trainer.strategy)
    assert trainer.strategy.launcher is None
    assert type(lightning_private.layer_sync_of(trainer.strategy)).__name__ == "TorchSyncBatchNorm"


def test_a_function_is_called_before_the_hooks_of_the_end_of_training(package, module, trainer):
    told = []
    module.on_train_end = lambda: told.append("module")
    trainer.fit_loop.trainer.callbacks = [
        type("Told", (lightning(package, "Callback"),), {"on_train_end": lambda *_: told.append("callback")})()
    ]
    trainer.strategy.connect(module)
    lightning_private.call_before_train_end(trainer, lambda: told.append("ours"))
    trainer.fit_loop.on_run_end()
    assert told == ["ours", "callback", "module"]
    lightning_private.restore_trainer(trainer)
    lightning_private.restore_trainer(trainer)
    trainer.fit_loop.on_run_end()
    assert told[3:] == ["callback", "module"]


def test_a_sampler_that_lightning_divides_among_ranks_is_found(package):
    name = "fabric.utilities.distributed" if package == "lightning.pytorch" else "utilities.distributed"
    top = "lightning" if package == "lightning.pytorch" else "lightning_fabric"
    wrapper = importlib.import_module(f"{top}.{name}").DistributedSamplerWrapper
    inner = torch.utils.data.SequentialSampler(range(4))
    assert lightning_private.wrapped_sampler(wrapper(inner, num_replicas=2, rank=0)) is inner
    assert lightning_private.wrapped_sampler(inner) is None


def test_batches_are_counted_where_a_run_goes_on(package, trainer):
    loops, fit = lightning(package, "loops.training_epoch_loop"), trainer.fit_loop
    progress = fit.epoch_loop.batch_progress
    assert lightning_private.training_batches(trainer) == (progress.current, False)
    lightning_private.count_batches(trainer, 5)
    assert vars(progress.current) == {"ready": 5, "started": 5, "processed": 5, "completed": 5}
    fit.epoch_loop._restart_stage = loops.RestartStage.RESTARTED_ON_TRAIN_BATCH_END
    lightning_private.count_batches(trainer, 0)  # Lightning adds the one that it says was not completed
    assert vars(progress.current) == {"ready": 0, "started": 0, "processed": 0, "completed": -1}


def test_an_epoch_that_was_counted_is_over(trainer):
    fit = trainer.fit_loop
    epoch, batches = fit.epoch_progress.current, fit.epoch_loop.batch_progress
    epoch.ready = epoch.started = epoch.processed = 2
    batches.current.completed = batches.current.ready = 6
    batches.is_last_batch = True
    lightning_private.end_epoch(trainer)
    assert (epoch.completed, batches.current.completed, batches.current.ready) == (2, 0, 0)
    assert not batches.is_last_batch


def test_the_loaders_of_a_trainer_and_how_it_combines_them(package, trainer):
    combined = lightning(package, "utilities.CombinedLoader")({"one": [1], "two": [2]}, "min_size")
    trainer.fit_loop._combined_loader = combined
    assert lightning_private.train_loaders(trainer) == ("min_size", [[1], [2]])


def test_the_checkpoint_io_is_the_given_one(trainer, package):
    assert lightning_private.checkpoint_io_of(trainer.strategy) is None
    io = lightning(package, "plugins.io.TorchCheckpointIO")()
    trainer.strategy.checkpoint_io = io
    assert lightning_private.checkpoint_io_of(trainer.strategy) is io


def test_hyperparameters_build_a_module(package):
    class Sized(lightning(package, "LightningModule")):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.net = nn.Linear(size, 1)

    weights = {name: torch.ones_like(value) for name, value in Sized(3).state_dict().items()}
    checkpoint = {"hyper_parameters": {"size": 3}, "state_dict": weights}
    loaded = lightning_private.load_state_of(package)(Sized, checkpoint, strict=True)
    assert torch.equal(loaded.net.weight, torch.ones(1, 3))


def test_fsdp_contexts_take_what_they_are_given(package):
    strategies = importlib.import_module(f"{package}.strategies.fsdp")
    whole = inspect.signature(strategies._get_full_state_dict_context)
    whole.bind("model", world_size=2, rank0_only=False)
    inspect.signature(strategies._get_sharded_state_dict_context).bind("model")
    assert strategies.FSDPStrategy.__name__ == "FSDPStrategy"


def test_overridden_private_methods_exist(package):
    assert callable(lightning(package, "strategies.DDPStrategy")._configure_launcher)
    source = inspect.getsource(lightning(package, "trainer.connectors.accelerator_connector"))
    assert "self.strategy._configure_launcher()" in source
    assert "self._strategy_flag._precision_plugin" in source  # our property keeps what it was given under this name


def _private_of_others(path: Path) -> list[str]:
    """`x._name` where x is not the object itself, its class or its base."""
    return [
        f"{path.name}:{node.lineno} {ast.unparse(node)}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
        and not (isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "super")
    ]


def test_no_other_file_reads_private_names_of_others():
    found = [
        line
        for path in sorted(PLUGINS.rglob("*.py"))
        if path.name != "lightning_private.py"
        for line in _private_of_others(path)
    ]
    assert found == []


def test_no_plugin_reads_private_names_that_it_inherits():
    """`self._name` is ours: assigned or defined in the file, or the overridden method of the contract above."""
    found = []
    for path in sorted((PLUGINS / "trainer").glob("*.py")) + sorted((PLUGINS / "checkpoint").glob("*.py")):
        parsed = ast.parse(path.read_text())
        own = {node.name for node in ast.walk(parsed) if isinstance(node, ast.FunctionDef)}
        nodes = [
            node
            for node in ast.walk(parsed)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
        ]
        own |= {node.attr for node in nodes if isinstance(node.ctx, ast.Store)}
        found += [f"{path.name}: self.{n.attr}" for n in nodes if n.attr.startswith("_") and n.attr not in own]
    assert found == []


@pytest.mark.parametrize("package", ["lightning.fabric", "lightning_fabric"])
def test_fabric_lets_any_backward_run_beside_a_strategys_own(package):
    fabric = importlib.import_module(package)
    strategies = importlib.import_module(f"{package}.strategies")
    called = []

    class Refusing(strategies.SingleDeviceStrategy):
        def backward(self, tensor, module, *args, **kwargs):
            called.append(tensor)
            super().backward(tensor, module, *args, **kwargs)

    class Serving(Refusing):
        backward = lightning_private.beside_any_backward(Refusing.backward, strategies.Strategy)

    for strategy, is_served in ((Refusing, False), (Serving, True)):
        own = fabric.Fabric(strategy=strategy(), accelerator="cpu")
        module = own.setup(nn.Linear(2, 1))
        if is_served:
            module(torch.ones(1, 2)).sum().backward()
        else:
            with pytest.raises(RuntimeError, match=r"call `fabric.backward\(loss\)`"):
                module(torch.ones(1, 2)).sum().backward()
        called.clear()
        own.backward(module(torch.ones(1, 2)).sum())
        assert len(called) == 1


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_a_batch_is_logged_at_the_step_of_what_it_logs_itself(name, tmp_path):
    namespace = pytest.importorskip(name)
    loggers = importlib.import_module(f"{name}.loggers")

    class Model(namespace.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 1)

        def training_step(self, batch, batch_idx):
            loss = self.net(batch).sum()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Told(namespace.Callback):
        steps = []

        def on_train_batch_end(self, trainer, *_):
            self.steps.append(lightning_private.logged_step(trainer))

    logger, told = loggers.CSVLogger(tmp_path), Told()
    trainer = namespace.Trainer(
        accelerator="cpu", max_epochs=1, logger=logger, log_every_n_steps=1, callbacks=[told],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=2,
    )  # fmt: skip
    trainer.fit(Model(), torch.utils.data.DataLoader(torch.ones(8, 2), batch_size=1))
    assert told.steps == [0, 0, 1, 1, 2, 2, 3, 3]
    with open(Path(logger.log_dir, "metrics.csv")) as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "1", "2", "3"]
