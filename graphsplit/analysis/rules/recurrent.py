"""Recurrent layers: hidden units are units, weights by gate."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from graphsplit.analysis.facts import Facts, rule
from graphsplit.analysis.inference import Inference, whole
from graphsplit.analysis.units import Factors, Ids, varying
from graphsplit.graphs import base_name

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@rule("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input")
def recurrent(inference: Inference, node: fx.Node) -> Facts:
    """``y, h_n(, c_n) = rnn(x, h_0, [w_ih, w_hh, b_ih, b_hh] per layer and direction)``.

    A unit is one hidden unit of one direction of one layer, with its rows of all gates. Every gate of a unit
    stays with it; the hidden state it is given is cut.
    """
    name = base_name(node)
    gates = GATES[name]
    arguments: tuple[Any, ...] = node.args[:9]
    x, hx, params, has_biases, layers, _, _, bidirectional, _ = arguments
    states = list(hx) if isinstance(hx, (list, tuple)) else [hx]
    directions = 2 if bidirectional else 1
    per_layer = (4 if has_biases else 2) * directions
    if len(params) != per_layer * layers or not all(inference.is_common(state) for state in states):
        return whole(inference, node, f"{name} with projections or a learned initial state")
    if any(not isinstance(p, fx.Node) or p.op != "get_attr" for p in params):
        return whole(inference, node, f"{name} with computed weights")
    rank = len(inference.shape(x))
    current: Ids | None = None
    for ids in inference.factors(x):
        if varying(ids) != (rank - 1,):
            return whole(inference, node, f"{name} over an input whose units are not its features")
        current = ids.ravel()
    last: list[Ids] = []
    finals: list[Ids] = []
    for layer in range(layers):
        last = []
        for direction in range(directions):
            start = layer * per_layer + direction * (per_layer // directions)
            w_ih, w_hh, *biases = params[start : start + per_layer // directions]
            hidden = inference.shape(w_hh)[1]
            if inference.unset(w_hh, 1):
                inference.adopt(w_hh, 1, inference.units.fresh(hidden))
            units = inference.state[str(w_hh.target)][1]
            assert units is not None
            rows = np.tile(units, gates)
            inference.adopt(w_hh, 0, rows)
            inference.adopt(w_ih, 0, rows)
            inference.adopt(w_ih, 1, current)
            for bias in biases:
                inference.adopt(bias, 0, rows)
            last.append(units)
            finals.append(units)
        current = np.concatenate(last)
    assert current is not None
    # The layers of h_n stand in one tensor: unit j of each goes to the same sub-model.
    for units in finals[1:]:
        inference.units.couple(finals[0], units)
    output = current.reshape((1,) * (rank - 1) + (-1,))
    state_rank = len(inference.shape(states[0]))
    final = finals[0].reshape((1,) * (state_rank - 1) + (-1,))
    outputs: list[Factors] = [(output,), *((final,) for _ in states)]
    facts = Facts(outputs)
    for position in range(len(states)):
        facts.expects[(1, position) if isinstance(hx, (list, tuple)) else (1,)] = (final,)
    return facts
