"""Who goes where: strategies, shares, plans that are replayed, and merging level by level."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import graphsplit as gs
from graphsplit.analysis.dealing import STRATEGIES, counts_of
from graphsplit.errors import GraphsplitError, PartitionError, PlanError
from graphsplit.passes import Pipeline
from zoo import ZOO

MODELS = ("lenet", "gpt", "shufflenet_v2", "gru_bidirectional", "llama_expand", "densenet")
DIVISIONS: dict[str, dict[str, Any]] = {
    "interleaved": {"strategy": "interleaved"},
    "random": {"strategy": "random", "seed": 3},
    "cluster": {"strategy": "cluster"},
    "uneven": {"shares": (3, 1)},
    "uneven and random": {"shares": (1, 2), "strategy": "random"},
}


def in_double(name: str) -> gs.Program:
    return gs.trace(ZOO[name].build().double(), _double(ZOO[name].inputs()))


def _double(inputs: Any) -> Any:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


def outputs(module: gs.ProgramModule, name: str) -> Tensor:
    with torch.no_grad():
        found = module.eval()(*_double(ZOO[name].inputs()))
    first: Tensor = found[0] if isinstance(found, tuple) else found
    return first


@given(st.integers(1, 200), st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
def test_counts_add_up_and_leave_nobody_out(size: int, shares: list[float]) -> None:
    if size < len(shares):
        with pytest.raises(ValueError, match="units for"):
            counts_of(size, shares)
        return
    counts = counts_of(size, shares)
    assert sum(counts) == size
    assert min(counts) >= 1
    wanted = np.asarray(shares) / np.sum(shares) * size
    if wanted.min() >= 1:
        assert np.abs(counts - wanted).max() < 1


@pytest.mark.parametrize("size", [8, 50, 51, 53])
def test_equal_shares_differ_by_one_unit_and_the_first_are_larger(size: int) -> None:
    assert counts_of(size, (1, 1, 1, 1)) == [part.size for part in np.array_split(np.arange(size), 4)]


@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_every_division_is_exact_and_its_plan_can_be_replayed(name: str, division: str) -> None:
    program = in_double(name)
    part = gs.partition(program, **DIVISIONS[division])
    certificate = part.verify()
    assert certificate.ok
    assert certificate.max_error < 1e-9
    plan = gs.PartitionPlan.from_json(part.plan.to_json())
    again = gs.partition(program, plan=plan)
    assert again.plan == part.plan
    for ours, theirs in zip(part.submodels, again.submodels, strict=True):
        assert torch.equal(outputs(ours, name), outputs(theirs, name))


def test_strategies_deal_out_differently_and_the_same_seed_gives_the_same() -> None:
    program = in_double("gpt")
    plans = {strategy: gs.partition(program, strategy=strategy, seed=1).plan for strategy in STRATEGIES}
    assert len({plan.to_json() for plan in plans.values()}) == len(STRATEGIES)
    for strategy, plan in plans.items():
        assert gs.partition(program, strategy=strategy, seed=1).plan == plan
    assert gs.partition(program, strategy="random", seed=2).plan != plans["random"]


def test_shares_are_kept_on_every_axis() -> None:
    part = gs.partition(
        nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)), torch.randn(2, 4), shares=(3, 1)
    )
    (axis,) = part.plan.axes
    assert axis.counts == (12, 4)
    assert part.k == 2


def test_a_pipeline_takes_the_same_options() -> None:
    program = in_double("lenet")
    found = Pipeline.parse("partition(k=2, shares=(3.0, 1.0), strategy='random', seed=5)")(program)
    part = gs.partition(program, shares=(3, 1), strategy="random", seed=5)
    assert [p.parameter_count() for p in found.items] == list(part.plan.parameter_counts())


def _planted(k: int, shuffle: int) -> nn.Sequential:
    """A net of K blocks that do not touch, with its units in another order."""
    torch.manual_seed(0)
    sizes = (12, 24, 12)
    layers = [
        nn.Linear(5, sizes[0]),
        nn.Linear(sizes[0], sizes[1]),
        nn.Linear(sizes[1], sizes[2]),
        nn.Linear(sizes[2], 3),
    ]
    generator = torch.Generator().manual_seed(shuffle)
    blocks = [torch.arange(size) * k // size for size in sizes]
    blocks = [block[torch.randperm(block.numel(), generator=generator)] for block in blocks]
    with torch.no_grad():
        for layer, before, after in zip(layers[1:3], blocks[:-1], blocks[1:], strict=True):
            layer.weight.mul_(after[:, None] == before[None, :])
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2], nn.Tanh(), layers[3]).double()


@pytest.mark.parametrize("k", [2, 3, 4])
def test_clustering_finds_blocks_that_do_not_touch(k: int) -> None:
    model = _planted(k, shuffle=7)
    example = torch.randn(4, 5, dtype=torch.float64)
    random = gs.partition(model, example, k=k, strategy="random")
    cluster = gs.partition(model, example, k=k, strategy="cluster")
    assert cluster.kept_magnitude() == pytest.approx(1.0, abs=1e-12)
    assert random.kept_magnitude() < 0.7
    # Nothing is lost, so the merge right after the split is the model itself, but for the mean's factor K.
    merged = cluster.merge()
    merged.eval()
    with torch.no_grad():
        bias = model[-1].bias
        assert torch.allclose((merged(example) - bias) * k, model(example) - bias, atol=1e-12)


def test_clustering_by_co_activation_keeps_together_what_is_active_together() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(2, 16), nn.Linear(16, 16)
    with torch.no_grad():  # odd units follow one input, even units the other; weights tell nothing
        first.weight.copy_(torch.eye(2)[torch.arange(16) % 2] * 3)
        first.bias.zero_()
        second.weight.copy_(torch.where(torch.arange(16)[:, None] % 2 == torch.arange(16) % 2, 1.0, 0.0))
        second.bias.zero_()
    model = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(16, 2))
    data = torch.randn(256, 2)
    part = gs.partition(model, data[:4], strategy="cluster", data=data)
    rows = [set((np.asarray(part.plan.state[0].indices(p)[0]) % 2).tolist()) for p in range(2)]
    assert sorted(map(tuple, rows)) == [(0,), (1,)]


def test_clustering_looks_at_weights_that_are_there() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(PartitionError, match="meta device"):
        gs.partition(model, torch.randn(2, 4, device="meta"), strategy="cluster")


@pytest.mark.parametrize("name", ["lenet", "gpt", "llama_expand", "swin", "gru_bidirectional", "unet"])
def test_merging_level_by_level_gives_means_at_every_level(name: str) -> None:
    four = gs.partition(in_double(name), k=4)
    two = four.coarsen(2)
    assert two.verify().ok
    apart = [outputs(submodel, name) for submodel in four.submodels]
    for number, submodel in enumerate(two.submodels):
        mean = (apart[2 * number] + apart[2 * number + 1]) / 2
        assert (outputs(submodel, name) - mean).abs().max() < 1e-12
        assert all(parameter.requires_grad for parameter in submodel.parameters())
    one = two.merge()
    assert (outputs(one, name) - sum(apart) / 4).abs().max() < 1e-12


def test_levels_merge_what_was_trained() -> None:
    four = gs.partition(in_double("lenet"), k=4)
    generator = torch.Generator().manual_seed(0)
    states = []
    for submodel in four.submodels:
        with torch.no_grad():
            for parameter in submodel.parameters():
                parameter.add_(
                    torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.1
                )
        states.append(submodel.state_dict())
    apart = [outputs(submodel, "lenet") for submodel in four.submodels]
    two = four.coarsen(2, states)
    assert (outputs(two.submodels[1], "lenet") - (apart[2] + apart[3]) / 2).abs().max() < 1e-12
    with pytest.raises(PartitionError, match="4 sub-models cannot be merged into 3"):
        four.coarsen(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": (3, 0)}, "shares are"),
        ({"shares": ()}, "shares are"),
        ({"shares": (1, float("nan"))}, "shares are"),
        ({"shares": (1, 2, 3), "k": 2}, "3 shares for K = 2"),
        ({"strategy": "alphabetical"}, "strategy is 'alphabetical'"),
        ({"fit": "8GB", "k": 2}, "fit chooses K"),
        ({"fit": "much"}, "no size of memory"),
        ({"fit": "0GB"}, "no size of memory"),
        ({"fit": "1B"}, "no sub-model fits 1 B"),
    ],
)
def test_bad_options_are_one_sentence(options: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    with pytest.raises(GraphsplitError, match=message):
        gs.partition(model, torch.randn(2, 4), **options)


def test_a_plan_of_another_model_is_refused() -> None:
    plan = gs.partition(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)), torch.randn(2, 4)).plan
    other = nn.Sequential(nn.Linear(4, 18), nn.ReLU(), nn.Linear(18, 2))
    with pytest.raises(PlanError, match="does not belong to this model"):
        gs.partition(other, torch.randn(2, 4), plan=plan)
