"""How much each weight matters before training.

=========  ============================================================================================
snip       ``|g ⊙ w|``, g the gradient of the loss (Lee, Ajanthan & Torr, arXiv 1810.02340)
grasp      ``-w ⊙ H g``, H the Hessian of the loss; the smallest are kept, as removing the largest raises
           the gradient's norm (Wang, Zhang & Grosse, arXiv 2002.07376)
synflow    ``|w| ⊙ dR/d|w|``, R the sum of the outputs of the network of ``|w|`` without non-linearities,
           for an input of ones; pruned in rounds (Tanaka, Kunin, Yamins & Ganguli, arXiv 2006.05467)
magnitude  ``|w|``
random     uniform in 0 to 1
=========  ============================================================================================

All are computed on the traced graph, so that a weight which is tied or used functionally is one weight. What
is computed on is a copy: the program's state stays as it is.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from graphsplit.analysis.facts import argument
from graphsplit.analysis.inference import output_nodes
from graphsplit.emission import ProgramModule, emit
from graphsplit.errors import InputError, UnsupportedError, UserError, first_line
from graphsplit.graphs import base_name, copy_graph, node_arg
from graphsplit.program import Mode, Program, TensorMeta, meta_of
from graphsplit.signature import as_call
from graphsplit.sparsity.masks import SCOPES, Scope, check_sparsity, top_k
from graphsplit.sparsity.prunable import NORMS, roles
from graphsplit.train.loop import Batches, Metric, as_batches, read_batch, take
from graphsplit.verification import in_double, opened

aten = torch.ops.aten

Method = Literal["snip", "grasp", "synflow", "magnitude", "random"]
METHODS: tuple[Method, ...] = get_args(Method)
DATA_FREE: tuple[Method, ...] = ("synflow", "magnitude", "random")

Scores = dict[str, Tensor]
"""Float64, by the first name of the parameter."""


@dataclass(frozen=True)
class Scoring:
    """How weights are scored.

    Attributes:
        method: One of `METHODS`.
        data: Batches as for `graphsplit.train.fit`, or one pair of inputs and targets; all are used.
        loss: Of outputs and targets the mean over a batch.
        mode: In which the model runs: batch norms by the batch's statistics (``"train"``) or by their own.
        temperature: By which GraSP divides the outputs.
        iterations: Rounds of SynFlow.
        seed: Of random scores, and of dropout.
    """

    method: Method = "snip"
    data: Batches | Sequence[Any] | None = None
    loss: Metric | None = None
    mode: Mode = "train"
    temperature: float = 200.0
    iterations: int = 100
    seed: int = 0

    @property
    def rounds(self) -> int:
        """In how many rounds the method prunes: SynFlow's, for any other one."""
        return self.iterations if self.method == "synflow" else 1

    def check(self) -> None:
        """Raise where the options do not fit together.

        Raises:
            UserError: The first that does not.
        """
        if self.method not in METHODS:
            raise UserError(f"method is {self.method!r}, expected one of {', '.join(METHODS)}")
        if self.mode not in ("train", "eval"):
            raise UserError(f"mode is {self.mode!r}, expected 'train' or 'eval'")
        if self.method not in DATA_FREE and (self.data is None or self.loss is None):
            lacks = " and ".join(name for name in ("data", "loss") if getattr(self, name) is None)
            raise UserError(
                f"{self.method} scores by gradients of a loss, and no {lacks} is given",
                hint=f"give data and loss, or take a method without: {', '.join(DATA_FREE)}",
            )
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UserError(f"the temperature is {self.temperature!r}, expected a positive number")
        if self.iterations < 1:
            raise UserError(f"{self.iterations!r} iterations, expected a whole number of at least 1")


def choose(
    program: Program, names: Sequence[str], scoring: Scoring, sparsity: float, scope: Scope = "global"
) -> tuple[Scores, dict[str, Tensor]]:
    """Scores of parameters, as the paper of the method defines them, and the masks that follow.

    Args:
        program: A traced model.
        names: Of the parameters to be pruned.
        scoring: How.
        sparsity: Share of the weights to remove.
        scope: Of all weights together, or of each tensor.

    Raises:
        UserError: An option is out of range.
        InputError: The scores are zero everywhere, or not numbers.
        UnsupportedError: The loss cannot be differentiated twice, as GraSP needs.
    """
    scoring.check()
    check_sparsity(sparsity)
    if scope not in SCOPES:
        raise UserError(f"scope is {scope!r}, expected one of {', '.join(SCOPES)}")
    _refuse_meta(program, names)
    if scoring.method == "synflow":
        return _synflow(program, names, scoring.rounds, sparsity, scope)
    found = _checked(scores_of(program, names, scoring), scoring.method)
    return found, top_k(_saliency(found, scoring.method), sparsity, scope)


def saliency_of(program: Program, names: Sequence[str], scoring: Scoring) -> Scores:
    """Scores of which the largest are to be kept; of SynFlow those of one round.

    Raises:
        As `choose`.
    """
    scoring.check()
    _refuse_meta(program, names)
    return _saliency(_checked(scores_of(program, names, scoring), scoring.method), scoring.method)


def _saliency(scores: Scores, method: Method) -> Scores:
    """GraSP keeps the smallest scores, the others keep the largest."""
    return {name: -values for name, values in scores.items()} if method == "grasp" else scores


def _refuse_meta(program: Program, names: Sequence[str]) -> None:
    if any(program.state[name].tensor.is_meta for name in names):
        raise InputError(
            "the model is on the meta device, where weights have no values", hint="load the weights first"
        )


def scores_of(program: Program, names: Sequence[str], scoring: Scoring) -> Scores:
    """Scores, for SynFlow those of the first round; unchecked."""
    if scoring.method == "synflow":
        return _Flow(program, names).scores({})
    if scoring.method == "random":
        generator = torch.Generator().manual_seed(scoring.seed)
        return {
            name: torch.rand(program.state[name].tensor.shape, generator=generator, dtype=torch.float64)
            for name in names
        }
    weights = {name: program.state[name].tensor.detach().double() for name in names}
    if scoring.method == "magnitude":
        return {name: weight.abs() for name, weight in weights.items()}
    with torch.random.fork_rng():
        torch.manual_seed(scoring.seed)
        if scoring.method == "snip":
            gradients = _gradients(program, names, scoring)
            return {name: (gradients[name] * weight).abs() for name, weight in weights.items()}
        products = _hessian_gradient(program, names, scoring)
    return {name: -weight * products[name] for name, weight in weights.items()}


def _checked(scores: Scores, method: Method) -> Scores:
    for name, values in scores.items():
        if not bool(torch.isfinite(values).all()):
            raise InputError(
                f"the scores of {name} by {method} are not all numbers",
                hint="are the weights and the data free of NaN, and is the loss finite?",
            )
    if not any(bool(values.any()) for values in scores.values()):
        raise InputError(
            f"the scores by {method} are zero everywhere, so that no weight matters more than another",
            hint="does the loss depend on the weights? are all of them zero?",
        )
    return scores


# -- gradients -----------------------------------------------------------------------------------------------


def example_of(data: Any) -> Any:
    """The inputs of the first batch."""
    for batch in as_batches(data):
        return read_batch(torch.device("cpu"), batch)[0]
    raise _no_batch()


def _no_batch() -> InputError:
    return InputError("the data gave no batch to score by", hint="an iterator is empty after one reading")


def _module(program: Program, names: Sequence[str], mode: Mode) -> tuple[ProgramModule, list[Tensor]]:
    """A copy of the model in which these parameters alone are trained, by name."""
    module = emit(program).train(mode == "train")
    named = dict(module.named_parameters(remove_duplicate=False))
    for parameter in named.values():
        parameter.requires_grad_(False)
    return module, [named[name].requires_grad_(True) for name in names]


def _loss_of(
    module: ProgramModule, loss: Metric, inputs: Any, targets: Any, temperature: float = 1.0
) -> Tensor:
    args, kwargs = as_call(inputs, None)
    outputs = module(*args, **kwargs)
    if temperature != 1.0:
        outputs = pytree.tree_map_only(
            Tensor, lambda x: x / temperature if x.is_floating_point() else x, outputs
        )
    found: object = loss(outputs, targets)
    if not isinstance(found, Tensor) or found.numel() != 1:
        what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"the loss gives {what}, expected one number", hint="the mean over the batch")
    if not found.requires_grad:
        raise InputError("the loss does not depend on the weights", hint="compute it from the outputs")
    return found


def _device(program: Program) -> torch.device:
    return next(entry.tensor.device for entry in program.state.values())


def _gradients(program: Program, names: Sequence[str], scoring: Scoring) -> Scores:
    """Gradients of the mean loss over all examples of all batches."""
    loss, data = scoring.loss, scoring.data
    assert loss is not None and data is not None
    total: Scores = {}
    examples = 0
    module, weights = _module(program, names, scoring.mode)
    for batch in as_batches(data):
        inputs, targets, size = read_batch(_device(program), batch)
        value = _loss_of(module, loss, inputs, targets)
        found = torch.autograd.grad(value, weights, materialize_grads=True)
        for name, gradient in zip(names, found, strict=True):
            total[name] = total.get(name, 0.0) + size * gradient.double()
        examples += size
    if not examples:
        raise _no_batch()
    return {name: gradient / examples for name, gradient in total.items()}


def _hessian_gradient(program: Program, names: Sequence[str], scoring: Scoring) -> Scores:
    """``H g`` of the mean loss over both halves of every batch."""
    loss = scoring.loss
    assert loss is not None and scoring.data is not None
    halves: list[tuple[Any, Any, int]] = []
    for batch in as_batches(scoring.data):
        inputs, targets, size = read_batch(_device(program), batch)
        halves += _halves(program, inputs, targets, size)
    if not halves:
        raise _no_batch()
    examples = sum(size for _, _, size in halves)
    module, weights = _module(program, names, scoring.mode)
    _warn_of_classes(program.graph(scoring.mode), halves)
    # Kernels of attention that are fused have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        sums = [torch.zeros_like(weight) for weight in weights]
        for inputs, targets, size in halves:
            value = _loss_of(module, loss, inputs, targets, scoring.temperature)
            found = torch.autograd.grad(value, weights, materialize_grads=True)
            for gradient, one in zip(sums, found, strict=True):
                gradient += one * (size / examples)
        products = [torch.zeros_like(weight) for weight in weights]
        for inputs, targets, size in halves:
            value = _loss_of(module, loss, inputs, targets, scoring.temperature)
            for product, one in zip(products, _product(value, weights, sums), strict=True):
                product += one * (size / examples)
    return {name: product.double() for name, product in zip(names, products, strict=True)}


def _product(value: Tensor, weights: list[Tensor], vector: list[Tensor]) -> Sequence[Tensor]:
    """The Hessian of ``value`` times a vector."""
    # A function that can be differentiated once only fails where the gradient given to it is a variable, too,
    # and all of the graph is gone through; else its part of the Hessian would be left out in silence.
    one = torch.ones_like(value).requires_grad_(True)
    try:
        first = torch.autograd.grad(value, weights, one, create_graph=True, materialize_grads=True)
        total = torch.stack([(g * v).sum() for g, v in zip(first, vector, strict=True)]).sum()
        for weight in weights:
            weight.grad = None
        total.backward()
    except RuntimeError as error:
        raise UnsupportedError(
            f"grasp differentiates the loss twice, and that fails: {first_line(error)}",
            hint="use a loss and ops with a second derivative, or another method",
        ) from error
    return [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]


def _halves(program: Program, inputs: Any, targets: Any, size: int) -> list[tuple[Any, Any, int]]:
    """A batch as two of the same mix of classes; as it is where the model takes batches of one size only."""
    fixed = all(dim.symbol is None for meta in program.signature.inputs for dim in meta.dims)
    if size < 2 or fixed:
        return [(inputs, targets, size)]
    order = torch.arange(size)
    if isinstance(targets, Tensor) and _are_classes(targets):
        order = torch.argsort(targets.cpu(), stable=True)
    halves = (order[0::2].sort().values, order[1::2].sort().values)
    return [(*take((inputs, targets), half, size), len(half)) for half in halves]


def _are_classes(targets: Tensor) -> bool:
    return targets.dim() == 1 and not targets.is_floating_point() and targets.dtype != torch.bool


def _warn_of_classes(graph: fx.Graph, halves: Sequence[tuple[Any, Any, int]]) -> None:
    """Warn where scores ``[N, C]`` stand against class numbers ``[N]`` of which some are missing."""
    targets = [targets for _, targets, _ in halves]
    metas = [node.meta.get("value") for node in output_nodes(graph) if isinstance(node, fx.Node)]
    if not all(isinstance(target, Tensor) and _are_classes(target) for target in targets):
        return
    if len(metas) != 1 or not isinstance(metas[0], TensorMeta) or metas[0].ndim != 2:
        return
    classes = metas[0].shape[1]
    missing = sorted(set(range(classes)) - set(torch.cat(targets).unique().tolist()))
    if missing:
        some = ", ".join(map(str, missing[:5])) + (" ..." if len(missing) > 5 else "")
        warnings.warn(
            f"the data lack {len(missing)} of {classes} classes ({some}), "
            "and grasp is meant for a batch with all of them: gs.data.balanced picks one",
            stacklevel=2,
        )


# -- synaptic flow -------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "relu", "relu6", "leaky_relu", "prelu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "tanh",
    "sigmoid", "hardtanh", "hardswish", "hardsigmoid", "log_sigmoid", "softsign", "tanhshrink",
    "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout",
}  # fmt: skip


class _Flow:
    """The network of absolute weights without non-linearities, in float64 and in eval mode.

    Activations and normalisations are the identity, as ReLU is for what is positive and a batch norm is at
    initialisation. Biases that are not to be pruned are zero, affine parameters of norms that are not, one.
    """

    def __init__(self, program: Program, names: Sequence[str]) -> None:
        wide = opened(in_double(program))
        graph = linearised(wide.graph("eval"), frozenset(names))
        known = roles(program)
        values = {}
        for name, entry in wide.state.items():
            if entry.kind == "parameter" and entry.tensor.dtype.is_floating_point:
                idle = known.get(name) == "bias" and name not in names
                values[name] = torch.zeros_like(entry.tensor) if idle else entry.tensor.detach().abs()
        outputs = wide.signature.outputs[-1:]
        flow = replace(wide, graphs=(graph,), signature=replace(wide.signature, outputs=outputs))
        self.names = list(names)
        self.module = emit(flow.with_state(values)).eval()
        self.inputs = [
            torch.ones(meta.shape, dtype=meta.dtype, device=meta.device) for meta in flow.signature.inputs
        ]
        named = dict(self.module.named_parameters(remove_duplicate=False))
        for parameter in named.values():
            parameter.requires_grad_(False)
        self.weights = [named[name].requires_grad_(True) for name in names]

    def scores(self, masks: Mapping[str, Tensor]) -> Scores:
        """Scores of the masked network; what is masked has none."""
        with torch.no_grad():
            for name, weight in zip(self.names, self.weights, strict=True):
                if name in masks:
                    weight *= masks[name]
        outputs = self.module.run_flat(self.inputs)
        floats = [value for value in outputs if isinstance(value, Tensor) and value.is_floating_point()]
        total = torch.stack([value.sum() for value in floats]).sum() if floats else torch.zeros(())
        if not total.requires_grad:
            return {name: torch.zeros_like(w) for name, w in zip(self.names, self.weights, strict=True)}
        found = torch.autograd.grad(total, self.weights, materialize_grads=True)
        return {
            name: (gradient * weight).detach()
            for name, weight, gradient in zip(self.names, self.weights, found, strict=True)
        }


def linearised(graph: fx.Graph, scaled: frozenset[str] = frozenset()) -> fx.Graph:
    """A copy of a graph without activations, dropout and normalisations.

    Affine parameters of norms that are named in ``scaled`` still multiply and add.
    """

    def through(node: fx.Node) -> fx.Node | None:
        return node_arg(node) if _named(node, ACTIVATIONS) else None

    copied = copy_graph(graph, through)
    for node in list(copied.nodes):
        if _named(node, NORMS):
            node.replace_all_uses_with(_affine(copied, node, scaled))
            copied.erase_node(node)
    return copied


def _named(node: fx.Node, names: Container[str]) -> bool:
    return (
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and base_name(node).rstrip("_") in names
    )


def _affine(graph: fx.Graph, node: fx.Node, scaled: frozenset[str]) -> fx.Node:
    """What is left of a norm: its input, times and plus those of its parameters that are to be pruned."""
    x = node_arg(node)
    meta = meta_of(x)
    name = base_name(node)
    for op, place in zip((aten.mul.Tensor, aten.add.Tensor), NORMS[name], strict=False):
        operand = argument(node, place, ("weight", "bias")[op is aten.add.Tensor])
        if not (isinstance(operand, fx.Node) and operand.op == "get_attr" and str(operand.target) in scaled):
            continue
        with graph.inserting_before(node):
            shaped = operand
            if name not in ("layer_norm", "rms_norm"):  # these stand along channels, the others last
                shaped = graph.call_function(aten.reshape.default, (operand, [-1, *[1] * (meta.ndim - 2)]))
            x = graph.call_function(op, (x, shaped))
            x.meta["value"] = meta
    return x


def _synflow(
    program: Program, names: Sequence[str], rounds: int, sparsity: float, scope: Scope
) -> tuple[Scores, dict[str, Tensor]]:
    """Prune in rounds: after round t of n a share of ``(1 - sparsity)^(t/n)`` is left."""
    flow = _Flow(program, names)
    masks: dict[str, Tensor] = {}
    rounds = rounds if sparsity else 1
    for number in range(1, rounds + 1):
        found = flow.scores(masks)
        _checked(found, "synflow")
        # What has been removed stays removed, whatever scores zero beside it.
        saliency = {
            name: torch.where(masks[name], values, -1.0) if name in masks else values
            for name, values in found.items()
        }
        share = sparsity if number == rounds else 1 - (1 - sparsity) ** (number / rounds)
        masks = top_k(saliency, share, scope)
    return found, masks
