"""Checkpoints that earlier versions wrote, under every strategy, resume to the bits that the uninterrupted run had."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.written_before import write
from tests.helpers.ranks import run_ranks

VERSIONS = sorted(path.name for path in Path(write.__file__).parent.glob("v*"))


def test_every_version_has_every_case():
    assert VERSIONS
    for version in VERSIONS:
        assert {path.stem for path in (Path(write.__file__).parent / version).glob("*.zip")} == write.CASES.keys()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_they_resume_bit_for_bit(version, num_ranks, tmp_path):
    for name in write.CASES:
        with zipfile.ZipFile(Path(write.__file__).parent / version / f"{name}.zip") as packed:
            packed.extractall(tmp_path / name)
    threads = torch.get_num_threads()
    try:
        runs = (
            run_ranks(2, write.resume_all, str(tmp_path)) if num_ranks == 2 else [write.resume_all(0, 1, str(tmp_path))]
        )
    finally:
        torch.set_num_threads(threads)
    for ends in runs:
        assert ends.keys() == {name for name, case in write.CASES.items() if case.num_ranks == num_ranks}
        for name, (found, num_steps) in ends.items():
            expected = load_file(tmp_path / name / "expected.safetensors")
            assert num_steps == write.LAST_STEP, name
            assert found.keys() == expected.keys(), name
            for key, tensor in expected.items():
                assert torch.equal(found[key], tensor), (name, key)
