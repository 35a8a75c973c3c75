"""Text as numbers: plain files, Penn Treebank, enwik8, and the source of Python's own modules."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from graphsplit.data.files import find, read
from graphsplit.errors import LoadError

# The files of Penn Treebank as Mikolov prepared it, and where everybody cuts the 100 million bytes of enwik8.
PTB = ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt")
ENWIK8_BYTES = 100_000_000
HELD_OUT = 20  # one part of so many, for each of validation and test


@dataclass(frozen=True)
class Text:
    """A text in three parts, as numbers of its symbols.

    Attributes:
        train: int64 ``[N]``.
        valid: The same.
        test: The same.
        symbols: What each number stands for: a character, or a byte as a character of Latin-1.
    """

    train: Tensor
    valid: Tensor
    test: Tensor
    symbols: tuple[str, ...]

    def decode(self, numbers: Tensor) -> str:
        """Numbers ``[N]`` as text."""
        return "".join(self.symbols[number] for number in numbers.tolist())


def text(path: str | Path) -> Text:
    """A text that the user has.

    Args:
        path: A folder with ``ptb.train.txt``, ``ptb.valid.txt`` and ``ptb.test.txt``, the file ``enwik8`` (as
            bytes, the last two twentieths held out), or any other file of UTF-8 text (gzip or not), cut in
            the same shares.

    Raises:
        LoadError: The file is missing, damaged, no text or too short.
    """
    path = Path(path)
    if path.is_dir():
        parts = [_decode(file, read(file)) for file in (find(path, [name], "Penn Treebank") for name in PTB)]
        return _numbered(path, parts)
    if not path.is_file():
        raise LoadError(f"there is no file {path}", hint="give a text file, or the folder of Penn Treebank")
    content = read(path)
    if path.name.partition(".")[0] != "enwik8":
        return _numbered(path, _cut(_decode(path, content)))
    if len(content) != ENWIK8_BYTES:
        raise LoadError(
            f"{path} has {len(content):,} bytes, enwik8 has {ENWIK8_BYTES:,}",
            hint="fetch and unpack the file again, or give it another name",
        )
    return _numbered(path, _cut(content.decode("latin-1")))


def standard_library(characters: int = 1_000_000) -> Text:
    """The source of the modules of the Python that runs, in the order of their names: ASCII characters alone.

    Args:
        characters: How many to take, from the start.

    Raises:
        LoadError: This Python came without the source of its modules.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    pieces, length = [], 0
    for path in sorted(folder.glob("*.py")):
        piece = path.read_text(encoding="utf-8", errors="ignore")
        piece = "".join(character for character in piece if character in "\n\t" or " " <= character <= "~")
        pieces.append(piece)
        length += len(piece)
        if length >= characters:
            break
    return _numbered(folder, _cut("".join(pieces)[:characters]))


def windows(numbers: Tensor, length: int, batch: int) -> list[tuple[Tensor, Tensor]]:
    """A text as batches of windows for a model that predicts the next symbol.

    Args:
        numbers: int64 ``[N]``.
        length: Symbols in a window; windows do not overlap, and what is left over at the end is dropped.
        batch: Windows in a batch; the last batch may be smaller.

    Returns:
        Pairs of inputs and targets, each ``[batch, length]``; targets are the inputs moved on by one.

    Raises:
        LoadError: The text is shorter than one window.
    """
    count = (len(numbers) - 1) // length
    if count < 1:
        raise LoadError(f"a text of {len(numbers):,} symbols holds no window of {length}")
    inputs = numbers[: count * length].view(count, length)
    targets = numbers[1 : count * length + 1].view(count, length)
    return list(zip(inputs.split(batch), targets.split(batch), strict=True))


def _decode(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LoadError(
            f"{path} is no UTF-8 text: byte {error.start:,} is {content[error.start]:#04x}",
            hint="convert it, or check that it is the right file",
        ) from None


def _cut(whole: str) -> list[str]:
    held = len(whole) // HELD_OUT
    end = len(whole) - 2 * held
    return [whole[:end], whole[end : end + held], whole[end + held :]]


def _numbered(path: Path, parts: list[str]) -> Text:
    if not all(parts):
        raise LoadError(f"{path} holds too little text", hint=f"at least {HELD_OUT} characters are needed")
    symbols = tuple(sorted(set().union(*parts)))
    numbers = {symbol: number for number, symbol in enumerate(symbols)}
    train, valid, test = (torch.tensor([numbers[symbol] for symbol in part]) for part in parts)
    return Text(train, valid, test, symbols)
