"""Ensembles: K models as one module, whose output is the weighted sum of theirs.

With ``f_k(x)`` what member ``k`` gives, the ensemble gives ``sum_k w_k f_k(x)`` (EC-DNN, Sun & Liu,
Neurocomputing 2018). Where the loss is convex in the outputs, and the weights are not negative and sum to
one, the loss of the ensemble is at most the weighted mean of the losses of the members (Jensen), example by
example.

- simple (eq. 5): ``w_k = 1 / K``;
- regression (eq. 7): the least squares of the targets on the members' outputs;
- margin (eq. 8): weights of each example by how clearly each member tells its class from the others, where
  the classes are known, in training; ``1 / K`` elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np
import torch
from scipy.optimize import nnls  # type: ignore[attr-defined]
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from graphsplit.bundle import EnsembleBundle, program_of
from graphsplit.depth.anytime import classes_dim
from graphsplit.emission import ProgramModule, emit
from graphsplit.errors import InputError, PlanError, UnsupportedError, UserError
from graphsplit.graphs import aten
from graphsplit.program import TRAINING, Dim, Mode, Program, StateEntry, TensorMeta
from graphsplit.signature import as_call
from graphsplit.verification import (
    BOUND,
    Certificate,
    Row,
    drawn_state,
    flat_inputs,
    in_double,
    outputs_error,
    projected_gradients,
    quiet,
    run_chain,
    tensors_error,
)

if TYPE_CHECKING:
    from graphsplit.train.loop import Batches

Average = Literal["outputs", "probabilities"]
"""What is averaged: what the members give, or its softmax over the classes."""

Rule = Literal["simple", "regression", "margin", "given"]
"""Where the weights come from."""


class Body(Protocol):
    """K models that give their outputs on a leading dimension of K."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of all."""

    def models(self) -> Sequence[nn.Module]:
        """Each by itself; parameters are shared with this module."""


class InTurn(nn.ModuleList):
    """Runs its models one after the other, and stacks what they give."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Tensors with a leading dimension of K, nested as one model nests them.

        Raises:
            InputError: The models give outputs of different shapes; the first that differs is named.
        """
        return stacked([model(*args, **kwargs) for model in self])

    def models(self) -> list[nn.Module]:
        """The models."""
        return list(self)


def stacked(outputs: Sequence[Any]) -> Any:
    """Outputs of K models as one, tensors on a leading dimension of K.

    Raises:
        InputError: The outputs differ in nesting or shape; the first model that differs is named.
    """
    leaves, spec = pytree.tree_flatten(outputs[0])
    columns = [[leaf] for leaf in leaves]
    for number, output in enumerate(outputs[1:], start=1):
        own, other = pytree.tree_flatten(output)
        if other != spec:
            raise InputError(f"model {number} nests its outputs in another way than model 0")
        for column, leaf in zip(columns, own, strict=True):
            if isinstance(leaf, Tensor) and leaf.shape != column[0].shape:
                raise InputError(
                    f"model {number} gives {tuple(leaf.shape)} where model 0 gives {tuple(column[0].shape)}",
                    hint="the members of an ensemble have outputs of one shape",
                )
            column.append(leaf)
    joined = [torch.stack(column) if isinstance(column[0], Tensor) else column[0] for column in columns]
    return pytree.tree_unflatten(joined, spec)


# Weighted sums. K: members, N: examples, C: classes.


def combined(outputs: Tensor, weights: Tensor, average: Average) -> Tensor:
    """The weighted sum of outputs ``[K, N, ...]`` as ``[N, ...]``.

    Args:
        outputs: Of each member.
        weights: One for each member, ``[K]``, or for each of its examples, ``[K, N]``.
        average: ``"probabilities"`` gives the logarithm of the weighted sum of the softmax of the outputs:
            scores, as the members give them.
    """
    shaped = weights.to(outputs).reshape(*weights.shape, *(1,) * (outputs.dim() - weights.dim()))
    if average == "outputs":
        return (outputs * shaped).sum(0)
    return torch.logsumexp(outputs.log_softmax(_classes(outputs)) + shaped.log(), 0)


def _classes(outputs: Tensor) -> int:
    """The dimension of classes of stacked scores."""
    if outputs.dim() < 3:
        raise UserError(
            f"outputs {tuple(outputs.shape[1:])} have no dimension of classes", hint="give average='outputs'"
        )
    return classes_dim(outputs.dim() - 1) + 1


def answers(outputs: Tensor, average: Average) -> Tensor:
    """What is averaged: outputs ``[K, N, ...]``, or their probabilities."""
    return outputs if average == "outputs" else outputs.softmax(_classes(outputs))


def margin_weights(outputs: Tensor, targets: Tensor) -> Tensor:
    """Weights of the members for each example, ``[K, N]``, by their margins; they sum to one.

    The margin is the probability of the true class less that of the likeliest other one; of several positions
    their mean. Weights are the softmax of the margins over the members, which keeps them positive: that form,
    and that margins are those of probabilities, is our choice.

    Args:
        outputs: Scores ``[K, N, C]``, ``[K, N, T, C]`` or ``[K, N, C, H, W]``.
        targets: Classes ``[N, ...]``.
    """
    if targets.dtype.is_floating_point:
        raise UserError(
            "margins are for classes, and the targets are no whole numbers",
            hint="use simple or regression weights",
        )
    probabilities = outputs.detach().softmax(_classes(outputs)).movedim(_classes(outputs), -1)
    places = targets.to(outputs.device).expand(probabilities.shape[:-1])[..., None]
    true = probabilities.gather(-1, places)
    others = probabilities.scatter(-1, places, 0.0).amax(-1, keepdim=True)
    return (true - others).flatten(2).mean(2).softmax(0)


class LeastSquares:
    """The weights whose weighted sum of outputs is nearest to the targets (eq. 7), batch by batch.

    Sums are kept in float64, of K x K numbers. Classes are taken as vectors of zeros with a one. With
    probabilities weights are not negative, as their sum is to have a logarithm.
    """

    def __init__(self, k: int, average: Average) -> None:
        self.average: Average = average
        self.products = torch.zeros(k, k, dtype=torch.float64)
        self.moments = torch.zeros(k, dtype=torch.float64)

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in outputs ``[K, N, ...]`` with their targets."""
        values = answers(outputs.detach(), self.average).double()
        if not targets.dtype.is_floating_point and targets.shape != outputs.shape[1:]:
            dim = _classes(outputs)
            targets = F.one_hot(targets, outputs.shape[dim]).movedim(-1, dim - 1)
        if targets.shape != outputs.shape[1:]:
            raise UserError(f"targets {tuple(targets.shape)} do not fit outputs {tuple(outputs.shape[1:])}")
        flat = values.flatten(1)
        self.products += (flat @ flat.T).cpu()
        self.moments += (flat @ targets.to(values).flatten()).cpu()

    def weights(self) -> Tensor:
        """The weights, ``[K]``; of members that are equal, the same."""
        if not bool(self.products.any()):
            raise UserError("regression weights need data, and there was none")
        values, vectors = torch.linalg.eigh(self.products)
        kept = values > values[-1] * 1e-12
        roots = values.clamp_min(0).sqrt()
        inverse = torch.where(kept, 1 / roots.clamp_min(1e-300), 0.0)
        wanted = inverse * (vectors.T @ self.moments)
        if self.average == "outputs":
            return cast(Tensor, vectors @ (inverse * wanted))
        matrix = (roots * kept)[:, None] * vectors.T
        found, _ = nnls(matrix.numpy(), wanted.numpy())
        return torch.from_numpy(np.asarray(found))


def least_squares(body: Body, data: Batches, k: int, average: Average) -> Tensor:
    """Regression weights of K models on data, in eval mode."""
    from graphsplit.train.loop import read_batch  # takes this module in

    found = LeastSquares(k, average)
    with torch.no_grad():
        for batch in data:
            inputs, targets, _ = read_batch(torch.device("cpu"), batch)
            args, kwargs = as_call(inputs, None)
            found.add(main_output(body(*args, **kwargs)), targets)
    return found.weights()


def main_output(outputs: Any) -> Tensor:
    """The one floating-point tensor among outputs, or the first, which is what losses take."""
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if _is_float(leaf)]
    if not leaves:
        raise UserError("the models give no floating-point tensor, and there is nothing to average")
    return cast(Tensor, leaves[0])


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype.is_floating_point


# The module


class Ensemble(nn.Module):
    """K models as one. Made by `graphsplit.ensemble`.

    It is called as one member is, and gives what one gives: of floating-point tensors the weighted sum, of
    all else what the first member gives.

    Attributes:
        weights: One for each member, a buffer ``[K]``; the margin rule has ``1 / K`` here.
        rule: Where the weights come from.
        average: What is averaged.
    """

    weights: Tensor

    def __init__(
        self, body: nn.Module, weights: Tensor, rule: Rule = "simple", average: Average = "outputs"
    ) -> None:
        super().__init__()
        self.body = body
        self.rule: Rule = rule
        self.average: Average = average
        self.register_buffer("weights", weights.detach().clone())

    @property
    def k(self) -> int:
        """Number of members."""
        return len(self.weights)

    @property
    def members(self) -> list[nn.Module]:
        """Each member by itself; its parameters are this module's."""
        return list(cast(Body, self.body).models())

    @property
    def fused(self) -> bool:
        """True where every op does the work of all members."""
        return not isinstance(self.body, InTurn)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The weighted sum of what the members give."""
        return self._combined(self.body(*args, **kwargs), self.weights)

    def outputs(self, *args: Any, **kwargs: Any) -> Any:
        """What each member gives, on a leading dimension of K."""
        return self.body(*args, **kwargs)

    def for_targets(self, targets: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As `forward`, where the targets are known: in training by margins, weights are each example's own.

        Args:
            targets: Classes of the examples, ``[N, ...]``.
            args: Inputs by position.
            kwargs: Inputs by keyword.
        """
        outputs = self.body(*args, **kwargs)
        if self.rule != "margin" or not self.training:
            return self._combined(outputs, self.weights)
        return self._combined(outputs, margin_weights(main_output(outputs), targets))

    def _combined(self, outputs: Any, weights: Tensor) -> Any:
        def one(leaf: Any) -> Any:
            if _is_float(leaf):
                return combined(leaf, weights, self.average)
            return leaf[0] if isinstance(leaf, Tensor) else leaf

        return pytree.tree_map(one, outputs)

    def programs(self) -> list[Program]:
        """The members as programs, with the values that they have now.

        Raises:
            UserError: A member was never traced.
        """
        members = self.members
        if not all(isinstance(member, ProgramModule) for member in members):
            raise UserError(
                "the members of this ensemble were not traced",
                hint="make it with example inputs: gs.ensemble(models, args=x)",
            )
        return [program_of(cast(ProgramModule, member)) for member in members]

    def program(self) -> Program:
        """All of it as one program, members in turn; what is exported."""
        return weighted(self.programs(), self.weights, self.average)

    def verify(self) -> Certificate:
        """Prove in float64 that the program is the weighted sum of the members, and that the fusion is right.

        Members have random values there; this module, with the values that it has now, is compared in
        float64, too.
        """
        rows: list[Row] = []
        if isinstance(self.body, ProgramModule):
            rows += list(self.body.verify().rows)  # type: ignore[operator]
        return Certificate(
            (*rows, *certify_weighted(self.programs(), self.weights, self.average), *self._now())
        )

    def _now(self) -> Iterator[Row]:
        """This very module, in float64 and eval mode, against its members one by one."""
        wide = copy.deepcopy(self).double().eval()
        signature = cast(ProgramModule, self.members[0]).signature
        inputs = flat_inputs(in_double(self.programs()[0]).signature, None)
        args, kwargs = _call(signature, inputs)
        with torch.no_grad():
            found = pytree.tree_leaves(wide(*args, **kwargs))
            each = [pytree.tree_leaves(member.eval()(*args, **kwargs)) for member in wide.members]
        expected = [_expected(column, wide.weights, self.average) for column in zip(*each, strict=True)]
        yield Row(
            "the ensemble, as it is, against its members (eval)",
            outputs_error(found, expected),
            BOUND,
            "float64",
        )

    def to_bundle(self) -> EnsembleBundle:
        """Members and weights as they are now, to be saved."""
        options = {"rule": self.rule, "average": self.average, "fused": self.fused, "training": self.training}
        return EnsembleBundle(tuple(self.programs()), tuple(self.weights.double().tolist()), options)

    def extra_repr(self) -> str:
        """Weights, for ``print``."""
        return (
            f"{self.rule} weights of {self.average}: {', '.join(f'{weight:.4g}' for weight in self.weights)}"
        )


def _call(signature: Any, inputs: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Flat inputs nested as the model takes them."""
    leaves = [inputs[leaf] if isinstance(leaf, int) else leaf[0] for leaf in signature.in_leaves]
    args, kwargs = pytree.tree_unflatten(leaves, signature.in_spec)
    return tuple(args), dict(kwargs)


def _expected(values: Sequence[Any], weights: Tensor, average: Average) -> Any:
    """The weighted sum by its formula, term by term."""
    if not _is_float(values[0]):
        return values[0]
    if average == "outputs":
        return sum(weight * value for weight, value in zip(weights, values, strict=True))
    dim = classes_dim(values[0].dim())
    return torch.log(sum(w * v.softmax(dim) for w, v in zip(weights, values, strict=True)))


# As a program

PREFIX = "members"


def weighted(programs: Sequence[Program], weights: Tensor, average: Average = "outputs") -> Program:
    """Programs as one that runs all of them and gives the weighted sum of their outputs.

    The state of member ``k`` is called ``members.k.*``; the weights are the buffer ``weights``.

    Args:
        programs: With the same inputs and outputs; they are not changed.
        weights: One for each.
        average: What is averaged.

    Raises:
        PlanError: There is not a weight for each program, or there are none.
        InputError: The programs differ in inputs or outputs.
    """
    if not programs or len(weights) != len(programs):
        raise PlanError(f"{len(weights)} weights for {len(programs)} models")
    check_alike(programs)
    first = programs[0]
    modes: tuple[Mode, ...] = (
        ("train", "eval") if any(p.branches_on_training for p in programs) else ("eval",)
    )
    state: dict[str, StateEntry] = {}
    names: list[str] = []
    for number, program in enumerate(programs):
        for entry in program.state.values():
            name = _inner(number, entry.name)
            aliases = tuple(_inner(number, alias) for alias in entry.aliases)
            state[name] = replace(entry, name=name, aliases=aliases)
        names += [_inner(number, name) for name in program.names]
    dtype = next((meta.dtype for meta in _float_outputs(first)), torch.get_default_dtype())
    state["weights"] = StateEntry("weights", "buffer", weights.detach().to(dtype).clone())
    outputs = tuple(first.signature.outputs[0 if mode == "train" else -1] for mode in modes)
    return Program(
        f"{first.name}.ensemble{len(programs)}",
        tuple(_graph(programs, mode, average) for mode in modes),
        state,
        replace(first.signature, outputs=outputs),
        notes=tuple(dict.fromkeys(note for program in programs for note in program.notes)),
        names=(*names, "weights"),
    )


def check_alike(programs: Sequence[Program]) -> None:
    """Refuse programs with other inputs or outputs than the first.

    Raises:
        InputError: The first difference, with the number of the model.
    """
    first = programs[0]
    for number, program in enumerate(programs[1:], start=1):
        pairs = [("takes", program.signature.inputs, first.signature.inputs)]
        pairs.append(("gives", _outputs(program), _outputs(first)))
        for verb, own, wanted in pairs:
            found, expected = (tuple(_form(meta) for meta in metas) for metas in (own, wanted))
            if found != expected:
                raise InputError(
                    f"model {number} {verb} {_listed(own)}, and model 0 {_listed(wanted)}",
                    hint="the members of an ensemble have inputs and outputs of one shape",
                )
        if program.signature.outputs[-1].spec != first.signature.outputs[-1].spec:
            raise InputError(f"model {number} nests its outputs in another way than model 0")


def _listed(metas: Sequence[Any]) -> str:
    return ", ".join(map(str, metas))


def _form(meta: Any) -> Any:
    """Sizes and dtype; traces may name dynamic sizes differently."""
    return (meta.shape, meta.dtype) if isinstance(meta, TensorMeta) else meta


def _outputs(program: Program) -> tuple[Any, ...]:
    (values,) = program.graph("eval").output_node().args
    return tuple(
        value.meta.get("value") if isinstance(value, fx.Node) else value for value in cast(Any, values)
    )


def _float_outputs(program: Program) -> list[TensorMeta]:
    metas = [meta for meta in _outputs(program) if isinstance(meta, TensorMeta)]
    return [meta for meta in metas if meta.dtype.is_floating_point]


def _inner(number: int, name: str) -> str:
    return f"{PREFIX}.{number}.{name}"


def _graph(programs: Sequence[Program], mode: Mode, average: Average) -> fx.Graph:
    """Graphs one after the other, on the same inputs, and the weighted sum of their outputs."""
    graph = fx.Graph()
    training: fx.Node | None = None
    inputs: list[fx.Node] = []
    ends: list[Sequence[Any]] = []
    for number, program in enumerate(programs):
        values: dict[fx.Node, fx.Node] = {}
        given = iter(inputs)
        for node in program.graph(mode).nodes:
            if node.op == "output":
                ends.append(fx.map_arg(node.args[0], values.__getitem__))
            elif node.op == "placeholder" and number:
                values[node] = next(given)
            elif node.op == "get_attr" and node.target == TRAINING and training is not None:
                values[node] = training
            else:
                copied = graph.node_copy(node, values.__getitem__)
                values[node] = copied
                if node.op == "placeholder":
                    inputs.append(copied)
                elif node.op == "get_attr" and node.target == TRAINING:
                    training = copied
                elif node.op == "get_attr":
                    copied.target = _inner(number, str(node.target))
    read = graph.create_node("get_attr", "weights")
    read.meta["value"] = TensorMeta((Dim(len(programs)),), torch.float32, "cpu")
    graph.output(tuple(_sum(graph, column, read, average) for column in zip(*ends, strict=True)))
    return graph


def _sum(graph: fx.Graph, values: Sequence[Any], weights: fx.Node, average: Average) -> Any:
    """Nodes of the weighted sum of one output; of what is no floating-point tensor, the first."""
    first = values[0]
    meta = first.meta.get("value") if isinstance(first, fx.Node) else None
    if not isinstance(meta, TensorMeta) or not meta.dtype.is_floating_point:
        return first
    weights.meta["value"] = TensorMeta((Dim(len(values)),), meta.dtype, meta.device)
    many = TensorMeta((Dim(len(values)), *meta.dims), meta.dtype, meta.device)

    def call(target: Any, args: tuple[Any, ...], value: TensorMeta) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta["value"] = value
        return node

    def shaped(node: fx.Node) -> fx.Node:
        """The weights ``[K]`` as ``[K, 1, ...]``."""
        sizes = [len(values), *(1,) * meta.ndim]
        return call(aten.view.default, (node, sizes), replace(many, dims=tuple(map(Dim, sizes))))

    if average == "outputs":
        stack = call(aten.stack.default, (list(values),), many)
        product = call(aten.mul.Tensor, (stack, shaped(weights)), many)
        return call(aten.sum.dim_IntList, (product, [0]), meta)
    if meta.ndim < 2:
        raise UnsupportedError(f"outputs {meta} have no dimension of classes", hint="give average='outputs'")
    logs = [call(aten.log_softmax.int, (value, classes_dim(meta.ndim)), meta) for value in values]
    stack = call(aten.stack.default, (logs,), many)
    log = call(aten.log.default, (weights,), weights.meta["value"])
    shifted = call(aten.add.Tensor, (stack, shaped(log)), many)
    return call(aten.logsumexp.default, (shifted, [0]), meta)


def certify_weighted(programs: Sequence[Program], weights: Tensor, average: Average) -> list[Row]:
    """Outputs and gradients of the one program against the members', in float64, with random values."""
    generator = torch.Generator().manual_seed(0)
    wide = [in_double(quiet(program.with_state(drawn_state(program, generator)))) for program in programs]
    exact = weights.detach().double().cpu()
    whole = in_double(weighted(wide, exact, average))
    inputs = flat_inputs(wide[0].signature, None)
    rows = []
    modes: tuple[Mode, ...] = ("eval", "train")
    for mode in modes:
        found = run_chain([whole], inputs, mode)
        members = [emit(program).train(mode == "train") for program in wide]
        each = [member.run_flat(inputs) for member in members]
        expected = [_expected(column, exact, average) for column in zip(*each, strict=True)]
        error = outputs_error(found.outputs, expected)
        rows.append(
            Row(f"output of the ensemble = weighted sum of its members' ({mode})", error, BOUND, "float64")
        )
        rows.append(
            Row(f"gradients of the members ({mode})", _gradients(found, members, expected), BOUND, "float64")
        )
    return rows


def _gradients(found: Any, members: Sequence[nn.Module], expected: Sequence[Any]) -> float:
    """Largest difference of gradients of one projection of the outputs."""
    state = {
        _inner(number, name): parameter
        for number, member in enumerate(members)
        for name, parameter in member.named_parameters()
    }
    return tensors_error(found.gradients, projected_gradients(expected, state))
