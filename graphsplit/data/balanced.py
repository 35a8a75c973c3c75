"""As many examples of each class: the batch that GraSP is meant to see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphsplit.errors import InputError, UserError
from graphsplit.train.loop import Batches, as_batches, read_batch, take

Pair = tuple[Any, Any]


def balanced(
    data: Batches | Sequence[Any], per_class: int = 10, *, classes: int | None = None, seed: int = 0
) -> Pair:
    """One batch with as many examples of each class, ten of each as in the paper of GraSP (2002.07376).

    The classes take turns, so that both halves of the batch, and every other, hold as many of each, where
    ``per_class`` is even.

    Args:
        data: Inputs and targets as one pair, or batches of such, as of a DataLoader. Inputs are a tensor, a
            tuple or a mapping; targets class numbers ``[N]``.
        per_class: Examples of each class.
        classes: How many there are, 0 to ``classes`` - 1; reading stops as soon as there are enough of all of
            them. By default those that the data hold, which are read to the end.
        seed: Of which examples of one pair are taken. Of batches it is those that come first.

    Returns:
        Inputs and targets of ``per_class`` times as many examples as there are classes.

    Raises:
        UserError: A number is out of range, or data are no pairs of inputs and targets.
        InputError: Targets are no class numbers, or there are too few examples of a class, which is named.

    >>> images, labels = balanced((torch.randn(50, 3), torch.arange(50) % 5), per_class=2)
    >>> images.shape, labels.tolist()
    (torch.Size([10, 3]), [0, 1, 2, 3, 4, 0, 1, 2, 3, 4])
    """
    counts: tuple[tuple[str, object], ...] = (("per_class", per_class), ("classes", classes))
    for name, value in counts[: 1 if classes is None else 2]:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{name} is {value!r}, expected a whole number of at least 1")
    batches = as_batches(data)
    shuffled = batches is not data
    found: dict[int, list[Pair]] = {} if classes is None else {number: [] for number in range(classes)}
    for inputs, targets, size in _read(batches):
        order = torch.arange(size)
        if shuffled:
            order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        for place, number in zip(order.tolist(), targets[order].tolist(), strict=True):
            if classes is not None and not 0 <= number < classes:
                raise InputError(f"a target is {number}, expected 0 to {classes - 1}")
            chosen = found.setdefault(number, [])
            if len(chosen) < per_class:
                chosen.append(take((inputs, targets), torch.tensor([place]), size))
        if classes is not None and all(len(chosen) == per_class for chosen in found.values()):
            break
    return _joined(found, per_class)


def _read(batches: Batches) -> Iterator[tuple[Any, Tensor, int]]:
    for batch in batches:
        inputs, targets, size = read_batch(torch.device("cpu"), batch)
        if not isinstance(targets, Tensor) or targets.dim() != 1 or targets.is_floating_point():
            what = f"shape {list(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
            raise InputError(
                f"the targets are of {what}, expected class numbers [N]",
                hint="a batch can be balanced only where every example has one class",
            )
        for leaf in pytree.tree_leaves(inputs):
            if isinstance(leaf, Tensor) and (not leaf.dim() or leaf.shape[0] != size):
                raise InputError(
                    f"an input has shape {list(leaf.shape)} beside {size} targets",
                    hint="give inputs of which every tensor has the examples first",
                )
        yield inputs, targets, size


def _joined(found: dict[int, list[Pair]], per_class: int) -> Pair:
    """The examples as one batch, in turns."""
    if not found:
        raise InputError("the data gave no example", hint="an iterator is empty after one reading")
    few = [f"{number} ({len(chosen)})" for number, chosen in sorted(found.items()) if len(chosen) < per_class]
    if few:
        some = ", ".join(few[:5]) + (" ..." if len(few) > 5 else "")
        raise InputError(
            f"there are fewer than {per_class} examples of {len(few)} of {len(found)} classes: {some}",
            hint="ask for fewer examples of each class, or give more data",
        )
    turns = [chosen[turn] for turn in range(per_class) for _, chosen in sorted(found.items())]
    inputs, targets = (pytree.tree_map(_cat, *part) for part in zip(*turns, strict=True))
    return inputs, targets


def _cat(*leaves: Any) -> Any:
    """One leaf of the joined batch; what is no tensor belongs to all examples."""
    return torch.cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0]
