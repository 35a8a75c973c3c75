"""Studies: trials, their records, and what follows from them."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphsplit as gs
from graphsplit._trials import Task, run_trials
from graphsplit.errors import BundleError, UserError
from graphsplit.scaling.analysis import claims, curves, fit
from graphsplit.scaling.plan import Cell, Plan, Settings, Trial
from laws import run


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3))


def points(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Three classes that a net learns in some dozen steps."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 3
    centres = 2 * torch.eye(4)[:3]
    return centres[targets] + 0.7 * torch.randn(count, 4, generator=generator), targets


TRAIN, HELD = points(96, 1), points(60, 2)


def small(folder: Path, **options: Any) -> gs.Study:
    given = {
        "batches": (4, 32), "sparsities": (0.0, 0.5), "optimizers": ("sgd", "momentum"), "trials": 3,
        "goal": 0.12, "budget": 200, "check": 4, "processes": 1, "fused": 3,
    }  # fmt: skip
    return gs.study(network(), folder, train=TRAIN, held=HELD, loss=F.cross_entropy, **(given | options))


def test_short_trials_are_as_exact_as_long_ones(tmp_path: Path) -> None:
    plan = Plan((8,), check=8)
    looks = [step for step in range(200) if plan.is_due(step)]
    assert looks[:33] == list(range(33)) and looks[-3:] == [176, 184, 192]
    assert all((b - a) * 16 <= max(a, 16) and b - a <= 8 for a, b in itertools.pairwise(looks))
    coarse, exact = (small(tmp_path / str(n), batches=(32,), check=n) for n in (16, 1))
    for cell, steps in exact.steps().items():
        found = coarse.steps()[cell]
        assert steps is not None and found is not None and steps <= found <= steps + max(steps // 8, 1)


def test_a_study_and_its_report(tmp_path: Path) -> None:
    lines: list[str] = []
    found = small(tmp_path / "study", on_cell=lines.append)
    assert found.finished and len(found.trials) == 24 and len(lines) == 8
    assert all(steps is None or found.plan.is_due(steps) for steps in found.steps().values())
    complete = [trial for trial in found.trials if trial.outcome == "complete"]
    assert complete and all(0 < trial.steps <= 200 and (trial.best or 0) <= 0.12 for trial in complete)
    stopped = [trial for trial in found.trials if trial.stopped]
    for trial in stopped:
        best = found.steps()[trial.cell]
        assert best is not None and trial.steps >= 1.5 * best
    record = json.loads((tmp_path / "study" / "trials" / "momentum-s0.5-b32-001.json").read_text())
    assert record["seed"] == 0 and record["settings"]["momentum"] > 0
    pytest.importorskip("matplotlib")
    names = [path.name for path in found.report(tmp_path / "report")]
    assert names == ["steps.png", "normalised.png", "metaparameters.png", "report.html"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert "scales no worse than dense" in page and "24 trials" in page


def test_goes_on_without_repeating_a_finished_trial(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    first = small(folder, fused=1)
    places = sorted((folder / "trials").iterdir())
    times = {place.name: place.stat().st_mtime_ns for place in places}
    gone = [place for place in places if "-b32-002" in place.name]
    for place in gone:
        place.unlink()
    again = small(folder, fused=1)
    assert again.finished
    for place in (folder / "trials").iterdir():
        assert (place.stat().st_mtime_ns == times[place.name]) == (place not in gone), place.name
    assert [trial.settings for trial in again.trials] == [trial.settings for trial in first.trials]


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    small(folder, batches=(32,), trials=1)
    with pytest.raises(BundleError, match=r"another configuration: goal is 0\.12 there and 0\.2 here"):
        small(folder, batches=(32,), trials=1, goal=0.2)
    with pytest.raises(BundleError, match="another configuration: model is"):
        torch.manual_seed(1)
        gs.study(
            nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3)), folder, train=TRAIN, held=HELD,
            loss=F.cross_entropy, batches=(32,), sparsities=(0.0, 0.5), optimizers=("sgd", "momentum"),
            trials=1, goal=0.12, budget=200, check=4,
        )  # fmt: skip
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(BundleError, match="is no study, and is not replaced"):
        small(tmp_path / "other")
    (folder / "trials" / "sgd-s0-b32-000.json").write_text("{")
    with pytest.raises(BundleError, match="is damaged: it is no JSON"):
        gs.Study.open(folder)


def test_in_several_processes(tmp_path: Path) -> None:
    one, two = small(tmp_path / "one"), small(tmp_path / "two", processes=2)
    assert [trial for trial in two.trials] == [trial for trial in one.trials]


def test_processes_of_torchrun_share_the_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    lines: list[list[str]] = [[], []]
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        found = small(tmp_path / "study", on_cell=lines[rank].append)
    assert found.finished and [len(own) for own in lines] == [4, 4]
    assert not set(lines[0]) & set(lines[1])


def test_outcomes(tmp_path: Path) -> None:
    diverged = small(tmp_path / "diverged", rates=(1e6, 1e7), optimizers=("sgd",), batches=(4,), goal=0.0)
    assert {trial.outcome for trial in diverged.trials} <= {"diverged", "not reached"}
    assert any(trial.outcome == "diverged" for trial in diverged.trials)
    late = small(tmp_path / "late", rates=(1e-9, 1e-8), optimizers=("sgd",), batches=(4,))
    assert {(t.outcome, t.steps, t.stopped) for t in late.trials} == {("not reached", 200, False)}
    with pytest.raises(
        UserError, match=r"no trial reached the goal, an error of 0.12: the lowest error was 0\.\d"
    ):
        late.report()
    with pytest.raises(UserError, match="is met before the first step"):
        small(tmp_path / "early", goal=0.99)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "nesterov"])
def test_a_trial_is_plain_training_with_masks(optimizer: Any) -> None:
    """Against torch.optim.SGD on the same batches, with a linearly decayed rate."""
    model = network().double()
    wide = [(x.double(), y) for x, y in (TRAIN, HELD)]
    masks = gs.sparsify(model, data=wide[0], loss=F.cross_entropy, sparsity=0.5)
    plan = Plan((8,), goal=0.0, budget=20, check=4, trials=3, decay="linear", rates=(0.01, 0.3))
    cell = Cell(0.5, 8, optimizer)
    seen: list[float] = []

    def error(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)

    task = Task(gs.emit(masks.program), wide[0], wide[1], F.cross_entropy, error)
    found = run_trials(task, masks.masks, plan, cell, range(3))
    for trial, settings in zip(found, plan.settings(optimizer), strict=True):
        assert trial.settings == settings and trial.outcome == "not reached"
        own = masks.apply(network().double())
        step = torch.optim.SGD(own.parameters(), 1.0, settings.momentum, nesterov=optimizer == "nesterov")
        order = torch.randperm(96, generator=(generator := torch.Generator().manual_seed(0))).split(8)
        batches = [*order, *torch.randperm(96, generator=generator).split(8)]
        best = math.inf
        for number in range(21):
            if plan.is_due(number):
                best = min(best, float(F.cross_entropy(own(wide[1][0]), wide[1][1]).detach()))
            done = min(number / 20 / settings.horizon, 1.0)
            step.param_groups[0]["lr"] = settings.rate * (1 - (1 - settings.end) * done)
            step.zero_grad()
            F.cross_entropy(own(wide[0][0][batches[number]]), wide[0][1][batches[number]]).backward()
            step.step()
        assert trial.best == pytest.approx(best, rel=1e-9)
        seen.append(best)
    assert len(set(seen)) == 3


def test_metaparameters_are_the_same_in_every_cell() -> None:
    plan = Plan((1, 2), trials=8)
    momentum = plan.settings("momentum")
    assert momentum == plan.settings("nesterov") == plan.settings("momentum")
    assert [one.rate for one in momentum] == [one.rate for one in plan.settings("sgd")]
    assert all(one.momentum == 0 for one in plan.settings("sgd"))
    assert all(1e-3 <= one.rate <= 10 and 0.5 <= one.momentum <= 0.99 for one in momentum)
    assert momentum != Plan((1, 2), trials=8, seed=1).settings("momentum")


def test_fit_and_regimes() -> None:
    found = fit({batch: 900 / batch + 30 for batch in (1, 2, 8, 64, 512)})
    assert found is not None and found.c1 == pytest.approx(900) and found.c2 == pytest.approx(30)
    assert found.critical == pytest.approx(30)
    assert [found.regime(batch) for batch in (1, 30, 1000)] == [
        "perfect scaling", "diminishing returns", "maximal data parallelism",
    ]  # fmt: skip
    assert fit({8: 10}) is None
    perfect = fit({1: 100, 2: 40})
    assert perfect is not None and perfect.c2 == 0 and math.isinf(perfect.critical)
    flat = fit({1: 10, 2: 11, 4: 12})
    assert flat is not None and flat.c1 == 0 and flat.critical == 0


def made(sparsity: float, critical: float, optimizer: Any = "momentum") -> list[Trial]:
    """Trials of which the best follow a curve, with others up to a tenth behind."""
    return [
        Trial(
            Cell(sparsity, batch, optimizer), number, Settings(0.1), 0, "complete",
            round((1000 + 10 * number) * (1 / batch + 1 / critical) * 10), False, 0.1,
        )
        for batch in (1, 4, 16, 64, 256)
        for number in range(8)
    ]  # fmt: skip


def test_intervals_and_claims() -> None:
    found = curves([*made(0.0, 20), *made(0.9, 60), *made(0.5, 5), *made(0.7, 20)], resamples=200)
    assert [curve.sparsity for curve in found] == [0.0, 0.5, 0.7, 0.9]
    dense = found[0]
    assert dense.fit is not None and dense.critical[0] <= dense.fit.critical <= dense.critical[1]
    assert dense.critical[1] - dense.critical[0] > 0
    verdict = {(claim.sparsity, claim.text): claim.verdict for claim in claims(found)}
    assert verdict == {
        (0.5, "scales no worse than dense"): "contradicted",
        (0.7, "scales no worse than dense"): "confirmed",
        (0.9, "scales no worse than dense"): "confirmed",
        (0.9, "has a larger critical batch than dense"): "confirmed",
    }


def test_cells_that_were_not_reached_are_left_out() -> None:
    trials = made(0.0, 20)
    lost = [t for t in trials if t.cell.batch == 256]
    kept = [t for t in trials if t.cell.batch != 256]
    late = [Trial(t.cell, t.number, t.settings, 0, "not reached", t.steps, True, 0.5) for t in lost]
    (curve,) = curves([*kept, *late], resamples=20)
    assert list(curve.steps) == [1, 4, 16, 64]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": ()}, r"batches is \(\), expected 1 or more"),
        ({"batches": (1000,)}, "a batch of 1000 from 96 examples"),
        ({"sparsities": (1.0,)}, r"sparsities is \(1\.0,\)"),
        ({"optimizers": ("adam",)}, "expected some of sgd, momentum, nesterov"),
        ({"goal": -1}, "goal is -1"),
        ({"rates": (1.0, 0.1)}, "rates is"),
        ({"momenta": (0.5, 1.0)}, "momenta is"),
        ({"patience": 0.5}, "patience is 0.5"),
        ({"budget": 1}, "budget is 1"),
        ({"fused": 0}, "0 trials as one"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(tmp_path / "study", **options)
    assert not (tmp_path / "study").exists()


FILE = """
import sys
sys.path.insert(0, {tests!r})
from test_study import HELD, TRAIN, network
from torch.nn.functional import cross_entropy as loss
model, data, held = network, TRAIN, HELD
example_inputs = TRAIN[0][:2]
"""


def test_command(tmp_path: Path) -> None:
    file, out = tmp_path / "model.py", tmp_path / "study"
    file.write_text(FILE.format(tests=str(Path(__file__).parent)))
    given = ("--batches", "4,32", "--sparsities", "0,0.5", "--optimizers", "momentum", "--trials", 2)
    given = (*given, "--goal", 0.12, "--budget", 100, "--check", 4, "--processes", 1, "-o", out)
    done = run("study", file, *given, "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["trials"] == 8 and report["finished"] and len(report["curves"]) == 2
    assert (out / "report.html").exists()
    done = run("study", file, *given)
    assert done.exit_code == 0 and "momentum" in done.stdout and "critical batch" in done.stdout
    refused = run("study", file, *given, "--seed", 3)
    assert refused.exit_code == 6 and "another configuration" in refused.stderr
    file.write_text(file.read_text().replace("data, held", "data, other"))
    refused = run("study", file, *given)
    assert refused.exit_code == 3 and "defines no `held`" in refused.stderr


def test_command_with_functions_of_the_file_in_two_processes(tmp_path: Path) -> None:
    file, out = tmp_path / "model.py", tmp_path / "study"
    own = "loss = lambda outputs, targets: cross_entropy(outputs, targets)\n"
    own += "def error():\n    def wrong(outputs, targets):\n"
    own += "        return (outputs.argmax(1) != targets).float().mean()\n    return wrong\n"
    # A model that the file makes when it is run: a process may not run it inside of what calls a function.
    text = FILE.format(tests=str(Path(__file__).parent)).replace("= network,", "= network(),")
    file.write_text(text.replace("cross_entropy as loss", "cross_entropy") + own)
    given = ("--batches", "4,32", "--sparsities", 0, "--optimizers", "momentum", "--trials", 2)
    given = (*given, "--goal", 0.12, "--budget", 100, "--check", 4)
    two = run("study", file, *given, "--processes", 2, "-o", out, "--json")
    assert two.exit_code == 0, two.stderr
    one = run("study", file, *given, "--processes", 1, "-o", tmp_path / "one", "--json")
    assert json.loads(two.stdout)["curves"] == json.loads(one.stdout)["curves"]
    file.write_text(text.replace("cross_entropy as loss", "cross_entropy") + "loss = 3\n")
    refused = run("study", file, *given, "-o", out)
    assert refused.exit_code == 3 and "is an int, expected a function" in refused.stderr
