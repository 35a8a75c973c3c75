"""Pass unstack: a stacked recurrent network as one op a layer, bit for bit."""

import copy

import pytest
import torch
from torch import Tensor, nn

import graphsplit as gs
from graphsplit.passes import Pipeline, Programs
from graphsplit.passes.unstack import Unstack, unstack
from graphsplit.program import check, op_name
from laws import assert_same_step, step


class Stack(nn.Module):
    def __init__(self, kind: str, *, states: bool, **options: object) -> None:
        super().__init__()
        self.net = getattr(nn, kind)(5, 6, 3, **options)
        self.states = states

    def forward(self, x: Tensor) -> object:
        y, hidden = self.net(x)
        return (y, hidden) if self.states else y


CASES = {
    "lstm": ("LSTM", {"dropout": 0.4, "batch_first": True}),
    "lstm_projected": ("LSTM", {"proj_size": 4}),
    "gru_both_ways": ("GRU", {"bidirectional": True, "dropout": 0.3}),
    "rnn_without_biases": ("RNN", {"bias": False, "nonlinearity": "relu"}),
}


@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_same_function_in_both_modes(name: str, states: bool) -> None:
    kind, options = CASES[name]
    torch.manual_seed(0)
    model = Stack(kind, states=states, **options).double()
    x = torch.randn(4, 7, 5, dtype=torch.float64)
    program = gs.trace(model, (x,))
    text = str(program)
    found = unstack(program)
    check(found)
    assert str(program) == text
    calls = [node for node in found.graph().nodes if ".input" in op_name(node)]
    assert len(calls) == 3 and all(node.args[4] == 1 for node in calls)
    for training in (True, False):
        original = copy.deepcopy(model).train(training)
        assert_same_step(step(gs.emit(found).train(training), ((x,), {})), step(original, ((x,), {})))


def test_a_single_layer_stays_as_it_is() -> None:
    program = gs.trace(nn.GRU(5, 6), (torch.randn(4, 2, 5),))
    assert unstack(program) is program
    result = Unstack().run(Programs.of(program))
    assert not result.modified and "several layers" in result.reason


def test_states_that_nothing_uses_are_not_joined() -> None:
    program = gs.trace(Stack("LSTM", states=False), (torch.randn(4, 2, 5),))
    (found,) = Pipeline.parse("unstack")(program).items
    assert not any(op_name(node) == "cat.default" for node in found.graph().nodes)
