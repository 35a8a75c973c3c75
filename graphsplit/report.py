"""Facts about a division, as plain data: JSON can hold it, and the command line shows it to people.

Everything is in the order of the model's own state, so that two runs give the same report. Where tensors
differ only in a number of their name (the layers of a Transformer), a *pattern* stands for all of them:
``h.*.mlp.c_fc.weight``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import torch
from torch import fx

from graphsplit.analysis import Analysis
from graphsplit.analysis.inference import output_nodes
from graphsplit.analysis.kinds import Kind
from graphsplit.plan import AxisPlan, PartitionPlan, StatePlan
from graphsplit.program import TRAINING, Program, TensorMeta, meta_of, op_name, source_of

if TYPE_CHECKING:
    from graphsplit._api import Partition
    from graphsplit.verification import Certificate

Item = TypeVar("Item")


class Place(TypedDict):
    """A dimension of a state tensor."""

    tensor: str
    dim: int
    size: int


class Axis(TypedDict):
    """Units that are divided together. ``per_submodel`` is empty where ``kept_whole`` gives a reason."""

    name: str
    units: int
    per_submodel: list[int]
    kept_whole: str | None
    places: list[Place]


class Group(TypedDict):
    """Axes that are alike but for numbers in their names.

    ``name`` is the pattern of the first dimension in which the units occur, ``size`` the size of that
    dimension, and ``coupled`` the patterns of the other dimensions of parameters that have the same units.
    """

    name: str
    size: int
    axes: int
    units: int
    per_submodel: list[int]
    kept_whole: str | None
    coupled: list[str]


class Value(TypedDict):
    """An input or an output."""

    name: str
    dtype: str
    shape: list[int | str]


class SharedDim(TypedDict):
    """A dimension of parameters of which ``size`` entries, all of them as a rule, are in every sub-model."""

    name: str
    size: int


class Replicated(TypedDict):
    """Parameters of which every sub-model has a copy of its own."""

    name: str
    tensors: int
    shape: list[int]
    reason: str


class Shared(TypedDict):
    """What all sub-models have."""

    inputs: list[Value]
    outputs: list[Value]
    dims: list[SharedDim]
    replicated: list[Replicated]


class Op(TypedDict):
    """Ops from one line of code; ``module`` is a pattern where the line serves several modules."""

    op: str
    count: int
    module: str
    file: str
    line: int
    code: str
    reason: str


class Submodel(TypedDict):
    """Size of a sub-model, also as a fraction of the full model's."""

    parameters: int
    fraction: float


class ModelReport(TypedDict):
    """What there is to divide, and what every sub-model gets."""

    tool: dict[str, str]
    model: str
    parameters: int
    k: int
    submodels: list[Submodel]
    axes: list[Axis]
    groups: list[Group]
    shared: Shared
    duplicated: list[Op]
    cannot_split: list[Op]
    notes: list[str]


class PartitionReport(ModelReport):
    """The same with the proof and the time it took, in seconds."""

    certificate: dict[str, Any] | None
    timings: dict[str, float]


def model_report(analysis: Analysis) -> ModelReport:
    """What is known of a model that is to be divided, and of the parts."""
    axes = _axes(analysis.plan)
    return ModelReport(
        tool=_tool(),
        model=analysis.program.name,
        parameters=analysis.plan.full_parameter_count(),
        k=analysis.k,
        submodels=_submodels(analysis.plan),
        axes=axes,
        groups=_groups(analysis.plan, axes),
        shared=_shared(analysis),
        duplicated=_duplicated(analysis),
        cannot_split=_cannot_split(analysis),
        notes=_notes(analysis),
    )


def partition_report(
    partition: Partition, certificate: Certificate | None = None, timings: Mapping[str, float] | None = None
) -> PartitionReport:
    """`model_report` with the certificate, where there is one, and the seconds that each step took."""
    return PartitionReport(
        **model_report(partition.analysis),
        certificate=None if certificate is None else certificate.to_data(),
        timings=dict(timings or {}),
    )


def _tool() -> dict[str, str]:
    import graphsplit

    return {"graphsplit": graphsplit.__version__, "torch": str(torch.__version__)}


def _submodels(plan: PartitionPlan) -> list[Submodel]:
    full = max(plan.full_parameter_count(), 1)
    return [Submodel(parameters=count, fraction=count / full) for count in plan.parameter_counts()]


# Axes


def _axes(plan: PartitionPlan) -> list[Axis]:
    """All axes, each named by the first dimension that its units occur in, in the order of the state."""
    order = {state.name: number for number, state in enumerate(plan.state)}
    shapes = {state.name: state.shape for state in plan.state}

    def places(axis: AxisPlan) -> list[Place]:
        found = [_place(text) for text in axis.places]
        found.sort(key=lambda place: (order[place[0]], place[1]))
        return [Place(tensor=name, dim=dim, size=shapes[name][dim]) for name, dim in found]

    rows = []
    for axis in plan.axes:
        where = places(axis)
        rows.append(
            Axis(
                name=_dim_name(where[0]) if where else axis.name,
                units=axis.size,
                per_submodel=list(axis.counts),
                kept_whole=None if axis.counts else f"fewer units than K = {plan.k}",
                places=where,
            )
        )
    rows.sort(key=lambda row: [(order[place["tensor"]], place["dim"]) for place in row["places"]])
    return rows


def _place(text: str) -> tuple[str, int]:
    name, _, dim = text.rpartition("[")
    return name, int(dim.rstrip("]"))


def _dim_name(place: Place) -> str:
    return f"{place['tensor']}[{place['dim']}]"


def _groups(plan: PartitionPlan, axes: Sequence[Axis]) -> list[Group]:
    """Axes of the same size that occur in the same places, but for numbers in names."""
    parameters = {state.name for state in plan.state if state.kind == "parameter"}
    named = [
        [_dim_name(p) for p in axis["places"] if p["tensor"] in parameters] or [axis["name"]] for axis in axes
    ]
    keys = [
        (axis["units"], *axis["per_submodel"], *sorted(map(_starred, names)))
        for axis, names in zip(axes, named, strict=True)
    ]
    groups = []
    for members in _grouped(range(len(axes)), lambda number: keys[number]):
        axis = axes[members[0]]
        first = pattern([named[number][0] for number in members])
        others = patterns(name for number in members for name in named[number][1:])
        groups.append(
            Group(
                name=first,
                size=axis["places"][0]["size"] if axis["places"] else axis["units"],
                axes=len(members),
                units=axis["units"],
                per_submodel=axis["per_submodel"],
                kept_whole=axis["kept_whole"],
                coupled=[name for name in others if name != first],
            )
        )
    return groups


# Patterns


def _starred(name: str) -> str:
    """The name with a star for every number that is a component of its path.

    >>> _starred("h.11.mlp.conv2d.weight[0]")
    'h.*.mlp.conv2d.weight[0]'
    """
    return re.sub(r"(?<![^.])\d+(?![^.\[])", "*", name)


def pattern(names: Sequence[str]) -> str:
    """One name for names that are alike but for numbers in their path.

    >>> pattern(["stage.2.block.0.weight", "stage.2.block.1.weight"])
    'stage.2.block.*.weight'
    """
    columns = zip(*(name.split(".") for name in names), strict=True)
    parts = []
    for column in columns:
        suffix = re.sub(r"^\d+", "", column[0])
        parts.append(column[0] if len(set(column)) == 1 else f"*{suffix}")
    return ".".join(parts)


def patterns(names: Iterable[str]) -> list[str]:
    """As few names as possible, in the order of the given ones, that stand for no others of the same numbers.

    >>> patterns(["h.0.a.weight", "h.0.b.weight", "h.1.a.weight", "h.1.b.weight"])
    ['h.*.a.weight', 'h.*.b.weight']
    >>> patterns(["0.1.weight", "0.2.weight", "1.0.weight"])
    ['0.*.weight', '1.0.weight']
    """
    return [name for members in _grouped(dict.fromkeys(names), _starred) for name in _covering(members)]


def _covering(names: list[str]) -> list[str]:
    """One pattern where the names have all combinations of their numbers, else patterns by first number."""
    columns = [dict.fromkeys(column) for column in zip(*(name.split(".") for name in names), strict=True)]
    if math.prod(map(len, columns)) == len(names):
        return [pattern(names)]
    first = next(number for number, column in enumerate(columns) if len(column) > 1)
    apart = _grouped(names, lambda name: name.split(".")[first])
    return [name for members in apart for name in _covering(members)]


def _grouped(items: Iterable[Item], key: Callable[[Item], Hashable]) -> list[list[Item]]:
    """Items of the same key, in the order in which each key is first seen."""
    found: dict[Hashable, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return list(found.values())


# What is shared


def _shared(analysis: Analysis) -> Shared:
    return Shared(
        inputs=input_values(analysis.program),
        outputs=output_values(analysis.program),
        dims=_shared_dims(analysis),
        replicated=_replicated(analysis),
    )


def input_values(program: Program) -> list[Value]:
    """The inputs, one for each placeholder, by the names that the user knows."""
    signature = program.signature
    names = [_input_name(name, signature.parameter_names) for name in signature.input_names]
    batch = batch_symbol(program)
    return [_value(name, meta, batch) for name, meta in zip(names, signature.inputs, strict=True)]


def batch_symbol(program: Program) -> str | None:
    """The symbol of the batch: the first that is the size of an input's first dimension."""
    symbols = (meta.dims[0].symbol for meta in program.signature.inputs if meta.dims)
    return next((symbol for symbol in symbols if symbol is not None), None)


def _input_name(path: str, parameters: Sequence[str]) -> str:
    """``args[0]`` by the name of the parameter, ``kwargs['mask']`` by its keyword."""
    found = re.match(r"(args|kwargs)\[(?:(\d+)|'([^']*)')\]", path)
    if found is None:
        return path
    rest = path[found.end() :]
    if found[3] is not None:
        return found[3] + rest
    position = int(found[2])
    return (parameters[position] if position < len(parameters) else f"input {position}") + rest


def output_values(program: Program) -> list[Value]:
    """The outputs that are tensors, in order."""
    values = []
    batch = batch_symbol(program)
    for name, node in zip(program.signature.outputs[-1].names, output_nodes(program.graph()), strict=True):
        meta = node.meta.get("value") if isinstance(node, fx.Node) else None
        key = re.fullmatch(r"output(?:\.(\w+)|\['([^']*)'\])", name)
        if isinstance(meta, TensorMeta):
            values.append(_value((key[1] or key[2]) if key else name, meta, batch))
    return values


def _value(name: str, meta: TensorMeta, batch: str | None) -> Value:
    shape = [
        dim.hint if dim.symbol is None else "batch" if dim.symbol == batch else dim.symbol
        for dim in meta.dims
    ]
    return Value(name=name, dtype=str(meta.dtype).removeprefix("torch."), shape=shape)


def _shared_dims(analysis: Analysis) -> list[SharedDim]:
    """Dimensions of parameters that no axis has: of inputs, of outputs, and of what is coupled with those.

    The kernel sizes of convolutions are left out.
    """
    convolved = _convolved(analysis.program)
    found = []
    for plan in _parameters(analysis.plan):
        if plan.merge == "stack":
            continue
        for dim, ids in enumerate(analysis.inference.state[plan.name]):
            if plan.shape[dim] > 1 and not (plan.name in convolved and dim > 1):
                size = plan.shape[dim] if ids is None else int((analysis.assignment.axis[ids] < 0).sum())
                if size:
                    found.append((f"{plan.name}[{dim}]", size))
    sizes = _grouped(found, lambda item: (_starred(item[0]), item[1]))
    return [
        SharedDim(name=name, size=group[0][1])
        for group in sizes
        for name in patterns(name for name, _ in group)
    ]


def _convolved(program: Program) -> set[str]:
    """Names of the weights of convolutions."""
    convolutions = [node for node in program.nodes() if "conv" in op_name(node) and len(node.args) > 1]
    weights = [node.args[1] for node in convolutions]
    return {
        str(weight.target) for weight in weights if isinstance(weight, fx.Node) and weight.op == "get_attr"
    }


def _parameters(plan: PartitionPlan) -> list[StatePlan]:
    return [state for state in plan.state if state.kind == "parameter"]


def _replicated(analysis: Analysis) -> list[Replicated]:
    users: dict[str, set[fx.Node]] = {}
    for node in analysis.program.nodes():
        if node.op == "get_attr" and node.target != TRAINING:
            users.setdefault(str(node.target), set()).update(node.users)
    found = [
        (plan.name, plan.shape, _why_replicated(analysis, plan, users.get(plan.name, set())))
        for plan in _parameters(analysis.plan)
        if plan.merge == "stack"
    ]
    groups = _grouped(found, lambda item: (_starred(item[0]), *item[1:]))
    return [
        Replicated(
            name=pattern([name for name, *_ in group]),
            tensors=len(group),
            shape=list(group[0][1]),
            reason=group[0][2],
        )
        for group in groups
    ]


def _why_replicated(analysis: Analysis, plan: StatePlan, users: set[fx.Node]) -> str:
    if not users:
        return "not used by the traced call"
    if any(cut is not None for cut in plan.cuts):
        return "some of its entries belong to several sub-models"
    values = users | {
        operand for user in users for operand in user.all_input_nodes if operand.op != "get_attr"
    }
    if any(analysis.kinds.kind[value] is Kind.OWN for value in values):
        return "used on values that differ between sub-models"
    return "applied over a dimension without units"


# Ops


def _duplicated(analysis: Analysis) -> list[Op]:
    """Ops that an exact merge computes once for each sub-model."""
    apart = (node for node in analysis.kinds.apart if node.op == "call_function")
    return _ops(analysis.program, {node: "" for node in apart if op_name(node) != "operator.getitem"})


def _cannot_split(analysis: Analysis) -> list[Op]:
    """Ops that keep the units of their operands together, because there is no finer rule."""
    facts = analysis.inference.facts
    return _ops(analysis.program, {node: f.whole for node, f in facts.items() if f.whole is not None})


def _ops(program: Program, reasons: Mapping[fx.Node, str]) -> list[Op]:
    """The ops with their reasons; in a model with two graphs those of the one that has more of them."""
    graphs = [[node for node in graph.nodes if node in reasons] for graph in program.graphs]
    nodes = max(graphs, key=len, default=[])

    def place(node: fx.Node) -> tuple[str, str, int, str, str]:
        source = source_of(node)
        return op_label(node), source.file, source.line, _starred(source.module), reasons[node]

    rows = []
    for group in _grouped(nodes, place):
        source = source_of(group[0])
        rows.append(
            Op(
                op=op_label(group[0]),
                count=len(group),
                module=pattern([source_of(node).module for node in group]),
                file=source.file,
                line=source.line,
                code=source.code,
                reason=reasons[group[0]],
            )
        )
    return rows


def op_label(node: fx.Node) -> str:
    """``layer_norm`` for ``layer_norm.default``."""
    return op_name(node).removeprefix("operator.").partition(".")[0]


def _notes(analysis: Analysis) -> list[str]:
    program = analysis.program
    notes = list(program.notes)
    for graph, outputs in zip(program.graphs, program.signature.outputs, strict=True):
        for node, name in zip(output_nodes(graph), outputs.names, strict=True):
            if isinstance(node, fx.Node) and analysis.lacks_mean(node):
                note = (
                    f"{name} is of type {meta_of(node).dtype} and differs between the sub-models: it has no "
                    "mean, so that they cannot be verified or merged (outputs= names those to keep)"
                )
                notes += [note] if note not in notes else []
    if program.branches_on_training:
        notes.append("training and evaluation take different ways through the model's Python: both are kept")
    return notes


def finite(value: Any) -> Any:
    """The same data with infinities and NaN, which JSON has no numbers for, as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
