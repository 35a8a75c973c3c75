"""Fused models: what K models compute apart, in one module; nothing goes from one to another."""

import copy
import json
import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphsplit as gs
from graphsplit import bundle
from graphsplit._fuse import certify_fused
from graphsplit.errors import BundleError, PartitionError, PlanError, UnsupportedError, UserError
from graphsplit.fusion.cost import FusionCost
from graphsplit.fusion.placement import Placement
from graphsplit.passes import Pipeline
from graphsplit.passes import fuse as fuse_pass
from graphsplit.passes.base import Programs
from graphsplit.passes.fuse import fuse as fuse_programs
from graphsplit.program import check, op_name
from laws import run, script
from zoo import traced

K = 3


class Net(nn.Module):
    """Images by convolutions, batch norm, dropout and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.hidden, self.drop, self.head = nn.Linear(8 * 16, 12), nn.Dropout(0.5), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.norm(self.conv(x))), 2)
        scores: Tensor = self.head(self.drop(torch.relu(self.hidden(x.flatten(1)))))
        return scores


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch))


def models(count: int = K, build: Callable[[], nn.Module] = Net) -> list[nn.Module]:
    torch.manual_seed(0)
    return [build() for _ in range(count)]


@pytest.fixture
def partition() -> gs.Partition:
    torch.manual_seed(0)
    return gs.partition(Net(), images(), k=2)


# The law


SOME = [
    "lenet", "resnet_basic", "resnext", "densenet", "shufflenet_v2", "convnext", "efficientnet", "unet",
    "detr", "torch_transformer", "text_cnn", "llama_two_kv_heads", "llama_complex_rotary", "hub_bert",
    "hub_gpt2", "hub_t5", "hub_mixtral", "hub_mamba",
]  # fmt: skip


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_fused_is_apart_on_the_zoo(name: str, own: bool) -> None:
    program = traced(name)
    fused = fuse_programs([program, program], own_inputs=own)
    certificate = certify_fused(fused)
    assert certificate.ok, certificate
    check(fused.program)


@pytest.mark.parametrize("name", ["lenet", "resnet_basic", "gpt_dropout", "hub_mixtral"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_one_after_the_other_is_apart_too(name: str, own: bool) -> None:
    program = traced(name)
    turns = fuse_programs([program, program], own_inputs=own, in_turn=True)
    certificate = certify_fused(turns)
    assert certificate.ok, certificate
    check(turns.program)


def test_between_ops_that_run_in_turn_nothing_is_stacked() -> None:
    program = gs.trace(models(1)[0], images())
    graph = fuse_programs([program] * K, in_turn=True).program.graph()
    readers = {
        reader.name if reader.op == "call_function" else reader.op
        for node in graph.nodes
        if node.target is torch.ops.aten.stack.default
        for reader in node.users
    }
    assert readers == {"copy__default", "output"}  # the number of batches, and what is given


@pytest.mark.parametrize("seconds", [(1.0, 2.0), (2.0, 1.0)], ids=["slower", "faster"])
def test_what_does_not_pay_is_not_fused(
    seconds: tuple[float, float], monkeypatch: pytest.MonkeyPatch, partition: gs.Partition
) -> None:
    cost = FusionCost(*seconds)
    monkeypatch.setattr(fuse_pass, "fusion_cost", lambda *_: cost)
    fused = partition.fuse(auto=True)
    assert fused.in_turn == (not cost.pays) and fused.cost == cost
    assert bool(fused.looped) == fused.in_turn
    assert fused.verify().ok
    expected = torch.stack([model.eval()(images(7)) for model in partition.submodels])
    torch.testing.assert_close(fused.eval()(images(7)), expected)
    assert fuse_pass.Fuse(auto=True).run(Programs(partition.programs)).modified


def test_both_ways_are_measured_on_the_inputs_given() -> None:
    own = models(2)
    fused = gs.fuse(own, images(), auto=True)
    assert fused.cost is not None and fused.cost.in_turn > 0 and fused.cost.fused > 0
    assert fused.in_turn != fused.cost.pays
    for model, state in zip(own, fused.state_dicts(), strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    text = str(FusionCost(0.003, 0.002))
    assert text == "fused 2.00 ms, in turn 3.00 ms: 1.50 times as fast"


def test_parameters_stand_as_they_are_read(partition: gs.Partition) -> None:
    fused = partition.fuse()
    own = dict(partition.submodels[0].named_parameters())
    found = {name: tuple(parameter.shape) for name, parameter in fused.named_parameters()}
    rows, columns = own["hidden.weight"].shape
    filters, *rest = own["conv.weight"].shape
    assert found["hidden.weight"] == (2, columns, rows) and found["hidden.bias"] == (2, 1, rows)
    assert found["conv.weight"] == (2 * filters, *rest) and found["norm.bias"] == (2 * filters,)
    fused(images()).sum().backward()
    for parameter in fused.parameters():
        assert parameter.grad is not None and parameter.grad.stride() == parameter.stride()


def test_each_model_has_its_gradients(partition: gs.Partition) -> None:
    fused = partition.fuse().double().eval()
    assert all(parameter.grad is None for parameter in fused.models()[0].parameters())
    fused(images().double()).square().sum().backward()
    for own, model in zip(partition.submodels, fused.models(), strict=True):
        own.double().eval()(images().double()).square().sum().backward()
        for (name, parameter), other in zip(own.named_parameters(), model.parameters(), strict=True):
            assert parameter.grad is not None and other.grad is not None
            torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-11, atol=1e-11, msg=name)
    with torch.no_grad():
        gradient = fused.models()[1].get_parameter("hidden.weight").grad
        assert gradient is not None
        gradient.fill_(3)
    weight = fused.get_parameter("hidden.weight").grad
    assert weight is not None and torch.equal(weight[1], torch.full_like(weight[1], 3))


def test_a_saved_one_knows_its_models(tmp_path: Path, partition: gs.Partition) -> None:
    fused = partition.fuse(own_inputs=True).eval()
    gs.save(fused, tmp_path / "fused")
    loaded = gs.load(tmp_path / "fused")
    assert isinstance(loaded, gs.FusedModule) and loaded.k == 2 and not loaded.training
    x = torch.stack([images(), images() + 1])
    assert torch.equal(loaded(x), fused(x))
    assert loaded.verify().ok
    loaded.load_models(loaded.models()[::-1])
    torch.testing.assert_close(loaded(x.flip(0)), fused(x).flip(0))
    divided = partition.merge(loaded.state_dicts())
    assert divided.state_dict().keys() == partition.merge().state_dict().keys()


def test_a_saved_one_for_another_number_of_models_is_refused(tmp_path: Path, partition: gs.Partition) -> None:
    bundle.save(replace(partition.fuse().to_bundle(), k=3), tmp_path / "fused")
    with pytest.raises(BundleError, match="is for 3 models"):
        gs.load(tmp_path / "fused")
    found = gs.partition(OfTheInput(), torch.randn(3, 5, 8), k=4).fuse().to_bundle()
    assert len(found.singles) == 4 and len(partition.fuse().to_bundle().singles) == 1
    bundle.save(replace(found, singles=found.singles[:3]), tmp_path / "lost")
    with pytest.raises(BundleError, match="is for 4 models, and has 3"):
        gs.load(tmp_path / "lost")
    with pytest.raises(ValueError, match="'diagonal', 0 is no placement"):
        Placement("diagonal")  # type: ignore[arg-type]


def test_every_op_of_a_convolutional_net_does_the_work_of_all(partition: gs.Partition) -> None:
    fused = partition.fuse()
    assert fused.looped == {} and fused.k == 2
    assert fused.verify().ok
    before = len(partition.programs[0].graph().nodes)
    assert len(fused.graph.nodes) == before + 1  # where images become rows


class Blocks(nn.Module):
    """Blocks of a transformer between two linear layers."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 5)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(depth))
        self.products = nn.ModuleList(
            nn.ModuleList([nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(32, 16)])
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm, (mix, out, wide, narrow) in zip(self.norms, self.products, strict=True):  # type: ignore[misc]
            heads = [h.view(*x.shape[:2], 4, 4).transpose(1, 2) for h in mix(norm(x)).chunk(3, dim=-1)]
            found = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
            x = x + out(found.transpose(1, 2).reshape(x.shape))
            x = x + narrow(nn.functional.gelu(wide(x)))
        scores: Tensor = self.last(x)
        return scores


def test_further_blocks_change_no_layout() -> None:
    def added(depth: int) -> Counter[str]:
        program = gs.trace(Blocks(depth), torch.randn(2, 7, 6))
        fused = fuse_programs([program] * K)
        assert certify_fused(fused).ok and not fused.looped
        ops = [Counter(map(op_name, one.graph().nodes)) for one in (fused.program, program)]
        return ops[0] - ops[1]

    changes = added(2) - added(1)
    assert changes.keys() == {"addcmul.default", "baddbmm.default", "reshape.default"}
    assert changes["addcmul.default"] == 1  # the norm's weights
    assert changes["baddbmm.default"] == 4 and changes["reshape.default"] == 3  # for linear and view


def test_outputs_stand_on_a_leading_dimension(partition: gs.Partition) -> None:
    fused = partition.fuse().eval()
    expected = torch.stack([model.eval()(images(7)) for model in partition.submodels])
    torch.testing.assert_close(fused(images(7)), expected)


def test_inputs_of_their_own() -> None:
    fused = gs.fuse(models(), images(), own_inputs=True).eval()
    inputs = torch.stack([images(4), images(4) + 1, images(4) * 2])
    expected = torch.stack([m.eval()(x) for m, x in zip(models(), inputs, strict=True)])
    torch.testing.assert_close(fused(inputs), expected)
    assert fused.verify().ok


def test_models_of_ones_own_are_not_changed() -> None:
    own = models()
    before = [copy.deepcopy(model.state_dict()) for model in own]
    fused = gs.fuse(own, images())
    fused(images()).sum().backward()
    for model, state in zip(own, before, strict=True):
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_it_is_deterministic() -> None:
    first, second = (gs.fuse(models(), images()) for _ in range(2))
    assert first.code == second.code
    torch.manual_seed(1)
    one = first(images())
    torch.manual_seed(1)
    assert torch.equal(one, second(images()))


def test_dropout_is_each_models_own() -> None:
    model = models(1)[0]
    fused = gs.fuse([model, copy.deepcopy(model)], images(64)).train()
    a, b = fused(images(64))
    assert not torch.allclose(a, b)
    fused.eval()
    a, b = fused(images(64))
    torch.testing.assert_close(a, b)


def test_a_model_that_diverges_leaves_the_others_alone() -> None:
    own = models()
    fused = gs.fuse(own, images())
    with torch.no_grad():
        fused.models()[1].get_parameter("conv.weight").fill_(float("nan"))
    fused.eval()(images()).square().sum(dim=(1, 2)).sum().backward()
    healthy = gs.fuse(own, images()).eval()
    healthy(images()).square().sum().backward()
    for number in (0, 2):
        model, other = fused.models()[number], healthy.models()[number]
        for (name, parameter), expected in zip(model.named_parameters(), other.parameters(), strict=True):
            assert parameter.grad is not None and expected.grad is not None
            torch.testing.assert_close(parameter.grad, expected.grad, msg=name)


# State


def test_there_is_no_second_copy_of_the_weights() -> None:
    fused = gs.fuse(models(), images())
    apart = fused.models()
    with torch.no_grad():
        apart[1].get_parameter("head.bias").fill_(7)
        apart[2].get_buffer("norm.running_mean").fill_(3)
    assert torch.equal(fused.get_parameter("head.bias")[1], torch.full((1, 5), 7.0))
    assert torch.equal(fused.get_buffer("norm.running_mean")[2 * 8 :], torch.full((8,), 3.0))
    assert fused.state_dicts()[1]["head.bias"].data_ptr() == apart[1].get_parameter("head.bias").data_ptr()


def test_state_goes_both_ways(partition: gs.Partition) -> None:
    fused = partition.fuse()
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.normal_()
    merged = partition.merge(fused.state_dicts()).eval()
    fused.eval()
    assert torch.equal(partition.merge(fused).eval()(images()), merged(images()))
    assert torch.equal(partition.fuse(fused).eval()(images()), fused(images()))
    assert partition.verify(fused).ok
    with pytest.raises(PlanError, match="one Net for a plan of 2 sub-models"):
        partition.merge(models(1)[0])  # type: ignore[arg-type]
    torch.testing.assert_close(merged(images()), fused(images()).mean(0), rtol=1e-4, atol=1e-4)
    other = partition.fuse().eval()
    other.load_models(fused.models())
    assert torch.equal(other(images()), fused(images()))
    with pytest.raises(PlanError, match="3 models for 2"):
        fused.load_models(models())
    with pytest.raises(PlanError, match=r"model 0 has no conv\.weight of shape"):
        fused.load_models(models(2))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
        lambda p: torch.optim.AdamW(p, 0.01),
    ],
    ids=["sgd", "adamw"],
)
def test_start_apart_go_on_fused_and_apart_again(make: Callable[..., torch.optim.Optimizer]) -> None:
    class Smooth(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
            self.scale = nn.Parameter(torch.rand(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * super().forward(x)

    x = torch.randn(8, 6, dtype=torch.float64)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(x).square().mean(dim=(-1, -2)).sum().backward()
        optimizer.step()

    apart = [model.double() for model in models(K, Smooth)]
    optimizers = [make(model.parameters()) for model in apart]
    expected = copy.deepcopy(apart)
    others = [make(model.parameters()) for model in expected]
    for model, optimizer in zip(expected, others, strict=True):
        for _ in range(6):
            step(model, optimizer)
    for model, optimizer in zip(apart, optimizers, strict=True):
        for _ in range(2):
            step(model, optimizer)
    fused = gs.fuse(apart, x)
    optimizer = make(fused.parameters())
    fused.load_optimizers(optimizer, optimizers, apart)
    for _ in range(2):
        step(fused, optimizer)
    for model, state in zip(apart, fused.state_dicts(), strict=True):
        model.load_state_dict(state)
    fused.split_optimizer(optimizer, optimizers, apart)
    for model, own in zip(apart, optimizers, strict=True):
        for _ in range(2):
            step(model, own)
    for model, other in zip(apart, expected, strict=True):
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


RATES = (0.1, 0.01, 0.003)
DECAYS = (0.0, 0.1, 0.01)


def _sgd(fused: gs.FusedModule) -> tuple[torch.optim.Optimizer, list[dict[str, float]], type]:
    momenta = (0.9, 0.0, 0.5)
    optimizer = gs.train.PerModelSGD(fused, RATES, momenta, DECAYS)
    options = [
        {"lr": lr, "momentum": m, "weight_decay": d} for lr, m, d in zip(RATES, momenta, DECAYS, strict=True)
    ]
    return optimizer, options, torch.optim.SGD


def _adamw(fused: gs.FusedModule) -> tuple[torch.optim.Optimizer, list[dict[str, float]], type]:
    optimizer = gs.train.PerModelAdamW(fused, RATES, weight_decay=DECAYS)
    options = [{"lr": lr, "weight_decay": d} for lr, d in zip(RATES, DECAYS, strict=True)]
    return optimizer, options, torch.optim.AdamW


@pytest.mark.parametrize("make", [_sgd, _adamw])
def test_every_model_has_settings_of_its_own(make: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 6, dtype=torch.float64)
    own = [nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double() for _ in range(K)]
    fused = gs.fuse(own, x)
    optimizer, options, kind = make(fused)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    for _ in range(7):
        optimizer.zero_grad()
        fused(x).square().mean(dim=(1, 2)).sum().backward()
        optimizer.step()
        schedule.step()
    for model, option, state in zip(own, options, fused.state_dicts(), strict=True):
        single = kind(model.parameters(), **option)
        halving = torch.optim.lr_scheduler.StepLR(single, 3, 0.5)
        for _ in range(7):
            single.zero_grad()
            model(x).square().mean().backward()
            single.step()
            halving.step()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(state[name], parameter.detach(), rtol=1e-12, atol=1e-12)


def test_settings_that_do_not_fit_are_said() -> None:
    fused = gs.fuse(models(), images())
    with pytest.raises(UserError, match="2 values of rate for 3 models"):
        gs.train.PerModelSGD(fused, (0.1, 0.2))
    with pytest.raises(UserError, match="momentum is below zero"):
        gs.train.PerModelSGD(fused, momentum=-0.5)
    with pytest.raises(UserError, match="a fused module is expected, and a generator was given"):
        gs.train.PerModelAdamW(fused.parameters())  # type: ignore[arg-type]


def test_optimizers_of_different_age_are_refused() -> None:
    own = models()
    optimizers = [torch.optim.Adam(model.parameters()) for model in own]
    for number, (model, optimizer) in enumerate(zip(own, optimizers, strict=True)):
        for _ in range(number + 1):
            model(images()).sum().backward()
            optimizer.step()
    fused = gs.fuse(own, images())
    with pytest.raises(PlanError, match="differ in step"):
        fused.load_optimizers(torch.optim.Adam(fused.parameters()), optimizers, own)


# What a module can do


def test_it_copies_pickles_and_moves() -> None:
    fused = gs.fuse(models(), images()).eval()
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(other(images()), fused(images()))
        assert len(other.models()) == K
    wide = copy.deepcopy(fused).double()
    assert wide(images().double()).dtype == torch.float64
    assert wide.models()[0](images().double()).dtype == torch.float64


@pytest.mark.slow
def test_it_compiles_and_exports(tmp_path: Path) -> None:
    fused = gs.fuse(models(), images()).eval()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), fused(images()))
    (report,) = gs.export_onnx(fused, tmp_path / "fused.onnx").values()
    assert report.rows and all(row.ok for row in report.rows)


def test_it_trains_under_autocast() -> None:
    fused = gs.fuse(models(), images())
    with torch.autocast("cpu", torch.bfloat16):
        out = fused(images())
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in fused.parameters())


def test_as_a_pass() -> None:
    torch.manual_seed(0)
    programs = Pipeline.parse("partition(k=2) | fuse")(gs.trace(Net(), images()))
    assert gs.emit(programs.single())(images(6)).shape == (2, 6, 5)


# What was found by trying models that nobody had in mind


class TypeAs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.c = nn.Parameter(torch.randn(6)), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        turned = self.c(y).transpose(2, 3).flip(0)
        return x.type_as(self.w).flip(1) * self.w, self.c(self.c(y).type_as(turned)) + turned


class FillWithNumbers(nn.Module):
    """Numbers without a dimension that are each model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.v = nn.Linear(6, 6), nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        h = self.l(x)
        filled = torch.full_like(x, 1.0).fill_(self.v)
        return h.masked_fill(x > 0, self.v), filled, torch.zeros_like(x).copy_(h), self.v * self.v.detach()


class Products(nn.Module):
    """Products that broadcast their batch."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.q = nn.Parameter(torch.randn(1, 2, 3)), nn.Parameter(torch.randn(1, 2, 2, 3))
        self.l = nn.Linear(3, 3)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        a = self.l(x.view(-1, 2, 3))
        k = self.l(y.view(y.shape[0], 2, -1, 3))
        mixed = nn.functional.scaled_dot_product_attention(self.q, k, k)
        return (
            torch.baddbmm(self.b, a, a.transpose(1, 2) @ a),
            mixed,
            self.l(x.view(-1, 2, 3)).view(torch.int32),
        )


class OwnIndices(nn.Module):
    """Experts by scores, and attention without heads."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 4), nn.Parameter(torch.randn(4, 6, 6))
        self.register_buffer("table", torch.randn(4, 6))

    def forward(self, x: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        scores = self.gate(x)
        first, second = scores.topk(2, dim=-1).indices.unbind(-1)
        mixed = torch.einsum("nio,ni->no", self.experts[first], x) + self.table[second]
        entries = self.experts[first, second] + self.experts[first, torch.arange(len(x))]
        rows = mixed.unsqueeze(1) + entries.unsqueeze(2)
        return mixed, entries, nn.functional.scaled_dot_product_attention(rows, rows, rows)


class ReadTwice(nn.Module):
    """One weight on the input, and on what comes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(6, 6)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.cell(x))
        return x


class ByIndex(nn.Module):
    """Sums at indices, writes into slices, everything as one number, slopes, normed weights, noise."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.many = nn.PReLU(init=0.3), nn.PReLU(3)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        y = self.many(self.one(self.conv(y)))
        written = self.normed(x).slice_scatter(torch.tanh(x[:, 2:4]), 1, 1, 3)
        summed = written.index_add(1, torch.tensor([0, 2, 0, 1]), self.normed(x)[:, :4], alpha=2)
        copied = summed.index_copy(1, torch.tensor([5, 3]), written[:, :2])
        return y + torch.rand(y.shape[0], 1, 1, 1), copied, written.mean() * y.sum() + self.one(x)


@pytest.mark.parametrize("build", [TypeAs, FillWithNumbers, Products, ByIndex, OwnIndices, ReadTwice])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_awkward_arguments(build: Callable[[], nn.Module], own: bool) -> None:
    torch.manual_seed(0)
    program = gs.trace(build(), (torch.randn(3, 6), torch.randn(3, 3, 4, 4)))
    certificate = certify_fused(fuse_programs([program] * K, own_inputs=own))
    assert certificate.ok, certificate


class InMemory(nn.Module):
    """Numbers by where they stand in memory: behind a product, turned, a part of something, a weight's own."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.h, self.w = nn.Linear(6, 24), nn.Linear(12, 3), nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        h = self.l(torch.tanh(x))
        first = h.as_strided((x.shape[0], 12), (24, 1))
        turned = torch.relu(h.t()).as_strided((3, 12), (12, 1))
        part = h.unflatten(1, (2, 12))[:, 1].as_strided((3, 12), (24, 1), 6)
        return self.h(first), self.h(turned), self.h(part), self.w.as_strided((3,), (4,), 1) * x.sum()


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_ops_that_read_memory_find_it_as_in_the_model(own: bool) -> None:
    torch.manual_seed(0)
    program = gs.trace(InMemory(), (torch.randn(3, 6), torch.randn(1)))
    certificate = certify_fused(fuse_programs([program] * K, own_inputs=own))
    assert certificate.ok, certificate


@pytest.mark.parametrize("build", [ByIndex, OwnIndices])
def test_nothing_of_it_runs_once_for_each_model(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    program = gs.trace(build(), (torch.randn(3, 6), torch.randn(3, 3, 4, 4)))
    assert fuse_programs([program] * K).looped == {}


def test_a_weight_that_is_read_twice_stands_as_it_is_read() -> None:
    program = gs.trace(ReadTwice(), (torch.randn(3, 6), torch.randn(3)))
    found = fuse_programs([program] * K).placements
    assert (found["cell.weight"], found["cell.bias"]) == (Placement("turned"), Placement(ones=1))


def test_numbers_without_dimension_do_not_widen() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l, self.t = nn.Linear(6, 6, dtype=torch.bfloat16), nn.Parameter(torch.randn(()))

        def forward(self, x: Tensor) -> Tensor:
            scaled: Tensor = self.l(self.l(x) * self.t.exp())
            return scaled

    x = torch.randn(2, 6, dtype=torch.bfloat16)
    own = models(2, Scaled)
    found = gs.fuse(own, x)(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, torch.stack([model(x) for model in own]))


def test_tied_weights_keep_all_their_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.o = nn.Embedding(7, 6, padding_idx=0), nn.Linear(6, 7, bias=False)
            self.o.weight = self.e.weight

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.o(self.e(x))
            return scores

    x = torch.tensor([[0, 1, 2], [3, 0, 6]])
    own = models(K, Tied)
    fused = gs.fuse(own, x)
    assert fused.verify().ok and fused.looped == {}
    for model, state in zip(models(K, Tied), fused.state_dicts(), strict=True):
        assert state["o.weight"].shape == (7, 6)
        model.load_state_dict(state)
    fused.load_models([copy.deepcopy(model) for model in own])
    assert len(pickle.loads(pickle.dumps(fused)).models()) == K


class Named(nn.Module):
    """A look-up, whose offsets need a constant, beside state with the name that constants have."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)
        self.register_buffer("_indices_0", torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.table(x) * self._indices_0)
        return scores


def test_constants_take_no_name_of_the_models() -> None:
    x, own = torch.randint(0, 7, (2, 5)), models(K, Named)
    fused = gs.fuse(own, x)
    assert fused.verify().ok and fused.state_dict().keys() == own[0].state_dict().keys()
    torch.testing.assert_close(fused(x), torch.stack([model(x) for model in own]))


def test_one_tensor_for_all_is_not_overwritten_by_the_last() -> None:
    class Constant(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.l = nn.Linear(3, 3)
            self.register_buffer("scale", torch.full((3,), value))

        def forward(self, x: Tensor) -> Tensor:
            scaled: Tensor = self.l(x) * self.scale
            return scaled

    x = torch.randn(2, 3)
    fused = gs.fuse([Constant(1.0), Constant(1.0)], x)
    with pytest.raises(PlanError, match="scale is one tensor for all models, and model 1 has other values"):
        fused.load_models([Constant(2.0), Constant(5.0)])
    fused.load_models([Constant(2.0), Constant(2.0)])
    own = [Constant(2.0), Constant(5.0)]
    torch.testing.assert_close(gs.fuse(own, x)(x), torch.stack([model(x) for model in own]))


def test_what_is_frozen_is_frozen_in_all() -> None:
    own = models(2)
    own[1].get_parameter("head.bias").requires_grad_(False)
    with pytest.raises(UnsupportedError, match=r"head\.bias is trained in model 0 and frozen in model 1"):
        gs.fuse(own, images())
    own[0].get_parameter("head.bias").requires_grad_(False)
    fused = gs.fuse(own, images())
    assert not fused.get_parameter("head.bias").requires_grad
    fused.get_parameter("head.weight").requires_grad_(False)
    assert not fused.models()[1].get_parameter("head.weight").requires_grad


def test_no_number_is_an_argument_like_others() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.l(x).masked_fill(x[:, :3] > 5, float("nan"))
            return found

    assert gs.fuse(models(2, Masked), torch.randn(2, 4)).verify().ok


# Where sub-models have arguments of their own


class Recurrent(nn.Module):
    """State that forward makes, of which each sub-model takes its units."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.rnn(x)[0][:, -1])
        return scores


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 12)
        for step in range(x.shape[1]):
            h = self.cell(x[:, step], h)
        scores: Tensor = self.head(h)
        return scores


class OfTheInput(nn.Module):
    """A residual of the input, whose features every sub-model sees."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(8, 8), nn.Linear(8, 3), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.b(self.drop(torch.relu(self.a(x) + x)))
        return scores


class Positional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 3)
        self.register_buffer("places", torch.randn(5, 12))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.b(torch.tanh(self.a(x) + self.places))
        return scores


class Tabled(nn.Module):
    """A table that forward makes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(5.0)[:, None] * torch.arange(12.0)[None]
        scores: Tensor = self.b(torch.tanh(self.a(x) + angles.sin()))
        return scores


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        mixed = self.attention(h, h, h, key_padding_mask=x[..., 0] > 1, need_weights=False)[0]
        scores: Tensor = self.b(h + mixed)
        return scores


class Penalty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.a(x))
        gram = h.transpose(1, 2) @ h
        return self.b(h), (gram - torch.eye(12)).square().sum((1, 2))


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)
        self.register_buffer("turns", torch.polar(torch.ones(5, 8), torch.randn(5, 8)))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.view_as_complex(self.a(x).unflatten(-1, (8, 2))) * self.turns
        scores: Tensor = self.b(torch.view_as_real(h).flatten(-2))
        return scores


OWN_ARGUMENTS = [Recurrent, Cell, OfTheInput, Positional, Tabled, Padded, Penalty, Rotary]


def outputs_of(found: Any) -> list[Tensor]:
    return list(found) if isinstance(found, tuple) else [found]


def assert_apart(fused: gs.FusedModule, apart: list[Any], x: Tensor) -> None:
    """Outputs and gradients in float64."""
    fused.double().eval()
    own = [copy.deepcopy(model).double().eval() for model in apart]
    together = outputs_of(fused(x))
    each = [outputs_of(model(x)) for model in own]
    torch.autograd.backward(sum((out.square().sum() for out in together), torch.zeros(())))
    trained = fused.models()
    for number, (model, outputs) in enumerate(zip(own, each, strict=True)):
        torch.autograd.backward(sum((out.square().sum() for out in outputs), torch.zeros(())))
        for ours, theirs in zip(together, outputs, strict=True):
            torch.testing.assert_close(ours[number], theirs, rtol=1e-12, atol=1e-12)
        for name, parameter in model.named_parameters():
            grad = trained[number].get_parameter(name).grad
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("build", OWN_ARGUMENTS)
@pytest.mark.parametrize("k", [2, 4])
def test_sub_models_that_slice_shared_values_are_fused(build: Callable[[], nn.Module], k: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8)
    part = gs.partition(build(), x, k=k)
    fused = part.fuse()
    assert bool(fused.looped) == (build is not Positional)  # slices; a table is dealt out with the units
    certificate = fused.verify()
    assert certificate.ok, certificate
    check(bundle.program_of(fused))
    x = x.double()
    assert_apart(fused, part.submodels, x)
    for number, model in enumerate(fused.models()):
        for ours, theirs in zip(outputs_of(fused(x)), outputs_of(model.eval()(x)), strict=True):
            torch.testing.assert_close(ours[number], theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("build", [Positional, OfTheInput, Recurrent])
def test_with_arguments_of_their_own_too_all_goes_both_ways(
    build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8)
    part = gs.partition(build(), x, k=2)
    fused = part.fuse().eval()
    gs.save(fused, tmp_path / "fused")
    loaded = gs.load(tmp_path / "fused")
    assert isinstance(loaded, gs.FusedModule)
    for other in (loaded, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(other(x), fused(x))
        assert other.verify().ok
        for ours, theirs in zip(other.models(), part.submodels, strict=True):
            torch.testing.assert_close(ours(x), theirs.eval()(x))
    merged = part.merge(loaded.state_dicts()).eval()
    torch.testing.assert_close(merged(x), part.merge().eval()(x))
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    loaded.load_models(part.submodels)
    assert torch.equal(loaded(x), fused(x))
    own_inputs = part.fuse(own_inputs=True).eval()
    assert own_inputs.verify().ok
    torch.testing.assert_close(own_inputs(torch.stack([x, x])), fused(x))
    assert gs.ensemble(part.submodels).verify().ok
    turns = fuse_programs(part.programs, in_turn=True)
    assert certify_fused(turns).ok


def test_indices_of_their_own() -> None:
    """Which are constants of the programs, other ones in each."""
    torch.manual_seed(0)
    x = torch.randn(3, 40)
    model = nn.Sequential(nn.Linear(40, 40), Shifted(40), nn.Linear(40, 3))
    part = gs.partition(model, x, k=2, strategy="random")
    fused = fuse_programs(part.programs)
    assert len({str(own) for own in map(_indices, part.programs)}) == 2
    assert certify_fused(fused).ok
    made = part.fuse()
    assert made.verify().ok
    assert_apart(made, part.submodels, x.double())


class Shifted(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("shift", torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + self.shift + torch.arange(40.0))


def _indices(program: gs.Program) -> list[list[int]]:
    return [entry.tensor.tolist() for entry in program.state.values() if entry.kind == "constant"]


def test_numbers_of_their_own() -> None:
    class Scaled(nn.Module):
        def __init__(self, factor: float, start: int) -> None:
            super().__init__()
            self.l, self.factor, self.start = nn.Linear(8, 3), factor, start

        def forward(self, x: Tensor) -> Tensor:
            h = x.roll(self.start, -1) * self.factor
            scores: Tensor = self.l(h).clamp(min=-self.factor)
            return scores

    torch.manual_seed(0)
    x, own = torch.randn(4, 8), [Scaled(0.5, 1), Scaled(2.0, 3)]
    fused = gs.fuse(own, x)
    assert fused.verify().ok
    assert_apart(fused, own, x.double())


def test_arguments_that_make_other_shapes_are_refused() -> None:
    class Cut(nn.Module):
        def __init__(self, stop: int) -> None:
            super().__init__()
            self.l, self.stop = nn.Linear(8, 6), stop

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.l(x)[:, : self.stop].sum(1)
            return h

    with pytest.raises(UnsupportedError, match=r"model 1 runs slice\.Tensor with other arguments"):
        gs.fuse([Cut(3), Cut(4)], torch.randn(4, 8))
    gs.fuse([Cut(3), Cut(3)], torch.randn(4, 8))


def test_the_command_line_fuses_sub_models_with_arguments_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        "import torch\nfrom torch import nn\ntorch.manual_seed(0)\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)\n"
        "    def forward(self, x):\n"
        "        return self.b(torch.relu(self.a(x)) + x)\n"
        "model, example_inputs = Net(), torch.randn(2, 8)\n"
    )
    done = run("fuse", tmp_path / "model.py", "-o", tmp_path / "fused")
    assert done.exit_code == 0, done.stderr
    assert "run once for each sub-model: slice.Tensor" in done.stdout
    verified = run("verify", tmp_path / "fused")
    assert verified.exit_code == 0, verified.stderr


class Called(nn.Module):
    """A layer and a parameter under names of the user's choice."""

    def __init__(self, layer: str, parameter: str) -> None:
        super().__init__()
        self.names = layer, parameter
        setattr(self, layer, nn.Linear(4, 6))
        setattr(self, parameter, nn.Parameter(torch.randn(6)))
        self.register_buffer("graph", torch.randn(6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        layer, parameter = self.names
        h = torch.relu(getattr(self, layer)(x)) * getattr(self, parameter) + self.graph
        scores: Tensor = self.head(h)
        return scores


@pytest.mark.parametrize(
    ("layer", "parameter"),
    [("k", "looped"), ("looped", "k"), ("in_turn", "cost"), ("cost", "_same"), ("_single", "_singles")],
)
def test_parts_of_the_models_may_be_called_as_what_the_module_knows(
    layer: str, parameter: str, tmp_path: Path
) -> None:
    x = torch.randn(3, 4)
    own = [model.eval() for model in models(K, lambda: Called(layer, parameter))]
    expected = torch.stack([model(x) for model in own])
    fused = gs.fuse(own, x).eval()
    gs.save(fused, tmp_path / "fused")
    for found in (
        fused,
        copy.deepcopy(fused),
        pickle.loads(pickle.dumps(fused)),
        gs.load(tmp_path / "fused"),
    ):
        assert isinstance(found, gs.FusedModule)
        assert found.state_dict().keys() == own[0].state_dict().keys()
        assert found.get_parameter(f"{layer}.weight").shape == (K * 6, 4)
        torch.testing.assert_close(found(x), expected)
        assert found.verify().ok
        assert len(found.models()) == len(found.state_dicts()) == K
        found.load_models(own)
        torch.testing.assert_close(found(x), expected)
        torch.testing.assert_close(copy.deepcopy(found).double()(x.double()).float(), expected)
    assert fused.state_dict()[parameter].data_ptr() == getattr(fused, parameter).data_ptr()
    team = gs.ensemble(own, args=x)
    torch.testing.assert_close(team.eval()(x), expected.mean(0))
    assert gs.fuse(own, x, auto=True).verify().ok


def test_what_the_module_knows_of_itself() -> None:
    fused = gs.fuse(models(), images())
    assert (fused.k, fused.looped, fused.in_turn, fused.cost) == (K, {}, False, None)
    with pytest.raises(UserError, match="a part called state_dicts"):
        gs.fuse(models(2, lambda: Called("state_dicts", "w")), torch.randn(3, 4))


# Bad input


def test_what_cannot_be_fused_is_named() -> None:
    with pytest.raises(PartitionError, match="no models to fuse"):
        gs.fuse([], images())
    torch.manual_seed(0)
    uneven = gs.partition(Net(), images(), shares=(3, 1))
    with pytest.raises(
        UnsupportedError, match=r"conv.weight is float32\[6, 3, 3, 3\] in model 0 and float32\[2"
    ):
        uneven.fuse()
    relu, tanh = (nn.Sequential(nn.Linear(4, 3), act) for act in (nn.ReLU(), nn.Tanh()))
    with pytest.raises(UnsupportedError, match=r"model 1 runs tanh.* where model 0 runs relu"):
        gs.fuse([relu, tanh], torch.randn(2, 4))
    other = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))
    with pytest.raises(UnsupportedError, match=r"only one of them has 2\.bias"):
        gs.fuse([relu, other], torch.randn(2, 4))


def test_the_command_line_fuses_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        "import torch\nfrom torch import nn\ntorch.manual_seed(0)\n"
        "model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))\nexample_inputs = torch.randn(2, 6)\n"
    )
    assert run("partition", tmp_path / "model.py", "-o", tmp_path / "out").exit_code == 0
    done = run("fuse", tmp_path / "out", "-o", tmp_path / "fused")
    assert done.exit_code == 0, done.stderr
    assert "2 sub-models" in done.stdout and "all checks hold" in done.stdout
    assert run("draw", tmp_path / "fused", "-o", tmp_path / "fused.svg").exit_code == 0
    assert "Sequential.fused2" in (tmp_path / "fused.svg").read_text()
    verified = run("verify", tmp_path / "fused")
    assert verified.exit_code == 0 and "2 models as one" in verified.stdout
    part, fused = gs.load(tmp_path / "out"), gs.load(tmp_path / "fused")
    assert isinstance(part, gs.Partition) and isinstance(fused, gs.FusedModule)
    x = torch.randn(5, 6)
    expected = torch.stack([model(x) for model in part.submodels])
    torch.testing.assert_close(fused(x), expected)


def test_the_command_line_measures(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        "import torch\nfrom torch import nn\ntorch.manual_seed(0)\n"
        "model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))\nexample_inputs = torch.randn(2, 6)\n"
    )
    done = run("fuse", tmp_path / "model.py", "--auto", "-o", tmp_path / "fused", "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["in_turn"] == (report["seconds"]["fused"] >= report["seconds"]["in_turn"])
    loaded = gs.load(tmp_path / "fused")
    assert isinstance(loaded, gs.FusedModule) and loaded.in_turn == report["in_turn"]


@pytest.mark.slow
def test_the_example_trains_all_at_once() -> None:
    errors = script("train_fused").main(["--epochs", "2", "--rates", "0.01", "0.03"])
    assert len(errors) == 2 and max(errors) < 0.3
