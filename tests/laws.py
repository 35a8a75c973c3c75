"""What holds for any model: helpers that tests apply to many of them."""

import copy
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from typer.testing import CliRunner, Result

import graphsplit as gs
from graphsplit.analysis import Analysis
from graphsplit.analysis.inference import operands
from graphsplit.cli import app
from graphsplit.emission import random_state
from graphsplit.plan import StatePlan
from graphsplit.program import Program, check, op_name
from graphsplit.signature import as_call
from graphsplit.verification import in_double, opened

Call = tuple[tuple[Any, ...], Mapping[str, Any]]
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def tensors(value: Any) -> list[Tensor]:
    """The tensors in a nested value."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def owned(value: Any) -> Any:
    """A nested value with tensors of its own."""
    return pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, value)


def wide(value: Any) -> Any:
    """A nested value with its floating-point tensors in float64."""
    return pytree.tree_map(
        lambda x: x.double() if isinstance(x, Tensor) and x.dtype.is_floating_point else x, value
    )


def largest_difference(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Largest absolute difference, relative to the largest entry of a tensor where that is above one."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape, f"{tuple(a.shape)} instead of {tuple(b.shape)}"
        assert a.dtype == b.dtype, f"{a.dtype} instead of {b.dtype}"
        if not b.numel() or torch.equal(a, b):
            continue
        a, b = a.detach().double(), b.detach().double()
        difference = (a - b).abs().max()
        assert not torch.isnan(difference), "one of the two is not a number"
        worst = max(worst, float(difference / b.abs().max().clamp_min(1)))
    return worst


# ---------------------------------------------------------------------------------------------------------
# Faithful: a program does what its model does


@dataclass
class Step:
    """What one call and its backward pass leave behind."""

    outputs: Any
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def step(module: nn.Module, call: Call, seed: int = 0) -> Step:
    """Run a module on copies of the inputs and go backward from an uneven sum of its outputs."""
    args, kwargs = owned(call)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        outputs = module(*args, **kwargs)
        trained = [output for output in tensors(outputs) if output.requires_grad]
        if trained:
            sum((uneven(output) * output).sum() for output in trained).backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in module.named_parameters()
    }
    return Step(owned(outputs), gradients, {name: buffer.detach() for name, buffer in module.named_buffers()})


def uneven(tensor: Tensor) -> Tensor:
    """Weights of order one, all different, for a scalar that every entry matters to."""
    return torch.arange(tensor.numel(), dtype=tensor.dtype).reshape(tensor.shape).sin().add(1.5)


def assert_same_step(found: Step, expected: Step, what: str = "") -> None:
    """Outputs, nesting and buffers are bit-equal; gradients up to the order in which they are summed."""
    assert pytree.tree_structure(found.outputs) == pytree.tree_structure(expected.outputs), what
    pairs = zip(pytree.tree_leaves(found.outputs), pytree.tree_leaves(expected.outputs), strict=True)
    for position, (a, b) in enumerate(pairs):
        if isinstance(b, Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b), f"output {position}{what}"
        else:
            assert a == b, f"output {position}{what}"
    assert found.gradients.keys() == expected.gradients.keys(), what
    for name, gradient in expected.gradients.items():
        error = largest_difference([found.gradients[name]], [gradient])
        assert error <= (1e-12 if gradient.dtype == torch.float64 else 1e-5), (
            f"gradient of {name}{what}: {error}"
        )
    for name, buffer in expected.buffers.items():
        assert torch.equal(found.buffers[name], buffer), f"buffer {name}{what}"


def assert_faithful(model: nn.Module, inputs: Any, *others: Any) -> Program:
    """Trace a model and compare it with what is emitted, in both modes, on these inputs and on others."""
    args, kwargs = as_call(inputs)
    program = gs.trace(model, args, kwargs)
    check(program)
    for training in (True, False):
        for number, call in enumerate(map(as_call, (inputs, *others))):
            expected = step(copy.deepcopy(model).train(training), call)
            found = step(gs.emit(program).train(training), call)
            assert_same_step(found, expected, f" on inputs {number}, training={training}")
    return program


# ---------------------------------------------------------------------------------------------------------
# Untouched: nobody's input is changed


@dataclass
class _Snapshot:
    tensors: dict[str, tuple[Tensor, Tensor]]
    details: list[Any]

    @classmethod
    def of(cls, model: nn.Module) -> "_Snapshot":
        named = {f"parameter {n}": p for n, p in model.named_parameters(remove_duplicate=False)}
        named |= {f"buffer {n}": b for n, b in model.named_buffers(remove_duplicate=False)}
        named |= {f"gradient {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
        details = [
            (
                name,
                module.training,
                sorted(module.__dict__),
                list(module._forward_hooks),
                list(module._modules),
            )
            for name, module in model.named_modules()
        ]
        details += [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
        return cls({name: (value, value.detach().clone()) for name, value in named.items()}, details)


@contextmanager
def model_unchanged(model: nn.Module) -> Iterator[None]:
    """Assert that a model is the same afterwards, bit for bit and object for object, and so is the random state."""
    before = _Snapshot.of(model)
    random_state = torch.get_rng_state()
    gradient_mode = torch.is_grad_enabled()
    yield
    after = _Snapshot.of(model)
    assert torch.equal(torch.get_rng_state(), random_state), "the random state has moved"
    assert torch.is_grad_enabled() == gradient_mode
    assert after.details == before.details
    assert after.tensors.keys() == before.tensors.keys()
    for name, (value, copied) in before.tensors.items():
        assert after.tensors[name][0] is value, f"{name} is another tensor"
        assert value.is_meta or torch.equal(value.detach(), copied), f"{name} has changed"


@contextmanager
def program_unchanged(program: Program) -> Iterator[None]:
    """Assert that a program reads the same afterwards, and that its state is bit-equal."""
    text = str(program)
    before = {name: entry.tensor.detach().clone() for name, entry in program.state.items()}
    yield
    assert str(program) == text
    assert list(program.state) == list(before)
    for name, entry in program.state.items():
        assert entry.tensor.is_meta or torch.equal(entry.tensor.detach(), before[name]), f"{name} has changed"


# ---------------------------------------------------------------------------------------------------------
# Exchange: units of one axis can be swapped wherever the plan couples them, and nowhere less


def random_values(program: Program, seed: int = 0) -> dict[str, Tensor]:
    """The state of a program in float64, with random values in every parameter and buffer."""
    values = {name: wide(entry.tensor.detach()) for name, entry in program.state.items()}
    return values | random_state(program, torch.Generator().manual_seed(seed))


class Runner:
    """Runs a program with any state: in eval mode, in float64, before a closing softmax or sigmoid."""

    def __init__(self, program: Program, inputs: Iterable[Tensor]) -> None:
        self.inputs = [wide(tensor) for tensor in inputs]
        self.module = gs.emit(opened(in_double(program))).eval()
        self.state = dict(self.module.named_parameters()) | dict(self.module.named_buffers())

    def __call__(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        """The floating-point outputs."""
        for name, tensor in self.state.items():
            assert tensor.shape == values[name].shape, name
            tensor.data = values[name].clone()
        with torch.no_grad():
            outputs = self.module.run_flat(self.inputs)
        return [output for output in outputs if isinstance(output, Tensor) and output.dtype.is_floating_point]


@dataclass(frozen=True)
class Units:
    """Units of one axis, and where the state holds them.

    Attributes:
        name: Of the axis.
        units: Their numbers in the assignment, in the order of the axis.
        places: For each state dimension, by name and number, the unit of every index.
    """

    name: str
    units: NDArray[np.int32]
    places: dict[tuple[str, int], NDArray[np.int32]]

    def swapped(
        self, values: Mapping[str, Tensor], u: int, v: int, places: Iterable[tuple[str, int]]
    ) -> dict[str, Tensor]:
        """State with two units exchanged in these places."""
        result = dict(values)
        for name, dim in places:
            unit_at = self.places[name, dim]
            order = np.arange(unit_at.size)
            here, there = np.flatnonzero(unit_at == u), np.flatnonzero(unit_at == v)
            assert here.size == there.size > 0
            order[here], order[there] = there, here
            result[name] = result[name].index_select(dim, torch.from_numpy(order))
        return result


def anchored_units(analysis: Analysis) -> set[int]:
    """Units that cannot be exchanged, because they are told apart by what is not state.

    They meet values that all sub-models share (an input with as many features, a sinusoidal table, a mask) in an
    element-wise op, where each takes its own entry of them. Values that are the same for all of them (the zeros that
    a recurrent layer starts from) anchor nothing.
    """
    found: set[int] = set()
    for node, facts in analysis.inference.facts.items():
        for path, operand in operands(node):
            if path in facts.expects and not is_uniform(operand):
                for ids in facts.expects[path]:
                    found.update(np.unique(analysis.assignment.unit[ids]).tolist())
    return found


UNIFORM = {"zeros.default", "ones.default", "full.default", "zeros_like.default", "ones_like.default"}


def is_uniform(node: fx.Node) -> bool:
    """True for a tensor with one value everywhere."""
    return node.op == "call_function" and op_name(node) in UNIFORM


def axes_of(analysis: Analysis) -> list[Units]:
    """Every axis whose units can be exchanged."""
    unit, axis_of_id = analysis.assignment.unit, analysis.assignment.axis
    anchored = anchored_units(analysis)
    axes = []
    for number, axis in enumerate(analysis.assignment.axes):
        places = {}
        units: list[int] = []
        for name, dims in analysis.inference.state.items():
            for dim, ids in enumerate(dims):
                if ids is not None and (axis_of_id[ids] == number).any():
                    places[name, dim] = unit[ids]
                    units += unit[ids][axis_of_id[ids] == number].tolist()
        members = np.array(list(dict.fromkeys(units)), np.int32)
        if members.size > 1 and anchored.isdisjoint(members.tolist()):
            axes.append(Units(axis.name, members, places))
    return axes


# ---------------------------------------------------------------------------------------------------------
# Isolation: what happens in one sub-model stays there


def random_states(part: gs.Partition) -> list[dict[str, Tensor]]:
    """State of sub-models that were never slices of one model, in float64; what is common to them stays as it is."""
    common = {plan.name for plan in part.plan.state if plan.merge == "common"}
    states = []
    for seed, program in enumerate(part.programs):
        drawn = random_values(program, seed)
        kept = {name: wide(program.state[name].tensor.detach()) for name in program.state if name in common}
        states.append(drawn | kept)
    return states


def perturbed(plan: StatePlan, merged: Tensor, part: int, noise: Tensor, k: int) -> Tensor:
    """The tensor of an exact merge after ``noise`` was added to that of one sub-model."""
    result = merged.clone()
    if plan.merge == "stack":
        dim = plan.stack_dim
        if dim is None:
            result[part] += noise
        else:
            start = sum(plan.local_shape(other)[dim] for other in range(part))
            result.narrow(dim, start, noise.shape[dim]).add_(noise)
        return result
    share = noise * plan.scale / (k if plan.merge == "average" else 1)
    index = plan.grid(part, merged.device)
    if index is None:
        result += share
    else:
        result[index] += share
    return result


def script(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run(*arguments: object) -> Result:
    """Run a command line in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
