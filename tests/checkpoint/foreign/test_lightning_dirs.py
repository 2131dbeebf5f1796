"""Sharded directories of Lightning and torch, written by two ranks, against what the ranks held."""

import io
import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from lightning_superscale.checkpoint.foreign.registry import detect, open_foreign
from lightning_superscale.checkpoint.state import MODEL, TensorKey, optimizer_section
from lightning_superscale.errors import CheckpointError
from tests.helpers.foreign import Payload, read_all, read_in_parts
from tests.helpers.ranks import run_ranks
from tests.helpers.sharded_trainers import fit_and_save

KINDS = ["model-parallel", "fsdp", "app", "plain"]
NAMES = [["two.weight", "one.weight", "one.bias", "two.bias"]]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    run_ranks(2, fit_and_save, str(folder))
    return folder


def expected(written, *, with_optimizer=True):
    tensors = {}
    for label, value in load_file(written / "truth.safetensors").items():
        kind, _, name = label.partition("/")
        if kind == "model" or with_optimizer:
            key = TensorKey(MODEL, name) if kind == "model" else TensorKey(optimizer_section(0), name, kind)
            tensors[key] = value
    return tensors


def equal(found, wanted):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), str(key)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_read_bit_for_bit(written, kind):
    source = open_foreign(written / kind)
    wanted = expected(written, with_optimizer=kind != "plain")
    equal(read_all(source), wanted)
    equal(read_in_parts(source, seed=3), wanted)
    assert source.tensors[TensorKey(MODEL, "one.weight")].trainable == (kind != "plain")
    assert not source.tensors[TensorKey(MODEL, "still.weight")].trainable


@pytest.mark.parametrize("kind", KINDS[:3])
def test_groups_have_their_names_and_options(written, kind):
    (record,) = open_foreign(written / kind).optimizers
    assert record.names == (("two.weight", "one.weight"), ("one.bias", "two.bias"))
    assert [group["weight_decay"] for group in record.groups] == [0.1, 0.0]
    assert [group["initial_lr"] for group in record.groups] == [1e-2, 1e-3]


def test_the_rest_is_lightnings(written):
    source = open_foreign(written / "model-parallel")
    assert source.step == source.rest["global_step"] == 2
    assert {"loops", "callbacks", "lr_schedulers", "epoch"} <= source.rest.keys()
    assert open_foreign(written / "app").rest == {"epoch": 7}
    assert [detect(written / kind) for kind in KINDS] == ["lightning-sharded", "lightning-sharded", "dcp", "dcp"]


def test_a_file_that_numbers_states_in_the_modules_order_is_read_by_names(written):
    """Lightning numbers whole files of sharded strategies so, frozen weights included."""
    packed = torch.load(written / "whole.ckpt", weights_only=True)["optimizer_states"][0]
    assert [group["params"] for group in packed["param_groups"]] != [[0, 1], [2, 3]]
    source = open_foreign(written / "whole.ckpt", names=NAMES)
    equal(read_all(source), expected(written))
    equal(read_all(open_foreign(written / "whole.ckpt")), expected(written, with_optimizer=False))


def test_one_chunk_is_read_once_for_many_requests(written, monkeypatch):
    from lightning_superscale.checkpoint.foreign import dcp as module

    source, places = open_foreign(written / "fsdp"), []
    original = module.load_torch_bytes
    monkeypatch.setattr(module, "load_torch_bytes", lambda data, where: places.append(where) or original(data, where))
    read_in_parts(source, seed=4)
    assert len(places) == len(set(places)) > 10


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_a_module_saves_beside_tensors_is_in_the_rest(tmp_path):
    extra = {"a": 1, "b": torch.arange(3)}
    dcp.save({"model": {"w": torch.ones(2), "x._extra_state": extra}}, checkpoint_id=tmp_path / "x", no_dist=True)
    source = open_foreign(tmp_path / "x")
    assert [str(key) for key in source.tensors] == ["model: w"]
    found = source.rest["extra_state"]["x._extra_state"]
    assert found["a"] == 1
    assert torch.equal(found["b"], extra["b"])


# What is refused


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written / "fsdp", tmp_path / "copy")


def test_a_missing_file_is_named(copy):
    (copy / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"lacks \['__1_0.distcp'\]"):
        open_foreign(copy)


def test_a_truncated_file_is_named_with_the_tensor(copy):
    file = copy / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match=r"__1_0.distcp .*truncated"):
        read_all(open_foreign(copy))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_hostile_metadata_runs_nothing(copy, tmp_path, protocol):
    (copy / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "trace"), protocol))
    with pytest.raises(CheckpointError, match=r"\.metadata names (posix|os)\.mkdir"):
        open_foreign(copy)
    assert not (tmp_path / "trace").exists()


def test_metadata_can_not_change_torchs_classes(copy):
    """BUILD on a class would set attributes of the real one, were it not a stand-in."""
    stream = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n(N}X\x05\x00\x00\x00stainK\x01stb."
    (copy / ".metadata").write_bytes(stream)
    with pytest.raises(CheckpointError, match="damaged"):
        open_foreign(copy)
    assert not hasattr(dcp.Metadata, "stain")


@pytest.mark.parametrize("name", ["../fsdp/__0_0.distcp", "/etc/hostname"])
def test_metadata_can_not_lead_elsewhere(copy, name):
    metadata = dcp.FileSystemReader(copy).read_metadata()
    for info in metadata.storage_data.values():
        info.relative_path = name
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="only files beside it"):
        open_foreign(copy)


@pytest.mark.parametrize("victim", ["meta.pt", "__0_0.distcp"])
def test_other_hostile_files_run_nothing(copy, tmp_path, victim):
    buffer = io.BytesIO()
    torch.save(Payload(tmp_path / "trace"), buffer)
    if victim == "__0_0.distcp":
        metadata = dcp.FileSystemReader(copy).read_metadata()
        info = next(info for index, info in metadata.storage_data.items() if index.fqn == "model.counter")
        data = (copy / info.relative_path).read_bytes()
        (copy / info.relative_path).write_bytes(data + buffer.getvalue())
        info.offset, info.length = len(data), len(buffer.getvalue())
        victim = info.relative_path
        (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    else:
        (copy / victim).write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match=f"{victim}.* names posix.mkdir"):
        read_all(open_foreign(copy))
    assert not (tmp_path / "trace").exists()


def test_garbage_metadata_is_named(copy):
    (copy / ".metadata").write_bytes(b"\x80\x02garbage")
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged"):
        open_foreign(copy)


def test_a_chunk_that_metadata_forgot_is_refused(copy):
    metadata = dcp.FileSystemReader(copy).read_metadata()
    metadata.state_dict_metadata["model.one.weight"].chunks.pop()
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"one.weight.*hold .* of the"):
        open_foreign(copy)
