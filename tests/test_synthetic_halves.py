"""Parts trained apart on synthetic labels, and joined."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphsplit as gs
from graphsplit.errors import PartitionError, UserError
from graphsplit.train import Labels
from graphsplit.train.synthetic import draw_points
from laws import model_unchanged


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 24),
        nn.ReLU(),
        nn.Linear(24, 16),
        nn.Tanh(),
        nn.Linear(16, 12),
        nn.ReLU(),
        nn.Linear(12, 3),
    )


def problem(size: int = 96) -> list[tuple[Tensor, Tensor]]:
    """Three clouds."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (size,), generator=generator)
    centres = 2 * torch.randn(3, 6, generator=generator)
    x = centres[y] + 0.3 * torch.randn(size, 6, generator=generator)
    return list(zip(x.split(16), y.split(16), strict=True))


def test_parts_learn_without_each_other_and_fit_together() -> None:
    model = net()
    with model_unchanged(model):
        halves = gs.synthetic_halves(model, problem()[0][0], at=["2", "4"], labels=Labels(3, noise=0.2))
        start = gs.train.evaluate(halves.join(), F.cross_entropy, problem(), error=gs.train.misclassified)
        trained = halves.fit(
            problem(), 60, recovery=3, test=problem(), error=gs.train.misclassified,
            optimizer=lambda module: torch.optim.Adam(module.parameters(), lr=0.01),
        )  # fmt: skip
    assert trained.before is not None and trained.before[1] is not None
    assert trained.before[1] < 0.1 < start[1]  # type: ignore[operator]
    assert (
        trained.recovery[-1].test_error is not None and trained.recovery[-1].test_error <= trained.before[1]
    )
    assert sorted(trained.model.state_dict()) == sorted(model.state_dict())


def test_each_part_gets_its_points() -> None:
    halves = gs.synthetic_halves(net(), problem()[0][0], at=["2", "4"], labels=Labels(3, noise=0.0))
    assert [tuple(points.shape) for points in halves.points] == [(3, 24), (3, 16)]
    x, y = problem()[0]
    (first,), (second,), (third,) = (list(halves.data_of(part, [(x, y)])) for part in range(3))
    assert torch.equal(first[0], x) and torch.equal(first[1], halves.points[0][y])
    assert torch.equal(second[0], halves.points[0][y]) and torch.equal(second[1], halves.points[1][y])
    assert torch.equal(third[0], halves.points[1][y]) and torch.equal(third[1], y)
    # Behind a ReLU no point is negative, behind tanh some are.
    assert halves.nonnegative == (True, False)
    assert float(halves.points[0].min()) == 0 > float(halves.points[1].min())


def test_noise_is_drawn_anew_and_stays_in_range() -> None:
    halves = gs.synthetic_halves(net(), problem()[0][0], at="2", labels=Labels(3, noise=0.5))
    batch = problem()[0]
    (first,), (second,) = (list(halves.data_of(1, [batch])) for _ in range(2))
    assert not torch.equal(first[0], second[0]) and float(first[0].min()) >= 0


@pytest.mark.parametrize("distribution", ["normal", "uniform", "sign"])
def test_points_have_the_stated_structure(distribution: str) -> None:
    def points(**options: float) -> Tensor:
        return draw_points(Labels(4, distribution, **options), (20_000,), 0, nonnegative=False)  # type: ignore[arg-type]

    assert points().square().mean() == pytest.approx(1.0, abs=0.03)
    assert points(scale=3.0).std() == pytest.approx(3.0, rel=0.03)
    for separation in (0.25, 1.0):
        together = torch.corrcoef(points(separation=separation))[0, 1]
        assert float(together) == pytest.approx(1 - separation, abs=0.03)
    again, other = (
        draw_points(Labels(4), (5,), 1, nonnegative=False),
        draw_points(Labels(4), (5,), 0, nonnegative=False),
    )
    assert not torch.equal(again, other)
    assert torch.equal(other, draw_points(Labels(4), (5,), 0, nonnegative=False))


def test_language_models_have_a_point_for_each_position() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.body, self.head = (
                nn.Embedding(9, 6),
                nn.GRU(6, 8, batch_first=True),
                nn.Linear(8, 9),
            )

        def forward(self, words: Tensor) -> Tensor:
            return self.head(self.body(self.embedding(words))[0])

    halves = gs.synthetic_halves(Words(), torch.zeros(2, 5, dtype=torch.int64), at="head", labels=9)
    assert halves.points[0].shape == (9, 5, 8)
    classes = torch.randint(0, 9, (2, 5))
    (_, wanted), *_ = halves.data_of(0, [(classes, classes)])
    assert wanted.shape == (2, 5, 8) and torch.equal(wanted[1, 3], halves.points[0][classes[1, 3], 3])
    with pytest.raises(UserError, match="do not fit features"):
        list(halves.data_of(0, [(classes, classes[:, :4])]))


def test_costs_stand_beside_those_of_the_whole() -> None:
    halves = gs.synthetic_halves(net(), problem()[0][0], labels=3)
    *parts, whole = halves.costs()
    assert sum(part.parameters for part in parts) == whole.parameters
    assert sum(part.flops for part in parts) == whole.flops
    assert all(part.memory < whole.memory for part in parts)


class Skips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x))) + x


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: gs.synthetic_halves(Skips(), x, at="b", labels=3), "labels stand in for one tensor"),
        (lambda x: gs.synthetic_halves(net(), x, at="2", labels=1), "labels for 1 classes"),
        (lambda x: gs.synthetic_halves(net(), x, at="2", labels="3"), "labels is '3'"),
        (lambda x: Labels(3, "cauchy"), "the distribution is 'cauchy'"),  # type: ignore[arg-type]
        (lambda x: Labels(3, separation=0.0), "separation above 0"),
        (lambda x: gs.synthetic_halves(net(), x, at="2", labels=2).fit(problem(), 1), "classes from 0 to 2"),
        (
            lambda x: gs.synthetic_halves(net(), x, at="2", labels=2).fit([(x, x)], 1),
            "labels are for classes",
        ),
    ],
)
def test_what_cannot_be_is_refused(call: Callable[[Tensor], object], message: str) -> None:
    error = PartitionError if "one tensor" in message else UserError
    with pytest.raises(error, match=message):
        call(problem()[0][0])
