"""A character LSTM, pre-trained in two halves, on the source of Python's own modules or on a text of yours.

    python examples/char_lstm.py
    python examples/char_lstm.py --data FOLDER_OR_FILE --epochs 10 --merge-at 5

FOLDER_OR_FILE is Penn Treebank (ptb.train.txt and its companions), enwik8, or any text file. Adam's moments
are merged with the weights. Takes about a minute on a CPU.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import graphsplit as gs

Loader = DataLoader[tuple[Tensor, ...]]


class CharLSTM(nn.Module):
    """Embedding, two layers of LSTM, scores of the next character."""

    def __init__(self, symbols: int, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, symbols)

    def forward(self, characters: Tensor) -> Tensor:
        """Characters ``[N, L]`` to scores ``[N, symbols, L]``."""
        hidden, _ = self.lstm(self.embed(characters))
        scores: Tensor = self.head(hidden)
        return scores.transpose(1, 2)


def loader(numbers: Tensor, length: int, *, shuffle: bool) -> Loader:
    """Windows of a text in batches of 32."""
    inputs, targets = gs.data.windows(numbers, length, batch=len(numbers))[0]
    return DataLoader(TensorDataset(inputs, targets), 32, shuffle=shuffle)


def main(arguments: list[str] | None = None) -> gs.train.History:
    """Train sub-models, merge them, train on; returns what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", help="a text file, or the folder of Penn Treebank")
    parser.add_argument("--characters", type=int, default=150_000, help="of Python's modules, without --data")
    parser.add_argument("-k", type=int, default=2, help="number of sub-models")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--merge-at", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    text = gs.data.text(options.data) if options.data else gs.data.standard_library(options.characters)
    model = CharLSTM(len(text.symbols), options.width)
    part = gs.partition(model, torch.zeros(2, 64, dtype=torch.long), k=options.k, init="fresh")
    schedule = gs.train.PartitionSchedule(
        part,
        lambda each: torch.optim.Adam(each.parameters(), lr=0.005),
        functional.cross_entropy,
        merge_at=options.merge_at,
        epochs=options.epochs,
        on_epoch=print,
    )
    train, test = (
        loader(numbers, 64, shuffle=shuffle) for numbers, shuffle in ((text.train, True), (text.valid, False))
    )
    return schedule.fit(train, test).history


if __name__ == "__main__":
    main()
