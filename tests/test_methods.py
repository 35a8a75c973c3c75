"""What local critics are compared with: gradients by hand, helpers at the cuts, ADMM, and sufficient descent."""

import math
from pathlib import Path

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn import functional

import graphsplit as gs
from graphsplit.errors import UnsupportedError, UserError
from graphsplit.train.admm import best_output, best_preactivation
from graphsplit.train.methods import Guesses

EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Skips(nn.Module):
    """Two tensors cross the cut before ``c``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.tanh(self.a(x))
        second = torch.tanh(self.b(first))
        scores: Tensor = self.c(second) + first[:, :3]
        return scores


def made(method: object, seed: int = 0) -> gs.LocalCritics:
    torch.manual_seed(seed)
    local = gs.local_critics(Skips().double(), batch()[0], at=["b", "c"], seed=seed)
    local.configure(gs.train.Recipe(method=method))  # type: ignore[arg-type]
    return local


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 6, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 3, (7,), generator=generator)


def gradients(local: gs.LocalCritics) -> list[Tensor]:
    found = [parameter.grad for stage in local.stages for parameter in stage.group.parameters()]
    assert all(gradient is not None for gradient in found)
    return [gradient for gradient in found if gradient is not None]


def of_the_model(local: gs.LocalCritics) -> list[Tensor]:
    """Gradients of the model's own loss, by autograd through the plain module."""
    torch.manual_seed(0)
    model = Skips().double()
    x, y = batch()
    functional.cross_entropy(model(x), y).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


# Gradients


def test_backpropagation_is_that_of_the_whole_model() -> None:
    local = made("backpropagation")
    losses = local.backward(*batch())
    for ours, theirs in zip(gradients(local), of_the_model(local), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
    assert losses.groups.shape == (3,)


@pytest.mark.parametrize("method", ["backpropagation", "synthetic_gradients"])
def test_critics_learn_as_probes_where_they_have_no_other_use(method: str) -> None:
    local = made(method)
    local.backward(*batch())
    x, y = batch()
    features = local.groups.modules[0](x).detach()
    critic = local.critics[0]
    wanted = torch.autograd.grad(functional.cross_entropy(critic(features), y), list(critic.parameters()))
    for parameter, gradient in zip(critic.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, **EXACT)


@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 1.0)])
def test_joint_losses_are_the_gradient_of_their_sum(weights: tuple[float, ...] | None) -> None:
    local = made(gs.train.JointLosses(weights))
    local.backward(*batch())
    ours = gradients(local)
    x, y = batch()
    first, second, last = local.groups.modules
    h = first(x)
    handed = second(h)
    exits = [local.critics[0](h), local.critics[1](handed[local.mains[1]]), last(*handed)]
    total = sum(
        weight * functional.cross_entropy(scores, y)
        for weight, scores in zip(weights or (1.0, 1.0, 1.0), exits, strict=True)
    )
    assert isinstance(total, Tensor)
    parameters = [parameter for module in local.groups.modules for parameter in module.parameters()]
    for gradient, wanted in zip(ours, torch.autograd.grad(total, parameters), strict=True):
        torch.testing.assert_close(gradient, wanted, **EXACT)


def test_guesses_begin_with_zero_and_the_last_group_learns_as_ever() -> None:
    local = made("synthetic_gradients")
    local.backward(*batch())
    first, second, last = (
        [parameter.grad for parameter in stage.group.parameters()] for stage in local.stages
    )
    assert all(not gradient.any() for gradient in (*first, *second) if gradient is not None)
    for ours, theirs in zip(last, of_the_model(local)[-2:], strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_groups_follow_guesses_and_helpers_follow_gradients() -> None:
    local = made(gs.train.SyntheticGradients(conditioned=False, width=4))
    for stage in local.stages[:-1]:
        assert isinstance(stage.helper, Guesses)
        for parameter in stage.helper.parameters():
            nn.init.normal_(parameter, std=0.5)
    local.backward(*batch())
    x, y = batch()
    first, second, last = local.groups.modules
    helpers = [stage.helper for stage in local.stages[:-1]]
    h = first(x)
    (guess,) = helpers[0]([h], y)  # type: ignore[misc]
    wanted = torch.autograd.grad(h, list(first.parameters()), guess.detach() / 7)
    for parameter, gradient in zip(first.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, **EXACT)
    leaf = h.detach().requires_grad_()
    handed = list(second(leaf))
    guesses = helpers[1](handed, y)  # type: ignore[misc]
    (truth,) = torch.autograd.grad(handed, leaf, [g.detach() / 7 for g in guesses])
    loss = (guess - 7 * truth).square().sum() / 7
    helper = helpers[0]
    assert helper is not None
    for parameter, gradient in zip(
        helper.parameters(), torch.autograd.grad(loss, list(helper.parameters())), strict=True
    ):
        torch.testing.assert_close(parameter.grad, gradient, **EXACT)
    leaves = [value.detach().requires_grad_() for value in handed]
    truths = torch.autograd.grad(functional.cross_entropy(last(*leaves), y), leaves)
    error = sum((g - 7 * t).square().sum() / 7 for g, t in zip(guesses, truths, strict=True))
    second_helper = helpers[1]
    assert second_helper is not None and isinstance(error, Tensor)
    for parameter, gradient in zip(
        second_helper.parameters(), torch.autograd.grad(error, list(second_helper.parameters())), strict=True
    ):
        torch.testing.assert_close(parameter.grad, gradient, **EXACT)


@pytest.mark.parametrize("conditioned", [True, False])
def test_helpers_fit_images_and_sequences(conditioned: bool) -> None:
    torch.manual_seed(0)
    method = gs.train.SyntheticGradients(conditioned, width=8)
    images = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.LazyLinear(3))
    images(torch.randn(2, 1, 8, 8))
    sequences = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 9))
    cases = [
        (images, torch.randn(5, 1, 8, 8), torch.randint(0, 3, (5,)), "2"),
        (sequences, torch.randint(0, 9, (5, 6)), torch.randint(0, 9, (5, 6)), "3"),
    ]
    for model, x, y, place in cases:
        local = gs.local_critics(model, x, at=[place])
        local.configure(gs.train.Recipe(method=method))
        off = [float(local.step(x, y).critics[0]) for _ in range(40)]
        assert off[0] > 0 and off[-1] < 0.9 * off[0]


@pytest.mark.parametrize("method", ["joint", "synthetic_gradients"])
def test_methods_run_under_autocast(method: str) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    local = gs.local_critics(model, torch.randn(4, 6), at=["2"])
    local.configure(gs.train.Recipe(method=method, amp=torch.bfloat16))  # type: ignore[arg-type]
    assert math.isfinite(local.step(torch.randn(4, 6), torch.tensor([0, 1, 2, 0])).loss)


# The harness


@pytest.mark.parametrize("method", ["backpropagation", "joint", "synthetic_gradients"])
def test_every_method_learns_and_goes_on_from_a_checkpoint(method: str, tmp_path: Path) -> None:
    x, y = gs.data.digits()
    data = [(x[i : i + 32], y[i : i + 32]) for i in range(0, 640, 32)]

    def digits() -> gs.LocalCritics:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        local = gs.local_critics(model, x[:4], at=["3"])
        fast = gs.train.Recipe(lambda module: torch.optim.Adam(module.parameters(), 0.01), method=method)  # type: ignore[arg-type]
        local.configure(fast)
        return local

    whole = digits()
    records = whole.fit(data, 4)
    assert records[-1].losses[-1] < 0.7 * records[0].losses[-1]
    digits().fit(data, 2, checkpoint=tmp_path)
    again = digits()
    again.fit(data, 4, checkpoint=tmp_path)
    for ours, theirs in zip(again.submodel(1).parameters(), whole.submodel(1).parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(UserError, match=r"no method 'dni'.*synthetic_gradients"):
        made("dni")
    with pytest.raises(UserError, match="2 weights for 3 losses"):
        made(gs.train.JointLosses((1.0, 1.0)))
    with pytest.raises(UserError, match="JointLosses trains in one process"):
        made("joint").fit([batch()], 1, parallel=True)
    local = made("local_critics")
    with pytest.raises(UserError, match="no scaling of losses, which float16 needs"):
        local.configure(gs.train.Recipe(method="joint", amp=torch.float16))
    with pytest.raises(UserError, match=r"0 processes for 3 groups.*torchrun"):
        local.groups.pipeline_stage()


# Sufficient descent


def test_mu_is_that_of_the_definition_and_nothing_is_changed(tmp_path: Path) -> None:
    local = made("local_critics")
    x, y = batch()
    check = gs.train.SufficientDescent(local, [(x[:4], y[:4]), (x[4:], y[4:])])
    before = {name: tensor.clone() for name, tensor in local.submodel(2).state_dict().items()}
    found = check.measure()
    first, second, last = local.groups.modules
    h = first(x)
    handed = second(h)
    down = functional.cross_entropy(last(*handed), y)
    critics = [local.critics[0](h), local.critics[1](handed[local.mains[1]])]
    for group, module in enumerate((first, second)):
        parameters = list(module.parameters())
        loss = functional.cross_entropy(critics[group], y)
        g = torch.cat([t.flatten() for t in torch.autograd.grad(loss, parameters, retain_graph=True)])
        d = torch.cat([t.flatten() for t in torch.autograd.grad(down, parameters, retain_graph=True)])
        assert found[group] == pytest.approx(float(d @ g / (d @ d)), rel=1e-12)
        assert check.cosines[0][group] == pytest.approx(float(d @ g / (d.norm() * g.norm())), rel=1e-12)
    assert all(torch.equal(before[name], tensor) for name, tensor in local.submodel(2).state_dict().items())
    assert all(parameter.grad is None for parameter in first.parameters())


def test_mu_is_one_where_critics_are_the_model_behind_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    behind = model[2]
    local = gs.local_critics(model, batch()[0], at=["2"], critic=lambda *_: behind)
    check = gs.train.SufficientDescent(local, [batch()])
    local.fit([batch()], 0)
    assert check.measure()[0] == pytest.approx(1, abs=1e-12)
    check.plot(tmp_path / "mu.svg")
    assert "<svg" in (tmp_path / "mu.svg").read_text()


def test_descent_is_recorded_after_every_epoch() -> None:
    local = made("local_critics")
    check = gs.train.SufficientDescent(local, [batch()])
    with pytest.raises(UserError, match="nothing has been measured"):
        check.plot("mu.svg")
    local.fit([batch()] * 3, 2, on_epoch=check)
    assert len(check.values) == 2 and all(len(row) == 2 for row in check.values)
    assert all(math.isfinite(value) for row in check.values for value in row)


# ADMM


def test_every_entry_is_the_best_one() -> None:
    torch.manual_seed(0)
    found, a, multiplier = torch.randn(3, 40, dtype=torch.float64) * 2
    beta, gamma = 0.7, 3.0
    for got, s, target in zip(best_preactivation(found, a, beta, gamma), found, a, strict=True):

        def cost(z: float, s: float = float(s), target: float = float(target)) -> float:
            return gamma * (target - max(z, 0)) ** 2 + beta * (z - s) ** 2

        best = min(minimize_scalar(cost, bounds=side, method="bounded").fun for side in ((-9, 0), (0, 9)))
        assert cost(float(got)) <= best + 1e-9
    wanted = torch.rand(40) > 0.5
    for got, s, y, m in zip(
        best_output(found, multiplier, wanted, beta), found, wanted, multiplier, strict=True
    ):

        def hinge(z: float, s: float = float(s), y: bool = bool(y), m: float = float(m)) -> float:
            return (max(1 - z, 0) if y else max(z, 0)) + m * z + beta * (z - s) ** 2

        assert hinge(float(got)) <= minimize_scalar(hinge, bounds=(-9, 9), method="bounded").fun + 1e-9


def test_admm_learns_digits() -> None:
    x, y = gs.data.digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 10))
    before = model[1].weight.clone()
    admm = gs.train.ADMM(gs.trace(model, x[:4]), beta=0.1, gamma=1.0)
    steps = admm.fit(x, y, 15, warm=100, test=gs.data.digits(train=False), error=gs.train.misclassified)
    assert steps[-1].error is not None and steps[-1].error < 0.2
    assert steps[-1].test_error is not None and steps[-1].test_error < 0.25
    assert steps[-1].loss < steps[0].loss
    assert torch.equal(model[1].weight, before)


def test_admm_names_what_it_cannot_train() -> None:
    with pytest.raises(UnsupportedError, match=r"here is aten.tanh|here is tanh"):
        gs.train.ADMM(gs.trace(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(2, 4)))
    net = gs.trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(2, 4))
    with pytest.raises(UserError, match="not one class for each input"):
        gs.train.ADMM(net).fit(torch.randn(5, 4), torch.randn(5, 2), 1)
    with pytest.raises(UserError, match="inputs of 7 numbers for a net of 4"):
        gs.train.ADMM(net).fit(torch.randn(5, 7), torch.zeros(5, dtype=torch.int32), 1)
    with pytest.raises(UserError, match="classes from 0 to 2, and the net has 2 outputs"):
        gs.train.ADMM(net).fit(torch.randn(3, 4), torch.arange(3), 1)
    gs.train.ADMM(net).fit(torch.randn(3, 4), torch.ones(3, dtype=torch.int32), 1)
