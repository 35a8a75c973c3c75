"""Local critics with a group in each process: the same numbers, and what happens when one is lost."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import graphsplit as gs
from graphsplit.errors import UserError

SCRIPT = """
import os, sys
sys.path.insert(0, {tests!r})
import torch
import graphsplit as gs
from test_local_processes import data, local, held_out

torch.set_num_threads(1)
out, checkpoint, case = sys.argv[1], sys.argv[2], sys.argv[3]
rank = int(os.environ["RANK"])
critics = local()
if case == "dies":
    forward = critics.stages[1].forward
    def dying(values, targets, step):
        if step == 3 and rank == 1:
            os._exit(3)
        return forward(values, targets, step)
    critics.stages[1].forward = dying
try:
    records = critics.fit(data(), 1, test=held_out(), parallel=True, checkpoint=checkpoint)
    records += critics.fit(data(), 3, test=held_out(), parallel=True, checkpoint=checkpoint)
    late = local().fit(data(), 2, parallel=True, queue=3)
except gs.errors.UserError as error:
    print(error)
    sys.exit(4)
torch.save(
    {{
        "losses": [(record.losses, record.critic_losses, record.test_losses) for record in records],
        "state": critics.submodel(2).state_dict(),
        "late": [record.losses for record in late],
        "traffic": (records[-1].bytes_down, records[-1].bytes_up),
    }},
    f"{{out}}/{{rank}}.pt",
)
"""


PIPELINED = """
import os, sys
sys.path.insert(0, {tests!r})
import torch, torch.distributed as dist
from torch.distributed.pipelining import Schedule1F1B
from test_local_processes import recurrent

torch.set_num_threads(1)
out, rank = sys.argv[1], int(os.environ["RANK"])
dist.init_process_group("gloo")
groups, x, y = recurrent()
stage = groups.pipeline_stage()
loss = torch.nn.functional.cross_entropy
schedule = Schedule1F1B(stage, 4, loss_fn=lambda scores, classes: loss(scores.flatten(0, 1), classes.flatten()))
if rank == 0:
    schedule.step(x)
elif rank == 2:
    schedule.step(target=y)
else:
    schedule.step()
torch.save([parameter.grad for parameter in stage.submod.parameters()], f"{{out}}/{{rank}}.pt")
dist.destroy_process_group()
"""


class Sequences(nn.Module):
    """What an LSTM gives at each step, which does not lie densely in memory."""

    def __init__(self, given: int, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(given, width, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.lstm(x)[0]
        return found


def recurrent() -> tuple[gs.LayerGroups, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(Sequences(5, 6), Sequences(6, 6), nn.Linear(6, 3)).double()
    x, y = torch.randn(4, 7, 5, dtype=torch.float64), torch.randint(0, 3, (4, 7))
    return gs.layer_groups(model, x[:2], at=["1", "2"]), x, y


def local() -> gs.LocalCritics:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)
    )
    return gs.local_critics(model, torch.randn(4, 6), at=["3", "5"], seed=2)


def data() -> DataLoader[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(42, 6, generator=generator), torch.randint(0, 3, (42,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True, generator=torch.Generator())


def held_out() -> list[tuple[torch.Tensor, ...]]:
    """In the same order every time."""
    return [data().dataset[:]]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port: int = found.getsockname()[1]
        return port


@contextmanager
def launched(folder: Path, case: str, text: str = SCRIPT) -> Iterator[list[subprocess.Popen[str]]]:
    """Three processes, none of which is left behind."""
    processes = launch(folder, case, text)
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def launch(folder: Path, case: str, text: str) -> list[subprocess.Popen[str]]:
    script = folder / "run.py"
    script.write_text(text.format(tests=str(Path(__file__).parent)))
    port = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), str(folder / "checkpoints"), case],
            env=os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "3", "RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(3)
    ]  # fmt: skip


def test_the_numbers_are_those_of_one_process(tmp_path: Path) -> None:
    """Bit for bit: weights, losses, tests, also over a checkpoint; a longer queue trains all the same."""
    with launched(tmp_path, "all") as processes:
        expected = local()
        records = expected.fit(data(), 3, test=held_out())
        for process in processes:
            text, _ = process.communicate(timeout=600)
            assert process.returncode == 0, text
    for rank in range(3):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        losses = [(record.losses, record.critic_losses, record.test_losses) for record in records]
        assert found["losses"] == losses
        assert all(torch.equal(found["state"][k], v) for k, v in expected.submodel(2).state_dict().items())
        assert len(found["late"]) == 2 and found["late"][1][-1] < 2
        # Down: 8 and 7 features of 42 examples, and two sizes for each of 6 batches. Up: a loss for each example.
        assert found["traffic"] == (42 * (8 + 7) * 4 + 6 * 2 * 2 * 8, 2 * 42 * 4)


def test_a_lost_process_ends_the_others(tmp_path: Path) -> None:
    with launched(tmp_path, "dies") as processes:
        processes[1].communicate(timeout=600)
        assert processes[1].returncode == 3
        start = time.monotonic()
        texts = [processes[rank].communicate(timeout=120)[0] for rank in (0, 2)]
        assert time.monotonic() - start < 60
        for rank, text in zip((0, 2), texts, strict=True):
            assert processes[rank].returncode == 4, text
            assert f"group {rank} lost another process" in text and "checkpoint=" in text


def test_groups_go_through_the_pipelines_of_torch(tmp_path: Path) -> None:
    with launched(tmp_path, "pipelined", PIPELINED) as processes:
        groups, x, y = recurrent()
        whole = groups.recompose()
        nn.functional.cross_entropy(whole(x).flatten(0, 1), y.flatten()).backward()
        wanted = {name: parameter.grad for name, parameter in whole.named_parameters()}
        for process in processes:
            text, _ = process.communicate(timeout=600)
            assert process.returncode == 0, text
    for rank, module in enumerate(groups.modules):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for (name, _), gradient in zip(module.named_parameters(), found, strict=True):
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-12, atol=1e-12)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    port = free_port()
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": 1, "RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    yield port
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_there_is_a_process_for_each_group() -> None:
    with pytest.raises(UserError, match=r"1 processes for 3 groups.*--nproc-per-node=3"):
        local().fit(data(), 1, parallel=True)


def test_a_port_in_use(alone: int) -> None:
    with socket.socket() as taken:
        taken.bind(("", alone))
        taken.listen()
        with pytest.raises(UserError, match=f"cannot meet at localhost:{alone}"):
            local().fit(data(), 1, parallel=True)


def test_parallel_needs_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="needs several processes"):
        local().fit(data(), 1, parallel=True)
