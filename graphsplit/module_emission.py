"""Sub-models in the user's own classes: narrower layers in a copy of the user's module tree.

Before, for K = 2::

    Block(heads=4, qkv=Linear(32, 96), out=Linear(32, 32))

After, for each sub-model, with the weights that its graph form has::

    Block(heads=2, qkv=Linear(16, 48), out=Linear(16, 16))

Sizes of torch's own layers follow from their weights. For whole numbers that the user's modules and
configurations hold (``num_heads``, ``hidden_size``) new values are proposed, read off the dimensions and
literals of the graphs of the same module. None is taken on trust: each module is compared with its graph form
in float64, with random values, in both modes and at two batch sizes, and where no proposal makes it equal it
is refused. Where the class is built from a configuration, as those of transformers are, the narrower one has
to build the same module again, so that what ``save_pretrained`` writes can be read; where none does, a
warning says so.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from graphsplit.analysis import Analysis
from graphsplit.emission import ProgramModule, emit
from graphsplit.errors import UnsupportedError, first_line
from graphsplit.program import Mode, Program, TensorMeta, source_of
from graphsplit.retarget import place_of
from graphsplit.signature import Outputs
from graphsplit.untouched import set_tensors, tensors_by_all_names, untouched
from graphsplit.verification import (
    BOUND,
    Example,
    flat_inputs,
    in_double,
    other_batch,
    random_own,
    relative_error,
    tree_error,
)

TRIALS = 200
"""Runs of a sub-model that the search for its whole numbers may take."""

WIDTH = re.compile(
    r"hidden|embed|embd|dim|head|chan|width|inner|inter|ffn|ff|d_|n_|model|feature|group|filter|plane|size|"
    r"units|split|proj|out|in_",
    re.IGNORECASE,
)
"""Names of whole numbers that count units: these take their new value first."""

NOT_WIDTH = re.compile(
    r"vocab|kernel|image|patch|window|batch|output_size|stride|pad|dilation|layer|depth|block|position|length|"
    r"label|token|_id|idx|index|seed|class|bucket|max_|expert|frame|epoch|beam|start_dim|end_dim|^dim$|axis|"
    r"_len|factor|version",
    re.IGNORECASE,
)
"""Names of whole numbers that count something else: these keep their value."""

CONFIGURATIONS = 32
"""Configurations to try for one that builds a sub-model again."""

COMBINATIONS = 16
"""Proposals for a tuple of whole numbers."""

Form = Literal["graph", "module"]
FORMS: tuple[Form, ...] = get_args(Form)


def emit_modules(analysis: Analysis, programs: Sequence[Program], example: Example) -> list[nn.Module]:
    """The sub-models as instances of the user's own class.

    Each is a copy of the user's module whose parameters and buffers are those of its program, tied ones under
    all their names, and whose layers and attributes have the sizes that fit. The user's module is not
    changed, and its weights are not copied.

    Args:
        analysis: How the model was divided.
        programs: The sub-models in graph form.
        example: The user's module, and inputs to compare with.

    Returns:
        A module for each program, in train mode.

    Raises:
        UnsupportedError: The Python code of the module does not allow it; the message names the first module
            that differs from the graph form, and why.

    Warns:
        UserWarning: The configuration of a sub-model builds another one, so that it has to be kept as a state
            dict and a plan.
    """
    model = example.model
    assert model is not None
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise UnsupportedError(
            "a model without weights cannot be compared with its graph form",
            hint='load the weights before, or use emit="graph"',
        )
    emitted: list[nn.Module] = []
    values: dict[_Key, Any] = {}
    for part, program in enumerate(programs):
        module = _narrowed(model, program)
        numbers = _numbers(module, model, analysis.program, program)
        for number in numbers:
            number.value = values.get(number.key, number.value)
        check = _Check(analysis, part, program, example)
        _settle(module, numbers, check)
        _settle_configuration(module, numbers, check)
        values.update({number.key: number.value for number in numbers})
        emitted.append(module.train())
    return emitted


def _narrowed(model: nn.Module, program: Program) -> nn.Module:
    """A copy of the module with the program's tensors in place of its own."""
    named = tensors_by_all_names(model)
    memo: dict[int, Any] = {}
    for entry in program.state.values():
        tensor = entry.tensor.detach().clone()
        value = nn.Parameter(tensor, entry.requires_grad) if entry.kind == "parameter" else tensor
        memo.update({id(named[name]): value for name in (entry.name, *entry.aliases) if name in named})
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise UnsupportedError(
            f"{type(model).__name__} cannot be copied: {type(error).__name__}: {first_line(error)}",
            hint='use emit="graph"',
        ) from error


# Sizes that follow from weights


def layer_sizes(module: Any) -> dict[str, Any]:
    """Attributes of a known layer that its weights determine; none for a layer that is not known."""
    weight = getattr(module, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else ()
    if isinstance(module, nn.MultiheadAttention):
        return _attention_sizes(module)
    if isinstance(module, nn.RNNBase):
        return _recurrent_sizes(module)
    if isinstance(module, nn.RNNCellBase):
        return {"hidden_size": module.weight_hh.shape[1], "input_size": module.weight_ih.shape[1]}
    if isinstance(module, nn.modules.conv._ConvNd) and shape:
        inner, outer = (0, 1) if module.transposed else (1, 0)
        counts = [shape[0], shape[1] * module.groups]
        return {"in_channels": counts[inner], "out_channels": counts[outer]}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        vector = weight if weight is not None else module.running_mean
        return {} if vector is None else {"num_features": vector.shape[0]}
    for kinds, names in _SIZES:
        if isinstance(module, kinds) and shape:
            return (
                {names[0]: shape} if names == ("normalized_shape",) else dict(zip(names, shape, strict=True))
            )
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx"):  # transformers
        return {"nx": shape[0], "nf": shape[1]}
    return {}


_SIZES: tuple[tuple[tuple[type[nn.Module], ...], tuple[str, ...]], ...] = (
    ((nn.Linear,), ("out_features", "in_features")),
    ((nn.Bilinear,), ("out_features", "in1_features", "in2_features")),
    ((nn.Embedding, nn.EmbeddingBag), ("num_embeddings", "embedding_dim")),
    ((nn.LayerNorm, nn.RMSNorm), ("normalized_shape",)),
    ((nn.GroupNorm,), ("num_channels",)),
    ((nn.PReLU,), ("num_parameters",)),
)


def _recurrent_sizes(module: Any) -> dict[str, Any]:
    rows, columns = module.weight_ih_l0.shape
    projected = module.weight_hr_l0.shape[0] if module.proj_size else 0
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    return {"hidden_size": rows // gates, "input_size": columns, "proj_size": projected}


def _attention_sizes(module: Any) -> dict[str, Any]:
    if module.in_proj_weight is not None:
        rows, width = module.in_proj_weight.shape
        return {"embed_dim": width, "kdim": width, "vdim": width, "head_dim": rows // 3 // module.num_heads}
    rows, width = module.q_proj_weight.shape
    key, value = module.k_proj_weight.shape[1], module.v_proj_weight.shape[1]
    return {"embed_dim": width, "kdim": key, "vdim": value, "head_dim": rows // module.num_heads}


# Whole numbers of the user's code

_Key = tuple[str, tuple[str, ...], Any, tuple[Any, ...]]


@dataclass
class _Number:
    """A whole number, or a tuple or list of them, that modules of one class hold under one name.

    Attributes:
        key: The class, the names that lead to it, its value in the full model, and the values to try.
        paths: The modules that hold it.
        value: Its value now.
    """

    key: _Key
    paths: list[str]
    value: Any

    def set(self, root: nn.Module) -> None:
        """Write the value into a module tree."""
        _, names, _, _ = self.key
        for path in self.paths:
            held = vars(root.get_submodule(path))
            for name in names[:-1]:
                held = _names(held[name])
            held[names[-1]] = self.value


def _names(holder: Any) -> dict[str, Any]:
    return holder if isinstance(holder, dict) else vars(holder)


def _numbers(module: nn.Module, original: nn.Module, full: Program, local: Program) -> list[_Number]:
    """Every whole number that may have to change, with the first proposal as its value."""
    evidence = _Evidence(full, local)
    found: dict[_Key, _Number] = {}
    scopes: dict[int, str] = {}
    holders = _holders(module, original)
    for path, _, holder in holders:
        scopes[id(holder)] = _common(scopes.get(id(holder), path), path)
    seen: set[int] = set()
    for path, names, holder in holders:
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        known = layer_sizes(holder) if isinstance(holder, nn.Module) else {}
        for name, value in _names(holder).items():
            if name in known or not isinstance(name, str):
                continue
            tries = evidence.proposals(value, scopes[id(holder)])
            if len(tries) > 1:
                likely = WIDTH.search(name) and not NOT_WIDTH.search(name)
                key = (type(holder).__qualname__, (*names, name), _hashable(value), tuple(tries))
                number = found.setdefault(key, _Number(key, [], _like(value, tries[0]) if likely else value))
                number.paths.append(path)
    return list(found.values())


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _like(before: Any, value: Any) -> Any:
    return list(value) if isinstance(before, list) else value


def _holders(root: nn.Module, original: nn.Module) -> list[tuple[str, tuple[str, ...], Any]]:
    """Modules, and configurations, dicts and other plain objects that they hold: where, and by which names.

    What a copy shares with the original is left out.
    """
    found: list[tuple[str, tuple[str, ...], Any]] = []

    def enter(path: str, names: tuple[str, ...], holder: Any, twin: Any) -> None:
        found.append((path, names, holder))
        for name, value in _names(holder).items():
            theirs = _names(twin).get(name)
            own = value is not theirs and type(value) is type(theirs)
            if own and name not in _OWN and len(names) < 3 and _is_plain(value):
                enter(path, (*names, name), value, theirs)

    for path, module in root.named_modules():
        enter(path, (), module, original.get_submodule(path))
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, (nn.Module, Tensor, type)) or callable(value):
        return False
    return isinstance(value, dict) or hasattr(value, "__dict__")


_OWN = frozenset(vars(nn.Module()))
"""What every module holds: its parameters, children, hooks."""


def _common(first: str, second: str) -> str:
    """The path of the module that holds both."""
    shared = []
    for one, other in zip(first.split("."), second.split("."), strict=False):
        if one != other:
            break
        shared.append(one)
    return ".".join(shared)


class _Evidence:
    """What sizes of the full model are in a sub-model, by module: from weights, dimensions and literals."""

    def __init__(self, full: Program, local: Program) -> None:
        self.counts: dict[str, Counter[tuple[int, int]]] = {}
        for name, entry in full.state.items():
            if name in local.state:
                shapes = zip(entry.tensor.shape, local.state[name].tensor.shape, strict=True)
                for alias in (name, *entry.aliases):
                    self._add(alias.rpartition(".")[0], shapes)
        for old, new in zip(full.graphs, local.graphs, strict=True):
            here = {node.name: node for node in new.nodes}
            for node in old.nodes:
                twin = here.get(node.name)
                if node.op == "call_function" and twin is not None and twin.target == node.target:
                    self._add(source_of(node).module, _pairs(node, twin))

    def _add(self, path: str, pairs: Iterable[tuple[int, int]]) -> None:
        pairs = list(pairs)
        while True:
            self.counts.setdefault(path, Counter()).update(pairs)
            if not path:
                return
            path = path.rpartition(".")[0]

    def proposals(self, value: Any, path: str) -> list[Any]:
        """Values to try, the likeliest first; the present one is always among them."""
        if isinstance(value, (tuple, list)) and value and all(type(item) is int for item in value):
            items = [self.proposals(item, path) for item in value]
            tries = itertools.islice(itertools.product(*items), COMBINATIONS)
            return list(dict.fromkeys([*tries, tuple(value)]))
        if type(value) is not int or value < 2:
            return [value]
        while True:
            counts = self.counts.get(path, Counter())
            news = {new: count for (old, new), count in counts.items() if old == value}
            if news or not path:
                changed = sorted((new for new in news if new != value), key=lambda new: (-news[new], new))
                return [*changed, value]
            path = path.rpartition(".")[0]


def _pairs(old: fx.Node, new: fx.Node) -> Iterator[tuple[int, int]]:
    before, after = old.meta.get("value"), new.meta.get("value")
    befores = before if isinstance(before, tuple) else (before,)
    afters = after if isinstance(after, tuple) else (after,)
    for one, other in zip(befores, afters, strict=False):
        if isinstance(one, TensorMeta) and isinstance(other, TensorMeta):
            for dim, twin in zip(one.dims, other.dims, strict=False):
                if dim.symbol is None:
                    yield dim.hint, twin.hint
    literals = zip(pytree.tree_leaves(list(old.args)), pytree.tree_leaves(list(new.args)), strict=False)
    yield from (
        (one, other) for one, other in literals if type(one) is int and type(other) is int and one > 1
    )


# Comparison with the graph form


@dataclass(frozen=True)
class _Case:
    """A mode, the inputs of a call, and what the graph form gives for it."""

    mode: Mode
    flat: list[Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any
    buffers: dict[str, Tensor]


@dataclass(frozen=True)
class _Difference:
    """How a module differs from its graph form.

    Attributes:
        case: In which call.
        error: Largest difference, infinite where there are no values.
        raised: The exception that the module raised.
    """

    case: _Case
    error: float
    raised: Exception | None = None


@dataclass(frozen=True)
class _Seen:
    """Calls of modules in one run: how many gave what the graph holds, and the first that did not."""

    explained: frozenset[str]
    count: int
    others: tuple[str, ...]
    stopped: str | None


class _Check:
    """A sub-model's graph form in float64 with random values, and calls to compare a module in."""

    def __init__(self, analysis: Analysis, part: int, program: Program, example: Example) -> None:
        self.part = part
        self.runs = 0
        wide = in_double(program)
        generator = torch.Generator().manual_seed(part)
        self.values = random_own(wide, analysis, generator)
        self.wide = wide.with_state(self.values)
        self.cases: list[_Case] = []
        first = flat_inputs(program.signature, example)
        for flat in (first, other_batch(program.signature, first)):
            if flat is not None:
                self.cases += [self._case(mode, flat) for mode in ("eval", "train")]

    def _case(self, mode: Mode, flat: list[Tensor]) -> _Case:
        signature = self.wide.signature
        device = place_of(self.values.values())
        flat = [tensor if device is None else tensor.to(device[1]) for tensor in flat]
        leaves = [flat[leaf] if isinstance(leaf, int) else leaf[0] for leaf in signature.in_leaves]
        args, kwargs = pytree.tree_unflatten(leaves, signature.in_spec)
        reference = emit(self.wide).train(mode == "train")
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            outputs = reference(*_clones(args), **_clones(kwargs))
        buffers = {name: tensor.detach() for name, tensor in reference.named_buffers()}
        return _Case(mode, flat, args, kwargs, outputs, buffers)

    def difference(
        self, module: nn.Module, cases: Sequence[_Case] | None = None, *, rebuilt: bool = False
    ) -> _Difference | None:
        """The first call in which a module gives something else; None where there is none.

        A module that was ``rebuilt`` keeps the buffers that no state dict holds.
        """
        for case in self.cases if cases is None else cases:
            self.runs += 1
            state = self._state(module, rebuilt=rebuilt)
            try:
                outputs = _run(module, state, case)
                error = tree_error(self._outputs(case.mode), case.outputs, outputs)
            except Exception as raised:
                return _Difference(case, math.inf, raised)
            for name, buffer in case.buffers.items():
                if name in state:
                    error = max(error, relative_error(state[name], buffer))
            if not error <= BOUND:
                return _Difference(case, error)
        return None

    def _outputs(self, mode: Mode) -> Outputs:
        return self.wide.signature.outputs[0 if mode == "train" else -1]

    def _state(self, module: nn.Module, *, rebuilt: bool = False) -> dict[str, Tensor]:
        """Random values for the parameters and buffers of the program; others keep theirs, in float64."""
        state: dict[str, Tensor] = {}
        saved = module.state_dict() if rebuilt else self.values
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            value = (self.values.get(name, tensor) if name in saved else tensor).detach().clone()
            state[name] = value.double() if value.dtype.is_floating_point else value
        return state

    def watch(self, module: nn.Module, case: _Case) -> _Seen:
        """Which calls of modules give a value that the graph form has somewhere, too."""
        self.runs += 1
        known = _Values(emit(self.wide).train(case.mode == "train"), case).prints
        explained: set[str] = set()
        others: dict[str, None] = {}
        stack: list[str] = []
        count = 0

        def enter(path: str) -> Callable[..., None]:
            return lambda *_: stack.append(path)

        def leave(path: str) -> Callable[..., None]:
            def hook(_: nn.Module, __: Any, result: Any) -> None:
                nonlocal count
                stack.pop()
                tensors = [t for t in pytree.tree_leaves(result) if _is_real(t)]
                if tensors and all(known.holds(tensor) for tensor in tensors):
                    explained.add(path)
                    count += 1
                elif tensors:
                    others.setdefault(path)

            return hook

        hooks = []
        for path, child in module.named_modules():
            hooks.append(child.register_forward_pre_hook(enter(path)))
            hooks.append(child.register_forward_hook(leave(path)))
        try:
            _run(module, self._state(module), case)
        except Exception:
            return _Seen(frozenset(explained), count, tuple(others), stack[-1] if stack else "")
        finally:
            for hook in hooks:
                hook.remove()
        return _Seen(frozenset(explained), count, tuple(others), None)


def _clones(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, tree)


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def _run(module: nn.Module, state: dict[str, Tensor], case: _Case) -> Any:
    """The user's module in float64, with these values."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.no_grad(), untouched(module), _Wide():
            set_tensors(module.train(case.mode == "train"), state)
            torch.manual_seed(0)
            return module(*_clones(case.args), **_clones(case.kwargs))
    finally:
        torch.set_default_dtype(before)


class _Wide(TorchFunctionMode):
    """Runs Python code in float64 that asks for another floating-point type."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        return func(*map(_widened, args), **{name: _widened(value) for name, value in (kwargs or {}).items()})


def _widened(value: Any) -> Any:
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    if _is_real(value) and value.dtype is not torch.float64 and not isinstance(value, nn.Parameter):
        return value.double()
    return value


class _Prints:
    """Values by their number of entries and two sums, by which they are known again in another shape."""

    def __init__(self) -> None:
        self.sums: dict[int, list[tuple[float, float]]] = {}

    def add(self, tensor: Tensor) -> None:
        self.sums.setdefault(tensor.numel(), []).append(_sums(tensor))

    def holds(self, tensor: Tensor) -> bool:
        plain, mixed = _sums(tensor)
        return any(
            math.isclose(plain, one, rel_tol=1e-7, abs_tol=1e-7)
            and math.isclose(mixed, other, rel_tol=1e-7, abs_tol=1e-7)
            for one, other in self.sums.get(tensor.numel(), ())
        )


def _sums(tensor: Tensor) -> tuple[float, float]:
    flat = torch.nan_to_num(tensor.detach().double().reshape(-1), 0.0, 1.0, -1.0)
    weights = torch.arange(flat.numel(), dtype=torch.float64, device=flat.device).cos()
    return float(flat.sum()), float((flat * weights).sum())


class _Values(fx.Interpreter):
    """Runs a graph and takes the prints of all its values."""

    def __init__(self, module: ProgramModule, case: _Case) -> None:
        super().__init__(module, graph=module.graph_of(case.mode))
        self.prints = _Prints()
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            self.run(*_clones(case.flat))

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and take the prints of what it gives."""
        value = super().run_node(n)
        for tensor in pytree.tree_leaves(value):
            if _is_real(tensor):
                self.prints.add(tensor)
        return value


# The search


def _settle(module: nn.Module, numbers: Sequence[_Number], check: _Check) -> None:
    """Write the numbers with which the module equals its graph form, or refuse.

    From the first proposals on, one number at a time takes another value, those near the first difference
    first, and keeps it where more calls of modules then give what the graph holds.
    """
    _write(module, numbers)
    difference = check.difference(module)
    while difference is not None:
        if not _improved(module, numbers, check, difference.case):
            raise _refusal(module, check, difference)
        difference = check.difference(module)


def _write(module: nn.Module, numbers: Iterable[_Number]) -> None:
    for number in numbers:
        number.set(module)
    for child in module.modules():
        for name, size in layer_sizes(child).items():
            setattr(child, name, size)


def _improved(module: nn.Module, numbers: Sequence[_Number], check: _Check, case: _Case) -> bool:
    """Change one number for the better, or two near the difference; False where nothing is better."""
    seen = check.watch(module, case)
    place = seen.stopped if seen.stopped is not None else (seen.others[0] if seen.others else "")
    near = [number for number in numbers if any(_related(path, place) for path in number.paths)]
    far = [number for number in numbers if number not in near]
    # Two at once, as heads and their width are: with one alone both give other values.
    for tried in (*((number,) for number in (*near, *far)), *itertools.combinations(near, 2)):
        before = [number.value for number in tried]
        others = [[value for value in n.key[3] if value != _hashable(n.value)] for n in tried]
        for values in itertools.product(*others):
            if check.runs > TRIALS:
                break
            for number, old, value in zip(tried, before, values, strict=True):
                number.value = _like(old, value)
            _write(module, tried)
            if check.watch(module, case).count > seen.count or check.difference(module, [case]) is None:
                return True
        for number, old in zip(tried, before, strict=True):
            number.value = old
        _write(module, tried)
    return False


def _settle_configuration(module: nn.Module, numbers: Sequence[_Number], check: _Check) -> None:
    """Write the numbers of the configuration that builds the module again, or warn that none does."""
    kind: Any = type(module)
    if not isinstance(getattr(module, "config", None), getattr(kind, "config_class", None) or ()):
        return
    held = [number for number in numbers if number.key[1][0] == "config"]
    before = [number.value for number in held]
    for values in itertools.islice(_choices(held), CONFIGURATIONS):
        for number, value in zip(held, values, strict=True):
            number.value = value
        _write(module, held)
        if _builds_again(module, check) and check.difference(module) is None:
            return
    for number, value in zip(held, before, strict=True):
        number.value = value
    _write(module, held)
    warnings.warn(
        f"no configuration of {kind.__name__} was found that builds sub-model {check.part} again: "
        "keep its state dict and the plan, for from_pretrained would give another model",
        stacklevel=2,
    )


def _choices(numbers: Sequence[_Number]) -> Iterator[list[Any]]:
    """Values for all numbers, those first that differ from the present ones in few places."""
    now = [number.value for number in numbers]
    for distance in range(len(numbers) + 1):
        for places in itertools.combinations(range(len(numbers)), distance):
            others = [
                [value for value in numbers[place].key[3] if value != _hashable(now[place])]
                for place in places
            ]
            for values in itertools.product(*others):
                chosen = dict(zip(places, values, strict=True))
                yield [_like(value, chosen.get(place, value)) for place, value in enumerate(now)]


def _builds_again(module: nn.Module, check: _Check) -> bool:
    """True where the configuration of the module builds one of the same shapes that gives the same values."""
    config: Any = module.config
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.device("meta"):
                light = type(module)(copy.deepcopy(config))
            if {name: tensor.shape for name, tensor in light.state_dict().items()} != shapes:
                return False
            again = type(module)(copy.deepcopy(config))
    except Exception:
        return False
    return check.difference(again, rebuilt=True) is None


def _related(path: str, place: str) -> bool:
    return f"{place}.".startswith(f"{path}." if path else "") or f"{path}.".startswith(f"{place}.")


def _refusal(module: nn.Module, check: _Check, difference: _Difference) -> UnsupportedError:
    seen = check.watch(module, difference.case)
    raised = difference.raised
    if raised is not None:
        path = seen.stopped or ""
        why = f"raises {type(raised).__name__}: {first_line(raised)}"
    else:
        path = next((path for path in seen.others if path not in seen.explained), "")
        why = f"gives other values (largest difference of the model's outputs {difference.error:.1e})"
    kind = type(module.get_submodule(path)).__name__
    name = f"module {path} ({kind})" if path else kind
    return UnsupportedError(
        f"sub-model {check.part} cannot be of the user's own class: with narrower layers, {name} {why}",
        where=_line_of(raised),
        hint='its code holds a width that no attribute sets: take it from the tensors, or use emit="graph"',
    )


def _line_of(error: Exception | None) -> str | None:
    """The innermost line that raised, outside of torch and of this file."""
    if error is None:
        return None
    torch_folder = str(Path(torch.__file__).parent)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(torch_folder) and frame.filename != __file__:
            return f"{frame.filename}:{frame.lineno}" + (f" `{frame.line}`" if frame.line else "")
    return None
