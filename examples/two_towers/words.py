"""Names from the installed Python standard library, as pictures and as letters.

Each word is drawn with a font that comes with matplotlib, at a place that changes from batch to batch. Which words are
held out depends on their hash alone, so a tower that scores on them has learnt to read, not to remember.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from pathlib import Path

import matplotlib
import torch
from matplotlib.ft2font import FT2Font
from torch import Tensor

from examples.language_model.data import hash_share, read_files

HEIGHT, WIDTH = 16, 96
MIN_LETTERS, MAX_LETTERS = 4, 10
HELD_OUT_SHARE = 0.1
FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono.ttf", "DejaVuSerif.ttf")


def read_words(path: Path | None, most: int) -> tuple[list[str], list[str]]:
    """The most frequent words of the texts: those to train on, and those that are held out."""
    counts: dict[str, int] = {}
    for text in read_files(path).values():
        for word in re.findall(rb"[a-z]{%d,%d}" % (MIN_LETTERS, MAX_LETTERS), text.lower()):
            counts[word.decode()] = counts.get(word.decode(), 0) + 1
    words = sorted(sorted(counts), key=counts.__getitem__, reverse=True)[:most]
    return (
        [word for word in words if hash_share(word) >= HELD_OUT_SHARE],
        [word for word in words if hash_share(word) < HELD_OUT_SHARE],
    )


def words_of_step(words: list[str], step: int, batch_size: int) -> list[str]:
    """Distinct words, the same in every process."""
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(step))
    return [words[i] for i in order[:batch_size].tolist()]


def letters(words: list[str]) -> Tensor:
    """[num_words, MAX_LETTERS] int64; 0 after the end."""
    rows = [[ord(letter) - ord("a") + 1 for letter in word.ljust(MAX_LETTERS, "`")] for word in words]
    return torch.tensor(rows)


def pictures(words: list[str], seed: int) -> Tensor:
    """[num_words, 1, HEIGHT, WIDTH] float32 from 0 to 1; font and place are drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)
    page = torch.zeros(len(words), 1, HEIGHT, WIDTH)
    for i, word in enumerate(words):
        font = FONTS[int(torch.randint(len(FONTS), (), generator=generator))]
        ink = _drawn(word, font)[:HEIGHT, :WIDTH]
        height, width = ink.shape
        top = int(torch.randint(HEIGHT - height + 1, (), generator=generator))
        left = int(torch.randint(min(6, WIDTH - width) + 1, (), generator=generator))
        page[i, 0, top : top + height, left : left + width] = ink
    return page


@cache
def _font(name: str) -> FT2Font:
    font = FT2Font(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)))
    font.set_size(11, 72)
    return font


@lru_cache(maxsize=1 << 16)
def _drawn(word: str, font_name: str) -> Tensor:
    font = _font(font_name)
    font.set_text(word, 0.0)
    font.draw_glyphs_to_bitmap(antialiased=True)
    return torch.tensor(font.get_image()).float() / 255
