"""One ONNX file that leaves early: If nodes, run in ONNX Runtime at every exit."""

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import graphsplit as gs
from graphsplit.errors import InputError
from graphsplit.onnx_anytime import export_anytime


class Skips(nn.Module):
    """The input skips every group; two tensors cross each cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.tanh(self.a(x)))) + x)


def test_each_example_leaves_where_torch_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 6)
    local = gs.local_critics(Skips(), x[:4], at=["b", "c"])
    local.configure(gs.train.Recipe(lambda module: torch.optim.Adam(module.parameters(), lr=0.05)))
    local.fit([(x, torch.randint(0, 3, (12,)))], 30)
    reports = gs.export_onnx(local, tmp_path)
    assert set(reports) == {
        *(f"{kind}_{number}.onnx" for kind in ("group", "submodel") for number in range(3)), "anytime.onnx",
    }  # fmt: skip
    file = onnx.load(tmp_path / "anytime.onnx")
    onnx.checker.check_model(file, full_check=True)
    (branch,) = [node for node in file.graph.node if node.op_type == "If"]
    inner = [node.op_type for node in branch.attribute[1].g.node]
    assert "If" in inner and [item.name for item in file.graph.input][-1] == "confidence"
    session = onnxruntime.InferenceSession(str(tmp_path / "anytime.onnx"), providers=["CPUExecutionProvider"])
    anytime = local.anytime()
    exits = set()
    for level in (0.0, 0.5, 0.7, 0.9, 1.0):
        found = anytime.predict(x, confidence=level)
        for row in range(12):
            feed = {"x": x[row : row + 1].numpy(), "confidence": torch.tensor(level).numpy()}
            scores, leaving = session.run(None, feed)
            assert int(leaving) == int(found.exits[row])
            assert torch.allclose(torch.from_numpy(scores)[0], found.scores[row], atol=1e-5)
            exits.add(int(leaving))
    assert exits == {0, 1, 2}


def test_pieces_have_to_fit(tmp_path: Path) -> None:
    groups = gs.layer_groups(Skips(), torch.randn(2, 6), at=["b"]).programs
    with pytest.raises(InputError, match="2 groups with 0 critics"):
        export_anytime(groups, [], [0, 0], tmp_path / "a.onnx")
