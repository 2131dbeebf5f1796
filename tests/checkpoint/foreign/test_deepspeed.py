"""DeepSpeed's own checkpoints, native and universal, against what DeepSpeed held when it wrote them."""

import shutil

import pytest
import torch

from lightning_superscale.checkpoint.foreign.deepspeed_files import load_deepspeed_file
from lightning_superscale.checkpoint.foreign.registry import detect, open_foreign
from lightning_superscale.checkpoint.foreign.torch_files import Inert
from lightning_superscale.checkpoint.state import MASTER, MODEL, ReadRequest, TensorKey, optimizer_section
from lightning_superscale.errors import CheckpointError
from lightning_superscale.layout.box import whole_box
from tests.helpers.foreign import Payload, read_all, read_in_parts, truth, unpack

NATIVE = ["zero1", "zero1-accumulate", "zero2", "zero2-cpu-adam", "zero2-elastic", "zero3", "zero3-fp32"]
UNIVERSAL = [f"{name}/universal" for name in ("zero1", "zero1-accumulate", "zero2", "zero2-cpu-adam", "zero3")]
FROZEN = ("frozen.weight", "frozen.bias")
OPTIM = optimizer_section(0)


@pytest.fixture
def checkpoint(tmp_path, request):
    """Where a case's checkpoint is, and what was held."""
    case, _, kind = request.param.partition("/")
    folder = unpack(case, tmp_path)
    return folder / kind, truth(folder)


every = pytest.mark.parametrize("checkpoint", NATIVE + UNIVERSAL, indirect=True)


def expected(held, source):
    """The truth as keys of a source."""
    tensors = {}
    for label, value in held.items():
        kind, _, name = label.partition("/")
        if kind in ("model", "buffer"):
            tensors[TensorKey(MODEL, name)] = value
        elif kind in ("exp_avg", "exp_avg_sq"):
            tensors[TensorKey(OPTIM, name, kind)] = value
            tensors[TensorKey(OPTIM, name, "step")] = held["step"]
        elif kind == "master" and held[f"model/{name}"].dtype != torch.float32:
            tensors[TensorKey(OPTIM, name, MASTER)] = value
    return tensors


@every
def test_everything_is_read_bit_for_bit(checkpoint):
    path, held = checkpoint
    source = open_foreign(path)
    for found in (read_all(source), read_in_parts(source, seed=1), read_in_parts(source, seed=2)):
        wanted = expected(held, source)
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert found[key].dtype == value.dtype, str(key)
            assert torch.equal(found[key], value), str(key)
            assert not found[key].requires_grad  # DeepSpeed's masters do


@every
def test_the_fixtures_have_what_deepspeed_loses(checkpoint):
    _, held = checkpoint
    assert held["buffer/counter"] == 3
    assert held["buffer/running"].abs().sum() > 0
    assert all(held[f"model/{name}"].abs().sum() > 0 for name in FROZEN)
    assert held["group/0/lr"] != held["group/1/lr"]
    assert all(value.abs().sum() > 0 for label, value in held.items() if label.startswith("exp_avg"))


@every
def test_roles_names_and_ties(checkpoint):
    path, held = checkpoint
    source = open_foreign(path)
    (record,) = source.optimizers
    assert record.names == (("embed.weight", "inner.weight"), ("inner.bias", "norm.weight", "norm.bias"))
    for key, info in source.tensors.items():
        if key.section == MODEL:
            assert (info.role == "buffer") == (f"buffer/{key.name}" in held)
            assert info.trainable == any(key.name in names for names in record.names)
        assert (info.role == "scalar") == (key.state == "step")
    assert source.aliases == {"head.weight": "embed.weight"}
    assert source.step == held["step"] == 3


@every
def test_each_group_keeps_its_options(checkpoint, request):
    path, held = checkpoint
    (record,) = open_foreign(path).optimizers
    if "elastic" in str(path):
        assert record.groups == ({}, {})  # the file does not have them
        return
    for index, group in enumerate(record.groups):
        assert group["lr"] == held[f"group/{index}/lr"].item()
        assert group["weight_decay"] == held[f"group/{index}/weight_decay"].item()
        assert "params" not in group
        assert "step" not in group


def test_stage_3_has_several_parts_per_group(tmp_path):
    from lightning_superscale.checkpoint.foreign.deepspeed_files import read_model_files

    assert len(read_model_files(unpack("zero3", tmp_path) / "checkpoint").shapes) > 2


def test_stages_are_the_same_state(tmp_path):
    """DeepSpeed can't load stage 3's as stage 1, nor stage 1's as stage 3."""
    one, three = (open_foreign(unpack(case, tmp_path)) for case in ("zero1", "zero3"))
    assert one.tensors == three.tensors
    assert one.optimizers[0].names == three.optimizers[0].names
    assert one.optimizers[0].groups == three.optimizers[0].groups


@pytest.mark.parametrize("checkpoint", ["zero2", "zero2/universal", "zero3", "zero3/universal"], indirect=True)
def test_lightnings_own_state_is_the_rest(checkpoint):
    rest = open_foreign(checkpoint[0]).rest
    assert rest["lr_schedulers"] == [{"last_epoch": 3, "_last_lr": [1e-2, 3e-3]}]
    assert (rest["epoch"], rest["global_step"], rest["hyper_parameters"]) == (1, 3, {"width": 5})
    assert rest["deepspeed"]["global_samples"] == 12
    assert "module" not in rest


def test_the_class_is_told_where_the_files_say_it(tmp_path):
    assert open_foreign(unpack("zero2-cpu-adam", tmp_path)).optimizers[0].class_name == "AdamW"
    assert open_foreign(unpack("zero2", tmp_path)).optimizers[0].class_name == ""


def test_detect_takes_a_directory_its_tag_or_the_universal_one(tmp_path):
    case = unpack("zero3", tmp_path)
    assert detect(case) == detect(case / "checkpoint") == "deepspeed"
    assert detect(case / "universal") == "deepspeed-universal"
    (case / "latest").unlink()
    assert detect(case) == "deepspeed-universal"


def test_weights_that_lightning_wrapped_have_their_names(tmp_path):
    case = unpack("zero2", tmp_path)
    file = case / "checkpoint" / "mp_rank_00_model_states.pt"
    state = torch.load(file, weights_only=True)
    state["module"] = {f"_forward_module.{name}": value for name, value in state["module"].items()}
    torch.save(state, file)
    assert open_foreign(case).tensors == open_foreign(unpack("zero2", tmp_path / "again")).tensors


def test_a_weight_that_stage_3_did_not_save_is_its_rounded_master(tmp_path):
    source, held = open_foreign(unpack("zero3", tmp_path)), truth(tmp_path / "zero3")
    wide = torch.zeros(7, 5)
    source.read([ReadRequest(TensorKey(MODEL, "inner.weight"), whole_box((7, 5)), wide)])
    assert torch.equal(wide, held["model/inner.weight"].float())
    assert not torch.equal(wide, held["master/inner.weight"])


@pytest.mark.parametrize("case", ["zero1", "zero1/universal", "zero3", "zero3/universal"])
def test_the_step_that_deepspeeds_fused_adam_counts_in_groups_is_read(tmp_path, case):
    """It runs on GPUs only: a checkpoint of its kind is made of one of another."""
    case, _, kind = case.partition("/")
    folder = unpack(case, tmp_path)
    for file in [*folder.rglob("*optim_states.pt"), folder / "universal" / "zero" / "optimizer_state.pt"]:
        state = load_deepspeed_file(file)
        own = state.get("optimizer_state_dict", state)
        for inner in (own, own.get("base_optimizer_state", {}), own.get("optimizer_state_dict", {})):
            for group in inner.get("param_groups", []):
                group["step"] = 41
            for values in inner.get("state", {}).values():
                values.pop("step", None)
        file.unlink()  # what is read of it is mapped
        torch.save(state, file)
    for file in folder.rglob("step.pt"):
        file.unlink()
    with torch.serialization.safe_globals([Inert]):
        source = open_foreign(folder / kind)
    steps = [value for key, value in read_all(source).items() if key.state == "step"]
    assert len(steps) == 5
    assert all(step == 41 and step.dtype == torch.float32 for step in steps)
    assert not any("step" in group for group in source.optimizers[0].groups)


def test_what_a_module_saves_beside_tensors_is_in_the_rest(tmp_path):
    folder = unpack("zero2", tmp_path)
    edited(
        folder, "checkpoint/mp_rank_00_model_states.pt", lambda s: s["module"].update({"norm._extra_state": {"a": 1}})
    )
    source = open_foreign(folder)
    assert source.rest["extra_state"] == {"norm._extra_state": {"a": 1}}
    assert not any("extra" in key.name for key in source.tensors)


def test_the_loss_scale_is_in_the_rest(tmp_path):
    case = unpack("zero2", tmp_path)
    for kind in ("", "universal"):
        assert open_foreign(case / kind).rest["deepspeed"]["loss_scaler"]["cur_scale"] == 1.0


# What is refused

PARTS = [
    ("zero1", "global_step3/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", r"ranks \[0\]"),
    ("zero3", "checkpoint/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", r"ranks \[1\]"),
    ("zero3", "checkpoint/zero_pp_rank_1_mp_rank_00_model_states.pt", r"ranks \[1\] are missing"),
    ("zero3", "checkpoint/zero_pp_rank_0_mp_rank_00_model_states.pt", "first rank"),
    ("zero2/universal", "universal/zero/inner.bias/fp32.pt", "fp32.pt"),
]


@pytest.mark.parametrize(("case", "file", "message"), PARTS)
def test_a_missing_file_is_named(tmp_path, case, file, message):
    case, _, kind = case.partition("/")
    folder = unpack(case, tmp_path)
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=message):
        open_foreign(folder / kind)


@pytest.mark.parametrize(
    ("case", "file"),
    [*[(case, file) for case, file, _ in PARTS], ("zero3/universal", "universal/zero/optimizer_state.pt")],
)
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "hostile", "hostile-legacy"])
def test_damaged_or_hostile_files_are_named_and_run_nothing(tmp_path, case, file, damage):
    case, _, kind = case.partition("/")
    folder = unpack(case, tmp_path)
    victim = folder / file
    if damage.startswith("hostile"):
        payload = {"module": Payload(tmp_path / "trace")}
        torch.save(payload, victim, _use_new_zipfile_serialization=damage == "hostile")
    else:
        data = victim.read_bytes()
        victim.write_bytes(
            {"truncated": data[: len(data) // 2], "garbage": b"\x80\x02garbage" * 99, "empty": b""}[damage]
        )
    with pytest.raises(CheckpointError) as error:
        open_foreign(folder / kind)
    assert victim.name in str(error.value)
    assert "hostile" not in damage or "posix.mkdir" in str(error.value)
    assert not (tmp_path / "trace").exists()


def edited(folder, file, edit):
    state = torch.load(folder / file, weights_only=False)
    edit(state)
    torch.save(state, folder / file)


def test_layouts_that_can_not_be_joined_are_refused(tmp_path):
    folder = unpack("zero2", tmp_path) / "checkpoint"
    shutil.copy(folder / "mp_rank_00_model_states.pt", folder / "mp_rank_01_model_states.pt")
    with pytest.raises(CheckpointError, match="tensor or pipeline parallelism"):
        open_foreign(folder)
    (folder / "mp_rank_01_model_states.pt").unlink()
    (folder / "layer_0_expert_1_mp_rank_00_model_states.pt").touch()
    with pytest.raises(CheckpointError, match="experts"):
        open_foreign(folder)


def test_stage_0_is_refused(tmp_path):
    folder = unpack("zero2", tmp_path) / "checkpoint"
    edited(folder, "mp_rank_00_model_states.pt", lambda state: state.update(param_shapes=None))
    with pytest.raises(CheckpointError, match="without ZeRO"):
        open_foreign(folder)


def test_a_shape_that_the_parts_do_not_fill_is_refused(tmp_path):
    folder = unpack("zero2", tmp_path) / "checkpoint"

    def widen(state):
        state["param_shapes"][0]["inner.weight"] = torch.Size((8, 5))

    edited(folder, "mp_rank_00_model_states.pt", widen)
    with pytest.raises(CheckpointError, match=r"inner.weight.*hold 35 of the"):
        open_foreign(folder)


def test_a_pointer_that_leads_elsewhere_is_refused(tmp_path):
    folder = unpack("zero2", tmp_path)
    (folder / "latest").write_text("../zero2/checkpoint")
    with pytest.raises(CheckpointError, match="should name a directory beside it"):
        open_foreign(folder)
    (folder / "latest").write_text("gone")
    with pytest.raises(CheckpointError, match="gone"):
        detect(folder)
