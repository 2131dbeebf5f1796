"""Checkpoints that earlier versions wrote, under every strategy, resume to the bits that the uninterrupted run had."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.written_before import write
from tests.helpers.ranks import run_ranks

FOLDER = Path(write.__file__).parent
VERSIONS = sorted(path.name for path in FOLDER.glob("v*"))


def unpack(version: str, name: str, target: Path) -> Path:
    with zipfile.ZipFile(FOLDER / version / f"{name}.zip") as packed:
        packed.extractall(target / name)
    return target / name


def test_every_version_has_every_case():
    assert VERSIONS
    for version in VERSIONS:
        assert {path.stem for path in (FOLDER / version).glob("*.zip")} == write.CASES.keys()


@pytest.mark.parametrize("version", VERSIONS)
def test_loss_scales_lie_under_the_name_of_the_plugin_class(version, tmp_path):
    for name, case in write.CASES.items():
        path = unpack(version, name, tmp_path) / "before.ckpt"
        if case.is_universal:
            keys = json.loads((path / "rest.json").read_text()).keys()
        else:
            keys = torch.load(path, weights_only=True).keys()
        assert ("SuperScalePrecision" in keys) == (case.precision is write.scaled), name


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_they_resume_bit_for_bit(version, num_ranks, tmp_path):
    names = {name for name, case in write.CASES.items() if case.num_ranks == num_ranks}
    folders = {name: unpack(version, name, tmp_path) for name in names}
    if num_ranks == 1:
        threads = torch.get_num_threads()
        try:
            runs = [write.resume_all(0, 1, str(tmp_path))]
        finally:
            torch.set_num_threads(threads)
    else:
        runs = run_ranks(num_ranks, write.resume_all, str(tmp_path))  # one start of ranks for all of them
    for ends in runs:
        assert ends.keys() == names
        for name, (found, num_steps) in ends.items():
            expected = load_file(folders[name] / "expected.safetensors")
            assert num_steps == write.LAST_STEP, name
            assert found.keys() == expected.keys(), name
            for key, tensor in expected.items():
                assert torch.equal(found[key], tensor), (name, key)
