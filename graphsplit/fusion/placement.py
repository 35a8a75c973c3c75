"""How a parameter or buffer of K models stands in the fused module: in the shape in which its ops read it.

A convolution reads the filters of all models as the rows of one weight, a batched product every matrix
transposed. Were all on a leading dimension of K, each would cost a view in every forward and backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx

from graphsplit.builder import aten
from graphsplit.graphs import node_arg

Kind = Literal["same", "stack", "rows", "turned"]


@dataclass(frozen=True)
class Placement:
    """How K tensors ``[C, ...]`` stand in one.

    Attributes:
        kind: ``same``, one for all models, as it is; ``stack``, ``[K, C, ...]``; ``rows``, ``[K * C, ...]``;
            ``turned``, matrices ``[O, I]`` as ``[K, I, O]``.
        ones: Of a stack: dimensions of one behind K, ``[K, 1, C]``, to broadcast.

    Raises:
        ValueError: It is none of these, as in a file that was changed.
    """

    kind: Kind = "stack"
    ones: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind) or type(self.ones) is not int:
            raise ValueError(f"{self.kind!r}, {self.ones!r} is no placement")

    def together(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor of K."""
        if self.kind == "same":
            return tensors[0]
        if self.kind == "rows":
            return torch.cat(list(tensors))
        if self.kind == "turned":
            return torch.stack([tensor.mT for tensor in tensors])
        return torch.stack([tensor[(None,) * self.ones] for tensor in tensors])

    def part(self, tensor: Tensor, number: int, k: int) -> Tensor:
        """That of one model, a view."""
        if self.kind == "same":
            return tensor
        if self.kind == "rows":
            return tensor.chunk(k)[number]
        own = tensor[number]
        return own.mT if self.kind == "turned" else own.view(own.shape[self.ones :])

    def shape(self, shape: Sequence[int], k: int) -> tuple[int, ...]:
        """Of the tensor of K models, where one's has ``shape``."""
        if self.kind == "same":
            return tuple(shape)
        if self.kind == "rows":
            return (k * shape[0], *shape[1:])
        if self.kind == "turned":
            return (k, shape[1], shape[0])
        return (k, *[1] * self.ones, *shape)


def as_read(graphs: Iterable[fx.Graph], names: Iterable[str], k: int) -> dict[str, Placement]:
    """Where the same view of a tensor ``[K, ...]`` is all that is read of it, let it stand like that.

    Args:
        graphs: Of one fused program; these views are taken out of them.
        names: State tensors with a leading dimension of K.
        k: Number of models.
    """
    every = list(graphs)
    found = {}
    for name in names:
        reads = [node for graph in every for node in graph.find_nodes(op="get_attr", target=name)]
        readers = [reader for read in reads for reader in read.users]
        placements = {_read_by(reader, k) for reader in readers}
        if len(placements) != 1:
            continue
        (placement,) = placements
        if placement is None:
            continue
        found[name] = placement
        for read in reads:
            for reader in list(read.users):
                read.meta["value"] = reader.meta["value"]
                reader.replace_all_uses_with(read)
                reader.graph.erase_node(reader)
    return found


def _read_by(reader: fx.Node, k: int) -> Placement | None:
    """The placement that makes a view of a stack needless."""
    if reader.op != "call_function" or not reader.args or not isinstance(reader.args[0], fx.Node):
        return None
    args: tuple[Any, ...] = reader.args[1:]
    if reader.target is aten.flatten.using_ints and args == (0, 1):
        return Placement("rows")
    if reader.target is aten.transpose.int and args == (1, 2) and node_arg(reader).meta["value"].ndim == 3:
        return Placement("turned")
    if reader.target is aten.unsqueeze.default and args == (1,):
        return Placement(ones=1)
    if reader.target is aten.unflatten.int and args[0] == 0:
        first, *ones = args[1]
        return Placement(ones=len(ones)) if first == k and set(ones) == {1} else None
    return None
