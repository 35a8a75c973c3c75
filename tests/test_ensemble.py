"""Ensembles: the weighted sum of what the members give, and never a larger loss than their mean."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import graphsplit as gs
from graphsplit.ensembles import combined, margin_weights, weighted
from graphsplit.errors import BundleError, InputError, PlanError, UserError
from graphsplit.passes import Pipeline
from graphsplit.program import check
from laws import run
from zoo import traced

K = 3


def net(width: int = 8, outputs: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, outputs)
    )


def models(*widths: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [net(width) for width in widths or (8,) * K]


def batch(size: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 6, generator=generator), torch.randint(0, 3, (size,), generator=generator)


# The output


@pytest.mark.parametrize("widths", [(8, 8, 8), (8, 5, 3)], ids=["fused", "in turn"])
@pytest.mark.parametrize("average", ["outputs", "probabilities"])
@pytest.mark.parametrize("traced", [True, False])
def test_it_gives_the_weighted_sum(
    widths: tuple[int, ...], average: gs.ensembles.Average, traced: bool
) -> None:
    own, weights, (x, _) = models(*widths), [0.5, 0.3, 0.2], batch(7)
    team = gs.ensemble(own, weights, x[:4] if traced else (), average=average).eval()
    assert team.fused == (traced and len(set(widths)) == 1)
    scores = [model.eval()(x) for model in own]
    if average == "outputs":
        expected = sum(w * s for w, s in zip(weights, scores, strict=True))
    else:
        expected = torch.log(sum(w * s.softmax(1) for w, s in zip(weights, scores, strict=True)))  # type: ignore[arg-type]
    torch.testing.assert_close(team(x), expected)
    if traced:
        certificate = team.verify()
        assert certificate.ok and certificate.max_error < 1e-12, certificate
        check(team.program())
        torch.testing.assert_close(gs.emit(team.program()).eval()(x), team(x))


SOME = ["lenet", "resnet_basic", "shufflenet_v2", "llama_two_kv_heads", "hub_bert", "hub_t5", "detr"]


@pytest.mark.parametrize("name", SOME)
def test_the_zoo(name: str) -> None:
    program = traced(name)
    team = gs.ensemble([program, program], [0.7, 0.6])
    certificate = team.verify()
    assert certificate.ok and certificate.max_error < 1e-11, certificate
    check(team.program())


def test_models_are_not_changed_and_members_are_its_own() -> None:
    own, (x, y) = models(), batch()
    before = copy.deepcopy([model.state_dict() for model in own])
    team = gs.ensemble(own, args=x)
    optimizer = torch.optim.SGD(team.parameters(), lr=0.1)
    F.cross_entropy(team(x), y).backward()
    optimizer.step()
    for model, state in zip(own, before, strict=True):
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    moved = team.members[1].state_dict()["0.weight"]
    assert not torch.equal(moved, before[1]["0.weight"])


def test_submodels_of_unlike_shares_are_members() -> None:
    x, _ = batch()
    part = gs.partition(net(12), x, shares=(3, 1))
    team = gs.ensemble(part.submodels).eval()
    assert not team.fused and team.verify().ok
    expected = sum(model.eval()(x) for model in part.submodels) / 2
    torch.testing.assert_close(team(x), expected)
    even = gs.ensemble(gs.partition(net(12), x, k=2).submodels)
    assert even.fused and even.verify().ok


class Several(nn.Module):
    """Scores, what they came from, and a whole number."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor | tuple[Tensor, ...]]:
        h = torch.relu(self.hidden(x))
        scores = self.head(h)
        return {"scores": scores, "rest": (h, scores.argmax(1))}


@pytest.mark.parametrize("traced", [True, False])
def test_outputs_keep_their_nesting_and_whole_numbers_are_the_first_members(traced: bool) -> None:
    torch.manual_seed(0)
    own, (x, _) = [Several(), Several()], batch()
    found = gs.ensemble(own, args=x if traced else ())(x)
    first, second = (model(x) for model in own)
    torch.testing.assert_close(found["scores"], (first["scores"] + second["scores"]) / 2)
    torch.testing.assert_close(found["rest"][0], (first["rest"][0] + second["rest"][0]) / 2)
    assert torch.equal(found["rest"][1], first["rest"][1])


def test_it_compiles_moves_and_copies() -> None:
    x, _ = batch()
    team = gs.ensemble(models(), args=x).eval()
    torch.testing.assert_close(torch.compile(team, fullgraph=True, backend="eager")(x), team(x))
    wide = copy.deepcopy(team).double()
    torch.testing.assert_close(wide(x.double()).float(), team(x))
    other = gs.ensemble(models(), args=x).eval()
    other.load_state_dict(team.state_dict())
    assert torch.equal(other(x), team(x))


# Theory: Jensen's inequality (the guarantee of EC-DNN)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda scores, y: F.cross_entropy(scores, y, reduction="none"),
    "mse": lambda scores, y: (scores - F.one_hot(y, 3)).square().mean(1),
    "absolute": lambda scores, y: (scores - F.one_hot(y, 3)).abs().mean(1),
    "hinge": lambda scores, y: F.multi_margin_loss(scores, y, reduction="none"),
}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.sampled_from(sorted(LOSSES)), st.floats(0.1, 30))
def test_the_loss_is_never_above_the_mean_loss_of_the_members(
    seed: int, k: int, loss: str, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs = scale * torch.randn(k, 9, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (9,), generator=generator)
    weights = torch.rand(k, generator=generator, dtype=torch.float64) + 1e-3
    weights /= weights.sum()
    each = torch.stack([LOSSES[loss](scores, y) for scores in outputs])
    found = LOSSES[loss](combined(outputs, weights, "outputs"), y)
    assert bool((found <= (weights[:, None] * each).sum(0) + 1e-9).all())
    own = margin_weights(outputs, y)
    found = LOSSES[loss](combined(outputs, own, "outputs"), y)
    assert bool((found <= (own * each).sum(0) + 1e-9).all())
    if loss == "cross_entropy":
        found = LOSSES[loss](combined(outputs, weights, "probabilities"), y)
        assert bool((found <= (weights[:, None] * each).sum(0) + 1e-9).all())


def test_of_trained_models_too() -> None:
    """In float32, through the module; a loss that is not convex breaks the bound."""
    x, y = batch(64)
    own = models()
    for model in own:
        gs.train.fit(model, torch.optim.Adam(model.parameters(), 0.05), F.cross_entropy, [(x, y)], 20)
    team = gs.ensemble(own, args=x).eval()
    each = torch.stack([F.cross_entropy(model.eval()(x), y, reduction="none") for model in own]).mean(0)
    assert bool((F.cross_entropy(team(x), y, reduction="none") <= each + 1e-6).all())

    def saturating(scores: Tensor) -> Tensor:
        return (scores - F.one_hot(y, 3)).square().sum(1).sqrt().sqrt()

    broken = saturating(team(x)) > torch.stack([saturating(model(x)) for model in own]).mean(0) + 1e-6
    assert bool(broken.any())


# Weights


def test_regression_is_least_squares() -> None:
    own, (x, _) = models(), batch(40)
    targets = torch.randn(40, 3, generator=torch.Generator().manual_seed(9))
    data = [(x[:25], targets[:25]), (x[25:], targets[25:])]
    team = gs.ensemble(own, "regression", x, data=data)
    outputs = torch.stack([model.eval()(x) for model in own]).double().flatten(1)
    expected = np.linalg.lstsq(outputs.T.detach().numpy(), targets.double().flatten().numpy(), rcond=None)[0]
    np.testing.assert_allclose(team.weights.numpy(), expected, rtol=1e-4)
    simple = gs.ensemble(own, args=x).eval()
    assert F.mse_loss(team.eval()(x), targets) < F.mse_loss(simple(x), targets)
    assert team.rule == "regression"


def test_regression_on_classes_and_probabilities() -> None:
    own, (x, y) = models(), batch(40)
    team = gs.ensemble(own, "regression", x, data=[(x, y)])
    outputs = torch.stack([model.eval()(x) for model in own]).double().flatten(1)
    hot = F.one_hot(y, 3).double().flatten()
    expected = np.linalg.lstsq(outputs.T.detach().numpy(), hot.numpy(), rcond=None)[0]
    np.testing.assert_allclose(team.weights.numpy(), expected, rtol=1e-4)
    positive = gs.ensemble(own, "regression", x, data=[(x, y)], average="probabilities").eval()
    assert bool((positive.weights >= 0).all()) and torch.isfinite(positive(x)).all()


def test_equal_members_share_their_weight() -> None:
    x, y = batch(40)
    (one,) = models(8)
    team = gs.ensemble([one, one], "regression", x, data=[(x, y)])
    torch.testing.assert_close(team.weights[0], team.weights[1])


def test_margins_weigh_each_example_in_training_alone() -> None:
    own, (x, y) = models(), batch()
    team = gs.ensemble(own, "margin", x)
    assert team.weights.tolist() == pytest.approx([1 / K] * K)
    scores = torch.stack([model.eval()(x) for model in own])
    torch.testing.assert_close(team.eval().for_targets(y, x), scores.mean(0))
    team.train()
    for module in team.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    weights = margin_weights(scores, y)
    torch.testing.assert_close(weights.sum(0), torch.ones(5))
    probabilities = scores.softmax(2)
    true = probabilities[:, torch.arange(5), y]
    other = (probabilities - F.one_hot(y, 3)).amax(2)  # the true class is below zero there
    torch.testing.assert_close(weights, (true - other).softmax(0))
    quiet = gs.ensemble([nn.Linear(6, 3), nn.Linear(6, 3)], "margin").train()
    outputs = quiet.outputs(x)
    expected = (margin_weights(outputs, y)[..., None] * outputs).sum(0)
    torch.testing.assert_close(quiet.for_targets(y, x), expected)
    assert not torch.allclose(quiet.for_targets(y, x), quiet(x))


def test_margins_of_sequences_are_means_over_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, y = torch.randn(2, 4, 7, 5, generator=generator), torch.randint(0, 5, (4, 7), generator=generator)
    weights = margin_weights(scores, y)
    assert weights.shape == (2, 4)
    torch.testing.assert_close(weights.sum(0), torch.ones(4))


# Bad input


def test_bad_input() -> None:
    own, (x, _) = models(), batch()
    with pytest.raises(PlanError, match="no models"):
        gs.ensemble([])
    with pytest.raises(PlanError, match=r"shape \(2,\) for 3 models"):
        gs.ensemble(own, [0.5, 0.5])
    with pytest.raises(UserError, match=r"no weights 'best'.*simple, regression, margin"):
        gs.ensemble(own, "best")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="need data"):
        gs.ensemble(own, "regression", x)
    with pytest.raises(UserError, match="there was none"):
        gs.ensemble(own, "regression", x, data=[])
    with pytest.raises(UserError, match="finite"):
        gs.ensemble(own, [1.0, float("nan"), 0.0])
    with pytest.raises(UserError, match="cannot be negative"):
        gs.ensemble(own, [1.5, -0.5, 0.0], average="probabilities")
    with pytest.raises(UserError, match="average is 'median'"):
        gs.ensemble(own, average="median")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="whole numbers"):
        gs.ensemble(own, "margin").train().for_targets(torch.rand(5, 3), x)
    with pytest.raises(UserError, match=r"targets .* do not fit"):
        gs.ensemble(own, "regression", x, data=[(x, torch.rand(5, 4))])


def test_outputs_of_different_shapes_are_named() -> None:
    x, _ = batch()
    own = [net(8), net(8, outputs=4)]
    with pytest.raises(InputError, match=r"model 1 gives float32\[.*4\], and model 0 float32\[.*3\]"):
        gs.ensemble(own, args=x)
    with pytest.raises(InputError, match=r"model 1 gives \(5, 4\) where model 0 gives \(5, 3\)"):
        gs.ensemble(own)(x)
    with pytest.raises(InputError, match="model 1 takes"):
        gs.ensemble([gs.trace(nn.Linear(6, 3), x), gs.trace(nn.Linear(5, 3), x[:, :5])])


@pytest.mark.parametrize("given", [(torch.ones(4, 6),), {"input": torch.ones(6)}, None, ["a", "b"], [1j, 1]])
def test_weights_that_are_no_numbers(given: object) -> None:
    with pytest.raises(UserError, match=r"no list of real numbers.*example inputs are args="):
        gs.ensemble(models(8, 8), given)  # type: ignore[call-overload,arg-type,unused-ignore]


def test_inputs_that_were_given_as_weights_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="a tensor of sum 3 is taken as weights; example inputs are args="):
        gs.ensemble(models(8, 8), torch.tensor([1.0, 2.0]))


class Giving(nn.Module):
    """Gives its scores in a class of its own, or with something beside them."""

    def __init__(self, rest: object) -> None:
        super().__init__()
        self.head, self.rest = nn.Linear(6, 3), rest

    def forward(self, x: Tensor) -> object:
        scores = self.head(x)
        return Boxed(scores) if self.rest is Boxed else (scores, x if self.rest is Tensor else self.rest)


@dataclasses.dataclass
class Boxed:
    """Is no tuple, list or mapping."""

    scores: Tensor


def test_outputs_that_cannot_be_averaged_are_refused() -> None:
    """They were those of the first member alone."""
    x, _ = batch()
    with pytest.raises(UserError, match=r"no tensor of real or complex numbers to average: Boxed"):
        gs.ensemble([Giving(Boxed), Giving(Boxed)])(x)
    with pytest.raises(UserError, match=r"no tensor of real or complex numbers"):
        gs.ensemble([Winner(), Winner()], args=x)
    for one, two, text in [
        (3, Tensor, r"model 1 gives \(5, 6\) where model 0 gives int"),
        (Tensor, None, r"model 1 gives NoneType where model 0 gives \(5, 6\)"),
    ]:
        with pytest.raises(InputError, match=text):
            gs.ensemble([Giving(one), Giving(two)])(x)


class Winner(nn.Module):
    """Gives the class, and no scores."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).argmax(1)


class InPlace(nn.Module):
    """Changes its input."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(x, inplace=True))


def test_members_that_change_their_inputs_have_copies() -> None:
    torch.manual_seed(0)
    own, (x, _) = [InPlace(), InPlace()], batch()
    before = x.clone()
    expected = sum(model.head(F.silu(x)) for model in own) / 2
    torch.testing.assert_close(gs.ensemble(own)(x), expected)
    assert torch.equal(x, before)


def test_what_was_not_traced_is_not_proved_nor_written(tmp_path: Path) -> None:
    team = gs.ensemble(models())
    for use in (
        team.verify,
        lambda: gs.save(team, tmp_path / "a"),
        lambda: gs.export_onnx(team, tmp_path / "b.onnx"),
    ):
        with pytest.raises(UserError, match=r"not traced.*args=x"):
            use()


def test_a_certificate_sees_a_wrong_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = batch()
    team = gs.ensemble(models(), args=x)
    monkeypatch.setattr("graphsplit.ensembles.weighted", lambda p, w, a: weighted(p, w.flip(0) + 0.1, a))
    assert not team.verify().ok


# Files


@pytest.mark.parametrize("widths", [(8, 8, 8), (8, 5, 3)], ids=["fused", "in turn"])
@pytest.mark.parametrize("average", ["outputs", "probabilities"])
def test_bundle_and_onnx(tmp_path: Path, widths: tuple[int, ...], average: gs.ensembles.Average) -> None:
    x, _ = batch()
    team = gs.ensemble(models(*widths), [0.5, 0.3, 0.2], x, average=average).eval()
    gs.save(team, tmp_path / "out")
    found = gs.load(tmp_path / "out")
    assert isinstance(found, gs.Ensemble) and found.fused == team.fused and found.rule == "given"
    assert torch.equal(found(x), team(x)) and not found.training
    report = gs.export_onnx(team, tmp_path / "team.onnx")["team.onnx"]
    assert all(row.absolute <= row.tolerance for row in report.rows)
    session = onnxruntime.InferenceSession(tmp_path / "team.onnx", providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {session.get_inputs()[0].name: batch(9)[0].numpy()})
    torch.testing.assert_close(torch.from_numpy(scores), team(batch(9)[0]), rtol=1e-4, atol=1e-5)
    manifest = tmp_path / "out" / "member_1.safetensors"
    manifest.write_bytes(manifest.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"member_1.safetensors is truncated"):
        gs.load(tmp_path / "out")


def test_it_is_drawn(tmp_path: Path) -> None:
    gs.draw(gs.ensemble(models(), args=batch()[0]), tmp_path / "team.svg")
    assert (tmp_path / "team.svg").read_text().startswith("<svg")


# The pass


def test_pass() -> None:
    x, _ = batch()
    program = gs.trace(net(12), x)
    (found,) = Pipeline.parse("partition(k=2) | ensemble")(program).items
    parts = gs.partition(program, k=2).submodels
    torch.testing.assert_close(gs.emit(found).eval()(x), sum(part.eval()(x) for part in parts) / 2)
    (heavy,) = Pipeline.parse("partition(k=2) | ensemble(weights=(1.0, 0.0))")(program).items
    torch.testing.assert_close(gs.emit(heavy).eval()(x), parts[0].eval()(x))
    with pytest.raises(PlanError, match="3 weights for 2 models"):
        Pipeline.parse("partition(k=2) | ensemble(weights=(1, 2, 3))")(program)
    with pytest.raises(PlanError, match="layer groups"):
        Pipeline.parse("layer-groups(n=2) | ensemble")(program)


# The command


MODEL = """
import torch
from torch import nn

torch.manual_seed({seed})
model = nn.Sequential(nn.Linear(6, {width}), nn.ReLU(), nn.Linear({width}, 3))
example_inputs = torch.randn(2, 6)
"""


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    found = []
    for number, width in enumerate((8, 8, 5)):
        path = tmp_path / f"model_{number}.py"
        path.write_text(MODEL.format(seed=number, width=width))
        found.append(path)
    return found


def test_command(files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("ensemble", *files, "--weights", "0.5,0.3,0.2", "--onnx", "-o", out)
    assert done.exit_code == 0, done.stderr
    assert "3 models of 219 parameters in all, one after the other" in done.stdout
    assert "0.5, 0.3, 0.2" in done.stdout and "Certificate: all checks hold" in done.stdout
    team = gs.load(out)
    assert isinstance(team, gs.Ensemble)
    x = batch()[0]
    own = [gs.load_model(str(path)).model for path in files]
    expected = sum(w * model.eval()(x) for w, model in zip((0.5, 0.3, 0.2), own, strict=True))
    torch.testing.assert_close(team(x), expected)
    assert (out / "ensemble.onnx").is_file()
    again = run("verify", out)
    assert again.exit_code == 0 and "an ensemble of 3" in again.stdout
    exported = run("export", out, "-o", tmp_path / "onnx")
    assert exported.exit_code == 0 and (tmp_path / "onnx" / "ensemble.onnx").is_file()
    drawn = run("draw", out, "-o", tmp_path / "team.svg")
    assert drawn.exit_code == 0, drawn.stderr


def test_command_takes_bundles(files: list[Path], tmp_path: Path) -> None:
    part = tmp_path / "part"
    assert run("partition", files[0], "-k", 2, "-o", part).exit_code == 0
    gs.save(gs.trace(net(8).eval(), torch.randn(2, 6)), tmp_path / "one")
    done = run(
        "ensemble",
        part,
        tmp_path / "one",
        files[1],
        "--average",
        "probabilities",
        "--json",
        "-o",
        tmp_path / "o",
    )
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["k"] == 4 and report["certificate"]["ok"] and report["average"] == "probabilities"
    nested = json.loads(run("ensemble", tmp_path / "o", "--json", "-o", tmp_path / "p").stdout)
    assert nested["k"] == 4


def test_command_keeps_the_weights_of_an_ensemble(files: list[Path], tmp_path: Path) -> None:
    """It is one member, as in Python; alone it is opened, and is what it was unless something else is asked for."""
    team = tmp_path / "team"
    options = ("--weights", "0.2,0.3,0.5", "--average", "probabilities", "--json", "-o")
    assert run("ensemble", *files, *options, team).exit_code == 0
    done = run("ensemble", team, files[0], "--weights", "0.75,0.25", "--json", "-o", tmp_path / "two")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["weights"] == [0.75, 0.25] and report["k"] == 2 and report["certificate"]["ok"]
    inner, both = gs.load(team), gs.load(tmp_path / "two")
    x = torch.randn(4, 6)
    alone = gs.load(tmp_path / "two").members[1]
    torch.testing.assert_close(both(x), 0.75 * inner(x) + 0.25 * alone(x))
    again = json.loads(run("ensemble", team, "--json", "-o", tmp_path / "again").stdout)
    assert again["weights"] == pytest.approx([0.2, 0.3, 0.5]) and again["average"] == "probabilities"
    other = run(
        "ensemble", team, "--weights", "1,1,2", "--average", "outputs", "--json", "-o", tmp_path / "other"
    )
    assert json.loads(other.stdout)["weights"] == [1.0, 1.0, 2.0]
    assert json.loads(other.stdout)["average"] == "outputs"


def test_command_ends_with_a_sentence(files: list[Path], tmp_path: Path) -> None:
    done = run("ensemble", *files, "--weights", "a,b", "-o", tmp_path / "o")
    assert done.exit_code == 2 and "expected numbers" in done.stderr
    done = run("ensemble", *files, "--weights", "1,2", "-o", tmp_path / "o")
    assert done.exit_code == 6 and "for 3 models" in done.stderr
    groups = tmp_path / "groups"
    assert run("critics", files[0], "--at", "2", "-o", groups).exit_code == 0
    done = run("ensemble", groups, "-o", tmp_path / "o")
    assert done.exit_code == 6 and "layer groups" in done.stderr
    assert not (tmp_path / "o").exists()


def test_the_command_takes_what_outputs_are_and_pruned_members(tmp_path: Path) -> None:
    file = tmp_path / "model.py"
    file.write_text(
        "import torch\nfrom torch import nn\nmodel = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1))\n"
        "example_inputs = torch.randn(3, 5)\n"
    )
    done = run("prune-units", file, "-o", tmp_path / "small")
    assert done.exit_code == 0, done.stderr
    call = ("ensemble", file, tmp_path / "small", "--average", "probabilities")
    done = run(*call, "-o", tmp_path / "team")
    assert done.exit_code != 0 and "answers='binary'" in done.stderr
    done = run(*call, "-o", tmp_path / "team", "--answers", "binary")
    assert done.exit_code == 0, done.stderr
    team, x = gs.load(tmp_path / "team"), torch.randn(4, 5)
    assert isinstance(team, gs.ensembles.Ensemble) and team.k == 2
    mean = sum(member.eval()(x).sigmoid() for member in team.members) / 2
    torch.testing.assert_close(team.eval()(x).sigmoid(), mean)
    assert run("verify", tmp_path / "team").exit_code == 0
