"""A program as an ONNX file that has been checked and run.

Before::

    h = aten.dropout(x, 0.1, training); y = aten.view(h, [s0, -1]); aten.copy_(steps, n); return (y,)

What is exported (evaluation, flat inputs and outputs, nothing written, any batch)::

    h = aten.dropout(x, 0.1, False); y = aten.reshape(h, [s0, -1]); return (y,)

The file is written beside its place under another name, checked by onnx.checker, run in ONNX Runtime and
compared with torch at two sizes, and only then renamed into its place.
"""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxruntime import InferenceSession, SessionOptions  # type: ignore[attr-defined]
from torch import Tensor, fx
from torch.export import Dim as ExportDim
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphsplit.emission import ProgramModule, emit
from graphsplit.errors import InputError, UnsupportedError, UserError, VerificationError, first_line
from graphsplit.program import TRAINING, Dim, Program, StateEntry, TensorMeta, op_name, source_of
from graphsplit.signature import Outputs, Signature, as_call

aten = torch.ops.aten

SINGLE_FILE_BYTES = 2**31 - 2**26
"""Weights beyond this go to a file of their own: protobuf ends at 2 GB, and the graph needs some of it."""

SEED = 0

RUNNABLE = {
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.float32, torch.float64,
}  # fmt: skip
"""Dtypes of inputs and outputs that can be handed to ONNX Runtime and back."""

TOLERANCES = {torch.float16: 1e-2, torch.float32: 1e-4, torch.float64: 1e-6}
"""Largest error by dtype, as a share of the largest value of the output; integers have to be equal. ONNX
Runtime computes some functions of float64 in less than full precision."""

FLOOR = 0.1
"""Outputs smaller than this are compared as if their largest value were this."""

ANY_LAYOUT: dict[Any, Any] = {
    aten.view.default: aten.reshape.default,
    aten.view_as.default: aten.reshape_as.default,
}
"""Ops for any memory layout in place of those for one: the exporter takes attention on the CPU apart, which
gives it another layout than the one that was traced, and a later ``view`` of it would be illegal."""

LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "onnx")

_REPORT = "please report it with the model"


# Results


@dataclass(frozen=True, slots=True)
class OnnxValue:
    """An input or output of the file.

    Attributes:
        name: Its name in the file.
        path: What it is in the model's call or result (``args[0]``, ``output['logits']``).
        dtype: As torch names it, ``float32``.
        shape: Sizes; a name where the size may change.
    """

    name: str
    path: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class OnnxRow:
    """ONNX Runtime against torch, for one output at one set of sizes.

    Attributes:
        output: Name of the output in the file.
        sizes: The sizes that may change, by name.
        absolute: Largest absolute difference.
        relative: The same as a share of the largest value.
        tolerance: Largest absolute difference that is accepted.
    """

    output: str
    sizes: Mapping[str, int]
    absolute: float
    relative: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """True where the difference is accepted."""
        return self.absolute <= self.tolerance


@dataclass(frozen=True)
class OnnxReport:
    """What was written, and the numbers that prove it.

    Attributes:
        path: The file.
        files: Every file that was written; two where the weights are apart.
        bytes: Their size together.
        opset: Version of the ONNX operator set.
        inputs: In the order of the file.
        outputs: In the order of the file.
        rows: ONNX Runtime against torch.
        notes: What a reader should know (outputs that are random, buffers that stay as they are).
    """

    path: Path
    files: tuple[Path, ...]
    bytes: int
    opset: int
    inputs: tuple[OnnxValue, ...]
    outputs: tuple[OnnxValue, ...]
    rows: tuple[OnnxRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def max_absolute(self) -> float:
        """Largest absolute difference over all rows."""
        return max((row.absolute for row in self.rows), default=0.0)

    @property
    def max_relative(self) -> float:
        """Largest difference as a share of the largest value of its output."""
        return max((row.relative for row in self.rows), default=0.0)


def export_onnx(
    module_or_program: ProgramModule | Program,
    path: str | os.PathLike[str],
    *,
    example: Any = None,
    opset: int | None = None,
) -> OnnxReport:
    """Write a program in evaluation mode to an ONNX file, check it, and compare it with torch.

    Every dimension that the signature shows as a symbol may change in the file too.

    Args:
        module_or_program: What to export; it is not changed.
        path: The file to write. Folders are made; a file that is there is replaced at the end, or not at all.
        example: Inputs to compare with, as for `graphsplit.trace`. By default normal values, and 0 or 1 for
            integer inputs.
        opset: Version of the ONNX operator set; by default the one that torch chooses.

    Returns:
        Names, shapes, files, and the largest error of every output.

    Raises:
        InputError: ``module_or_program`` or ``opset`` is of another kind, or the inputs do not fit the model.
        UnsupportedError: ONNX, torch's exporter or ONNX Runtime has no such op or dtype, which is named.
        VerificationError: The file does not compute what torch computes; the message names the output.
        UserError: The file cannot be written.
    """
    path = Path(path)
    check_path(path)
    check_opset(opset)
    model = Exportable(module_or_program)
    cases, notes = model.cases(example)
    file = to_onnx(model, model.export(cases[0].inputs), opset)
    random = model.random_outputs(cases[0])
    said = (*notes, *random_notes(random), *model.buffer_notes(cases[0]))
    signature = model.signature
    names = (signature.input_names, signature.outputs[0].names)
    return write_verified(file, path, names, cases, random=random, notes=said)


def write_verified(
    file: onnx_ir.Model,
    path: Path,
    names: tuple[Sequence[str], Sequence[str]],
    cases: Sequence[Case],
    *,
    random: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> OnnxReport:
    """Write a file, check it, run it, and only then put it in its place.

    Args:
        file: What to write.
        path: Where.
        names: What the user calls inputs and outputs.
        cases: What to run it on, and what torch gave.
        random: Outputs that are not compared, as the file names them.
        notes: For the report.
    """
    inputs, outputs = file.graph.inputs, file.graph.outputs
    run_names = [str(value.name) for value in inputs], [str(value.name) for value in outputs]
    with writing(path) as folder:
        _save_checked(file, folder / path.name)
        rows = _verify_file(folder / path.name, *run_names, cases, random)
        files = _move_into_place(folder, path)
    return OnnxReport(
        path=path,
        files=files,
        bytes=sum(written.stat().st_size for written in files),
        opset=file.opset_imports[""],
        inputs=_describe_values(inputs, names[0]),
        outputs=_describe_values(outputs, names[1]),
        rows=rows,
        notes=tuple(notes),
    )


def check_path(path: Path) -> None:
    """Refuse a folder where a file is to be written."""
    if path.is_dir():
        raise UserError(f"{path} is a folder", hint="give the name of a file, such as model.onnx")


def check_opset(opset: int | None) -> None:
    """Refuse a version of the ONNX operator set that does not exist."""
    newest = onnx.defs.onnx_opset_version()
    if opset is None or (type(opset) is int and 1 <= opset <= newest):
        return
    raise InputError(f"the ONNX opset is {opset!r}, expected a whole number from 1 to {newest}")


# What is exported


@dataclass(frozen=True)
class _Source:
    """What programs and their modules have in common: the evaluation graph, its state, how it is called."""

    name: str
    graph: fx.Graph
    signature: Signature
    state: Mapping[str, Tensor]

    @classmethod
    def of(cls, given: ProgramModule | Program) -> _Source:
        if isinstance(given, Program):
            tensors = {name: entry.tensor for name, entry in given.state.items()}
            return cls(given.name, given.graph("eval"), given.signature, tensors)
        if isinstance(given, ProgramModule):
            graph = given.graph_of("eval")
            names = {str(node.target) for node in graph.nodes if node.op == "get_attr"} - {TRAINING}
            tensors = {name: operator.attrgetter(name)(given) for name in names}
            return cls(given.program_name, graph, given.signature, tensors)
        raise InputError(
            f"cannot export a {type(given).__name__} to ONNX",
            hint="give a traced program (graphsplit.trace) or a module that graphsplit made",
        )

    def program(self, graph: fx.Graph, outputs: Sequence[str]) -> Program:
        """A program on the CPU, with flat inputs and outputs."""
        state = {}
        for node in graph.nodes:
            if node.op == "get_attr":
                name = str(node.target)
                state[name] = StateEntry(name, "buffer", _on_cpu(name, self.state[name]))
        return Program(self.name, (graph,), state, self._flat_signature(tuple(outputs)))

    def _flat_signature(self, outputs: tuple[str, ...]) -> Signature:
        count = len(self.signature.inputs)
        return replace(
            self.signature,
            inputs=tuple(replace(meta, device="cpu") for meta in self.signature.inputs),
            in_spec=pytree.tree_flatten((tuple(range(count)), {}))[1],
            in_leaves=tuple(range(count)),
            outputs=(Outputs(pytree.tree_flatten(outputs)[1], tuple(range(len(outputs))), outputs),),
        )


def _on_cpu(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        raise UnsupportedError(
            f"{name} is on the meta device and has no values to write",
            hint="load the weights before exporting",
        )
    return tensor.detach().cpu()


def _evaluation_graph(old: fx.Graph) -> fx.Graph:
    """A copy with the training flag off and without writes to buffers, fit for the ONNX exporter."""
    graph = fx.Graph()
    outputs, _ = _copy_nodes(old, graph)
    graph.output(_distinct_outputs(graph, outputs))
    graph.eliminate_dead_code()
    return graph


def _writes_graph(old: fx.Graph) -> tuple[fx.Graph, list[str]]:
    """A graph that gives what evaluation would write to buffers, and their names."""
    graph = fx.Graph()
    _, writes = _copy_nodes(old, graph)
    graph.output(tuple(writes.values()))
    graph.eliminate_dead_code()
    return graph, list(writes)


def _copy_nodes(old: fx.Graph, graph: fx.Graph) -> tuple[Sequence[Any], dict[str, Any]]:
    """Copy all nodes but the output and the writes; gives what was returned, and written."""
    values: dict[fx.Node, Any] = {}
    writes: dict[str, Any] = {}
    outputs: Sequence[Any] = ()
    for node in old.nodes:
        args, kwargs = _moved(node.args, values), _moved(node.kwargs, values)
        if node.op == "get_attr" and node.target == TRAINING:
            values[node] = False
        elif node.op == "output":
            outputs = args[0]
        elif node.target is aten.copy_.default:
            writes[str(args[0].target)] = args[1]
        else:
            if node.target is aten.unflatten.int:
                args = (graph.call_function(aten.contiguous.default, (args[0],)), *args[1:])
            target = ANY_LAYOUT.get(node.target, node.target)
            values[node] = graph.create_node(node.op, target, args, kwargs, node.name)
            values[node].meta.update(node.meta)
    return outputs, writes


def _moved(argument: Any, values: Mapping[fx.Node, Any]) -> Any:
    """An argument of the old graph in the new one; devices become the CPU."""

    def moved(leaf: Any) -> Any:
        if isinstance(leaf, fx.Node):
            return values[leaf]
        return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

    return pytree.tree_map(moved, argument)


def _distinct_outputs(graph: fx.Graph, outputs: Sequence[Any]) -> tuple[Any, ...]:
    """Outputs as tensors of their own: no sizes, no inputs or state handed through, nothing twice."""
    seen: set[fx.Node] = set()
    distinct = []
    for value in outputs:
        if not isinstance(value, fx.Node) or isinstance(value.meta.get("value"), Dim):
            value = graph.call_function(aten.scalar_tensor.default, (value,), {"dtype": torch.int64})
        elif value in seen or value.op in ("placeholder", "get_attr"):
            source = value
            value = graph.call_function(aten.clone.default, (value,))
            value.meta.update(source.meta)
        seen.add(value)
        distinct.append(value)
    return tuple(distinct)


def _check_dtypes(program: Program) -> None:
    """Refuse what can be neither fed to ONNX Runtime nor read from it."""
    signature = program.signature
    returned: Any = program.graphs[0].output_node().args[0]
    metas = [*signature.inputs, *(node.meta.get("value") for node in returned)]
    for name, meta in zip((*signature.input_names, *signature.outputs[0].names), metas, strict=True):
        if isinstance(meta, TensorMeta) and meta.dtype not in RUNNABLE:
            raise UnsupportedError(
                f"{name} is {_short(meta.dtype)}, of which ONNX Runtime takes and gives no tensors",
                hint="use real and imaginary parts"
                if meta.dtype.is_complex
                else "convert the model with .float() first",
            )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Inputs, and torch's own answers


@dataclass(frozen=True)
class Case:
    """Inputs, the sizes among theirs that may change, and what torch gives for them."""

    inputs: Sequence[Tensor]
    sizes: Mapping[str, int]
    expected: Sequence[Tensor]


class Exportable:
    """The flat evaluation program as a module, and what it is fed with."""

    def __init__(self, given: ProgramModule | Program) -> None:
        self.source = _Source.of(given)
        names = self.source.signature.outputs[-1].names
        self.program = self.source.program(_evaluation_graph(self.source.graph), names)
        _check_dtypes(self.program)
        self.signature = self.program.signature
        self.module = emit(self.program, copy=False).eval()
        self.input_names = value_names(_call_names(self.signature), ())
        self.output_names = value_names([_result_name(name) for name in names], self.input_names)
        self.symbols = _symbol_names(self.signature.inputs, self.input_names)

    def run(self, tensors: Sequence[Tensor], seed: int = SEED) -> list[Tensor]:
        """What torch computes, without a trace in the global random state."""
        with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            return list(self.module(*tensors))

    def export(self, tensors: Sequence[Tensor]) -> ExportedProgram:
        """torch's own export, with every symbolic dimension dynamic."""
        shapes = []
        examples = []
        for tensor, meta in zip(tensors, self.signature.inputs, strict=True):
            symbolic = {d: dim.hint for d, dim in enumerate(meta.dims) if dim.symbol is not None}
            shapes.append(dict.fromkeys(symbolic, ExportDim.AUTO))
            # A size of one would be taken for a fixed size, and one tensor given twice for one input.
            single = {d: hint for d, hint in symbolic.items() if tensor.shape[d] == 1}
            examples.append(_resized(tensor, single).clone())
        try:
            with _quiet():
                return torch.export.export(
                    self.module, tuple(examples), strict=False, dynamic_shapes={"args": tuple(shapes)}
                )
        except Exception as error:
            raise UnsupportedError(
                f"torch.export cannot trace the program again: {first_line(error)}", hint=_REPORT
            ) from error

    def cases(self, example: Any) -> tuple[list[Case], list[str]]:
        """The traced (or given) sizes and larger ones; a note where there are none."""
        first = self._made() if example is None else self._given(example)
        if not self.symbols:
            return [first], ["no size may change: compared at the traced sizes only"]
        for grow in GROWTHS:
            larger = [
                grow(tensor, meta) for tensor, meta in zip(first.inputs, self.signature.inputs, strict=True)
            ]
            second = self._case(larger)
            if isinstance(second, Case):
                return [first, second], []
        return [first], ["torch runs the program at the traced sizes only: compared at no others"]

    def _given(self, example: Any) -> Case:
        signature = self.source.signature
        tensors = [tensor.detach().cpu() for tensor in signature.flatten(*as_call(example, None))]
        for tensor, meta, name in zip(tensors, signature.inputs, signature.input_names, strict=True):
            if tensor.dtype != meta.dtype:
                raise InputError(f"input {name} is {_short(tensor.dtype)}, expected {meta}")
        case = self._case(tensors)
        if isinstance(case, str):
            raise InputError(f"{self.program.name} does not run on the example: {case}")
        return case

    def _made(self) -> Case:
        refusal = ""
        for ones in (0.75, 0.0, 1.0):
            generator = torch.Generator().manual_seed(SEED)
            case = self._case([_made_input(meta, generator, ones) for meta in self.signature.inputs])
            if isinstance(case, Case):
                return case
            refusal = refusal or case
        raise InputError(
            f"{self.program.name} does not run on random inputs (of integers 0 and 1): {refusal}",
            hint="give inputs that it can use by example=...",
        )

    def _case(self, tensors: Sequence[Tensor]) -> Case | str:
        """What torch computes, or why it cannot."""
        try:
            return Case(tensors, self._sizes(tensors), self.run(tensors))
        except Exception as error:
            return first_line(error)

    def _sizes(self, tensors: Sequence[Tensor]) -> dict[str, int]:
        sizes = {}
        for tensor, meta in zip(tensors, self.signature.inputs, strict=True):
            for size, dim in zip(tensor.shape, meta.dims, strict=True):
                if dim.symbol is not None:
                    sizes[self.symbols[dim.symbol]] = size
        return sizes

    def random_outputs(self, case: Case) -> list[str]:
        """Outputs that another seed changes."""
        outputs = zip(self.output_names, case.expected, self.run(case.inputs, SEED + 1), strict=True)
        return [name for name, first, second in outputs if not same_values(first, second)]

    def buffer_notes(self, case: Case) -> list[str]:
        """Buffers that evaluation changes."""
        graph, names = _writes_graph(self.source.graph)
        written = emit(self.source.program(graph, names), copy=False).eval()(*case.inputs)
        return [
            f"evaluation changes the buffer {name}; in the file it stays as it is, because ONNX has no memory"
            for name, value in zip(names, written, strict=True)
            if not same_values(self.source.state[name].cpu(), value)
        ]


def random_notes(outputs: Sequence[str]) -> list[str]:
    """What a report says of outputs that are random."""
    return [f"output {name} is random in evaluation and was not compared" for name in outputs]


def same_values(first: Tensor, second: Tensor) -> bool:
    """True where all entries are equal, or undefined in both."""
    return bool(((first == second) | ((first != first) & (second != second))).all())


def _resized(tensor: Tensor, sizes: Mapping[int, int]) -> Tensor:
    """The tensor with some dimensions cut, or filled up with what it begins with."""
    for dim, size in sizes.items():
        tensor = tensor.index_select(dim, torch.arange(size) % max(tensor.shape[dim], 1))
    return tensor


def _one_more(tensor: Tensor, meta: TensorMeta) -> Tensor:
    return _resized(tensor, {d: tensor.shape[d] + 1 for d, dim in enumerate(meta.dims) if dim.symbol})


def _one_more_example(tensor: Tensor, meta: TensorMeta) -> Tensor:
    return _resized(tensor, {0: tensor.shape[0] + 1}) if meta.dims and meta.dims[0].symbol else tensor


def _twice(tensor: Tensor, meta: TensorMeta) -> Tensor:
    return _resized(tensor, {d: 2 * tensor.shape[d] for d, dim in enumerate(meta.dims) if dim.symbol})


GROWTHS = (_one_more, _one_more_example, _twice)
"""Ways to the second set of sizes, until torch itself accepts one."""


def _made_input(meta: TensorMeta, generator: torch.Generator, ones: float) -> Tensor:
    """Normal values; of integers and truth values a share of ones, which any table and mask can use."""
    if meta.dtype.is_floating_point:
        return torch.randn(meta.shape, generator=generator, dtype=torch.float32).to(meta.dtype)
    return (torch.rand(meta.shape, generator=generator) < ones).to(meta.dtype)


# Names


def value_names(wanted: Sequence[str], taken: Iterable[str]) -> tuple[str, ...]:
    """Names for ONNX values: identifiers, each once.

    Args:
        wanted: Any text.
        taken: Names that may not be used.
    """
    used = set(taken)
    names = []
    for text in wanted:
        base = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_") or "value"
        base = f"_{base}" if base[0].isdigit() else base
        name, count = base, 1
        while name in used:
            count += 1
            name = f"{base}_{count}"
        used.add(name)
        names.append(name)
    return tuple(names)


def _call_names(signature: Signature) -> list[str]:
    """``args[0]`` by the name of forward's parameter, ``kwargs['mask']`` by its keyword."""
    names = []
    for path in signature.input_names:
        position = re.match(r"args\[(\d+)\]", path)
        if position is not None and int(position[1]) < len(signature.parameter_names):
            path = signature.parameter_names[int(position[1])] + path[position.end() :]
        names.append(path.removeprefix("kwargs"))
    return names


def _result_name(path: str) -> str:
    """``output['logits']`` as ``logits``; ``output[0]`` as it is."""
    inner = path.removeprefix("output").lstrip("[.'\"")
    return inner if inner[:1].isalpha() else path


def _symbol_names(inputs: Sequence[TensorMeta], names: Sequence[str]) -> dict[str, str]:
    """A readable name for each symbol: ``batch`` for the first, else the input and the dimension."""
    found: dict[str, str] = {}
    for meta, name in zip(inputs, names, strict=True):
        for position, dim in enumerate(meta.dims):
            if dim.symbol is not None and dim.symbol not in found:
                batch = position == 0 and "batch" not in found.values()
                found[dim.symbol] = "batch" if batch else f"{name}_dim_{position}"
    return found


# The file


def to_onnx(model: Exportable, exported: ExportedProgram, opset: int | None) -> onnx_ir.Model:
    """The graph as torch's exporter writes it, under our names."""
    try:
        with _quiet():
            result = torch.onnx.export(
                exported, opset_version=opset, dynamo=True, external_data=False, verbose=False
            )
    except Exception as error:
        raise _explain(model.program, error) from error
    if result is None:
        raise UnsupportedError("torch.onnx gave no model", hint=_REPORT)
    file = result.model
    if opset is not None and file.opset_imports[""] != opset:
        raise UnsupportedError(
            f"the model cannot be written in ONNX opset {opset}, only in {file.opset_imports['']}",
            hint="leave the opset out, or choose a newer one",
        )
    ClearMetadataAndDocStringPass()(file)  # paths and source lines of the machine that exported
    file.graph.name = model.program.name
    _rename(file, model)
    return file


def _explain(program: Program, error: BaseException) -> UnsupportedError:
    """The refusal of torch's exporter by its first reason, with the op and the line of the user's code."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    reason = first_line(chain[-1])
    text = "\n".join(str(link) for link in chain)
    found = re.search(r"op='(\w+)\.(\w+)'", text) or re.search(r"target=torch\.ops\.(\w+)\.(\w+)", text)
    if found is None:
        return UnsupportedError(f"the model cannot be written as ONNX: {reason}", hint=_OTHER_OPS)
    # The op has been taken apart: aten.special_bessel_j0 of the model is prims.bessel_j0 here.
    inner = found[2].strip("_")
    nodes = [node for node in program.nodes() if node.op == "call_function" and inner in op_name(node)]
    return UnsupportedError(
        f"{found[1]}.{found[2]} cannot be written as ONNX: {reason}",
        where=str(source_of(nodes[0])) if nodes else None,
        hint=_OTHER_OPS,
    )


_OTHER_OPS = "write this part of the model with other ops, or leave it out of the export"


def _rename(file: onnx_ir.Model, model: Exportable) -> None:
    """Give inputs, outputs and sizes their names; what has one of these names already gives it up."""
    wanted = {*model.input_names, *model.output_names}
    values = _values(file.graph)
    taken = {str(value.name) for value in values} | wanted
    for value in values:
        if value.name in wanted:
            (value.name,) = value_names([f"{value.name}_value"], taken)
            taken.add(value.name)
    for value, name in zip(file.graph.inputs, model.input_names, strict=True):
        value.name = name
    for value, name in zip(file.graph.outputs, model.output_names, strict=True):
        value.name = name
    sizes = {}
    for value, meta in zip(file.graph.inputs, model.signature.inputs, strict=True):
        for size, dim in zip(value.shape or (), meta.dims, strict=True):
            if isinstance(size, onnx_ir.SymbolicDim) and size.value is not None and dim.symbol is not None:
                sizes[size.value] = model.symbols[dim.symbol]
    for value in values:
        if value.shape is not None:
            value.shape = onnx_ir.Shape([_renamed_size(size, sizes) for size in value.shape])


def _values(graph: onnx_ir.Graph) -> list[onnx_ir.Value]:
    """All values of a graph and of the graphs inside it, which share its names."""
    values = [value for node in graph.all_nodes() for value in node.outputs]
    for scope in (graph, *graph.subgraphs()):
        values += [*scope.inputs, *scope.initializers.values()]
    return list({id(value): value for value in values}.values())


def _renamed_size(size: int | onnx_ir.SymbolicDim, names: Mapping[str, str]) -> int | str | None:
    if isinstance(size, int) or size.value is None:
        return size if isinstance(size, int) else None
    return re.sub(r"[A-Za-z_]\w*", lambda found: names.get(found[0], found[0]), size.value)


def _describe_values(values: Sequence[onnx_ir.Value], paths: Sequence[str]) -> tuple[OnnxValue, ...]:
    """Inputs or outputs of a file for its report."""
    described = []
    for value, path in zip(values, paths, strict=True):
        shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape or ())
        dtype = value.dtype.numpy().name if value.dtype is not None else "unknown"
        described.append(OnnxValue(str(value.name), path, dtype, shape))
    return tuple(described)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A folder beside the file, gone at the end."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            yield Path(folder)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}", hint="choose a folder that can be written to"
        ) from error


def _save_checked(file: onnx_ir.Model, path: Path) -> None:
    """Write a file, its weights apart where one cannot hold them, and check it."""
    weights = sum(value.const_value.nbytes for value in file.graph.initializers.values() if value.const_value)
    onnx_ir.save(file, path, external_data=f"{path.name}.data" if weights > SINGLE_FILE_BYTES else None)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise VerificationError(
            f"the ONNX file is not valid: {first_line(error)}", hint="please report it with the model"
        ) from error


def _move_into_place(folder: Path, path: Path) -> tuple[Path, ...]:
    """Put what was written in its place, the model last: it refers to the weights."""
    written = sorted(folder.iterdir(), key=lambda file: file.name == path.name)
    for file in written:
        os.replace(file, path.with_name(file.name))
    return tuple(path.with_name(file.name) for file in reversed(written))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the prints, warnings and log lines of the exporter."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


# ONNX Runtime against torch


def _verify_file(
    path: Path, inputs: Sequence[str], outputs: Sequence[str], cases: Sequence[Case], random: Sequence[str]
) -> tuple[OnnxRow, ...]:
    """Run a file in ONNX Runtime and compare it with what torch gave; raise where they differ."""
    session = _session(path)
    rows = []
    for case in cases:
        arrays = (tensor.contiguous().numpy() for tensor in case.inputs)
        found = _run(session, dict(zip(inputs, arrays, strict=True)), case.sizes)
        for name, wanted, got in zip(outputs, case.expected, found, strict=True):
            if name not in random:
                rows.append(_compare(name, case.sizes, wanted, got))
    for row in rows:
        if not row.ok:
            raise VerificationError(
                f"output {row.output} of the ONNX file differs from torch by {row.absolute:.2g} "
                f"(relative {row.relative:.2g}, accepted {row.tolerance:.2g}) at {_format(row.sizes)}",
                hint=_REPORT,
            )
    return tuple(rows)


def _session(path: Path) -> Any:
    options = SessionOptions()
    options.log_severity_level = 4
    try:
        return InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        no_kernel = type(error).__name__ == "NotImplemented"
        raise UnsupportedError(
            f"ONNX Runtime cannot run the model: {first_line(error)}",
            hint="its kernels are for float32 first: convert the model with .float()"
            if no_kernel
            else _REPORT,
        ) from error


def _run(session: Any, feed: Mapping[str, NDArray[Any]], sizes: Mapping[str, int]) -> list[NDArray[Any]]:
    try:
        return list(session.run(None, feed))
    except Exception as error:
        raise VerificationError(
            f"the ONNX file does not run at {_format(sizes)}: {first_line(error)}", hint=_REPORT
        ) from error


def _format(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items()) or "the traced sizes"


def _compare(output: str, sizes: Mapping[str, int], expected: Tensor, found: NDArray[Any]) -> OnnxRow:
    wanted = expected.numpy()
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        raise VerificationError(
            f"output {output} of the ONNX file is {found.dtype}{list(found.shape)} at {_format(sizes)}, "
            f"expected {wanted.dtype}{list(wanted.shape)}",
            hint=_REPORT,
        )
    a, b = wanted.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(a)
    largest = float(np.abs(a[finite]).max(initial=0.0))
    absolute = float("inf")
    if np.array_equal(finite, np.isfinite(b)) and np.array_equal(a[~finite], b[~finite], equal_nan=True):
        absolute = float(np.abs(a[finite] - b[finite]).max(initial=0.0))
    tolerance = TOLERANCES.get(expected.dtype, 0.0) * max(largest, FLOOR)
    return OnnxRow(output, dict(sizes), absolute, absolute / largest if largest else absolute, tolerance)
