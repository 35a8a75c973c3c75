"""The cost model: FLOPs against torch's own counter and against closed formulas, bytes against autograd."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import graphsplit as gs
from graphsplit import costs
from graphsplit.errors import UserError


def counted(model: nn.Module, *inputs: Tensor) -> int:
    """FLOPs by torch's counter, which sees attention only where it is made of products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.eval()(*inputs)
    return counter.get_total_flops()


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # [N, T, 6]
        y = x @ self.w
        scores = torch.einsum("nti,nsi->nts", x, x)
        outer = torch.einsum("nti,ij,nsj->nts", x, self.w, y)
        batched = torch.baddbmm(scores, y, y.transpose(1, 2))
        added = torch.addmm(y[0], x[0], self.w)
        return y, scores, outer, batched, added


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 4).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v)


IMAGE = torch.randn(2, 4, 9, 9)
MODELS: dict[str, tuple[nn.Module, Tensor]] = {
    "linear": (nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3, bias=False)), torch.randn(2, 5, 6)),
    "conv": (nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), IMAGE),
    "conv1d": (nn.Conv1d(4, 8, 3, dilation=2), torch.randn(2, 4, 9)),
    "transposed": (nn.ConvTranspose2d(4, 8, 3, stride=2, groups=2), IMAGE),
    "products": (Products(), torch.randn(2, 4, 6)),
    "attention": (Attends(), torch.randn(2, 5, 16)),
}


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_of_torchs_counter(name: str) -> None:
    model, x = MODELS[name]
    program = gs.trace(model, (x,))
    assert costs.graph_flops(program.graph()) == counted(model, x) > 0


@pytest.mark.parametrize(
    ("kind", "gates", "layers", "directions", "projection"),
    [("LSTM", 4, 2, 2, 0), ("LSTM", 4, 1, 1, 3), ("GRU", 3, 3, 1, 0), ("RNN", 1, 2, 2, 0)],
)
def test_recurrent_layers_by_the_closed_formula(
    kind: str, gates: int, layers: int, directions: int, projection: int
) -> None:
    """Each step: gates times hidden units, from the input and from the hidden state; two FLOPs each."""
    n, steps, size, units = 2, 5, 6, 8
    options = {"proj_size": projection} if projection else {}
    model = getattr(nn, kind)(size, units, layers, bidirectional=directions == 2, batch_first=True, **options)
    state = projection or units
    expected = 0
    for layer in range(layers):
        given = size if layer == 0 else state * directions
        expected += directions * (gates * units * (given + state) + projection * units)
    program = gs.trace(model, (torch.randn(n, steps, size),))
    assert costs.graph_flops(program.graph()) == 2 * n * steps * expected


class Uncounted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.two = nn.Bilinear(5, 6, 3)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.two(x, y), torch.mv(y, self.two.weight[0, 0])


def test_products_that_torchs_counter_does_not_see() -> None:
    """x_a W_kab y_b: W y for each k and a, then the sum over a. And a matrix times a vector."""
    program = gs.trace(Uncounted(), (torch.randn(2, 5), torch.randn(2, 6)))
    assert costs.graph_flops(program.graph()) == 2 * 2 * 3 * (5 * 6 + 5) + 2 * 2 * 6


def test_attention_by_the_closed_formula() -> None:
    """Scores and sums, 4 N H T T E; grouped keys, as only queries are counted, make no difference."""
    program = gs.trace(Attends(), (torch.randn(2, 5, 16),))
    attention = next(node for node in program.graph().nodes if "attention" in str(node.target))
    assert costs.flops(attention) == 4 * 2 * 4 * 5 * 5 * 4


def test_saved_bytes_are_those_of_autograd() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    program = gs.trace(model, (torch.randn(3, 6),))
    found = costs.saved_bytes(program, program.graph("train"))
    by_op = [bytes_ for node, bytes_ in found.items() if node.op == "call_function"]
    # The first layer keeps its input, ReLU its result, which the next layer keeps, too.
    assert by_op == [3 * 6 * 4, 3 * 8 * 4, 0, 3 * 8 * 4, 0]


def test_seconds_count_the_backward_pass_of_ops_with_several_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 2, 4)
    program = gs.trace(nn.LSTM(4, 6), x)
    walked: list[int] = []
    grad = torch.autograd.grad

    def watched(outputs: Any, inputs: Any, *rest: Any, **others: Any) -> Any:
        walked.append(len(inputs))
        return grad(outputs, inputs, *rest, **others)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    costs.seconds(program, program.graph("train"), [x], runs=1)
    assert walked.count(4) == 2  # all weights of the LSTM, once in each run


def test_seconds_leave_the_model_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    x = torch.randn(2, 3, 8, 8)
    program = gs.trace(model, (x,))
    before = {name: entry.tensor.clone() for name, entry in program.state.items()}
    torch.manual_seed(3)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    found = costs.seconds(program, program.graph("train"), [x], runs=2)
    assert torch.equal(torch.rand(2), drawn)
    assert all(torch.equal(before[name], entry.tensor) for name, entry in program.state.items())
    assert all(value >= 0 and math.isfinite(value) for value in found.values()) and sum(found.values()) > 0


def test_nothing_is_timed_on_the_meta_device() -> None:
    with torch.device("meta"):
        model, x = nn.Linear(4, 4), torch.randn(2, 4)
    program = gs.trace(model, (x,))
    with pytest.raises(UserError, match="meta device takes no time"):
        costs.seconds(program, program.graph("train"), [x])
