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
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np
import torch
from scipy.optimize import nnls  # type: ignore[attr-defined]
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from graphsplit.answers import (
    Answers,
    answers_by_shape,
    answers_for,
    check_shape,
    checked_classes,
    classes_dim,
    is_whole,
    log_sum,
    probabilities,
    two_classes,
)
from graphsplit.bundle import EnsembleBundle, program_of
from graphsplit.emission import ProgramModule, emit
from graphsplit.errors import InputError, PlanError, UserError
from graphsplit.graphs import aten
from graphsplit.program import TRAINING, Dim, Mode, Program, StateEntry, TensorMeta
from graphsplit.signature import as_call, copied
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
"""What is averaged: what the members give, or the probabilities that it stands for."""

Averaged = Literal["outputs", "probabilities", "classes", "classes_last", "binary"]
"""The same, and of which kind probabilities are, where the shape of the outputs is not to tell."""

Rule = Literal["simple", "regression", "margin", "given"]
"""Where the weights come from."""


class Body(Protocol):
    """K models that give their outputs on a leading dimension of K."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of all."""

    def models(self) -> Sequence[nn.Module]:
        """Each by itself; parameters are shared with this module."""


class InTurn(nn.ModuleList):
    """Runs its models one after the other, each on inputs of its own, and stacks what they give."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Tensors with a leading dimension of K, nested as one model nests them.

        Raises:
            InputError: The models give outputs of different shapes; the first that differs is named.
        """
        found = []
        for model in self:
            own, named = copied((args, kwargs))
            found.append(model(*own, **named))
        return stacked(found)

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
            tensors = isinstance(leaf, Tensor) or isinstance(column[0], Tensor)
            if tensors and _kind_of(leaf) != _kind_of(column[0]):
                raise InputError(
                    f"model {number} gives {_kind_of(leaf)} where model 0 gives {_kind_of(column[0])}",
                    hint="the members of an ensemble have outputs of one shape",
                )
            column.append(leaf)
    joined = [torch.stack(column) if isinstance(column[0], Tensor) else column[0] for column in columns]
    return pytree.tree_unflatten(joined, spec)


def _kind_of(leaf: Any) -> str:
    """The shape of a tensor, or the type of what is none."""
    return str(tuple(leaf.shape)) if isinstance(leaf, Tensor) else type(leaf).__name__


# Weighted sums. K: members, N: examples, C: classes.


def averaged(average: Average, answers: Answers | None) -> Averaged:
    """What is averaged of outputs whose kind is known, or not.

    Raises:
        UserError: It is the probabilities of values, which have none.
    """
    if average == "outputs" or answers is None:
        return average
    if answers == "values":
        raise UserError(
            "values have no probabilities to average",
            hint="give average='outputs', or say what outputs are by answers=",
        )
    return answers


def combined(outputs: Tensor, weights: Tensor, average: Averaged) -> Tensor:
    """The weighted sum of outputs ``[K, N, ...]`` as ``[N, ...]``.

    Args:
        outputs: Of each member.
        weights: One for each member, ``[K]``, or for each of its examples, ``[K, N]``.
        average: Of ``"probabilities"`` the logarithm of the weighted sum is given, or of yes or no that of
            the odds: scores, as the members give them.

    A member of weight zero has no part in the sum, also where it gives no finite number.
    """
    shaped = weights.to(outputs).reshape(*weights.shape, *(1,) * (outputs.dim() - weights.dim()))
    if average == "outputs":
        return (outputs * shaped).masked_fill(shaped == 0, 0.0).sum(0)
    kind = _scores_in(outputs.shape[1:], outputs.dtype, average)
    if kind == "binary":
        no, yes = combined(two_classes(outputs), weights, "classes_last").unbind(-1)
        return yes - no
    return log_sum(outputs.log_softmax(_stacked_dim(kind)) + shaped.log())


def _scores_in(shape: Sequence[int], dtype: torch.dtype, average: Averaged) -> Answers:
    """Of which kind scores ``[N, ...]`` are whose probabilities are averaged.

    Raises:
        UserError: They have none, or it is not sure.
    """
    if dtype.is_complex:
        raise UserError("complex outputs have no probabilities", hint="give average='outputs'")
    kind = answers_by_shape(shape) if average == "probabilities" else cast(Answers, average)
    check_shape(kind, shape)
    return kind


def _stacked_dim(kind: Answers) -> int:
    """The dimension of classes in scores ``[K, N, ...]``."""
    return 2 if kind == "classes" else -1


def margin_weights(outputs: Tensor, targets: Tensor, answers: Answers | None = None) -> Tensor:
    """Weights of the members for each example, ``[K, N]``, by their margins; they sum to one.

    The margin is the probability of the true class less that of the likeliest other one; of several positions
    their mean. Weights are the softmax of the margins over the members, which keeps them positive: that form,
    and that margins are those of probabilities, is our choice. Positions of -100 do not count.

    Args:
        outputs: Scores ``[K, N, C, ...]`` or ``[K, N, T, C]``; or of yes or no, ``[K, N, ...]``.
        targets: Classes ``[N, ...]``; or 0 and 1, of the shape of one member's scores.
        answers: What outputs are; as targets tell, unless given.

    Raises:
        UserError: Targets are no classes, or do not fit the scores.
    """
    kind = answers or answers_for(outputs[0], targets)
    if kind == "values" or not is_whole(targets):
        raise UserError(
            "margins are for classes, and the targets are no whole numbers",
            hint="use simple or regression weights",
        )
    scores = outputs.detach()
    if kind == "binary":
        scores, kind = two_classes(scores), "classes_last"
    scores = scores.movedim(_stacked_dim(kind), -1)
    if targets.shape != scores.shape[1:-1]:
        raise UserError(f"targets {tuple(targets.shape)} do not fit outputs {tuple(outputs.shape[1:])}")
    chances = scores.softmax(-1)
    places, counted = checked_classes(targets.to(outputs.device), chances.shape[-1])
    places = places.expand(chances.shape[:-1])[..., None]
    true = chances.gather(-1, places)
    others = chances.scatter(-1, places, 0.0).amax(-1, keepdim=True)
    margins = (true - others).masked_fill(~counted[..., None], 0.0).flatten(2)
    return (margins.sum(2) / counted.reshape(len(counted), -1).sum(1).clamp_min(1)).softmax(0)


class LeastSquares:
    """The weights whose weighted sum of outputs is nearest to the targets (eq. 7), batch by batch.

    Sums are kept in float64, of K x K numbers. Classes are taken as vectors of zeros with a one; positions of
    -100 do not count. With probabilities weights are not negative, as their sum is to have a logarithm.

    Args:
        k: Number of members.
        average: What is averaged.
        answers: What outputs are; as the first targets tell, unless given.
    """

    def __init__(self, k: int, average: Average, answers: Answers | None = None) -> None:
        self.average: Average = average
        self.answers: Answers | None = answers
        self.products = torch.zeros(k, k, dtype=torch.float64)
        self.moments = torch.zeros(k, dtype=torch.float64)

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in outputs ``[K, N, ...]`` with their targets.

        Raises:
            UserError: They do not fit, or can have no least squares.
        """
        if not isinstance(targets, Tensor):
            raise UserError(
                f"targets are a {type(targets).__name__}, and regression weights need one tensor of them",
                hint="use simple weights",
            )
        if outputs.is_complex() or targets.is_complex():
            raise UserError("there are no regression weights of complex numbers", hint="use simple weights")
        kind = self._kind(outputs, targets)
        found = outputs.detach()
        if self.average == "probabilities":
            found = torch.stack([probabilities(own, kind) for own in found])
        values = found.double()
        if is_whole(targets) and kind in ("classes", "classes_last") and targets.dim() + 2 == outputs.dim():
            dim = _stacked_dim(kind)
            places, counted = checked_classes(targets, outputs.shape[dim])
            targets = F.one_hot(places, outputs.shape[dim]).movedim(-1, classes_dim(kind))
            out = ~counted.unsqueeze(classes_dim(kind))
            targets, values = targets.masked_fill(out, 0), values.masked_fill(out, 0.0)
        if targets.shape != outputs.shape[1:]:
            raise UserError(f"targets {tuple(targets.shape)} do not fit outputs {tuple(outputs.shape[1:])}")
        flat = values.flatten(1)
        self.products += (flat @ flat.T).cpu()
        self.moments += (flat @ targets.to(values).flatten()).cpu()

    def _kind(self, outputs: Tensor, targets: Tensor) -> Answers:
        """What outputs are; for targets that are numbers, the shape of scores tells."""
        if self.average == "outputs" and targets.shape == outputs.shape[1:]:
            return "values"  # they are compared as they are
        if self.answers is None:
            self.answers = answers_for(outputs[0], targets)
            if self.average == "probabilities" and self.answers == "values":
                self.answers = answers_by_shape(outputs.shape[1:])
        if self.average == "probabilities":
            _scores_in(outputs.shape[1:], outputs.dtype, averaged(self.average, self.answers))
        return self.answers

    def weights(self) -> Tensor:
        """The weights, ``[K]``; of members that are equal, the same.

        Raises:
            UserError: There was no data, or numbers are not finite, or no weights above zero are best.
        """
        if not bool(self.products.isfinite().all()):
            member = int((~self.products.diagonal().isfinite()).nonzero()[0])
            raise UserError(
                f"model {member} gives numbers on the data of the regression that are not finite",
                hint="leave it out, or use simple weights",
            )
        if not bool(self.moments.isfinite().all()):
            raise UserError("the targets of the regression are not all finite")
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
        if not found.any():
            raise UserError(
                "no probabilities are nearer to the targets than zero is: all weights would be zero",
                hint="give classes or probabilities as targets, or average='outputs'",
            )
        return torch.from_numpy(np.asarray(found))


def least_squares(
    body: nn.Module, data: Batches, k: int, average: Average, answers: Answers | None = None
) -> LeastSquares:
    """What regression weights of K models follow from, on data, in eval mode."""
    from graphsplit.train.loop import read_batch  # takes this module in

    found = LeastSquares(k, average, answers)
    tensors = itertools.chain(body.parameters(), body.buffers())
    device = next(tensors, torch.empty(0)).device
    with torch.no_grad():
        for batch in data:
            inputs, targets, _ = read_batch(device, batch)
            args, kwargs = as_call(inputs, None)
            found.add(main_output(body(*args, **kwargs)), targets)
    return found


def main_output(outputs: Any) -> Tensor:
    """The tensor of numbers among outputs, or the first one, which is what losses take.

    Raises:
        UserError: There is none.
    """
    leaves = pytree.tree_leaves(outputs)
    return cast(Tensor, leaves[_main(leaves)])


def _main(leaves: Sequence[Any]) -> int:
    """The place of the main output."""
    found = [place for place, leaf in enumerate(leaves) if _is_averaged(leaf)]
    if not found:
        kinds = ", ".join(dict.fromkeys(type(leaf).__name__ for leaf in leaves)) or "nothing"
        raise UserError(
            f"the models give no tensor of real or complex numbers to average: {kinds}",
            hint="let them give tensors, or tuples, lists and mappings of them; or trace them, by args=, if "
            "they give a dataclass",
        )
    return found[0]


def _is_averaged(value: Any) -> bool:
    """True for tensors of which there are weighted sums."""
    return isinstance(value, Tensor) and not is_whole(value)


# The module


class Ensemble(nn.Module):
    """K models as one. Made by `graphsplit.ensemble`.

    It is called as one member is, and gives what one gives: of tensors of real or complex numbers the
    weighted sum, of all else what the first member gives. Probabilities are averaged in the main output, the
    first of these tensors; further ones, such as hidden states, are averaged as they are.

    Attributes:
        weights: One for each member, a buffer ``[K]``; the margin rule has ``1 / K`` here.
        rule: Where the weights come from.
        average: What is averaged.
        answers: What outputs are; None where their shape, or targets, tell.
    """

    weights: Tensor

    def __init__(
        self,
        body: nn.Module,
        weights: Tensor,
        rule: Rule = "simple",
        average: Average = "outputs",
        answers: Answers | None = None,
    ) -> None:
        super().__init__()
        self.body = body
        self.rule: Rule = rule
        self.average: Average = average
        self.answers: Answers | None = answers
        first = next((own for own in body.parameters() if own.dtype.is_floating_point), torch.zeros(()))
        self.register_buffer("weights", weights.detach().to(first, copy=True))

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
            targets: Classes of the examples, ``[N, ...]``, as `torch.nn.functional.cross_entropy` takes them.
            args: Inputs by position.
            kwargs: Inputs by keyword.
        """
        outputs = self.body(*args, **kwargs)
        if self.rule != "margin" or not self.training:
            return self._combined(outputs, self.weights)
        return self._combined(outputs, margin_weights(main_output(outputs), targets, self.answers))

    @property
    def averaged(self) -> Averaged:
        """What is averaged of the main output."""
        return averaged(self.average, self.answers)

    def _combined(self, outputs: Any, weights: Tensor) -> Any:
        leaves, spec = pytree.tree_flatten(outputs)
        main = _main(leaves)

        def one(place: int, leaf: Any) -> Any:
            if _is_averaged(leaf):
                return combined(leaf, weights, self.averaged if place == main else "outputs")
            return leaf[0] if isinstance(leaf, Tensor) else leaf

        return pytree.tree_unflatten([one(*numbered) for numbered in enumerate(leaves)], spec)

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
        return weighted(self.programs(), self.weights, self.averaged)

    def verify(self) -> Certificate:
        """Prove in float64 that the program is the weighted sum of the members, and that the fusion is right.

        Members have random values there; this module, with the values that it has now, is compared in
        float64, too.
        """
        rows: list[Row] = []
        if isinstance(self.body, ProgramModule):
            rows += list(self.body.verify().rows)  # type: ignore[operator]
        return Certificate(
            (*rows, *certify_weighted(self.programs(), self.weights, self.averaged), *self._now())
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
        expected = _expected(each, wide.weights, self.averaged)
        yield Row(
            "the ensemble, as it is, against its members (eval)",
            outputs_error(found, expected),
            BOUND,
            "float64",
        )

    def to_bundle(self) -> EnsembleBundle:
        """Members and weights as they are now, to be saved."""
        options = {
            "rule": self.rule, "average": self.average, "answers": self.answers, "fused": self.fused,
            "training": self.training,
        }  # fmt: skip
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


def _expected(each: Sequence[Sequence[Any]], weights: Tensor, average: Averaged) -> list[Any]:
    """The weighted sums of each member's outputs by their formula, term by term."""
    main = _main(each[0])
    return [
        _expected_one(column, weights, average if place == main else "outputs")
        for place, column in enumerate(zip(*each, strict=True))
    ]


def _expected_one(values: Sequence[Any], weights: Tensor, average: Averaged) -> Any:
    if not _is_averaged(values[0]):
        return values[0]
    pairs = [(weight, value) for weight, value in zip(weights, values, strict=True) if weight != 0]
    if average == "outputs":
        return sum((weight * value for weight, value in pairs), torch.zeros_like(values[0]))
    kind = _scores_in(values[0].shape, values[0].dtype, average)

    def log(total: Any) -> Tensor:
        """Minus infinity, with no gradient, where all members give it no chance."""
        return torch.where(total == 0, 1.0, total).log().masked_fill(total == 0, -math.inf)

    total = sum(weight * probabilities(value, kind) for weight, value in pairs)
    if kind == "binary":
        return log(total) - log(sum(weight * probabilities(-value, kind) for weight, value in pairs))
    return log(total)


# As a program

PREFIX = "members"


def weighted(programs: Sequence[Program], weights: Tensor, average: Averaged = "outputs") -> Program:
    """Programs as one that runs all of them and gives the weighted sum of their outputs.

    The state of member ``k`` is called ``members.k.*``; the weights are the buffer ``weights``.

    Args:
        programs: With the same inputs and outputs; they are not changed.
        weights: One for each.
        average: What is averaged.

    Raises:
        PlanError: There is not a weight for each program, or there are none.
        InputError: The programs differ in inputs or outputs.
        UserError: They give nothing that can be averaged so.
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
    dtype = main_meta(first).dtype.to_real()
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


def check_averaged(program: Program, average: Averaged) -> None:
    """Refuse a program of whose outputs there is no such average.

    Raises:
        UserError: There are no numbers to average, or no probabilities.
    """
    meta = main_meta(program)
    if average != "outputs":
        _scores_in(meta.shape, meta.dtype, average)


def main_meta(program: Program) -> TensorMeta:
    """The main output of a program.

    Raises:
        UserError: It has none.
    """
    for meta in _outputs(program):
        if _has_sum(meta):
            return cast(TensorMeta, meta)
    raise UserError(
        f"{program.name} gives {_listed(_outputs(program))}: no tensor of real or complex numbers to average"
    )


def _has_sum(meta: Any) -> bool:
    """True of tensors of which there are weighted sums."""
    return isinstance(meta, TensorMeta) and (meta.dtype.is_floating_point or meta.dtype.is_complex)


def _inner(number: int, name: str) -> str:
    return f"{PREFIX}.{number}.{name}"


def _graph(programs: Sequence[Program], mode: Mode, average: Averaged) -> fx.Graph:
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
    columns = list(zip(*ends, strict=True))
    main = next(place for place, column in enumerate(columns) if _has_sum(_meta_of(column[0])))
    graph.output(
        tuple(
            _Sum(graph, column, read).of(average if place == main else "outputs")
            for place, column in enumerate(columns)
        )
    )
    return graph


def _meta_of(value: Any) -> Any:
    return value.meta.get("value") if isinstance(value, fx.Node) else None


class _Sum:
    """Writes nodes of the weighted sum of one output; of what has no sum, the first member's."""

    def __init__(self, graph: fx.Graph, values: Sequence[Any], weights: fx.Node) -> None:
        self.graph = graph
        self.values = list(values)
        self.weights = weights

    def of(self, average: Averaged) -> Any:
        """What is given."""
        meta = _meta_of(self.values[0])
        if not _has_sum(meta):
            return self.values[0]
        self.weights.meta["value"] = TensorMeta((Dim(len(self.values)),), meta.dtype.to_real(), meta.device)
        if average == "outputs":
            return self._outputs(meta)
        kind = _scores_in(meta.shape, meta.dtype, average)
        if kind != "binary":
            return self._log_sum(self.values, meta, classes_dim(kind))
        pair = replace(meta, dims=(*meta.dims, Dim(2)))
        zeros = self._call(aten.zeros_like.default, (self.values[0],), meta)
        scores = [self._call(aten.stack.default, ([zeros, own], -1), pair) for own in self.values]
        both = self._log_sum(scores, pair, -1)
        no, yes = (self._call(aten.select.int, (both, -1, place), meta) for place in (0, 1))
        return self._call(aten.sub.Tensor, (yes, no), meta)

    def _outputs(self, meta: TensorMeta) -> fx.Node:
        stack = self._call(aten.stack.default, (self.values,), self._many(meta))
        shaped = self._shaped(self.weights, meta)
        product = self._call(aten.mul.Tensor, (stack, shaped), self._many(meta))
        none = self._call(aten.eq.Scalar, (shaped, 0), replace(shaped.meta["value"], dtype=torch.bool))
        kept = self._call(aten.masked_fill.Scalar, (product, none, 0), self._many(meta))
        return self._call(aten.sum.dim_IntList, (kept, [0]), meta)

    def _log_sum(self, scores: Sequence[fx.Node], meta: TensorMeta, dim: int) -> fx.Node:
        """As `graphsplit.answers.log_sum` of log-probabilities and logarithms of weights."""
        logs = [self._call(aten.log_softmax.int, (own, dim), meta) for own in scores]
        stack = self._call(aten.stack.default, (logs,), self._many(meta))
        log = self._call(aten.log.default, (self.weights,), self.weights.meta["value"])
        shifted = self._call(aten.add.Tensor, (stack, self._shaped(log, meta)), self._many(meta))
        lowest = self._call(aten.eq.Scalar, (shifted, -math.inf), replace(self._many(meta), dtype=torch.bool))
        never = self._call(aten.all.dim, (lowest, 0), replace(meta, dtype=torch.bool))
        safe = self._call(aten.masked_fill.Scalar, (shifted, never, 0.0), self._many(meta))
        total = self._call(aten.logsumexp.default, (safe, [0]), meta)
        return self._call(aten.masked_fill.Scalar, (total, never, -math.inf), meta)

    def _call(self, target: Any, args: tuple[Any, ...], value: TensorMeta) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta["value"] = value
        return node

    def _many(self, meta: TensorMeta) -> TensorMeta:
        """An output of every member."""
        return replace(meta, dims=(Dim(len(self.values)), *meta.dims))

    def _shaped(self, weights: fx.Node, meta: TensorMeta) -> fx.Node:
        """Weights ``[K]`` as ``[K, 1, ...]``."""
        sizes = [len(self.values), *(1,) * meta.ndim]
        value = replace(weights.meta["value"], dims=tuple(map(Dim, sizes)))
        return self._call(aten.view.default, (weights, sizes), value)


def certify_weighted(programs: Sequence[Program], weights: Tensor, average: Averaged) -> list[Row]:
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
        expected = _expected(each, exact, average)
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
