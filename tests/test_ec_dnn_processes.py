"""EC-DNN with a worker in each process: the numbers of one process, lost workers, restarts."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from graphsplit.errors import UserError
from test_ec_dnn import data, hard, net, numbers, run, same, settings, tables
from test_local_processes import alone, free_port  # noqa: F401  (a fixture)

SCRIPT = """
import copy, os, sys, time
sys.path.insert(0, {tests!r})
import torch
import graphsplit as gs
from graphsplit.train import replicas
from test_ec_dnn import data, hard, net, numbers, run, settings, tables

torch.set_num_threads(1)
folder, case = sys.argv[1], sys.argv[2]
rank = int(os.environ["RANK"])
flag = f"{{folder}}/died"
train = replicas.Replica.train

def dying(self, first, *rest):
    if first >= 8 and rank == 1 and not os.path.exists(flag):
        open(flag, "w").close()
        os._exit(3)
    return train(self, first, *rest)

class Slow(torch.nn.Module):
    # Worker 0 is in the middle of a long round when worker 1 dies.
    def __init__(self):
        super().__init__()
        self.body, self.steps = net(), 0

    def forward(self, x):
        self.steps += 1
        if rank == 1 and self.steps == 3:
            os._exit(3)
        time.sleep(0.2)
        return self.body(x)

if case == "dies":
    replicas.Replica.train = dying
found = {{}}
try:
    for name, changes in {cases!r}.items():
        checkpoint = f"{{folder}}/{{name}}" if case in ("dies", "kept") else None
        if case == "slow":
            trained = settings(**changes).run(Slow, data(), torch.nn.functional.cross_entropy, parallel=True)
        elif case == "hard":
            trained = hard(name, parallel=True)
        elif case == "table":
            trained = tables(changes, parallel=True)
        elif case in ("start", "made"):
            torch.manual_seed(rank)
            base = net()
            model = base if case == "start" else lambda: copy.deepcopy(base)
            trained = settings(**changes).run(model, data(), torch.nn.functional.cross_entropy, parallel=True)
        elif case in ("data", "fewer"):
            x, y = data()
            given = (x + rank, y) if case == "data" else (x[rank:], y[rank:])
            trained = settings(**changes).run(net, given, torch.nn.functional.cross_entropy, parallel=True)
        elif case == "seed":
            trained = run(changes | {{"seed": rank}}, parallel=True)
        elif case in ("shards", "test"):
            shards = [range(40), range(40 + rank, 90)] if case == "shards" else None
            trained = run(changes, parallel=True, shards=shards, test=[data(40)] * (1 + (case == "test") * rank))
        else:
            trained = run(changes, parallel=True, checkpoint=checkpoint)
        found[name] = (
            numbers(trained), trained.global_model.state_dict(), trained.local_model.state_dict(),
            trained.rounds[-1].communication_seconds,
        )
except gs.errors.UserError as error:
    print(error, flush=True)
    sys.exit(4)
torch.save(found, f"{{folder}}/{{rank}}.pt")
"""

PARTS = """
import os, sys, time
sys.path.insert(0, {tests!r})
import graphsplit as gs
from test_train import batches, divide, schedule

rank = int(os.environ["RANK"])

class Slow:
    def __iter__(self):
        for number, batch in enumerate(batches() * 100):
            if rank == 1 and number == 3:
                os._exit(3)
            time.sleep(0.2)
            yield batch

try:
    schedule(divide(), mode="parallel").fit(Slow())
except gs.errors.UserError as error:
    print(error, flush=True)
    sys.exit(4)
"""

CASES: dict[str, dict[str, object]] = {
    "ec": {"k": 2},
    "regression": {"k": 2, "weights": "regression", "average": "probabilities"},
    "margin": {"k": 2, "weights": "margin", "diversity": 0.0},
    "ma": {"k": 2, "method": "ma", "warmup": 3},
    "e": {"k": 2, "method": "e"},
}


def command(folder: Path, case: str, cases: dict[str, dict[str, object]]) -> list[str]:
    script = folder / "run.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), cases=cases))
    return [str(script), str(folder), case]


@contextmanager
def launched(
    folder: Path, case: str, cases: dict[str, dict[str, object]], size: int = 2
) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes, none of which is left behind."""
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, *command(folder, case, cases)],
            env=os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(size), "RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def check(
    folder: Path, rank: int, cases: dict[str, dict[str, object]], one: Callable[..., Any] = run
) -> None:
    found = torch.load(folder / f"{rank}.pt", weights_only=True)
    for name, changes in cases.items():
        expected = one(changes)
        records, whole, local, seconds = found[name]
        assert records == numbers(expected), name
        for model, state in ((expected.global_model, whole), (expected.local_model, local)):
            assert all(torch.equal(state[key], value) for key, value in model.state_dict().items()), name
        assert seconds > 0


def test_the_numbers_are_those_of_one_process(tmp_path: Path) -> None:
    """Bit for bit, also after a checkpoint."""
    for _ in range(2):
        with launched(tmp_path, "kept", CASES) as processes:
            for process in processes:
                text, _ = process.communicate(timeout=600)
                assert process.returncode == 0, text
        if not (tmp_path / "ec" / "worker_0.round_2.pt").exists():
            pytest.fail("no checkpoint was written")
        (tmp_path / "ec" / "worker_1.round_2.pt").unlink(missing_ok=True)  # it goes on from round 1
    for rank in range(2):
        check(tmp_path, rank, {name: CASES[name] for name in CASES if name != "ma"})
        check(tmp_path, rank, {"ma": CASES["ma"]})


PREDICTIONS: dict[str, dict[str, object]] = {
    "ec": {"k": 2, "exchange": "predictions"},
    "regression": {"k": 2, "weights": "regression", "average": "probabilities", "exchange": "predictions"},
    "margin": {"k": 2, "weights": "margin", "diversity": 0.0, "exchange": "predictions"},
    "e": {"k": 2, "method": "e", "exchange": "predictions"},
}


def test_so_where_predictions_are_sent(tmp_path: Path) -> None:
    """Bit for bit, bytes included, those of one process, which are those of sent replicas; also after a checkpoint."""
    for _ in range(2):
        with launched(tmp_path, "kept", PREDICTIONS) as processes:
            for process in processes:
                text, _ = process.communicate(timeout=600)
                assert process.returncode == 0, text
        (tmp_path / "ec" / "worker_1.round_2.pt").unlink(missing_ok=True)  # it goes on from round 1
    for rank in range(2):
        check(tmp_path, rank, PREDICTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["replicas", "predictions"])
def test_so_with_unequal_shards_random_examples_and_workers_that_diverge(
    tmp_path: Path, exchange: str
) -> None:
    with launched(tmp_path, "hard", {exchange: {}}, 3) as processes:
        for process in processes:
            text, _ = process.communicate(timeout=600)
            assert process.returncode == 0, text
    check(tmp_path, 1, {exchange: {}}, lambda _: hard(exchange))


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("shards", "worker 1 has other examples or shards than worker 0"),
        ("test", "worker 1 tests 2 batches of 80 ex"),
    ],
)
def test_predictions_need_the_same_data_in_all_processes(tmp_path: Path, case: str, text: str) -> None:
    with launched(tmp_path, case, {"ec": PREDICTIONS["ec"]}) as processes:
        for process in processes:
            said, _ = process.communicate(timeout=600)
            assert process.returncode == 4 and text in said, said


def test_settings_are_the_same_in_all_processes(tmp_path: Path) -> None:
    """A seed of each process's own would deal the same example to several workers."""
    with launched(tmp_path, "seed", {"ec": CASES["ec"]}) as processes:
        for process in processes:
            said, _ = process.communicate(timeout=600)
            assert process.returncode == 4 and "worker 1 has seed 1, and worker 0 has 0" in said, said


@pytest.mark.parametrize(
    ("case", "method", "text"),
    [
        ("start", "ma", "parameters at the start"),
        ("start", "ec", "parameters at the start"),
        ("made", "ec", "parameters at the start"),
        ("data", "ec", "examples or shards"),
        ("fewer", "ma", "examples or shards"),
    ],
)
def test_data_and_start_are_the_same_in_all_processes(
    tmp_path: Path, case: str, method: str, text: str
) -> None:
    """As in a script that forgets the seed."""
    with launched(tmp_path, case, {"": {"k": 2, "method": method}}) as processes:
        for process in processes:
            said, _ = process.communicate(timeout=600)
            assert process.returncode == 4 and f"worker 1 has other {text} than worker 0" in said, said


def test_models_that_keep_a_table(tmp_path: Path) -> None:
    cases: dict[str, dict[str, object]] = {
        "predictions": {"k": 2, "exchange": "predictions"},
        "regression": {"k": 2, "exchange": "predictions", "weights": "regression"},
    }
    with launched(tmp_path, "table", cases) as processes:
        for process in processes:
            text, _ = process.communicate(timeout=600)
            assert process.returncode == 0, text
    check(tmp_path, 1, cases, tables)


@pytest.mark.slow
def test_three_workers(tmp_path: Path) -> None:
    cases: dict[str, dict[str, object]] = {
        "ec": {}, "regression": {"weights": "regression"}, "predictions": {"exchange": "predictions"},
    }  # fmt: skip
    with launched(tmp_path, "plain", cases, 3) as processes:
        for process in processes:
            text, _ = process.communicate(timeout=600)
            assert process.returncode == 0, text
    check(tmp_path, 2, cases)


def test_a_lost_worker_ends_the_others_within_seconds(tmp_path: Path) -> None:
    """Also while they are in the middle of a long round."""
    with launched(tmp_path, "slow", {"ec": {"k": 2, "tau": 1000}}) as processes:
        processes[1].communicate(timeout=600)
        assert processes[1].returncode == 3
        start = time.monotonic()
        text, _ = processes[0].communicate(timeout=120)
        assert time.monotonic() - start < 20
        assert processes[0].returncode == 4, text
        assert "worker 0 lost another process" in text and "checkpoint=" in text


def test_so_with_a_schedule_of_submodels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SCRIPT", PARTS)
    with launched(tmp_path, "", {}) as processes:
        processes[1].communicate(timeout=600)
        assert processes[1].returncode == 3
        start = time.monotonic()
        text, _ = processes[0].communicate(timeout=120)
        assert time.monotonic() - start < 20
        assert processes[0].returncode == 4 and "process 0 lost another process" in text, text


def test_torchrun_brings_a_run_back_from_its_checkpoint(tmp_path: Path) -> None:
    cases: dict[str, dict[str, object]] = {"ec": {"k": 2, "rounds": 4}}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"),
            *("--master-port", str(free_port()), *command(tmp_path, "dies", cases)),
        ],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "died").exists()
    check(tmp_path, 0, cases)


def test_a_run_that_is_killed_at_any_moment_goes_on(tmp_path: Path) -> None:
    """Killed from outside, at a moment that is not chosen."""
    cases: dict[str, dict[str, object]] = {"ec": {"k": 2, "rounds": 40, "exchange": "predictions"}}
    with launched(tmp_path, "kept", cases) as processes:
        limit = time.monotonic() + 300
        while not (tmp_path / "ec" / "worker_1.round_3.pt").exists() and time.monotonic() < limit:
            time.sleep(0.01)
        for process in processes:
            process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "0.pt").exists()
    with launched(tmp_path, "kept", cases) as processes:
        for process in processes:
            text, _ = process.communicate(timeout=600)
            assert process.returncode == 0, text
    check(tmp_path, 1, cases)


@pytest.mark.usefixtures("alone")
def test_there_is_a_process_for_each_worker() -> None:
    with pytest.raises(UserError, match=r"1 processes for 3 workers.*--nproc-per-node=3"):
        run(parallel=True)


@pytest.mark.usefixtures("alone")
def test_one_process_is_enough_for_one_worker() -> None:
    one = settings(method="s").run(net, data(), F.cross_entropy)
    found = settings(method="s").run(net, data(), F.cross_entropy, parallel=True)
    assert same(found.global_model, one.global_model)


def test_chunks_are_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Small chunks give the same."""
    small = """
import torch.distributed as dist
import graphsplit.train.exchange as exchange
exchange.CHUNK = 100
def bounded(collective, place):
    def checked(*args, **options):
        assert args[place].nbytes <= 100
        return collective(*args, **options)
    return checked
dist.all_gather = bounded(dist.all_gather, 1)
dist.all_to_all_single = bounded(dist.all_to_all_single, 1)
"""
    script = SCRIPT.replace("torch.set_num_threads(1)\n", f"torch.set_num_threads(1)\n{small}")
    monkeypatch.setattr(sys.modules[__name__], "SCRIPT", script)
    cases = {"ec": CASES["ec"], "predictions": PREDICTIONS["ec"]}
    with launched(tmp_path, "plain", cases) as processes:
        for process in processes:
            text, _ = process.communicate(timeout=600)
            assert process.returncode == 0, text
    check(tmp_path, 0, cases)


def test_parallel_needs_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="needs several processes"):
        run(parallel=True)
