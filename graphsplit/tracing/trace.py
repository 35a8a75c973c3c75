"""`trace`: torch.export in train and in eval mode, brought together as one `Program`.

Both modes are exported. Where the two graphs differ only in literals (``batch_norm(..., True)``,
``dropout(p, True)``, ``dropout_p=0.1``) one graph serves both: the literal becomes a function of the module's
own ``training`` flag. Where they differ in structure the model's Python branches on ``self.training`` and
both graphs are kept over one state.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from torch import Tensor, fx, nn
from torch.export import Dim as ExportDim
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphsplit.errors import GraphsplitError, InputError, LoadError, TraceError
from graphsplit.program import Program, StateEntry, check, meta_of
from graphsplit.signature import SCALARS, Outputs, Signature, as_call, leaf_names
from graphsplit.tracing.functionalize import Functionalizer
from graphsplit.tracing.modes import finish, merge_modes
from graphsplit.tracing.provenance import named_forward
from graphsplit.tracing.refusals import (
    custom_functions_refused,
    gradients_as_computed,
    place,
    refuse_hooks,
    refuse_modes_that_write,
    refuse_transforms,
    user_frames,
    way_out,
)
from graphsplit.untouched import copies_of, set_tensors, tensors_of, untouched

_PREFIX = "model"
_LOGGERS = (
    "torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes",
    "torch._export.non_strict_utils", "torch.export", "torch._export",
)  # fmt: skip


def trace(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: Mapping[str, tuple[int, ...]] | None = None,
    outputs: Sequence[str] | None = None,
) -> Program:
    """Trace a model, without changing it, to a functional fx graph with its state.

    Args:
        model: The user's module, on any device (``meta`` too).
        args: Example inputs: a tensor, a tuple by position, or a dict by keyword. The first dimension of each
            is taken as a batch that may change, unless the model fixes it.
        kwargs: Further example inputs by keyword.
        dynamic: Dimensions that may change, by the path of the input (``"args[0]"``, ``"kwargs['mask']"``),
            in place of the first.
        outputs: Names of the outputs to keep (``"logits"``); the others become None. A hidden state that is
            returned beside the logits keeps its units whole, which this avoids.

    Returns:
        A `Program` whose state refers to (does not copy) the model's tensors.

    Raises:
        LoadError: ``model`` is no module.
        InputError: The example inputs cannot be used.
        TraceError: torch.export refuses the model; its reason and a way out are in the message.
        UnsupportedError: A region or op that no rewrite could keep right.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise LoadError(
            "the model is a TorchScript module", hint="give the Python module that it was made from"
        )
    if not isinstance(model, nn.Module):
        raise LoadError(f"the model is a {type(model).__name__}, expected a torch.nn.Module")
    args, kwargs = as_call(args, kwargs)
    kept = None if outputs is None else (outputs,) if isinstance(outputs, str) else tuple(outputs)
    call = _Call.of(model, args, kwargs, outputs=kept)
    _check_dynamic(call, dynamic or {})
    try:
        program = _trace(model, call, dynamic)
    except InputError:
        if not call.doubled:
            raise
    else:
        if not call.doubled or all(meta.dims[0].symbol for meta in program.signature.inputs if meta.dims):
            return program
    # The one example cannot stand twice: the first dimension is no batch, or the model fixes its size.
    return _trace(model, _Call.of(model, args, kwargs, outputs=kept, double=False), dynamic)


def _check_dynamic(call: _Call, dynamic: Mapping[str, tuple[int, ...]]) -> None:
    dims = {name: tensor.dim() for name, tensor in zip(call.names, call.tensors, strict=True)}
    for name, chosen in dynamic.items():
        if name not in dims:
            raise InputError(
                f"dynamic names an input {name}, which there is not", hint=f"the inputs are {', '.join(dims)}"
            )
        wrong = [dim for dim in chosen if not 0 <= dim < dims[name]]
        if wrong:
            raise InputError(
                f"dynamic names dimension {wrong[0]} of input {name}",
                hint=f"its dimensions are 0 to {dims[name] - 1}" if dims[name] else "it has no dimension",
            )


def _trace(model: nn.Module, call: _Call, dynamic: Mapping[str, tuple[int, ...]] | None) -> Program:
    """`trace` of flattened example inputs, in train and in eval mode."""

    refuse_modes_that_write(model)

    def exported() -> Program:
        exports = []
        for mode in (True, False):
            with untouched(model):
                model.train(mode)
                exports.append(_export(model, call, dynamic))
        return _assemble(model, call, *exports)

    try:
        return exported()
    except _ShapesAfterTheFirstCall as found:
        with untouched(model):
            _run_once(model, call)
            program = exported()
        note = f"forward gives {found} another shape in its first call: traced as it is then"
        return dataclasses.replace(program, notes=(*program.notes, note))


def _attributes(model: nn.Module) -> dict[str, Any]:
    """What modules keep beside parameters, buffers and children, by path."""
    return {
        f"{path}.{name}".lstrip("."): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training"
    }


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Attributes that forward wrote over, and values of the batch that it keeps; not tables that it makes."""
    found = []
    for name, value in after.items():
        old = before.get(name)
        if value is old:
            continue
        if isinstance(value, Tensor):
            if old is not None or not all(type(size) is int for size in value.shape):
                found.append(name)
        elif isinstance(value, SCALARS) and old is not None and value != old:
            found.append(name)
    return found


class _ShapesAfterTheFirstCall(Exception):
    """Forward gives a buffer a value that cannot be written to it."""


@dataclass(frozen=True)
class _Call:
    """Example inputs, flattened: tensors (own copies, at least two examples), constants and nesting."""

    tensors: tuple[Tensor, ...]
    names: tuple[str, ...]
    leaves: tuple[int | tuple[Any], ...]
    spec: pytree.TreeSpec
    parameter_names: tuple[str, ...]
    notes: tuple[str, ...]
    defaults: Mapping[str, Any]
    outputs: tuple[str, ...] | None = None
    doubled: bool = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        outputs: tuple[str, ...] | None = None,
        double: bool = True,
    ) -> _Call:
        """Own copies of the example inputs; a single example is given twice, unless ``double`` says no."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        paths = [_input_name(path) for path in leaf_names((args, kwargs))]
        tensors: list[Tensor] = []
        names: list[str] = []
        places: list[int | tuple[Any]] = []
        for leaf, path in zip(leaves, paths, strict=True):
            if isinstance(leaf, Tensor):
                places.append(len(tensors))
                tensors.append(leaf.detach().clone().requires_grad_(leaf.requires_grad))
                names.append(path)
            elif isinstance(leaf, SCALARS):
                places.append((leaf,))
            else:
                raise InputError(
                    f"input {path} is a {type(leaf).__name__}, which torch cannot take apart",
                    hint="give tensors in tuples, lists, dicts or dataclasses registered with "
                    "torch.utils._pytree",
                )
        notes = []
        if not tensors:
            raise InputError("the example inputs hold no tensor", hint="give at least one tensor")
        batched = [tensor for tensor in tensors if tensor.dim() > 0]
        doubled = double and bool(batched) and all(tensor.shape[0] == 1 for tensor in batched)
        if doubled:
            # A batch of one would be taken for a fixed size.
            tensors = [torch.cat([tensor, tensor]).detach() if tensor.dim() else tensor for tensor in tensors]
            notes.append(
                "the one example given was duplicated: a batch of one would be taken for a fixed size"
            )
        elif any(tensor.shape[0] == 1 for tensor in batched):
            notes.append(
                "an input has size 1 in its first dimension, which is therefore fixed: "
                "give two examples or more"
            )
        parameters = list(inspect.signature(model.forward).parameters.values())
        defaults = {p.name: p.default for p in parameters if isinstance(p.default, SCALARS)}
        positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        return cls(
            tuple(tensors), tuple(names), tuple(places), spec, tuple(positional), tuple(notes), defaults,
            outputs, doubled,
        )  # fmt: skip

    def placeholder_names(self) -> list[str]:
        """The name of forward's parameter for each tensor, with its place where that is nested."""
        names = []
        for path in self.names:
            head, *rest = re.findall(r"\w+", path)[1:]
            if path.startswith("args") and int(head) < len(self.parameter_names):
                head = self.parameter_names[int(head)]
            elif path.startswith("args"):
                head = f"args_{head}"
            names.append("_".join((head, *rest)))
        return names

    def unflatten(self, tensors: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        leaves = [tensors[place] if isinstance(place, int) else place[0] for place in self.leaves]
        call: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(leaves, self.spec)
        return call


def _input_name(path: str) -> str:
    return f"args{path[3:]}" if path.startswith("[0]") else f"kwargs{path[3:]}"


@dataclass
class _Recorder:
    """What forward saw last; a plain object, because export undoes what forward assigns to a module."""

    outputs: Outputs | None = None
    left_out: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


_Exported = tuple[ExportedProgram, Outputs, _Recorder]


class _Flat(nn.Module):
    """The user's model behind a flat list of tensors: nesting is ours to keep and no hook is needed."""

    def __init__(self, model: nn.Module, call: _Call) -> None:
        super().__init__()
        self.add_module(_PREFIX, model)
        self.call = call
        self.recorder = _Recorder()

    def forward(self, *tensors: Tensor) -> tuple[Any, ...]:
        args, kwargs = self.call.unflatten(tensors)
        model = getattr(self, _PREFIX)
        buffers, attributes = dict(model.named_buffers(remove_duplicate=False)), _attributes(model)
        with gradients_as_computed(model):
            result = model(*args, **kwargs)
        _write_assigned_buffers(model, buffers)
        self.recorder.changed = tuple(_changed(attributes, _attributes(model)))
        if dataclasses.is_dataclass(result) and type(result) not in pytree.SUPPORTED_NODES:
            pytree.register_dataclass(type(result))
        leaves, spec = pytree.tree_flatten(result)
        names = leaf_names(result, "output")
        kept: list[Any] = []
        kept_names: list[str] = []
        places: list[int | tuple[Any]] = []
        left_out: list[str] = []
        wanted = self.call.outputs
        for leaf, name in zip(leaves, names, strict=True):
            if wanted is not None and not _is_wanted(name, wanted):
                places.append((None,))
            elif isinstance(leaf, (Tensor, torch.SymInt)):
                places.append(len(kept))
                kept.append(leaf)
                kept_names.append(name)
            elif isinstance(leaf, SCALARS):
                places.append((leaf,))
            else:
                places.append((None,))
                left_out.append(f"{name} ({type(leaf).__name__})")
        self.recorder.outputs = Outputs(spec, tuple(places), tuple(kept_names))
        self.recorder.left_out = tuple(left_out)
        tensors_of = zip(leaves, names, strict=True)
        self.recorder.names = tuple(name for leaf, name in tensors_of if isinstance(leaf, Tensor))
        return tuple(kept)


def _write_assigned_buffers(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """A buffer that forward assigns anew (``self.mean = ...``) is written: export would lose it."""
    other_shapes = []
    for name, old in before.items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        new = owner._buffers.get(leaf)
        if new is not None and new is not old:
            try:
                old.copy_(new.detach())
            except RuntimeError:
                other_shapes.append(name)
            owner._buffers[leaf] = old
    if other_shapes:
        raise _ShapesAfterTheFirstCall(" and ".join(other_shapes))


def _is_wanted(name: str, wanted: Sequence[str]) -> bool:
    """``output['logits']`` is meant by ``logits``, ``['logits']`` and its full name."""
    parts = [part.strip("[]'\".") for part in name.removeprefix("output").replace("][", "].[").split(".")]
    return name in wanted or any(part in wanted for part in parts if part)


class _WithoutGraphs(io.TextIOBase):
    """A text stream that passes everything on but the graph that torch prints when it gives up."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._after_graph = False

    def write(self, text: str) -> int:
        """Write, unless it is a graph."""
        is_graph = text.lstrip().startswith("def forward(self, arg0_1")
        if not is_graph and not (self._after_graph and text == "\n"):
            self.stream.write(text)
        self._after_graph = is_graph
        return len(text)


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's tracer logs tracebacks of errors that we turn into one sentence."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with redirect_stderr(_WithoutGraphs(sys.stderr)):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _distributions_unchecked() -> Iterator[None]:
    """Leave out the checks of `torch.distributions`, which branch on values; assertions are dropped, too."""
    checked = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(checked)


@contextmanager
def _masks_unread() -> Iterator[None]:
    """`nn.Transformer` looks whether a mask is causal, for a faster kernel: tell it what the user told it."""
    layers: Any = torch.nn.modules.transformer
    reads = layers._detect_is_causal_mask
    layers._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        layers._detect_is_causal_mask = reads


def _export(model: nn.Module, call: _Call, dynamic: Mapping[str, tuple[int, ...]] | None) -> _Exported:
    refuse_hooks(model)
    flat = _Flat(model, call)
    shapes = []
    for tensor, name in zip(call.tensors, call.names, strict=True):
        dims = (dynamic or {}).get(name, (0,))
        shapes.append({dim: ExportDim.AUTO for dim in dims if dim < tensor.dim()})
    with (
        warnings.catch_warnings(),
        _quiet(),
        custom_functions_refused(),
        _distributions_unchecked(),
        _masks_unread(),
    ):
        warnings.simplefilter("ignore")
        try:
            with named_forward(model):
                exported = torch.export.export(
                    flat, call.tensors, strict=False, dynamic_shapes={"tensors": tuple(shapes)}
                )
        except (GraphsplitError, _ShapesAfterTheFirstCall):
            raise
        except Exception as error:
            raise _explain(model, call, error) from error
    seen = flat.recorder
    if seen.outputs is None:
        raise TraceError("torch.export never ran the model's forward")
    if not seen.outputs.names:
        if call.outputs is not None:
            raise InputError(
                f"the model has no output named {' or '.join(call.outputs)}",
                hint=f"it gives {', '.join(seen.names) or 'no tensor'}",
            )
        raise TraceError(
            "the model gives no tensor" + "".join(f"; {name}" for name in seen.left_out),
            hint="let forward return tensors, or a nested tuple, list, dict or dataclass of them",
        )
    return exported, seen.outputs, seen


def _run_once(model: nn.Module, call: _Call) -> None:
    """Leave the model as after a first call, but for what is written into its tensors."""
    before, copies = tensors_of(model), copies_of(model)
    set_tensors(model, copies)
    args, kwargs = call.unflatten(call.tensors)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.eval()(*args, **kwargs)
    after = tensors_of(model)
    set_tensors(model, {name: before[name] for name, copied in copies.items() if after.get(name) is copied})


def _explain(model: nn.Module, call: _Call, error: Exception) -> GraphsplitError:
    """Tell the user's own error from torch.export's refusal: run the model once."""
    try:
        with untouched(model):
            _run_once(model, call)
    except Exception as own:
        frames = traceback.extract_tb(own.__traceback__)
        failure = InputError(
            f"the model fails on the example inputs with {type(own).__name__}: {own}",
            where=place(user_frames(frames)),
            hint="check that the example inputs fit the model",
        )
        failure.__cause__ = own
        return failure
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return TraceError(
        f"torch.export cannot trace the model: {reason}",
        where=place(user_frames(traceback.extract_tb(error.__traceback__))),
        hint=way_out(model, error),
    )


def _assemble(
    model: nn.Module,
    call: _Call,
    train: _Exported,
    evaluation: _Exported,
) -> Program:
    first = _first_names(model)

    def name_of(name: str) -> str:
        return first.get(_strip(name), _strip(name))

    inputs = call.placeholder_names()
    functional = [Functionalizer(exported, name_of, inputs).run() for exported, _, _ in (train, evaluation)]
    merged = merge_modes(*functional) if train[1] == evaluation[1] else None
    if merged is not None:
        graphs: tuple[fx.Graph, ...] = (merged,)
        outputs: tuple[Outputs, ...] = (train[1],)
    else:
        graphs = (finish(functional[0]), finish(functional[1]))
        outputs = (train[1], evaluation[1])
    refuse_transforms(graphs)
    notes = list(call.notes)
    notes += [f"{name} is no tensor and was left out of the outputs" for name in train[2].left_out]
    if changed := ", ".join(dict.fromkeys((*train[2].changed, *evaluation[2].changed))):
        notes.append(f"forward changes {changed} from call to call: the graph has them as in the first")
    signature = Signature(
        inputs=tuple(meta_of(node) for node in graphs[0].nodes if node.op == "placeholder"),
        input_names=call.names,
        in_spec=call.spec,
        in_leaves=call.leaves,
        outputs=outputs,
        parameter_names=call.parameter_names,
        defaults=tuple(call.defaults.items()),
    )
    constants = _constants(train[0]) | _constants(evaluation[0])
    program = Program(
        name=type(model).__name__,
        graphs=graphs,
        state=_state(model, constants),
        signature=signature,
        notes=tuple(notes),
        names=_registered_names(model),
    )
    check(program)
    return program


def _strip(name: str) -> str:
    """The user's name of a module or state tensor of `_Flat`."""
    return name.removeprefix(_PREFIX).lstrip(".")


def _constants(exported: ExportedProgram) -> dict[str, Tensor]:
    """Tensors that the tracer lifted out of the user's Python code."""
    targets = exported.graph_signature.lifted_tensor_constants
    return {_strip(name): exported.constants[name] for name in targets}


def _first_names(model: nn.Module) -> dict[str, str]:
    """For each name of a parameter or buffer the first name of the same tensor."""
    first: dict[int, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def _registered_names(model: nn.Module) -> tuple[str, ...]:
    """Every name of a parameter or buffer, module by module."""
    names = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        own = (*module._parameters.items(), *module._buffers.items())
        names += [f"{prefix}.{name}".lstrip(".") for name, value in own if value is not None]
    return tuple(names)


def _state(model: nn.Module, constants: Mapping[str, Tensor]) -> dict[str, StateEntry]:
    """Every parameter and buffer by its first name, with the other names of tied ones, then the constants."""
    state: dict[str, StateEntry] = {}
    first: dict[int, str] = {}
    saved = model.state_dict(keep_vars=True).keys()
    named: list[tuple[str, Tensor, Any]] = []
    named += [(name, tensor, "parameter") for name, tensor in model.named_parameters(remove_duplicate=False)]
    named += [(name, tensor, "buffer") for name, tensor in model.named_buffers(remove_duplicate=False)]
    for name, tensor, kind in named:
        known = first.setdefault(id(tensor), name)
        if known == name:
            state[name] = StateEntry(name, kind, tensor, persistent=name in saved)
        else:
            state[known] = dataclasses.replace(state[known], aliases=(*state[known].aliases, name))
    for name, tensor in constants.items():
        if name not in state:
            state[name] = StateEntry(name, "constant", tensor, persistent=False)
    return state
