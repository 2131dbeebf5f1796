"""The strategy through Fabric on one process: exactness, gradients, evaluation, and how it refuses."""

from __future__ import annotations

import lightning.fabric
import pytest
import torch
from torch import nn

from lightning_superscale import SuperScaleError
from lightning_superscale.plugins.fabric.lightning import SuperScaleStrategy
from tests.plugins.fabric.loops import adamw, assert_equal, launched, loop, model, trained

CLIPS = {"plain": None, "norm": {"max_norm": 0.05}, "value": {"clip_val": 0.003}}


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS.keys())
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_a_loop_equals_plain_fabric_bit_for_bit(precision, clip):
    plain, norms = trained("auto", precision=precision, clip=clip)
    for strategy in ("superscale", "superoffload", SuperScaleStrategy(offload="cpu"), "zero3"):
        ours, own_norms = trained(strategy, precision=precision, clip=clip)
        assert_equal(ours, plain)
        assert own_norms == norms


def test_another_optimizer_steps_by_its_own_code_and_is_clipped():
    def weights(strategy):
        fabric = launched(strategy)
        plain = model()
        module, optimizer = fabric.setup(plain, torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9))
        loop(fabric, module, optimizer, clip={"max_norm": 0.05})
        fabric.strategy.teardown()
        return dict(plain.state_dict())

    assert_equal(weights("superscale"), weights("auto"))


def test_a_module_alone_evaluates_and_then_trains_with_an_optimizer():
    plain, fabric = model(), launched("superoffload")
    module = fabric.setup_module(plain)
    with torch.no_grad():
        before = module(torch.ones(4, 17))
    optimizer = fabric.setup_optimizers(adamw(plain))
    loop(fabric, module, optimizer)
    with torch.no_grad():
        assert not torch.equal(module(torch.ones(4, 17)), before)
    fabric.strategy.teardown()
    assert_equal(dict(plain.state_dict()), _without_first_batch(trained("auto")[0], plain))


@pytest.mark.parametrize("strategy", ["superscale", "zero3", "superoffload"])
def test_several_optimizers_step_in_turns_however_they_are_set_up(strategy):
    def weights(name, *, is_separate):
        fabric, plain = launched(name), model()
        own = [torch.optim.AdamW(part.parameters(), lr) for part, lr in ((plain[0], 1e-2), (plain[1:], 3e-3))]
        if is_separate:
            module, optimizers = fabric.setup_module(plain), fabric.setup_optimizers(*own)
        else:
            module, *optimizers = fabric.setup(plain, *own)
        for number in (0, 1, 0, 1):
            loop(fabric, module, optimizers[number], clip={"max_norm": 0.05}, num=16)
            optimizers[1 - number].zero_grad()
        if name != "auto":
            with pytest.raises(SuperScaleError, match="has trained without this one"):
                fabric.setup_optimizers(adamw(plain))
        fabric.strategy.teardown()
        return dict(plain.state_dict())

    expected = weights("auto", is_separate=False)
    assert_equal(weights(strategy, is_separate=False), expected)
    assert_equal(weights(strategy, is_separate=True), expected)


def _without_first_batch(weights, plain):
    """The oracle's state, but for statistics of batch norm, which the evaluation in training mode has changed."""
    own = plain.state_dict()
    return {name: own[name] if "running" in name or "num_batches" in name else value for name, value in weights.items()}


def test_gradients_and_weights_are_there_whenever_the_loop_looks():
    plain, ours = model(), model()
    reference, fabric = adamw(plain), launched("superoffload")
    module, optimizer = fabric.setup(ours, adamw(ours))
    x = torch.randn(8, 17, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        plain(x).pow(2).mean().backward()
        fabric.backward(module(x).pow(2).mean())
        for own, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
            assert torch.equal(own.grad, theirs.grad)
            own.grad.mul_(0.5)
            theirs.grad.mul_(0.5)
        for one in (reference, optimizer):
            one.step()
            one.zero_grad()
        for own, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
            assert torch.equal(own, theirs)
    fabric.strategy.teardown()


def test_a_norm_that_is_not_finite_is_refused_and_nothing_changed():
    plain, fabric = model(), launched("superscale")
    module, optimizer = fabric.setup(plain, adamw(plain))
    fabric.backward(module(torch.randn(8, 17)).mean())
    plain[0].bias.grad[0] = float("inf")
    grads = [p.grad.clone() for p in plain.parameters()]
    with pytest.raises(SuperScaleError, match=r"norm of the gradients of AdamW is inf.*nothing was changed"):
        fabric.clip_gradients(module, optimizer, max_norm=1.0)
    for param, grad in zip(plain.parameters(), grads, strict=True):
        assert torch.equal(param.grad, grad)
    fabric.strategy.teardown()


REFUSED = {
    r"SequenceConfig.size=2: ranks that share sequences.*Trainer": {"sequence": 2},
    r"tensor_parallel=2 cuts modules.*Trainer": {"zero": {"stage": 3, "tensor_parallel": 2}},
    r"weights='flow'.*zero=3": {"zero": 3, "offload": {"engine": "superoffload", "weights": "flow"}},
}


@pytest.mark.parametrize(("message", "config"), REFUSED.items())
def test_configs_that_need_the_trainer_are_refused_by_name(message, config):
    with pytest.raises(SuperScaleError, match=message):
        launched(SuperScaleStrategy(**config))


def test_calls_that_cannot_be_served_are_refused_by_name():
    plain, fabric = model(), launched("superscale")
    with pytest.raises(SuperScaleError, match="no module was set up"):
        fabric.setup_optimizers(adamw(plain))
    module, optimizer = fabric.setup(plain, adamw(plain))
    with pytest.raises(SuperScaleError, match=r"given a Sequential, and now a Linear.*one nn\.Module"):
        fabric.setup(nn.Linear(2, 2))
    with pytest.raises(SuperScaleError, match="norm_type=2, the global 2-norm; found inf"):
        fabric.clip_gradients(module, optimizer, max_norm=1.0, norm_type=float("inf"))
    with pytest.raises(SuperScaleError, match=r"step\(\) was called on the bare optimizer"):
        optimizer.optimizer.step()
    fabric.strategy.teardown()


def test_foreign_plugins_are_refused_by_name():
    with pytest.raises(SuperScaleError, match=r"plugin XLAPrecision; pass one of '32-true', .*'16-mixed'"):
        SuperScaleStrategy().precision = type("XLAPrecision", (), {"precision": "32-true"})()
    io = lightning.fabric.plugins.TorchCheckpointIO()
    with pytest.raises(SuperScaleError, match="was given a TorchCheckpointIO"):
        launched("superscale", plugins=[io])


def test_data_loaders_of_one_process_keep_their_samplers():
    fabric = launched("superscale")
    loader = torch.utils.data.DataLoader(torch.arange(8), shuffle=True)
    assert fabric.setup_dataloaders(loader).sampler is loader.sampler
    fabric.strategy.teardown()


class Compiled(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(17, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_a_compiled_module_is_compiled_and_trains_as_under_plain_fabric():
    def weights(strategy):
        torch._dynamo.reset()
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        fabric, plain = launched(strategy), Compiled()
        module, optimizer = fabric.setup(torch.compile(plain, backend=backend), torch.optim.AdamW(plain.parameters()))
        loop(fabric, module, optimizer)
        fabric.strategy.teardown()
        return dict(plain.state_dict()), len(graphs)

    expected, num_graphs = weights("auto")
    for strategy in ("superscale", "zero3", "superoffload", SuperScaleStrategy(offload="cpu")):
        found, own_graphs = weights(strategy)
        assert_equal(found, expected)
        assert own_graphs == num_graphs > 0


def test_a_module_that_turns_out_to_be_compiled_is_refused_where_graphs_cannot_have_what_was_asked():
    configs = {
        "weights='flow' empties weights.*Train without torch.compile": {
            "offload": {"engine": "superoffload", "weights": "flow"}
        },
        "SequenceConfig acts on the operations of Blocks": {"sequence": {"checkpoint_blocks": True}},
    }
    for message, config in configs.items():
        torch._dynamo.reset()
        fabric, plain = launched(SuperScaleStrategy(**config)), Blocks()
        module, _ = fabric.setup(torch.compile(plain, backend="eager"), torch.optim.AdamW(plain.parameters()))
        with pytest.raises(SuperScaleError, match=message):
            module(torch.ones(4, 17))
        fabric.strategy.teardown()


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.last = nn.Linear(17, 32), nn.Linear(32, 5)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


@pytest.mark.parametrize(
    "config",
    [
        {"offload": {"engine": "superoffload", "weights": "flow"}},
        {"offload": "superoffload", "sequence": {"checkpoint_blocks": True, "offload_activations": True}},
        {"sequence": 1},
    ],
    ids=["flow", "checkpoints", "size 1"],
)
def test_techniques_of_blocks_equal_plain_fabric(config):
    def weights(strategy):
        fabric, plain = launched(strategy), Blocks()
        module, optimizer = fabric.setup(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2))
        loop(fabric, module, optimizer, clip={"max_norm": 0.05})
        if strategy != "auto":
            fabric.strategy.teardown()
        return dict(plain.state_dict())

    assert_equal(weights(SuperScaleStrategy(**config)), weights("auto"))


@pytest.mark.parametrize("clip", [None, {"max_norm": 0.05}, {"clip_val": 0.003}], ids=["plain", "norm", "value"])
def test_fp16_scales_losses_and_steps_alike_under_every_engine(clip):
    expected, norms = trained("superscale", precision="16-true", clip=clip)
    for strategy in ("superoffload", "zero3"):
        found, own_norms = trained(strategy, precision="16-true", clip=clip)
        assert_equal(found, expected)
        assert own_norms == norms
    if clip is not None and "max_norm" in clip:
        # Gradients in fp16 have 11 bits, of which a scaled backward rounds other ones than a backward in fp32.
        theirs = trained("auto", clip=clip)[1]
        assert norms[0] == pytest.approx(float(theirs[0]), rel=2.0**-8)


def test_every_part_of_the_end_runs_where_one_fails(monkeypatch):
    fabric, plain = launched("superoffload"), model()
    module, optimizer = fabric.setup(plain, adamw(plain))
    loop(fabric, module, optimizer)
    run = fabric.strategy.run
    monkeypatch.setattr(run.assembly.interrupts, "close", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fabric.strategy.teardown()
    assert run.assembly is None
    assert not torch.distributed.is_initialized()
