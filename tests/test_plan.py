"""The plan as data: readable, enough by itself to slice and merge weights and optimizer states, and strict."""

import copy
import functools
import json
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import graphsplit as gs
from graphsplit.errors import PlanError
from graphsplit.plan import PartitionPlan, decode_ranges, encode_ranges
from laws import random_values, step, wide
from zoo import ZOO, call_of, traced

MODELS = [
    "lenet", "mlp_batchnorm_dropout", "resnet_basic", "resnext", "shufflenet_v2", "densenet", "unet", "convnext",
    "swin", "gpt", "llama_expand", "lstm_stacked", "running_statistic", "mask_buffers", "prelu_one_slope",
    "tied_autoencoder", "hub_bert_mlm", "hub_t5",
]  # fmt: skip


@functools.cache
def partition_of(name: str, k: int = 2) -> gs.Partition:
    return gs.partition(traced(name), k=k)


def read_again(plan: PartitionPlan) -> PartitionPlan:
    return PartitionPlan.from_json(plan.to_json())


def small_mlp() -> nn.Sequential:
    torch.manual_seed(0)
    layers = OrderedDict(
        fc1=nn.Linear(4, 6), elu=nn.ELU(), fc2=nn.Linear(6, 8), tanh=nn.Tanh(), fc3=nn.Linear(8, 3)
    )
    return nn.Sequential(layers).double()


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.fixture
def part() -> gs.Partition:
    return gs.partition(small_mlp(), X, k=2)


# ---------------------------------------------------------------------------------------------------------
# Text


@pytest.mark.parametrize("name", MODELS)
def test_json_both_ways(name: str) -> None:
    plan = partition_of(name).plan
    again = read_again(plan)
    assert again == plan
    assert hash(again) == hash(plan)
    assert again.to_json() == plan.to_json()
    assert json.loads(plan.to_json())["format"] == "graphsplit-plan/1"


def test_json_is_readable(part: gs.Partition) -> None:
    lines = part.plan.to_json().splitlines()
    assert [line.strip().rstrip(",") for line in lines if '"merge"' in line] == [
        '"fc1.weight": {"kind": "parameter", "shape": [6, 4], "cuts": [["0:3", "3:6"], null], "merge": "place"}',
        '"fc1.bias": {"kind": "parameter", "shape": [6], "cuts": [["0:3", "3:6"]], "merge": "place"}',
        '"fc2.weight": {"kind": "parameter", "shape": [8, 6], "cuts": [["0:4", "4:8"], ["0:3", "3:6"]],'
        ' "merge": "place"}',
        '"fc2.bias": {"kind": "parameter", "shape": [8], "cuts": [["0:4", "4:8"]], "merge": "place"}',
        '"fc3.weight": {"kind": "parameter", "shape": [3, 8], "cuts": [null, ["0:4", "4:8"]], "merge": "average"}',
        '"fc3.bias": {"kind": "parameter", "shape": [3], "cuts": [null], "merge": "average"}',
    ]
    assert [(axis.name, axis.size, axis.counts) for axis in part.plan.axes] == [
        ("fc1.weight[0]", 6, (3, 3)),
        ("fc2.weight[0]", 8, (4, 4)),
    ]
    assert part.plan.axes[0].places == ("fc1.weight[0]", "fc1.bias[0]", "fc2.weight[1]")


def test_plans_differ(part: gs.Partition) -> None:
    assert part.plan == gs.partition(small_mlp(), X, k=2).plan
    assert part.plan != gs.partition(small_mlp(), X, k=3).plan
    assert part.plan != partition_of("lenet").plan


@given(st.lists(st.integers(0, 40), unique=True))
def test_ranges_both_ways(indices: list[int]) -> None:
    array = np.array(sorted(indices), np.int64)
    assert np.array_equal(decode_ranges(encode_ranges(array)), array)


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ([], ""),
        ([4], "4:5"),
        ([0, 1, 2, 3], "0:4"),
        ([0, 1, 2, 10, 11, 12], "0:3,10:13"),
        ([1, 3, 5], "1:6:2"),
        ([0, 4], "0:5:4"),
    ],
)
def test_ranges_are_short(indices: list[int], text: str) -> None:
    assert encode_ranges(np.array(indices, np.int64)) == text
    assert decode_ranges(text).tolist() == indices


@pytest.mark.parametrize("text", ["3", "a:b", "0:4:1:1", "0:4;6:8"])
def test_what_are_no_ranges(text: str) -> None:
    with pytest.raises(PlanError):
        decode_ranges(text)


# ---------------------------------------------------------------------------------------------------------
# State dicts, by hand and for many models


def test_slices_by_hand(part: gs.Partition) -> None:
    full = small_mlp().state_dict()
    plan = read_again(part.plan)
    first, second = (plan.slice_state_dict(full, i) for i in range(2))
    assert list(first) == list(full)
    assert torch.equal(first["fc1.weight"], full["fc1.weight"][:3])
    assert torch.equal(second["fc1.bias"], full["fc1.bias"][3:])
    assert torch.equal(first["fc2.weight"], full["fc2.weight"][:4, :3])
    assert torch.equal(second["fc2.weight"], full["fc2.weight"][4:, 3:])
    assert torch.equal(second["fc3.weight"], full["fc3.weight"][:, 4:])
    assert torch.equal(first["fc3.bias"], full["fc3.bias"])
    first["fc1.weight"].zero_()
    assert not (full["fc1.weight"] == 0).any(), "slices are copies"


def test_merge_by_hand(part: gs.Partition) -> None:
    plan = read_again(part.plan)
    values = [plan.slice_state_dict(small_mlp().state_dict(), i) for i in range(2)]
    a, b = ({name: torch.randn_like(tensor) for name, tensor in state.items()} for state in values)
    merged = plan.merge_state_dicts([a, b])
    assert torch.equal(merged["fc1.weight"], torch.cat([a["fc1.weight"], b["fc1.weight"]]))
    assert torch.equal(merged["fc2.weight"], torch.block_diag(a["fc2.weight"], b["fc2.weight"]))
    assert torch.equal(merged["fc2.bias"], torch.cat([a["fc2.bias"], b["fc2.bias"]]))
    # Equation (1): weights of the output layer are divided by K, biases averaged.
    assert torch.equal(merged["fc3.weight"], torch.cat([a["fc3.weight"], b["fc3.weight"]], 1) / 2)
    assert torch.equal(merged["fc3.bias"], (a["fc3.bias"] + b["fc3.bias"]) / 2)


def test_uneven_widths_by_hand() -> None:
    model = small_mlp()
    plan = read_again(gs.partition(model, X, k=4).plan)
    full = model.state_dict()
    assert [plan.slice_state_dict(full, i)["fc1.weight"].shape[0] for i in range(4)] == [2, 2, 1, 1]
    merged = plan.merge_state_dicts([plan.slice_state_dict(full, i) for i in range(4)])
    assert torch.equal(merged["fc1.weight"], full["fc1.weight"])
    assert torch.equal(merged["fc2.weight"][4, 4], full["fc2.weight"][4, 4])
    assert int((merged["fc2.weight"] != 0).sum()) == 4 * 2 + 2 * 2


def kept(plan: PartitionPlan, name: str) -> Tensor:
    """How many sub-models hold each entry of a tensor."""
    state = plan.names(persistent=False)[name]
    counts = torch.zeros(state.shape, dtype=torch.int64)
    for part in range(plan.k):
        mask = torch.ones(state.shape, dtype=torch.bool)
        for dim, index in enumerate(state.indices(part)):
            if index is not None:
                here = torch.zeros(state.shape[dim], dtype=torch.bool)
                here[torch.from_numpy(index)] = True
                mask &= here.reshape([-1 if d == dim else 1 for d in range(len(state.shape))])
        counts += mask
    return counts


class Positions(nn.Module):
    """A table of positions that is longer than the example."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tok, self.f, self.out = nn.Embedding(10, 8), nn.Linear(8, 12), nn.Linear(12, 3)
        self.pos = nn.Parameter(torch.randn(1, 16, 8))

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.relu(self.f(self.tok(ids) + self.pos[:, : ids.shape[1]])).mean(1))


class Columns(nn.Module):
    """Uses two parts of a weight, and leaves the rest of it."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.out = nn.Linear(8, 12), nn.Parameter(torch.randn(3, 20))

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x).relu()
        return h[:, :6] @ self.out[:, :6].t() + h[:, 6:] @ self.out[:, 6:12].t()


@pytest.mark.parametrize("length", [4, 8, 16])
def test_what_the_example_does_not_reach_is_kept_whole(length: int) -> None:
    model, ids = Positions(), torch.randint(10, (2, 4), generator=torch.Generator().manual_seed(0))
    part = gs.partition(model, ids, k=2, emit="module")
    assert part.verify().ok
    first, second = part.submodels
    merged = Positions()
    merged.load_state_dict(part.merge(duplicate=False).state_dict())
    longer = torch.randint(10, (2, length), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(merged(longer), (first(longer) + second(longer)) / 2)
    assert torch.equal(torch.cat([first.pos, second.pos], dim=2), model.pos), "no row is lost"


def test_columns_that_nothing_reads_are_kept_whole() -> None:
    part = gs.partition(Columns(), torch.randn(2, 8), k=2)
    assert part.verify().ok
    plans = {plan.name: plan for plan in part.plan.state}
    assert plans["out"].local_shape(1) == (3, 6 + 8)


@pytest.mark.parametrize(("name", "k"), [(name, k) for name in MODELS for k in ZOO[name].k])
def test_merge_of_slices(name: str, k: int) -> None:
    part = partition_of(name, k)
    plan = read_again(part.plan)
    values = random_values(part.program)
    full = {entry: values[state.name] for entry, state in plan.names().items()}
    slices = [plan.slice_state_dict(full, i) for i in range(k)]
    merged = plan.merge_state_dicts(slices)
    assert merged.keys() == full.keys()
    for entry, state in plan.names().items():
        held = kept(plan, entry)
        factor = state.scale / (1 if state.merge != "average" else k)
        if state.merge == "average":  # what all hold is averaged, what one holds is divided by K
            expected = full[entry] * held / k
        else:
            expected = torch.where(held > 0, full[entry] * factor, torch.zeros_like(full[entry]))
        if full[entry].dtype.is_floating_point:
            torch.testing.assert_close(merged[entry], expected, rtol=1e-14, atol=0)
        else:
            assert torch.equal(merged[entry], full[entry])
        if state.merge == "place" and state.scale == 1.0:
            for i in range(k):
                assert torch.equal(state.slice(merged[entry], i), slices[i][entry])


def test_cross_weights_are_zero() -> None:
    part = partition_of("gpt")
    merged = part.plan.merge_state_dicts([submodel.state_dict() for submodel in part.submodels])
    for layer in range(2):
        for name in ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.0.weight", "mlp.3.weight"):
            entry = f"transformer.h.{layer}.{name}"
            held = kept(part.plan, entry)
            assert int((held == 0).sum()) * 2 == held.numel()
            assert bool((merged[entry][held == 0] == 0).all())
            assert bool((merged[entry][held == 1] != 0).all())


@pytest.mark.parametrize("name", MODELS)
def test_plan_slices_as_the_partition_does(name: str) -> None:
    part = partition_of(name)
    plan = read_again(part.plan)
    full = ZOO[name].build().state_dict()
    for i, submodel in enumerate(part.submodels):
        mine = plan.slice_state_dict(full, i)
        theirs = submodel.state_dict()
        assert mine.keys() == theirs.keys()
        for entry, value in mine.items():
            assert torch.equal(value, theirs[entry]), entry
        submodel.load_state_dict(mine, strict=True)


@pytest.mark.parametrize("duplicate", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_plan_merges_as_the_partition_does(name: str, duplicate: bool) -> None:
    part = partition_of(name)
    plan = read_again(part.plan)
    states = [submodel.state_dict() for submodel in part.submodels]
    merged = plan.merge_state_dicts(states, duplicate=duplicate)
    module = part.merge(states, duplicate=duplicate)
    theirs = module.state_dict()
    assert merged.keys() == theirs.keys()
    for entry, value in merged.items():
        assert torch.equal(value, theirs[entry]), entry
    module.load_state_dict(merged, strict=True)


@pytest.mark.parametrize("name", MODELS)
def test_plain_merge_fits_the_own_class_of_the_user(name: str) -> None:
    part = partition_of(name)
    merged = read_again(part.plan).merge_state_dicts([submodel.state_dict() for submodel in part.submodels])
    model = ZOO[name].build()
    model.load_state_dict(merged, strict=True)
    module = part.merge(duplicate=False)
    call = call_of(name)
    expected, found = step(model.eval(), call), step(module.eval(), call)
    for a, b in zip(_flat(found.outputs), _flat(expected.outputs), strict=True):
        assert torch.equal(a, b)


def _flat(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def test_counts_and_statistics_are_merged() -> None:
    part = partition_of("mlp_batchnorm_dropout")
    submodels = [copy.deepcopy(submodel) for submodel in part.submodels]
    for steps, submodel in enumerate(submodels, 1):
        for _ in range(steps):
            submodel(*ZOO["mlp_batchnorm_dropout"].inputs())
    states = [submodel.state_dict() for submodel in submodels]
    merged = part.plan.merge_state_dicts(states)
    running = [state["bn1.running_mean"] for state in states]
    assert torch.equal(merged["bn1.running_mean"], torch.cat(running))
    assert int(merged["bn1.num_batches_tracked"]) == max(int(s["bn1.num_batches_tracked"]) for s in states)


# ---------------------------------------------------------------------------------------------------------
# Bad input


def test_state_dicts_that_do_not_fit(part: gs.Partition) -> None:
    plan, full = part.plan, small_mlp().state_dict()
    states = [plan.slice_state_dict(full, i) for i in range(2)]
    with pytest.raises(PlanError, match="1 state dicts for a plan of 2 sub-models"):
        plan.merge_state_dicts(states[:1])
    with pytest.raises(PlanError, match="3 state dicts for a plan of 2 sub-models"):
        plan.merge_state_dicts([*states, states[0]])
    lacking = {name: value for name, value in states[1].items() if name != "fc2.bias"}
    with pytest.raises(PlanError, match=r"lack fc2\.bias"):
        plan.merge_state_dicts([states[0], lacking])
    with pytest.raises(
        PlanError, match=r"fc1\.weight of sub-model 1 has shape \(6, 4\), the plan says \(3, 4\)"
    ):
        plan.merge_state_dicts([states[0], full])
    with pytest.raises(
        PlanError, match=r"the weights of sub-model 0 hold fc9\.weight, which the plan does not know"
    ):
        plan.merge_state_dicts([states[0] | {"fc9.weight": torch.zeros(1)}, states[1]])
    with pytest.raises(PlanError, match=r"fc1\.bias is a str, expected a tensor"):
        plan.merge_state_dicts([states[0] | {"fc1.bias": "zeros"}, states[1]])  # type: ignore[dict-item]


@pytest.mark.parametrize("name", ["prelu_one_slope", "running_statistic", "gpt"])
@pytest.mark.parametrize("duplicate", [False, True])
def test_every_tensor_of_another_shape_is_refused(name: str, duplicate: bool) -> None:
    plan = partition_of(name).plan
    full = ZOO[name].build().state_dict()
    states = [plan.slice_state_dict(full, i) for i in range(2)]
    for entry, state in plan.names().items():
        if entry != state.name:
            continue
        wrong = states[1] | {entry: torch.zeros((*states[1][entry].shape, 3))}
        with pytest.raises(PlanError, match="has shape"):
            plan.merge_state_dicts([states[0], wrong], duplicate=duplicate)


def test_full_weights_that_do_not_fit(part: gs.Partition) -> None:
    plan, full = part.plan, small_mlp().state_dict()
    for number in (2, -1):
        with pytest.raises(PlanError, match=f"there is no sub-model {number} of 2"):
            plan.slice_state_dict(full, number)
    with pytest.raises(PlanError, match=r"lack fc3\.bias"):
        plan.slice_state_dict({name: value for name, value in full.items() if name != "fc3.bias"}, 0)
    with pytest.raises(PlanError, match=r"fc1\.bias has shape \(7,\), the plan says \(6,\)"):
        plan.slice_state_dict(full | {"fc1.bias": torch.zeros(7)}, 0)


def test_partition_refuses_what_does_not_fit(part: gs.Partition) -> None:
    submodels = part.submodels
    with pytest.raises(PlanError, match="3 sub-models for a plan of 2"):
        part.merge([*submodels, submodels[0]])
    with pytest.raises(PlanError, match=r"fc1\.weight of sub-model 1 has shape"):
        part.merge([submodels[0], small_mlp()])
    with pytest.raises(PlanError, match=r"sub-model 1 lacks fc1\.weight"):
        part.merge([submodels[0], nn.Linear(4, 3)])
    with pytest.raises(PlanError, match="the plan does not belong to this model"):
        gs.partition(small_mlp(), X, k=2, plan=partition_of("lenet").plan)
    with pytest.raises(PlanError, match="the plan does not belong to this model"):
        wider = nn.Sequential(OrderedDict(fc1=nn.Linear(4, 8), relu=nn.ReLU(), fc2=nn.Linear(8, 3))).double()
        gs.partition(wider, X, k=2, plan=part.plan)
    assert gs.partition(small_mlp(), X, plan=read_again(part.plan)).plan == part.plan


def damaged(change: Callable[[dict[str, Any]], Any]) -> str:
    data = json.loads(gs.partition(small_mlp(), X, k=2).plan.to_json())
    change(data)
    return json.dumps(data)


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no k": lambda d: d.pop("k"),
    "k is a word": lambda d: d.update(k="two"),
    "k is zero": lambda d: d.update(k=0),
    "k is negative": lambda d: d.update(k=-2),
    "k is another": lambda d: d.update(k=3),
    "no model": lambda d: d.pop("model"),
    "no axes": lambda d: d.pop("axes"),
    "an axis without units": lambda d: d["axes"][0].pop("units"),
    "axes are a number": lambda d: d.update(axes=3),
    "counts of another k": lambda d: d["axes"][0].update(counts=[2, 2, 2]),
    "no state": lambda d: d.pop("state"),
    "state is a list": lambda d: d.update(state=[]),
    "a tensor without shape": lambda d: d["state"]["fc1.weight"].pop("shape"),
    "a shape of words": lambda d: d["state"]["fc1.weight"].update(shape=["a", 4]),
    "a negative size": lambda d: d["state"]["fc1.weight"].update(shape=[-6, 4]),
    "an unknown merge": lambda d: d["state"]["fc1.weight"].update(merge="guess"),
    "an unknown kind": lambda d: d["state"]["fc1.weight"].update(kind="guess"),
    "fewer cuts than dimensions": lambda d: d["state"]["fc1.weight"].update(cuts=[["0:3", "3:6"]]),
    "a cut for one sub-model": lambda d: d["state"]["fc1.weight"].update(cuts=[["0:3"], None]),
    "a cut that is no range": lambda d: d["state"]["fc1.weight"].update(cuts=[["0:3", "three"], None]),
    "a cut that is a number": lambda d: d["state"]["fc1.weight"].update(cuts=[[0, 3], None]),
    "a cut beyond the tensor": lambda d: d["state"]["fc1.weight"].update(cuts=[["0:3", "3:9"], None]),
    "a cut with negative indices": lambda d: d["state"]["fc1.weight"].update(cuts=[["0:3", "-3:0"], None]),
    "a step of zero": lambda d: d["state"]["fc1.weight"].update(cuts=[["0:3", "3:6:0"], None]),
    "a scale that is a word": lambda d: d["state"]["fc1.weight"].update(scale="half"),
    "aliases that are a number": lambda d: d["state"]["fc1.weight"].update(aliases=3),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_plans_are_refused(damage: str) -> None:
    with pytest.raises(PlanError):
        PartitionPlan.from_json(damaged(DAMAGES[damage]))


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", "3", '"plan"', "{}", "plan", "\x00", '{"format": null}']
)
def test_what_is_no_plan(text: str) -> None:
    with pytest.raises(PlanError):
        PartitionPlan.from_json(text)


def test_truncated_plans_are_refused(part: gs.Partition) -> None:
    text = part.plan.to_json().rstrip()
    for length in range(0, len(text), 37):
        with pytest.raises(PlanError, match="no JSON"):
            PartitionPlan.from_json(text[:length])


def test_newer_plans_are_refused() -> None:
    with pytest.raises(PlanError, match=r"not a plan of format graphsplit-plan/1: graphsplit-plan/2 .*newer"):
        PartitionPlan.from_json(damaged(lambda d: d.update(format="graphsplit-plan/2")))


# ---------------------------------------------------------------------------------------------------------
# Optimizers

OPTIMIZERS: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], set[str]]] = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), {"momentum_buffer"}),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.1), {"exp_avg", "exp_avg_sq", "step"}),
    "adamw": (
        lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
        {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"},
    ),
    "rmsprop": (
        lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9),
        {"square_avg", "momentum_buffer", "step"},
    ),
}


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    loss = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (module(X) - Y).square().mean()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def merged_after_training(
    part: gs.Partition, kind: str, steps: tuple[int, ...] = (3, 2), duplicate: bool = True
) -> tuple[list[dict[str, dict[str, Any]]], nn.Module, torch.optim.Optimizer]:
    """Optimizer states of the trained sub-models by name, and the merged model with its optimizer."""
    make, _ = OPTIMIZERS[kind]
    submodels = part.submodels
    optimizers = [make(submodel.parameters()) for submodel in submodels]
    for submodel, optimizer, count in zip(submodels, optimizers, steps, strict=True):
        train(submodel, optimizer, count)
    merged = part.merge(submodels, duplicate=duplicate)
    optimizer = make(merged.parameters())
    part.plan.merge_optimizer_states(optimizers, submodels, merged, optimizer)
    states = [
        {name: one.state[parameter] for name, parameter in submodel.named_parameters()}
        for one, submodel in zip(optimizers, submodels, strict=True)
    ]
    return states, merged, optimizer


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizer_states_by_hand(part: gs.Partition, kind: str) -> None:
    (a, b), merged, optimizer = merged_after_training(part, kind)
    moments = OPTIMIZERS[kind][1] - {"step"}
    for name, parameter in merged.named_parameters():
        assert set(optimizer.state[parameter]) == OPTIMIZERS[kind][1], name
    for key in moments:
        found = {name: optimizer.state[parameter][key] for name, parameter in merged.named_parameters()}
        first = {name: state[key] for name, state in a.items()}
        second = {name: state[key] for name, state in b.items()}
        assert all(bool(state.any()) for state in first.values()), "training left something"
        for name in ("fc1.weight", "fc1.bias", "fc2.bias"):
            assert torch.equal(found[name], torch.cat([first[name], second[name]]))
        assert torch.equal(found["fc2.weight"], torch.block_diag(first["fc2.weight"], second["fc2.weight"]))
        joined = torch.cat([first["fc3.weight"], second["fc3.weight"]], 1)
        assert torch.equal(found["fc3.weight"], joined / 2)
        assert torch.equal(found["fc3.bias"], (first["fc3.bias"] + second["fc3.bias"]) / 2)
    if "step" in OPTIMIZERS[kind][1]:
        assert {float(optimizer.state[parameter]["step"]) for parameter in merged.parameters()} == {3.0}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_after_a_merge(part: gs.Partition, kind: str) -> None:
    _, merged, optimizer = merged_after_training(part, kind)
    before = merged.fc2.weight.detach().clone()
    first = train(merged, optimizer, 1)
    assert bool((merged.fc2.weight[:4, 3:] != 0).all()), "cross weights train"
    assert not torch.equal(merged.fc2.weight, before)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    assert train(merged, optimizer, 30) < first
    optimizer.load_state_dict(optimizer.state_dict())


def test_merged_optimizer_owns_its_state(part: gs.Partition) -> None:
    (a, _), merged, optimizer = merged_after_training(part, "adam")
    before = a["fc1.weight"]["exp_avg"].clone()
    train(merged, optimizer, 2)
    assert torch.equal(a["fc1.weight"]["exp_avg"], before)


class OwnScalars(nn.Module):
    """Parameters of every sub-model's own: a slope, a scalar, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1 = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.slope = nn.PReLU()
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.fc2 = nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.slope(self.norm(self.fc1(x)))) * self.temperature


@pytest.mark.parametrize("duplicate", [True, False])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizer_states_of_parameters_that_are_stacked(kind: str, duplicate: bool) -> None:
    part = gs.partition(OwnScalars(), X, k=2)
    stacked = {state.name for state in part.plan.state if state.merge == "stack"}
    assert {"slope.weight", "temperature"} <= stacked
    (a, b), merged, optimizer = merged_after_training(part, kind, duplicate=duplicate)
    for name, parameter in merged.named_parameters():
        for key, value in optimizer.state[parameter].items():
            if key == "step":
                assert value.numel() == 1 and float(value) == 3.0, f"{key} of {name}"
            else:
                assert value.shape == parameter.shape, f"{key} of {name}"
            if name in ("slope.weight", "temperature") and key != "step":
                both = torch.stack([a[name][key], b[name][key]])
                assert torch.equal(value, both if duplicate else both.mean(0)), f"{key} of {name}"
    train(merged, optimizer, 2)


def test_parameters_without_optimizer_state_get_none(part: gs.Partition) -> None:
    make, _ = OPTIMIZERS["adam"]
    submodels = part.submodels
    for submodel in submodels:
        submodel.fc1.weight.requires_grad_(False)
    optimizers = [make([p for p in submodel.parameters() if p.requires_grad]) for submodel in submodels]
    for submodel, optimizer in zip(submodels, optimizers, strict=True):
        train(submodel, optimizer, 1)
    merged = part.merge(submodels)
    merged_optimizer = make(merged.parameters())
    part.plan.merge_optimizer_states(optimizers, submodels, merged, merged_optimizer)
    assert not merged_optimizer.state[merged.fc1.weight]
    assert merged_optimizer.state[merged.fc2.weight]
    train(merged, merged_optimizer, 1)


@pytest.mark.parametrize("name", ["resnet_basic", "gpt", "lstm", "hub_bert_mlm"])
def test_optimizer_states_of_models(name: str) -> None:
    part = partition_of(name)
    call = call_of(name)
    submodels = [copy.deepcopy(submodel) for submodel in part.submodels]
    optimizers = [torch.optim.AdamW(submodel.parameters()) for submodel in submodels]
    for submodel, optimizer in zip(submodels, optimizers, strict=True):
        step(submodel, call)
        optimizer.step()
    merged = part.merge(submodels)
    optimizer = torch.optim.AdamW(merged.parameters())
    part.plan.merge_optimizer_states(optimizers, submodels, merged, optimizer)
    plans = part.plan.names()
    for entry, parameter in merged.named_parameters():
        moment = optimizer.state[parameter]["exp_avg"]
        assert moment.shape == parameter.shape
        if plans[entry].merge == "place" and plans[entry].scale == 1.0:
            for i, submodel in enumerate(submodels):
                own = optimizers[i].state[submodel.get_parameter(entry)]["exp_avg"]
                assert torch.equal(plans[entry].slice(moment, i), own), entry
    optimizer.zero_grad()
    step(merged, call)
    optimizer.step()


def test_optimizers_that_do_not_fit(part: gs.Partition) -> None:
    submodels = part.submodels
    optimizers = [torch.optim.Adam(submodel.parameters()) for submodel in submodels]
    merged = part.merge()
    optimizer = torch.optim.Adam(merged.parameters())
    with pytest.raises(PlanError, match="1 optimizers and 2 sub-models for K = 2"):
        part.plan.merge_optimizer_states(optimizers[:1], submodels, merged, optimizer)
    foreign = nn.Linear(4, 3).double()
    with pytest.raises(PlanError, match="the plan does not know the parameter weight"):
        part.plan.merge_optimizer_states(
            optimizers, submodels, foreign, torch.optim.Adam(foreign.parameters())
        )
    with pytest.raises(PlanError, match=r"the plan does not know the parameter fc1\.weight"):
        part.plan.merge_optimizer_states(optimizers, [foreign, foreign], merged, optimizer)


def test_types_are_kept() -> None:
    part = partition_of("lenet")
    full = {name: tensor.bfloat16() for name, tensor in ZOO["lenet"].build().state_dict().items()}
    slices = [part.plan.slice_state_dict(full, i) for i in range(2)]
    merged = part.plan.merge_state_dicts(slices)
    assert {tensor.dtype for tensor in (*slices[0].values(), *merged.values())} == {torch.bfloat16}
    assert torch.equal(merged["conv1.weight"], full["conv1.weight"])
    assert wide(full["conv1.weight"]).dtype == torch.float64
