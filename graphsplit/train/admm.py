"""Fully connected nets without gradients: ADMM (Taylor et al., arXiv 1605.02026), to compare with.

With ``a_0`` the data, ``z_l = W_l a_{l-1}`` and ``a_l = relu(z_l)`` as soft constraints of weights ``beta``
and ``gamma``, and a multiplier for the last layer alone, each of ``W_l``, ``a_l`` and ``z_l`` in turn is set
to what is best for the others as they are (the paper's algorithm 1). Biases are weights of an input that is
always 1. All data are one batch.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from graphsplit.emission import ProgramModule, emit
from graphsplit.errors import UnsupportedError, UserError
from graphsplit.graphs import base_name, node_arg
from graphsplit.program import Program, op_name, source_of
from graphsplit.train.loop import Metric

_MOVES = {"flatten", "view", "reshape", "_unsafe_view", "dropout", "clone", "detach", "alias", "to"}


@dataclass(frozen=True)
class ADMMStep:
    """One round over all layers.

    Attributes:
        number: From 0.
        loss: Mean of the hinge loss of the training data, with the weights as they are then.
        error: Of the training data, by the metric.
        test_error: The same for the test data; None without them.
        seconds: Wall time of the round, without the test.
    """

    number: int
    loss: float
    error: float | None
    test_error: float | None
    seconds: float


class ADMM:
    """Trains a traced chain of linear layers with ReLU between them.

    Attributes:
        model: The net, with the weights as they are now.
    """

    def __init__(self, program: Program, *, beta: float = 1.0, gamma: float = 10.0, seed: int = 0) -> None:
        """Read the layers.

        Args:
            program: The traced net.
            beta: Weight of ``z_l = W_l a_{l-1}``; the paper's value by default.
            gamma: Weight of ``a_l = relu(z_l)``.
            seed: Of the values that ``z_l`` and ``a_l`` begin with.

        Raises:
            UnsupportedError: There is another op than linear layers, ReLU between them, and dropout.
        """
        self.model: ProgramModule = emit(program)
        self._layers = _layers(program)
        self._beta, self._gamma = beta, gamma
        self._seed = seed

    def fit(
        self,
        inputs: Tensor,
        targets: Tensor,
        rounds: int,
        *,
        warm: int = 4,
        test: tuple[Tensor, Tensor] | None = None,
        error: Metric | None = None,
    ) -> list[ADMMStep]:
        """Train from the start.

        Args:
            inputs: All data. ``[N, ...]``
            targets: Classes. ``[N]``
            rounds: How often all layers are set.
            warm: Rounds before the multiplier is used.
            test: Inputs and classes to test on after each round.
            error: Of outputs and targets, such as `gs.train.misclassified`.

        Raises:
            UserError: Targets are no classes.
        """
        if targets.dim() != 1 or targets.is_floating_point() or len(targets) != len(inputs):
            raise UserError(f"targets {tuple(targets.shape)} are not one class for each input")
        weights = self._weights()
        data = inputs.flatten(1).T.to(weights[0])
        if len(data) + 1 != weights[0].shape[1]:
            raise UserError(f"inputs of {len(data)} numbers for a net of {weights[0].shape[1] - 1}")
        targets, classes = targets.long(), len(weights[-1])
        least, most = (int(targets.min()), int(targets.max())) if len(targets) else (0, 0)
        if least < 0 or most >= classes:
            raise UserError(
                f"classes from {least} to {most}, and the net has {classes} outputs",
                hint=f"classes are numbers from 0 to {classes - 1}",
            )
        wanted = nn.functional.one_hot(targets, classes).T.bool()
        generator = torch.Generator().manual_seed(self._seed)
        z = [torch.randn(len(weight), data.shape[1], generator=generator).to(weight) for weight in weights]
        a = [data, *(value.relu() for value in z[:-1])]
        multiplier = torch.zeros_like(z[-1])
        steps = []
        for number in range(rounds):
            start = time.perf_counter()
            for layer, weight in enumerate(weights):
                weight.copy_(_best_weight(z[layer], a[layer]))
                if layer == len(weights) - 1:
                    found = weight @ _with_one(a[layer])
                    z[layer] = best_output(found, multiplier, wanted, self._beta)
                    if number >= warm:
                        multiplier += self._beta * (z[layer] - found)
                else:
                    a[layer + 1] = self._best_activation(weights[layer + 1], z[layer + 1], z[layer])
                    found = weight @ _with_one(a[layer])
                    z[layer] = best_preactivation(found, a[layer + 1], self._beta, self._gamma)
            seconds = time.perf_counter() - start
            self._keep(weights)
            steps.append(self._record(number, inputs, targets, test, error, seconds))
        return steps

    def _best_activation(self, following: Tensor, z_next: Tensor, z: Tensor) -> Tensor:
        """Least squares between what the next layer wants and ``relu(z)``."""
        weight, bias = following[:, :-1], following[:, -1:]
        left = self._beta * weight.T @ weight + self._gamma * torch.eye(len(z)).to(z)
        right = self._beta * weight.T @ (z_next - bias) + self._gamma * z.relu()
        found: Tensor = torch.linalg.solve(left, right)
        return found

    def _weights(self) -> list[Tensor]:
        """Each layer's weights with its bias as the last column, in float64."""
        state = self.model.state_dict()
        found = []
        for weight, bias in self._layers:
            matrix = state[weight].detach().double()
            column = state[bias].detach().double() if bias else torch.zeros(len(matrix)).to(matrix)
            found.append(torch.cat([matrix, column[:, None]], 1))
        return found

    def _keep(self, weights: list[Tensor]) -> None:
        state = self.model.state_dict()
        with torch.no_grad():
            for (weight, bias), found in zip(self._layers, weights, strict=True):
                state[weight].copy_(found[:, :-1])
                if bias:
                    state[bias].copy_(found[:, -1])

    def _record(
        self,
        number: int,
        inputs: Tensor,
        targets: Tensor,
        test: tuple[Tensor, Tensor] | None,
        error: Metric | None,
        seconds: float,
    ) -> ADMMStep:
        self.model.eval()
        with torch.no_grad():
            outputs = self.model(inputs)
            wanted = nn.functional.one_hot(targets, outputs.shape[1]).bool()
            loss = torch.where(wanted, 1 - outputs, outputs).clamp_min(0).sum(1).mean()
            own = None if error is None else float(error(outputs, targets))
            other = None if error is None or test is None else float(error(self.model(test[0]), test[1]))
        return ADMMStep(number, float(loss), own, other, seconds)


def _with_one(a: Tensor) -> Tensor:
    return torch.cat([a, torch.ones(1, a.shape[1]).to(a)])


def _best_weight(z: Tensor, a: Tensor) -> Tensor:
    """Least squares ``W [a; 1] = z``, the one of the smallest norm."""
    inverse: Tensor = torch.linalg.pinv(_with_one(a))
    return z @ inverse


def best_preactivation(found: Tensor, a: Tensor, beta: float, gamma: float) -> Tensor:
    """Entry by entry the ``z`` with the least ``gamma (a - relu(z))^2 + beta (z - found)^2``."""
    above = ((gamma * a + beta * found) / (gamma + beta)).clamp_min(0)
    below = found.clamp_max(0)

    def cost(z: Tensor) -> Tensor:
        return gamma * (a - z.relu()).square() + beta * (z - found).square()

    return torch.where(cost(above) < cost(below), above, below)


def best_output(found: Tensor, multiplier: Tensor, wanted: Tensor, beta: float) -> Tensor:
    """Entry by entry the ``z`` with the least ``hinge(z) + multiplier z + beta (z - found)^2``.

    The hinge is ``max(1 - z, 0)`` for the class that is wanted and ``max(z, 0)`` for the others, as in the
    paper's section 6.
    """
    flat = found - multiplier / (2 * beta)  # where the hinge is zero
    steep = found + (torch.where(wanted, 1.0, -1.0).to(found) - multiplier) / (2 * beta)
    up = torch.where(flat >= 1, flat, torch.where(steep <= 1, steep, torch.ones_like(flat)))
    down = torch.where(flat <= 0, flat, torch.where(steep >= 0, steep, torch.zeros_like(flat)))
    return torch.where(wanted, up, down)


def _layers(program: Program) -> list[tuple[str, str | None]]:
    """Names of weight and bias of each layer, from the inputs on."""
    graph = program.graph()
    (closing,) = graph.find_nodes(op="output")
    if len(program.signature.inputs) != 1 or len(closing.args[0]) != 1:
        raise UnsupportedError("ADMM trains nets with one input and one output")
    layers: list[tuple[str, str | None]] = []
    node = closing.args[0][0]
    wants_linear = True
    while node.op != "placeholder":
        name = base_name(node) if node.op == "call_function" else node.op
        if name == "linear" and wants_linear:
            weight, bias = node_arg(node, 1), node.args[2] if len(node.args) > 2 else None
            layers.append((str(weight.target), str(bias.target) if isinstance(bias, fx.Node) else None))
            wants_linear = False
        elif name == "relu" and not wants_linear:
            wants_linear = True
        elif name not in _MOVES:
            raise UnsupportedError(
                f"ADMM trains linear layers with ReLU between them, and here is {op_name(node)}",
                where=str(source_of(node)),
                hint="train this net by local critics",
            )
        node = node_arg(node)
    if not layers:
        raise UnsupportedError("there is no linear layer for ADMM to train")
    return layers[::-1]
