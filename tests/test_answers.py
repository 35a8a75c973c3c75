"""What outputs mean: told by targets, by shapes, or by the user; and what is made of them."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphsplit as gs
from graphsplit.answers import Answers, answers_by_shape, answers_for, probabilities
from graphsplit.ensembles import LeastSquares, combined, margin_weights
from graphsplit.errors import UserError
from graphsplit.passes import Pipeline
from graphsplit.train import misclassified


def scores(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(count: int, *shape: int) -> Tensor:
    return torch.randint(0, count, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("shape", "targets", "expected"),
    [
        ((5, 3), classes(3, 5), "classes"),
        ((5, 3), classes(3, 5).int(), "classes"),
        ((5, 3, 7), classes(3, 5, 7), "classes"),
        ((5, 7, 3), classes(3, 5, 7), "classes_last"),
        ((5, 3, 4, 4), classes(3, 5, 4, 4), "classes"),
        ((5, 4, 6, 3), classes(3, 5, 4, 6), "classes_last"),
        ((5, 1), classes(2, 5, 1), "binary"),
        ((5, 3), classes(2, 5, 3).bool(), "binary"),
        ((5,), classes(2, 5), "binary"),
        ((5, 3), scores(5, 3), "values"),
        ((5, 1), scores(5), "values"),
        ((5, 3), {"boxes": scores(5, 4)}, "values"),
    ],
)
def test_targets_tell(shape: tuple[int, ...], targets: Any, expected: Answers) -> None:
    assert answers_for(scores(*shape), targets) == expected


@pytest.mark.parametrize(
    ("shape", "targets", "text"),
    [
        ((5, 7, 7), classes(7, 5, 7), r"dimension 1 or in the last one.*answers='classes_last'"),
        ((5, 3), classes(3, 5, 1), r"targets \(5, 1\) do not fit scores \(5, 3\)"),
        ((35, 3), classes(3, 5, 7), "do not fit scores"),
        ((5, 1), classes(2, 5), r"single class.*answers='binary'"),
        ((5, 3), classes(9, 5, 3), r"not only 0 and 1.*answers='values'"),
    ],
)
def test_targets_that_leave_it_open(shape: tuple[int, ...], targets: Tensor, text: str) -> None:
    with pytest.raises(UserError, match=text):
        answers_for(scores(*shape), targets)


def test_shapes_tell_without_targets() -> None:
    assert answers_by_shape((5, 3)) == answers_by_shape((5, 3, 8, 8)) == "classes"
    for shape, text in [
        ((5, 3, 7), "dimension 1 or in the last one"),
        ((5, 1), "single class"),
        ((5,), "no dimension of classes"),
    ]:
        with pytest.raises(UserError, match=text):
            answers_by_shape(shape)


def test_probabilities_of_each_kind() -> None:
    found = scores(4, 3, 5)
    for kind, dim in (("classes", 1), ("classes_last", 2)):
        assert torch.equal(probabilities(found, kind), found.softmax(dim))  # type: ignore[arg-type]
    assert torch.equal(probabilities(found, "binary"), found.sigmoid())
    assert probabilities(found, "values") is found


# Averages


@pytest.mark.parametrize("kind", ["classes", "classes_last", "binary"])
def test_probabilities_are_averaged_by_their_formula(kind: Answers) -> None:
    """Also gradients; of yes or no the logarithm of the odds."""
    outputs, weights = scores(3, 4, 5, 6).requires_grad_(), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    mean = sum(w * probabilities(own, kind) for w, own in zip(weights, outputs, strict=True))
    assert isinstance(mean, Tensor)
    expected = torch.log(mean / (1 - mean)) if kind == "binary" else mean.log()
    found = combined(outputs, weights, kind)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    seeds = scores(4, 5, 6, seed=3)
    gradients = [
        torch.autograd.grad((value * seeds).sum(), outputs, retain_graph=True)[0]
        for value in (found, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_odds_of_sure_members_are_finite() -> None:
    found = combined(
        torch.tensor([[200.0], [300.0]], dtype=torch.float64), torch.tensor([0.5, 0.5]), "binary"
    )
    torch.testing.assert_close(found, torch.tensor([200 + math.log(2)], dtype=torch.float64))


def test_masked_scores_stay_masked() -> None:
    """Scores of minus infinity: a gradient of zero, and no part of a member of weight zero."""
    outputs = scores(2, 4, 3)
    outputs[:, :, 2] = -math.inf
    outputs[0, :, 1] = -math.inf
    outputs.requires_grad_()
    found = combined(outputs, torch.tensor([0.4, 0.6]), "probabilities")
    assert bool((found[:, 2] == -math.inf).all()) and bool(found[:, :2].isfinite().all())
    F.cross_entropy(found, torch.tensor([0, 1, 0, 1])).backward()
    assert (
        outputs.grad is not None and bool(outputs.grad.isfinite().all()) and bool(outputs.grad[:, :, 0].any())
    )
    only = combined(outputs, torch.tensor([0.0, 1.0]), "outputs")
    assert torch.equal(only, outputs[1])


# Weights


def test_margins_of_yes_and_no_and_of_both_layouts() -> None:
    found, y = scores(2, 4, 6), classes(2, 4, 6)
    chance = found.sigmoid()
    margins = torch.where(y.bool(), 2 * chance - 1, 1 - 2 * chance).mean(2)
    torch.testing.assert_close(margin_weights(found, y), margins.softmax(0))
    found, y = scores(2, 4, 5, 7), classes(5, 4, 7)
    torch.testing.assert_close(margin_weights(found, y), margin_weights(found.movedim(2, 3), y))
    same, y = scores(2, 4, 5, 5), classes(5, 4, 5)
    first, last = (margin_weights(same, y, kind) for kind in ("classes", "classes_last"))  # type: ignore[arg-type]
    assert not torch.allclose(first, last)
    torch.testing.assert_close(first, margin_weights(same.movedim(2, 3), y, "classes_last"))
    with pytest.raises(UserError, match="may be in dimension 1"):
        margin_weights(same, y)


def test_positions_that_do_not_count() -> None:
    found, y = scores(2, 4, 7, 5), classes(5, 4, 7)
    y[:, 4:] = -100
    torch.testing.assert_close(margin_weights(found, y), margin_weights(found[:, :, :4], y[:, :4]))
    assert margin_weights(found, torch.full((4, 7), -100)).unique().tolist() == [0.5]
    whole, part = LeastSquares(2, "outputs"), LeastSquares(2, "outputs")
    whole.add(found, y)
    part.add(found[:, :, :4], y[:, :4])
    torch.testing.assert_close(whole.weights(), part.weights())
    for use in (lambda t: margin_weights(found, t), lambda t: LeastSquares(2, "outputs").add(found, t)):
        for wrong in (-1, 5):
            with pytest.raises(UserError, match=rf"targets name class {wrong} of 5"):
                use(torch.full((4, 7), wrong))


@pytest.mark.parametrize("average", ["outputs", "probabilities"])
def test_regression_of_both_layouts(average: gs.ensembles.Average) -> None:
    found, y = scores(3, 6, 5, 7), classes(5, 6, 7)
    first, last = LeastSquares(3, average), LeastSquares(3, average)
    first.add(found, y)
    last.add(found.movedim(2, 3), y.to(torch.int32))
    torch.testing.assert_close(first.weights(), last.weights())
    assert (first.answers, last.answers) == ("classes", "classes_last")
    if average == "probabilities":
        vectors = found.softmax(2).flatten(1)
        hot = F.one_hot(y, 5).movedim(2, 1).double().flatten()
        expected = torch.linalg.lstsq(vectors.T, hot[:, None]).solution[:, 0]
        if bool((expected > 0).all()):
            torch.testing.assert_close(first.weights(), expected)


def test_regression_of_yes_and_no() -> None:
    found, y = scores(2, 9, 1), classes(2, 9, 1)
    own = LeastSquares(2, "probabilities")
    own.add(found, y)
    other = LeastSquares(2, "probabilities", "binary")
    other.add(found, y.double())
    torch.testing.assert_close(own.weights(), other.weights())
    vectors = found.sigmoid().flatten(1)
    torch.testing.assert_close(own.products, vectors @ vectors.T)


def test_numbers_that_are_not_finite_have_no_weights() -> None:
    found, y = scores(2, 6, 3), scores(6, 3, seed=2).abs()
    for average in ("outputs", "probabilities"):
        broken = found.clone()
        broken[1, 0, 0] = math.nan
        for outputs, targets, text in [
            (broken, y, "model 1 gives numbers .* not finite"),
            (found, y / 0, "targets of the regression are not all finite"),
        ]:
            own = LeastSquares(2, average)  # type: ignore[arg-type]
            own.add(outputs, targets)
            with pytest.raises(UserError, match=text):
                own.weights()
    below = LeastSquares(2, "probabilities")
    below.add(found, -y)
    with pytest.raises(UserError, match=r"all weights would be zero.*average='outputs'"):
        below.weights()
    with pytest.raises(UserError, match="complex"):
        LeastSquares(2, "outputs").add(found.to(torch.complex128), y)
    with pytest.raises(UserError, match="targets are a dict"):
        LeastSquares(2, "outputs").add(found, {"y": y})  # type: ignore[arg-type]


# The error


def test_misclassified_in_every_layout() -> None:
    y = classes(5, 4, 7)
    right = F.one_hot(y, 5).double()
    wrong = right.clone()
    wrong[0] = wrong[0].roll(1, -1)
    for found, all_right in ((wrong, right), (wrong.movedim(2, 1), right.movedim(2, 1))):
        assert misclassified(found, y) == 0.25 and misclassified(all_right, y) == 0
    y[1:, :] = -100
    assert misclassified(wrong, y) == 1
    same = F.one_hot(classes(5, 4, 5), 5).double()
    last = partial(misclassified, answers="classes_last")
    assert last(same, classes(5, 4, 5)) == 0
    with pytest.raises(UserError, match="dimension 1 or in the last one"):
        misclassified(same, classes(5, 4, 5))


def test_misclassified_of_yes_and_no_and_of_soft_labels() -> None:
    y = torch.tensor([[1, 0], [0, 1]])
    found = torch.tensor([[2.0, -1.0], [3.0, 1.0]])
    assert misclassified(found, y) == 0.25 and misclassified(found, y.bool()) == 0.25
    assert misclassified(found, y.float(), answers="binary") == 0.25
    assert misclassified(found, y.float(), answers="classes") == 0.5
    with pytest.raises(UserError, match=r"float32 are no classes"):
        misclassified(found, y.float())


# The module


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(self.head(x))


@pytest.mark.parametrize("traced", [True, False])
def test_complex_outputs_are_averaged(traced: bool) -> None:
    own, x = [Complex(), Complex()], scores(4, 6).float()
    team = gs.ensemble(own, [0.3, 0.7], x if traced else ())
    torch.testing.assert_close(team(x), 0.3 * own[0](x) + 0.7 * own[1](x))
    if traced:
        certificate = team.verify()
        assert certificate.ok and certificate.max_error < 1e-12
        torch.testing.assert_close(gs.emit(team.program())(x), team(x))
        with pytest.raises(UserError, match="complex outputs have no probabilities"):
            gs.ensemble(own, args=x, average="probabilities")
    else:
        with pytest.raises(UserError, match="complex outputs have no probabilities"):
            gs.ensemble(own, average="probabilities")(x)


@pytest.mark.parametrize("traced", [True, False])
def test_layouts_are_said_where_shapes_cannot_tell(traced: bool) -> None:
    torch.manual_seed(0)
    own, x = [nn.Conv1d(2, 3, 3, padding=1) for _ in range(2)], scores(4, 2, 7).float()
    with pytest.raises(UserError, match=r"dimension 1 or in the last one.*answers='classes'"):
        gs.ensemble(own, args=x if traced else (), average="probabilities")(x)
    team = gs.ensemble(own, args=x if traced else (), average="probabilities", answers="classes")
    expected = (sum(model(x).softmax(1) for model in own) / 2).log()  # type: ignore[union-attr]
    torch.testing.assert_close(team(x), expected)
    if traced:
        assert team.verify().ok
        torch.testing.assert_close(gs.emit(team.program())(x), expected)
    y = classes(3, 4, 7)
    data = [(x, y)]
    fitted = gs.ensemble(own, "regression", x if traced else (), data=data, average="probabilities")
    assert fitted.answers == "classes"
    torch.testing.assert_close(fitted(x).softmax(1).sum(1), torch.ones(4, 7))


def test_scores_of_yes_or_no_as_a_file(tmp_path: Any) -> None:
    torch.manual_seed(0)
    own, x = [nn.Linear(6, 1), nn.Linear(6, 1)], scores(4, 6).float()
    with pytest.raises(UserError, match=r"single class.*answers='binary'"):
        gs.ensemble(own, args=x, average="probabilities")
    team = gs.ensemble(own, [0.2, 0.8], x, average="probabilities", answers="binary").eval()
    mean = 0.2 * own[0](x).sigmoid() + 0.8 * own[1](x).sigmoid()
    torch.testing.assert_close(team(x).sigmoid(), mean)
    certificate = team.verify()
    assert certificate.ok and certificate.max_error < 1e-12
    gs.save(team, tmp_path / "team")
    found = gs.load(tmp_path / "team")
    assert isinstance(found, gs.Ensemble) and found.answers == "binary" and torch.equal(found(x), team(x))
    gs.save(team.program(), tmp_path / "program")
    report = gs.export_onnx(team, tmp_path / "team.onnx")["team.onnx"]
    assert all(row.absolute <= row.tolerance for row in report.rows)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.register_buffer("never", torch.tensor([False, False, True]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).masked_fill(self.never, -math.inf)


@pytest.mark.parametrize("average", ["outputs", "probabilities"])
def test_a_program_of_masked_scores(average: gs.ensembles.Average, tmp_path: Any) -> None:
    torch.manual_seed(0)
    x, weights = scores(4, 6).float(), [1.0, 0.0]
    team = gs.ensemble([Masked(), Masked()], weights, x, average=average).eval()
    assert team.verify().ok
    expected = team.members[0](x)
    found = gs.emit(team.program())(x)
    for value in (found, team(x)):
        assert not bool(value.isnan().any())
        torch.testing.assert_close(value.softmax(1), expected.softmax(1))
    report = gs.export_onnx(team, tmp_path / "team.onnx")["team.onnx"]
    assert all(row.absolute <= row.tolerance for row in report.rows)


class Hidden(nn.Module):
    """Scores, and the features that they came from."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x)
        return {"scores": self.head(h), "hidden": h}


@pytest.mark.parametrize("traced", [True, False])
def test_only_the_main_output_is_of_probabilities(traced: bool) -> None:
    torch.manual_seed(0)
    own, x = [Hidden(), Hidden()], scores(4, 6).float()
    team = gs.ensemble(own, args=x if traced else (), average="probabilities")
    one, two = (model(x) for model in own)
    torch.testing.assert_close(team(x)["hidden"], (one["hidden"] + two["hidden"]) / 2)
    expected = ((one["scores"].softmax(1) + two["scores"].softmax(1)) / 2).log()
    torch.testing.assert_close(team(x)["scores"], expected)
    if traced:
        assert team.verify().ok
        torch.testing.assert_close(gs.emit(team.program())(x)["hidden"], team(x)["hidden"])


def test_the_pass_is_told_what_is_averaged() -> None:
    torch.manual_seed(0)
    x = scores(5, 6).float()
    program = gs.trace(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)), x)
    (found,) = Pipeline.parse('partition(k=2) | ensemble(average="binary")')(program).items
    parts = gs.partition(program, k=2).submodels
    mean = sum(part.eval()(x).sigmoid() for part in parts) / 2
    torch.testing.assert_close(gs.emit(found).eval()(x).sigmoid(), mean)
    for average, text in (
        ("probabilities", "single class"),
        ("scores", "average is 'scores', expected one of"),
    ):
        with pytest.raises(UserError, match=text):
            Pipeline.parse(f'partition(k=2) | ensemble(average="{average}")')(program)


def test_answers_have_to_be_some() -> None:
    with pytest.raises(UserError, match="answers is 'scores', expected one of classes, classes_last"):
        gs.ensemble([nn.Linear(6, 3)], answers="scores")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="values have no probabilities"):
        gs.ensemble([nn.Linear(6, 3)], average="probabilities", answers="values")
