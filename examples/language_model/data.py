"""Text as bytes, split by file: the installed Python standard library, or any file or directory of text.

[Note: Resumable order] Training window i starts at a position that depends on (seed, i) alone, and the
loader keeps count of the windows it has handed out. Lightning saves that count in every checkpoint, since the
loader has `state_dict`, so a run that resumes in mid-epoch sees the windows it would have seen.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import Dataset

VALIDATION_SHARE = 0.05
SKIPPED_DIRS = {"__pycache__", "site-packages", "dist-packages"}
TEST_DIRS = {"test", "tests", "idle_test"}


class DataError(ValueError):
    """The text to train on is missing or unusable; the message says what to do."""


@dataclass(frozen=True)
class Corpus:
    """Training and validation bytes, each a uint8 vector, and the files they came from."""

    train: Tensor
    validation: Tensor
    train_files: tuple[str, ...]
    validation_files: tuple[str, ...]

    @property
    def order0_bits(self) -> float:
        """Entropy in bits per byte of all bytes: what the best code that ignores context would need."""
        return entropy_bits(byte_counts(self.train) + byte_counts(self.validation))

    @property
    def validation_order0_bits(self) -> float:
        """Bits per byte of the validation bytes, coded with the training bytes' frequencies."""
        return cross_entropy_bits(byte_counts(self.validation), byte_counts(self.train))


def byte_counts(data: Tensor) -> Tensor:
    return torch.bincount(data, minlength=256).double()


def entropy_bits(counts: Tensor) -> float:
    """H(p) = -sum p log2 p, with p = counts / sum(counts)."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * p.log2()).sum())


def cross_entropy_bits(counts: Tensor, model_counts: Tensor) -> float:
    """-sum p log2 q, with q = (model_counts + 1) / (sum + 256): finite where a byte was never seen."""
    q = (model_counts + 1) / (model_counts.sum() + len(model_counts))
    return float(-(counts / counts.sum() * q.log2()).sum())


def list_files(root: Path, suffix: str, skipped_dirs: set[str]) -> list[Path]:
    """Regular files below a directory whose name ends with `suffix`, hidden ones left out, in sorted order."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped_dirs and not name.startswith(".")]
        paths = (Path(folder, name) for name in names if name.endswith(suffix) and not name.startswith("."))
        found += [path for path in paths if path.is_file()]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def read_files(path: Path | None) -> dict[str, bytes]:
    """Texts by relative path; the standard library's modules for None. Binary files of a directory are left out.

    Raises:
        DataError: nothing readable there.
    """
    advice = "Pass --data.path with a text file, or a directory of text files."
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        # _sysconfigdata is written by this machine's build.
        paths = [
            p for p in list_files(root, ".py", SKIPPED_DIRS | TEST_DIRS) if not p.name.startswith("_sysconfigdata")
        ]
        where = f"the Python standard library ({root})"
    elif path.is_dir():
        root, paths, where = path, list_files(path, "", SKIPPED_DIRS), f"data.path={path}"
    elif path.is_file():
        root, paths, where = path.parent, [path], f"data.path={path}"
    elif path.exists():
        raise DataError(
            f"data.path={path}: expected a file or a directory, found neither (a device, pipe or socket). {advice}"
        )
    else:
        raise DataError(f"data.path={path}: expected a file or a directory, found nothing there. {advice}")
    try:
        texts = {p.relative_to(root).as_posix(): p.read_bytes() for p in paths}
    except OSError as error:
        raise DataError(
            f"{where}: expected readable files, found {error.filename}: {error.strerror}. {advice}"
        ) from error
    texts = {name: text for name, text in texts.items() if text and b"\0" not in text}
    if not texts:
        raise DataError(f"{where}: expected text, found only empty or binary files ({len(paths)} in all). {advice}")
    return texts


def hash_share(name: str) -> float:
    """A number in [0, 1) that depends on the name alone, on every machine."""
    return (
        int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")
        / 2**64
    )


def split_files(texts: dict[str, bytes]) -> Corpus:
    """Whole files go to validation by the hash of their name; a single file gives its last tenth."""
    names = list(texts)
    if len(names) == 1:
        text = texts[names[0]]
        cut = len(text) - len(text) // 10
        return Corpus(to_tensor(text[:cut]), to_tensor(text[cut:]), (names[0],), (names[0],))
    by_hash = sorted(names, key=hash_share)
    # Never an empty side, however few files there are.
    count = sum(hash_share(name) < VALIDATION_SHARE for name in names)
    chosen = set(by_hash[: min(max(count, 1), len(names) - 1)])
    train = tuple(name for name in names if name not in chosen)
    validation = tuple(name for name in names if name in chosen)
    return Corpus(
        to_tensor(b"".join(texts[name] for name in train)),
        to_tensor(b"".join(texts[name] for name in validation)),
        train,
        validation,
    )


def to_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


class RandomWindows(Dataset):
    """Window i of `length` + 1 bytes starts at a place given by (seed, i); any i >= 0 will do."""

    def __init__(self, data: Tensor, length: int, seed: int) -> None:
        self.data, self.length, self.seed = data, length, seed

    def __len__(self) -> int:
        return max(1, len(self.data) // self.length)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        digest = hashlib.blake2b(f"{self.seed}:{index}".encode(), digest_size=8).digest()
        return window(self.data, int.from_bytes(digest, "little") % (len(self.data) - self.length), self.length)


class SpacedWindows(Dataset):
    """`num` windows, or as many as fit side by side, evenly spaced over the data."""

    def __init__(self, data: Tensor, length: int, num: int) -> None:
        self.data, self.length = data, length
        self.num = max(1, min(num, len(data) // (length + 1)))

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        last = len(self.data) - self.length - 1
        return window(self.data, index * last // max(1, self.num - 1), self.length)


def window(data: Tensor, start: int, length: int) -> tuple[Tensor, Tensor]:
    """Bytes and the bytes that follow each of them, [T] int64 both."""
    tokens = data[start : start + length + 1].long()
    return tokens[:-1], tokens[1:]


class Batches:
    """Consecutive items of a dataset in batches; reading them is too cheap for worker processes."""

    def __init__(self, dataset: Dataset, batch_size: int) -> None:
        self.dataset, self.batch_size = dataset, batch_size

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.dataset), self.batch_size):
            yield self.collate(range(start, min(start + self.batch_size, len(self.dataset))))

    def collate(self, indices: range) -> tuple[Tensor, Tensor]:
        inputs, targets = zip(*(self.dataset[i] for i in indices), strict=True)
        return torch.stack(inputs), torch.stack(targets)


class ResumableBatches(Batches):
    """Batches that go on where the last iteration, or the checkpoint, left off ([Note: Resumable order])."""

    def __init__(self, dataset: Dataset, batch_size: int) -> None:
        super().__init__(dataset, batch_size)
        self.num_windows = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(len(self)):
            start = self.num_windows
            self.num_windows += self.batch_size
            yield self.collate(range(start, start + self.batch_size))

    def state_dict(self) -> dict[str, int]:
        return {"num_windows": self.num_windows}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.num_windows = state["num_windows"]


class TextData(L.LightningDataModule):
    """Windows of bytes for training and validation.

    Args:
        path: a text file or a directory of them; the Python standard library's modules if not given.
        seq_len: bytes per sequence; at most the model's context.
        batch_size: sequences per batch.
        num_val_windows: sequences that validation reads.
        seed: of the order of the training windows.
    """

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        seq_len: int = 256,
        batch_size: int = 8,
        num_val_windows: int = 192,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("seq_len", seq_len), ("batch_size", batch_size), ("num_val_windows", num_val_windows)):
            if value < 1:
                raise DataError(f"data.{name} must be at least 1, found {value}.")
        self.path = None if path is None else Path(path)
        self.seq_len, self.batch_size, self.num_val_windows, self.seed = seq_len, batch_size, num_val_windows, seed
        self._corpus: Corpus | None = None

    @property
    def corpus(self) -> Corpus:
        """The bytes, read when first asked for.

        Raises:
            DataError: the path is missing, empty or unreadable, or its text too short for one sequence.
        """
        if self._corpus is None:
            corpus = split_files(read_files(self.path))
            for side, data in (("training", corpus.train), ("validation", corpus.validation)):
                if len(data) <= self.seq_len:
                    raise DataError(
                        f"data.path={self.path}: expected at least {self.seq_len + 1} bytes of {side} text for "
                        f"data.seq_len={self.seq_len}, found {len(data)}. Give more text, or lower --data.seq_len."
                    )
            self._corpus = corpus
        return self._corpus

    def train_dataloader(self) -> ResumableBatches:
        return ResumableBatches(RandomWindows(self.corpus.train, self.seq_len, self.seed), self.batch_size)

    def val_dataloader(self) -> Batches:
        return Batches(SpacedWindows(self.corpus.validation, self.seq_len, self.num_val_windows), self.batch_size)
