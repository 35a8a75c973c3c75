"""K sub-models to one model of full size.

Before, for K = 2::

    h_0 = layer_norm(a_0); y_0 = linear(h_0, v_0)
    h_1 = layer_norm(a_1); y_1 = linear(h_1, v_1)

After, exactly the mean of the outputs::

    h = cat([layer_norm(a[:4]), layer_norm(a[4:])]); y = linear(h, [v_0 v_1] / 2)

Every value is brought over by its kind (`graphsplit.analysis.kinds`): SPLIT values by one op on full tensors,
whose cross weights are zero and trainable; values that each sub-model has for itself by K parallel ops; MEAN
values by one op on weights that were averaged (eq. (1) of Miranda & Von Zuben, arXiv 1511.02954).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, fx

from graphsplit.analysis import Analysis
from graphsplit.analysis.kinds import Kind
from graphsplit.analysis.layout import Indices, Layout
from graphsplit.analysis.localize import local_value
from graphsplit.analysis.lower import lower
from graphsplit.builder import GraphBuilder, period_of
from graphsplit.errors import InternalError, PartitionError, UnsupportedError
from graphsplit.graphs import drop_dead
from graphsplit.passes.base import Pass, PassResult, Programs
from graphsplit.plan import StatePlan
from graphsplit.program import TRAINING, Dim, Program, StateEntry, TensorMeta, meta_of, op_name, source_of

aten = torch.ops.aten


def merge(
    analysis: Analysis, states: Sequence[Mapping[str, Tensor] | None], *, duplicate: bool = True
) -> Program:
    """One program from the weights of K sub-models.

    Args:
        analysis: How the model was divided.
        states: For each sub-model every state tensor by name; None leaves it out, and the output is the mean
            of the others.
        duplicate: Exact: cross-unit ops and parameters of every sub-model's own are there K times. Otherwise
            the original graph with merged weights, which is exact only where there are none.

    Raises:
        PartitionError: The exact merge would have to stack parameters of different shapes.
    """
    tensors = {}
    for plan in analysis.plan.state:
        if plan.kind == "constant":
            continue
        values = [None if state is None else state[plan.name] for state in states]
        if duplicate and plan.merge == "stack" and not plan.can_stack(analysis.k):
            raise PartitionError(
                f"{plan.name} is held by every sub-model in another shape, so an exact merge cannot stack it",
                hint="choose a K that divides its widths, or merge with duplicate=False",
            )
        tensors[plan.name] = plan.merge_tensors(values, duplicate=duplicate)
    program = analysis.program
    if not duplicate:
        return _with(program, program.graphs, tensors, {})
    constants: dict[str, StateEntry] = {}
    present = sum(state is not None for state in states)
    graphs = tuple(
        _Merge(analysis, GraphBuilder(constants, program.state), present).run(graph)
        for graph in program.graphs
    )
    return _with(program, graphs, tensors, constants)


def _with(
    program: Program,
    graphs: tuple[fx.Graph, ...],
    tensors: Mapping[str, Tensor],
    constants: Mapping[str, StateEntry],
) -> Program:
    state = dict(constants)
    for name, entry in program.state.items():
        tensor = tensors.get(name, entry.tensor)
        if entry.kind == "parameter":
            tensor = tensor.detach().requires_grad_(entry.tensor.requires_grad)
        state[name] = replace(entry, tensor=tensor)
    return replace(program, graphs=graphs, state=state)


@dataclass
class _Merge:
    """Lowers one graph of the full program to the graph of the exact merge."""

    analysis: Analysis
    build: GraphBuilder
    present: int
    full: dict[fx.Node, fx.Node] = field(default_factory=dict)
    parts: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    means: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def run(self, graph: fx.Graph) -> fx.Graph:
        self.plans = {plan.name: plan for plan in self.analysis.plan.state}
        for node in graph.nodes:
            if node.op == "placeholder":
                self.full[node] = self.build.placeholder(node)
            elif node.op == "get_attr":
                self._state(node)
            elif node.op == "output":
                self.build.output(fx.map_arg(node.args[0], self._returned))
            else:
                self.build.source = source_of(node)
                self._call(node)
        drop_dead(self.build.graph)
        return self.build.graph

    def _kind(self, node: fx.Node) -> Kind:
        return self.analysis.kinds.kind[node]

    def _state(self, node: fx.Node) -> None:
        name = str(node.target)
        if name == TRAINING:
            self.full[node] = self.build.state(name, None)
            return
        plan: StatePlan = self.plans[name]
        meta = meta_of(node)
        if plan.merge == "stack":
            shape = plan.merged_shape(self.analysis.k, duplicate=True)
            meta = TensorMeta(tuple(Dim(size) for size in shape), meta.dtype, meta.device)
        self.full[node] = self.build.state(name, meta)

    def _call(self, node: fx.Node) -> None:
        if op_name(node) == "copy_.default":
            self._write(node)
        elif node in self.analysis.kinds.apart:
            self.parts[node] = [
                lower(self.analysis, self.build, node, part, partial(self._part, part=part))
                for part in range(self.analysis.k)
            ]
        else:
            read = self._mean if self._kind(node) is Kind.MEAN else self._whole
            args = fx.map_arg(node.args, read)
            if node in self.analysis.divided:
                args = self._divided(node, args)
            kwargs = fx.map_arg(node.kwargs, read)
            self.full[node] = self.build.call(node.target, args, node.meta.get("value"), kwargs, node.name)

    def _divided(self, node: fx.Node, args: Any) -> tuple[Any, ...]:
        """Arguments of an output layer whose weight is tied, the first factor divided by their number."""
        place = 1 if op_name(node) in ("addmm.default", "baddbmm.default", "einsum.default") else 0
        given: Any = args[place]
        factor: fx.Node = given[0] if isinstance(given, (list, tuple)) else given
        small = self.build.call(aten.mul.Tensor, (factor, 1.0 / self.present), factor.meta["value"])
        swapped = [small, *given[1:]] if isinstance(given, (list, tuple)) else small
        return (*args[:place], swapped, *args[place + 1 :])

    # -- the three ways to read a value ----------------------------------------------------------------------

    def _whole(self, node: fx.Node) -> fx.Node:
        """The full tensor of a COMMON or SPLIT value."""
        if node not in self.full:
            self.full[node] = self._assemble(node)
        elif node.op == "get_attr" and self._is_stacked(node):
            raise InternalError(f"{node.target} is stacked and read as a whole")
        return self.full[node]

    def _is_stacked(self, node: fx.Node) -> bool:
        return (
            node.op == "get_attr"
            and node.target != TRAINING
            and self.plans[str(node.target)].merge == "stack"
        )

    def _part(self, node: fx.Node, part: int) -> fx.Node:
        """The value of one sub-model."""
        if node in self.parts:
            return self.parts[node][part]
        value = self.full[node]
        if self._is_stacked(node):
            self.parts[node] = self._unstacked(node, value)
            return self.parts[node][part]
        layout = self.analysis.kinds.layout.get(node)
        if isinstance(layout, list) and any(item.active for item in layout):
            raise InternalError(f"{node.name} has several results and is cut", where=str(source_of(node)))
        if isinstance(layout, Layout):
            for dim, cut in enumerate(layout.cuts):
                if cut is not None:
                    value = self.build.take(value, dim, cut[part])
        return value

    def _unstacked(self, node: fx.Node, value: fx.Node) -> list[fx.Node]:
        """The copies of all sub-models, as views of the tensor that holds them."""
        dim = self.plans[str(node.target)].stack_dim
        found = []
        start = 0
        for part in range(self.analysis.k):
            meta = local_value(self.analysis.kinds, node, part)
            if dim is None:
                found.append(self.build.call(aten.select.int, (value, 0, part), meta))
            else:
                stop = start + meta.shape[dim]
                found.append(self.build.call(aten.slice.Tensor, (value, dim, start, stop), meta))
                start = stop
        return found

    def _mean(self, node: fx.Node) -> fx.Node:
        """The average over the sub-models."""
        kind = self._kind(node)
        if kind is not Kind.OWN or (node.op == "get_attr" and not self._is_stacked(node)):
            return self._whole(node)
        if node not in self.means:
            parts = [self._part(node, part) for part in range(self.analysis.k)]
            meta = meta_of(parts[0])
            stacked = TensorMeta((Dim(len(parts)), *meta.dims), meta.dtype, meta.device)
            joined = self.build.call(aten.stack.default, (parts,), stacked)
            self.means[node] = self.build.call(aten.mean.dim, (joined, [0]), meta)
        return self.means[node]

    def _returned(self, node: fx.Node) -> fx.Node:
        kind = self._kind(node)
        if kind is Kind.SPLIT and self.analysis.k > 1:
            raise InternalError(f"the output {node.name} is divided", where=str(source_of(node)))
        if self.analysis.lacks_mean(node):
            raise PartitionError(
                f"the output {node.name} is of type {meta_of(node).dtype} and differs between the "
                "sub-models: it has no mean",
                where=str(source_of(node)),
                hint="return the scores that it is made from",
            )
        return self._mean(node)

    def _assemble(self, node: fx.Node) -> fx.Node:
        """Slices of all sub-models to one tensor, in the order of the full model."""
        layout = self.analysis.kinds.layout[node]
        assert isinstance(layout, Layout)
        parts = [self._part(node, part) for part in range(self.analysis.k)]
        if self._kind(node) is not Kind.SPLIT or not layout.disjoint:
            raise InternalError(f"{node.name} has no full tensor", where=str(source_of(node)))
        dims = [dim for dim, cut in enumerate(layout.cuts) if cut is not None]
        meta = meta_of(node)
        if len(dims) == 1:
            cut = layout.cuts[dims[0]]
            assert cut is not None
            if meta.dims[dims[0]].symbol is not None:
                return self._assemble_periods(parts, dims[0], cut, meta)
            order = np.concatenate(cut)
            joined = self.build.call(aten.cat.default, (parts, dims[0]), meta)
            if np.array_equal(order, np.arange(order.size)):
                return joined
            return self.build.take(joined, dims[0], np.argsort(order))
        return self._assemble_blocks(node, layout, parts, meta)

    def _assemble_periods(
        self, parts: list[fx.Node], dim: int, cut: tuple[Indices, ...], meta: TensorMeta
    ) -> fx.Node:
        """Slices of a dimension that is batch times units, joined along the units."""
        period = period_of(cut, meta.shape[dim])
        if period is None:
            raise UnsupportedError(
                "a dimension of units times batch, with the batch inside, is put together",
                where=str(self.build.source),
                hint="put the batch first where dimensions are joined",
            )
        here = [index[index < period] for index in cut]
        pieces = [self.build.apart(part, dim, index.size) for part, index in zip(parts, here, strict=True)]
        first = meta_of(pieces[0])
        wide = first.with_shape((*first.shape[: dim + 1], period, *first.shape[dim + 2 :]))
        joined = self.build.call(aten.cat.default, (pieces, dim + 1), wide)
        ordered = self.build.take(joined, dim + 1, np.argsort(np.concatenate(here)))
        return self.build.call(aten.flatten.using_ints, (ordered, dim, dim + 1), meta)

    def _assemble_blocks(
        self, node: fx.Node, layout: Layout, parts: list[fx.Node], meta: TensorMeta
    ) -> fx.Node:
        """Blocks between two divided dimensions, with zeros elsewhere: padded one dimension after another."""
        total: fx.Node | None = None
        for part, value in enumerate(parts):
            for dim, cut in enumerate(layout.cuts):
                if cut is None:
                    continue
                # Append one zero row and look every index up: absent ones find the zero.
                here = cut[part]
                size = layout.shape[dim]
                place = np.full(size, here.size)
                place[here] = np.arange(here.size)
                now = meta_of(value)
                grown = now.with_shape((*now.shape[:dim], here.size + 1, *now.shape[dim + 1 :]))
                widths = [0, 0] * (now.ndim - 1 - dim) + [0, 1]
                padded = self.build.call(aten.constant_pad_nd.default, (value, widths), grown)
                wide = now.with_shape((*now.shape[:dim], size, *now.shape[dim + 1 :]))
                index = self.build.index(place, now.device)
                value = self.build.call(aten.index_select.default, (padded, dim, index), wide)
            total = value if total is None else self.build.call(aten.add.Tensor, (total, value), meta)
        assert total is not None
        return total

    def _write(self, node: fx.Node) -> None:
        target, value = node.args[:2]
        assert isinstance(target, fx.Node) and isinstance(value, fx.Node)
        if self._is_stacked(target):
            parts = [self._part(value, part) for part in range(self.analysis.k)]
            dim = self.plans[str(target.target)].stack_dim
            meta = meta_of(self.full[target])
            if dim is None:
                new = self.build.call(aten.stack.default, (parts,), meta)
            else:
                new = self.build.call(aten.cat.default, (parts, dim), meta)
        else:
            new = self._mean(value) if self._kind(value) is Kind.OWN else self._whole(value)
        self.full[node] = self.build.call(
            aten.copy_.default, (self.full[target], new), meta_of(self.full[target])
        )


@dataclass(frozen=True)
class Merge(Pass):
    """``merge(duplicate=True)``: K sub-models to one program."""

    name: ClassVar[str] = "merge"
    duplicate: bool = True

    def run(self, programs: Programs) -> PassResult:
        """Merge the sub-models with the weights that they have."""
        analysis = programs.analysis
        if analysis is None:
            raise PartitionError("merge needs the sub-models of one model", hint="put partition before it")
        states = [{name: entry.tensor for name, entry in program.state.items()} for program in programs.items]
        merged = merge(analysis, states, duplicate=self.duplicate)
        return PassResult(Programs((merged,)), modified=True)
