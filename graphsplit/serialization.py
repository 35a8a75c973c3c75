"""A `Program` as plain JSON data and back.

What is written: the nodes of each graph with their values and provenance, the names, kinds, shapes and dtypes
of the state, the signature and the notes. Tensors are not: they travel beside the data, by name.

What reading relies on:

- Nothing in the data is run or imported. Operators are looked up in ``torch.ops`` among those that are
  registered already, Python functions in a fixed table, container types in PyTorch's own registry. Strings
  that end up in generated code (names of inputs, keywords and state tensors) are checked, for a graph is
  emitted as Python source.
- JSON has no tuples, dtypes or infinities: they are objects with one key that begins with ``$``, as in
  ``{"$tuple": [1, 2]}`` or ``{"$node": "relu"}``.
- A container type that is not registered in the reading process becomes a dict of its keys, or a list, and
  the program gets a note that says so.
"""

from __future__ import annotations

import functools
import inspect
import keyword
import math
import operator
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphsplit.errors import BundleError, InternalError
from graphsplit.program import (
    Dim,
    Program,
    Source,
    StateEntry,
    TensorMeta,
    check,
    op_name,
    source_of,
)
from graphsplit.signature import Outputs, Signature

FORMAT = "graphsplit-program/1"

Data = dict[str, Any]

# What fx, torch and Python raise for data that makes no sense; RecursionError is a RuntimeError.
_DAMAGE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

_SYMBOLIC = {
    "operator": (
        operator,
        "abs add and_ eq floordiv ge getitem gt le lshift lt mod mul ne neg not_ or_ pos pow rshift sub "
        "truediv xor",
    ),
    "math": (math, "acos asin atan ceil cos cosh exp floor log log2 pow sin sinh sqrt tan tanh trunc"),
    "torch": (
        torch,
        "sym_float sym_int sym_ite sym_max sym_min sym_not sym_sum _sym_acos _sym_asin _sym_atan _sym_cos "
        "_sym_cosh _sym_log2 _sym_sin _sym_sinh _sym_sqrt _sym_tan _sym_tanh",
    ),
}

# The Python functions that a graph may call: what torch.export leaves of arithmetic on sizes, and getitem.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{prefix}.{name}": getattr(module, name)
    for prefix, (module, names) in _SYMBOLIC.items()
    for name in names.split()
    if hasattr(module, name)
} | {"builtins.round": round}
_FUNCTION_NAMES = {function: name for name, function in FUNCTIONS.items()}

# Operators that reach outside of the process: no model needs them, and a file must not bring them in.
_FORBIDDEN = {"aten.from_file.default", "aten.from_file.out"}


def program_to_data(program: Program) -> Data:
    """A program without its tensors, as data that JSON can hold.

    Raises:
        BundleError: A node, an input or an output holds something that has no written form; it is named.
    """
    sources = _Sources()
    return {
        "format": FORMAT,
        "name": program.name,
        "notes": list(program.notes),
        "names": list(program.names),
        "signature": _signature_to_data(program.signature),
        "state": [_state_to_data(entry) for entry in program.state.values()],
        "graphs": [[_node_to_data(node, sources) for node in graph.nodes] for graph in program.graphs],
        "sources": sources.rows,
    }


def program_from_data(data: Data, tensors: Mapping[str, Tensor]) -> Program:
    """The program of `program_to_data`, with its tensors given by name.

    Tensors that were on the meta device when it was written come back there and need not be given.

    Raises:
        BundleError: The data is damaged, names an operator that is not registered, or does not fit the
            tensors.
    """
    with _reading("the program"):
        if data["format"] != FORMAT:
            raise BundleError(
                f"not a program of format {FORMAT}: {data['format']!r}",
                hint="was it written by a newer graphsplit?",
            )
        notes = [_text(note) for note in data["notes"]]
        sources = [
            Source(_text(row[0]), _text(row[1]), int(row[2]), _text(row[3])) for row in data["sources"]
        ]
        program = Program(
            name=_text(data["name"]),
            graphs=tuple(_graph_from_data(rows, sources) for rows in data["graphs"]),
            state={row["name"]: _state_from_data(row, tensors) for row in data["state"]},
            signature=_signature_from_data(data["signature"], notes),
            notes=tuple(notes),
            names=tuple(map(_text, data["names"])),
        )
        if len(program.graphs) not in (1, 2):
            raise ValueError(f"{len(program.graphs)} graphs, expected one or two")
        check(program)
    return program


@contextmanager
def _reading(place: str) -> Iterator[None]:
    """Turn whatever damaged data leads to into one sentence that names the place."""
    try:
        yield
    except BundleError:
        raise
    except KeyError as error:
        raise BundleError(f"{place} is damaged: {error} is missing") from error
    except InternalError as error:
        raise BundleError(f"{place} is damaged: {error.message}") from error
    except _DAMAGE as error:
        reason = " ".join(str(error).split("\n")[0].split())
        raise BundleError(f"{place} is damaged: {reason}") from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} where a string should be")
    return value


# -- values --------------------------------------------------------------------------------------------------

_CONSTANTS: dict[str, type] = {
    "$dtype": torch.dtype,
    "$layout": torch.layout,
    "$memory_format": torch.memory_format,
}


def encode(value: Any, place: str) -> Any:
    """A value as JSON data: numbers, strings, containers, nodes, and torch's dtypes, devices and layouts.

    Args:
        value: What to write. Plain JSON data is written as it is.
        place: What holds it, for the message.

    Raises:
        BundleError: There is no written form for the value.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, list) or (isinstance(value, tuple) and not hasattr(value, "_fields")):
        items = [encode(item, place) for item in value]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, dict):
        return _encode_dict(value, place)
    tagged = _encode_tagged(value, place)
    if tagged is None:
        raise BundleError(f"{place} holds a {type(value).__name__}, which has no written form")
    return tagged


def _encode_dict(value: Mapping[Any, Any], place: str) -> Data:
    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {key: encode(item, place) for key, item in value.items()}
    return {"$dict": [[encode(key, place), encode(item, place)] for key, item in value.items()]}


def _encode_tagged(value: Any, place: str) -> Data | None:
    """The form of a value that JSON does not know; None where there is none."""
    match value:
        case fx.Node():
            return {"$node": value.name}
        case TensorMeta(dims, dtype, device):
            return {"$tensor": [_constant_name(dtype), [_dim_to_data(dim) for dim in dims], device]}
        case Dim():
            return {"$dim": _dim_to_data(value)}
        case complex():
            return {"$complex": [encode(value.real, place), encode(value.imag, place)]}
        case slice():
            return {"$slice": [encode(part, place) for part in (value.start, value.stop, value.step)]}
        case torch.device():
            return {"$device": str(value)}
    if value is Ellipsis:
        return {"$ellipsis": True}
    return next(
        ({tag: _constant_name(value)} for tag, kind in _CONSTANTS.items() if isinstance(value, kind)), None
    )


def decode(data: Any, nodes: Mapping[str, fx.Node] | None = None) -> Any:
    """The value of `encode`.

    Args:
        data: JSON data.
        nodes: The nodes that may be referred to.

    Raises:
        LookupError, TypeError, ValueError, RuntimeError: The data is damaged.
    """
    if isinstance(data, list):
        return [decode(item, nodes) for item in data]
    if not isinstance(data, dict):
        return data
    tag = next(iter(data), "")
    if not tag.startswith("$"):
        return {key: decode(item, nodes) for key, item in data.items()}
    if len(data) != 1:
        raise ValueError(f"{tag} with other keys beside it")
    return _decode_tagged(tag, data[tag], nodes or {})


def _decode_tagged(tag: str, data: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if tag in _CONSTANTS:
        return _constant(data, _CONSTANTS[tag])
    match tag:
        case "$node":
            if data not in nodes:
                raise ValueError(f"it uses {data!r}, which is not computed before")
            return nodes[data]
        case "$tuple":
            return tuple(decode(item, nodes) for item in data)
        case "$dict":
            return {decode(key, nodes): decode(item, nodes) for key, item in data}
        case "$tensor":
            dtype, dims, device = data
            return TensorMeta(tuple(map(_dim_from_data, dims)), _constant(dtype, torch.dtype), _text(device))
        case "$dim":
            return _dim_from_data(data)
        case "$float":
            return float(data)
        case "$complex":
            return complex(decode(data[0]), decode(data[1]))
        case "$slice":
            return slice(*(decode(part, nodes) for part in data))
        case "$device":
            return torch.device(_text(data))
        case "$ellipsis":
            return Ellipsis
    raise ValueError(f"{tag} is no known kind of value")


def _constant_name(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _constant(name: Any, kind: type) -> Any:
    # Not getattr: torch imports some of its modules when they are asked for by name.
    value = vars(torch).get(name)
    if not isinstance(value, kind):
        raise ValueError(f"there is no torch.{name}")
    return value


def _dim_to_data(dim: Dim) -> Any:
    return dim.hint if dim.symbol is None else [dim.hint, dim.symbol]


def _dim_from_data(data: Any) -> Dim:
    return Dim(int(data[0]), _text(data[1])) if isinstance(data, list) else Dim(int(data))


# -- nodes ---------------------------------------------------------------------------------------------------


@dataclass
class _Sources:
    """Provenance, each place once: many nodes come from one line."""

    rows: list[list[Any]] = field(default_factory=list)
    known: dict[Source, int] = field(default_factory=dict)

    def index(self, source: Source) -> int:
        if source not in self.known:
            self.known[source] = len(self.rows)
            self.rows.append([source.module, source.file, source.line, source.code])
        return self.known[source]


def _node_to_data(node: fx.Node, sources: _Sources) -> Data:
    place = f"node {node.name}" + (f" ({op_name(node)})" if node.op == "call_function" else "")
    try:
        data: Data = {"op": node.op, "name": node.name, "target": _target_to_data(node, place)}
        if node.args:
            data["args"] = [encode(arg, place) for arg in node.args]
        if node.kwargs:
            data["kwargs"] = {key: encode(arg, place) for key, arg in node.kwargs.items()}
        if "value" in node.meta:
            data["value"] = encode(node.meta["value"], place)
    except BundleError as error:
        raise BundleError(error.message, where=str(source_of(node)), hint=error.hint) from None
    if "source" in node.meta:
        data["source"] = sources.index(node.meta["source"])
    return data


def _target_to_data(node: fx.Node, place: str) -> str:
    target = node.target
    if node.op in ("placeholder", "output"):
        return str(target)
    if node.op == "get_attr":
        return _state_name(str(target))
    if node.op == "call_function":
        if isinstance(target, torch._ops.OpOverload) and _operator(str(target)) is target:
            return str(target)
        if inspect.isbuiltin(target) or inspect.isfunction(target):
            name = _FUNCTION_NAMES.get(target)
            if name is not None:
                return name
    raise BundleError(
        f"{place} calls something that cannot be found again by name",
        hint="only registered operators of torch.ops and arithmetic on sizes can be saved",
    )


def _graph_from_data(rows: list[Data], sources: list[Source]) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for row in rows:
        with _reading(f"node {row['name']}"):
            node = _node_from_data(graph, row, nodes)
            if "value" in row:
                node.meta["value"] = decode(row["value"])
            if "source" in row:
                node.meta["source"] = sources[row["source"]]
            nodes[node.name] = node
    outputs = [position for position, row in enumerate(rows) if row["op"] == "output"]
    if outputs != [len(rows) - 1]:
        raise ValueError("a graph does not end with its one output")
    return graph


def _node_from_data(graph: fx.Graph, row: Data, nodes: Mapping[str, fx.Node]) -> fx.Node:
    op, name, target = row["op"], _text(row["name"]), _text(row["target"])
    _check_opcode(op, target)
    args = tuple(decode(arg, nodes) for arg in row.get("args", ()))
    kwargs = {key: decode(arg, nodes) for key, arg in row.get("kwargs", {}).items()}
    if op == "output" and not (len(args) == 1 and isinstance(args[0], tuple)):
        raise ValueError("it does not return a tuple")
    for key in kwargs:
        _check_identifier(key)
    node = graph.create_node(
        op, _function(name, target) if op == "call_function" else target, args, kwargs, name
    )
    if node.name != name:
        raise ValueError("its name is taken, or none that Python can have")
    return node


def _check_opcode(op: Any, target: str) -> None:
    if op == "placeholder":
        _check_identifier(target)
    elif op == "get_attr":
        _state_name(target)
    elif op not in ("call_function", "output"):
        raise ValueError(f"the opcode {op!r} is not known")


def _check_identifier(name: str) -> None:
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"{name!r} is no name that Python can have")


def _function(node: str, name: str) -> Callable[..., Any]:
    found: Callable[..., Any] | None = FUNCTIONS.get(name) or _operator(name)
    if found is None:
        raise BundleError(
            f"node {node} calls {name}, which is not registered in this process",
            hint="import the package that defines it first, or use the torch that it was saved with",
        )
    return found


@functools.lru_cache(maxsize=4096)
def _operator(name: str) -> torch._ops.OpOverload | None:
    """The overload ``namespace.operator.overload`` if it is registered; asking loads nothing."""
    parts = name.split(".")
    if len(parts) != 3 or not all(part.isidentifier() for part in parts) or name in _FORBIDDEN:
        return None
    namespace, packet, overload = parts
    schemas = torch._C._jit_get_schemas_for_operator(f"{namespace}::{packet}")
    if all((schema.overload_name or "default") != overload for schema in schemas):
        return None
    found: Any = getattr(getattr(torch.ops, namespace), packet, None)
    if not isinstance(found, torch._ops.OpOverloadPacket):
        return None
    target = getattr(found, overload, None)
    return target if isinstance(target, torch._ops.OpOverload) else None


# -- state ---------------------------------------------------------------------------------------------------


def _state_to_data(entry: StateEntry) -> Data:
    tensor = entry.tensor
    data: Data = {
        "name": _state_name(entry.name),
        "kind": entry.kind,
        "dtype": _constant_name(tensor.dtype),
        "shape": list(tensor.shape),
    }
    stride = _dense_stride(tensor)
    if stride is not None:
        data["stride"] = list(stride)
    if tensor.requires_grad:
        data["requires_grad"] = True
    if tensor.is_meta:
        data["meta"] = True
    if not entry.persistent:
        data["persistent"] = False
    if entry.aliases:
        data["aliases"] = [_state_name(alias) for alias in entry.aliases]
    return data


def _dense_stride(tensor: Tensor) -> tuple[int, ...] | None:
    """Strides that a copy keeps (``channels_last``, a transposed weight); None for the usual ones.

    Kernels are chosen by them, so that without them results would differ in the last bit.
    """
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.numel() == 0:
        return None
    stride = torch.empty_like(tensor, device="meta").stride()
    return None if stride == torch.empty(tensor.shape, device="meta").stride() else stride


def _state_from_data(row: Data, tensors: Mapping[str, Tensor]) -> StateEntry:
    name = _state_name(row["name"])
    with _reading(f"the state {name}"):
        if row["kind"] not in ("parameter", "buffer", "constant"):
            raise ValueError(f"the kind {row['kind']!r} is not known")
        tensor = _placed(row, tensors.get(name))
        return StateEntry(
            name=name,
            kind=row["kind"],
            tensor=tensor.requires_grad_(row.get("requires_grad") is True),
            persistent=row.get("persistent") is not False,
            aliases=tuple(_state_name(alias) for alias in row.get("aliases", ())),
        )


def _placed(row: Data, tensor: Tensor | None) -> Tensor:
    """The tensor of a state entry, checked against what is written about it."""
    shape, dtype = tuple(map(int, row["shape"])), _constant(row["dtype"], torch.dtype)
    stride = _checked_stride(row["stride"], shape) if "stride" in row else None
    if row.get("meta") is True:
        empty = torch.empty(shape, dtype=dtype, device="meta")
        return empty if stride is None else torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    if tensor is None:
        raise ValueError("its tensor is missing")
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        found = f"{_constant_name(tensor.dtype)}{list(tensor.shape)}"
        raise ValueError(f"its tensor is {found}, expected {_constant_name(dtype)}{list(shape)}")
    if stride is None or tensor.stride() == stride:
        return tensor.detach()
    return torch.empty_strided(shape, stride, dtype=dtype, device=tensor.device).copy_(tensor.detach())


def _checked_stride(stride: list[int], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, which must be those of the usual layout in another order of the dimensions."""
    expected = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size > 1 and step != expected:
            raise ValueError(f"the strides {stride} do not fit the shape {list(shape)}")
        expected *= max(size, 1)
    return tuple(map(int, stride))


def _state_name(value: Any) -> str:
    """A name under which a module can hold a tensor, and which generated code can spell."""
    name = _text(value)
    readable = all(part and part.isprintable() and not set(part) & set("\"'\\") for part in name.split("."))
    if not readable or name.startswith("__"):
        raise BundleError(
            f"a state tensor is called {name!r}, a name that cannot be written", hint="give it another name"
        )
    return name


# -- signature -----------------------------------------------------------------------------------------------


def _signature_to_data(signature: Signature) -> Data:
    return {
        "inputs": [encode(meta, "an input") for meta in signature.inputs],
        "input_names": list(signature.input_names),
        "in_spec": spec_to_data(signature.in_spec, "the inputs"),
        "in_leaves": [encode(leaf, "the inputs") for leaf in signature.in_leaves],
        "outputs": [
            {
                "spec": spec_to_data(outputs.spec, "the outputs"),
                "leaves": [encode(leaf, "the outputs") for leaf in outputs.leaves],
                "names": list(outputs.names),
            }
            for outputs in signature.outputs
        ],
        "parameter_names": list(signature.parameter_names),
        "defaults": [[name, encode(value, f"the default of {name}")] for name, value in signature.defaults],
    }


def _signature_from_data(data: Data, notes: list[str]) -> Signature:
    with _reading("the signature"):
        inputs = tuple(decode(meta) for meta in data["inputs"])
        if not all(isinstance(meta, TensorMeta) for meta in inputs):
            raise TypeError("an input is no tensor")
        in_spec = spec_from_data(data["in_spec"], notes, "an input")
        if in_spec.type is not tuple or [child.type for child in in_spec.children()] != [tuple, dict]:
            raise ValueError("the inputs are not positional ones and ones by keyword")
        outputs = tuple(_outputs_from_data(row, notes) for row in data["outputs"])
        return Signature(
            inputs=inputs,
            input_names=tuple(map(_text, data["input_names"])),
            in_spec=in_spec,
            in_leaves=_leaves(data["in_leaves"], in_spec, len(inputs)),
            outputs=outputs,
            parameter_names=tuple(map(_text, data["parameter_names"])),
            defaults=tuple((_text(name), decode(value)) for name, value in data["defaults"]),
        )


def _outputs_from_data(data: Data, notes: list[str]) -> Outputs:
    spec = spec_from_data(data["spec"], notes, "an output")
    names = tuple(map(_text, data["names"]))
    return Outputs(spec, _leaves(data["leaves"], spec, len(names)), names)


def _leaves(data: list[Any], spec: pytree.TreeSpec, count: int) -> tuple[int | tuple[Any, ...], ...]:
    leaves = tuple(decode(leaf) for leaf in data)
    if len(leaves) != spec.num_leaves:
        raise ValueError(f"{len(leaves)} leaves for a nesting of {spec.num_leaves}")
    for leaf in leaves:
        if not (leaf in range(count) if type(leaf) is int else isinstance(leaf, tuple) and len(leaf) == 1):
            raise ValueError(f"{leaf!r} is no position of a tensor and no constant")
    return leaves


# -- nesting -------------------------------------------------------------------------------------------------

_LEAF = pytree.tree_structure(0)
_BUILTIN = (tuple, list, dict, OrderedDict, defaultdict, deque, namedtuple)
_SEQUENCES: dict[str, Any] = {"tuple": tuple, "list": list}
_DICTS: dict[str, Any] = {"dict": dict, "OrderedDict": OrderedDict}
_FACTORIES: dict[str, Any] = {
    "none": None,
    "bool": bool,
    "dict": dict,
    "float": float,
    "int": int,
    "list": list,
}


def spec_to_data(spec: pytree.TreeSpec, place: str) -> Data:
    """The nesting of a value as JSON data.

    Raises:
        BundleError: A container is registered with a context that has no written form.
    """
    if spec.is_leaf():
        return {"type": "leaf"}
    return _container_to_data(spec, place) | {
        "children": [spec_to_data(child, place) for child in spec.children()]
    }


def _container_to_data(spec: pytree.TreeSpec, place: str) -> Data:
    kind, context = spec.type, spec.context
    for name, builtin in (_SEQUENCES | _DICTS).items():
        if kind is builtin:
            return {"type": name} if name in _SEQUENCES else {"type": name, "keys": encode(context, place)}
    if kind is deque:
        return {"type": "deque", "maxlen": encode(context, place)}
    if kind is defaultdict:
        factories = [name for name, factory in _FACTORIES.items() if factory is context[0]]
        if not factories:
            raise BundleError(f"{place} hold a defaultdict of {context[0]!r}, which has no written form")
        return {"type": "defaultdict", "factory": factories[0], "keys": encode(context[1], place)}
    if kind is namedtuple:
        return {"type": "namedtuple", "name": _type_name(context), "fields": list(context._fields)}
    return {
        "type": "custom",
        "name": _type_name(kind),
        "context": encode(context, f"{_type_name(kind)} in {place}"),
    }


def spec_from_data(data: Data, notes: list[str], place: str) -> pytree.TreeSpec:
    """The nesting of `spec_to_data`.

    Args:
        data: JSON data.
        notes: Gets a note for each container type that is not known here.
        place: What is nested so, for the notes.

    Raises:
        LookupError, TypeError, ValueError: The data is damaged.
    """
    kind = data["type"]
    if kind == "leaf":
        return _LEAF
    children = [spec_from_data(child, notes, place) for child in data["children"]]
    if kind == "custom":
        return _custom_spec(data, children, notes, place)
    if kind == "namedtuple":
        return pytree.TreeSpec(namedtuple, _namedtuple_type(data, len(children), notes, place), children)
    if kind in _SEQUENCES:
        return pytree.TreeSpec(_SEQUENCES[kind], None, children)
    if kind == "deque":
        return pytree.TreeSpec(deque, decode(data["maxlen"]), children)
    keys = decode(data["keys"])
    if len(set(keys)) != len(children):
        raise ValueError(f"{len(keys)} keys for {len(children)} entries")
    if kind == "defaultdict":
        return pytree.TreeSpec(defaultdict, [_FACTORIES[data["factory"]], keys], children)
    return pytree.TreeSpec(_DICTS[kind], keys, children)


def _custom_spec(
    data: Data, children: list[pytree.TreeSpec], notes: list[str], place: str
) -> pytree.TreeSpec:
    name, context = _text(data["name"]), decode(data["context"])
    known = _registered(name)
    if known is not None:
        return pytree.TreeSpec(known, context, children)
    keys = _keys_of(context, len(children))
    _add_note(
        notes,
        f"{place} of type {name} is a {'list' if keys is None else 'dict'} here: the type is not registered",
    )
    return pytree.TreeSpec(list, None, children) if keys is None else pytree.TreeSpec(dict, keys, children)


def _keys_of(context: Any, count: int) -> list[str] | None:
    """The names of a container's entries: most registrations keep them as the context, or first in it."""
    candidates = [context, context[0]] if isinstance(context, (list, tuple)) and context else [context]
    for keys in candidates:
        if (
            isinstance(keys, (list, tuple))
            and len(keys) == count > 0
            and all(isinstance(key, str) for key in keys)
        ):
            return list(keys)
    return None


def _namedtuple_type(data: Data, count: int, notes: list[str], place: str) -> Any:
    name, fields = _text(data["name"]), tuple(map(_text, data["fields"]))
    if len(fields) != count:
        raise ValueError(f"{len(fields)} fields for {count} entries")
    known = _registered(name)
    if known is not None and getattr(known, "_fields", None) == fields:
        return known
    _add_note(notes, f"{place} of type {name} is a new namedtuple here: the type is not registered")
    return _new_namedtuple(name.rpartition(".")[2], fields)


@functools.lru_cache(maxsize=256)
def _new_namedtuple(name: str, fields: tuple[str, ...]) -> Any:
    # namedtuple itself refuses names that are no identifiers.
    return namedtuple(name, fields)


def _add_note(notes: list[str], note: str) -> None:
    if note not in notes:
        notes.append(note)


def _type_name(kind: Any) -> str:
    """The name under which a type is registered for writing, else its qualified name."""
    registered = pytree.SUPPORTED_SERIALIZED_TYPES.get(kind)
    if registered is not None:
        name = str(registered.serialized_type_name)
        # Types without a name for writing share one place holder, which stands for the last of them.
        if "." in name and pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(name) is kind:
            return name
    return f"{kind.__module__}.{kind.__qualname__}"


def _registered(name: str) -> Any:
    """The container type of that name in PyTorch's registry; None where nobody has registered it."""
    kinds = [kind for kind in tuple(pytree.SUPPORTED_NODES) if kind not in _BUILTIN]
    return next((kind for kind in reversed(kinds) if _type_name(kind) == name), None)
