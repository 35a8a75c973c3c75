"""Every rule by brute force: PyTorch's own samples of an op, between layers, are divided exactly or refused.

A case is a sample from `torch.testing._internal.opinfo` and a role for each of its operands. By default a few cases of
some ops of every family of rules are tried. ``GRAPHSPLIT_SAMPLES=2`` tries every case of two samples of every op that
PyTorch has, which takes hours; ``-k`` picks ops, and ``-s`` shows what became of the cases.
"""

import functools
import itertools
import os
import sys
import types
import unittest
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import graphsplit as gs
from graphsplit.errors import UserError
from laws import largest_difference, step, uneven

BOUND = 1e-9
COUNT = int(os.environ.get("GRAPHSPLIT_SAMPLES", "0"))
SIZES = {"XS": 2, "S": 6, "M": 12, "L": 24}
"""Sizes in the samples instead of torch's 3, 5, 10 and 20: two sub-models can share them."""

# Ops of every family of rules that has samples; recurrent layers have none.
FEW = (
    "nn.functional.scaled_dot_product_attention", "nn.functional.linear", "matmul", "einsum", "nn.functional.conv2d",
    "nn.functional.embedding", "split", "cat", "index_select", "nn.functional.layer_norm", "nn.functional.batch_norm",
    "add", "where", "nn.functional.prelu", "nn.functional.max_pool2d", "nn.functional.grid_sample", "softmax", "sort",
    "gather", "index_put", "permute", "unfold", "fft.rfft",
)  # fmt: skip


@functools.cache
def op_infos() -> dict[str, Any]:
    """torch's table of ops with samples, by name and variant."""
    # torch's own test cases, which come along, derive from a class of a package that nothing here needs.
    stub = types.ModuleType("expecttest")
    stub.TestCase = unittest.TestCase  # type: ignore[attr-defined]
    sys.modules.setdefault("expecttest", stub)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal import common_methods_invocations as table
    # Ops with noise are wrapped in a function that seeds and calls; a graph has no such step.
    table.wrapper_set_seed = lambda op, *args, **kwargs: op(*args, **kwargs)
    return {
        f"{op.name} {op.variant_test_name}".strip(): op for op in table.op_db if torch.float64 in op.dtypes
    }


@functools.cache
def samples(name: str) -> tuple[Any, ...]:
    """Samples of an op in float64 that differ in more than values; all of them, or as many as are asked for."""
    try:
        found = _samples(name, SIZES)
    except Exception:  # some draw indices that are written for torch's sizes
        found = _samples(name, {})
    if not COUNT or len(found) <= COUNT:
        return found
    return tuple(found[place * len(found) // COUNT] for place in range(COUNT))


def _samples(name: str, sizes: dict[str, int]) -> tuple[Any, ...]:
    info = op_infos()[name]
    makers = [
        m for n, m in sys.modules.items() if n.startswith("torch.testing._internal.") and hasattr(m, "S")
    ]
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module, (size, value) in itertools.product(makers, sizes.items()):
            if isinstance(getattr(module, size, None), int):
                patch.setattr(module, size, value)
        torch.manual_seed(0)
        found = list(info.sample_inputs("cpu", torch.float64, requires_grad=info.supports_autograd))
    return tuple({described(sample): sample for sample in found}.values())


def described(sample: Any) -> str:
    """A sample without the values of its tensors."""
    leaves = (sample.input, sample.args, sample.kwargs)
    return str(pytree.tree_map(lambda x: (x.dtype, tuple(x.shape)) if isinstance(x, Tensor) else x, leaves))


def leaves_of(sample: Any) -> tuple[list[Any], pytree.TreeSpec]:
    return pytree.tree_flatten((sample.input, sample.args, sample.kwargs))


def is_operand(leaf: Any) -> bool:
    """Is this a tensor that layers could make?"""
    return isinstance(leaf, Tensor) and leaf.dtype == torch.float64 and leaf.requires_grad


# ---------------------------------------------------------------------------------------------------------
# Cases


@dataclass(frozen=True)
class Role:
    """What an operand of the op is in the model.

    Attributes:
        kind: ``units``: features of a layer along ``dim``; ``mean``: a weighted sum over units, which goes by the op
            alone to the outputs; ``weight``: a parameter of which the op makes the weight between two layers;
            ``parameter``, ``input``, ``constant``: as they say.
        dim: Of ``units`` alone.
    """

    kind: str
    dim: int = 0

    def __str__(self) -> str:
        return f"{self.kind} {self.dim}" if self.kind == "units" else self.kind


@dataclass(frozen=True)
class Case:
    """A sample of an op by its number, and the roles of its operands."""

    name: str
    number: int
    roles: tuple[Role, ...]

    @property
    def kind(self) -> str:
        """What the case is about."""
        return next(role.kind for role in self.roles if role.kind in ("units", "mean", "weight"))

    def __str__(self) -> str:
        return f"{self.name}, sample {self.number}: {', '.join(map(str, self.roles))}"


def cases(name: str) -> Iterator[Case]:
    """Every operand in every leading role that its sample allows; what the others are goes in turn."""
    others = itertools.cycle(("constant", "parameter", "input"))
    for number, sample in enumerate(samples(name)):
        shapes = [tuple(leaf.shape) for leaf in leaves_of(sample)[0] if is_operand(leaf)]
        chosen = [(Role("mean"),) * len(shapes)] if shapes else []
        for place, shape in enumerate(shapes):
            leads = [Role("units", dim) for dim, size in enumerate(shape) if size > 1 and size % 2 == 0]
            for lead in (*leads, Role("mean")):
                rest = Role(next(others))
                chosen.append(tuple(lead if other == place else rest for other in range(len(shapes))))
            chosen += [tuple(_aligned(lead, shape, other) for other in shapes) for lead in leads]
            if 1 <= len(shape) <= 2:
                rest = Role("constant")
                chosen.append(
                    tuple(Role("weight") if other == place else rest for other in range(len(shapes)))
                )
        yield from (Case(name, number, roles) for roles in dict.fromkeys(chosen))


def _aligned(lead: Role, shape: tuple[int, ...], other: tuple[int, ...]) -> Role:
    """The same dimension of another operand, counted from the last; a parameter where it has another size."""
    dim = lead.dim - len(shape) + len(other)
    return Role("units", dim) if dim >= 0 and other[dim] == shape[lead.dim] else Role("parameter")


# ---------------------------------------------------------------------------------------------------------
# Models

linear = functools.partial(nn.Linear, dtype=torch.float64)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


class Between(nn.Module):
    """An op between layers, with inputs to run it on as ``example``.

    Layers scale the values of the sample by at most a half, which keeps most of them where the op is defined.
    """

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.op, self.kind = op_infos()[case.name].op, case.kind
        leaves, self.spec = leaves_of(samples(case.name)[case.number])
        roles = iter(case.roles)
        self.places = [(leaf, next(roles) if is_operand(leaf) else Role("constant")) for leaf in leaves]
        self.layers = nn.ModuleDict()
        self.values = nn.ParameterDict()
        self.example: list[Tensor] = []
        for place, (leaf, role) in enumerate(self.places):
            if isinstance(leaf, Tensor):
                self._prepare(str(place), leaf.detach(), role)
        with torch.no_grad():
            results = self._results(iter(self.example))
        # A batch stays one where the result still has it, so that another size is tried, too.
        batch = self.example[0].shape[0] if self.example and not self._has_units_in_batch() else -1
        self.first = [int(y.dim() > 1 and y.shape[0] == batch) for y in results]
        if self.kind == "units":
            widths = [y.flatten(first).shape[-1] for y, first in zip(results, self.first, strict=True)]
            self.heads = nn.ModuleList(linear(width, 2) for width in widths)
        elif self.kind == "weight":
            out, into = results[0].shape
            self.before, self.after = linear(3, into), linear(out, 2)
            self.example.append(normal(2, 3))

    def _has_units_in_batch(self) -> bool:
        return any(role.kind == "units" and role.dim == 0 for _, role in self.places)

    def _prepare(self, name: str, value: Tensor, role: Role) -> None:
        shape = list(value.shape)
        match role.kind:
            case "units":
                self.layers[name] = linear(3, shape[role.dim])
                shape[role.dim] = 3
                self.example += [normal(*shape), value]
            case "mean":
                self.layers[name] = nn.Sequential(linear(3, 4), nn.Tanh(), linear(4, 1))
                self.example += [normal(*shape, 3), value]
            case "input":
                self.example.append(value)
            case "constant":
                self.register_buffer(f"constant{name}", value.clone(), persistent=False)
            case _:
                self.values[name] = nn.Parameter(value.clone())

    def _operand(self, place: int, inputs: Iterator[Tensor]) -> Any:
        leaf, role = self.places[place]
        if not isinstance(leaf, Tensor):
            return leaf
        match role.kind:
            case "units":
                x = self.layers[str(place)](next(inputs).movedim(role.dim, -1)).movedim(-1, role.dim)
                return next(inputs) * (0.75 + 0.25 * torch.tanh(x))
            case "mean":
                return (0.75 + 0.05 * self.layers[str(place)](next(inputs)).squeeze(-1)) * next(inputs)
            case "input":
                return next(inputs)
            case "constant":
                return getattr(self, f"constant{place}")
            case _:
                return self.values[str(place)]

    def _results(self, inputs: Iterator[Tensor]) -> list[Tensor]:
        """The results of the op as real numbers."""
        operands = [self._operand(place, inputs) for place in range(len(self.places))]
        first, args, kwargs = pytree.tree_unflatten(operands, self.spec)
        found = [y for y in pytree.tree_leaves(self.op(first, *args, **kwargs)) if isinstance(y, Tensor)]
        real = [torch.view_as_real(y.resolve_conj()) if y.is_complex() else y for y in found]
        return [y if y.is_floating_point() else y.double() for y in real]

    def forward(self, *inputs: Tensor) -> Any:
        given = iter(inputs)
        results = self._results(given)
        if self.kind == "weight":
            return (self.after(F.linear(self.before(next(given)), results[0])),)
        if self.kind == "mean":
            return tuple(y * 2 for y in results)
        return tuple(
            head(y.flatten(first)) for head, y, first in zip(self.heads, results, self.first, strict=True)
        )


# ---------------------------------------------------------------------------------------------------------
# Judgement


@dataclass(frozen=True)
class Finding:
    """What became of a case: ``split``, ``whole`` (in part, or all of it), ``refused`` or ``skipped``, and why."""

    kind: str
    reason: str = ""


def judge(case: Case) -> Finding:
    """Divide the model of a case by two; anything but an exact division or a refusal by name raises."""
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Between(case)
        example = tuple(model.example)
        found = step(model, (example, {}))
    except Exception as error:  # whatever torch raises where an op does not take such operands
        return Finding("skipped", f"no such model: {type(error).__name__}: {error}")
    values = [*found.outputs, *found.gradients.values()]
    if not found.outputs or not all(y.numel() and bool(torch.isfinite(y).all()) for y in values):
        return Finding("skipped", "nothing finite comes out")
    try:
        part = gs.partition(model, example, k=2)
        certificate = part.verify()
    except UserError as refusal:
        held = "held together; " in refusal.message
        return Finding("whole" if held else "refused", str(refusal))
    assert certificate.ok and certificate.max_error < BOUND, f"{case}: {certificate}"
    error = merge_error(part, example)
    assert error < BOUND, f"{case}: the merge differs from the sub-models in train mode by {error:.1e}"
    kept = part.analysis.kept_whole
    return Finding("whole" if kept else "split", "; ".join(kept))


def merge_error(part: gs.Partition, inputs: tuple[Tensor, ...]) -> float:
    """How far the merge is from the mean of the sub-models in train mode: outputs, and gradients of the inputs."""
    found = [_in_training(module, inputs) for module in part.submodels]
    again = [_in_training(module, inputs, seed=1) for module in part.submodels]
    pairs = zip(itertools.chain(*found), itertools.chain(*again), strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        return 0.0  # noise, of which every model draws its own
    mean = [sum(values) / part.k for values in zip(*found, strict=True)]
    return largest_difference(_in_training(part.merge(), inputs), mean)


def _in_training(module: nn.Module, inputs: tuple[Tensor, ...], seed: int = 0) -> list[Tensor]:
    """Outputs, and the gradients of an uneven sum of them for every input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        outputs = list(module(*leaves))
    trained = [(uneven(y) * y).sum() for y in outputs if y.requires_grad]
    if not trained:
        return outputs
    found = torch.autograd.grad(trained, leaves, allow_unused=True)
    return [*outputs, *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True))]


@pytest.fixture(scope="module")
def tally() -> Iterator[Counter[str]]:
    """Counts of what became of the cases, which ``-s`` shows at the end."""
    counts: Counter[str] = Counter()
    yield counts
    print("\nin all: " + ", ".join(f"{count} {what}" for what, count in sorted(counts.items())))


def few_findings(name: str) -> list[Finding]:
    """For each kind of case the first of those with the most roles that the op takes."""
    by_kind: dict[str, list[Case]] = {}
    for case in sorted(cases(name), key=lambda case: len(set(case.roles)), reverse=True):
        by_kind.setdefault(case.kind, []).append(case)
    found = []
    for chosen in by_kind.values():
        findings = (judge(case) for case in chosen[:8])
        found.append(next((finding for finding in findings if finding.kind != "skipped"), Finding("skipped")))
    return found


# Samples warn of what they show: sizes that are empty, options that are going away.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", op_infos() if COUNT else FEW)
def test_samples_are_divided_exactly_or_refused(name: str, tally: Counter[str]) -> None:
    findings = [judge(case) for case in cases(name)] if COUNT else few_findings(name)
    counts = Counter(finding.kind for finding in findings)
    tally.update(counts)
    print(f"\n{name}: {dict(counts)}", *sorted({f.reason for f in findings if f.kind == "whole"}), sep="\n  ")
    if not COUNT:
        assert counts["split"]
