"""Pruned models under DistributedDataParallel: the step of one process, and fewer bytes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import graphsplit as gs
from graphsplit.errors import UserError

SCRIPT = """
import copy, json, sys
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
import graphsplit as gs

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 30), nn.LayerNorm(30), nn.ReLU(), nn.Linear(30, 3)
).double()
x, y = torch.randn(8 * world, 6, dtype=torch.float64), torch.arange(8 * world) % 3
mine = slice(8 * rank, 8 * rank + 8)
masks = gs.sparsify(model, data=(x[mine], y[mine]), loss=F.cross_entropy, sparsity=0.9)
agreed = masks.agreed()
differed = any(not torch.equal(mask, agreed.masks[name]) for name, mask in masks.masks.items())
single = agreed.apply(copy.deepcopy(model))
wrapped, hook = masks.parallel(copy.deepcopy(model))
for module, inputs, targets in ((single, x, y), (wrapped, x[mine], y[mine])):
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(module(inputs), targets).backward()
        optimizer.step()
state = wrapped.module.state_dict()
error = max(float((state[name] - value).abs().max()) for name, value in single.state_dict().items())
flat = torch.cat([value.reshape(-1) for name, value in state.items() if name.endswith("_mask")])
gathered = [torch.empty_like(flat) for _ in range(world)]
dist.all_gather(gathered, flat)
result = dict(
    error=error, same=all(torch.equal(other, flat) for other in gathered), differed=differed,
    sent=hook.sent, dense=hook.dense, saved=hook.saved,
)
open(f"{sys.argv[1]}/{rank}.json", "w").write(json.dumps(result))
dist.destroy_process_group()
"""


def test_two_processes_make_the_step_of_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*torchrun, script, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert all(result["error"] < 1e-12 and result["same"] for result in results)
    assert results[1]["differed"], "each process scored its own data"
    weights, rest = 6 * 40 + 40 * 30 + 30 * 3, 40 + 30 + 2 * 30 + 3
    sent = weights - round(weights * 0.9) + rest
    for result in results:
        assert result["dense"] == 3 * 8 * (weights + rest) and result["sent"] == 3 * 8 * sent
        assert result["saved"] == pytest.approx(1 - sent / (weights + rest))


def test_needs_processes() -> None:
    import torch

    model = nn.Sequential(nn.Linear(4, 3))
    masks = gs.sparsify(model, torch.randn(2, 4), method="magnitude", sparsity=0.5)
    with pytest.raises(UserError, match="there are no processes to train with"):
        masks.parallel(model)
    with pytest.raises(UserError, match="needs several processes"):
        masks.agreed()
