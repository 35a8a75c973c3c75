"""Every rule by brute force: PyTorch's own samples of an op, between layers, are divided exactly or refused."""

from __future__ import annotations

import functools
import itertools
import sys
import types
import unittest
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import graphsplit as gs
from graphsplit.errors import UserError
from laws import uneven

BOUND = 1e-9
SIZES = {"XS": 2, "S": 6, "M": 12, "L": 24}
"""Sizes of the samples instead of torch's 3, 5, 10 and 20: two sub-models can share them."""


@functools.cache
def op_infos() -> dict[str, Any]:
    """torch's table of ops with sample inputs, by name and variant."""
    # torch's own test cases, which come along, derive from a class of a package that nothing here needs.
    stub = types.ModuleType("expecttest")
    stub.TestCase = unittest.TestCase  # type: ignore[attr-defined]
    sys.modules.setdefault("expecttest", stub)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal import common_methods_invocations as table
    # Ops with noise are wrapped in a function that seeds before it calls; a graph has no such call.
    table.wrapper_set_seed = lambda op, *args, **kwargs: op(*args, **kwargs)  # type: ignore[assignment]
    return {
        f"{op.name} {op.variant_test_name}".strip(): op for op in table.op_db if torch.float64 in op.dtypes
    }


def modules_with_sizes() -> Iterator[Any]:
    """The modules of torch that make samples, each with its own copy of the sizes."""
    for name, module in list(sys.modules.items()):
        if name.startswith("torch.testing._internal.") and isinstance(getattr(module, "S", None), int):
            yield module


@functools.cache
def samples(name: str) -> list[Any]:
    """The samples of an op in float64 that differ in more than values."""
    info = op_infos()[name]
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in modules_with_sizes():
            for size, value in SIZES.items():
                patch.setattr(module, size, value, raising=False)
        torch.manual_seed(0)
        found = list(info.sample_inputs("cpu", torch.float64))
    return list({described(sample): sample for sample in found}.values())


def described(sample: Any) -> str:
    """A sample without the values of its tensors."""
    leaves = (sample.input, sample.args, sample.kwargs)
    return str(pytree.tree_map(lambda x: (x.dtype, tuple(x.shape)) if isinstance(x, Tensor) else x, leaves))


@dataclass(frozen=True)
class Role:
    """What an operand of the op is in the model.

    Attributes:
        kind: ``units``: a layer's features along ``dim``; ``mean``: a weighted sum over units; ``parameter``,
            ``input``, ``constant``: as they say; ``weight``: a parameter with units along two dimensions.
        dim: Of ``units`` alone.
    """

    kind: str
    dim: int = 0

    def __str__(self) -> str:
        return f"{self.kind} {self.dim}" if self.kind == "units" else self.kind


@dataclass(frozen=True)
class Case:
    """One sample of one op, and what its tensors of floating-point numbers are."""

    name: str
    number: int
    roles: tuple[Role, ...]

    def __str__(self) -> str:
        return f"{self.name}, {self.number}: {', '.join(map(str, self.roles))}"


class Between(nn.Module):
    """An op between layers.

    Operands with units are ``value * (0.75 + 0.25 tanh(layer(x)))``: they stay where the op is defined.
    """

    def __init__(self, call: Callable[..., Any], leaves: Sequence[Any], roles: Sequence[Role]) -> None:
        super().__init__()
        self.call, self.roles, self.plain = call, list(roles), {}
        self.example: list[Tensor] = []
        self.layers = nn.ModuleDict()
        self.values = nn.ParameterDict()
        remaining = iter(roles)
        self.leaves: list[Role | None] = []
        for place, leaf in enumerate(leaves):
            is_operand = isinstance(leaf, Tensor) and leaf.dtype == torch.float64
            role = next(remaining) if is_operand else None
            self.leaves.append(role)
            if role is not None and role.kind != "constant":
                self._prepare(f"x{place}", leaf.detach(), role)
            elif isinstance(leaf, Tensor):
                self.register_buffer(f"x{place}", leaf.detach().clone(), persistent=False)
            else:
                self.plain[place] = leaf
        with torch.no_grad():
            self.prepare_heads(self.results(iter(self.example)))

    def _prepare(self, name: str, value: Tensor, role: Role) -> None:
        shape = list(value.shape)
        match role.kind:
            case "units":
                self.layers[name] = nn.Linear(3, shape[role.dim])
                shape[role.dim] = 3
                self.example += [torch.randn(shape), value]
            case "mean":
                self.layers[name] = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
                self.example += [torch.randn(*shape, 3), value]
            case "input":
                self.example.append(value)
            case _:
                self.values[name] = nn.Parameter(value.clone())

    def prepare_heads(self, results: list[Tensor]) -> None:
        """Layers after the op."""
        kind = next(role.kind for role in self.roles if role.kind in ("units", "mean", "weight"))
        self.kind = kind
        if kind == "weight":
            out, into = results[0].shape
            self.before, self.after = nn.Linear(3, into), nn.Linear(out, 2)
            self.example.append(torch.randn(2, 3))
        elif kind == "units":
            role = next(role for role in self.roles if role.kind == "units")
            batch = self.example[0].shape[0]
            self.first = [int(role.dim > 0 and y.dim() > 1 and y.shape[0] == batch) for y in results]
            self.heads = nn.ModuleList(
                nn.Linear(y.flatten(first).shape[-1], 2) for y, first in zip(results, self.first, strict=True)
            )

    def operand(self, place: int, role: Role | None, inputs: Iterator[Tensor]) -> Any:
        name = f"x{place}"
        match role.kind if role is not None else None:
            case "units":
                features = self.layers[name](next(inputs).movedim(role.dim, -1)).movedim(-1, role.dim)
                return next(inputs) * (0.75 + 0.25 * torch.tanh(features))
            case "mean":
                return (0.75 + 0.05 * self.layers[name](next(inputs)).squeeze(-1)) * next(inputs)
            case "input":
                return next(inputs)
            case "parameter" | "weight":
                return self.values[name]
        return self.plain[place] if place in self.plain else getattr(self, name)

    def results(self, inputs: Iterator[Tensor]) -> list[Tensor]:
        """The op's results as real numbers."""
        operands = [self.operand(place, role, inputs) for place, role in enumerate(self.leaves)]
        found = [y for y in pytree.tree_leaves(self.call(operands)) if isinstance(y, Tensor)]
        real = [torch.view_as_real(y.resolve_conj()) if y.is_complex() else y for y in found]
        return [y if y.is_floating_point() else y.double() for y in real]

    def forward(self, *inputs: Tensor) -> Any:
        given = iter(inputs)
        results = self.results(given)
        if self.kind == "weight":
            return self.after(F.linear(self.before(next(given)), results[0]))
        if self.kind == "mean":
            return tuple(y * 2 for y in results)
        return sum(
            head(y.flatten(first)) for head, y, first in zip(self.heads, results, self.first, strict=True)
        )


def operands_of(sample: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves((sample.input, sample.args, sample.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dtype == torch.float64]


def model_of(case: Case) -> Between:
    """The model of a case, in float64."""
    info, sample = op_infos()[case.name], samples(case.name)[case.number]
    leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))

    def call(values: list[Any]) -> Any:
        first, args, kwargs = pytree.tree_unflatten(values, spec)
        return info.op(first, *args, **kwargs)

    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return Between(call, leaves, case.roles)
    finally:
        torch.set_default_dtype(default)


OTHERS = ("constant", "parameter", "input")


def cases(name: str) -> Iterator[Case]:
    """Every operand in every role that its sample allows; what the others are goes in turn."""
    turn = itertools.cycle(OTHERS)
    for number, sample in enumerate(samples(name)):
        shapes = [tuple(operand.shape) for operand in operands_of(sample)]
        chosen = [(Role("mean"),) * len(shapes)] if shapes else []
        for place, shape in enumerate(shapes):
            leads = [Role("units", dim) for dim, size in enumerate(shape) if size > 1 and size % 2 == 0]
            for lead in (*leads, Role("mean")):
                chosen.append(_roles(lead, place, len(shapes), next(turn)))
            chosen += [tuple(_aligned(lead, shape, other) for other in shapes) for lead in leads]
            chosen.append(_roles(Role("weight"), place, len(shapes), "constant"))
        yield from (Case(name, number, roles) for roles in dict.fromkeys(chosen))


def _roles(lead: Role, place: int, count: int, others: str) -> tuple[Role, ...]:
    return tuple(lead if other == place else Role(others) for other in range(count))


def _aligned(lead: Role, shape: tuple[int, ...], other: tuple[int, ...]) -> Role:
    """The same dimension of another operand, counted from the last; a parameter where it is another size."""
    dim = lead.dim - len(shape) + len(other)
    return Role("units", dim) if dim >= 0 and other[dim] == shape[lead.dim] else Role("parameter")


@dataclass(frozen=True)
class Finding:
    """What became of a case: ``split``, ``whole``, ``refused`` or ``skipped``, and why."""

    kind: str
    reason: str = ""


def judge(case: Case, k: int = 2) -> Finding:
    """Divide the model of a case; anything but an exact division or a refusal by name raises."""
    try:
        model = model_of(case)
        example = tuple(model.example)
        found = _gradients(model, example)
    except Exception as error:  # whatever torch raises where an op does not take such operands
        return Finding("skipped", f"no model: {type(error).__name__}: {error}")
    if not found or not all(y.numel() and bool(torch.isfinite(y).all()) for y in found):
        return Finding("skipped", "nothing finite comes out")
    try:
        part = gs.partition(model, example, k=k)
        certificate = part.verify()
    except UserError as refusal:
        return Finding("refused", str(refusal))
    assert certificate.ok and certificate.max_error < BOUND, f"{case}: {certificate}"
    error = gradient_error(part, example)
    assert error < BOUND, f"{case}: gradients of the inputs differ by {error:.1e}"
    return (
        Finding("whole", "; ".join(part.analysis.kept_whole))
        if part.analysis.kept_whole
        else Finding("split")
    )


def gradient_error(part: gs.Partition, inputs: tuple[Tensor, ...]) -> float:
    """How far the merged model's gradients are from the mean of the sub-models', in train mode."""
    means: list[Tensor] = []
    for module in part.submodels:
        found = _gradients(module, inputs)
        if not _same(found, _gradients(module, inputs, seed=1)):
            return 0.0  # noise: every model draws its own
        means = (
            [a + b / part.k for a, b in zip(means, found, strict=True)]
            if means
            else [y / part.k for y in found]
        )
    merged = _gradients(part.merge(), inputs)
    return max(
        (
            float((a - b).abs().max()) / max(1.0, float(b.abs().max()))
            for a, b in zip(merged, means, strict=True)
            if b.numel()
        ),
        default=0.0,
    )


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _gradients(module: nn.Module, inputs: tuple[Tensor, ...], seed: int = 0) -> list[Tensor]:
    """Gradients of an uneven sum of the outputs, and the outputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        outputs = pytree.tree_leaves(module(*leaves))
    total = sum((uneven(y) * y).sum() for y in outputs if y.requires_grad)
    if not isinstance(total, Tensor):
        return list(outputs)
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [*outputs, *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True))]
