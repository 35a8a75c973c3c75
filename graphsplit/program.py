"""The intermediate representation: an fx graph of functional ATen ops, its state, and how it is called.

A `Program` is a value. Passes read it and give new ones; nobody changes the graphs of a finished Program.

What tools may rely on:

- ``graph`` nodes are ``placeholder`` (one per tensor input, in order), ``get_attr`` (a state name, or
  ``training``: the module's own flag), ``call_function`` (``torch.ops.aten`` overloads, ``operator``
  functions) and one ``output`` whose single argument is a flat tuple.
- No op writes in place, but for ``aten.copy_`` into a buffer at the end of the graph and ``batch_norm``'s
  update of its running statistics.
- ``node.meta["value"]`` is a `TensorMeta`, a `Dim`, a tuple of them, or None; ``node.meta["source"]`` is a
  `Source`.
- A model whose Python branches on ``self.training`` has two graphs over one state; any other has one for both
  modes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx

from graphsplit.errors import InternalError
from graphsplit.signature import Signature

TRAINING = "training"

StateKind = Literal["parameter", "buffer", "constant"]
Mode = Literal["train", "eval"]


@dataclass(frozen=True, slots=True)
class Dim:
    """A size: ``hint`` elements in the traced example, ``symbol`` when it may differ from call to call."""

    hint: int
    symbol: str | None = None

    def __str__(self) -> str:
        return self.symbol or str(self.hint)


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """Shape, dtype and device of a tensor in the graph."""

    dims: tuple[Dim, ...]
    dtype: torch.dtype
    device: str = "cpu"
    shape: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """Sizes for the traced example."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(dim.hint for dim in self.dims))

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.dims)

    def zeros(self) -> Tensor:
        """A tensor of zeros with the sizes of the traced example."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)

    def with_shape(self, shape: tuple[int, ...]) -> TensorMeta:
        """Same tensor with other sizes; a dynamic dimension whose size changes stays dynamic."""
        dims = []
        for dim, size in zip(self.dims, shape, strict=True):
            if dim.hint == size or dim.symbol is None:
                dims.append(Dim(size, dim.symbol))
            else:
                dims.append(Dim(size, f"({dim.symbol})*{size}/{dim.hint}"))
        return TensorMeta(tuple(dims), self.dtype, self.device)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.dims))}]"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a node comes from: the path of the module that ran it and the line of the user's code."""

    module: str = ""
    file: str = ""
    line: int = 0
    code: str = ""

    def __str__(self) -> str:
        parts = []
        if self.module:
            parts.append(f"module {self.module}")
        if self.file:
            parts.append(f"{self.file}:{self.line}" + (f" `{self.code}`" if self.code else ""))
        return ", ".join(parts) or "unknown place"


@dataclass(frozen=True, slots=True)
class StateEntry:
    """A parameter, buffer or lifted constant.

    ``aliases`` are further names of the same tensor in the user's ``state_dict`` (tied weights). A constant
    is no part of ``state_dict``; neither is a buffer that is not persistent.
    """

    name: str
    kind: StateKind
    tensor: Tensor
    persistent: bool = True
    aliases: tuple[str, ...] = ()

    @property
    def requires_grad(self) -> bool:
        """True for parameters that are trained."""
        return self.kind == "parameter" and self.tensor.requires_grad


@dataclass(frozen=True)
class Program:
    """A traced model.

    Attributes:
        name: Class name of the model, for reports.
        graphs: One graph for both modes, or two: ``(train, eval)``.
        state: Every parameter, buffer and constant, by its first name.
        signature: How inputs and outputs are nested.
        names: Every name of the state, tied ones too, in the order in which the user's modules register them.
        notes: Things a reader of a report should know (outputs left out, inputs duplicated, ...).
    """

    name: str
    graphs: tuple[fx.Graph, ...]
    state: Mapping[str, StateEntry]
    signature: Signature
    notes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def graph(self, mode: Mode = "eval") -> fx.Graph:
        """The graph that runs in ``mode``."""
        return self.graphs[0] if mode == "train" else self.graphs[-1]

    @property
    def branches_on_training(self) -> bool:
        """True where the user's Python takes another way in training than in evaluation."""
        return len(self.graphs) == 2

    def ordered_names(self) -> list[tuple[str, StateEntry]]:
        """Every name with its entry, in the order of `names`; constants come last."""
        entries = {name: entry for entry in self.state.values() for name in (entry.name, *entry.aliases)}
        known = dict.fromkeys(name for name in self.names if name in entries)
        return [(name, entries[name]) for name in known | entries]

    def parameter_count(self) -> int:
        """Number of scalars in parameters, tied ones counted once."""
        return sum(entry.tensor.numel() for entry in self.state.values() if entry.kind == "parameter")

    def nodes(self) -> Iterator[fx.Node]:
        """All nodes of all graphs."""
        for graph in self.graphs:
            yield from graph.nodes

    def with_state(self, tensors: Mapping[str, Tensor]) -> Program:
        """Same program with some tensors replaced; shapes must stay as they are."""
        state = {
            name: replace(entry, tensor=tensors[name]) if name in tensors else entry
            for name, entry in self.state.items()
        }
        return replace(self, state=state)

    def _repr_html_(self) -> str:
        """A small figure, for notebooks."""
        from graphsplit.drawing import snippet  # stands above this module

        return snippet(self)

    def __str__(self) -> str:
        """The program as text: one node a line, stable names, shapes and the user's line."""
        lines = [
            f"program {self.name}: {len(self.state)} state tensors, {self.parameter_count():,} parameters"
        ]
        modes = ("train", "eval") if self.branches_on_training else ("train and eval",)
        for mode, graph in zip(modes, self.graphs, strict=True):
            lines.append(f"graph ({mode}):")
            lines.extend(f"  {format_node(node)}" for node in graph.nodes)
        return "\n".join(lines)


def format_node(node: fx.Node) -> str:
    """One line of text for a node, without memory addresses."""
    value = node.meta.get("value")
    shape = f": {value}" if isinstance(value, TensorMeta) else ""
    if node.op == "placeholder":
        return f"{node.name}{shape} = input"
    if node.op == "get_attr":
        return f"{node.name}{shape} = state {node.target}"
    if node.op == "output":
        return f"return {node.args[0]}"
    arguments = [str(arg) for arg in node.args] + [f"{key}={arg}" for key, arg in node.kwargs.items()]
    return f"{node.name}{shape} = {op_name(node)}({', '.join(arguments)})"


def op_name(node: fx.Node) -> str:
    """``linear.default`` for ATen overloads, ``operator.getitem`` for Python functions."""
    return _name_of(node.target)


@functools.lru_cache(maxsize=4096)
def _name_of(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        return name.removeprefix("aten.")
    if isinstance(target, torch._ops.HigherOrderOperator):
        return str(target.name())
    module = getattr(target, "__module__", "").lstrip("_")
    return f"{module}.{getattr(target, '__name__', target)}"


def source_of(node: fx.Node) -> Source:
    """Provenance of a node."""
    source: Source = node.meta.get("source", Source())
    return source


def meta_of(node: fx.Node) -> TensorMeta:
    """Tensor metadata of a node that gives one tensor."""
    value = node.meta.get("value")
    if not isinstance(value, TensorMeta):
        raise InternalError(
            f"node {node.name} ({op_name(node)}) gives no single tensor", where=str(source_of(node))
        )
    return value


def check(program: Program) -> None:
    """Raise `InternalError` where a program is not well formed, naming the node.

    Run between passes: every argument comes before its use, every ``get_attr`` names a state tensor of the
    recorded shape, placeholders and outputs agree with the signature, and nothing but a buffer is written.
    """
    for graph, outputs in zip(program.graphs, program.signature.outputs, strict=True):
        seen: set[fx.Node] = set()
        placeholders = 0
        for node in graph.nodes:
            for argument in node.all_input_nodes:
                if argument not in seen:
                    raise _malformed(node, f"uses {argument.name} before it is computed")
            seen.add(node)
            if node.op == "placeholder":
                placeholders += 1
            elif node.op == "get_attr" and node.target != TRAINING:
                _check_state(program, node)
            elif node.op == "call_function":
                _check_write(node)
            elif node.op == "output":
                values: Any = node.args[0]
                if len(values) != len(outputs.names):
                    raise _malformed(
                        node, f"returns {len(values)} values, the signature says {len(outputs.names)}"
                    )
            elif node.op != "get_attr":
                raise _malformed(node, f"has the opcode {node.op}, which programs do not use")
        if placeholders != len(program.signature.inputs):
            raise InternalError(f"{placeholders} placeholders for {len(program.signature.inputs)} inputs")


def _check_state(program: Program, node: fx.Node) -> None:
    entry = program.state.get(str(node.target))
    if entry is None:
        raise _malformed(node, f"reads the state {node.target}, which the program does not hold")
    if tuple(entry.tensor.shape) != meta_of(node).shape:
        raise _malformed(node, f"has shape {meta_of(node).shape}, its tensor {tuple(entry.tensor.shape)}")


def _check_write(node: fx.Node) -> None:
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
        written = node.args[0]
        is_buffer = isinstance(written, fx.Node) and written.op == "get_attr"
        if target is not torch.ops.aten.copy_.default or not is_buffer:
            raise _malformed(node, f"writes in place ({op_name(node)})")


def _malformed(node: fx.Node, reason: str) -> InternalError:
    return InternalError(f"malformed program: node {node.name} {reason}", where=str(source_of(node)))
