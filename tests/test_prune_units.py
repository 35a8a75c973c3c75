"""Whole units: the pass `prune-units`, `gs.prune_units` and the command."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import graphsplit as gs
from graphsplit.errors import BundleError, PartitionError, UserError
from graphsplit.passes import Pipeline, Programs
from graphsplit.passes.prune_units import PruneUnits
from graphsplit.program import check
from laws import largest_difference, program_unchanged, run
from zoo import call_of, traced

# One or two of every family; `benchmarks/prune_units.py` goes through all.
TRIED = [
    *("lenet", "resnet_basic", "resnext", "shufflenet_v2", "mobilenet_v2", "densenet", "vit", "gpt"),
    *(
        "hub_deepseek_v2",
        "llama_two_kv_heads",
        "lstm_bidirectional",
        "tied_autoencoder",
        "mask_buffers",
        "norm_group",
    ),
]
# Why nothing can be dropped, in the words of the message.
REFUSED = {
    "hidden_output": "every unit reaches an output",
    "norm_group_single": r"is mixed by group_norm\.default \(module norm1",
}


def pruned(name: str, **options: Any) -> gs.PrunedUnits:
    args, kwargs = call_of(name)
    return gs.prune_units(traced(name), args, kwargs, **options)


@pytest.mark.parametrize("name", TRIED)
def test_smaller_model_is_the_masked_one(name: str) -> None:
    program = traced(name)
    with program_unchanged(program):
        found = pruned(name)
    certificate = found.verify()
    assert certificate.ok, certificate
    assert certificate.max_error < 1e-11
    check(found.program)
    before, after = found.parameters()
    assert after < before
    assert all(1 <= after == before - round(before / 2) for before, after in found.axes.values())
    args, kwargs = call_of(name)
    with torch.no_grad():
        small = found.module.eval()(*args, **kwargs)
        masked = found.masked().eval()(*args, **kwargs)
    pairs = [torch.utils._pytree.tree_leaves(value) for value in (small, masked)]
    assert largest_difference(*[[x for x in leaves if isinstance(x, Tensor)] for leaves in pairs]) < 1e-4


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    with pytest.raises(PartitionError, match=REFUSED[name]) as caught:
        pruned(name)
    assert caught.value.hint


class Net(nn.Module):
    """A residual stream under a layer norm, heads, and a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(3, 8), nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.hidden, self.head = nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        n, t, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, t, 3, 4, 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, 8)
        return self.head(F.relu(self.hidden(x + self.out(y)))).mean(1)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


X = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))


def test_heads_are_units_and_what_is_normalised_stays_whole() -> None:
    found = gs.prune_units(net(), X)
    assert found.axes == {"qkv.weight[0]": (4, 2), "hidden.weight[0]": (6, 3)}
    assert list(found.kept) == ["embed.weight[0]"]
    assert "is mixed by layer_norm.default (module norm" in found.kept["embed.weight[0]"]
    assert found.program.state["qkv.weight"].tensor.shape == (12, 8)
    assert found.program.state["out.weight"].tensor.shape == (8, 4)
    assert found.verify().ok


def test_the_smallest_sums_go() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
        model[0].weight.mul_(torch.tensor([[3.0], [1.0], [2.0], [1.0], [0.5]]))
        model[2].weight[:, 4] = 3
    found = gs.prune_units(model, torch.randn(2, 3), amount=0.6)
    # 9 + 2, 3 + 2, 6 + 2, 3 + 2 and 1.5 + 6: the first and the third are the largest.
    assert found.program.state["0.weight"].tensor[:, 0].tolist() == [3, 2]
    assert found.program.state["0.bias"].tensor.shape == (2,)
    counted = gs.prune_units(model, torch.randn(2, 3), amount=0.2)
    assert counted.program.state["0.weight"].tensor[:, 0].tolist() == [3, 1, 2, 0.5], "of equals the first"


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow", "magnitude", "random"])
def test_methods(method: Any) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    found = gs.prune_units(model, X, method=method, data=(X, torch.arange(5) % 2), loss=F.cross_entropy)
    assert found.axes == {"qkv.weight[0]": (4, 2), "hidden.weight[0]": (6, 3)}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def flow(weights: list[Tensor]) -> list[Tensor]:
    """Scores of SynFlow for a chain of linear layers."""
    leaves = [weight.abs().requires_grad_() for weight in weights]
    x = torch.ones(leaves[0].shape[1], dtype=torch.float64)
    for leaf in leaves:
        x = leaf @ x
    return [leaf.detach() * g for leaf, g in zip(leaves, torch.autograd.grad(x.sum(), leaves), strict=True)]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_synflow_scores_again_in_every_round(scope: Any) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))
    weights = [model[place].weight.detach().double() for place in (0, 2, 4)]
    alive = [torch.ones(12, dtype=torch.bool), torch.ones(9, dtype=torch.bool)]
    for number in range(1, 11):
        first, second, last = flow(weights)
        values = [first.sum(1) + second.sum(0), second.sum(1) + last.sum(0)]
        values = [value.where(own, -1.0) for value, own in zip(values, alive, strict=True)]
        left = 0.25 ** (number / 10)
        if scope == "layer":
            for value, own in zip(values, alive, strict=True):
                own[value.argsort()[: round(len(value) * (1 - left))]] = False
        else:
            best = [value.argmax() for value in values]
            order = torch.cat([v.index_fill(0, b, math.inf) for v, b in zip(values, best, strict=True)])
            gone = order.argsort()[: round(21 * (1 - left))]
            alive = list(torch.cat(alive).index_fill(0, gone, False).split([12, 9]))
        weights = [
            weights[0] * alive[0][:, None], weights[1] * alive[1][:, None] * alive[0], weights[2] * alive[1],
        ]  # fmt: skip
    x = torch.randn(2, 4)
    found = gs.prune_units(model, x, method="synflow", amount=0.75, scope=scope, iterations=10)
    rows = found.program.state["0.weight"].tensor
    assert torch.equal(rows, model[0].weight[alive[0]])
    assert torch.equal(found.program.state["4.weight"].tensor, model[4].weight[:, alive[1]])
    once = gs.prune_units(model, x, method="synflow", amount=0.75, scope=scope, iterations=1)
    assert not torch.equal(rows, once.program.state["0.weight"].tensor), "the rounds make a difference"
    scoring = PruneUnits(method="synflow", amount=0.75, scope=scope, iterations=10)
    again = scoring.run(Programs((gs.trace(model, x),))).programs.single()
    assert torch.equal(again.state["0.weight"].tensor, rows)


def test_all_axes_together() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 2))
    found = gs.prune_units(model, torch.randn(2, 3), amount=0.75, scope="global")
    left = [after for _, after in found.axes.values()]
    assert sum(left) + sum(n for n in (4, 20) if f"{0 if n == 4 else 2}.weight[0]" not in found.axes) == 6
    with torch.no_grad():
        model[0].weight.mul_(1e-6), model[2].weight.mul_(1e-3)
    extreme = gs.prune_units(model, torch.randn(2, 3), amount=0.99, scope="global")
    assert extreme.axes == {"0.weight[0]": (4, 1), "2.weight[0]": (20, 1)}, "one unit of each axis stays"
    assert extreme.verify().ok


def test_a_checkpoint_is_sliced_by_the_plan() -> None:
    model = net()
    found = gs.prune_units(model, X)
    found.module.load_state_dict(found.plan.slice_state_dict(model.state_dict(), 0))
    assert gs.PartitionPlan.from_json(found.plan.to_json()) == found.plan


def test_users_own_class() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    x = torch.randn(2, 1, 4, 4)
    found = gs.prune_units(model, x, emit="module")
    assert isinstance(found.module, nn.Sequential) and found.module[0].out_channels == 2
    expected = gs.emit(found.program).eval()(x)
    assert largest_difference([found.module.eval()(x)], [expected]) < 1e-6
    with pytest.raises(PartitionError, match="needs the user's own module"):
        gs.prune_units(gs.trace(model, x), emit="module")


class Positive(nn.Module):
    """Positive weights: what is masked is one there, and the sigmoid of a dropped unit is one half."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.log = nn.Linear(3, 8), nn.Parameter(torch.randn(8, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(torch.sigmoid(self.left(x)) @ self.log.exp()))


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_norms_of_weights_lose_what_they_would_lose_as_zeros(norm: Any) -> None:
    """A row that is brought to a length has no direction where all of it is zero: its length is zero."""
    model = nn.Sequential(
        norm(nn.Linear(6, 8)), nn.ReLU(), norm(nn.Linear(8, 12)), nn.ReLU(), nn.Linear(12, 4)
    )
    found = gs.prune_units(model, torch.randn(5, 6), amount=0.5)
    assert sorted(found.axes.values()) == [(8, 4), (12, 6)]
    certificate = found.verify()
    assert certificate.ok, certificate
    assert all(torch.isfinite(value).all() for value in found.masked().state_dict().values())


def test_features_of_length_one_can_lose_units() -> None:
    class Normalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.normalize(self.embed(x), dim=-1))

    found = gs.prune_units(Normalized(), torch.randn(5, 6), amount=0.5)
    assert list(found.axes.values()) == [(8, 4)]
    certificate = found.verify()
    assert certificate.ok, certificate


def test_what_zeros_would_change_is_found_by_running_it() -> None:
    torch.manual_seed(0)
    found = gs.prune_units(Positive(), torch.randn(4, 3))
    assert found.axes == {"log[1]": (6, 3)}
    assert "would change what matmul.default" in found.kept["log[0]"]
    assert found.verify().ok


def test_pass_obeys_the_laws() -> None:
    program = gs.trace(net(), X)
    with program_unchanged(program):
        result = PruneUnits().run(Programs((program,)))
    assert result.modified and "embed.weight[0] is mixed by layer_norm" in result.reason
    again = PruneUnits().run(Programs((program,))).programs.single()
    assert str(result.programs.single()) == str(again)
    check(again)


def test_in_a_pipeline_on_submodels() -> None:
    program = gs.trace(net(), X)
    fused = gs.emit(Pipeline.parse("partition(k=2) | prune-units(amount=0.5) | fuse")(program).single())
    assert fused(X).shape == (2, 5, 2)
    assert (
        str(Pipeline.parse("prune-units(method='random', seed=3)")) == "prune-units(method='random', seed=3)"
    )


def test_submodels_and_layer_groups() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(4, 3)
    part = gs.partition(model, x, k=2)
    found = gs.prune_units(part.submodels[0], x)
    assert found.axes == {"0.weight[0]": (4, 2), "2.weight[0]": (4, 2)} and found.verify().ok
    group = gs.layer_groups(model, x, at=["3"]).modules[0]
    found = gs.prune_units(group, x)
    assert found.axes == {"0.weight[0]": (8, 4)}, "what crosses the cut is an output of the group"


@pytest.mark.parametrize("amount", [0, 1, -0.5, 2, float("nan"), True, None])
def test_amount_out_of_range(amount: Any) -> None:
    with pytest.raises(PartitionError, match="expected a number between 0 and 1"):
        gs.prune_units(net(), X, amount=amount)


def test_options_that_do_not_fit() -> None:
    with pytest.raises(PartitionError, match=r"a share of 0\.01 is no unit of any axis"):
        gs.prune_units(net(), X, amount=0.01)
    with pytest.raises(PartitionError, match="scope is 'axis'"):
        gs.prune_units(net(), X, scope="axis")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="snip scores by gradients of a loss"):
        gs.prune_units(net(), X, method="snip")


@pytest.mark.parametrize("emit", ["graph", "module"])
def test_saved_with_the_plan_and_the_values_of_now(tmp_path: Path, emit: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(5, 3)
    found = gs.prune_units(model, x, emit=emit)
    found.module(x)  # counts, and moves the running statistics
    with torch.no_grad():
        for parameter in found.module.parameters():
            parameter.add_(1.0)
    gs.save(found, tmp_path / "small")
    loaded = gs.load(tmp_path / "small")
    assert isinstance(loaded, gs.PrunedUnits)
    assert (loaded.plan, loaded.axes, loaded.kept) == (found.plan, found.axes, found.kept)
    assert loaded.parameters() == found.parameters() and loaded.flops() == found.flops()
    assert torch.equal(loaded.module.eval()(x), found.module.eval()(x))
    assert loaded.verify().ok
    masked = loaded.masked().eval()
    assert {name: value.shape for name, value in masked.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
    torch.testing.assert_close(masked(x), found.module.eval()(x))
    gs.save(loaded, tmp_path / "again")
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("small", "again")
    ]
    assert files[0] == files[1]


def test_a_saved_model_that_is_no_pruned_one_is_not_proved(tmp_path: Path) -> None:
    found = gs.prune_units(net(), X)
    bundle = found.to_bundle()
    with pytest.raises(BundleError, match="of another size"):
        gs.save(replace(bundle, small=found.pruned.program), tmp_path / "whole")
        gs.load(tmp_path / "whole")


def test_command(tmp_path: Path) -> None:
    file, out = tmp_path / "model.py", tmp_path / "out"
    file.write_text(
        "import torch\nfrom torch import nn\n"
        "model = nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 3))\n"
        "example_inputs = torch.randn(2, 5)\n"
    )
    done = run("prune-units", file, "--amount", 0.25, "-o", out, "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["axes"] == [{"name": "0.weight[0]", "before": 40, "after": 30}]
    assert report["certificate"]["ok"]
    loaded = gs.load(out)
    assert isinstance(loaded, gs.PrunedUnits) and loaded.axes == {"0.weight[0]": (40, 30)}
    assert loaded.program.state["0.weight"].tensor.shape == (30, 5)
    done = run("verify", out, "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["certificate"]["ok"], done.stderr
    done = run("export", out, "-o", tmp_path / "onnx")
    assert done.exit_code == 0 and (tmp_path / "onnx" / "model.onnx").exists(), done.stderr
    done = run("prune-units", file, "-o", out, "--force", "--method", "snip")
    assert done.exit_code == 3 and "defines no `data`" in done.stderr
    done = run("prune-units", file, "-o", out, "--force")
    assert done.exit_code == 0 and "0.weight[0]" in done.stdout


def test_numbers_made_from_whole_ones_are_compared_in_their_places() -> None:
    """In float64 such a model has ops of its own, which turn whole numbers into others."""

    class Timed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

        def forward(self, t: Tensor) -> Tensor:
            return self.layers((t[:, None] * torch.exp(torch.arange(4) * -0.7)).sin())

    found = gs.prune_units(Timed(), torch.arange(5))
    assert list(found.axes.values()) == [(8, 4)]
    certificate = found.verify()
    assert certificate.ok, certificate
