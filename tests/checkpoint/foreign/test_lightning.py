"""Lightning's own checkpoint files."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_superscale import SuperOffloadStrategy
from lightning_superscale.checkpoint.foreign.registry import detect, open_foreign
from lightning_superscale.checkpoint.foreign.torch_optimizer import parameter_names
from lightning_superscale.checkpoint.state import MASTER, MODEL, TensorKey, optimizer_section
from lightning_superscale.errors import CheckpointError
from tests.helpers.foreign import Payload, read_all, read_in_parts


class Tied(LightningModule):
    """Two optimizers in another order than the module's, a tied and a frozen weight, a buffer."""

    def __init__(self, *, are_named: bool = False, num_optimizers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 3)
        self.mid = nn.Linear(3, 3)
        self.still = nn.Linear(3, 3)
        self.head = nn.Linear(3, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.tensor(0))
        self.still.requires_grad_(False)
        self.are_named, self.num_optimizers = are_named, num_optimizers
        self.automatic_optimization = num_optimizers == 1

    def training_step(self, batch, batch_idx):
        self.seen += 1
        loss = self.head(self.still(self.mid(self.embed(batch)))).float().square().mean()
        if self.automatic_optimization:
            return loss
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return None

    def configure_optimizers(self):
        named = [(n, p) for n, p in reversed(list(self.named_parameters())) if p.requires_grad]
        own = named if self.are_named else [p for _, p in named]
        if self.num_optimizers == 1:
            return torch.optim.AdamW(own, lr=1e-2)
        return [torch.optim.AdamW(own[:2], lr=1e-2), torch.optim.SGD(own[2:], lr=1e-1, momentum=0.9)]


def fit(module, folder, **options):
    torch.manual_seed(0)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=4, logger=False, enable_checkpointing=False, default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.randint(0, 6, (8, 2)), batch_size=2))
    trainer.save_checkpoint(folder / "x.ckpt")
    return folder / "x.ckpt", trainer


def expected(module, trainer):
    tensors = {TensorKey(MODEL, n): v for n, v in module.state_dict().items() if n != "head.weight"}
    names = {param: name for name, param in module.named_parameters()}
    for index, optimizer in enumerate(trainer.optimizers):
        for param, state in optimizer.state.items():
            for key, value in state.items():
                tensors[TensorKey(optimizer_section(index), names[param], key)] = value
    return tensors


@pytest.mark.parametrize("are_named", [True, False])
def test_everything_is_read_bit_for_bit(tmp_path, are_named):
    module = Tied(are_named=are_named)
    path, trainer = fit(module, tmp_path)
    names = None if are_named else parameter_names(module, trainer.optimizers)
    source = open_foreign(path, names)
    for found in (read_all(source), read_in_parts(source, seed=0)):
        wanted = expected(module, trainer)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], value) for key, value in wanted.items())
    assert source.aliases == {"head.weight": "embed.weight"}
    assert [record.names for record in source.optimizers] == [(("mid.bias", "mid.weight"),), (("embed.weight",),)]
    assert source.optimizers[1].groups[0]["momentum"] == 0.9
    trainable = {key.name for key, info in source.tensors.items() if info.trainable}
    assert trainable == {"embed.weight", "mid.weight", "mid.bias"}
    assert source.step == trainer.global_step
    assert {"loops", "callbacks", "epoch", "pytorch-lightning_version"} <= source.rest.keys()
    assert detect(path) == "lightning"


def test_our_masters_are_beside_their_moments(tmp_path):
    module = Tied(num_optimizers=1)
    path, trainer = fit(module, tmp_path, strategy=SuperOffloadStrategy(), precision="bf16-true")
    packed = torch.load(path, weights_only=True)["optimizer_states"][0]["state"]
    source = open_foreign(path, parameter_names(module, trainer.optimizers))
    found = read_all(source)
    for number, name in enumerate(["mid.bias", "mid.weight", "embed.weight"]):
        key = TensorKey(optimizer_section(0), name, MASTER)
        assert source.tensors[key].role == "master"
        assert torch.equal(found[key], packed[number][MASTER])
        assert torch.equal(found[key].bfloat16(), found[TensorKey(MODEL, name)])
        assert found[TensorKey(MODEL, name)].dtype == torch.bfloat16


def test_numbered_states_without_names_are_refused_only_when_asked_for(tmp_path):
    module = Tied()
    path, trainer = fit(module, tmp_path)
    source = open_foreign(path)
    assert torch.equal(read_all(source)[TensorKey(MODEL, "mid.weight")], module.mid.weight)
    assert not any(key.section != MODEL for key in source.tensors)
    with pytest.raises(CheckpointError, match="numbers the states of optimizer 0 from 0 to 1"):
        _ = source.optimizers
    with pytest.raises(CheckpointError, match="names were given for 1"):
        open_foreign(path, parameter_names(module, trainer.optimizers)[:1])
    with pytest.raises(CheckpointError, match="optimizer 0 .* has 2 parameters, 1 names"):
        open_foreign(path, [["mid.bias"], ["embed.weight"]])
    with pytest.raises(CheckpointError, match="of which it has no weight"):
        open_foreign(path, [["mid.bias", "mid.wait"], ["embed.weight"]])


def test_names_in_the_wrong_order_are_refused_where_shapes_tell(tmp_path):
    path, _ = fit(Tied(), tmp_path)
    with pytest.raises(
        CheckpointError, match=r"exp_avg of parameter 0 .* has shape \(3,\), and 'mid.weight' has \(3, 3\)"
    ):
        open_foreign(path, [["mid.weight", "mid.bias"], ["embed.weight"]])


def test_a_tied_weight_is_under_the_name_that_its_optimizer_has(tmp_path):
    path, _ = fit(Tied(), tmp_path)
    source = open_foreign(path, [["mid.bias", "mid.weight"], ["head.weight"]])
    assert source.aliases == {"embed.weight": "head.weight"}
    assert TensorKey(optimizer_section(1), "head.weight", "momentum_buffer") in source.tensors


def test_a_foreign_tensor_has_no_name():
    with pytest.raises(CheckpointError, match="no parameters of Tied"):
        parameter_names(Tied(), [torch.optim.SGD([torch.zeros(3, requires_grad=True)])])


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_hostile_file_runs_nothing(tmp_path, is_zip):
    path, _ = fit(Tied(), tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"] = {"x": Payload(tmp_path / "trace")}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError, match=r"x.ckpt names posix.mkdir"):
        open_foreign(path)
    assert not (tmp_path / "trace").exists()


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save({"model": {}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match='no "state_dict"'):
        open_foreign(tmp_path / "x.pt")
    torch.save([1], tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match='no "state_dict"'):
        open_foreign(tmp_path / "x.pt")


def test_a_state_dict_alone_is_read_as_weights(tmp_path):
    module = Tied()
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    assert detect(tmp_path / "weights.pt") == "lightning"
    source = open_foreign(tmp_path / "weights.pt")
    found = {key.name: value for key, value in read_all(source).items()}
    assert source.optimizers == ()
    assert source.aliases == {"head.weight": "embed.weight"}
    assert all(torch.equal(value, found[source.aliases.get(name, name)]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("content", [{}, {"a": torch.ones(2), "b": 3}, [torch.ones(2)], {"state_dict": 3}])
def test_other_content_of_torch_save_is_no_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r'it has no "state_dict" of tensors, and is not a state_dict itself'):
        open_foreign(tmp_path / "x.pt")
