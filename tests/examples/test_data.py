"""The example's text: split, entropy, windows, resumption and refusals."""

from __future__ import annotations

import math
import os
from collections import Counter

import pytest
import torch

from examples.language_model.data import (
    Batches,
    DataError,
    RandomWindows,
    ResumableBatches,
    SpacedWindows,
    TextData,
    read_files,
    split_files,
)


def numbered(num: int) -> dict[str, bytes]:
    return {f"pkg/module_{i}.py": f"text of {i}\n".encode() * (i + 1) for i in range(num)}


def test_split_is_by_file_without_overlap_and_deterministic():
    texts = numbered(200)
    first, second = split_files(texts), split_files(dict(reversed(texts.items())))
    assert set(first.train_files) | set(first.validation_files) == set(texts)
    assert not set(first.train_files) & set(first.validation_files)
    assert set(first.validation_files) == set(second.validation_files)
    assert bytes(first.validation.tolist()) == b"".join(texts[name] for name in first.validation_files)
    assert len(first.train) + len(first.validation) == sum(map(len, texts.values()))


def test_split_of_a_file_does_not_depend_on_the_others():
    # 200 names put several below the threshold, so neither split takes the few-files fallback.
    few, many = split_files(numbered(200)), split_files(numbered(400))
    assert set(few.validation_files) == set(many.validation_files) & set(numbered(200))


@pytest.mark.parametrize("num", [2, 3, 5])
def test_few_files_leave_neither_side_empty(num):
    corpus = split_files(numbered(num))
    assert corpus.train_files
    assert corpus.validation_files


def test_single_file_gives_its_last_tenth(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(bytes(range(100)).replace(b"\0", b" ") * 10)
    corpus = TextData(file, seq_len=8).corpus
    assert len(corpus.train), len(corpus.validation) == (900, 100)
    assert bytes(torch.cat([corpus.train, corpus.validation]).tolist()) == file.read_bytes()


def test_standard_library_has_no_tests_and_no_installed_packages():
    names = read_files(None)
    assert "argparse.py" in names
    assert not [n for n in names if {"test", "tests", "idle_test", "site-packages"} & set(n.split("/"))]
    assert list(names) == sorted(names)


def test_directory_leaves_out_hidden_and_binary_files(tmp_path):
    for name, text in (
        ("a.md", b"text"),
        (".hidden", b"no"),
        ("b.bin", b"\0\1"),
        ("sub/c.py", b"more"),
        (".git/d", b"no"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text)
    assert read_files(tmp_path) == {"a.md": b"text", "sub/c.py": b"more"}


def test_entropies_equal_naive_sums():
    corpus = split_files(numbered(60))
    train, validation = bytes(corpus.train.tolist()), bytes(corpus.validation.tolist())
    counts = Counter(train + validation)
    total = len(train) + len(validation)
    assert corpus.order0_bits == pytest.approx(-sum(n / total * math.log2(n / total) for n in counts.values()))
    seen = Counter(train)
    costs = [-math.log2((seen[byte] + 1) / (len(train) + 256)) for byte in validation]
    assert corpus.validation_order0_bits == pytest.approx(sum(costs) / len(costs))


def test_uniform_bytes_have_eight_bits():
    text = bytes(range(256)) * 40
    corpus = split_files({"a": text, "b": text})
    assert corpus.order0_bits == pytest.approx(8.0)


def test_random_windows_depend_on_seed_and_index_alone():
    data = torch.arange(5000).remainder(251).to(torch.uint8)
    windows, again, other = RandomWindows(data, 16, 1), RandomWindows(data, 16, 1), RandomWindows(data, 16, 2)
    assert all(torch.equal(windows[i][0], again[i][0]) for i in reversed(range(50)))
    assert any(not torch.equal(windows[i][0], other[i][0]) for i in range(5))
    inputs, targets = windows[10**9]
    assert inputs.shape == targets.shape == (16,)
    assert torch.equal(inputs[1:], targets[:-1])


def test_random_windows_reach_both_ends():
    data = torch.arange(20).to(torch.uint8)
    starts = {int(RandomWindows(data, 16, 0)[i][0][0]) for i in range(200)}
    assert starts == {0, 1, 2, 3}


def test_spaced_windows_cover_first_and_last_byte():
    data = torch.arange(100).to(torch.uint8)
    windows = SpacedWindows(data, 10, 5)
    assert len(windows) == 5
    assert windows[0][0][0] == 0
    assert windows[4][1][-1] == 99
    assert len(SpacedWindows(data, 10, 1000)) == 9


def test_resumable_batches_go_on_where_their_state_says():
    dataset = RandomWindows(torch.arange(1000).remainder(256).to(torch.uint8), 50, 0)
    straight = ResumableBatches(dataset, 4)
    batches = [*straight, *straight]  # two epochs of five batches, no window twice
    assert len(batches) == 10
    interrupted = ResumableBatches(dataset, 4)
    for _, _ in zip(range(3), interrupted, strict=False):
        pass
    # zip asks for a fourth batch only after range has ended, so three were taken.
    assert interrupted.state_dict() == {"num_windows": 12}
    resumed = ResumableBatches(dataset, 4)
    resumed.load_state_dict(interrupted.state_dict())
    assert torch.equal(next(iter(resumed))[0], batches[3][0])
    assert not torch.equal(batches[0][0], batches[5][0])


def test_validation_batches_start_over_each_time():
    batches = Batches(SpacedWindows(torch.arange(200).to(torch.uint8), 10, 7), 3)
    next(iter(batches))
    assert [len(inputs) for inputs, _ in batches] == [3, 3, 1]


def test_missing_path_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"expected a file or a directory, found nothing there\. Pass --data\.path"):
        TextData(tmp_path / "nowhere").corpus  # noqa: B018


def test_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"expected a file or a directory, found neither"):
        TextData(tmp_path / "pipe").corpus  # noqa: B018


def test_empty_directory_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"expected text, found only empty or binary files \(0 in all\)"):
        TextData(tmp_path).corpus  # noqa: B018


def test_empty_file_is_refused(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(DataError, match=r"expected text, found only empty or binary files \(1 in all\)"):
        TextData(tmp_path / "a").corpus  # noqa: B018


def test_text_shorter_than_a_sequence_is_refused(tmp_path):
    (tmp_path / "a").write_text("too short")
    with pytest.raises(DataError, match=r"at least 257 bytes of training text for data\.seq_len=256, found 9"):
        TextData(tmp_path / "a").corpus  # noqa: B018


def test_unreadable_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("text")

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(DataError, match=r"expected readable files, found .*a: Permission denied"):
        TextData(tmp_path).corpus  # noqa: B018


@pytest.mark.parametrize("name", ["seq_len", "batch_size", "num_val_windows"])
def test_count_of_zero_is_refused(name):
    with pytest.raises(DataError, match=rf"data\.{name} must be at least 1, found 0"):
        TextData(**{name: 0})
