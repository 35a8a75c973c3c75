"""A `Program` as an ordinary trainable `nn.Module`.

The module holds the program's parameters and buffers under their original names (tied ones under all their
names) and runs Python code generated from its graphs. It trains, deep-copies, pickles, compiles with
``torch.compile(fullgraph=True)``, exports again, and moves between devices and dtypes like any module.
"""

from __future__ import annotations

import itertools
import keyword
import linecache
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from graphsplit.errors import UnsupportedError
from graphsplit.program import Mode, Program
from graphsplit.retarget import Place, moved_graphs, place_of
from graphsplit.signature import Signature
from graphsplit.untouched import tensors_by_all_names

Given = TypeVar("Given")


class ProgramModule(nn.Module):
    """Runs a program. Made by `emit`.

    Attributes:
        signature: How it is called.
        program_name: Class name of the model that it comes from.
    """

    signature: Signature
    _SHARED: ClassVar[set[str]] = {"signature", "_graphs", "_runs"}
    # Properties that give way to a part of the model with their name.
    _YIELDING: ClassVar[set[str]] = {"graph", "code"}

    def __init__(self, program: Program, *, copy: bool = True) -> None:
        super().__init__()
        self.program_name = program.name
        self.signature = program.signature
        self._graphs = program.graphs
        self._runs = tuple(_compile(graph, program.name) for graph in program.graphs)
        values: dict[str, Tensor] = {}
        parts = nn.Module()
        for name, entry in program.ordered_names():
            if entry.name not in values:
                tensor = entry.tensor.detach()
                tensor = tensor.clone() if copy else tensor
                if entry.kind == "parameter":
                    tensor = nn.Parameter(tensor, entry.tensor.requires_grad)
                values[entry.name] = tensor
            _register(parts, name, values[entry.name], persistent=entry.persistent)
        self._adopt(parts)

    def _adopt(self, parts: nn.Module) -> None:
        """Take over the children of another module, which may be called ``graph`` or ``code``."""
        for name in (*parts._modules, *parts._parameters, *parts._buffers):
            if name not in self._YIELDING and hasattr(self, name):
                raise UnsupportedError(
                    f"the model has a part called {name}, a name that emitted modules need themselves",
                    hint="give it another name",
                )
        self._modules.update(parts._modules)
        self._parameters.update(parts._parameters)
        self._buffers.update(parts._buffers)
        self._non_persistent_buffers_set |= parts._non_persistent_buffers_set

    def _part(self, name: str) -> Any:
        """The model's own child, parameter or buffer of this name, if it has one."""
        for parts in (self._modules, self._parameters, self._buffers):
            if name in parts:
                return parts[name]
        return None

    def _yielded(self, name: str, own: Given) -> Given:
        """What a property gives: the model's part of its name, which generated code reads, or its own."""
        part = self._part(name)
        found: Given = own if part is None else part
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Same call as the traced model's."""
        outputs = self.run_flat(self.signature.flatten(args, kwargs))
        return self.signature.outputs[0 if self.training else -1].unflatten(outputs)

    def run_flat(self, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        """The flat outputs for flat, unchecked inputs, in the order of the graph."""
        return self._runs[0 if self.training else -1](self, *inputs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ProgramModule:
        """Move the module; dtypes and devices that stand in its graphs go along."""
        before = place_of((*self.parameters(), *self.buffers()))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = place_of((*self.parameters(), *self.buffers()))
        self._follow(before, after)
        return self

    def _follow(self, before: Place | None, after: Place | None) -> None:
        """Let the graphs go where the tensors went."""
        self._graphs = moved_graphs(self._graphs, before, after)
        self._runs = tuple(_compile(graph, self.program_name) for graph in self._graphs)

    @property
    def graph(self) -> Any:
        """The graph of the present mode. It is the program's: read it, do not edit it. (Where the model has a
        part of this name, that.)"""
        part = self._part("graph")
        return self._graphs[0 if self.training else -1] if part is None else part

    def graph_of(self, mode: Mode) -> fx.Graph:
        """The graph that runs in ``mode``."""
        return self._graphs[0] if mode == "train" else self._graphs[-1]

    @property
    def code(self) -> Any:
        """Generated Python of the present mode. (Where the model has a part of this name, that.)"""
        part = self._part("code")
        return _source(self._graphs[0 if self.training else -1]) if part is None else part

    def __deepcopy__(self, memo: dict[int, Any]) -> ProgramModule:
        # Graphs and code are immutable here and shared; everything else is copied as nn.Module does.
        import copy

        clone = self.__class__.__new__(self.__class__)
        memo[id(self)] = clone
        clone.__dict__.update(
            {k: v if k in self._SHARED else copy.deepcopy(v, memo) for k, v in self.__dict__.items()}
        )
        return clone

    def __getstate__(self) -> dict[str, Any]:
        """Graphs and signature go as data, which any process can read."""
        from graphsplit.bundle import program_of
        from graphsplit.serialization import program_to_data

        state = dict(self.__dict__)
        del state["_runs"], state["_graphs"], state["signature"]
        state["_data"] = program_to_data(program_of(self))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Read what `__getstate__` wrote."""
        from graphsplit.serialization import program_from_data

        data = state.pop("_data")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        program = program_from_data(data, tensors_by_all_names(self))
        self.signature = program.signature
        self._graphs = program.graphs
        self._runs = tuple(_compile(graph, self.program_name) for graph in self._graphs)

    def extra_repr(self) -> str:
        """The model's name and the size of its graphs, for ``print``."""
        counts = "/".join(str(len(graph.nodes)) for graph in self._graphs)
        return f"{self.program_name}: {counts} nodes"


def emit(program: Program, *, copy: bool = True) -> ProgramModule:
    """A module that computes the program.

    Args:
        program: What to emit.
        copy: Own the tensors (the default) or share memory with the program's.

    Returns:
        A module in train mode, with parameters under their original names.
    """
    return ProgramModule(program, copy=copy)


def _register(root: nn.Module, name: str, value: Tensor, *, persistent: bool) -> None:
    *path, leaf = name.split(".")
    module = root
    for part in path:
        child = module._modules.get(part)
        if child is None:
            child = nn.Module()
            module.add_module(part, child)
        module = child
    if isinstance(value, nn.Parameter):
        module.register_parameter(leaf, value)
    else:
        module.register_buffer(leaf, value, persistent=persistent)


_compiled: WeakKeyDictionary[fx.Graph, Callable[..., tuple[Any, ...]]] = WeakKeyDictionary()
_numbers = itertools.count(1)


def _compile(graph: fx.Graph, name: str) -> Callable[..., tuple[Any, ...]]:
    """Turn a graph into a Python function of ``(module, *inputs)``, with its source known to tracebacks.

    Modules of the same graph share the function.
    """
    if graph not in _compiled:
        code = graph.python_code("self")
        source = _with_readable_names(graph, code.src)
        filename = f"<graphsplit {name} {next(_numbers)}>"
        namespace = dict(code.globals)
        exec(compile(source, filename, "exec"), namespace)
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        _compiled[graph] = namespace["forward"]
    return _compiled[graph]


def _source(graph: fx.Graph) -> str:
    return _with_readable_names(graph, graph.python_code("self").src)


def _with_readable_names(graph: fx.Graph, source: str) -> str:
    """Generated code with ``getattr(self, "lambda")`` for ``self.lambda``, which Python cannot read."""
    for node in graph.nodes:
        if node.op == "get_attr" and any(map(keyword.iskeyword, str(node.target).split("."))):
            written = readable = "self"
            for part in str(node.target).split("."):
                plain = part.isidentifier()
                written = f"{written}.{part}" if plain else f'getattr({written}, "{part}")'
                plain = plain and not keyword.iskeyword(part)
                readable = f"{readable}.{part}" if plain else f"getattr({readable}, {part!r})"
            pattern = rf"(?<= = ){re.escape(written)}(?=;|\s|$)"
            source = re.sub(pattern, readable.replace("\\", r"\\"), source)
    return source


def random_state(
    program: Program, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Random values for every floating-point parameter and buffer.

    They are of order one where the model has that, and positive where the model's are (running variances).
    """
    values = {}
    for name, entry in program.state.items():
        tensor = entry.tensor
        if tensor.dtype.is_floating_point and entry.kind != "constant":
            scale = max(tensor.shape[1:].numel(), 1) ** -0.5 if tensor.dim() > 1 else 0.5
            noise = torch.randn(tensor.shape, generator=generator, dtype=dtype) * scale
            if tensor.dim() <= 1 and bool((tensor > 0).all()):
                noise = noise.abs() + 0.5
            values[name] = noise
    return values
