"""Files of torch.save: mapped, and never trusted."""

import pickle
import struct
import zipfile

import pytest
import torch

from lightning_superscale.checkpoint.foreign.torch_files import Inert, load_torch_bytes, load_torch_file
from lightning_superscale.errors import CheckpointError
from tests.helpers.foreign import Payload


def hostile(path, trace, kind):
    payload = {"state_dict": {}, "x": Payload(trace)}
    if kind in ("zip", "legacy"):
        torch.save(payload, path, _use_new_zipfile_serialization=kind == "zip")
    elif kind == "zip-protocol-4":  # names the global by an opcode that torch's unpickler does not know
        torch.save({}, path)
        with zipfile.ZipFile(path) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in records.items():
                archive.writestr(name, pickle.dumps(payload, 4) if name.endswith("data.pkl") else data)
    else:
        path.write_bytes(pickle.dumps(payload, int(kind[-1])))


KINDS = ["zip", "zip-protocol-4", "legacy", "pickle-0", "pickle-2", "pickle-4"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_file_is_named_with_what_it_names_and_runs_nothing(tmp_path, kind):
    path = tmp_path / "x.ckpt"
    hostile(path, tmp_path / "trace", kind)
    with pytest.raises(CheckpointError) as error:
        load_torch_file(path)
    assert "x.ckpt" in str(error.value)
    # A bare pickle is not a file of torch.save, whatever it names.
    assert "posix.mkdir" in str(error.value) or ("damaged" in str(error.value) and kind.startswith("pickle"))
    with pytest.raises(CheckpointError, match="memory"):
        load_torch_bytes(path.read_bytes(), "memory")
    assert not (tmp_path / "trace").exists()


def test_the_payload_is_real(tmp_path):
    hostile(tmp_path / "x", tmp_path / "trace", "zip")
    torch.load(tmp_path / "x", weights_only=False)
    assert (tmp_path / "trace").is_dir()


@pytest.mark.parametrize("is_zip", [True, False])
def test_tensors_of_both_generations_are_read(tmp_path, is_zip):
    state = {"a": torch.arange(6.0).view(2, 3), "b": [torch.tensor(3, dtype=torch.int64), "text", None]}
    torch.save(state, tmp_path / "x", _use_new_zipfile_serialization=is_zip)
    found = load_torch_file(tmp_path / "x")
    assert torch.equal(found["a"], state["a"])
    assert found["b"] == state["b"]


def test_values_stay_on_disk_until_they_are_read(tmp_path):
    torch.save(torch.zeros(1 << 26), tmp_path / "x")  # 256 MiB
    before = resident_bytes()
    found = load_torch_file(tmp_path / "x")
    assert resident_bytes() - before < 32 << 20
    assert found[5] == 0
    assert resident_bytes() - before < 32 << 20


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_truncated_file_is_damaged(tmp_path, keep, is_zip):
    path = tmp_path / "x"
    torch.save({"a": torch.randn(500)}, path, _use_new_zipfile_serialization=is_zip)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CheckpointError, match=r"x is damaged"):
        load_torch_file(path)


@pytest.mark.parametrize(
    "data", [b"PK\x03\x04" + bytes(100), b"\x80\x02}q\x00.", b"hello", struct.pack("<Q", 2) + b"{}"]
)
def test_garbage_is_damaged(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"x is damaged"):
        load_torch_file(tmp_path / "x")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="gone can't be opened: No such file"):
        load_torch_file(tmp_path / "gone")


class Other:
    """A class that a file names."""


def test_a_stand_in_keeps_data_and_the_users_own_list_counts(tmp_path):
    other = Other()
    other.value = 5
    torch.save(other, tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"names \S*Other"):
        load_torch_file(tmp_path / "x")
    found = load_torch_file(tmp_path / "x", [(Inert, f"{Other.__module__}.Other")])
    assert type(found) is Inert
    assert found.value == 5
    with torch.serialization.safe_globals([Other]):
        assert type(load_torch_file(tmp_path / "x")) is Other
    assert Other not in torch.serialization.get_safe_globals()
