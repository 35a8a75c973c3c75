"""Local critics: gradients by the paper's equations, training in one process, sub-models, bad input."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import graphsplit as gs
from graphsplit.depth.critics import main_tensor
from graphsplit.errors import InputError, PartitionError, UserError
from graphsplit.program import Dim, TensorMeta
from graphsplit.train import Recipe
from graphsplit.train.local import Watch
from graphsplit.train.losses import checked, cross_entropy, mean_squared_error
from laws import model_unchanged


def tower(*, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 7), nn.BatchNorm1d(7), nn.ReLU(),
        nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3),
    ).double()  # fmt: skip


def batch(size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 6, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 3, (size,), generator=generator)


def loader(size: int = 32) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*batch(size)), batch_size=8, shuffle=True, generator=torch.Generator())


def critics(**options: object) -> gs.LocalCritics:
    return gs.local_critics(tower(**{k: v for k, v in options.items() if k == "dropout"}), batch()[0], at=["3", "6"],
                            **{k: v for k, v in options.items() if k != "dropout"})  # fmt: skip


# The paper's equations


def test_gradients_are_those_of_the_paper() -> None:
    """Written out by hand: groups follow their critic's loss, critics the distance to the next loss."""
    local = critics()
    x, y = batch()
    found = local.backward(x, y)
    model = tower()
    heads = [nn.Linear(8, 3).double(), nn.Linear(7, 3).double()]
    for head, critic in zip(heads, local.critics, strict=True):
        head.load_state_dict(dict(zip(("weight", "bias"), critic.state_dict().values(), strict=True)))
    pieces = [model[:3], model[3:6], model[6:]]
    values, losses = x, []
    for number, piece in enumerate(pieces):
        values = piece(values.detach())
        scores = values if number == 2 else heads[number](values)
        losses.append(F.cross_entropy(scores, y, reduction="none"))
    for number, piece in enumerate(pieces):
        expected = torch.autograd.grad(losses[number].mean(), list(piece.parameters()), retain_graph=True)
        own = local.groups.modules[number].parameters()
        assert all(torch.allclose(p.grad, g, atol=1e-14) for p, g in zip(own, expected, strict=True))  # type: ignore[arg-type]
    for number, head in enumerate(heads):
        distance = (losses[number] - losses[number + 1].detach()).abs().mean()
        expected = torch.autograd.grad(distance, list(head.parameters()), retain_graph=True)
        own = local.critics[number].parameters()
        assert all(torch.allclose(p.grad, g, atol=1e-14) for p, g in zip(own, expected, strict=True))  # type: ignore[arg-type]
        assert float(found.critics[number]) == pytest.approx(distance.item(), abs=1e-14)
    assert found.groups.tolist() == pytest.approx([loss.mean().item() for loss in losses], abs=1e-14)


def test_the_model_and_the_sub_models_are_those_that_train() -> None:
    model = tower()
    with model_unchanged(model):
        local = gs.local_critics(model, batch()[0], at=["3", "6"])
        local.fit([batch()], 3)
    x, y = batch()
    losses, _ = local.evaluate([(x, y)])
    for number in range(3):
        submodel = local.submodel(number).eval()
        assert F.cross_entropy(submodel(x), y).item() == pytest.approx(losses[number], abs=1e-12)
    names = list(local.submodel(1).state_dict())
    assert names[:2] == ["0.weight", "0.bias"] and [n for n in names if n.startswith("critic.")]
    assert list(local.submodel(2).state_dict()) == list(model.state_dict())
    with pytest.raises(PartitionError, match="numbered from 0 to 2"):
        local.submodel(3)


def test_training_lowers_every_loss() -> None:
    local = critics()
    local.configure(Recipe(lambda module: torch.optim.Adam(module.parameters(), lr=0.02)))
    records = local.fit(loader(), 30, test=[batch()], error=gs.train.misclassified)
    assert all(
        after < before - 0.1 for before, after in zip(records[0].losses, records[-1].losses, strict=True)
    )
    assert len(records[-1].test_losses) == len(records[-1].test_errors) == 3
    assert len(records[-1].critic_losses) == 2 and records[-1].examples == 32
    assert "epoch 30: losses" in str(records[-1])


def test_same_numbers_under_one_seed_and_others_under_another() -> None:
    runs = [critics(dropout=0.5, seed=seed).fit(loader(), 2)[-1].losses for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_recipe() -> None:
    """Schedules, clipping and autocast reach every group and critic."""
    local = gs.local_critics(tower().float(), batch()[0].float(), at=["3", "6"])
    local.configure(
        Recipe(
            optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=0.4),
            critic_optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=0.2),
            scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
            amp=torch.bfloat16,
            clip=1e-3,
        )
    )
    x, y = batch()
    before = [p.detach().clone() for stage in local.stages for p in stage.group.parameters()]
    local.fit([(x.float(), y)], 1)
    after = [p.detach() for stage in local.stages for p in stage.group.parameters()]
    moved = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(after[:2], before[:2], strict=True)))
    assert 0 < moved <= 0.4 * 1e-3 * 1.01
    rates = [
        [learner.optimizer.param_groups[0]["lr"] for learner in stage.learners] for stage in local.stages
    ]  # type: ignore[union-attr]
    assert rates == [[0.2, 0.1], [0.2, 0.1], [0.2]]


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    whole = critics(dropout=0.3)
    expected = whole.fit(loader(), 4)
    critics(dropout=0.3).fit(loader(), 2, checkpoint=tmp_path)
    resumed = critics(dropout=0.3)
    records = resumed.fit(loader(), 4, checkpoint=tmp_path)
    assert [record.number for record in records] == [2, 3]
    assert [record.losses for record in records] == [record.losses for record in expected[2:]]
    for name, tensor in whole.submodel(2).state_dict().items():
        assert torch.equal(resumed.submodel(2).state_dict()[name], tensor)
    assert len(list(tmp_path.iterdir())) == 2 * 3
    other = gs.local_critics(tower(), batch()[0], at=["3", "8"])
    with pytest.raises(UserError, match="no checkpoint of this training"):
        other.fit(loader(), 5, checkpoint=tmp_path)


def test_a_checkpoint_of_another_recipe_or_without_a_file(tmp_path: Path) -> None:
    critics().fit(loader(), 2, checkpoint=tmp_path)
    other = critics()
    other.configure(Recipe(lambda module: torch.optim.SGD(module.parameters(), lr=0.1)))
    with pytest.raises(UserError, match=r"its optimizer is .*, and is SGD here"):
        other.fit(loader(), 4, checkpoint=tmp_path)
    with pytest.raises(UserError, match=r"has 2 epochs, and training is to have 1"):
        critics().fit(loader(), 1, checkpoint=tmp_path)
    for path in tmp_path.glob("stage_1.*"):
        path.unlink()
    with pytest.raises(UserError, match=r"stage_1.epoch_0.pt is missing"):
        critics().fit(loader(), 4, checkpoint=tmp_path)


def test_state_dict_holds_all_of_it() -> None:
    first, second = critics(), critics(seed=9)
    first.fit(loader(), 1)
    second.load_state_dict(first.state_dict())
    x, y = batch()
    assert torch.equal(first.step(x, y).groups, second.step(x, y).groups)
    assert torch.equal(first.step(x, y).critics, second.step(x, y).critics)
    with pytest.raises(UserError, match="a state of 2 groups for 3"):
        second.load_state_dict({"steps": 0, "stages": [[], []]})


# Critics


IMAGES = TensorMeta((Dim(2, "n"), Dim(4), Dim(8), Dim(8)), torch.float32)


def image_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 5))


PIXELS, WORDS = (2, 1, 8, 8), (2, 5, 6)


@pytest.mark.parametrize(
    ("model", "shape", "critic", "parameters"),
    [
        # One 3 x 3 convolution of 128 filters and a fully connected layer on all of its entries.
        (image_model(), PIXELS, None, 128 * (4 * 9 + 1) + 5 * (128 * 36 + 1)),
        (image_model(), PIXELS, "conv3",
         128 * (4 * 9 + 1) + 128 * (128 * 9 + 1) + 128 * 9 + 1 + 5 * 37),
        (image_model(), PIXELS, "linear", 5 * 145),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3)), PIXELS, None, 128 * (4 * 9 + 1) + 2 * 129),
        (nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), WORDS, None, 3 * 5),
        (nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3), nn.Flatten(1), nn.Unflatten(1, (3, 5))), WORDS, None,
         3 * 5),
        (nn.Sequential(nn.Linear(6, 4), nn.Flatten(), nn.Linear(20, 3)), WORDS, None, 3 * 21),
        (nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1), nn.Flatten(0)), (2, 6), None, 5),
        (nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), (2, 6),
         lambda given, wanted: nn.Linear(given[1], wanted[1], bias=False), 12),
    ],
)  # fmt: skip
def test_critics_are_shaped_by_the_frontier(
    model: nn.Module, shape: tuple[int, ...], critic: object, parameters: int
) -> None:
    x = torch.randn(shape)
    local = gs.local_critics(model, x, at=["1"], critic=critic)
    assert sum(p.numel() for p in local.critics[0].parameters()) == parameters
    assert local.submodel(0)(x).shape == model(x).shape


def test_the_main_tensor_is_the_last_one_of_numbers() -> None:
    mask = TensorMeta((Dim(2), Dim(4)), torch.bool)
    assert main_tensor([IMAGES, IMAGES, mask]) == 1
    with pytest.raises(PartitionError, match="no critic can be put where"):
        main_tensor([mask])


def test_published_sizes_of_the_character_lstm() -> None:
    """4 layers of 600 units, 50 symbols, embedding of 128: 1.79, 4.67, 7.55 and 10.43 million parameters.

    The paper's table X counts one bias for each gate, PyTorch holds two.
    """

    class Characters(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(50, 128)
            self.layers = nn.LSTM(128, 600, num_layers=4, batch_first=True)
            self.head = nn.Linear(600, 50)

        def forward(self, symbols: Tensor) -> Tensor:
            return self.head(self.layers(self.embedding(symbols))[0])

    local = gs.local_critics(Characters(), torch.randint(0, 50, (2, 6)), n=3, balance="params")
    layers = local.complexity()
    counts = [item.parameters - 4 * 600 * (number + 1) for number, item in enumerate(layers)]
    assert [round(count / 1e6, 2) for count in counts] == [1.79, 4.67, 7.55, 10.43]
    assert [item.critic_parameters for item in layers] == [30_050] * 3 + [0]
    assert layers[0].critic_flops == 2 * 6 * 600 * 50
    assert layers[0].flops == 2 * 6 * (4 * 600 * (128 + 600) + 600 * 50)


# Anytime


def test_within_a_budget_the_largest_sub_model_answers() -> None:
    local = critics()
    local.fit(loader(), 2)
    flops = [item.flops for item in local.complexity()]
    anytime = local.anytime()
    x, _ = batch()
    for number, budget in enumerate((flops[0], flops[1], None)):
        found = anytime.predict(x, budget=budget)
        assert torch.equal(found.scores, local.submodel(number).eval()(x))
        assert found.exits.tolist() == [number] * 8
    # Critics that are not asked cost nothing.
    assert found.flops.tolist() == [flops[2]] * 8
    with pytest.raises(InputError, match="no sub-model answers within 3 FLOPs"):
        anytime(x, budget=3)
    assert local.groups.modules[0].training


def test_each_example_leaves_where_it_is_sure() -> None:
    local = critics()
    local.configure(Recipe(lambda module: torch.optim.Adam(module.parameters(), lr=0.05)))
    local.fit(loader(), 20)
    x, _ = batch(32)
    submodels = [local.submodel(number).eval()(x) for number in range(3)]
    sure = [scores.softmax(1).amax(1) for scores in submodels]
    level = float(torch.quantile(sure[0].detach(), 0.6))
    found = local.anytime().predict(x, confidence=level)
    expected = torch.where(sure[0] >= level, 0, torch.where(sure[1] >= level, 1, 2))
    assert torch.equal(found.exits, expected) and len(set(expected.tolist())) >= 2
    for number, scores in enumerate(submodels):
        assert torch.allclose(found.scores[expected == number], scores[expected == number], atol=1e-12)
    all_of_it = local.complexity()[2].flops + sum(item.critic_flops for item in local.complexity())
    assert found.flops[expected == 2].tolist() == [all_of_it] * int((expected == 2).sum())
    assert local.anytime().predict(x, confidence=0.0).exits.tolist() == [0] * 32
    with pytest.raises(InputError, match=r"a confidence of 1\.5"):
        local.anytime()(x, confidence=1.5)
    with pytest.raises(InputError, match="does not train"):
        local.anytime().train()


# Bundles


def test_a_bundle_holds_groups_and_critics(tmp_path: Path) -> None:
    local = critics()
    local.fit(loader(), 2)
    gs.save(local, tmp_path / "critics")
    found = gs.load(tmp_path / "critics")
    assert isinstance(found, gs.LocalCritics) and found.groups.plan == local.groups.plan
    x, y = batch()
    for number in range(3):
        assert torch.equal(found.submodel(number).eval()(x), local.submodel(number).eval()(x))
    assert found.step(x, y).loss > 0 and found.groups.verify().ok
    gs.save(local.groups, tmp_path / "groups")
    groups = gs.load(tmp_path / "groups")
    assert isinstance(groups, gs.LayerGroups)
    assert torch.equal(groups.recompose().eval()(x), local.groups.recompose().eval()(x))


def test_a_loss_of_ones_own_is_no_part_of_a_bundle(tmp_path: Path) -> None:
    gs.save(critics(loss=lambda outputs, y: F.cross_entropy(outputs, y, reduction="none")), tmp_path / "own")
    found = gs.load(tmp_path / "own")
    assert isinstance(found, gs.LocalCritics)
    with pytest.raises(UserError, match="a function of one's own"):
        found.step(*batch())


# Losses


def test_losses_are_means_over_the_positions_of_an_example() -> None:
    scores, classes = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    classes[0, 3:] = -100
    expected = torch.stack([F.cross_entropy(a, b) for a, b in zip(scores, classes, strict=True)])
    assert torch.allclose(cross_entropy(scores, classes), expected)
    assert torch.allclose(cross_entropy(scores.transpose(1, 2), classes), expected)
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.allclose(mean_squared_error(a, b), (a - b).square().mean((1, 2)))
    assert mean_squared_error(a[:, 0, 0], b[:, 0, 0]).shape == (2,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cross_entropy(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64)), "do not fit scores"),
        (lambda: cross_entropy(torch.zeros(2, 3, 3), torch.zeros(2, 3, dtype=torch.int64)), "may be in dimension 1"),
        (lambda: mean_squared_error(torch.zeros(2, 3), torch.zeros(2)), "do not fit outputs"),
        (lambda: checked(F.cross_entropy, torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)),
         r"gives \(\) for 2 examples"),
    ],
)  # fmt: skip
def test_losses_that_do_not_fit(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


# Trouble


def test_a_group_that_diverges_is_named() -> None:
    local = critics()
    with torch.no_grad():
        local.groups.modules[1].get_parameter("3.weight").fill_(math.nan)
    with pytest.raises(UserError, match="group 1 diverged"):
        local.step(*batch())


def test_a_collapse_is_told_once() -> None:
    watch = Watch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for losses in ((1.0, 1.0), (0.5, 0.9), (0.9, 0.8), (0.9, 0.7)):
            watch.look(losses)
    with pytest.warns(UserWarning, match="training collapses: the loss of group 0"):
        watch.look((0.9, 0.7))


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        scores = self.b(torch.tanh(self.a(x)))
        return {"first": scores, "second": self.c(scores)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"critic": "convex"}, "a critic is 'convex'"),
        ({"critic": "conv"}, "a convolutional critic was asked for"),
        ({"critic": lambda given, wanted: nn.Linear(given[1], 9)}, r"gives \(8, 9\), and the model gives"),
        ({"critic": lambda given, wanted: nn.Linear(1, 1)}, "does not run on features"),
        ({"critic": lambda given, wanted: "nothing"}, "gave a str as a critic"),
        ({"n": 9}, "2 places make 2 critics, and n is 9"),
        ({"loss": "hinge"}, "there is no loss 'hinge'"),
        ({"output": "logits"}, "the loss takes an output called 'logits'"),
        ({"n": 3}, "2 places make 2 critics, and n is 3"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        critics(**options)


def test_the_output_has_to_be_clear() -> None:
    x = torch.randn(4, 6)
    with pytest.raises(UserError, match="one output, and the model gives"):
        gs.local_critics(TwoOutputs(), x, at=["b"])
    local = gs.local_critics(TwoOutputs(), x, at=["b"], output="second", loss="mse")
    assert float(local.step(x, torch.zeros(4, 2)).loss) > 0
    with pytest.raises(UserError, match="do not fit outputs"):
        local.step(x, torch.zeros(4, 3))


def test_batches_that_are_none() -> None:
    local = critics()
    with pytest.raises(UserError, match="gave no batch"):
        local.fit([], 1)
    with pytest.raises(UserError, match="2 devices for 3 groups"):
        local.to("cpu", "cpu")
    assert local.to("cpu", "cpu", "cpu").step(*batch()).loss > 0
