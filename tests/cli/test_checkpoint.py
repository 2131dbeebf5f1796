"""`superscale checkpoint ...` over our format, DeepSpeed's, Lightning's and Hugging Face's."""

from __future__ import annotations

import json
import os
import signal
import warnings
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from lightning_superscale.checkpoint.foreign.chunks import ForeignSource
from lightning_superscale.checkpoint.foreign.lightning import OPTIMIZER_NAMES
from lightning_superscale.checkpoint.foreign.registry import open_foreign
from lightning_superscale.checkpoint.foreign.torch_optimizer import parameter_names
from lightning_superscale.checkpoint.format.manifest import MAJOR, MINOR
from lightning_superscale.checkpoint.load.reader import SavedState, open_checkpoint
from lightning_superscale.checkpoint.save.writer import save
from lightning_superscale.checkpoint.state import MODEL, LocalState, TensorInfo, TensorKey
from lightning_superscale.checkpoint.tools.chunks import SLAB_BYTES, slabs
from lightning_superscale.checkpoint.tools.verify import verify
from lightning_superscale.cli import main
from lightning_superscale.comm.mesh import single_mesh
from lightning_superscale.errors import CheckpointError
from tests.helpers.checkpoints import bits, local_state, state_tensors
from tests.helpers.foreign import Payload, read_all, truth, unpack
from tests.helpers.slow_command import started_slowly
from tests.helpers.trainers import Regressor, fit

ROOT = Path(__file__).resolve().parents[2]
DATA = "data/w00000-0.safetensors"
DEEPSPEED = ["zero1", "zero2-cpu-adam", "zero2-elastic", "zero3", "zero3-fp32", "zero1/universal", "zero3/universal"]
MOMENT = TensorKey("optimizer.0", "conv.weight", "exp_avg")


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs `superscale checkpoint` in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def run_one(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main(["checkpoint", *map(str, arguments)])
        except SystemExit as left:
            code = left.code
        return code, *capsys.readouterr()

    return run_one


@pytest.fixture
def tensors() -> dict[TensorKey, torch.Tensor]:
    return state_tensors(3)


def write(path: Path, tensors: dict[TensorKey, torch.Tensor], **changed) -> Path:
    save(str(path), replace(local_state(tensors), **changed), single_mesh(), step=5)
    return path


@pytest.fixture
def ours(tmp_path, tensors) -> Path:
    return write(tmp_path / "ours.ckpt", tensors)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[Path, Path]:
    """What a plain Trainer saved, and the names that its optimizer's states lack."""
    module, folder = Regressor(), tmp_path_factory.mktemp("plain")
    trainer = fit(module, max_epochs=1)
    trainer.save_checkpoint(folder / "plain.ckpt")
    (folder / "names.json").write_text(json.dumps(parameter_names(module, trainer.optimizers)))
    return folder / "plain.ckpt", folder / "names.json"


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


def assert_same(found: dict[TensorKey, torch.Tensor], expected: dict[TensorKey, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, str(key)
        assert torch.equal(bits(found[key]), bits(value)), str(key)


# inspect


def test_inspect_tells_what_a_checkpoint_holds(run, ours):
    code, out, err = run("inspect", ours)
    assert (code, err) == (0, "")
    for text in (
        f"format lucp/{MAJOR}.{MINOR}",
        "optimizer steps: 5",
        "written by 1 rank",
        f"torch {version('torch')}",
    ):
        assert text in out
    (masters,) = [line for line in out.splitlines() if "masters" in line]
    numel = 37 * 16 + 24 * 10 + 5 * 3 * 2 * 7
    assert [cell.strip() for cell in masters.split("│")[1:-1]] == [
        "masters", "float32", "3", f"{numel:,}", f"{numel * 4 / 1024:.1f} KiB",
    ]  # fmt: skip
    assert "group 1: 2 parameters; betas (0.8, 0.9), lr <tensor>" in out
    assert "tied: head.weight is embed.weight" in out
    assert "beside them: best, epoch, loops" in out
    assert DATA in out
    assert "block.0.bias" not in out


def test_inspect_lists_tensors_and_gives_json(run, ours, tensors):
    _, out, _ = run("inspect", ours, "--tensors")
    for key, tensor in tensors.items():
        (line,) = [line for line in out.splitlines() if f"│ {key} " in line]
        assert str(tensor.dtype).removeprefix("torch.") in line
        assert str(tuple(tensor.shape)) in line
    code, out, _ = run("inspect", ours, "--json")
    found = json.loads(out)
    assert code == 0
    listed = {TensorKey(t["section"], t["name"], t["state"] or ""): t for t in found["tensors"]}
    assert {key for key in listed if key.section != "extra"} == tensors.keys()
    assert all(listed[key]["shape"] == list(tensor.shape) for key, tensor in tensors.items())
    assert found["classes"]["optimizer states"]["tensors"] == 3
    assert found["optimizers"][0]["groups"][1]["names"] == ["block.0.weight", "conv.weight"]
    assert found["files"][DATA] == (ours / DATA).stat().st_size
    assert found["world"] == 1


def test_inspect_reads_no_values(run, ours, monkeypatch):
    def refuse(self, *arguments):
        raise AssertionError("a value was read")

    monkeypatch.setattr(SavedState, "_read_verified", refuse)
    assert run("inspect", ours, "--tensors")[0] == 0


def test_inspect_runs_nothing_of_a_file(run, tmp_path):
    torch.save({"state_dict": {"w": torch.ones(2)}, "x": Payload(tmp_path / "ran")}, tmp_path / "evil.ckpt")
    code, out, err = run("inspect", tmp_path / "evil.ckpt")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "unpickling it could run code" in err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("case", DEEPSPEED)
def test_inspect_knows_deepspeed(run, tmp_path, case):
    name, _, kind = case.partition("/")
    folder = unpack(name, tmp_path)
    code, out, _ = run("inspect", folder / kind, "--json")
    found, held = json.loads(out), truth(folder)
    assert code == 0
    assert found["format"] == ("deepspeed-universal" if kind else "deepspeed")
    assert found["classes"]["weights"]["numel"] == sum(v.numel() for k, v in held.items() if k.startswith("model/"))
    assert found["classes"]["buffers"]["tensors"] == 2
    assert found["step"] == 3
    assert found["libraries"]["deepspeed"] == "0.19.8"


# verify


def test_verify_shows_its_progress_and_finds_nothing_in_a_whole_checkpoint(run, ours):
    code, out, err = run("verify", ours)
    assert code == 0
    assert "is whole" in out
    assert "verifying" in err
    size = sum(file.stat().st_size for file in ours.rglob("*") if file.is_file() and file.name != "MANIFEST.json")
    assert f"{size / 1024:.1f}/{size / 1024:.1f} KiB" in err


@pytest.mark.parametrize(
    ("file", "at", "found"),
    [
        (
            DATA,
            5000,
            f"{DATA}, block 0: is damaged (holds extra: optimizers[0]/groups[1]/lr, extra: rest/best, model: ",
        ),
        ("blocks/w00000-0.xxh", 3, "blocks/w00000-0.xxh: does not have its checksum"),
        ("rest.json", 3, "rest.json: does not have its checksum"),
        ("MANIFEST.json", 40, "MANIFEST.json is damaged"),
    ],
)
def test_verify_finds_a_flipped_bit(run, ours, file, at, found):
    flip(ours / file, at)
    code, out, err = run("verify", ours)
    assert code == 1
    assert found in out
    assert "is damaged: 1 findings" in err.splitlines()[-1]


def test_verify_finds_what_is_missing_and_what_is_too_many(run, ours):
    (ours / "rest.json").unlink()
    (ours / "stray").write_text("")
    code, out, _ = run("verify", ours)
    assert code == 1
    assert out.splitlines() == ["stray: is not listed in the manifest", "rest.json: is missing"]


def test_verify_names_each_tensor_that_cannot_be_read(run, tmp_path, monkeypatch):
    torch.save({"state_dict": {"u": torch.ones(2), "v": torch.ones(2), "w": torch.ones(2)}}, tmp_path / "x.ckpt")
    read = ForeignSource.read

    def broken(self, requests):
        if any(request.key.name in "uw" for request in requests):
            raise CheckpointError("its file is gone.")
        read(self, requests)

    monkeypatch.setattr(ForeignSource, "read", broken)
    code, out, err = run("verify", tmp_path / "x.ckpt")
    assert code == 1
    assert out.splitlines() == [f"{tmp_path}/x.ckpt: its file is gone. (holds model: {name})" for name in "uw"]
    assert "is damaged: 2 findings" in err


def test_a_folder_of_torch_distributed_checkpoint_is_read_by_all(run, tmp_path):
    weights = {"w": torch.randn(7, 3), "b": torch.randn(7).bfloat16()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": weights}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    code, out, _ = run("inspect", tmp_path / "dcp", "--json")
    found = json.loads(out)
    assert (code, found["format"], found["rest"]) == (0, "dcp", None)
    assert found["classes"]["weights"]["numel"] == 28
    assert run("verify", tmp_path / "dcp")[0] == 0
    assert run("convert", tmp_path / "dcp", tmp_path / "ours.ckpt")[0] == 0
    expected = {TensorKey(MODEL, name): value for name, value in weights.items()}
    assert_same(read_all(open_checkpoint(str(tmp_path / "ours.ckpt"))), expected)
    assert run("diff", tmp_path / "dcp", tmp_path / "ours.ckpt")[0] == 0


def test_verify_reads_formats_without_checksums_once(run, tmp_path):
    torch.save({"state_dict": {"w": torch.ones(3, 4), "v": torch.ones(2)}}, tmp_path / "x.ckpt")
    code, out, err = run("verify", tmp_path / "x.ckpt")
    assert code == 0
    assert "all of its 2 tensors" in out
    assert "has no checksums" in out
    assert "56/56 bytes" in err
    (tmp_path / "x.ckpt").write_bytes((tmp_path / "x.ckpt").read_bytes()[:-200])
    code, _, err = run("verify", tmp_path / "x.ckpt")
    assert code == 1
    assert "is damaged" in err


# diff


def test_diff_of_equal_states_is_empty(run, ours, tmp_path, tensors):
    tensors[TensorKey(MODEL, "one")][0, 0, 1] = float("nan")
    one, two = write(tmp_path / "1.ckpt", tensors), write(tmp_path / "2.ckpt", tensors)
    code, out, err = run("diff", one, two)
    assert (code, out) == (0, "A and B are equal: 19 tensors\n")
    assert "comparing" in err
    code, out, _ = run("diff", one, ours)
    assert code == 1
    assert out == "model: one: 1 of 5 elements, by at most nan\nA and B differ in 1\n"


def test_diff_finds_one_changed_element_and_its_size(run, ours, tmp_path, tensors):
    changed = {**tensors, MOMENT: tensors[MOMENT].clone()}
    changed[MOMENT][2, 1, 0, 3] += 0.25
    gap = float((changed[MOMENT].double() - tensors[MOMENT].double()).abs().max())
    other = write(tmp_path / "other.ckpt", changed)
    code, out, _ = run("diff", ours, other)
    assert code == 1
    assert out.splitlines()[0] == f"{MOMENT}: 1 of 210 elements, by at most {gap:.6g}"
    assert run("diff", ours, other, "--atol", "0.3")[0] == 0
    assert run("diff", ours, other, "--atol", "0.2")[0] == 1


def test_diff_looks_at_every_box_of_a_tensor(run, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_superscale.checkpoint.tools.diff._BATCH_BYTES", 64)
    key = TensorKey(MODEL, "w")
    one, two = torch.arange(300).view(3, 100), torch.arange(300).view(3, 100)
    two[0, 1] += 2**53
    two[2, 99] += 1
    for name, tensor in (("a", one), ("b", two), ("c", one + (two[0, 1] - 1))):
        save(str(tmp_path / name), _one(key, tensor), single_mesh())
    code, out, _ = run("diff", tmp_path / "a", tmp_path / "b")
    assert code == 1
    assert out.splitlines()[0] == f"model: w: 2 of 300 elements, by at most {float(2**53):.6g}"
    last = torch.arange(300).view(3, 100) + (two[0, 1] - 1)
    last[1, 0] += 1  # beyond what double precision tells apart
    save(str(tmp_path / "d"), _one(key, last), single_mesh())
    assert run("diff", tmp_path / "c", tmp_path / "d")[1].splitlines()[0].startswith("model: w: 1 of 300 elements")


def _one(key: TensorKey, tensor: torch.Tensor) -> LocalState:
    whole = local_state({key: tensor}, rest={})
    return LocalState({key: TensorInfo(tensor.dtype, tuple(tensor.shape), "model")}, whole.shards)


def test_diff_names_what_only_one_side_has_and_other_shapes_groups_and_values(run, ours, tmp_path, tensors):
    other = dict(tensors)
    del other[TensorKey(MODEL, "mask")]
    other[TensorKey(MODEL, "new")] = torch.ones(1)
    other[TensorKey(MODEL, "codes")] = torch.zeros(19)
    record = local_state(tensors).optimizers[0]
    record = replace(
        record, groups=({**record.groups[0], "lr": 0.5}, record.groups[1]), values={"embed.weight": {"count": 4}}
    )
    write(tmp_path / "b.ckpt", other, optimizers=(record,))
    code, out, _ = run("diff", ours, tmp_path / "b.ckpt")
    assert code == 1
    assert sorted(out.splitlines()[:-1]) == [
        "model: codes: int8 (19,) and float32 (19,)",
        "model: mask: only in A",
        "model: new: only in B",
        "optimizer.0: embed.weight [count]: 3 and 4",
        f"optimizer.0: group 0 [lr]: {0.1 + 0.2} and 0.5",
    ]
    code, out, _ = run("diff", ours, tmp_path / "b.ckpt", "--drop-optimizer")
    assert "A and B differ in 3" in out


def test_diff_that_cannot_tell_has_an_exit_code_of_its_own(run, ours, tmp_path):
    assert run("diff", ours, tmp_path / "none")[0] == 2
    flip(ours / DATA, 5000)
    code, _, err = run("diff", ours, ours)
    assert code == 2
    assert "is damaged in block 0" in err


# convert, consolidate, export


@pytest.mark.parametrize("case", DEEPSPEED)
def test_convert_keeps_every_bit_of_deepspeed(run, tmp_path, case):
    name, _, kind = case.partition("/")
    folder = unpack(name, tmp_path)
    code, out, err = run("convert", folder / kind, tmp_path / "out.ckpt")
    assert code == 0
    assert "holds what" in out
    assert "converting" in err
    assert verify(str(tmp_path / "out.ckpt")) == []
    source, written = open_foreign(folder / kind), open_checkpoint(str(tmp_path / "out.ckpt"))
    assert_same(read_all(written), read_all(source))
    assert written.tensors == source.tensors
    assert written.optimizers == source.optimizers
    assert (written.step, written.aliases, written.rest) == (3, source.aliases, source.rest)
    assert run("diff", folder / kind, tmp_path / "out.ckpt")[0] == 0


def test_convert_holds_no_more_than_a_slab(run, tmp_path, monkeypatch):
    tensor = torch.arange(5 * 999, dtype=torch.int64).view(5, 999)
    save(str(tmp_path / "a"), _one(TensorKey(MODEL, "w"), tensor), single_mesh())
    assert max(box.numel for box in slabs((5, 2**27), 1)) == SLAB_BYTES  # unless told otherwise
    monkeypatch.setattr("lightning_superscale.checkpoint.tools.convert.slabs", partial(slabs, limit_bytes=4096))
    sizes, read = [], SavedState.read

    def watched(self, requests):
        sizes.append(sum(request.out.nbytes for request in requests))
        read(self, requests)

    monkeypatch.setattr(SavedState, "read", watched)
    assert run("convert", tmp_path / "a", tmp_path / "b")[0] == 0
    assert sum(sizes) == tensor.nbytes
    assert max(sizes) <= 4096
    monkeypatch.undo()
    assert torch.equal(read_all(open_checkpoint(str(tmp_path / "b")))[TensorKey(MODEL, "w")], tensor)


def test_convert_replaces_a_checkpoint_only_when_asked_and_nothing_else_ever(run, ours, tmp_path, tensors):
    other = write(tmp_path / "other.ckpt", {**tensors, TensorKey(MODEL, "one"): torch.zeros(1, 1, 5)})
    code, _, err = run("convert", other, ours)
    assert code == 2
    assert "exists already" in err
    assert_same(read_all(open_checkpoint(str(ours))), tensors)
    assert run("convert", other, ours, "--overwrite")[0] == 0
    assert run("diff", other, ours)[0] == 0
    assert run("convert", ours, ours, "--overwrite")[0] == 0  # onto itself
    assert run("diff", other, ours)[0] == 0
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis").write_text("years of work")
    code, _, err = run("convert", other, tmp_path / "home", "--overwrite")
    assert code == 2
    assert "so it is not replaced: only checkpoints are" in err
    assert (tmp_path / "home" / "thesis").read_text() == "years of work"


def test_convert_to_a_url_deletes_no_other_objects(run, ours):
    store = fsspec.filesystem("memory")
    store.pipe_file("/bucket/dataset.csv", b"1,2")
    for arguments in ([], ["--overwrite"]):
        code, _, err = run("convert", ours, "memory://bucket", *arguments)
        assert code == 2
        assert ("so it is not replaced" if arguments else "exists already") in err
        assert store.find("/") == ["/bucket/dataset.csv"]
    assert run("convert", ours, "memory://bucket/a.ckpt")[0] == 0
    assert run("convert", ours, "memory://bucket/a.ckpt")[0] == 2
    assert run("convert", ours, "memory://bucket/a.ckpt", "--overwrite")[0] == 0
    assert run("verify", "memory://bucket/a.ckpt")[0] == 0
    assert store.cat_file("/bucket/dataset.csv") == b"1,2"
    store.store.clear()


@pytest.mark.parametrize("name", ["project", "notes.txt", "."])
def test_convert_overwrites_no_project_and_no_file(run, ours, tmp_path, monkeypatch, name):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "train.py").write_text("print(1)")
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    for arguments in ([], ["--overwrite"]):
        assert run("convert", ours, name, *arguments)[0] == 2
    assert (tmp_path / "project" / "train.py").read_text() == "print(1)"
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "ours.ckpt", "project"]


def test_damage_in_the_source_is_never_converted(run, ours, tmp_path):
    flip(ours / DATA, 5000)
    for command in (["convert"], ["consolidate"], ["export", "--to", "hf"]):
        code, _, err = run(*command, ours, tmp_path / "out")
        assert code == 1
        assert "is damaged in block 0" in err.splitlines()[-1]
        assert os.listdir(tmp_path) == ["ours.ckpt"]


def test_lightning_and_back_is_equal(run, ours, tmp_path, tensors):
    assert run("consolidate", ours, tmp_path / "one.ckpt")[0] == 0
    assert run("convert", tmp_path / "one.ckpt", tmp_path / "back.ckpt")[0] == 0
    code, out, _ = run("diff", ours, tmp_path / "back.ckpt")
    assert (code, out) == (0, "A and B are equal: 19 tensors\n")
    back = open_checkpoint(str(tmp_path / "back.ckpt"))
    assert_same(read_all(back), tensors)
    assert {key: value for key, value in back.rest.items() if key in ("epoch", "loops")} == {
        "epoch": 3,
        "loops": {"a": (1, 2)},
    }
    assert OPTIMIZER_NAMES not in back.rest


def test_what_modules_save_beside_tensors_reaches_lightning(run, tmp_path):
    torch.save({"state_dict": {"w": torch.ones(2), "_extra_state": {"a": 1}}}, tmp_path / "x.ckpt")
    assert run("convert", tmp_path / "x.ckpt", tmp_path / "y.ckpt")[0] == 0
    assert run("consolidate", tmp_path / "y.ckpt", tmp_path / "z.ckpt")[0] == 0
    assert torch.load(tmp_path / "z.ckpt")["state_dict"]["_extra_state"] == {"a": 1}


def test_weights_only_has_no_trace_of_optimizers(run, plain, tmp_path):
    assert run("consolidate", plain[0], tmp_path / "w.ckpt", "--weights-only")[0] == 0
    found = torch.load(tmp_path / "w.ckpt", weights_only=True)
    saved = torch.load(plain[0], weights_only=True)
    assert not {"optimizer_states", "lr_schedulers", "callbacks", OPTIMIZER_NAMES} & found.keys()
    assert found["state_dict"].keys() == saved["state_dict"].keys()
    assert all(torch.equal(found["state_dict"][name], value) for name, value in saved["state_dict"].items())
    assert found["loops"] == saved["loops"]


def test_a_consolidated_run_goes_on_in_a_plain_trainer(run, plain, tmp_path):
    """To the bit, through our format and back: from the plain file and from what was made of it."""
    path, names = plain
    assert run("convert", path, tmp_path / "ours.ckpt", "--names", names)[0] == 0
    assert run("consolidate", tmp_path / "ours.ckpt", tmp_path / "back.ckpt")[0] == 0
    ends = []
    for start in (path, tmp_path / "back.ckpt"):
        module = Regressor()
        _resume(module, start)
        ends.append(module.state_dict())
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())
    first = torch.load(path, weights_only=True)["state_dict"]
    assert not torch.equal(ends[0]["net.0.weight"], first["net.0.weight"])


def _resume(module: Regressor, path: Path) -> None:
    from tests.helpers.trainers import loader, trainer

    trainer(max_epochs=2).fit(module, loader(), ckpt_path=path)


@pytest.mark.parametrize("dialect", ["12", "3"])
def test_export_writes_deepspeed_universal(run, tmp_path, dialect):
    folder = unpack("zero2", tmp_path)
    assert run("convert", folder, tmp_path / "a.ckpt")[0] == 0
    assert run("export", tmp_path / "a.ckpt", tmp_path / "out", "--to", f"deepspeed-universal-{dialect}")[0] == 0
    code, out, _ = run("diff", folder, tmp_path / "out")
    assert (code, out) == (0, "A and B are equal: 29 tensors\n")
    sharded = list((tmp_path / "out" / "universal").glob("zero_pp_rank_0_*"))
    assert bool(sharded) == (dialect == "3")


def test_export_writes_hugging_face_weights(run, plain, tmp_path):
    arguments = ("--to", "hf", "--strip-prefix", "net.")
    assert run("export", plain[0], tmp_path / "out", *arguments)[0] == 0  # numbered optimizer states don't matter
    found = load_file(tmp_path / "out" / "model.safetensors")
    saved = torch.load(plain[0], weights_only=True)["state_dict"]
    assert found.keys() == {name.removeprefix("net.") for name in saved}
    assert all(torch.equal(found[name.removeprefix("net.")], value) for name, value in saved.items())
    code, _, err = run("export", plain[0], tmp_path / "out", *arguments)
    assert code == 2
    assert "exists already" in err


# Numbered states


def test_numbered_states_need_names_and_say_so_in_a_line(run, plain, tmp_path):
    path, names = plain
    for command in (["convert"], ["consolidate"], ["export", "--to", "deepspeed-universal-12"]):
        code, out, err = run(*command, path, tmp_path / "out")
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        for text in ("numbers the states", "--names FILE", "parameter_names(module, optimizers)", "--drop-optimizer"):
            assert text in err
    assert os.listdir(tmp_path) == []
    code, out, _ = run("inspect", path)
    assert code == 0
    assert "numbers the states of optimizer 0 from 0 to" in out
    assert run("convert", path, tmp_path / "all.ckpt", "--names", names)[0] == 0
    assert run("convert", path, tmp_path / "weights.ckpt", "--drop-optimizer")[0] == 0
    expected = read_all(open_foreign(path, json.loads(names.read_text())))
    assert any(key.section == "optimizer.0" for key in expected)
    assert_same(read_all(open_checkpoint(str(tmp_path / "all.ckpt"))), expected)
    weights = open_checkpoint(str(tmp_path / "weights.ckpt"))
    assert_same(read_all(weights), {key: value for key, value in expected.items() if key.section == MODEL})
    assert weights.optimizers == ()
    assert "lr_schedulers" not in weights.rest
    assert "loops" in weights.rest
    assert run("diff", path, tmp_path / "all.ckpt", "--names", names)[0] == 0


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        ("{", 2, "can't be read"),
        ('{"a": 1}', 2, "should hold a list of names for each optimizer"),
        ('["a", "b"]', 1, "2 names were given"),
        ("[]", 1, "names were given for 0"),
    ],
)
def test_names_that_do_not_fit_are_refused(run, plain, tmp_path, content, code, message):
    (tmp_path / "names.json").write_text(content)
    found, _, err = run("convert", plain[0], tmp_path / "out", "--names", tmp_path / "names.json")
    assert found == code
    assert message in err


# Wrong use and interrupts


@pytest.mark.parametrize(
    "arguments",
    [[], ["inspect"], ["inspect", "none"], ["export", "a", "b"], ["export", "a", "b", "--to", "tf"], ["diff", "a"]],
)
def test_wrong_use_has_exit_code_2(run, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err


def test_what_is_no_checkpoint_has_exit_code_1(run, tmp_path):
    (tmp_path / "x").write_text("nothing")
    for command in ("inspect", "verify"):
        code, _, err = run(command, tmp_path / "x")
        assert code == 1
        assert err.count("\n") == 1


@pytest.mark.parametrize("command", [["consolidate"], ["export", "--to", "hf"]])
def test_an_interrupted_export_leaves_nothing(run, ours, tmp_path, monkeypatch, command):
    def interrupt(self, requests):
        raise KeyboardInterrupt

    monkeypatch.setattr(SavedState, "read", interrupt)
    code, _, err = run(*command, ours, tmp_path / "out")
    assert code == 130
    assert err.splitlines()[-1].endswith(f"interrupted; nothing half-written is left at {tmp_path}/out")
    assert os.listdir(tmp_path) == ["ours.ckpt"]


def test_ctrl_c_leaves_what_was_there(ours, tmp_path, tensors):
    old = write(tmp_path / "old.ckpt", {TensorKey(MODEL, "one"): torch.ones(3)}, optimizers=(), aliases={}, rest={})
    process = started_slowly("checkpoint", "convert", str(ours), str(old), "--overwrite")
    try:
        for _ in range(2):  # of at least 18 reads
            assert process.stdout.readline() == "reading\n"
        assert any(name.startswith(".ucp-staging") for name in os.listdir(tmp_path))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert out.count("reading") <= 2
    assert err.splitlines()[-1].endswith(f"interrupted; nothing half-written is left at {old}")
    assert sorted(os.listdir(tmp_path)) == ["old.ckpt", "ours.ckpt"]
    assert verify(str(old)) == []
    assert torch.equal(read_all(open_checkpoint(str(old)))[TensorKey(MODEL, "one")], torch.ones(3))
