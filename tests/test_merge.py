"""Merging: K sub-models that were never one model, put together exactly, or in the original architecture."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphsplit as gs
from graphsplit import plan as plan_module
from graphsplit.analysis.kinds import Kind
from graphsplit.errors import PartitionError
from graphsplit.program import op_name
from graphsplit.report import model_report
from laws import largest_difference, owned, step, tensors, wide
from zoo import traced

BOUND = 1e-9


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Tied(nn.Module):
    """A language model whose output layer is its embedding, with or without a norm before it."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.body = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12) if norm else nn.Identity()
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(self.norm(x + torch.tanh(self.body(x))))


class ChannelSoftmax(nn.Module):
    """Features weighed by a softmax over themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 12)
        self.fc2 = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * F.softmax(x, dim=-1))


class Scaled(nn.Module):
    """Learned numbers that multiply, before and behind the layer that sums up."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 12)
        self.alpha = nn.Parameter(torch.tensor(0.7))
        self.fc2 = nn.Linear(12, 4)
        self.temperature = nn.Parameter(torch.tensor([1.5]))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.fc1(x))
        return self.fc2(x + self.alpha * x.square()) / self.temperature.exp()


class Statistics(nn.Module):
    """A gate from mean and standard deviation over all features."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 12)
        self.fc2 = nn.Linear(12, 12)
        self.fc3 = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.fc1(x))
        x = self.fc2(x) * x.mean(-1, keepdim=True) / (x.std(-1, correction=0, keepdim=True) + 0.1)
        return self.fc3(x)


class Mixer(nn.Module):
    """Mixing over tokens, whose weights every sub-model has for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 12)
        self.tokens = nn.Linear(5, 5)
        self.channels = nn.Linear(12, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + torch.tanh(self.tokens(x.transpose(1, 2))).transpose(1, 2)
        return self.head(x + torch.tanh(self.channels(x)))


def perceptron(norm: Callable[[int], nn.Module], *closing: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 12),
        norm(12),
        nn.Tanh(),
        nn.Linear(12, 16),
        norm(16),
        nn.Tanh(),
        nn.Linear(16, 4),
        *closing,
    )


def convolutions(norm: Callable[[int], nn.Module], *closing: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), norm(12), nn.Tanh(), nn.Conv2d(12, 8, 3, padding=1), norm(8), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(32, 4), *closing,
    )  # fmt: skip


def no_norm(width: int) -> nn.Module:
    return nn.Identity()


Case = tuple[Callable[[], nn.Module], Callable[[], Tensor]]


def features() -> Tensor:
    return normal(3, 6)


def pictures() -> Tensor:
    return normal(3, 3, 4, 4)


def words() -> Tensor:
    return torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])


# Each has an op whose result for one unit depends on others, or parameters that are every sub-model's own.
CROSS_UNIT: dict[str, Case] = {
    "layer norm": (lambda: perceptron(nn.LayerNorm), features),
    "layer norm without affine": (
        lambda: perceptron(lambda n: nn.LayerNorm(n, elementwise_affine=False)),
        features,
    ),
    "rms norm": (lambda: perceptron(nn.RMSNorm), features),
    "group norm of one group": (lambda: convolutions(lambda n: nn.GroupNorm(1, n)), pictures),
    "local response norm": (lambda: convolutions(lambda n: nn.LocalResponseNorm(3, alpha=0.5)), pictures),
    "softmax over channels": (ChannelSoftmax, features),
    "softmax in the middle": (lambda: perceptron(lambda n: nn.Softmax(dim=1)), features),
    "one slope": (lambda: perceptron(lambda n: nn.PReLU(init=0.4)), features),
    "learned numbers": (Scaled, features),
    "statistics over features": (Statistics, features),
    "tied embeddings": (lambda: Tied(norm=False), words),
    "tied embeddings behind a norm": (lambda: Tied(norm=True), words),
    "mixer": (Mixer, lambda: normal(3, 5, 6)),
}
# These have none.
SEPARATE: dict[str, Case] = {
    "perceptron": (lambda: perceptron(no_norm), features),
    "batch norm": (lambda: perceptron(nn.BatchNorm1d), features),
    "convolutions": (lambda: convolutions(no_norm), pictures),
    "convolutions and batch norm": (lambda: convolutions(nn.BatchNorm2d), pictures),
    "slopes for channels": (lambda: perceptron(lambda n: nn.PReLU(n)), features),
    "group norm of two groups": (lambda: convolutions(lambda n: nn.GroupNorm(4, n)), pictures),
    "instance norm": (lambda: convolutions(lambda n: nn.InstanceNorm2d(n, affine=True)), pictures),
}


def build(case: Case) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return case[0]().double(), case[1]()


def independent(part: gs.Partition) -> list[gs.ProgramModule]:
    """Sub-models with weights that are slices of nothing, in eval mode."""
    submodels = part.submodels
    with torch.no_grad():
        for seed, submodel in enumerate(submodels):
            generator = torch.Generator().manual_seed(seed)
            for name, tensor in (*submodel.named_parameters(), *submodel.named_buffers()):
                if tensor.dtype.is_floating_point:
                    noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
                    tensor.copy_(noise.abs() + 0.5 if name.endswith("running_var") else noise)
            submodel.eval()
    return submodels


def mean_of(submodels: list[gs.ProgramModule], x: Tensor) -> Tensor:
    return torch.stack([submodel(x) for submodel in submodels]).mean(0)


# ---------------------------------------------------------------------------------------------------------
# Exact and plain


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("name", [*CROSS_UNIT, *SEPARATE])
def test_exact_merge_is_the_mean(name: str, k: int) -> None:
    model, x = build((CROSS_UNIT | SEPARATE)[name])
    part = gs.partition(model, x, k=k)
    submodels = independent(part)
    merged = part.merge(submodels).eval()
    for batch in (x, torch.cat([x, x[:2]])):
        expected = mean_of(submodels, batch)
        assert largest_difference([merged(batch)], [expected]) < BOUND
        assert largest_difference([submodels[0](batch)], [expected]) > 1e-3, "they are independent"
    certificate = part.verify(submodels)
    assert certificate.ok, str(certificate)
    assert any("given weights" in row.check and row.error < BOUND for row in certificate.rows)


@pytest.mark.parametrize("k", [5, 7])
@pytest.mark.parametrize("name", [*CROSS_UNIT, "perceptron", "batch norm", "convolutions and batch norm"])
def test_exact_merge_where_k_divides_no_width(name: str, k: int) -> None:
    model, x = build((CROSS_UNIT | SEPARATE)[name])
    part = gs.partition(model, x, k=k)
    submodels = independent(part)
    assert largest_difference([part.merge(submodels).eval()(x)], [mean_of(submodels, x)]) < BOUND


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("name", SEPARATE)
def test_plain_merge_is_exact_without_cross_unit_ops(name: str, k: int) -> None:
    model, x = build(SEPARATE[name])
    part = gs.partition(model, x, k=k)
    submodels = independent(part)
    plain = part.merge(submodels, duplicate=False).eval()
    assert largest_difference([plain(x)], [mean_of(submodels, x)]) < BOUND
    row = next(row for row in part.verify(submodels).rows if "plain" in row.check)
    assert row.error < BOUND
    exact = part.merge(submodels).eval()
    assert exact.state_dict().keys() == plain.state_dict().keys()
    for key, value in exact.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key]), "both are the same model"


@pytest.mark.parametrize("name", CROSS_UNIT)
def test_plain_merge_reports_its_error(name: str) -> None:
    model, x = build(CROSS_UNIT[name])
    part = gs.partition(model, x, k=2)
    certificate = part.verify()
    row = next(row for row in certificate.rows if "plain" in row.check)
    assert row.bound is None, "for information"
    submodels = independent(part)
    error = largest_difference([part.merge(submodels, duplicate=False).eval()(x)], [mean_of(submodels, x)])
    linear = {"one slope", "layer norm without affine"}
    if name not in linear:
        assert error > 1e-3 and row.error > 1e-3
    assert certificate.max_error < BOUND
    model.load_state_dict(part.merge(submodels, duplicate=False).state_dict(), strict=True)


CLOSINGS: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "softmax": (nn.Softmax(dim=1), torch.log, lambda mean: F.softmax(mean, dim=1)),
    "log softmax": (nn.LogSoftmax(dim=1), lambda out: out, lambda mean: F.log_softmax(mean, dim=1)),
    "sigmoid": (nn.Sigmoid(), torch.logit, torch.sigmoid),
}


@pytest.mark.parametrize("duplicate", [True, False])
@pytest.mark.parametrize("name", CLOSINGS)
def test_mean_is_taken_before_a_closing_op(name: str, duplicate: bool) -> None:
    closing, opened, closed = CLOSINGS[name]
    torch.manual_seed(0)
    model, x = perceptron(no_norm, closing).double(), features()
    part = gs.partition(model, x, k=2)
    submodels = independent(part)
    merged = part.merge(submodels, duplicate=duplicate).eval()
    mean = torch.stack([opened(submodel(x)) for submodel in submodels]).mean(0)
    assert largest_difference([merged(x)], [closed(mean)]) < BOUND
    assert largest_difference([mean_of(submodels, x)], [closed(mean)]) > 1e-3


def test_batches_of_a_merged_model_in_train_mode() -> None:
    model, x = build(SEPARATE["batch norm"])
    part = gs.partition(model, x, k=3)
    submodels = independent(part)
    merged = part.merge(submodels).train()
    outputs = [submodel.train()(x) for submodel in submodels]
    assert largest_difference([merged(x)], [torch.stack(outputs).mean(0)]) < BOUND
    again = part.plan.merge_state_dicts([submodel.state_dict() for submodel in submodels])
    for key, value in merged.state_dict().items():
        assert largest_difference([value], [again[key]]) < 1e-12, key


def test_running_statistics_are_merged() -> None:
    model, x = build(SEPARATE["convolutions and batch norm"])
    part = gs.partition(model, x, k=2)
    submodels = part.submodels
    for count, submodel in enumerate(submodels, 3):
        for seed in range(count):
            submodel(normal(3, 3, 4, 4, seed=seed))
    merged = part.merge(submodels)
    a, b = (submodel.state_dict() for submodel in submodels)
    found = merged.state_dict()
    for key in ("1.running_mean", "1.running_var", "4.running_mean", "4.running_var"):
        assert torch.equal(found[key], torch.cat([a[key], b[key]])), key
    assert int(found["1.num_batches_tracked"]) == 4


# ---------------------------------------------------------------------------------------------------------
# Tied weights


def test_division_of_a_tied_layer_is_folded_into_the_norm() -> None:
    model, x = build(CROSS_UNIT["tied embeddings behind a norm"])
    part = gs.partition(model, x, k=2)
    scales = {state.name: state.scale for state in part.plan.state if state.scale != 1}
    assert scales == {"norm.weight": 0.5, "norm.bias": 0.5}
    graph = part.merge().graph
    assert not any(op_name(node).startswith(("mul", "div")) for node in graph.nodes)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("duplicate", [True, False])
def test_tied_weights_stay_tied(norm: bool, duplicate: bool) -> None:
    torch.manual_seed(0)
    part = gs.partition(Tied(norm).double(), words(), k=2)
    for module in (*part.submodels, part.merge(duplicate=duplicate)):
        assert module.head.weight is module.embed.weight
    assert all("head.weight" in module.state_dict() for module in part.submodels)


# ---------------------------------------------------------------------------------------------------------
# Cross weights


def cross_mask(part: gs.Partition, name: str) -> Tensor:
    """True at entries that join units of different sub-models."""
    plan = part.plan.names()[name]
    mask = torch.ones(plan.shape, dtype=torch.bool)
    for number in range(part.k):
        index = plan.grid(number, mask.device)
        if index is None:
            return torch.zeros_like(mask)
        mask[index] = False
    return mask


@pytest.mark.parametrize("duplicate", [True, False])
@pytest.mark.parametrize("name", [*CROSS_UNIT, *SEPARATE])
def test_cross_weights_are_zero_and_train(name: str, duplicate: bool) -> None:
    model, x = build((CROSS_UNIT | SEPARATE)[name])
    part = gs.partition(model, x, k=2)
    merged = part.merge(independent(part), duplicate=duplicate)
    weights = [n for n, p in model.named_parameters() if p.dim() > 1 and bool(cross_mask(part, n).any())]
    optimizer = torch.optim.SGD(merged.parameters(), lr=0.1)
    for weight in weights:
        mask = cross_mask(part, weight)
        values = merged.get_parameter(weight).detach()
        assert not bool(values[mask].any()), weight
        assert bool((values[~mask] != 0).all()), weight
    step(merged, ((x,), {}))
    for weight in weights:
        parameter = merged.get_parameter(weight)
        assert parameter.requires_grad
        assert parameter.grad is not None and bool(parameter.grad[cross_mask(part, weight)].any()), weight
    optimizer.step()
    for weight in weights:
        assert bool(merged.get_parameter(weight)[cross_mask(part, weight)].any()), weight
    single_hidden_layer = {"learned numbers", "softmax over channels"}
    assert weights or name in single_hidden_layer


@pytest.mark.parametrize("name", ["layer norm", "batch norm", "convolutions", "mixer", "tied embeddings"])
def test_live_cross_weights_change_the_output(name: str) -> None:
    model, x = build((CROSS_UNIT | SEPARATE)[name])
    part = gs.partition(model, x, k=2)
    merged = part.merge(independent(part)).eval()
    before = merged(x)
    weight = next(n for n, p in model.named_parameters() if p.dim() > 1 and bool(cross_mask(part, n).any()))
    with torch.no_grad():
        mask = cross_mask(part, weight)
        merged.get_parameter(weight)[mask] = normal(int(mask.sum()))
    assert largest_difference([merged(x)], [before]) > 1e-3


def test_merged_models_train() -> None:
    model, x = build(CROSS_UNIT["layer norm"])
    merged = gs.partition(model, x, k=2).merge()
    assert merged.training
    optimizer = torch.optim.Adam(merged.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (merged(x) - normal(3, 4, seed=5)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


# ---------------------------------------------------------------------------------------------------------
# Size


class Taken(nn.Module):
    """Gives a part of what mixes all of its outputs: those that are not given are divided."""

    def __init__(self, take: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.c, self.take = nn.Linear(8, 12), nn.Linear(12, 6), take

    def forward(self, x: Tensor) -> Any:
        return self.take(self.c(torch.relu(self.a(x))))


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize(
    "take",
    [
        lambda o: o.softmax(-1)[:, 1],
        lambda o: o.softmax(-1)[:, :2],
        lambda o: o.log_softmax(-1)[:, ::2],
        lambda o: (o - o.mean(-1, keepdim=True))[:, ::2],
        lambda o: F.normalize(o)[:, ::2],
        lambda o: F.layer_norm(o, (6,))[:, :2],
        lambda o: o.cumsum(-1)[:, -1],
        lambda o: F.layer_norm(o, (6,)).split(3, -1)[0],
    ],
    ids=[
        "softmax, one", "softmax", "log_softmax", "centred", "normalize", "layer norm", "cumsum", "split",
    ],
)  # fmt: skip
def test_a_part_of_outputs_that_were_mixed(take: Callable[[Tensor], Any], k: int) -> None:
    part = gs.partition(Taken(take), torch.randn(5, 8), k=k)
    certificate = part.verify()
    assert certificate.ok, str(certificate)
    x = torch.randn(4, 8)
    mean = torch.stack([submodel.eval()(x) for submodel in part.submodels]).mean(0)
    torch.testing.assert_close(part.merge().eval()(x), mean)


@functools.cache
def partition_of(name: str) -> gs.Partition:
    return gs.partition(traced(name), k=2)


@pytest.mark.parametrize(
    "name", ["lenet", "vgg_bn", "resnet_bottleneck", "densenet", "googlenet", "shufflenet_v2", "efficientnet", "unet",
             "lstm_stacked", "glu", "norm_group", "hub_resnet"],
)  # fmt: skip
def test_merged_model_without_cross_unit_ops_has_no_more_nodes(name: str) -> None:
    part = partition_of(name)
    assert len(part.merge().graph.nodes) <= len(part.program.graph("train").nodes)
    assert not part.analysis.kinds.apart


@pytest.mark.parametrize(
    "name", ["alexnet_lrn", "convnext", "vit", "mlp_mixer", "swin", "gpt", "llama_expand", "cbam", "squeezenet",
             "prelu_one_slope", "tied_autoencoder", "hub_bert"],
)  # fmt: skip
def test_merged_model_has_only_the_nodes_that_are_duplicated(name: str) -> None:
    part = partition_of(name)
    program, merged = part.program, part.merged_program()
    apart = part.analysis.kinds.apart
    # An op that stands K times cuts each of its operands K times (by two slices and a concatenation, where units lie
    # in two runs), and its results are put together again.
    allowed = sum(part.k * (1 + 3 * len(node.all_input_nodes)) + 2 for node in apart)
    extra = len(list(merged.nodes())) - len(list(program.nodes()))
    assert extra <= allowed + len(part.analysis.divided)
    assert apart or name == "tied_autoencoder"
    # Layers that carry the parameters stand once.
    layers = ("conv", "linear", "embedding", "lstm")
    own = {n for n in program.nodes() if op_name(n).startswith(layers) and n in apart}
    before = sum(op_name(node).startswith(layers) for node in program.nodes())
    after = sum(op_name(node).startswith(layers) for node in merged.nodes())
    assert after == before + (part.k - 1) * len(own)


@pytest.mark.parametrize("name", ["lenet", "gpt", "prelu_one_slope", "resnet_basic"])
def test_parameters_of_merged_models(name: str) -> None:
    part = partition_of(name)
    full = part.program.parameter_count()
    assert sum(p.numel() for p in part.merge(duplicate=False).parameters()) == full
    own = [plan for plan in part.plan.state if plan.merge == "stack" and plan.kind == "parameter"]
    extra = sum((part.k - 1) * torch.Size(plan.local_shape(0)).numel() for plan in own)
    assert sum(p.numel() for p in part.merge().parameters()) == full + extra


# ---------------------------------------------------------------------------------------------------------
# Inputs and outputs of a merge


def test_merge_takes_modules_and_state_dicts() -> None:
    model, x = build(CROSS_UNIT["layer norm"])
    part = gs.partition(model, x, k=2)
    submodels = independent(part)
    expected = part.merge(submodels).eval()(x)
    assert torch.equal(part.merge([submodel.state_dict() for submodel in submodels]).eval()(x), expected)
    assert torch.equal(part.merge([submodels[0], submodels[1].state_dict()]).eval()(x), expected)


def test_merge_leaves_its_inputs_alone() -> None:
    model, x = build(CROSS_UNIT["layer norm"])
    part = gs.partition(model, x, k=2)
    submodels = independent(part)
    before = [owned(submodel.state_dict()) for submodel in submodels]
    merged = part.merge(submodels)
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    for submodel, state in zip(submodels, before, strict=True):
        assert not submodel.training
        for key, value in submodel.state_dict().items():
            assert torch.equal(value, state[key])


def test_default_merge_takes_the_slices() -> None:
    model, x = build(SEPARATE["perceptron"])
    part = gs.partition(model, x, k=2)
    merged = part.merge(duplicate=False).state_dict()
    full = model.state_dict()
    assert torch.equal(merged["0.weight"], full["0.weight"])
    assert torch.equal(merged["6.weight"], full["6.weight"] / 2)
    assert torch.equal(merged["6.bias"], full["6.bias"])


def test_frozen_parameters_stay_frozen_in_a_merge() -> None:
    model, x = build(CROSS_UNIT["layer norm"])
    model[0].weight.requires_grad_(False)
    merged = gs.partition(model, x, k=2).merge()
    assert [name for name, p in merged.named_parameters() if not p.requires_grad] == ["0.weight"]


class Predicts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = perceptron(no_norm).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.net(x)
        return scores, scores.argmax(-1)


def test_outputs_without_a_mean_are_refused() -> None:
    part = gs.partition(Predicts(), features(), k=2)
    notes = [note for note in model_report(part.analysis)["notes"] if "has no mean" in note]
    assert len(notes) == 1 and notes[0].startswith("output[1] is of type torch.int64")
    scores, classes = part.submodels[0](features())
    assert torch.equal(classes, scores.argmax(-1))
    with pytest.raises(
        PartitionError, match=r"int64 and differs between the sub-models: it has no mean"
    ) as caught:
        part.merge()
    assert caught.value.where and __file__ in caught.value.where
    assert caught.value.hint == "return the scores that it is made from"


# ---------------------------------------------------------------------------------------------------------
# The certificate can fail


def test_certificate_fails_where_output_weights_are_not_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build(SEPARATE["perceptron"])
    part = gs.partition(model, x, k=2)
    assert part.verify().ok
    monkeypatch.setattr(plan_module, "_divide", lambda total, by: total)
    certificate = part.verify()
    assert not certificate.ok
    assert certificate.max_error > 1e-3
    assert "FAILED" in str(certificate)


def test_certificate_fails_where_a_cross_unit_op_is_not_duplicated() -> None:
    model, x = build(CROSS_UNIT["layer norm"])
    part = gs.partition(model, x, k=2)
    kinds = part.analysis.kinds
    for node in list(kinds.apart):
        if op_name(node) == "layer_norm.default":
            kinds.apart.discard(node)
            assert kinds.kind[node] is Kind.SPLIT
    assert not part.verify().ok


def test_certificate_fails_for_another_model() -> None:
    model, x = build(SEPARATE["perceptron"])
    part = gs.partition(model, x, k=2)
    with torch.no_grad():
        model[0].bias.add_(1)
    # A program refers to the tensors of the model: both see the change.
    assert part.verify().ok
    model[1] = nn.ReLU()
    certificate = part.verify()
    assert not certificate.ok
    failed = [row.check for row in certificate.rows if not row.ok]
    assert {"K = 1 emitted equals the model (eval)", "K = 1 emitted equals the model (train)"} <= set(failed)
    assert all(check.startswith("K = 1") for check in failed)


def test_certificate_is_data() -> None:
    model, x = build(CROSS_UNIT["rms norm"])
    certificate = gs.partition(model, x, k=2).verify()
    data: dict[str, Any] = certificate.to_data()
    assert data["ok"] is True and data["dtype"] == "float64"
    assert len(data["rows"]) == len(certificate.rows)
    assert {"check", "error", "bound", "dtype", "ok"} <= data["rows"][0].keys()
    assert str(certificate).startswith("certificate: ok, largest error")


def test_double_inputs_of_the_zoo_are_wide() -> None:
    # The comparisons of this file are in float64: inputs and weights.
    for case in (*CROSS_UNIT.values(), *SEPARATE.values()):
        model, x = build(case)
        assert {p.dtype for p in model.parameters()} <= {torch.float64}
        assert tensors(wide(x))[0].dtype == x.dtype
