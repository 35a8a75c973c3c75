"""The passes `partition` and `merge` as text: what becomes of a small program."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

import graphsplit as gs
from graphsplit.passes import Pipeline, Programs


class Net(nn.Module):
    """A hidden layer, a normalisation over its units, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(torch.relu(self.up(x))))
        return out


@pytest.fixture(scope="module")
def divided() -> Programs:
    torch.manual_seed(0)
    return Pipeline.parse("partition(k=2)")(gs.trace(Net(), torch.randn(4, 6)))


def text(program: gs.Program) -> str:
    """The ops of a program; the symbol of the batch is torch's to name."""
    lines = [line.strip() for line in re.sub(r"\bs\d+\b", "N", str(program)).splitlines()]
    return "\n".join(line for line in lines if " = state " not in line)


def test_submodel(divided: Programs) -> None:
    assert text(divided.items[1]) == "\n".join(
        [
            "program Net: 6 state tensors, 51 parameters",
            "graph (train and eval):",
            "x: float32[N, 6] = input",
            "linear_default: float32[N, 4] = linear.default(x, up_weight, up_bias)",
            "relu_default: float32[N, 4] = relu.default(linear_default)",
            "layer_norm_default: float32[N, 4] = layer_norm.default(relu_default, [4], norm_weight, norm_bias, 1e-05, False)",
            "linear_default_1: float32[N, 3] = linear.default(layer_norm_default, head_weight, head_bias)",
            "return (linear_default_1,)",
        ]
    )


def test_exact_merge_normalises_each_slice(divided: Programs) -> None:
    merged = Pipeline.parse("merge")(divided).single()
    assert text(merged) == "\n".join(
        [
            "program Net: 6 state tensors, 99 parameters",
            "graph (train and eval):",
            "x: float32[N, 6] = input",
            "linear_default: float32[N, 8] = linear.default(x, up_weight, up_bias)",
            "relu_default: float32[N, 8] = relu.default(linear_default)",
            "slice_tensor: float32[N, 4] = slice.Tensor(relu_default, 1, 0, 4)",
            "slice_tensor_1: float32[4] = slice.Tensor(norm_weight, 0, 0, 4)",
            "slice_tensor_2: float32[4] = slice.Tensor(norm_bias, 0, 0, 4)",
            "layer_norm_default: float32[N, 4] = "
            "layer_norm.default(slice_tensor, [4], slice_tensor_1, slice_tensor_2, 1e-05, False)",
            "slice_tensor_3: float32[N, 4] = slice.Tensor(relu_default, 1, 4, 8)",
            "slice_tensor_4: float32[4] = slice.Tensor(norm_weight, 0, 4, 8)",
            "slice_tensor_5: float32[4] = slice.Tensor(norm_bias, 0, 4, 8)",
            "layer_norm_default_1: float32[N, 4] = "
            "layer_norm.default(slice_tensor_3, [4], slice_tensor_4, slice_tensor_5, 1e-05, False)",
            "cat_default: float32[N, 8] = cat.default([layer_norm_default, layer_norm_default_1], 1)",
            "linear_default_1: float32[N, 3] = linear.default(cat_default, head_weight, head_bias)",
            "return (linear_default_1,)",
        ]
    )


def test_plain_merge_is_the_original_graph(divided: Programs) -> None:
    assert divided.analysis is not None
    original = divided.analysis.program
    plain = Pipeline.parse("merge(duplicate=False)")(divided).single()
    assert text(plain) == text(original)
    weight = plain.state["up.weight"].tensor
    assert torch.equal(weight, original.state["up.weight"].tensor)
    # Eq. (1): the output layer is divided by K.
    torch.testing.assert_close(plain.state["head.weight"].tensor, original.state["head.weight"].tensor / 2)


def test_partition_into_one_is_the_program_itself() -> None:
    program = gs.trace(Net(), torch.randn(4, 6))
    assert str(Pipeline.parse("partition(k=1)")(program).single()) == str(program)


class Positions(nn.Module):
    """Two streams, and a table that is added to one of them, or to both, of which one may have heads."""

    def __init__(self, uses: str) -> None:
        super().__init__()
        self.uses = uses
        self.a, self.b = nn.Linear(3, 8), nn.Linear(3, 8)
        self.mix = nn.Linear(8, 8)
        self.head_a, self.head_b = nn.Linear(8, 2), nn.Linear(8, 2)
        self.register_buffer("table", torch.randn(12, 8))
        self.register_buffer("mask", (torch.rand(8, 8) > 0.5).float())

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.table, Tensor) and isinstance(self.mask, Tensor)
        a, b = torch.tanh(self.a(x)), torch.tanh(self.b(x))
        table = self.table[: x.shape[1]]
        a = a + table
        if self.uses == "twice":
            a = torch.relu(a) + table
        if self.uses in ("both", "heads"):
            b = torch.relu(b) + table
        if self.uses == "heads":
            b = b.unflatten(-1, (2, 4)).softmax(-1).flatten(-2)
        a = nn.functional.linear(a, self.mix.weight * self.mask)
        return self.head_a(torch.relu(a)) + self.head_b(torch.relu(b))


@pytest.mark.parametrize(
    ("uses", "is_cut"), [("once", True), ("twice", True), ("both", True), ("heads", False)]
)
def test_a_table_of_positions_is_dealt_out_with_the_units_that_it_meets(uses: str, is_cut: bool) -> None:
    """One that streams of other units share is not, as theirs would have to stay together; nor is a mask of weights."""
    torch.manual_seed(0)
    model, x = Positions(uses).double(), torch.randn(4, 5, 3, dtype=torch.float64)
    part = gs.partition(model, x, k=2)
    certificate = part.verify()
    assert certificate.ok, certificate
    assert part.analysis.kept_whole == (), "rows beyond the example are no units"
    for number, submodel in enumerate(part.submodels):
        state = submodel.state_dict()
        assert state["table"].shape == ((12, 4) if is_cut else (12, 8))
        assert state["mask"].shape == (8, 8), "of its entries half would be in no sub-model"
        sliced = part.plan.slice_state_dict(model.state_dict(), number)
        assert all(torch.equal(sliced[name], value) for name, value in state.items())
    merged = part.merge().state_dict()
    assert torch.equal(merged["table"], model.state_dict()["table"])
    assert torch.equal(merged["mask"], model.state_dict()["mask"])


def test_learned_queries_that_attend_to_each_other_are_no_units() -> None:
    """Their features are: rows that attention mixes are in every sub-model, and hold nothing else together."""

    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries = nn.Parameter(torch.randn(10, 1, 16))
            self.embed = nn.Linear(3, 16)
            self.decoder = nn.TransformerDecoderLayer(16, 4, 32)
            self.head = nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.decoder(self.queries.repeat(1, x.size(1), 1), self.embed(x)))

    torch.manual_seed(0)
    part = gs.partition(Queries(), torch.randn(6, 2, 3), k=2)
    certificate = part.verify()
    assert certificate.ok, certificate
    counts, full = part.plan.parameter_counts(), part.plan.full_parameter_count()
    assert max(counts) < 0.3 * full


class GraphAttention(nn.Module):
    """Veličković et al., arXiv 1710.10903: a head's scores are sums over a parameter of each head."""

    def __init__(self, sliced: bool) -> None:
        super().__init__()
        self.sliced = sliced
        self.embed = nn.Linear(6, 32, bias=False)
        self.both = nn.Parameter(torch.randn(4, 16))
        self.source, self.target = nn.Parameter(torch.randn(1, 4, 8)), nn.Parameter(torch.randn(1, 4, 8))
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = self.embed(x).view(-1, 4, 8)
        source, target = (self.both[:, :8], self.both[:, 8:]) if self.sliced else (self.source, self.target)
        scores = nn.functional.leaky_relu((h * source).sum(-1)[:, None] + (h * target).sum(-1)[None], 0.2)
        share = scores.masked_fill(edges[..., None] == 0, -torch.inf).softmax(1)
        return self.head(nn.functional.elu(torch.einsum("ijh,jhd->ihd", share, h).flatten(1)))


@pytest.mark.parametrize("sliced", [False, True])
def test_a_parameter_of_heads_is_divided_by_heads(sliced: bool) -> None:
    torch.manual_seed(0)
    part = gs.partition(GraphAttention(sliced), (torch.randn(7, 6), torch.ones(7, 7)), k=2)
    certificate = part.verify()
    assert certificate.ok, certificate
    assert [axis.size for axis in part.plan.axes if axis.counts] == [4]
    assert part.submodels[0].state_dict()["embed.weight"].shape == (16, 6)
