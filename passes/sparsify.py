"""Prune weights before training.

Before::

    y = linear(x, weight)

After::

    y = linear(x, mul(weight_orig, weight_mask))

where the mask is a buffer of zeros and ones. Names and shapes are those of ``torch.nn.utils.prune``, so that
a state dict of the one fits the other. Scores: `graphsplit.sparsity.scores`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from graphsplit.graphs import copy_graph
from graphsplit.passes.base import Pass, PassResult, Programs
from graphsplit.program import Program, StateEntry, meta_of
from graphsplit.sparsity import Method, Scope, Scoring, choose, cut_layers, prunable

aten = torch.ops.aten


def masked(program: Program, masks: Mapping[str, Tensor]) -> Program:
    """The program with masks on some of its parameters, by name."""
    state: dict[str, StateEntry] = {}
    for name, entry in program.state.items():
        if name not in masks:
            state[name] = entry
            continue
        aliases = entry.aliases
        mask = masks[name].to(entry.tensor.device, entry.tensor.dtype)
        state[f"{name}_orig"] = replace(
            entry, name=f"{name}_orig", aliases=tuple(f"{alias}_orig" for alias in aliases)
        )
        state[f"{name}_mask"] = StateEntry(
            f"{name}_mask", "buffer", mask, aliases=tuple(f"{alias}_mask" for alias in aliases)
        )
    known = {alias for name in masks for alias in (name, *program.state[name].aliases)}
    names = [
        new
        for name in program.names
        for new in ((f"{name}_orig", f"{name}_mask") if name in known else (name,))
    ]
    graphs = tuple(_masked_graph(graph, masks) for graph in program.graphs)
    return replace(program, graphs=graphs, state=state, names=tuple(names))


def _masked_graph(graph: fx.Graph, masks: Mapping[str, Tensor]) -> fx.Graph:
    copied = copy_graph(graph)
    for node in list(copied.nodes):
        if node.op != "get_attr" or node.target not in masks:
            continue
        name, users = str(node.target), list(node.users)
        node.target = f"{name}_orig"
        with copied.inserting_after(node):
            mask = copied.create_node("get_attr", f"{name}_mask")
        with copied.inserting_after(mask):
            product = copied.call_function(aten.mul.Tensor, (node, mask))
        mask.meta["value"] = product.meta["value"] = meta_of(node)
        for user in users:
            user.replace_input_with(node, product)
    return copied


def folded(program: Program, masks: Mapping[str, Tensor]) -> Program:
    """The same program with zeros in place of what is masked."""
    values = {}
    for name, mask in masks.items():
        tensor = program.state[name].tensor
        zeroed = tensor.detach() * mask.to(tensor.device, tensor.dtype)
        values[name] = zeroed.requires_grad_(tensor.requires_grad)
    return program.with_state(values)


@dataclass(frozen=True)
class Sparsify(Pass):
    """``sparsify(method="synflow", sparsity=0.9)``: masks on every program, each for itself.

    ``scoring`` holds data and loss for the methods that need them, and comes first where it is given. The
    options are those of `graphsplit.sparsify`.
    """

    name: ClassVar[str] = "sparsify"
    method: str = "synflow"
    sparsity: float = 0.9
    scope: str = "global"
    biases: bool = False
    norms: bool = False
    iterations: int = 100
    seed: int = 0
    scoring: Scoring | None = None

    def run(self, programs: Programs) -> PassResult:
        """Mask every program; how it was divided is known no longer, as its weights are other tensors."""
        method: Method = self.method  # type: ignore[assignment]  # `choose` refuses what is none
        scope: Scope = self.scope  # type: ignore[assignment]
        scoring = self.scoring or Scoring(method, iterations=self.iterations, seed=self.seed)
        items, cut = [], []
        for number, program in enumerate(programs.items):
            names = prunable(program, biases=self.biases, norms=self.norms)
            _, masks = choose(program, names, scoring, self.sparsity, scope)
            place = f" of program {number}" if len(programs.items) > 1 else ""
            cut += [f"nothing is left of {name}{place}" for name in cut_layers(masks, names)]
            items.append(masked(program, masks))
        return PassResult(Programs(tuple(items)), modified=True, reason="; ".join(cut))
