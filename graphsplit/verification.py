"""Certificates: the numbers that prove a rewrite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphsplit.analysis import Analysis
from graphsplit.analysis.kinds import closing_nodes
from graphsplit.emission import emit, random_state
from graphsplit.graphs import copy_graph, node_arg
from graphsplit.plan import StatePlan
from graphsplit.program import Mode, Program, TensorMeta
from graphsplit.retarget import retarget_graph, without_noise
from graphsplit.signature import Outputs, Signature, as_call
from graphsplit.tracing import trace
from graphsplit.untouched import copies_of, set_tensors, untouched

aten = torch.ops.aten


def in_double(program: Program) -> Program:
    """The program in float64: state, and every dtype among the arguments of its ops."""

    graphs = tuple(retarget_graph(graph, _wide) for graph in program.graphs)
    state = dict(program.state)
    for name, entry in program.state.items():
        tensor = _double(entry.tensor).requires_grad_(entry.requires_grad)
        state[name] = replace(entry, tensor=tensor)
    inputs = tuple(replace(meta, dtype=_wide(meta.dtype)) for meta in program.signature.inputs)
    signature = replace(program.signature, inputs=inputs)
    return replace(program, graphs=graphs, state=state, signature=signature)


def quiet(program: Program) -> Program:
    """The program without noise; see `without_noise`."""
    return replace(program, graphs=tuple(without_noise(graph) for graph in program.graphs))


def drawn_state(program: Program, generator: torch.Generator) -> dict[str, Tensor]:
    """Random values of `random_state`, in the dtype of the program's own, and trained where those are."""
    return {
        name: value.to(program.state[name].tensor.dtype).requires_grad_(program.state[name].requires_grad)
        for name, value in random_state(program, generator).items()
    }


def _wide(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


def opened(program: Program) -> Program:
    """The program without its closing softmax or sigmoid."""
    return replace(program, graphs=tuple(_opened_graph(graph) for graph in program.graphs))


def _opened_graph(graph: fx.Graph) -> fx.Graph:
    closing = closing_nodes(graph)

    def scores(node: fx.Node) -> fx.Node | None:
        return node_arg(node) if node in closing else None

    return copy_graph(graph, scores)


BOUND = 1e-9


@dataclass(frozen=True)
class Example:
    """Inputs to verify with, and the user's model where there is one."""

    model: nn.Module | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def opened_model(
    model: nn.Module | Program, args: Any, kwargs: Mapping[str, Any] | None, outputs: Sequence[str] | None
) -> tuple[Program, Example | None]:
    """A user's module traced, or a program as it is, with the example inputs where there are any."""
    if not isinstance(model, Program):
        return trace(model, args, kwargs, outputs=outputs), Example(model, *as_call(args, kwargs))
    given = args != () or bool(kwargs)
    return model, Example(None, *as_call(args, kwargs)) if given else None


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        check: What was compared.
        error: Largest absolute difference, relative to the largest value where that is above one; for counts
            the number of violations.
        bound: What it may be at most; None where the number is for information.
        dtype: In which it was computed.
    """

    check: str
    error: float
    bound: float | None
    dtype: str

    @property
    def ok(self) -> bool:
        """True where the bound holds, or there is none."""
        return self.bound is None or self.error <= self.bound


@dataclass(frozen=True)
class Certificate:
    """The numbers that prove a partition.

    Attributes:
        rows: Every comparison that was made.
        dtype: In which merges were compared.
    """

    rows: tuple[Row, ...]
    dtype: str = "float64"

    @property
    def ok(self) -> bool:
        """True where every comparison with a bound holds, and there is one."""
        return all(row.ok for row in self.rows) and any(row.bound is not None for row in self.rows)

    @property
    def max_error(self) -> float:
        """Largest error among the comparisons with a bound."""
        return max((row.error for row in self.rows if row.bound is not None), default=math.nan)

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        rows = [{**asdict(row), "ok": row.ok} for row in self.rows]
        return {"ok": self.ok, "max_error": self.max_error, "dtype": self.dtype, "rows": rows}

    def __str__(self) -> str:
        lines = [f"certificate: {'ok' if self.ok else 'FAILED'}, largest error {self.max_error:.1e}"]
        for row in self.rows:
            bound = "" if row.bound is None else f" <= {row.bound:.0e} {'ok' if row.ok else 'FAILED'}"
            lines.append(f"  {row.check} ({row.dtype}): {row.error:.1e}{bound}")
        return "\n".join(lines)


def certify(
    analysis: Analysis,
    submodel: Callable[[int], Program],
    merge: Callable[[Sequence[Mapping[str, Tensor]], bool], Program],
    example: Example | None,
    trained: Sequence[Mapping[str, Tensor]] | None = None,
) -> Certificate:
    """Check a partition.

    Args:
        analysis: How the program was divided.
        submodel: Sub-model by number, as a program.
        merge: Merged program from state tensors, exact or not.
        example: Inputs; without them random ones are made from the signature.
        trained: State of sub-models to check with the values they have, too.
    """
    rows: list[Row] = []
    program, k = analysis.program, analysis.k
    if any(entry.tensor.device.type == "meta" for entry in program.state.values()):
        rows.append(_every_entry_once(analysis))
        return Certificate(tuple(rows))
    if example is not None and example.model is not None:
        rows += emitted_equals_model(program, example)
    programs = [in_double(submodel(part)) for part in range(k)]
    generator = torch.Generator().manual_seed(0)
    randoms = [random_own(program, analysis, generator) for program in programs]
    rows.append(_every_entry_once(analysis))
    rows += _places(analysis, randoms)
    inputs = flat_inputs(program.signature, example)
    batches = [("", inputs)]
    other = other_batch(program.signature, inputs)
    if other is not None:
        batches.append((", another batch size", other))
    exact, plain = in_double(merge(randoms, True)), in_double(merge(randoms, False))
    for label, tensors in batches:
        try:
            mean = _mean(programs, randoms, tensors)
        except Exception:  # torch raises errors of many types
            if tensors is inputs or _runs_on(in_double(program), tensors):
                raise
            continue  # the model itself takes no other batch with these inputs
        rows.append(_merge_row("exact merge = mean of the sub-models" + label, exact, mean, tensors))
        if tensors is inputs:
            row = _merge_row("plain merge against the mean", plain, mean, tensors)
            information = replace(row, bound=None)
    rows.append(information)
    if trained is not None:
        wide = [{name: _double(tensor) for name, tensor in state.items()} for state in trained]
        mean = _mean(programs, wide, inputs)
        merged = in_double(merge(wide, True))
        rows.append(_merge_row("exact merge of the given weights", merged, mean, inputs))
    return Certificate(tuple(rows))


def random_own(program: Program, analysis: Analysis, generator: torch.Generator) -> dict[str, Tensor]:
    """Random values for what a sub-model has for itself; common buffers keep theirs."""
    drawn = random_state(program, generator)
    own = {plan.name for plan in analysis.plan.state if plan.merge != "common"}
    values = {name: _double(entry.tensor) for name, entry in program.state.items()}
    return values | {name: value for name, value in drawn.items() if name in own}


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to(_wide(tensor.dtype))


def _mean(
    programs: Sequence[Program], states: Sequence[Mapping[str, Tensor]], inputs: Sequence[Tensor]
) -> list[Tensor]:
    """Mean of the sub-models' outputs."""
    totals: list[Tensor] = []
    for program, state in zip(programs, states, strict=True):
        outputs = _run(program.with_state(state), inputs)
        totals = [a + b for a, b in zip(totals, outputs, strict=True)] if totals else outputs
    return [total / len(programs) for total in totals]


def _runs_on(program: Program, inputs: Sequence[Tensor]) -> bool:
    """Does a program run on these inputs?"""
    try:
        _run(program, inputs)
    except Exception:
        return False
    return True


def _merge_row(check: str, merged: Program, mean: Sequence[Tensor], inputs: Sequence[Tensor]) -> Row:
    found = _run(merged, inputs)
    errors = [relative_error(value, expected) for value, expected in zip(found, mean, strict=True)]
    return Row(check, max(errors, default=math.inf), BOUND, "float64")


def _run(program: Program, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Floating-point outputs before a closing softmax or sigmoid, in eval mode and without noise."""
    buffers = {name: entry.tensor.clone() for name, entry in program.state.items() if entry.kind == "buffer"}
    module = emit(opened(quiet(program.with_state(buffers))), copy=False).eval()
    with torch.no_grad():
        outputs = module.run_flat(inputs)
    return [
        value.double() for value in outputs if isinstance(value, Tensor) and value.dtype.is_floating_point
    ]


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Largest difference, relative to the largest entry if above one; infinite where only one is finite."""
    value, reference = value.detach(), reference.detach()
    if value.shape != reference.shape:
        return math.inf
    if not value.numel():
        return 0.0
    if not value.is_complex():
        value, reference = value.double(), reference.double()
    same = (value == reference) | (torch.isnan(value) & torch.isnan(reference))
    difference = torch.where(same, 0.0, (value - reference).abs().double())
    if bool(torch.isnan(difference).any()):
        return math.inf
    finite = reference[torch.isfinite(reference)]
    scale = max(1.0, float(finite.abs().max()) if finite.numel() else 1.0)
    return float(difference.max()) / scale


def _every_entry_once(analysis: Analysis) -> Row:
    """Entries of parameters that are in no sub-model or, but for shared ones, in several: none, by the plan.

    A weight between units of two sub-models is a cross weight and in none of them. Counted here are entries
    whose units all belong to one sub-model and that it lacks.
    """
    violations = 0
    for plan in analysis.plan.state:
        if plan.kind != "parameter" or plan.merge == "common":
            continue
        for size, indices in plan.indices_of_all(analysis.k):
            counts = torch.zeros(size, dtype=torch.int64)
            for index in indices:
                counts[torch.tensor(index)] += 1
            # Along one dimension an index is in exactly one sub-model, or in all of them.
            violations += int(((counts != 1) & (counts != analysis.k)).sum())
    return Row("every unit is in exactly one sub-model, or shared by all", float(violations), 0.0, "counts")


def _places(analysis: Analysis, states: Sequence[Mapping[str, Tensor]]) -> list[Row]:
    """Merge every tensor and slice it again: each sub-model finds its own values and nothing else."""
    back = 0.0
    left = 0
    for plan in analysis.plan.state:
        if plan.kind != "parameter" or plan.merge != "place":
            continue
        merged = plan.merge_tensors([state[plan.name] for state in states], duplicate=False)
        rest = merged.clone()
        for part, state in enumerate(states):
            found = plan.slice(merged, part)
            if found.numel():
                back = max(back, float((found - state[plan.name] * plan.scale).abs().max()))
            _clear(plan, rest, part)
        left += int(torch.count_nonzero(rest))
    return [
        Row("every weight is in its place", back, 0.0, "float64"),
        Row("cross weights that are not zero", float(left), 0.0, "counts"),
    ]


def _clear(plan: StatePlan, tensor: Tensor, part: int) -> None:
    index = plan.grid(part, tensor.device)
    if index is None:
        tensor.zero_()
    else:
        tensor[index] = 0


def emitted_equals_model(program: Program, example: Example) -> list[Row]:
    """The traced program against the user's module, in both modes: outputs, buffers and gradients."""
    model = example.model
    assert model is not None
    dtype = str(next((p.dtype for p in model.parameters()), torch.float32)).removeprefix("torch.")
    rows = []
    modes: tuple[Mode, ...] = ("eval", "train")
    for mode in modes:
        call = (example.args, example.kwargs)
        try:
            ran = _called(model, call, mode)
        except ValueError:  # a batch norm refuses to train on one example: as it was traced, then
            call = _as_traced(program.signature, example)
            ran = _called(model, call, mode)
        args, kwargs = pytree.tree_map(_own, call)
        module = emit(program).train(mode == "train")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found = module(*args, **kwargs)
        outputs = program.signature.outputs[0 if mode == "train" else -1]
        error = tree_error(outputs, found, ran.outputs)
        for name, ours in module.named_buffers():
            if name in ran.buffers:
                error = max(error, relative_error(ours.double(), ran.buffers[name].double()))
        rows.append(Row(f"K = 1 emitted equals the model ({mode})", error, tolerance(dtype), dtype))
        error = _gradient_error(outputs, ran.leaves, ran.outputs, dict(module.named_parameters()), found)
        rows.append(Row(f"K = 1 gradients equal the model's ({mode})", error, tolerance(dtype), dtype))
    return rows


class _Called(NamedTuple):
    """What a model gave, the copies of its tensors that it was called with, and its buffers afterwards."""

    outputs: Any
    leaves: dict[str, Tensor]
    buffers: dict[str, Tensor]


def _called(model: nn.Module, call: Any, mode: Mode) -> _Called:
    leaves = copies_of(model)
    args, kwargs = pytree.tree_map(_own, call)
    with untouched(model):
        set_tensors(model.train(mode == "train"), leaves)
        torch.manual_seed(0)
        return _Called(model(*args, **kwargs), leaves, dict(model.named_buffers()))


def _as_traced(signature: Signature, example: Example) -> Any:
    """The example's inputs in the traced sizes: two examples where one was given."""
    found = iter(flat_inputs(signature, example))
    call = (example.args, example.kwargs)
    return pytree.tree_map_only(Tensor, lambda tensor: next(found).to(tensor.device, tensor.dtype), call)


def _kept(outputs: Outputs, expected: Any) -> list[Any]:
    """Leaves of the user's outputs that the program gives, too."""
    leaves = pytree.tree_leaves(expected)
    return [leaves[place] for place, leaf in enumerate(outputs.leaves) if isinstance(leaf, int)]


def _gradient_error(
    outputs: Outputs, theirs: Mapping[str, Tensor], expected: Any, ours: Mapping[str, Tensor], found: Any
) -> float:
    """Largest error of the gradients of a fixed random projection of the outputs."""
    reference = projected_gradients(_kept(outputs, expected), theirs)
    values = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]
    own = projected_gradients(values, ours)
    error = 0.0
    for name, gradient in reference.items():
        if name in own:
            error = max(error, relative_error(own[name].double(), gradient.double()))
    return error


def projected_gradients(
    values: Sequence[Any], state: Mapping[str, Tensor], *, stacked: bool = False
) -> dict[str, Tensor]:
    """Gradients of a fixed random projection of the outputs; zeros where there are none.

    With ``stacked`` outputs have a leading dimension of models, which all have the same projection.
    """
    generator = torch.Generator().manual_seed(2)
    total: Tensor | None = None
    for value in values:
        if isinstance(value, Tensor) and value.requires_grad and value.dtype.is_floating_point:
            shape = value.shape[1:] if stacked else value.shape
            weight = torch.randn(shape, generator=generator, dtype=torch.float64).to(value)
            term = (value * weight).sum()
            total = term if total is None else total + term
    names = [name for name, tensor in state.items() if tensor.requires_grad]
    if total is None or not names:
        return {name: torch.zeros_like(state[name]) for name in names}
    found: Sequence[Tensor | None] = torch.autograd.grad(
        total, [state[name] for name in names], allow_unused=True
    )
    return {
        name: torch.zeros_like(state[name]) if gradient is None else gradient
        for name, gradient in zip(names, found, strict=True)
    }


def tree_error(outputs: Outputs, found: Any, expected: Any) -> float:
    """Largest error over the outputs that were kept."""
    theirs = _kept(outputs, expected)
    ours = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]
    if len(ours) != len(theirs):
        return math.inf
    return max((relative_error(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def tolerance(dtype: str) -> float:
    """Rounding that an eager re-run may show; the emitted graph calls the same kernels in the same order."""
    return {"float64": 1e-12, "float32": 1e-6}.get(dtype, 1e-2)


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def flat_inputs(signature: Signature, example: Example | None) -> list[Tensor]:
    """Inputs in float64: the example's, or random ones of the traced sizes.

    Where all of its examples are one and the same (one that was doubled for the trace, a batch of zeros),
    those after the first are varied; see `other_batch`.
    """
    if example is not None:
        leaves = pytree.tree_leaves((example.args, example.kwargs))
        tensors = [_double(leaf).cpu() for leaf in leaves if isinstance(leaf, Tensor)]
        cycled = [_cycle(tensor, meta.shape) for tensor, meta in zip(tensors, signature.inputs, strict=True)]
        return _varied(signature, cycled)
    generator = torch.Generator().manual_seed(1)
    return [random_input(meta, generator) for meta in signature.inputs]


def random_input(meta: TensorMeta, generator: torch.Generator) -> Tensor:
    """A random tensor for an input: normal, or 0 and 1 for integers and booleans."""
    if meta.dtype.is_floating_point:
        return torch.randn(meta.shape, generator=generator, dtype=torch.float64)
    return torch.randint(0, 2, meta.shape, generator=generator).to(meta.dtype)


def other_batch(signature: Signature, inputs: Sequence[Tensor]) -> list[Tensor] | None:
    """Other inputs with one example more; None where the batch is fixed.

    Equal examples are bad evidence: batch norms that see nothing but the batch divide by the spread between
    them, and what they multiply cancels in the gradients of weights, so that rounding is all that is left.
    Examples of floating-point inputs are therefore mixed, two by two. What holds for every example and its
    mixtures holds for the new ones, too: bounds, signs, orders, sums. Integers, booleans and what has at most
    two values (masks, one-hot rows) have no mixtures; they are repeated.
    """
    symbols = _batch_symbols(signature)
    if not symbols:
        return None
    generator = torch.Generator().manual_seed(3)
    grown = []
    for tensor, meta in zip(inputs, signature.inputs, strict=True):
        shape = tuple(d.hint + 1 if d.symbol in symbols else d.hint for d in meta.dims)
        dim = _batch_dim(meta, symbols)
        if dim is None or _is_flag(tensor) or _is_repeated(tensor, dim):
            grown.append(_cycle(tensor, shape))
        else:
            grown.append(_mixed(tensor, dim, shape[dim], generator))
    return grown


def _batch_symbols(signature: Signature) -> set[str]:
    return {
        dim.symbol
        for meta in signature.inputs
        for dim in meta.dims
        if dim.symbol and dim.symbol.isidentifier()
    }


def _batch_dim(meta: TensorMeta, symbols: set[str]) -> int | None:
    """The dimension of the examples, where there is one, and one only."""
    found = [place for place, dim in enumerate(meta.dims) if dim.symbol in symbols]
    return found[0] if len(found) == 1 else None


def _is_flag(tensor: Tensor) -> bool:
    """Is it of integers or booleans, or of at most two different values, as masks and one-hot rows are?"""
    if not tensor.dtype.is_floating_point or not tensor.numel():
        return True
    flat = tensor.reshape(-1)
    others = flat[flat != flat[0]]
    return bool((others == others[:1]).all())


def _is_repeated(tensor: Tensor, dim: int) -> bool:
    """Are all examples the same?"""
    first = tensor.narrow(dim, 0, 1)
    return bool(((tensor == first) | (tensor.isnan() & first.isnan())).all())


def _mixed(tensor: Tensor, dim: int, size: int, generator: torch.Generator) -> Tensor:
    """Mixtures of two examples each, of which one has the larger share."""
    count = tensor.shape[dim]
    one = torch.arange(size) % count
    step = torch.randint(1, max(count, 2), (size,), generator=generator)
    share = 0.5 + 0.45 * torch.rand(size, generator=generator, dtype=torch.float64)
    share = share.reshape([-1 if place == dim else 1 for place in range(tensor.dim())])
    # No difference of the two: infinities, as in masks that are added, would give no number.
    other = (one + step) % count
    return share * tensor.index_select(dim, one) + (1 - share) * tensor.index_select(dim, other)


def _varied(signature: Signature, inputs: list[Tensor]) -> list[Tensor]:
    """Inputs of which not all examples are the same, where there are floating-point ones to vary.

    Their entries are made smaller by random factors of at least one half, which leaves signs, zeros and most
    bounds as they are. Masks and the like are varied only where the model has no other inputs.
    """
    symbols = _batch_symbols(signature)
    dims = [_batch_dim(meta, symbols) for meta in signature.inputs]
    pairs = [(tensor, dim) for tensor, dim in zip(inputs, dims, strict=True) if dim is not None]
    if not all(_is_repeated(tensor, dim) for tensor, dim in pairs):
        return inputs
    flags = all(_is_flag(tensor) for tensor, _ in pairs)
    if flags and not all(tensor.dtype.is_floating_point for tensor in inputs):
        return inputs
    generator = torch.Generator().manual_seed(4)
    return [
        tensor if dim is None or (not flags and _is_flag(tensor)) else _shrunk(tensor, dim, generator)
        for tensor, dim in zip(inputs, dims, strict=True)
    ]


def _shrunk(tensor: Tensor, dim: int, generator: torch.Generator) -> Tensor:
    """The first example as it is, the others' entries times factors in 0.5 to 1; zeros alone grow instead."""
    factors = 0.5 + 0.5 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    factors.narrow(dim, 0, 1).fill_(1.0)
    return tensor * factors if bool(tensor.any()) else 1 - factors


def _cycle(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Repeat entries along each dimension until the sizes are reached."""
    for dim, size in enumerate(shape):
        if tensor.shape[dim] != size:
            tensor = tensor.index_select(dim, torch.arange(size) % tensor.shape[dim])
    return tensor


# -- programs, forward and backward --------------------------------------------------------------------------


@dataclass
class Ran:
    """What a forward and a backward pass leave."""

    outputs: list[Any]
    buffers: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]


def run_chain(
    programs: Sequence[Program], inputs: Sequence[Tensor], mode: Mode, *, stacked: bool = False
) -> Ran:
    """Programs one after the other, under one seed; for ``stacked`` see `projected_gradients`."""
    modules = [emit(program).train(mode == "train") for program in programs]
    values: Sequence[Any] = inputs
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for module in modules:
            values = module.run_flat(values)
    state: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    for module in modules:
        state = dict(module.named_parameters()) | state
        buffers = dict(module.named_buffers()) | buffers
    return Ran(list(values), buffers, projected_gradients(values, state, stacked=stacked))


def outputs_error(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """Largest `relative_error`; infinite where something is missing, or no tensor and not equal."""
    if len(found) != len(expected):
        return math.inf
    return max((_difference(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)


def _difference(found: Any, expected: Any) -> float:
    if isinstance(expected, Tensor):
        return relative_error(found, expected) if isinstance(found, Tensor) else math.inf
    return 0.0 if found == expected else math.inf


def tensors_error(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], without: set[str] | None = None
) -> float:
    """Largest difference over the tensors of one name; infinite where one is missing."""
    names = expected.keys() - (without or set())
    if not names <= found.keys():
        return math.inf
    return max((_difference(found[name], expected[name]) for name in names), default=0.0)
