"""Parts and replicas that train inside the trainers of other packages: the examples, and what they end with."""

from statistics import mean

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from laws import script


def test_replicas_and_their_ensemble_inside_lightning() -> None:
    pytest.importorskip("pytorch_lightning")
    example = script("lightning_ec_dnn")
    own = example.Classifier(nn.Linear(4, 3))
    x, y, answers = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]), torch.rand(5, 3).softmax(1)
    scores = own.model(x)
    expected = F.cross_entropy(scores, y) / 2 - (answers * scores.log_softmax(1)).sum(1).mean() / 2  # eq. 10
    torch.testing.assert_close(own.training_step([x, y, answers], 0), expected)
    found = example.main([])
    (loss,), (error,) = found["loss of the ensemble"], found["error of the ensemble"]
    assert loss <= mean(found["loss of replicas"]) + 1e-6  # Jensen
    assert error < mean(found["error of replicas"]) and error < 0.06
    assert mean(found["loss of compressed replicas"]) < mean(found["loss of replicas"])
    assert mean(found["error of compressed replicas"]) < mean(found["error of replicas"])


def test_submodels_and_their_merge_inside_the_trainer_of_transformers() -> None:
    pytest.importorskip("accelerate")
    found = script("trainer_partition").main([])
    apart = [value for name, value in found.items() if name.startswith("sub-model")]
    assert len(apart) == 2 and max(apart) < 3.0  # of 94 characters, ln 94 = 4.5
    assert found["from the mean"] < 1e-4
    assert found["merged, as it is"] <= mean(apart) + 1e-4  # Jensen
    assert found["merged, trained on"] < found["merged, as it is"] - 0.03
    assert found["steps of Adam"] == 60 + 30  # the merged model's began with those of its parts
