"""`inspect` and `verify` of crafted checkpoints: exit code 0 or 1, one line on stderr, and never a traceback."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import struct
import warnings
from pathlib import Path

import pytest
import torch
import xxhash

from lightning_superscale.checkpoint.format.blocks import hex_digest
from lightning_superscale.checkpoint.save.writer import save
from lightning_superscale.cli import main
from lightning_superscale.comm.mesh import single_mesh
from tests.helpers.checkpoints import local_state, state_tensors
from tests.helpers.extent import IS_ALL

NASTY = [
    "Infinity",
    "-Infinity",
    "NaN",
    "1e999",
    "1" + "0" * 400,
    "[" * 100_000,
    "[" * 3000 + "]" * 3000,
    '{"a":' * 3000 + "1" + "}" * 3000,
    "[]",
    "{}",
    '""',
    '"x"',
    "-1",
    "null",
    "true",
    "1.5",
    "[[1]]",
    "[null]",
    '{"$":"tuple","v":1}',
    '{"$":"device","v":"x"}',
    '{"$":"timedelta","v":[1e300,0,0]}',
    '{"$":{}}',
    '"\\ud800"',
]
MARK = "@@@"


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """No progress bar that wraps."""
    monkeypatch.setenv("COLUMNS", "1000")


def told(*arguments: object) -> str:
    """What a command says on stderr; its exit code is 0, or 1 with one line (`verify` also prints its findings)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["checkpoint", *map(str, arguments)])
    lines = [
        line for line in err.getvalue().splitlines() if line.strip() and not line.startswith(("verifying ", "reading "))
    ]
    assert code in (0, 1), (arguments, code, lines)
    assert len(lines) == code, (arguments, code, lines)
    assert all(line.startswith(f"superscale checkpoint {arguments[0]}: ") for line in lines)
    return "".join(lines)


def try_both(path: Path) -> None:
    told("inspect", path, "--json")
    told("inspect", path, "--tensors")
    told("verify", path)


def signed(body: bytes) -> bytes:
    return body[:-1] + f',"xxh3":"{hex_digest(body)}"}}\n'.encode()


def places(value, here=()):
    """Every place in a JSON value, but one of each list."""
    yield here
    items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*here, key))


def put(value, place, new):
    if not place:
        return new
    value = copy.copy(value)
    value[place[0]] = put(value[place[0]], place[1:], new)
    return value


def dumped(fields, token: str) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).replace(f'"{MARK}"', token).encode()


@pytest.fixture
def ours(tmp_path) -> tuple[Path, dict]:
    path = tmp_path / "ours.ckpt"
    save(str(path), local_state(state_tensors(3)), single_mesh(), step=5)
    fields = json.loads((path / "MANIFEST.json").read_text())
    fields.pop("xxh3")
    return path, fields


@pytest.mark.timeout(600 if IS_ALL else 120)
def test_a_manifest_with_any_value_at_any_place(ours):
    path, fields = ours
    crafted = [(place, token) for place in places(fields) if place for token in NASTY]
    for place, token in crafted if IS_ALL else crafted[::29]:
        (path / "MANIFEST.json").write_bytes(signed(dumped(put(fields, place, MARK), token)))
        try_both(path)


def test_the_state_beside_tensors(ours):
    path, fields = ours
    rest = next(name for name in fields["files"] if name.endswith("rest.json"))
    for content in [*NASTY, *(f'{{"a":{token}}}' for token in NASTY)]:
        data = content.encode()
        (path / rest).write_bytes(data)
        files = {**fields["files"], rest: {"size": len(data), "xxh3": xxhash.xxh3_64(data).hexdigest()}}
        (path / "MANIFEST.json").write_bytes(signed(dumped({**fields, "files": files}, "")))
        told("inspect", path)


def test_safetensors_and_their_index(tmp_path):
    entry = '{{"a":{{"dtype":"F32","shape":{},"data_offsets":{}}}}}'
    headers = [*NASTY, *(f'{{"a":{token}}}' for token in NASTY), *(f'{{"__metadata__":{token}}}' for token in NASTY)]
    headers += [entry.format(token, "[0,8]") for token in NASTY] + [entry.format("[2]", token) for token in NASTY]
    for header in headers if IS_ALL else headers[::3]:
        for name in ("x.safetensors", "x.bin"):
            data = header.encode()
            (tmp_path / name).write_bytes(struct.pack("<Q", len(data)) + data + bytes(8))
            told("inspect", tmp_path / name)
            told("verify", tmp_path / name)
    folder = tmp_path / "hf"
    folder.mkdir()
    for token in NASTY:
        for content in (token, f'{{"weight_map":{token}}}', f'{{"weight_map":{{"a":{token}}}}}'):
            (folder / "model.safetensors.index.json").write_text(content)
            told("inspect", folder)
            told("verify", folder)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch calls the layout a beta
    CSR = torch.eye(3).to_sparse_csr()
ODD = {
    "sparse_coo": torch.eye(3).to_sparse(),
    "sparse_csr": CSR,
    "meta": torch.empty(3, device="meta"),
    "expanded": torch.ones(1).expand(10),
    "conjugated": torch.ones(2, dtype=torch.complex64).conj(),
    "infinite": float("inf"),
    "none": None,
    "list": [1],
}
UNREADABLE = ("sparse_coo", "sparse_csr", "meta")


def file_with(value: object, place: str) -> dict:
    state = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"params": [0], "lr": 0.1}]}
    file = {"state_dict": {"a": torch.ones(2)}, "global_step": 3, "pytorch-lightning_version": "2.6.0", "epoch": 0}
    names = "lightning_superscale.optimizer_names"
    return {
        "weight": lambda: {**file, "state_dict": {"b": value}},
        "rest": lambda: {**file, "global_step": value, "hparams": value},
        "states": lambda: {**file, "optimizer_states": value},
        "state": lambda: {**file, "optimizer_states": [value], names: [["a"]]},
        "moment": lambda: {
            **file,
            "optimizer_states": [{**state, "state": {0: {"exp_avg": value, "step": value}}}],
            names: [["a"]],
        },
        "names": lambda: {**file, "optimizer_states": [state], names: [["a"]] if value is None else value},
    }[place]()


@pytest.mark.parametrize("place", ["weight", "rest", "states", "state", "moment", "names"])
def test_a_lightning_file_with_tensors_that_are_not_dense(tmp_path, place):
    path = tmp_path / "x.ckpt"
    for value in ODD.values():
        torch.save(file_with(value, place), path)
        try_both(path)


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_weight_that_is_not_dense_is_named_with_its_kind(tmp_path, kind):
    path = tmp_path / "x.ckpt"
    torch.save(file_with(ODD[kind], "weight"), path)
    for command in ("inspect", "verify"):
        assert f"'b' in {path} is a {kind} tensor, and only those with dense values can be read" in told(command, path)


def test_a_trace_of_brackets_is_one_line(tmp_path, capsys):
    path = tmp_path / "trace.json"
    path.write_text("[" * 100_000)
    assert main(["trace", "--draw", str(path)]) == 1
    assert "is no trace that `superscale trace` wrote" in capsys.readouterr().err
