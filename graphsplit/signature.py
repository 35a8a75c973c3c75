"""How a traced model is called: the nesting of its inputs and outputs and what each leaf must look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphsplit.errors import InputError

if TYPE_CHECKING:
    from graphsplit.program import TensorMeta

SCALARS = (
    int,
    float,
    bool,
    complex,
    str,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)


@dataclass(frozen=True)
class Outputs:
    """What a forward returns.

    Attributes:
        spec: Nesting of the outputs.
        leaves: For each leaf of ``spec``: the position in the graph's output tuple, or ``(value,)`` for a
            constant.
        names: A readable path for each position of the graph's output tuple.
    """

    spec: pytree.TreeSpec
    leaves: tuple[int | tuple[Any], ...]
    names: tuple[str, ...]

    def unflatten(self, values: Sequence[Any]) -> Any:
        """The outputs nested as the user's model nests them."""
        leaves = [values[leaf] if isinstance(leaf, int) else leaf[0] for leaf in self.leaves]
        if len(leaves) == 1 and self.spec.is_leaf():
            return leaves[0]
        return pytree.tree_unflatten(leaves, self.spec)


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of a program.

    Attributes:
        inputs: Metadata of each tensor input in the order of the placeholders.
        input_names: A readable path for each of them (``args[0]``, ``kwargs['mask']``).
        in_spec: Nesting of ``(args, kwargs)``.
        in_leaves: For each leaf of ``in_spec``: the position of a placeholder, or ``(value,)`` for a constant
            that was baked in.
        outputs: What each graph returns: one for both modes, or ``(train, eval)``.
        parameter_names: Names of the positional parameters of the user's ``forward``.
        defaults: Its default values, which a caller may repeat.
    """

    inputs: tuple[TensorMeta, ...]
    input_names: tuple[str, ...]
    in_spec: pytree.TreeSpec
    in_leaves: tuple[int | tuple[Any], ...]
    outputs: tuple[Outputs, ...]
    parameter_names: tuple[str, ...] = ()
    defaults: tuple[tuple[str, Any], ...] = ()

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensor inputs in placeholder order, checked against the trace.

        Raises:
            InputError: Where the nesting, a constant, a number of dimensions or a fixed size differs.
        """
        if not kwargs and self._is_flat and len(args) == len(self.inputs):
            tensors = list(args)
        else:
            tensors = self._flatten_nested(args, kwargs)
        self._check(tensors)
        return tensors

    @property
    def _is_flat(self) -> bool:
        return (
            len(self.in_leaves) == len(self.inputs)
            and self.in_spec.num_leaves == len(self.in_spec.child(0).children())
            and all(isinstance(leaf, int) for leaf in self.in_leaves)
        )

    def _flatten_nested(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        args, kwargs = self._bind(args, kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.in_spec:
            raise InputError(
                f"the inputs are nested as {_describe(spec)}, "
                f"the model was traced with {_describe(self.in_spec)}",
                hint="call it as it was traced, or trace it again with inputs like these",
            )
        tensors: list[Tensor] = []
        for leaf, place in zip(leaves, self.in_leaves, strict=True):
            if isinstance(place, int):
                tensors.append(leaf)
            elif isinstance(leaf, Tensor) or leaf != place[0]:
                raise InputError(
                    f"an input that was {place[0]!r} in the trace is now {leaf!r}",
                    hint="constants are part of the traced graph: trace again with this value",
                )
        return tensors

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call as it was traced, by position or keyword; constants of the trace may be left out."""
        want_args, want_kwargs = self.in_spec.children()
        names = list(want_kwargs.context)
        positional = self.parameter_names[: len(want_args.children())]
        if len(args) > len(positional) and len(args) <= len(self.parameter_names):
            extra = self.parameter_names[len(positional) : len(args)]
            args, kwargs = (
                args[: len(positional)],
                dict(zip(extra, args[len(positional) :], strict=True)) | kwargs,
            )
        defaults = dict(self.defaults)
        kwargs = {
            name: value
            for name, value in kwargs.items()
            if name in names
            or name in positional
            or name not in defaults
            or not _equal(value, defaults[name])
        }
        if len(args) < len(positional) and all(name in kwargs for name in positional[len(args) :]):
            kwargs = dict(kwargs)
            args = args + tuple(kwargs.pop(name) for name in positional[len(args) :])
        if set(kwargs) <= set(names):
            complete = dict(kwargs)
            offset = want_args.num_leaves
            for name, child in zip(names, want_kwargs.children(), strict=True):
                leaves = self.in_leaves[offset : offset + child.num_leaves]
                offset += child.num_leaves
                if name not in complete and all(not isinstance(leaf, int) for leaf in leaves):
                    values = [leaf[0] for leaf in leaves if not isinstance(leaf, int)]
                    complete[name] = pytree.tree_unflatten(values, child)
            if set(complete) == set(names):
                kwargs = {name: complete[name] for name in names}
        return args, kwargs

    def _check(self, tensors: Sequence[Tensor]) -> None:
        symbols: dict[str, int] = {}
        for tensor, meta, name in zip(tensors, self.inputs, self.input_names, strict=True):
            if not isinstance(tensor, Tensor):
                raise InputError(f"input {name} is a {type(tensor).__name__}, expected a tensor {meta}")
            if tensor.dim() != len(meta.dims):
                raise InputError(f"input {name} has shape {tuple(tensor.shape)}, expected {meta}")
            for position, dim in enumerate(meta.dims):
                expected = dim.hint if dim.symbol is None else symbols.get(dim.symbol)
                size = tensor.shape[position]
                if expected is not None and size != expected:
                    raise InputError(
                        f"input {name} has size {size} in dimension {position}, expected {expected} ({meta})",
                        hint="only the dimensions shown as symbols may change",
                    )
                if dim.symbol is not None and dim.symbol.isidentifier():
                    symbols[dim.symbol] = size


def _equal(value: Any, default: Any) -> bool:
    return not isinstance(value, Tensor) and type(value) is type(default) and value == default


def _describe(spec: pytree.TreeSpec) -> str:
    args, kwargs = spec.children()
    names = kwargs.context if kwargs.type is dict else []
    text = f"{len(args.children())} positional"
    return text + (f" and {', '.join(map(str, names))} by keyword" if names else "")


def leaf_names(tree: Any, prefix: str = "") -> list[str]:
    """A readable path for each leaf of a nested value."""
    paths, _ = pytree.tree_flatten_with_path(tree)
    return [prefix + pytree.keystr(path) for path, _ in paths]


def copied(values: Any) -> Any:
    """The same with a copy of every tensor, for a model that may change its inputs in place."""
    return pytree.tree_map_only(Tensor, Tensor.clone, values)


def as_call(args: Any, kwargs: Mapping[str, Any] | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Normalise example inputs: a tensor, a tuple or list of arguments, or a dict by keyword."""
    if kwargs is None:
        kwargs = {}
    if isinstance(args, Mapping) and not kwargs:
        return (), dict(args)
    if args is None:
        return (), dict(kwargs)
    if isinstance(args, Tensor):
        return (args,), dict(kwargs)
    if isinstance(args, (tuple, list)):
        return tuple(args), dict(kwargs)
    raise InputError(
        f"example inputs are a {type(args).__name__}",
        hint="give a tuple of positional arguments or a dict of keyword arguments",
    )
