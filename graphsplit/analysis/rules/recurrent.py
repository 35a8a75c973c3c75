"""Recurrent layers and cells: hidden units are units, weights by gate."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from graphsplit.analysis.facts import Facts, Path, rule
from graphsplit.analysis.inference import Inference, whole
from graphsplit.analysis.units import Factors, Ids
from graphsplit.graphs import base_name, node_arg

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@rule("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input")
def recurrent(inference: Inference, node: fx.Node) -> Facts:
    """``y, h_n(, c_n) = rnn(x, h_0, [w_ih, w_hh, b_ih, b_hh, w_hr] per layer and direction)``.

    A unit is one hidden unit of one direction of one layer, with its rows of all gates. Every gate of a unit
    stays with it; the hidden state it is given is cut. With projections (``w_hr``) the projected state has
    units of its own.
    """
    name = base_name(node)
    arguments: tuple[Any, ...] = node.args[:9]
    x, hx, params, has_biases, layers, _, _, bidirectional, _ = arguments
    several = isinstance(hx, (list, tuple))
    states = list(hx) if several else [hx]
    directions = 2 if bidirectional else 1
    count = len(params) // (directions * layers)
    projected = count == (5 if has_biases else 3)
    if any(not isinstance(p, fx.Node) or p.op != "get_attr" for p in params):
        return whole(inference, node, f"{name} with computed weights")
    current, reason = _features(inference, x, name)
    hidden: list[Ids] = []
    cells: list[Ids] = []
    for layer in range(layers):
        last = []
        for direction in range(directions):
            start = (layer * directions + direction) * count
            weights = params[start : start + count]
            projection = weights.pop() if projected else None
            units, inner = _gates(inference, GATES[name], current, weights, projection)
            last.append(units)
            hidden.append(units)
            cells.append(inner)
        current = np.concatenate(last)
    assert current is not None
    # The layers of h_n stand in one tensor: unit j of each goes to the same sub-model.
    for finals in (hidden, cells):
        for units in finals[1:]:
            inference.units.couple(finals[0], units)
    rank = len(inference.shape(x))
    facts = Facts([], whole=reason)
    outputs: list[Factors] = [(current.reshape((1,) * (rank - 1) + (-1,)),)]
    for position, (state, units) in enumerate(zip(states, (hidden[0], cells[0]), strict=False)):
        path: Path = (1, position) if several else (1,)
        outputs.append((_meet_state(inference, facts, path, state, units),))
    facts.outputs = outputs
    return facts


@rule("lstm_cell.default", "gru_cell.default", "rnn_tanh_cell.default", "rnn_relu_cell.default")
def cell(inference: Inference, node: fx.Node) -> Facts:
    """One step of a recurrent layer: ``h'(, c') = cell(x, h(, c), w_ih, w_hh, b_ih, b_hh)``."""
    name = base_name(node).removesuffix("_cell")
    arguments: Any = node.args
    x, hx, *weights = arguments
    if any(not isinstance(p, fx.Node) or p.op != "get_attr" for p in weights if p is not None):
        return whole(inference, node, f"a cell of {name} with computed weights")
    features, reason = _features(inference, x, name)
    given = [weight for weight in weights if weight is not None]
    units, _ = _gates(inference, GATES[name], features, given, None)
    facts = Facts([], whole=reason)
    if name == "lstm":
        assert isinstance(hx, (list, tuple))
        facts.outputs = [
            (_meet_state(inference, facts, (1, place), state, units),) for place, state in enumerate(hx)
        ]
    else:
        facts.outputs = (_meet_state(inference, facts, (1,), node_arg(node, 1), units),)
    return facts


def _features(inference: Inference, x: Any, name: str) -> tuple[Ids | None, str | None]:
    """Ids of the features of an input, if it has any.

    Units along its other dimensions are kept whole, for the reason that is given beside.
    """
    factors, lost = inference.hold(x, range(len(inference.shape(x)) - 1))
    features = factors[0].ravel() if factors else None
    return features, f"{name} over an input whose units are not its features" if lost else None


def _gates(
    inference: Inference, gates: int, x: Ids | None, weights: list[fx.Node], projection: fx.Node | None
) -> tuple[Ids, Ids]:
    """Couple the weights of one layer; returns the units of its output and those of its cells."""
    w_ih, w_hh, *biases = weights
    out = _units_of(inference, w_hh, 1)
    inner = out
    if projection is not None:
        inference.adopt(projection, 0, out)
        inner = _units_of(inference, projection, 1)
    rows = np.tile(inner, gates)
    inference.adopt(w_hh, 0, rows)
    inference.adopt(w_ih, 0, rows)
    inference.adopt(w_ih, 1, x)
    for bias in biases:
        inference.adopt(bias, 0, rows)
    return out, inner


def _units_of(inference: Inference, weight: fx.Node, dim: int) -> Ids:
    """Ids of a dimension of a weight."""
    if inference.unset(weight, dim):
        inference.adopt(weight, dim, inference.units.fresh(inference.shape(weight)[dim]))
    units = inference.state[str(weight.target)][dim]
    # A hidden state of one unit has no dimension of units.
    return np.zeros(inference.shape(weight)[dim], np.int64) if units is None else units


def _meet_state(inference: Inference, facts: Facts, path: Path, state: fx.Node, units: Ids) -> Ids:
    """Couple a given state with the units of the layer, or cut it; returns the factor of the new one."""
    rank = len(inference.shape(state))
    final = units.reshape((1,) * (rank - 1) + (-1,))
    cut = True
    for ids in inference.factors(state):
        if ids.shape[rank - 1] > 1:
            inference.units.couple(ids, final)
            cut = False
        else:
            inference.units.share(ids)
    if cut:
        facts.expects[path] = (final,)
    return final
