"""The pass `widen`: the same function with more units, on models of every family, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphsplit as gs
from graphsplit.errors import PartitionError, UserError
from graphsplit.passes import Pipeline, Programs, Widen
from graphsplit.passes.widen import widen
from graphsplit.program import Program, check
from laws import Runner, largest_difference, program_unchanged, tensors, wide
from zoo import call_of, traced

EXACT = 1e-11

# Why these keep their width, in the words of the message.
REFUSED = {
    "hidden_output": "every unit reaches an output",
    "lstm_loop": "every unit reaches an output",
    "bilinear": r"is summed over by bilinear\.default .* against a weight that is computed",
    "norm_local_response": r"is mixed by avg_pool3d\.default \(module norm1",
    "norm_group_single": r"is mixed by group_norm\.default \(module norm1",
    "no_grad_region": r"is mixed by mean\.dim .* otherwise than in a weighted sum",
    "tied_autoencoder": r"is summed over by linear\.default .* against a weight that is computed",
    "weight_norm": "against a weight that is computed",
    "mask_buffers": "against a weight that is computed",
    "hub_falcon": r"is mixed by layer_norm\.default",
    "hub_convnext_v2": r"is mixed by layer_norm\.default",
    "hub_bloom": r"custom torch\.autograd\.Function",
}
# Copied unequally often: groups, heads that share keys, gates, two directions, shuffles and pieces.
UNEVEN = [
    "resnext",
    "shufflenet_v2",
    "llama_two_kv_heads",
    "lstm_bidirectional",
    "gpt",
    "swin",
    "glu",
    "norm_group",
]


# One model or two of every family; the coverage of the zoo is the business of `partition`.
TRIED = [
    *(
        "mlp",
        "lenet",
        "vgg",
        "resnet_basic",
        "densenet",
        "mobilenet_v2",
        "unet",
        "convnext",
        "encoder_decoder",
    ),
    *("state_space", "hub_bert", "hub_gpt2", "hub_resnet", "soft_experts"),
]


def run(program: Program, name: str) -> list[Tensor]:
    """Outputs in float64, in eval mode, with the weights that the program has."""
    runner = Runner(program, tensors(call_of(name)))
    return runner({key: wide(entry.tensor.detach()) for key, entry in program.state.items()})


@pytest.mark.parametrize(
    ("name", "factor"), [*((name, 2) for name in (*TRIED, *REFUSED)), *((name, 1.5) for name in UNEVEN)]
)
def test_same_function_or_refused(name: str, factor: float) -> None:
    if name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]) as caught:
            widen(traced(name), factor)
        assert caught.value.hint
        return
    program = traced(name)
    with program_unchanged(program):
        found = widen(program, factor, seed=3)
    check(found.program)
    assert found.program.parameter_count() > program.parameter_count()
    assert all(after == round(before * factor) for before, after in found.axes.values())
    assert largest_difference(run(found.program, name), run(program, name)) < EXACT


@pytest.mark.parametrize("name", ["lenet", "gpt", "lstm_bidirectional", "resnext", "llama_two_kv_heads"])
def test_deterministic(name: str) -> None:
    first, again, other = (widen(traced(name), 1.5, noise=0.1, seed=seed).program for seed in (1, 1, 2))
    assert str(first) == str(again)
    state = {key: entry.tensor for key, entry in first.state.items()}
    assert all(torch.equal(again.state[key].tensor, tensor) for key, tensor in state.items())
    assert not all(torch.equal(other.state[key].tensor, tensor) for key, tensor in state.items())


def perceptron() -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    return gs.trace(model.double(), torch.randn(2, 3, dtype=torch.float64))


def test_copies_and_shares() -> None:
    """Rows are copied; columns are copied and divided by how often their unit is there."""
    program = perceptron()
    found = widen(program, 2.5, seed=5)
    assert found.axes == {"0.weight[0]": (4, 10), "2.weight[0]": (5, 12)} and not found.kept
    old, new = ({n: e.tensor for n, e in p.state.items()} for p in (program, found.program))
    rows = [int((old["0.bias"] == value).nonzero()) for value in new["0.bias"]]
    assert rows == sorted(rows)
    often = torch.bincount(torch.tensor(rows))
    assert sorted(often.tolist()) == [2, 2, 3, 3]
    assert torch.equal(new["0.weight"], old["0.weight"][rows])
    columns = [int((old["2.bias"] == value).nonzero()) for value in new["2.bias"]]
    assert torch.equal(new["2.weight"], old["2.weight"][columns][:, rows] / often[rows])
    assert torch.equal(new["4.bias"], old["4.bias"])
    assert all(tensor.requires_grad for tensor in new.values())


def test_gradients_flow_to_every_copy() -> None:
    module = gs.emit(widen(perceptron()).program)
    module(torch.randn(8, 3, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_noise_leaves_the_first_of_each_unit() -> None:
    program = perceptron()
    plain, noisy = (widen(program, noise=noise).program for noise in (0.0, 0.1))
    for name, entry in plain.state.items():
        difference = (noisy.state[name].tensor - entry.tensor).detach()
        if name == "4.bias":
            assert (difference == 0).all()
            continue
        first = difference[::2, ::2] if name == "2.weight" else difference[::2]
        if name == "4.weight":
            first = difference[:, ::2]
        assert (first == 0).all() and (difference != 0).sum() == difference.numel() - first.numel()
        spread = float(difference[difference != 0].std() / entry.tensor.detach().std())
        assert 0.03 < spread < 0.3
    x = torch.randn(4, 3, dtype=torch.float64)
    error = largest_difference([gs.emit(noisy)(x)], [gs.emit(program)(x)])
    assert 1e-4 < error < 0.5


def test_buffers_get_no_noise() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    model(torch.randn(8, 1, 4, 4))
    state = widen(gs.trace(model, torch.randn(2, 1, 4, 4)), noise=1.0).program.state
    mean = model.get_buffer("1.running_mean")
    assert torch.equal(state["1.running_mean"].tensor, mean.repeat_interleave(2))


class TwoKinds(nn.Module):
    """One layer whose units meet a layer norm, and one whose units do not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(3, 8), nn.LayerNorm(8)
        self.hidden, self.head = nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.norm(self.embed(x)))))


def test_what_cannot_be_widened_is_kept_and_named() -> None:
    program = gs.trace(TwoKinds(), torch.randn(2, 3))
    found = widen(program)
    assert found.axes == {"hidden.weight[0]": (6, 12)}
    assert list(found.kept) == ["embed.weight[0]"]
    assert "layer_norm.default (module norm" in found.kept["embed.weight[0]"]
    assert found.program.state["embed.weight"].tensor.shape == (8, 3)
    result = Widen().run(Programs((program,)))
    assert result.modified and "embed.weight[0] is mixed by layer_norm" in result.reason


def test_tied_weight_that_is_read_in_two_ways() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body = nn.Embedding(7, 4), nn.Linear(4, 4)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            return F.linear(x + torch.tanh(self.body(x)), self.embed.weight)

    with pytest.raises(PartitionError, match=r"is both inside and outside of the sums with embed\.weight"):
        widen(gs.trace(Tied(), torch.tensor([[1, 2], [3, 4]])))


def test_in_a_pipeline() -> None:
    program = perceptron()
    pipeline = Pipeline.parse("widen(factor=2) | partition(k=2) | merge")
    assert str(pipeline) == "widen | partition | merge"
    merged = pipeline(program).single()
    x = torch.randn(4, 3, dtype=torch.float64)
    assert gs.emit(merged)(x).shape == (4, 2)
    assert (
        str(Pipeline.parse("widen(factor=1.5, noise=0.01, seed=4)"))
        == "widen(factor=1.5, noise=0.01, seed=4)"
    )


def test_a_wider_model_divides_again() -> None:
    wider = widen(traced("gpt")).program
    part = gs.partition(wider, *call_of("gpt"), k=4)
    assert part.verify().ok


@pytest.mark.parametrize("factor", [1, 0.5, -2, float("nan"), float("inf")])
def test_factor_out_of_range(factor: float) -> None:
    with pytest.raises(PartitionError, match="expected a number greater than 1"):
        widen(perceptron(), factor)


def test_noise_out_of_range() -> None:
    with pytest.raises(PartitionError, match="the noise is -1"):
        widen(perceptron(), noise=-1)


def test_factor_that_adds_no_unit() -> None:
    with pytest.raises(PartitionError, match=r"a factor of 1\.05 adds no unit"):
        widen(perceptron(), 1.05)
