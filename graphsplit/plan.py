"""`PartitionPlan`: who holds what, as plain data.

A plan is made once by the analysis and outlives it. By itself it slices state dicts into those of the
sub-models and merges state dicts and optimizer states back; it needs neither the model nor the graph.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from graphsplit.errors import PlanError

Merge = Literal["place", "average", "stack", "common"]
FORMAT = "graphsplit-plan/1"
_RANGE = re.compile(r"\d+:\d+(:[1-9]\d*)?", re.ASCII)


def encode_ranges(indices: NDArray[np.int64]) -> str:
    """Sorted indices as ranges.

    >>> encode_ranges(np.array([0, 1, 2, 10, 11, 12]))
    '0:3,10:13'
    >>> encode_ranges(np.array([1, 3, 5]))
    '1:6:2'
    """
    if indices.size == 0:
        return ""
    if indices[-1] - indices[0] + 1 == indices.size:
        return f"{indices[0]}:{indices[-1] + 1}"
    steps = np.diff(indices)
    if (steps == steps[0]).all() and steps[0] > 1:
        return f"{indices[0]}:{indices[-1] + 1}:{steps[0]}"
    breaks = np.flatnonzero(steps != 1)
    starts = np.concatenate([indices[:1], indices[breaks + 1]])
    stops = np.concatenate([indices[breaks], indices[-1:]]) + 1
    return ",".join(f"{start}:{stop}" for start, stop in zip(starts, stops, strict=True))


def decode_ranges(text: str) -> NDArray[np.int64]:
    """The indices of `encode_ranges`."""
    return _decoded(text).copy()


@functools.lru_cache(maxsize=256)
def _decoded(text: str) -> NDArray[np.int64]:
    pieces = []
    for item in filter(None, text.split(",")):
        if not _RANGE.fullmatch(item):
            raise PlanError(f"not a range: {item!r}")
        pieces.append(np.arange(*(int(number) for number in item.split(":")), dtype=np.int64))
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)


@functools.lru_cache(maxsize=256)
def is_disjoint(cut: tuple[str, ...]) -> bool:
    """True where no index of a cut dimension is held by two sub-models."""
    indices = np.concatenate([decode_ranges(text) for text in cut])
    return bool(np.unique(indices).size == indices.size)


@dataclass(frozen=True)
class StatePlan:
    """One state tensor.

    Attributes:
        name: Its first name in the original model.
        kind: ``parameter``, ``buffer`` or ``constant``.
        shape: Sizes in the full model.
        cuts: For each dimension the indices of each sub-model as ranges, or None where all hold all of it.
        merge: ``place`` (every entry is in one sub-model, or is averaged over those that hold it),
            ``average`` (output layers, eq. (1) of the paper: the sum divided by K), ``stack`` (a copy of its
            own for each sub-model: an exact merge keeps all, on a new first dimension, a plain one averages),
            ``common``.
        scale: A factor applied on merging, where the division by K of a tied output layer stands elsewhere.
        aliases: Further names (tied weights).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    cuts: tuple[tuple[str, ...] | None, ...]
    merge: Merge
    scale: float = 1.0
    aliases: tuple[str, ...] = ()
    persistent: bool = True

    def indices(self, part: int) -> list[NDArray[np.int64] | None]:
        """Per dimension the indices that sub-model ``part`` holds."""
        return [None if cut is None else decode_ranges(cut[part]) for cut in self.cuts]

    def local_shape(self, part: int) -> tuple[int, ...]:
        """Sizes in sub-model ``part``."""
        return tuple(
            size if index is None else index.size
            for size, index in zip(self.shape, self.indices(part), strict=True)
        )

    def slice(self, full: Tensor, part: int) -> Tensor:
        """The share of sub-model ``part``; a view where its indices are one run."""
        for dim, index in enumerate(self.indices(part)):
            if index is not None:
                full = take(full, dim, index)
        return full

    def indices_of_all(self, k: int) -> list[tuple[int, list[NDArray[np.int64]]]]:
        """For each dimension that is cut its size and the indices of all sub-models."""
        return [
            (size, [decode_ranges(cut[part]) for part in range(k)])
            for size, cut in zip(self.shape, self.cuts, strict=True)
            if cut is not None
        ]

    def parts(self, k: int) -> list[NDArray[np.int16] | None]:
        """For each dimension that is cut the sub-model of every index, -1 for indices of several."""
        found: list[NDArray[np.int16] | None] = []
        for size, cut in zip(self.shape, self.cuts, strict=True):
            if cut is None:
                found.append(None)
                continue
            parts = np.full(size, -1, np.int16)
            holders = np.zeros(size, np.int64)
            for part in range(k):
                index = decode_ranges(cut[part])
                parts[index] = part
                holders[index] += 1
            parts[holders != 1] = -1
            found.append(parts)
        return found

    def merged_parts(self, k: int) -> list[NDArray[np.int16] | None]:
        """`parts` of the tensor in the exact merge, where copies of a ``stack`` stand one after the other."""
        if self.merge != "stack":
            return self.parts(k)
        if self.stack_dim is None:
            return [np.arange(k, dtype=np.int16), *(None for _ in self.shape)]
        sizes = [self.local_shape(part)[self.stack_dim] for part in range(k)]
        found: list[NDArray[np.int16] | None] = [None] * len(self.shape)
        found[self.stack_dim] = np.repeat(np.arange(k, dtype=np.int16), sizes)
        return found

    def grid(self, part: int, device: torch.device) -> Any:
        """An index expression for the share of sub-model ``part`` in the full tensor; None for all of it."""
        return _grid(self.indices(part), self.shape, device)

    @property
    def stack_dim(self) -> int | None:
        """The dimension along which the copies of a ``stack`` tensor stand one after the other.

        It is the one that is cut, because they may differ in size there; None for a new first dimension.
        """
        return next((dim for dim, cut in enumerate(self.cuts) if cut is not None), None)

    def can_stack(self, k: int) -> bool:
        """True where the copies of all sub-models fit into one tensor."""
        shapes = [self.local_shape(part) for part in range(k)]
        rest = [tuple(n for dim, n in enumerate(shape) if dim != self.stack_dim) for shape in shapes]
        return len(set(rest)) == 1

    def merged_shape(self, k: int, *, duplicate: bool) -> tuple[int, ...]:
        """Sizes in the merged model."""
        if not (duplicate and self.merge == "stack"):
            return self.shape
        if self.stack_dim is None:
            return (k, *self.shape)
        shape = list(self.local_shape(0))
        shape[self.stack_dim] = sum(self.local_shape(part)[self.stack_dim] for part in range(k))
        return tuple(shape)

    def merge_tensors(self, tensors: Sequence[Tensor | None], *, duplicate: bool) -> Tensor:
        """One tensor from those of the sub-models; of those that are None there is nothing in it.

        Raises:
            PlanError: A shape does not fit.
        """
        for part, tensor in enumerate(tensors):
            if tensor is not None and tuple(tensor.shape) != self.local_shape(part):
                raise PlanError(
                    f"{self.name} of sub-model {part} has shape {tuple(tensor.shape)}, "
                    f"the plan says {self.local_shape(part)}",
                    hint="these weights belong to another model or another plan",
                )
        present = {part: tensor.detach() for part, tensor in enumerate(tensors) if tensor is not None}
        first = next(iter(present.values()))
        if self.merge == "common":
            return torch.stack(list(present.values())).amax(0) if first.dim() == 0 else first.clone()
        if duplicate and self.merge == "stack":
            shapes = [self.local_shape(part) for part in range(len(tensors))]
            copies = [present.get(part, first.new_zeros(shape)) for part, shape in enumerate(shapes)]
            return torch.stack(copies) if self.stack_dim is None else torch.cat(copies, self.stack_dim)
        total = self._sum(present)
        return total * (self.scale * len(tensors) / len(present)) if self.scale != 1.0 else total

    def _sum(self, tensors: Mapping[int, Tensor]) -> Tensor:
        """Every entry from the sub-model that holds it; averaged over several, or divided by K (eq. (1))."""
        total = next(iter(tensors.values())).new_zeros(self.shape)
        counts = None
        if self.merge == "stack" or (self.merge == "place" and not self._disjoint()):
            counts = torch.zeros(self.shape, dtype=torch.int32, device=total.device)
        for part, tensor in tensors.items():
            index = self.grid(part, total.device)
            if index is None:
                index = ...
            total[index] += tensor
            if counts is not None:
                counts[index] += 1
        if self.merge == "average":
            return _divide(total, len(tensors))
        return total if counts is None else _divide(total, counts.clamp_min(1))

    def _disjoint(self) -> bool:
        if any(cut is not None and is_disjoint(cut) for cut in self.cuts):
            return True
        return not any(cut is not None for cut in self.cuts) and len(self.shape) == 0


def _divide(total: Tensor, by: int | Tensor) -> Tensor:
    """Integers stay integers."""
    if total.dtype.is_floating_point or total.dtype.is_complex:
        return total / by
    return total // by


def take(tensor: Tensor, dim: int, index: NDArray[np.int64]) -> Tensor:
    """Entries of one dimension; a view where they are one run."""
    if index.size and index[-1] - index[0] + 1 == index.size:
        return tensor.narrow(dim, int(index[0]), int(index.size))
    return tensor.index_select(dim, torch.tensor(index, device=tensor.device))


def _grid(indices: list[NDArray[np.int64] | None], shape: tuple[int, ...], device: torch.device) -> Any:
    """An index expression for the product of index sets; None for the whole tensor."""
    if all(index is None for index in indices):
        return None
    slices: list[Any] = []
    arrays = []
    for dim, index in enumerate(indices):
        if index is None:
            slices.append(slice(None))
        elif index.size and index[-1] - index[0] + 1 == index.size:
            slices.append(slice(int(index[0]), int(index[-1]) + 1))
        else:
            slices.append(index)
            arrays.append(dim)
    if len(arrays) <= 1:
        return tuple(torch.tensor(s, device=device) if isinstance(s, np.ndarray) else s for s in slices)
    full = [np.arange(size) if index is None else index for index, size in zip(indices, shape, strict=True)]
    return tuple(torch.tensor(grid, device=device) for grid in np.ix_(*full))


@dataclass(frozen=True)
class AxisPlan:
    """Units that are divided together: name, number, and counts of each sub-model (none: kept whole)."""

    name: str
    size: int
    counts: tuple[int, ...]
    places: tuple[str, ...] = ()


@dataclass(frozen=True)
class PartitionPlan:
    """K disjoint sets of units and the slices of every state tensor that they induce.

    Attributes:
        k: Number of sub-models.
        model: Class name of the model.
        axes: What is divided, and what is kept whole.
        state: Every parameter and buffer.
    """

    k: int
    model: str
    axes: tuple[AxisPlan, ...]
    state: tuple[StatePlan, ...]

    # -- text ------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The plan as readable JSON."""
        data = {
            "format": FORMAT,
            "k": self.k,
            "model": self.model,
            "axes": [
                {"name": a.name, "units": a.size, "counts": list(a.counts), "places": list(a.places)}
                for a in self.axes
            ],
            "state": {
                s.name: {
                    "kind": s.kind,
                    "shape": list(s.shape),
                    "cuts": [None if cut is None else list(cut) for cut in s.cuts],
                    "merge": s.merge,
                    **({"scale": s.scale} if s.scale != 1.0 else {}),
                    **({"aliases": list(s.aliases)} if s.aliases else {}),
                    **({} if s.persistent else {"persistent": False}),
                }
                for s in self.state
            },
        }
        return _compact(data)

    @classmethod
    def from_json(cls, text: str) -> PartitionPlan:
        """Read `to_json`.

        Raises:
            PlanError: The text is no plan, or one of a newer format.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"the plan is no JSON: {error}") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise PlanError(
                f"not a plan of format {FORMAT}: {found}", hint="was it written by a newer graphsplit?"
            )
        try:
            if int(data["k"]) < 1:
                raise PlanError(f"the plan is for {data['k']} sub-models")
            if any(len(axis["counts"]) not in (0, int(data["k"])) for axis in data["axes"]):
                raise PlanError("an axis of the plan is dealt out to another number of sub-models")
            return cls(
                k=int(data["k"]),
                model=str(data["model"]),
                axes=tuple(
                    AxisPlan(a["name"], int(a["units"]), tuple(map(int, a["counts"])), tuple(a["places"]))
                    for a in data["axes"]
                ),
                state=tuple(
                    _read_state(name, entry, int(data["k"])) for name, entry in data["state"].items()
                ),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"the plan is damaged: {type(error).__name__} {error}") from None

    # -- slicing ---------------------------------------------------------------------------------------------

    def names(self, *, persistent: bool = True) -> dict[str, StatePlan]:
        """Every name of a state dict, aliases too."""
        return {
            name: state
            for state in self.state
            if state.kind != "constant" and (state.persistent or not persistent)
            for name in (state.name, *state.aliases)
        }

    def slice_state_dict(self, full: Mapping[str, Tensor], part: int) -> dict[str, Tensor]:
        """State dict of sub-model ``part`` from that of the full model; tensors are copies.

        Raises:
            PlanError: A tensor is missing or has another shape.
        """
        if not 0 <= part < self.k:
            raise PlanError(f"there is no sub-model {part} of {self.k}")
        result = {}
        for name, state in self.names().items():
            tensor = _get(full, name)
            if tuple(tensor.shape) != state.shape:
                raise PlanError(
                    f"{name} has shape {tuple(tensor.shape)}, the plan says {state.shape}",
                    hint="these weights belong to another model",
                )
            result[name] = state.slice(tensor.detach(), part).clone()
        return result

    def merge_state_dicts(
        self, parts: Sequence[Mapping[str, Tensor]], *, duplicate: bool = False
    ) -> dict[str, Tensor]:
        """Full state dict from those of the K sub-models.

        Args:
            parts: State dicts in the order of the sub-models.
            duplicate: Shapes of the exact merge, in which parameters that every sub-model has for itself are
                stacked, in place of the original shapes, where they are averaged.

        Raises:
            PlanError: The number of state dicts, a name or a shape does not fit.
        """
        if len(parts) != self.k:
            raise PlanError(f"{len(parts)} state dicts for a plan of {self.k} sub-models")
        known = self.names().keys()
        for number, part in enumerate(parts):
            foreign = [name for name in part if name not in known]
            if foreign:
                raise PlanError(
                    f"the weights of sub-model {number} hold {foreign[0]}, which the plan does not know",
                    hint="these weights belong to another model",
                )
        merged: dict[str, Tensor] = {}
        for state in self.state:
            if state.kind == "constant" or not state.persistent:
                continue
            value = state.merge_tensors([_get(part, state.name) for part in parts], duplicate=duplicate)
            for name in (state.name, *state.aliases):
                merged[name] = value
        return merged

    def merge_optimizer_states(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        submodels: Sequence[nn.Module],
        merged: nn.Module,
        merged_optimizer: torch.optim.Optimizer,
    ) -> None:
        """Fill the state of ``merged_optimizer`` from the optimizers of the sub-models.

        Momenta and moments are merged by the same rule as the parameter they belong to (eq. (1) for output
        layers); they are zero for cross weights. Step counts are the largest of the sub-models.

        Raises:
            PlanError: A parameter has no place in the plan, or state shapes differ.
        """
        if len(optimizers) != self.k or len(submodels) != self.k:
            raise PlanError(f"{len(optimizers)} optimizers and {len(submodels)} sub-models for K = {self.k}")
        named = [dict(model.named_parameters()) for model in submodels]
        states = {state.name: state for state in self.state}
        in_optimizer = {id(p) for group in merged_optimizer.param_groups for p in group["params"]}
        for name, parameter in merged.named_parameters():
            if id(parameter) not in in_optimizer:
                continue
            plan = states.get(name)
            if plan is None or any(name not in parameters for parameters in named):
                raise PlanError(f"the plan does not know the parameter {name}")
            found = [
                optimizer.state.get(parameters[name], {})
                for optimizer, parameters in zip(optimizers, named, strict=True)
            ]
            if not all(found):
                continue
            stacked = tuple(parameter.shape) != plan.shape
            merged_optimizer.state[parameter] = {
                key: _merge_entry(key, [entry[key] for entry in found], plan, parameter, stacked)
                for key in found[0]
            }

    # -- counts ----------------------------------------------------------------------------------------------

    def parameter_counts(self) -> tuple[int, ...]:
        """Number of parameters of each sub-model."""
        return tuple(
            sum(
                int(np.prod(s.local_shape(part), dtype=np.int64)) for s in self.state if s.kind == "parameter"
            )
            for part in range(self.k)
        )

    def full_parameter_count(self) -> int:
        """Number of parameters of the model."""
        return sum(int(np.prod(s.shape, dtype=np.int64)) for s in self.state if s.kind == "parameter")


def _merge_entry(key: str, values: list[Any], plan: StatePlan, parameter: Tensor, stacked: bool) -> Any:
    first = values[0]
    if not isinstance(first, Tensor):
        return max(values) if isinstance(first, (int, float)) else first
    if key == "step" or (first.dim() == 0 and plan.shape != ()):
        return torch.stack([value.detach() for value in values]).amax(0)
    return plan.merge_tensors(values, duplicate=stacked).to(parameter.device)


def _get(state_dict: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state_dict:
        raise PlanError(f"the weights lack {name}", hint="these weights belong to another model")
    value = state_dict[name]
    if not isinstance(value, Tensor):
        raise PlanError(f"{name} is a {type(value).__name__}, expected a tensor")
    return value


def _read_state(name: str, entry: Mapping[str, Any], k: int) -> StatePlan:
    if entry["merge"] not in ("place", "average", "stack", "common"):
        raise PlanError(f"{name}: unknown merge {entry['merge']!r}")
    if entry["kind"] not in ("parameter", "buffer", "constant"):
        raise PlanError(f"{name}: unknown kind {entry['kind']!r}")
    shape = tuple(map(int, entry["shape"]))
    cuts = tuple(None if cut is None else tuple(cut) for cut in entry["cuts"])
    if len(cuts) != len(shape) or any(size < 0 for size in shape):
        raise PlanError(f"{name}: {len(cuts)} cuts for the shape {shape}")
    for size, cut in zip(shape, cuts, strict=True):
        if cut is not None and len(cut) != k:
            raise PlanError(f"{name}: a cut into another number of sub-models than {k}")
        for text in cut or ():
            index = decode_ranges(text)
            if index.size and (index[-1] >= size or (np.diff(index) <= 0).any()):
                raise PlanError(f"{name}: the cut {text!r} does not fit the size {size}")
    return StatePlan(
        name=name,
        kind=entry["kind"],
        shape=shape,
        cuts=cuts,
        merge=entry["merge"],
        scale=float(entry.get("scale", 1.0)),
        aliases=tuple(entry.get("aliases", ())),
        persistent=bool(entry.get("persistent", True)),
    )


def _compact(data: dict[str, Any]) -> str:
    """JSON with one line for each axis and each state tensor."""
    lines = ["{"]
    lines += [f"  {json.dumps(key)}: {json.dumps(data[key])}," for key in ("format", "k", "model")]
    lines.append('  "axes": [')
    lines.append(",\n".join(f"    {json.dumps(axis)}" for axis in data["axes"]))
    lines.append('  ],\n  "state": {')
    lines.append(
        ",\n".join(f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in data["state"].items())
    )
    lines.append("  }\n}")
    return "\n".join(line for line in lines if line) + "\n"
