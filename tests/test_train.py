"""Schedules: apart, merged, and on; in turn and in processes; by hand with three calls."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import graphsplit as gs
from graphsplit.errors import UserError
from graphsplit.train import Epoch, History, PartitionSchedule, evaluate, fit, misclassified

Pairs = list[tuple[Tensor, Tensor]]


def problem(examples: int = 64) -> tuple[Tensor, Tensor]:
    x = torch.randn(examples, 6, generator=torch.Generator().manual_seed(1))
    return x, (x[:, 0] * x[:, 1] > 0).long()


def batches() -> Pairs:
    x, y = problem()
    return list(zip(x.split(16), y.split(16), strict=True))


def shuffled() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*problem()), batch_size=16, shuffle=True)


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 12), nn.LayerNorm(12), nn.Tanh(), nn.Dropout(0.1), nn.Linear(12, 12), nn.BatchNorm1d(12),
        nn.Tanh(), nn.Linear(12, 2),
    )  # fmt: skip


def divide(k: int = 2) -> gs.Partition:
    return gs.partition(build(), problem()[0][:2], k=k, init="fresh")


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def schedule(part: gs.Partition, **options: object) -> PartitionSchedule:
    settings: dict[str, object] = {"merge_at": 2, "epochs": 4, "error": misclassified} | options
    return PartitionSchedule(part, settings.pop("optimizer", sgd), functional.cross_entropy, **settings)  # type: ignore[arg-type]


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("merge_at", [0, 1, 4])
def test_history_has_every_epoch_once(merge_at: int) -> None:
    seen: list[Epoch] = []
    part = divide()
    trained = schedule(part, merge_at=merge_at, on_epoch=seen.append).fit(shuffled(), batches())
    expected = [(p, n) for p in range(2) for n in range(merge_at)] + [(None, n) for n in range(merge_at, 4)]
    assert [(epoch.part, epoch.number) for epoch in trained.history.epochs] == expected
    assert seen == trained.history.epochs
    for epoch in seen:
        assert epoch.examples == 64 and epoch.seconds > 0 and epoch.examples_per_second > 0
        assert epoch.test_loss is not None and 0 <= (epoch.test_error or 0) <= 1
        assert f"epoch {epoch.number + 1}" in str(epoch)
    if merge_at < 4:
        model = trained.model
        assert evaluate(model, functional.cross_entropy, batches(), error=misclassified) == (
            seen[-1].test_loss,
            seen[-1].test_error,
        )
        assert model.training, "evaluation leaves the mode as it was"


def test_training_learns_and_the_partition_is_left_alone() -> None:
    part = divide()
    before = [{name: tensor.clone() for name, tensor in sub.state_dict().items()} for sub in part.submodels]
    random_state = torch.get_rng_state()
    trained = schedule(part, merge_at=6, epochs=12).fit(shuffled(), batches())
    assert torch.equal(torch.get_rng_state(), random_state)
    whole = trained.history.of(None)
    assert whole[-1].loss < 0.5 * trained.history.of(0)[0].loss
    for sub, state in zip(part.submodels, before, strict=True):
        assert all(torch.equal(sub.state_dict()[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_same_seed_same_weights(optimizer: object) -> None:
    part = divide()
    first = schedule(part, optimizer=optimizer).fit(shuffled()).model
    assert same(schedule(part, optimizer=optimizer).fit(shuffled()).model, first)
    assert not same(schedule(part, optimizer=optimizer, seed=1).fit(shuffled()).model, first)


def test_a_generator_of_the_loader_follows_the_seed() -> None:
    part = divide()

    def loader() -> DataLoader[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(7)
        return DataLoader(TensorDataset(*problem()), batch_size=16, shuffle=True, generator=generator)

    used = loader()
    list(used)  # somebody read from it before
    assert same(schedule(part).fit(used).model, schedule(part).fit(loader()).model)


@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize("duplicate", [True, False])
def test_three_calls_by_hand_give_the_same(optimizer: object, duplicate: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 2))
    part = gs.partition(model, problem()[0][:2], k=2, init="fresh")
    trained = schedule(part, optimizer=optimizer, duplicate=duplicate).fit(batches())

    def train(module: nn.Module, learner: torch.optim.Optimizer, epochs: int) -> None:
        for _ in range(epochs):
            for x, y in batches():
                learner.zero_grad()
                functional.cross_entropy(module(x), y).backward()
                learner.step()

    assert callable(optimizer)
    submodels = part.submodels
    learners = [optimizer(submodel) for submodel in submodels]
    for submodel, learner in zip(submodels, learners, strict=True):
        train(submodel, learner, 2)
    merged = part.merge(duplicate=duplicate)
    learner = optimizer(merged)
    part.plan.merge_optimizer_states(learners, submodels, merged, learner)
    train(merged, learner, 2)
    assert same(trained.model, merged)
    assert all(same(a, b) for a, b in zip(trained.submodels, submodels, strict=True))


@pytest.mark.parametrize("every_batch", [True, False])
def test_learning_rate_goes_on_as_in_one_training(every_batch: bool) -> None:
    def halve(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    options = {"scheduler": halve, "step_every_batch": every_batch}
    history = schedule(divide(), **options).fit(batches()).history
    model = build()
    optimizer = sgd(model)
    baseline = fit(
        model,
        optimizer,
        functional.cross_entropy,
        batches(),
        4,
        scheduler=halve(optimizer),
        step_every_batch=every_batch,
    )
    expected = [epoch.learning_rate for epoch in baseline]
    steps = 4 if every_batch else 1
    assert expected == [0.1 * 0.5 ** (steps * number) for number in range(1, 5)]
    assert [epoch.learning_rate for epoch in (*history.of(1), *history.of(None))] == expected


def test_merged_momenta_are_those_of_the_submodels() -> None:
    part = divide()
    trained = schedule(part, merge_at=2, epochs=2).fit(shuffled())
    momentum = trained.optimizer.state[trained.model.get_parameter("4.weight")]["momentum_buffer"]
    blocks = momentum[:6, :6], momentum[6:, 6:]
    cross = momentum[:6, 6:], momentum[6:, :6]
    assert all(block.abs().min() > 0 for block in blocks) and all((block == 0).all() for block in cross)


def test_inputs_by_keyword_and_several_targets() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return {"scores": self.head(torch.tanh(self.body(x)) * scale)}

    x, y = problem(16)
    inputs = {"x": x, "scale": torch.ones(16, 1)}
    part = gs.partition(Named(), (), inputs, k=2)
    data = [(inputs, {"label": y})]
    trained = PartitionSchedule(
        part,
        sgd,
        lambda outputs, targets: functional.cross_entropy(outputs["scores"], targets["label"]),
        merge_at=1,
        epochs=2,
    ).fit(data)
    assert [epoch.examples for epoch in trained.history.epochs] == [16] * 3


class Killed(Exception):
    """A run ends here."""


def plain(history: History) -> list[tuple[object, ...]]:
    """All that does not depend on the clock."""
    return [
        (e.part, e.number, e.loss, e.error, e.test_loss, e.test_error, e.learning_rate)
        for e in history.epochs
    ]


@pytest.mark.parametrize("moment", [(0, 1), (1, 0), (None, 2)])
@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_a_schedule_that_was_killed_goes_on_bit_for_bit(
    tmp_path: Path, moment: tuple[int | None, int], optimizer: object
) -> None:
    half = lambda made: torch.optim.lr_scheduler.StepLR(made, 1, 0.5)  # noqa: E731
    options = {"optimizer": optimizer, "scheduler": half}
    whole = schedule(divide(), **options).fit(shuffled(), batches())

    def kill(epoch: Epoch) -> None:
        if (epoch.part, epoch.number) == moment:
            raise Killed

    with pytest.raises(Killed):
        schedule(divide(), on_epoch=kill, **options).fit(shuffled(), batches(), checkpoint=tmp_path)
    (tmp_path / "part_0.epoch_9.new").write_bytes(b"half a file")
    found = schedule(divide(), **options).fit(shuffled(), batches(), checkpoint=tmp_path)
    assert plain(found.history) == plain(whole.history)
    assert same(found.model, whole.model)
    assert all(same(a, b) for a, b in zip(found.submodels, whole.submodels, strict=True))


def test_a_checkpoint_of_another_schedule(tmp_path: Path) -> None:
    schedule(divide()).fit(batches(), checkpoint=tmp_path)
    with pytest.raises(UserError, match=r"another configuration: its merge_at is 2, and is 1 here"):
        schedule(divide(), merge_at=1).fit(batches(), checkpoint=tmp_path)
    with pytest.raises(UserError, match=r"another configuration: its k is 2, and is 3 here"):
        schedule(divide(3)).fit(batches(), checkpoint=tmp_path)
    with pytest.raises(UserError, match=r"part_0.epoch_1.pt is no checkpoint of this training"):
        wide = gs.partition(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2)), problem()[0][:2], k=2)
        schedule(wide).fit(batches(), checkpoint=tmp_path)


def test_a_checkpoint_of_another_optimizer_or_of_more_epochs(tmp_path: Path) -> None:
    schedule(divide()).fit(batches(), checkpoint=tmp_path)
    with pytest.raises(UserError, match=r"another configuration: its optimizer is SGD, and is AdamW here"):
        schedule(divide(), optimizer=adam).fit(batches(), checkpoint=tmp_path)
    step = lambda made: torch.optim.lr_scheduler.StepLR(made, 1)  # noqa: E731
    with pytest.raises(UserError, match=r"its scheduler is None, and is StepLR here"):
        schedule(divide(), scheduler=step).fit(batches(), checkpoint=tmp_path)
    with pytest.raises(UserError, match=r"has 4 epochs, and training is to have 3"):
        schedule(divide(), epochs=3).fit(batches(), checkpoint=tmp_path)
    path = tmp_path / "part_0.epoch_1.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"part_0.epoch_1.pt is no checkpoint of this training: it is damaged"
    ):
        schedule(divide()).fit(batches(), checkpoint=tmp_path)


def test_seconds_in_turn_and_in_parallel() -> None:
    def epoch(part: int | None, number: int, seconds: float) -> Epoch:
        return Epoch(part, number, 0.0, None, None, None, seconds, 10, 0.1)

    history = History([epoch(0, 0, 1.0), epoch(1, 0, 2.0), epoch(None, 1, 4.0)], merge_seconds=0.5)
    assert history.seconds() == 7.5 and history.seconds(parallel=True) == 6.5
    assert epoch(None, 1, 4.0).examples_per_second == 2.5


# Refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge_at": 5}, "merge_at is 5 of 4 epochs"),
        ({"merge_at": -1}, "merge_at is -1"),
        ({"mode": "both"}, "mode is 'both'"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        schedule(divide(), **options)


def test_parallel_needs_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="several processes") as caught:
        schedule(divide(), mode="parallel").fit(batches())
    assert "torchrun" in str(caught.value)


def test_data_that_gives_nothing() -> None:
    with pytest.raises(UserError, match="no batch in this epoch"):
        schedule(divide()).fit(iter(batches()))  # the first epoch of the first sub-model reads all of it
    with pytest.raises(UserError, match="test data gave no batch"):
        schedule(divide()).fit(batches(), [])
    with pytest.raises(UserError, match="expected a pair"):
        schedule(divide()).fit(problem()[0].split(16))
    with pytest.raises(UserError, match="no tensor with a batch dimension"):
        schedule(divide()).fit([(problem()[0], None)])


def test_what_makes_no_optimizer_or_schedule_is_refused() -> None:
    with pytest.raises(UserError, match="scheduler cannot be made by StepLR: missing a required argument"):
        schedule(divide(), scheduler=torch.optim.lr_scheduler.StepLR).fit(batches())
    with pytest.raises(UserError, match="optimizer is the class SGD"):
        schedule(divide(), optimizer=torch.optim.SGD).fit(batches())
    with pytest.raises(UserError, match="ReduceLROnPlateau"):
        schedule(divide(), scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau).fit(batches())


# Processes

SCRIPT = """
import sys
import torch
import torch.distributed as dist
sys.path.insert(0, {folder!r})
from test_train import divide, schedule, shuffled, batches

trained = schedule(divide(k=3), mode="parallel", duplicate=True).fit(shuffled(), batches())
history = [(epoch.part, epoch.number, epoch.loss, epoch.test_error) for epoch in trained.history.epochs]
momenta = [trained.optimizer.state[p]["momentum_buffer"] for p in trained.model.parameters()]
import os
torch.save(
    {{"model": trained.model.state_dict(), "history": history, "momenta": momenta,
      "submodels": [m.state_dict() for m in trained.submodels]}},
    os.path.join({out!r}, "rank_" + os.environ["RANK"] + ".pt"),
)
"""


@pytest.mark.slow
def test_parallel_gives_what_in_turn_gives(tmp_path: Path) -> None:
    """Three sub-models on two processes; both end with the same, which is that of one process, bit for bit."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(folder=str(Path(__file__).parent), out=str(tmp_path)))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    trained = schedule(divide(k=3)).fit(shuffled(), batches())
    expected = [(epoch.part, epoch.number, epoch.loss, epoch.test_error) for epoch in trained.history.epochs]
    for rank in range(2):
        found = torch.load(tmp_path / f"rank_{rank}.pt")
        assert found["history"] == expected
        for name, tensor in trained.model.state_dict().items():
            assert torch.equal(found["model"][name], tensor), name
        for parameter, momentum in zip(trained.model.parameters(), found["momenta"], strict=True):
            assert torch.equal(trained.optimizer.state[parameter]["momentum_buffer"], momentum)
        for submodel, state in zip(trained.submodels, found["submodels"], strict=True):
            assert all(torch.equal(state[name], tensor) for name, tensor in submodel.state_dict().items())
