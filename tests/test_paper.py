"""The examples of the partition paper: published sizes, exact merges, and schedules that learn."""

import pytest
import torch

import graphsplit as gs
from laws import largest_difference, script


def test_cifar10_network_has_the_published_size_and_divides() -> None:
    example = script("paper_cifar10")
    model = example.network()
    assert sum(p.numel() for p in model.parameters()) == 2_112_970
    part = gs.partition(model, example.example_inputs, k=2)
    assert part.plan.full_parameter_count() == 2_112_970
    assert part.plan.parameter_counts() == (533_226, 533_226)
    assert not part.analysis.kept_whole
    assert part.verify().ok


def test_cifar10_merge_has_the_normalisation_twice() -> None:
    example = script("paper_cifar10")
    part = gs.partition(example.network(), example.example_inputs, k=2, init="fresh")
    pools = [
        sum("avg_pool3d" in str(node.target) for node in module.graph.nodes)
        for module in (part.submodels[0], part.merge(), part.merge(duplicate=False))
    ]
    assert pools == [2, 4, 2]


def test_locally_connected_layer_is_a_convolution_where_its_filters_are_equal() -> None:
    layer = script("paper_cifar10").LocallyConnected(3, 4, 6).double()
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weight.reshape(4, 3, 9, 1, 1).expand_as(layer.weight))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert largest_difference([layer(x)], [torch.nn.functional.conv2d(x, weight, padding=1)]) < 1e-12


@pytest.mark.parametrize(("k", "parameters"), [(2, 109_295), (5, 18_224), (10, 4_867)])
def test_mnist_network_has_the_published_sizes(k: int, parameters: int) -> None:
    example = script("paper_mnist")
    model = example.lenet()
    assert sum(p.numel() for p in model.parameters()) == 431_080
    plan = gs.partition(model, example.example_inputs, k=k).plan
    assert plan.parameter_counts() == (parameters,) * k


@pytest.mark.slow
def test_mnist_example_learns() -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra 'data')")
    history = script("paper_mnist").main(["--epochs", "4", "--merge-at", "2"])
    merged = history.of(None)
    assert merged[-1].test_error is not None and merged[-1].test_error < 0.2
    assert merged[-1].learning_rate < history.of(0)[0].learning_rate < 0.01


@pytest.mark.slow
def test_cifar10_example_runs() -> None:
    history = script("paper_cifar10").main([])
    assert [epoch.part for epoch in history.epochs] == [0, 1, None]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "width"), [("char_lstm", 32), ("small_gpt", 32)])
def test_language_models_learn(name: str, width: int) -> None:
    arguments = ["--characters", "30000", "--width", str(width), "--epochs", "3", "--merge-at", "1"]
    history = script(name).main(arguments)
    losses = [epoch.test_loss for epoch in (*history.of(0), *history.of(None))]
    assert losses[0] is not None and losses[-1] is not None
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet", "lstm", "gpt"])
def test_groups_learn_by_local_critics(model: str) -> None:
    history = script("local_critics").main(
        ["--model", model, "--epochs", "2", "--characters", "20000", "-n", "2"]
    )
    assert all(last < first for first, last in zip(history[0].losses, history[-1].losses, strict=True))


def test_halves_learn_on_synthetic_labels() -> None:
    found = script("synthetic_labels").main(["--epochs", "4", "--recovery", "1"])
    assert found["joined"] < 0.5 and found["recovered"] < 0.2
