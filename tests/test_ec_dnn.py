"""EC-DNN and its baselines in one process: the formulas, what a run leaves, going on, and bad input."""

import copy
import csv
import dataclasses
import functools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import graphsplit as gs
from graphsplit.errors import UserError
from graphsplit.train.checkpoints import Checkpoints
from graphsplit.train.exchange import Together
from graphsplit.train.learner import Learning
from graphsplit.train.panel import Panel
from graphsplit.train.replicas import Labels, Replica, Task, is_bounded, is_convex, tensors_of
from graphsplit.train.rounds import Run
from graphsplit.train.sharding import Examples, ShardSampler, deal
from laws import script

EC = gs.train.EnsembleCompression


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def data(size: int = 90, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, 5, generator=generator, dtype=dtype)
    return x, (x[:, :3] + 0.3 * torch.randn(size, 3, generator=generator)).argmax(1)


def sgd(rate: float = 0.2, momentum: float = 0.0) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)


def settings(**changes: Any) -> gs.train.EnsembleCompression:
    return EC(**{"k": 3, "rounds": 3, "tau": 6, "batch": 8, "p": 0.34, "optimizer": sgd(), **changes})


def run(changes: dict[str, Any] | None = None, **options: Any) -> gs.train.EnsembleTrained:
    options = {"test": [data(40)], "error": gs.train.misclassified, **options}
    return settings(**(changes or {})).run(net, data(), F.cross_entropy, **options)


def same(one: nn.Module, two: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def numbers(found: gs.train.EnsembleTrained) -> list[Any]:
    """All that does not depend on the clock."""
    clock = ("seconds", "communication_seconds")
    return [{k: v for k, v in vars(record).items() if k not in clock} for record in found.rounds]


# The formulas


def replica(model: nn.Module, keep: torch.dtype = torch.float64) -> Replica:
    task = Task(
        Examples(data(dtype=torch.float64)), F.cross_entropy, F.cross_entropy, torch.device("cpu"), 0, 8, keep
    )
    return Replica(0, model, Learning(optimizer=sgd(0.5)), task, range(30))


def answers(
    worker: Replica, sampler: ShardSampler, team: list[nn.Module], weights: Tensor, average: Any = "outputs"
) -> Labels:
    """Of a team of two, on batches of one worker."""
    panel = Panel(Together([worker], 1), worker.task, average, "replicas")
    panel.models = team
    return panel.answers(lambda _: sampler, weights, [0, 1], "regression")[0]


def test_local_training_follows_equation_9() -> None:
    own, others = plain(), [plain(), plain()]
    x, y = data(dtype=torch.float64)
    worker = replica(copy.deepcopy(own))
    sampler = worker.task.local(0, range(30), 0, 1)
    (chosen,) = sampler
    mean = answers(worker, sampler, others, torch.full((2,), 0.5))
    worker.train(0, 1, 0.7, mean)
    target = sum(other(x[chosen]) for other in others).detach().div(2).softmax(1)  # type: ignore[union-attr]
    scores = own(x[chosen])
    loss = F.cross_entropy(scores, y[chosen]) - 0.7 * (scores.softmax(1) - target).square().sum(1).mean()
    gradients = torch.autograd.grad(loss, list(own.parameters()))
    for moved, parameter, gradient in zip(
        worker.model.parameters(), own.parameters(), gradients, strict=True
    ):
        torch.testing.assert_close(moved, parameter - 0.5 * gradient, rtol=1e-12, atol=1e-12)


def test_compression_follows_equation_10() -> None:
    own, team, weights = plain(), [plain(), plain()], torch.tensor([0.3, 0.7], dtype=torch.float64)
    x, y = data(dtype=torch.float64)
    worker = replica(copy.deepcopy(own))
    sampler = worker.task.relabelled(0, range(30), 2, 0.5, 1)
    (chosen,) = sampler
    labels = answers(worker, sampler, team, weights, "probabilities")
    worker.compress(sampler, 2, 0.4, 0.6, labels)
    expected = sum(w * member(x[chosen]).softmax(1) for w, member in zip(weights, team, strict=True)).detach()  # type: ignore[union-attr]
    scores = own(x[chosen])
    loss = 0.4 * F.cross_entropy(scores, y[chosen]) - 0.6 * (expected * scores.log_softmax(1)).sum(1).mean()
    gradients = torch.autograd.grad(loss, list(own.parameters()))
    for moved, parameter, gradient in zip(
        worker.model.parameters(), own.parameters(), gradients, strict=True
    ):
        torch.testing.assert_close(moved, parameter - 0.5 * gradient, rtol=1e-12, atol=1e-12)


def test_squared_errors_have_outputs_as_answers() -> None:
    x = data(dtype=torch.float64)[0]
    y = torch.randn(90, 3, dtype=torch.float64)
    task = Task(Examples((x, y)), F.mse_loss, F.mse_loss, torch.device("cpu"), 0, 8, torch.float64)
    worker, team = Replica(0, plain(), Learning(), task, range(30)), [plain(), plain()]
    sampler = task.local(0, range(30), 0, 2)
    labels = answers(worker, sampler, team, torch.full((2,), 0.5))
    chosen = next(iter(sampler))
    expected = (team[0](x[chosen]) + team[1](x[chosen])) / 2
    torch.testing.assert_close(labels.of(chosen), expected.detach())


def test_only_a_share_is_relabelled_and_kept_small() -> None:
    task = replica(plain()).task
    first, second = (
        {number for batch in task.relabelled(0, range(30), moment, 0.5, 40) for number in batch}
        for moment in (0, 1)
    )
    assert len(first) == 15 and first <= set(range(30)) and first != second
    labels = Labels([4, 7], torch.float16)
    labels.put([7, 4], torch.tensor([[0.25, 1 / 3], [1.0, 2.0]]))
    assert labels._values is not None and labels._values.dtype == torch.float16
    assert labels.of([4]).tolist() == [[1.0, 2.0]] and labels.of([4]).dtype == torch.float32


def test_averaging_is_that_of_parameters() -> None:
    """Two rounds by hand: each worker's steps, then the mean."""
    training = settings(method="ma", rounds=2, k=2)
    start = plain()
    x, y = data(dtype=torch.float64)
    found = training.run(start, (x, y), F.cross_entropy)
    shards, own = deal(90, 2, 0), [copy.deepcopy(start), copy.deepcopy(start)]
    for number in range(2):
        for worker, model in enumerate(own):
            optimizer = sgd()(model)
            for chosen in _task(x, y).local(worker, shards[worker], 6 * number, 6):
                optimizer.zero_grad()
                F.cross_entropy(model(x[chosen]), y[chosen]).backward()
                optimizer.step()
        means = [sum(pair) / 2 for pair in zip(*(m.parameters() for m in own), strict=True)]  # type: ignore[arg-type]
        for model in own:
            for parameter, mean in zip(model.parameters(), means, strict=True):
                parameter.data.copy_(mean)  # type: ignore[arg-type]
    for parameter, expected in zip(found.global_model.parameters(), own[0].parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-12, atol=1e-12)


def _task(x: Tensor, y: Tensor) -> Task:
    return Task(Examples((x, y)), F.cross_entropy, F.cross_entropy, torch.device("cpu"), 0, 8, torch.float64)


def test_warm_up_is_synchronous_training() -> None:
    """Post-local SGD: with momentum, averages after every step are steps on the mean gradient."""
    x, y = data(dtype=torch.float64)
    start = plain()
    training = settings(method="ma", k=2, rounds=1, warmup=6, optimizer=sgd(0.1, 0.9))
    found = training.run(start, (x, y), F.cross_entropy)
    shards, model = deal(90, 2, 0), copy.deepcopy(start)
    optimizer = sgd(0.1, 0.9)(model)
    samplers = [_task(x, y).local(worker, shards[worker], 0, 6) for worker in range(2)]
    for batches in zip(*samplers, strict=True):
        optimizer.zero_grad()
        for chosen in batches:
            (F.cross_entropy(model(x[chosen]), y[chosen]) / 2).backward()
        optimizer.step()
    for parameter, expected in zip(found.global_model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-11, atol=1e-11)


# What a run leaves


@pytest.mark.parametrize("method", ["ec", "e"])
@pytest.mark.parametrize("average", ["outputs", "probabilities"])
def test_the_ensembles_loss_is_never_above_its_members(method: str, average: str) -> None:
    found = run({"method": method, "average": average})
    for record in found.rounds:
        assert record.test_loss is not None
        assert record.test_loss <= sum(record.local_losses) / 3 + 1e-6
        assert record.improvement == pytest.approx(sum(record.local_errors) / 3 - record.test_error)
    assert isinstance(found.global_model, gs.Ensemble)
    loss, error = gs.train.evaluate(
        found.global_model, F.cross_entropy, [data(40)], error=gs.train.misclassified
    )
    assert (loss, error) == (found.rounds[-1].test_loss, found.rounds[-1].test_error)


def test_every_method_learns() -> None:
    for method in ("ec", "ma", "e", "s"):
        found = run({"method": method, "rounds": 8, "tau": 12})
        assert len(found.rounds) == 8 and found.rounds[-1].steps == 96 - (4 if method == "ec" else 0)
        assert found.rounds[-1].test_error is not None and found.rounds[-1].test_error < 0.3, method
        _, error = gs.train.evaluate(
            found.local_model, F.cross_entropy, [data(40)], error=gs.train.misclassified
        )
        assert error is not None and error < 0.4, method


@pytest.mark.parametrize("weights", ["regression", "margin"])
def test_other_weights(weights: str) -> None:
    found = run({"weights": weights, "mu": 1.0})
    assert isinstance(found.global_model, gs.Ensemble) and found.global_model.rule == weights
    last = torch.tensor(found.rounds[-1].weights)
    assert torch.equal(last, found.global_model.weights)
    assert torch.allclose(last, torch.full((3,), 1 / 3)) == (weights == "margin")
    assert not same(found.local_model, run({"mu": 1.0}).local_model)


def test_members_make_an_ensemble_that_is_proved_and_exported(tmp_path: Path) -> None:
    found = run({"weights": "regression"})
    team = gs.ensemble(found.members, found.rounds[-1].weights, data()[0][:4]).eval()
    assert team.fused and team.verify().ok
    torch.testing.assert_close(team(data(40)[0]), found.global_model.eval()(data(40)[0]))
    gs.export_onnx(team, tmp_path / "global.onnx")


def test_local_model_is_the_compressed_replica_of_the_smallest_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Run] = []
    trained = Run._trained

    def keeping(self: Run) -> gs.train.EnsembleTrained:
        kept.append(self)
        return trained(self)

    monkeypatch.setattr(Run, "_trained", keeping)
    found = run()
    losses = found.rounds[-1].compression_losses
    best = kept[0].workers.mine[losses.index(min(losses))]
    assert same(best.model, found.local_model)
    assert all(same(member, found.local_model) is False for member in found.members)


def test_replicas_start_apart_or_together() -> None:
    torch.manual_seed(0)
    model = net()
    before = copy.deepcopy(model.state_dict())
    found = settings(method="e", rounds=1).run(model, data(), F.cross_entropy)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    rate = sgd(0.0)
    together = settings(method="e", rounds=1, optimizer=rate).run(
        plain(), data(dtype=torch.float64), F.cross_entropy
    )
    apart = settings(method="e", rounds=1, optimizer=rate).run(
        plain, data(dtype=torch.float64), F.cross_entropy
    )
    averaged = settings(method="ma", rounds=1, optimizer=rate).run(
        plain, data(dtype=torch.float64), F.cross_entropy
    )
    assert same(together.members[0], together.members[1]) and same(averaged.members[0], averaged.members[1])
    assert not same(apart.members[0], apart.members[1])
    assert len(found.members) == 3


def test_bytes_between_workers() -> None:
    size = sum(tensor.nbytes for tensor in tensors_of(net()).values())
    weights = sum(parameter.nbytes for parameter in net().parameters())
    assert [record.bytes for record in run({"diversity": 0.0}).rounds] == [6 * size] * 3
    assert [record.bytes for record in run().rounds] == [6 * size, 12 * size, 12 * size]
    assert [record.bytes for record in run({"method": "ma"}).rounds] == [4 * weights] * 3
    assert [record.bytes for record in run({"method": "s"}).rounds] == [0] * 3


@pytest.mark.parametrize(
    ("changes", "times", "diverse"),
    [({"diversity": 0.0}, 1, 0), ({}, 1, 1), ({"weights": "regression"}, 2, 1), ({"method": "e"}, 0, 0)],
)
def test_predictions_in_place_of_replicas(changes: dict[str, Any], times: int, diverse: int) -> None:
    """All numbers are the same, but for bytes: those of the outputs for examples that are labelled."""
    replicas, predictions = run(changes), run({**changes, "exchange": "predictions"})
    task, shards = _task(*data()), deal(90, 3, 0)
    for one, two in zip(numbers(replicas), numbers(predictions), strict=True):
        labelled = 0
        for worker, shard in enumerate(shards):
            relabelled = task.relabelled(worker, shard, one["number"], 0.7, 2)
            local = task.local(worker, shard, 4 * one["number"], 4) if one["number"] else []
            for many, sampler in ((times, relabelled), (diverse, local)):
                labelled += many * len({number for batch in sampler for number in batch})
        assert two.pop("bytes") == 2 * labelled * 3 * 4 < one.pop("bytes")
        assert one == two
    assert same(replicas.global_model, predictions.global_model)
    assert same(replicas.local_model, predictions.local_model)


class Named(nn.Module):
    """Takes a mapping and gives one."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(features)}


class Rows(Dataset[Any]):
    """A data set of mappings and classes."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, number: int) -> Any:
        x, y = data(60)
        return {"features": x[number]}, y[number]


def test_nested_inputs_and_outputs_and_any_data_set() -> None:
    def loss(outputs: dict[str, Tensor], y: Tensor) -> Tensor:
        return F.cross_entropy(outputs["logits"], y)

    loader = DataLoader(Rows(), batch_size=5)
    one = settings().run(Named, Rows(), loss)
    two = settings().run(Named, loader, loss)
    x, y = data(60)
    three = settings().run(Named, TensorDataset(x, y), loss)
    for found in (two, three):
        assert same(one.local_model, found.local_model)
    assert one.global_model(x)["logits"].shape == (60, 3)


def test_precision_clipping_and_schedules() -> None:
    half = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)  # noqa: E731
    found = run({"scheduler": half})
    assert [record.learning_rate for record in found.rounds] == [0.1, 0.05, 0.025]
    stepped = run({"scheduler": half, "step_every_batch": True, "rounds": 1})
    assert stepped.rounds[0].learning_rate == pytest.approx(0.2 * 0.5**6)
    still = run({"clip": 1e-9, "rounds": 1, "method": "s"})
    with torch.random.fork_rng():
        moved = run({"rounds": 1, "method": "s"})
    assert not same(still.global_model, moved.global_model)
    fast = run({"amp": torch.bfloat16})
    assert fast.rounds[-1].losses != run().rounds[-1].losses and fast.rounds[-1].test_loss is not None


def test_early_stop() -> None:
    found = run({"optimizer": sgd(0.0), "patience": 2, "rounds": 9, "method": "ma"})
    assert len(found.rounds) == 3


def test_patience_is_not_lost_by_a_test_loss_that_is_no_number() -> None:
    losses = [float("nan"), 0.5, 0.4, 0.3]

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        found = F.cross_entropy(outputs, y)
        return found if torch.is_grad_enabled() or len(y) != 40 else found * 0 + losses[len(rounds)]

    rounds: list[gs.train.Round] = []
    settings(patience=1, rounds=4).run(net, data(), loss, test=[data(40)], on_round=rounds.append)
    assert [record.test_loss for record in rounds][1:] == pytest.approx(losses[1:])


def test_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.csv"
    found = run(on_round=gs.train.CSVLog(path))
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["test_loss"]) for row in rows] == [record.test_loss for record in found.rounds]
    assert [float(row["losses.1"]) for row in rows] == [record.losses[1] for record in found.rounds]
    run({"rounds": 1}, on_round=gs.train.CSVLog(path))
    assert len(path.read_text().splitlines()) == 5
    epochs = tmp_path / "epochs.csv"
    model = net()
    gs.train.fit(model, sgd()(model), F.cross_entropy, [data()], 2, on_epoch=gs.train.CSVLog(epochs))
    assert len(epochs.read_text().splitlines()) == 3
    with pytest.raises(UserError, match="cannot be written"):
        gs.train.CSVLog(tmp_path / "no" / "log.csv")(found.rounds[0])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"not installed.*CSVLog"):
        gs.train.TensorBoardLog(tmp_path)


def test_a_log_has_a_place_for_every_worker(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    changes = {"optimizer": poisoned(1), "on_nan": "leave_out", "rounds": 2}
    found = run(changes, on_round=gs.train.CSVLog(path))
    with path.open(newline="") as file:
        first, second = csv.DictReader(file)
    assert [first[f"left_out.{worker}"] for worker in range(3)] == ["0", "1", "0"]
    assert [second[f"left_out.{worker}"] for worker in range(3)] == ["0", "0", "0"]
    assert first["local_losses.1"] == "" == first["local_errors.1"]
    assert float(first["local_losses.2"]) == found.rounds[0].local_losses[1]
    assert float(second["local_losses.1"]) == found.rounds[1].local_losses[1]


def test_a_log_drops_no_column(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    run({"k": 2, "rounds": 1}, on_round=gs.train.CSVLog(path))
    before = path.read_text()
    with pytest.raises(UserError, match=r"log.csv has no column compression_losses.2.*a file for each"):
        run({"k": 3, "rounds": 1}, on_round=gs.train.CSVLog(path))
    assert path.read_text() == before
    with pytest.raises(UserError, match=r"has a column local_errors.0"):
        run({"k": 2, "rounds": 1}, error=None, on_round=gs.train.CSVLog(path))
    with pytest.raises(UserError, match=r"cannot be read: .*directory"):
        gs.train.CSVLog(tmp_path)


def test_records_are_readable(capsys: pytest.CaptureFixture[str]) -> None:
    run(on_round=print)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].startswith("round 1, step 4: loss ") and "replicas" in lines[0]


# Seeds and going on


def test_a_seed_gives_the_same_numbers_and_leaves_the_random_state() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = run()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(6)
    two = run()
    assert numbers(one) == numbers(two) and same(one.local_model, two.local_model)
    assert numbers(one) != numbers(run({"seed": 1}))


class Killed(Exception):
    """A run ends here."""


@pytest.mark.parametrize("method", ["ec", "ma", "e", "s"])
def test_a_run_that_goes_on_ends_as_one_that_was_not_killed(tmp_path: Path, method: str) -> None:
    changes = {
        "method": method, "rounds": 4, "optimizer": lambda m: torch.optim.Adam(m.parameters(), 0.02),
        "scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    }  # fmt: skip
    whole = run(changes)

    def kill(record: gs.train.Round) -> None:
        if record.number == 1:
            raise Killed

    with pytest.raises(Killed):
        run(changes, checkpoint=tmp_path, on_round=kill)
    found = run(changes, checkpoint=tmp_path)
    assert numbers(found) == numbers(whole)
    assert same(found.local_model, whole.local_model) and same(found.global_model, whole.global_model)
    again = run(changes, checkpoint=tmp_path)  # nothing is left to do
    assert numbers(again) == numbers(whole) and same(again.global_model, whole.global_model)


def test_a_run_that_was_killed_while_it_wrote_goes_on(tmp_path: Path) -> None:
    whole = run({"rounds": 3})
    run({"rounds": 2}, checkpoint=tmp_path)
    (tmp_path / "worker_1.round_1.pt").unlink()  # the others have it, this one had just begun to write
    (tmp_path / "worker_1.round_1.new").write_bytes(b"PK half a file")
    found = run({"rounds": 3}, checkpoint=tmp_path)
    assert numbers(found) == numbers(whole) and same(found.local_model, whole.local_model)
    kept = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert kept == [f"worker_{worker}.round_{number}.pt" for worker in range(3) for number in (1, 2)]


def test_a_checkpoint_of_another_configuration(tmp_path: Path) -> None:
    run({"rounds": 1}, checkpoint=tmp_path)
    with pytest.raises(UserError, match=r"another configuration: its tau is 6, and is 9 here"):
        run({"tau": 9}, checkpoint=tmp_path)
    with pytest.raises(UserError, match=r"its shard is other examples"):
        run(shards=[range(30)] * 3, checkpoint=tmp_path)
    with pytest.raises(UserError, match=r"worker_0.round_0.pt is no checkpoint of this training"):
        settings().run(plain, data(), F.cross_entropy, checkpoint=tmp_path)
    (tmp_path / "worker_0.round_0.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"worker_0.round_0.pt is no checkpoint"):
        run(checkpoint=tmp_path)


def test_a_checkpoint_of_fewer_workers(tmp_path: Path) -> None:
    """It is refused, not begun anew and written over; one whose first round is not whole is begun anew."""
    run({"rounds": 1, "k": 2}, checkpoint=tmp_path)
    with pytest.raises(UserError, match=r"another configuration: its k is 2, and is 3 here"):
        run({"rounds": 1}, checkpoint=tmp_path)
    (tmp_path / "worker_1.round_0.pt").unlink()
    found = run({"rounds": 1, "k": 2}, checkpoint=tmp_path)
    assert numbers(found) == numbers(run({"rounds": 1, "k": 2}))


def newer(folder: Path, number: int) -> Path:
    return folder / f"worker_0.round_{number}.pt"


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    """Whatever bit of it has changed, it is cut short, or stands in the place of another."""
    run({"rounds": 2}, checkpoint=tmp_path)
    path = newer(tmp_path, 1)
    good = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(len(good), (20,), generator=generator).tolist():
        bad = bytearray(good)
        bad[place] ^= 64
        path.write_bytes(bad)
        with pytest.raises(UserError, match=r"round_1.pt is no checkpoint"):
            run({"rounds": 3}, checkpoint=tmp_path)
    others = {
        "its end, with a digest, is not there": good[:-1],
        "it is of format 1, and 2 is read here": good[: good.rindex(b"\ngraphsplit checkpoint")],
        "it is of format 9, and 2 is read here": good.replace(b"checkpoint    2", b"checkpoint    9"),
        "it was worker_0.round_0.pt": newer(tmp_path, 0).read_bytes(),
    }
    for text, content in others.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=text):
            run({"rounds": 3}, checkpoint=tmp_path)
    path.write_bytes(good)
    assert numbers(run({"rounds": 3}, checkpoint=tmp_path)) == numbers(run({"rounds": 3}))


def test_a_checkpoint_that_holds_something_else(tmp_path: Path) -> None:
    run({"rounds": 1}, checkpoint=tmp_path)
    store = Checkpoints(tmp_path, "worker", "round", [0], lambda value: [value])
    with store.loading(0, 0, torch.device("cpu")) as state:
        good = state
    replica, (record,) = good["replica"], good["rounds"]
    for other in (
        [1], {}, good | {"settings": None}, good | {"rounds": [record | {"more": 1}]},
        good | {"rounds": [{}]}, good | {"replica": replica | {"grown": {}}},
    ):  # fmt: skip
        store.save(0, 0, other)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=r"worker_0.round_0.pt is no checkpoint|another configuration"):
            run(checkpoint=tmp_path)


def test_a_checkpoint_of_another_optimizer_schedule_or_data(tmp_path: Path) -> None:
    def adam(kind: Any, rate: float) -> Any:
        return lambda model: kind(model.parameters(), lr=rate)

    def stepping(size: int) -> Any:
        return lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, size, 0.5)

    optimizers = torch.optim
    first = {"rounds": 1, "optimizer": adam(optimizers.Adam, 0.01), "scheduler": stepping(2)}
    run(first, checkpoint=tmp_path)
    for changes, text in (
        ({"optimizer": adam(optimizers.AdamW, 0.01)}, "its optimizer is Adam, and is AdamW here"),
        ({"optimizer": adam(optimizers.Adam, 0.1)}, "its optimizer's lr is 0.01, and is 0.1 here"),
        ({"optimizer": sgd()}, "its optimizer is Adam, and is SGD here"),
        ({"scheduler": None}, "its scheduler is StepLR, and is None here"),
        ({"scheduler": stepping(3)}, "its scheduler's step_size is 2, and is 3 here"),
    ):
        with pytest.raises(UserError, match=text):
            run(first | changes | {"rounds": 2}, checkpoint=tmp_path)
    x, y = data()
    other = y.clone()
    other[5] = (other[5] + 1) % 3
    with pytest.raises(UserError, match="its data is other examples"):
        settings(**first).run(
            net,
            (x, other),
            F.cross_entropy,
            test=[data(40)],
            error=gs.train.misclassified,
            checkpoint=tmp_path,
        )


def test_a_checkpoint_of_more_rounds(tmp_path: Path) -> None:
    run({"rounds": 3}, checkpoint=tmp_path)
    with pytest.raises(UserError, match=r"has 3 rounds, and training is to have 1 .*ask for 3 or more"):
        run({"rounds": 1}, checkpoint=tmp_path)


def test_a_checkpoint_without_the_files_of_a_worker(tmp_path: Path) -> None:
    """Training is not begun anew, over the files of the others."""
    run({"rounds": 3}, checkpoint=tmp_path)
    for number in (1, 2):
        (tmp_path / f"worker_1.round_{number}.pt").unlink()
    kept = newer(tmp_path, 2).read_bytes()
    with pytest.raises(UserError, match=r"worker_1.round_1.pt is missing.*bring it back"):
        run({"rounds": 4}, checkpoint=tmp_path)
    assert newer(tmp_path, 2).read_bytes() == kept


def test_checkpoints_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder is tried before training, a full disk is told by name."""
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", Path("/sys/kernel")):
        with pytest.raises(UserError, match="checkpoints cannot be written to"):
            run(checkpoint=folder)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"worker_0.round_0.pt cannot be written: .*No space left"):
        run(checkpoint=tmp_path / "run")


def test_data_is_told_apart_by_what_it_gives() -> None:
    """Of tensors any number counts; of others a sample, unless it is drawn from what cannot be seeded."""
    x, y = data(60)
    assert Examples((x, y)).digest() == Examples(TensorDataset(x.clone(), y)).digest()
    assert Examples((x, y)).digest() != Examples((x.double(), y)).digest()
    assert Examples(Rows()).digest() == Examples(DataLoader(Rows(), batch_size=7)).digest() is not None
    assert Examples(Noisy()).digest() == Examples(Noisy()).digest() != Examples(Rows()).digest()
    state = torch.get_rng_state()
    drawn = iter(range(1000))

    class Counted(Rows):
        def __getitem__(self, number: int) -> Any:
            return torch.tensor(next(drawn)), torch.tensor(0)

    assert Examples(Counted()).digest() is None
    assert torch.equal(state, torch.get_rng_state())


# Workers that diverge


def poisoned(worker: int) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """An optimizer that makes the parameters of one worker NaN in its first step."""
    made: list[int] = []

    def make(model: nn.Module) -> torch.optim.Optimizer:
        made.append(len(made))
        return sgd(float("nan") if made[-1] == worker else 0.2)(model)

    return make


@pytest.mark.parametrize("method", ["ec", "ma", "e"])
def test_a_worker_that_diverged_is_named_or_left_out(method: str) -> None:
    with pytest.raises(UserError, match=r"worker 1 diverged in round 1.*on_nan='leave_out'"):
        run({"method": method, "optimizer": poisoned(1)})
    found = run({"method": method, "optimizer": poisoned(1), "on_nan": "leave_out", "rounds": 3})
    assert [record.left_out for record in found.rounds] == [(1,), (), ()]
    assert found.rounds[0].weights[1] == 0 or method == "ma"
    assert len(found.rounds[0].local_losses) == 2 and len(found.rounds[1].local_losses) == 3
    assert all(
        record.test_loss is not None and record.test_loss == record.test_loss for record in found.rounds
    )
    assert "without workers 1" in str(found.rounds[0])


def test_a_worker_that_diverged_while_it_was_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    compress = Replica.compress

    def breaking(self: Replica, sampler: Any, moment: int, *rest: Any) -> float:
        found = compress(self, sampler, moment, *rest)
        if self.number == 2 and moment == 1:
            next(self.model.parameters()).data.fill_(float("inf"))
        return found

    monkeypatch.setattr(Replica, "compress", breaking)
    with pytest.raises(UserError, match="worker 2 diverged in round 2"):
        run()
    found = run({"on_nan": "leave_out"})
    assert [record.left_out for record in found.rounds] == [(), (), ()]
    assert all(torch.isfinite(torch.tensor(record.losses)).all() for record in found.rounds)


@pytest.mark.parametrize("method", ["ec", "ma"])
def test_buffers_that_diverge_name_their_worker(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all follow its answers; numbers that are infinite from the start are a mask."""
    train = Replica.train

    def breaking(self: Replica, first: int, *rest: Any) -> float:
        found = train(self, first, *rest)
        if self.number == 1 and first == (6 if method == "ma" else 4):
            dict(self.model.named_buffers())["1.running_var"].fill_(float("inf"))
        return found

    monkeypatch.setattr(Replica, "train", breaking)

    def masked() -> nn.Module:
        model = net()
        model.register_buffer("mask", torch.tensor(float("-inf")))
        return model

    training = settings(method=method)
    with pytest.raises(UserError, match="worker 1 diverged in round 2: its loss, parameters or buffers"):
        training.run(masked, data(), F.cross_entropy)
    found = dataclasses.replace(training, on_nan="leave_out").run(masked, data(), F.cross_entropy)
    assert [record.left_out for record in found.rounds] == [(), (1,), ()]


def test_all_diverged() -> None:
    with pytest.raises(UserError, match="worker 0 diverged"):
        run({"optimizer": sgd(float("nan")), "on_nan": "leave_out"})


class Noisy(Rows):
    """Examples that are drawn anew whenever they are read, in batches of mappings."""

    def __getitem__(self, number: int) -> Any:
        inputs, target = super().__getitem__(number)
        return {"features": inputs["features"] + 0.1 * torch.randn(5)}, target


def hard(exchange: str, **options: Any) -> gs.train.EnsembleTrained:
    """Shards of unlike sizes, random examples, nested outputs, and workers that diverge in two places."""

    def loss(outputs: dict[str, Tensor], y: Tensor) -> Tensor:
        return F.cross_entropy(outputs["logits"], y)

    def breaking(own: Callable[..., float], worker: int, place: int, moment: int) -> Callable[..., float]:
        def broken(self: Replica, *rest: Any) -> float:
            found = own(self, *rest)
            if self.number == worker and rest[place] == moment:
                next(self.model.parameters()).data.fill_(float("inf"))
            return found

        return broken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Replica, "train", breaking(Replica.train, 1, 0, 4))
        patch.setattr(Replica, "compress", breaking(Replica.compress, 0, 1, 2))
        return settings(exchange=exchange, weights="regression", on_nan="leave_out", rounds=4).run(
            Named, Noisy(), loss, shards=[range(40), range(40, 46), range(30, 60)],
            test=[({"features": x}, y) for x, y in (data(40), data(50))], **options,
        )  # fmt: skip


def test_predictions_of_unequal_shards_without_a_worker_that_diverged() -> None:
    replicas, predictions = hard("replicas"), hard("predictions")
    assert [record.left_out for record in predictions.rounds] == [(), (1,), (), ()]
    for one, two in zip(numbers(replicas), numbers(predictions), strict=True):
        assert one.pop("bytes") and two.pop("bytes") and one == two
    assert same(replicas.local_model, predictions.local_model)


def test_a_checkpoint_goes_on_with_another_exchange(tmp_path: Path) -> None:
    """It changes nothing of what is learnt."""
    whole = run({"rounds": 3})
    run({"rounds": 2}, checkpoint=tmp_path)
    found = run({"rounds": 3, "exchange": "predictions"}, checkpoint=tmp_path)
    assert same(found.local_model, whole.local_model) and found.rounds[1].bytes == whole.rounds[1].bytes


# Shards


def test_shards_are_equal_and_disjoint() -> None:
    shards = deal(91, 4, 3)
    assert sorted(map(len, shards)) == [22, 23, 23, 23]
    assert sorted(number for shard in shards for number in shard) == list(range(91))
    assert shards == deal(91, 4, 3) != deal(91, 4, 4)


def test_sampler_goes_through_the_shard_and_can_start_anywhere() -> None:
    shard = list(range(100, 123))
    batches = list(ShardSampler(shard, 5, 0, 0, 8))
    first = [number for batch in batches[:4] for number in batch]
    assert len(set(first)) == 20 and set(first) <= set(shard)
    assert list(ShardSampler(shard, 5, 0, 3, 4)) == batches[3:7]
    assert list(ShardSampler(shard, 5, 1, 0, 8)) != batches
    assert list(ShardSampler([7, 8], 5, 0, 0, 1)) in ([[7, 8]], [[8, 7]])


def test_shards_of_unequal_size() -> None:
    found = run(shards=[range(40), range(40, 46), range(46, 90)])
    assert len(found.rounds) == 3 and found.rounds[-1].test_loss is not None


# Bad input


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"k": 0}, "k is 0"),
        ({"tau": 0}, "tau is 0"),
        ({"mu": 0}, "mu is 0"),
        ({"p": 1.5}, "p is 1.5"),
        ({"beta": -1}, "beta is -1"),
        ({"method": "dnn"}, "method is 'dnn', expected one of ec, ma, e, s"),
        ({"weights": "best"}, "weights is 'best'"),
        ({"on_nan": "ignore"}, "on_nan is 'ignore'"),
        ({"tau": 3, "p": 0.1}, r"p of 0.1 of 3 steps is no step of compression"),
        ({"patience": 2}, "patience needs test data"),
        ({"exchange": "outputs"}, "exchange is 'outputs', expected one of replicas, predictions"),
        ({"exchange": "predictions", "method": "ma"}, r"'ma' makes no ensemble.*exchange='replicas'"),
        ({"k": 91}, "90 examples cannot be dealt to 91 workers"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        settings(**changes).run(net, data(), F.cross_entropy)


def plateau(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=2)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"k": "2"}, "k is '2', expected a whole number of 1 or more"),
        ({"rounds": 2.0}, "rounds is 2.0"),
        ({"batch": True}, "batch is True"),
        ({"seed": None}, "seed is None, expected a whole number"),
        ({"warmup": -1}, "warmup is -1"),
        ({"alpha": float("nan")}, "alpha is nan, expected a number of 0 or more"),
        ({"patience": 0}, "patience is 0, expected a whole number of 1 or more, or None"),
        ({"clip": -1.0}, "clip is -1.0, expected a number above 0, or None"),
        ({"amp": torch.int8}, "amp is torch.int8, expected one of torch.float16, torch.bfloat16, or None"),
        ({"amp": True}, "amp is True"),
        ({"keep": "float16"}, "keep is 'float16', expected one of torch.float16"),
        ({"device": "gpu"}, "device 'gpu' cannot be used"),
        ({"device": "meta"}, "device 'meta' cannot be used"),
        ({"device": 3}, "device is 3, expected a device"),
        ({"optimizer": None}, "optimizer is None, expected a function of a module"),
        ({"optimizer": torch.optim.SGD}, r"optimizer is the class SGD.*lambda m: "),
        ({"optimizer": functools.partial(torch.optim.SGD, lr=0.1)}, "optimizer is of type partial"),
        ({"optimizer": sgd()(net())}, "optimizer is of type SGD, expected a function"),
        ({"optimizer": lambda _: None}, "optimizer makes a NoneType"),
        ({"optimizer": lambda _: sgd()(net())}, "has no parameter of the module that it is made for"),
        ({"optimizer": lambda m: torch.optim.LBFGS(m.parameters())}, "LBFGS computes the loss again"),
        ({"scheduler": 3}, "scheduler is 3, expected a function of an optimizer, or None"),
        ({"scheduler": plateau}, "ReduceLROnPlateau follows the loss of one model"),
        ({"scheduler": one_cycle}, "OneCycleLR has 2 steps, and training takes 3"),
        ({"scheduler": one_cycle, "step_every_batch": True}, "training takes 18"),
    ],
)
def test_settings_of_another_kind(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        settings(**changes).run(net, data(), F.cross_entropy)


def test_recipes_are_looked_at_likewise() -> None:
    with pytest.raises(UserError, match="clip is 0, expected a number above 0"):
        gs.train.Recipe(clip=0)
    with pytest.raises(UserError, match="critic_optimizer is the class SGD"):
        gs.train.Recipe(critic_optimizer=torch.optim.SGD)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"shards": 2}, "shards are no numbers of examples: .*give 3 lists"),
        ({"shards": ["ab", "cd", "ef"]}, "shards are no numbers of examples"),
        ({"checkpoint": 5}, "checkpoint is 5, expected a folder, or None"),
        ({"on_round": 3}, "on_round is 3, expected a function of a record"),
        ({"error": "accuracy"}, "error is 'accuracy', expected a function of outputs and targets"),
        ({"test": 3}, "test is 3, expected batches, or None"),
    ],
)
def test_options_of_another_kind(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        run(**options)


def test_one_pair_is_a_batch_of_tests() -> None:
    assert numbers(run(test=data(40))) == numbers(run(test=[data(40)]))


class Unnumbered(IterableDataset[Any]):
    """Examples in a row, whose number is known."""

    def __len__(self) -> int:
        return 90

    def __iter__(self) -> Any:
        return iter(TensorDataset(*data()))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ((data()[0], data()[1][:50]), "data has 90 inputs and 50 targets"),
        (tuple(part.numpy() for part in data()), r"data is a tuple \(ndarray, ndarray\).*torch.from_numpy"),
        (((data()[0], data()[0]), data()[1]), r"data is a tuple \(tuple, Tensor\).*give a Dataset"),
        ([data(8)] * 9, r"the loss does not take .*examples one by one"),
        (Unnumbered(), "a Unnumbered cannot be dealt out"),
        (DataLoader(Unnumbered()), "a Unnumbered cannot be dealt out"),
        ({"x": data()[0]}, "a dict cannot be dealt out"),
        ([object()] * 9, "the examples of the data cannot be read as a batch"),
        (5, "a int cannot be dealt out"),
    ],
)
def test_data_of_another_kind(given: Any, text: str) -> None:
    with pytest.raises(UserError, match=text):
        settings().run(net, given, F.cross_entropy)


class Shaped(nn.Module):
    """Gives what a function makes of the scores."""

    def __init__(self, shape: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.head, self.shape = nn.Linear(5, 3), shape

    def forward(self, x: Tensor) -> Any:
        return self.shape(self.head(x))


class Expanded(nn.Module):
    """Has a buffer with one place for three numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)
        self.register_buffer("scale", torch.ones(1).expand(3))

    def forward(self, x: Tensor) -> Any:
        return self.head(x)


def old_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(5, 3))


def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where training begins."""

    def train(*_: Any) -> float:
        raise AssertionError("training has begun")

    monkeypatch.setattr(Replica, "train", train)


SHARED = Shaped(lambda scores: scores)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (lambda: None, "the function of the model gives a NoneType"),
        (lambda: SHARED, "gives one module for several workers"),
        (5, "model is 5, expected a module"),
        (lambda: nn.LazyLinear(3), "weight has no shape yet"),
        (old_norm, "the model cannot be copied.*parametrizations"),
        (Expanded, "scale has several elements in one place"),
        (lambda: Shaped(lambda scores: scores.repeat(2, 1)), r"outputs of shape \(16, 3\) for 8 examples"),
        (lambda: Shaped(lambda scores: scores[None]), r"outputs of shape \(1, 8, 3\) for 8 examples"),
        (lambda: Shaped(lambda scores: scores.mean()), r"outputs of shape \(\) for 8 examples"),
        (lambda: nn.Linear(7, 3), "the model takes no batch of 8 in training: mat1 and mat2"),
    ],
)
def test_models_that_cannot_be_used(model: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    untrained(monkeypatch)
    with pytest.raises(UserError, match=text):
        settings().run(model, data(), F.cross_entropy)


def test_averaging_needs_no_outputs_of_examples() -> None:
    def model() -> nn.Module:
        return Shaped(lambda scores: scores.square().mean())

    found = settings(method="ma").run(model, data(), lambda outputs, _: outputs)
    assert found.rounds[-1].losses[0] < found.rounds[0].losses[0]


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        ("cross_entropy", "loss is 'cross_entropy', expected a function"),
        (nn.CrossEntropyLoss, "loss is the class CrossEntropyLoss, expected a function"),
        (
            lambda outputs, y: F.cross_entropy(outputs, y, reduction="none"),
            r"loss gives a tensor of shape \(8,\)",
        ),
        (lambda outputs, y: F.cross_entropy(outputs, y).item(), "the loss gives a float, expected a scalar"),
        (lambda outputs, y: F.cross_entropy(outputs, y).detach(), "the loss has no gradient"),
        (lambda outputs, y: F.cross_entropy(outputs[:3], y), "the loss does not take outputs"),
    ],
)
def test_losses_that_cannot_be_used(loss: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    untrained(monkeypatch)
    with pytest.raises(UserError, match=text):
        settings().run(net, data(), loss)


def test_batches_of_one_for_a_batch_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    untrained(monkeypatch)
    with pytest.raises(UserError, match=r"no batch of 1 in training: Expected more than 1 value.*mu="):
        settings(mu=0.01).run(net, data(), F.cross_entropy)
    x, y = data()
    with pytest.raises(UserError, match="no batch of 1 in training"):
        settings().run(net, (x[:3], y[:3]), F.cross_entropy)


def test_sparse_gradients_are_not_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    untrained(monkeypatch)
    words = torch.randint(9, (90,), generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match="the loss has no gradients that can be used"):
        settings(clip=1.0).run(lambda: nn.Embedding(9, 3, sparse=True), (words, data()[1]), F.cross_entropy)


class Counting(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.head(x)


class Table(nn.Module):
    """Makes a table in its first forward, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.scale = nn.Linear(5, 3), nn.Parameter(torch.ones(5))
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Any:
        if self.table is None or len(self.table) < len(x):
            self.table = torch.arange(len(x))[:, None].cos()
        return self.head(x * self.scale * self.table[: len(x)])


def tables(changes: dict[str, Any], **options: Any) -> gs.train.EnsembleTrained:
    return settings(**changes).run(Table, data(), F.cross_entropy, test=[data(40)], **options)


def test_tables_that_are_made_in_forward_can_be_trained_with() -> None:
    found = tables({})
    for model in (*found.members, found.local_model):
        model(data(40)[0]).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_buffers_that_are_written_in_eval_mode_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="forward writes calls in eval mode, too") as caught:
        settings(rounds=1).run(Counting, data(), F.cross_entropy)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings(rounds=1).run(net, data(), F.cross_entropy)


def test_data_and_shards_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="2 shards for 3 workers"):
        run(shards=[range(3), range(4)])
    with pytest.raises(UserError, match="shard of worker 1 is empty"):
        run(shards=[range(3), [], range(4)])
    with pytest.raises(UserError, match="worker 2 names example 90 of 90"):
        run(shards=[range(3), range(4), range(91)])
    with pytest.raises(UserError, match=r"a generator cannot be dealt out"):
        settings().run(net, (pair for pair in [data()]), F.cross_entropy)  # type: ignore[arg-type]


def test_answers_too_large_to_be_kept() -> None:
    """Targets of 1e5 are no half-precision numbers; that is no matter of the learning rate."""
    x = data()[0]
    given = (x, 2e5 + x[:, :2])
    build = lambda: nn.Sequential(nn.Linear(5, 2))  # noqa: E731
    training = settings(optimizer=sgd(0.1), weights="regression", diversity=0.0)
    with pytest.raises(UserError, match=r"answers up to \d.* do not fit in float16.*keep=torch.float32"):
        training.run(build, given, F.mse_loss)
    found = dataclasses.replace(training, keep=torch.float32).run(build, given, F.mse_loss)
    assert found.rounds[-1].losses[0] < found.rounds[0].losses[0]


def test_a_model_without_anything_to_train() -> None:
    with pytest.raises(UserError, match=r"no parameter of the model is to be trained"):
        settings().run(net().requires_grad_(False), data(), F.cross_entropy)


def test_a_loss_that_takes_no_answers() -> None:
    def loss(scores: Tensor, y: Tensor) -> Tensor:
        return F.nll_loss(scores.log_softmax(1), y)

    with pytest.raises(UserError, match=r"takes no answers \(8, 3\).*pseudo_loss="):
        settings().run(net, data(), loss)
    found = settings().run(net, data(), loss, pseudo_loss=F.cross_entropy)
    assert same(found.local_model, settings().run(net, data(), F.cross_entropy).local_model)


def test_a_loss_that_is_not_convex_is_warned_of() -> None:
    def saturating(scores: Tensor, y: Tensor) -> Tensor:
        hot = F.one_hot(y, 3) if not y.dtype.is_floating_point else y
        return (1 - (-(scores - hot).square().sum(1)).exp()).mean()

    with pytest.warns(UserWarning, match="not convex in the outputs"):
        settings(rounds=1).run(net, data(), saturating)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings(rounds=1).run(net, data(), F.cross_entropy)
    assert is_convex(F.mse_loss, torch.zeros(4, 3), torch.randn(4, 3))
    assert not is_convex(saturating, torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]))


class Growing(nn.Module):
    """Models of different output shapes: each one made has one class more."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        Growing.made += 1
        self.head = nn.Linear(5, 3 + Growing.made)

    def forward(self, x: Tensor) -> Any:
        return self.head(x)


def test_replicas_of_different_shapes_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"replica of worker 1 has head.weight of shape \[5, 5\], and that of worker 0"
    ):
        settings().run(Growing, data(), F.cross_entropy)


# What outputs are


def test_diversity_of_yes_and_no_follows_equation_9() -> None:
    """Scores of several labels each: the distance is between their probabilities, the mean over all."""
    x, _ = data(dtype=torch.float64)
    y = (x[:, :3] > 0).long()
    own, others = plain(), [plain(), plain()]

    def loss(scores: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(scores, y.double())

    task = Task(Examples((x, y)), loss, loss, torch.device("cpu"), 0, 8, torch.float64)
    worker = Replica(0, copy.deepcopy(own), Learning(optimizer=sgd(0.5)), task, range(30))
    sampler = task.local(0, range(30), 0, 1)
    (chosen,) = sampler
    mean = answers(worker, sampler, others, torch.full((2,), 0.5))
    target = ((others[0](x[chosen]) + others[1](x[chosen])) / 2).sigmoid().detach()
    torch.testing.assert_close(mean.of(chosen), target)
    worker.train(0, 1, 0.7, mean)
    scores = own(x[chosen])
    whole = loss(scores, y[chosen]) - 0.7 * (scores.sigmoid() - target).square().mean()
    gradients = torch.autograd.grad(whole, list(own.parameters()))
    for moved, parameter, gradient in zip(
        worker.model.parameters(), own.parameters(), gradients, strict=True
    ):
        torch.testing.assert_close(moved, parameter - 0.5 * gradient, rtol=1e-12, atol=1e-12)


def test_regression_of_many_outputs_does_not_run_away() -> None:
    """There is no diversity of values, whose distance has no bound."""
    torch.manual_seed(0)
    x = torch.randn(90, 5)
    given = x, x @ torch.randn(5, 20)
    build = lambda: nn.Linear(5, 20)  # noqa: E731
    found = settings(rounds=12, tau=30, p=0.2).run(build, given, F.mse_loss, test=[given])
    losses = [record.test_loss for record in found.rounds]
    assert losses[-1] is not None and losses[0] is not None and losses[-1] < 0.01 * losses[0]
    with pytest.raises(UserError, match=r"diversity 0.1 is of distances of probabilities.*diversity=0"):
        settings(diversity=0.1).run(build, given, F.mse_loss)


SOFT: dict[str, tuple[gs.answers.Answers, Callable[[Tensor], Tensor], Callable[..., Tensor]]] = {
    "yes and no": ("binary", lambda x: (x[:, :3] > 0).float(), F.binary_cross_entropy_with_logits),
    "vectors with a one": ("classes", lambda x: F.one_hot(x[:, :3].argmax(1)).float(), F.cross_entropy),
}


@pytest.mark.parametrize("case", SOFT)
@pytest.mark.parametrize("average", ["outputs", "probabilities"])
def test_targets_that_are_probabilities(case: str, average: str) -> None:
    """Real numbers do not tell: taken for values, scores would stand for probabilities, and run away."""
    kind, targets, loss = SOFT[case]
    x = data()[0]
    given = x, targets(x)
    if average == "outputs":
        with pytest.raises(UserError, match=r"falls without end.*real numbers.*answers=.*pseudo_loss="):
            settings().run(net, given, loss)
    training = settings(answers=kind, average=average, rounds=8, tau=12)
    found = training.run(net, given, loss, test=[given], error=None)
    losses = [record.test_loss for record in found.rounds]
    assert losses[-1] is not None and losses[0] is not None and losses[-1] < 0.8 * losses[0]
    if kind == "binary" and average == "outputs":
        same_said = settings(rounds=8, tau=12, diversity=0.0)
        own = same_said.run(net, given, loss, pseudo_loss=lambda o, g: loss(o, g.sigmoid()))
        other = dataclasses.replace(same_said, answers=kind, keep=torch.float32).run(net, given, loss)
        for one, two in zip(own.local_model.parameters(), other.local_model.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=0.05, atol=0.005)


@pytest.mark.parametrize("columns", [1, 3])
def test_whole_numbers_of_the_shape_of_outputs_are_yes_and_no(columns: int) -> None:
    seen: list[Tensor] = []
    x = data()[0]
    given = x, (x[:, :columns] > 0).long()

    def loss(scores: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(scores, y.float())

    def following(scores: Tensor, answers: Tensor) -> Tensor:
        seen.append(answers)
        return loss(scores, answers)

    build = lambda: nn.Linear(5, columns)  # noqa: E731
    found = settings(rounds=6, tau=12, alpha=0.3, beta=0.7, optimizer=sgd(1.0)).run(
        build, given, loss, pseudo_loss=following, test=[given], error=gs.train.misclassified,
        on_round=lambda record: None if record.number else seen.clear(),
    )  # fmt: skip
    labels = torch.cat(seen)
    assert float(labels.min()) < 0.2 and float(labels.max()) > 0.8
    assert found.rounds[-1].test_error is not None and found.rounds[-1].test_error < 0.1
    if columns > 1:
        assert not torch.allclose(labels.sum(1), torch.ones(len(labels)), atol=1e-2)


@pytest.mark.parametrize("average", ["outputs", "probabilities"])
@pytest.mark.parametrize("weights", ["simple", "margin", "regression"])
def test_classes_in_dimension_one_of_sequences(average: str, weights: str) -> None:
    """As `F.cross_entropy` has them; no softmax is over time."""
    torch.manual_seed(0)
    x = torch.randn(60, 2, 7)
    given, seen = (x, (x[:, 0] > 0).long()), []

    def following(scores: Tensor, answers: Tensor) -> Tensor:
        seen.append(answers.sum(1))
        return F.cross_entropy(scores, answers)

    found = settings(average=average, weights=weights, keep=torch.float32, mu=1.0).run(
        lambda: nn.Conv1d(2, 3, 3, padding=1), given, F.cross_entropy,
        pseudo_loss=following, test=[given], error=gs.train.misclassified,
        on_round=lambda record: None if record.number else seen.clear(),
    )  # fmt: skip
    torch.testing.assert_close(torch.cat(seen), torch.ones_like(torch.cat(seen)))
    used = found.rounds[-1].weights
    with torch.no_grad():
        each = torch.stack([w * (m(x).softmax(1) if average == "probabilities" else m(x))
                            for w, m in zip(used, found.members, strict=True)]).sum(0)  # fmt: skip
        mixed = each.log() if average == "probabilities" else each
        expected = F.cross_entropy(mixed, given[1]).item(), gs.train.misclassified(mixed, given[1]).item()
    assert (found.rounds[-1].test_loss, found.rounds[-1].test_error) == pytest.approx(expected, abs=1e-5)


class Tokens(nn.Module):
    """Scores ``[N, T, C]`` of the next token."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 8), nn.Linear(8, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


def next_token(scores: Tensor, targets: Tensor) -> Tensor:
    """Takes classes ``[N, T]``, and answers ``[N, T, C]``."""
    return F.cross_entropy(scores.movedim(-1, 1), targets.movedim(-1, 1) if targets.dim() == 3 else targets)


@pytest.mark.parametrize("weights", ["simple", "margin", "regression"])
def test_classes_in_the_last_dimension_of_sequences(weights: str) -> None:
    tokens = torch.randint(0, 5, (60, 7), generator=torch.Generator().manual_seed(0))
    given = tokens, (tokens + 1) % 5
    training = settings(weights=weights, rounds=6, tau=20, optimizer=sgd(2.0), average="probabilities")
    found = training.run(Tokens, given, next_token, test=[given], error=gs.train.misclassified)
    assert found.rounds[-1].test_error == 0
    square = tokens[:, :5], given[1][:, :5]
    with pytest.raises(UserError, match=r"dimension 1 or in the last one.*answers='classes_last'"):
        training.run(Tokens, square, next_token)
    dataclasses.replace(training, answers="classes_last").run(Tokens, square, next_token)


@pytest.mark.parametrize(
    ("loss", "kind", "bounded"),
    [
        (F.cross_entropy, "classes", True),
        (F.cross_entropy, "values", False),
        (lambda o, t: F.cross_entropy(o, t, label_smoothing=0.1), "classes", True),
        (lambda o, t: F.cross_entropy(o, t, weight=torch.tensor([0.1, 1.0, 9.0])), "classes", True),
        (lambda o, t: F.cross_entropy(o, t, reduction="sum"), "classes", True),
        (F.binary_cross_entropy_with_logits, "binary", True),
        (F.binary_cross_entropy_with_logits, "values", False),
        (lambda o, t: F.binary_cross_entropy_with_logits(o, t.sigmoid()), "values", True),
        (F.mse_loss, "values", True),
        (F.l1_loss, "values", True),
        (F.huber_loss, "values", True),
        (F.poisson_nll_loss, "values", False),
        (F.binary_cross_entropy, "values", True),
    ],
)
@pytest.mark.parametrize("shape", [(8, 3), (200, 3)])
def test_losses_that_fall_without_end(
    loss: Callable[..., Tensor], kind: Any, bounded: bool, shape: tuple[int, ...]
) -> None:
    assert is_bounded(loss, torch.randn(shape, generator=torch.Generator().manual_seed(0)), kind) == bounded


def test_a_loss_that_was_made_for_answers_is_trusted() -> None:
    """It may be bounded on what the model can give alone, here logarithms of probabilities."""
    build = lambda: nn.Sequential(net(), nn.LogSoftmax(1))  # noqa: E731
    found = settings().run(build, data(), F.nll_loss, pseudo_loss=lambda o, a: -(o * a).sum(1).mean())
    same_said = settings().run(build, data(), F.nll_loss, pseudo_loss=F.cross_entropy)
    for one, two in zip(found.local_model.parameters(), same_said.local_model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_complex_values() -> None:
    x = data()[0]
    given = x, torch.fft.fft(x[:, :3])

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).abs().square().mean()

    build = lambda: Spectrum(nn.Linear(5, 3))  # noqa: E731
    found = settings(rounds=6, tau=12).run(build, given, loss, test=[given])
    losses = [record.test_loss for record in found.rounds]
    assert losses[-1] is not None and losses[0] is not None and losses[-1] < 0.5 * losses[0]


class Spectrum(nn.Module):
    """Gives complex numbers."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(self.head(x))


def test_a_model_that_gives_probabilities() -> None:
    """Losses that take nothing else are tried on nothing else."""
    x = data()[0]
    given = x, (x[:, :1] > 0).float()
    build = lambda: nn.Sequential(nn.Linear(5, 1), nn.Sigmoid())  # noqa: E731
    found = settings(rounds=6, tau=12).run(build, given, F.binary_cross_entropy, test=[given])
    assert found.rounds[-1].test_loss is not None and found.rounds[-1].test_loss < 0.5
    outputs = torch.full((4, 1), 0.5)
    assert is_convex(F.binary_cross_entropy, outputs, torch.ones(4, 1))
    assert not is_convex(lambda o, t: (o - 0.5).square().neg().sum(), outputs, torch.ones(4, 1))


@pytest.mark.parametrize(
    ("targets", "changes", "text"),
    [
        (lambda y: y[:, None], {}, r"does not take outputs float32\[8, 3\] with targets int64\[8, 1\]"),
        (lambda y: y.float(), {}, r"does not take .* with targets float32\[8\]: "),
        (lambda y: y + 1, {}, r"does not take .* Target 3 is out of bounds"),
        (lambda y: F.one_hot(y, 3).float(), {"weights": "margin", "answers": "classes"}, "margins are for"),
        (lambda y: y, {"answers": "scores"}, "answers is 'scores', expected one of"),
        (lambda y: y, {"answers": "values", "average": "probabilities", "p": 0}, "have no probabilities"),
    ],
)
def test_targets_that_do_not_fit(
    targets: Callable[[Tensor], Tensor], changes: dict[str, Any], text: str
) -> None:
    x, y = data()
    with pytest.raises(UserError, match=text):
        settings(**changes).run(net, (x, targets(y)), F.cross_entropy)


class Spoiling(nn.Module):
    """Changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mul_(2))


def test_inputs_that_members_change_are_copies() -> None:
    x, y = data(40)
    before = x.clone()
    found = settings(rounds=2).run(Spoiling, data(), F.cross_entropy, test=[(x, y)])
    assert torch.equal(x, before)
    with torch.no_grad():
        outputs = [member.head(2 * x) for member in found.members]
    losses = [float(F.cross_entropy(scores, y)) for scores in outputs]
    assert found.rounds[-1].local_losses == pytest.approx(losses, rel=1e-5)
    mean = sum(outputs) / 3
    assert found.rounds[-1].test_loss == pytest.approx(float(F.cross_entropy(mean, y)), rel=1e-5)
    torch.testing.assert_close(found.global_model.eval()(x), mean)
    assert torch.equal(x, before)


def test_weights_by_regression_are_in_float64() -> None:
    x, y = data(dtype=torch.float64)
    found = settings(weights="regression", mu=1.0, rounds=1, p=0.5).run(plain, (x, y), F.cross_entropy)
    assert isinstance(found.global_model, gs.Ensemble)
    weights = found.global_model.weights
    assert weights.dtype == torch.float64 and weights.tolist() == list(found.rounds[-1].weights)
    assert not torch.equal(weights, weights.float().double())


# The example


def test_example(capsys: pytest.CaptureFixture[str]) -> None:
    found = script("ec_dnn").main(["-k", "2", "--rounds", "3", "--tau", "40"])
    assert found.rounds[-1].test_error < 0.25
    assert "fused to one module" in capsys.readouterr().out
