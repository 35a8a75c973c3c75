"""Weights of sub-models: slices of the given ones, slices scaled to the smaller fan-in, or fresh ones."""

import math
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import graphsplit as gs
from graphsplit.errors import PartitionError
from laws import model_unchanged
from zoo import ZOO

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = OrderedDict(
        fc1=nn.Linear(6, 32), norm=nn.LayerNorm(32), tanh=nn.Tanh(), fc2=nn.Linear(32, 64), relu=nn.ReLU(),
        fc3=nn.Linear(64, 3),
    )  # fmt: skip
    return nn.Sequential(layers).double()


def states(init: str, k: int = 4, seed: int = 0) -> list[dict[str, Tensor]]:
    return [
        submodel.state_dict() for submodel in gs.partition(model(), X, k=k, init=init, seed=seed).submodels
    ]  # type: ignore[arg-type]


def test_slices_are_the_default() -> None:
    default = [submodel.state_dict() for submodel in gs.partition(model(), X, k=4).submodels]
    full = model().state_dict()
    for part, state in enumerate(states("slice")):
        rows, columns = slice(8 * part, 8 * part + 8), slice(16 * part, 16 * part + 16)
        assert torch.equal(state["fc1.weight"], full["fc1.weight"][rows])
        assert torch.equal(state["norm.weight"], full["norm.weight"][rows])
        assert torch.equal(state["fc2.weight"], full["fc2.weight"][columns, rows])
        assert torch.equal(state["fc3.weight"], full["fc3.weight"][:, columns])
        assert torch.equal(state["fc3.bias"], full["fc3.bias"])
        assert all(torch.equal(value, default[part][name]) for name, value in state.items())


@pytest.mark.parametrize("k", [2, 4])
def test_rescaled_weights_by_hand(k: int) -> None:
    for given, scaled in zip(states("slice", k), states("rescale", k), strict=True):
        # Layers that lost inputs: K times less of them, so sqrt(K) times as large.
        for name in ("fc2.weight", "fc3.weight"):
            torch.testing.assert_close(scaled[name], given[name] * math.sqrt(k), rtol=1e-14, atol=0)
        for name in ("fc1.weight", "fc1.bias", "fc2.bias", "fc3.bias", "norm.weight", "norm.bias"):
            assert torch.equal(scaled[name], given[name]), name


def test_rescaled_weights_keep_the_size_of_activations() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(
        nn.Linear(64, 256, bias=False), nn.Linear(256, 256, bias=False), nn.Linear(256, 8)
    ).double()
    x = torch.randn(64, 64, dtype=torch.float64)
    full = float(layer(x).detach().std())
    spread = {}
    for init in ("slice", "rescale"):
        submodel = gs.partition(layer, x, k=4, init=init).submodels[0]  # type: ignore[arg-type]
        spread[init] = float(submodel(x).detach().std())
    assert spread["slice"] < 0.5 * full
    assert 0.75 * full < spread["rescale"] < 1.33 * full


def test_rescaled_convolutions() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=12),
        nn.Flatten(), nn.Linear(12 * 36, 5),
    )  # fmt: skip
    image = torch.randn(2, 3, 8, 8)
    given = gs.partition(net, image, k=2).submodels[1].state_dict()
    scaled = gs.partition(net, image, k=2, init="rescale").submodels[1].state_dict()
    factors = {name: float((scaled[name] / given[name]).mean()) for name in given if name.endswith("weight")}
    expected = {"0.weight": 1.0, "2.weight": math.sqrt(2), "4.weight": 1.0, "6.weight": math.sqrt(2)}
    assert factors == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------
# Fresh


def test_fresh_weights_follow_the_seed() -> None:
    once, again, other = states("fresh"), states("fresh"), states("fresh", seed=1)
    given = model().state_dict()
    for part in range(4):
        for name, value in once[part].items():
            assert value.shape == states("slice")[part][name].shape
            assert torch.equal(value, again[part][name]), name
        for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "fc3.weight", "fc3.bias"):
            assert not torch.equal(once[part][name], other[part][name]), name
            assert not torch.isin(once[part][name], given[name]).any(), name
            for second in range(part):
                assert not torch.equal(once[part][name], once[second][name]), (
                    "every sub-model has its own seed"
                )


def test_fresh_weights_have_the_bounds_of_their_fan_in() -> None:
    for state in states("fresh"):
        for name, fan_in in [("fc1", 6), ("fc2", 8), ("fc3", 16)]:
            bound = 1 / math.sqrt(fan_in)
            weight = state[f"{name}.weight"]
            assert 0.7 * bound < float(weight.abs().max()) <= bound
            assert float(state[f"{name}.bias"].abs().max()) <= bound
            if weight.numel() >= 128:
                assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.2)
            assert abs(float(weight.mean())) < 0.35 * bound
        assert torch.equal(state["norm.weight"], torch.ones(8, dtype=torch.float64))
        assert torch.equal(state["norm.bias"], torch.zeros(8, dtype=torch.float64))


def test_fresh_weights_do_not_move_the_random_state() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    part = gs.partition(model(), X, k=2, init="fresh")
    torch.manual_seed(5)
    assert part.submodels
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["resnet_basic", "gpt", "lstm", "frozen_backbone", "hub_bert_mlm"])
@pytest.mark.parametrize("init", ["rescale", "fresh"])
def test_models_with_new_weights(name: str, init: str) -> None:
    entry = ZOO[name]
    net = entry.build()
    inputs = entry.inputs()
    with model_unchanged(net):
        part = gs.partition(net, inputs, k=2, init=init)  # type: ignore[arg-type]
        submodels = part.submodels
    assert part.verify(submodels).ok
    flags = {key: parameter.requires_grad for key, parameter in net.named_parameters()}
    for submodel in submodels:
        assert {key: parameter.requires_grad for key, parameter in submodel.named_parameters()} == flags
        assert all(bool(torch.isfinite(value).all()) for value in submodel.state_dict().values())
        assert len(list(submodel.parameters())) == len(list(net.parameters())), "tied parameters stay tied"


def test_fresh_weights_of_tied_layers_are_drawn_once() -> None:
    entry = ZOO["gpt"]
    for submodel in gs.partition(entry.build(), entry.inputs(), k=2, init="fresh").submodels:
        state = submodel.state_dict()
        assert torch.equal(state["lm_head.weight"], state["transformer.wte.weight"])


@pytest.mark.parametrize("init", ["slice", "rescale", "fresh"])
def test_types_are_kept(init: str) -> None:
    part = gs.partition(model().bfloat16(), X.bfloat16(), k=2, init=init)  # type: ignore[arg-type]
    assert {p.dtype for submodel in part.submodels for p in submodel.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("init", ["slice", "rescale", "fresh"])
def test_models_without_memory(init: str) -> None:
    part = gs.partition(model().to("meta"), X.to("meta"), k=2, init=init)  # type: ignore[arg-type]
    assert all(p.is_meta for submodel in part.submodels for p in submodel.parameters())
    assert part.verify().ok


# ---------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("init", ["", "random", None, "Slice"])
def test_unknown_initialization(init: str) -> None:
    with pytest.raises(PartitionError, match="expected 'slice', 'rescale' or 'fresh'"):
        gs.partition(model(), X, k=2, init=init)  # type: ignore[arg-type]


def with_nan(place: Callable[[nn.Module], Tensor]) -> nn.Module:
    net = model()
    with torch.no_grad():
        place(net).view(-1)[3] = float("nan")
    return net


@pytest.mark.parametrize("init", ["slice", "rescale"])
def test_weights_that_are_not_numbers_are_refused(init: str) -> None:
    net = with_nan(lambda m: m.fc2.weight)
    with pytest.raises(PartitionError, match=r"the parameter fc2\.weight holds NaN") as caught:
        gs.partition(net, X, k=2, init=init)  # type: ignore[arg-type]
    assert caught.value.hint and "fresh" in caught.value.hint


def test_fresh_weights_replace_what_is_not_a_number() -> None:
    for place in (lambda m: m.fc2.weight, lambda m: m.norm.weight):
        part = gs.partition(with_nan(place), X, k=2, init="fresh")
        for submodel in part.submodels:
            assert bool(torch.isfinite(submodel(X)).all())
