"""A small GPT over characters, pre-trained in two halves: heads, hidden units and residual stream are cut.

    python examples/small_gpt.py
    python examples/small_gpt.py --data FOLDER_OR_FILE --epochs 10 --merge-at 5

FOLDER_OR_FILE is Penn Treebank (ptb.train.txt and its companions), enwik8, or any text file. Layer norms look
across units, so that the merged model has them twice, once for each half. Takes about a minute on a CPU.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import graphsplit as gs

Loader = DataLoader[tuple[Tensor, ...]]


class Block(nn.Module):
    """Causal attention and a perceptron, each behind a norm and around a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, L, width]`` to the same."""
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Characters and their places, blocks, scores of the next character."""

    def __init__(self, symbols: int, length: int, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(symbols, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, characters: Tensor) -> Tensor:
        """Characters ``[N, L]`` to scores ``[N, symbols, L]``."""
        x = self.embed(characters) + self.place(torch.arange(characters.shape[1], device=characters.device))
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(self.norm(x))
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
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--length", type=int, default=64, help="characters that it sees")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--merge-at", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    text = gs.data.text(options.data) if options.data else gs.data.standard_library(options.characters)
    model = GPT(len(text.symbols), options.length, options.width)
    example = torch.zeros(2, options.length, dtype=torch.long)
    part = gs.partition(model, example, k=options.k, init="rescale")
    schedule = gs.train.PartitionSchedule(
        part,
        lambda each: torch.optim.AdamW(each.parameters(), lr=0.003),
        functional.cross_entropy,
        merge_at=options.merge_at,
        epochs=options.epochs,
        on_epoch=print,
    )
    train, test = (
        loader(numbers, options.length, shuffle=shuffle)
        for numbers, shuffle in ((text.train, True), (text.valid, False))
    )
    return schedule.fit(train, test).history


if __name__ == "__main__":
    main()
