"""Pruning at initialisation: `gs.sparsify`, the pass `sparsify`, and the command."""

import copy
import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.nn.utils import prune

import graphsplit as gs
from graphsplit.errors import InputError, PartitionError, PlanError, UnsupportedError, UserError
from graphsplit.passes import Pipeline, Programs
from graphsplit.passes.sparsify import Sparsify
from graphsplit.program import check
from graphsplit.sparsity import METHODS, prunable
from laws import largest_difference, program_unchanged, run, script
from zoo import ZOO, call_of

EXACT = 1e-12
# Small nets lose a layer at high sparsity; a test of its own is about that.
CUT = pytest.mark.filterwarnings("ignore:nothing is left of")


def network(*widths: int, bias: bool = True, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for wide, narrow in itertools.pairwise(widths):
        layers += [nn.Linear(wide, narrow, bias=bias), activation()]
    return nn.Sequential(*layers[:-1]).double()


def batch(size: int = 12, features: int = 5, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, features, dtype=torch.float64, generator=generator)
    return x, torch.arange(size) % classes


def masks_of(model: nn.Module, method: Any, sparsity: float = 0.5, **options: Any) -> gs.Masks:
    return gs.sparsify(model, method=method, sparsity=sparsity, data=batch(), loss=F.cross_entropy, **options)


# -- identities ----------------------------------------------------------------------------------------------


def test_snip_is_the_derivative_by_a_mask() -> None:
    """dL/dc of c ⊙ w at c = 1 is g ⊙ w."""
    model = network(5, 7, 3)
    x, y = batch()
    weights = dict(model.named_parameters())
    ones = {name: torch.ones_like(w) for name, w in weights.items() if w.dim() == 2}

    def loss(masks: dict[str, Tensor]) -> Tensor:
        masked = {name: w * masks[name] if name in masks else w for name, w in weights.items()}
        return F.cross_entropy(functional_call(model, masked, (x,)), y)

    expected = grad(loss)(ones)
    found = masks_of(model, "snip").scores
    assert list(found) == ["0.weight", "2.weight"]
    assert largest_difference(found.values(), [value.abs() for value in expected.values()]) < EXACT


def test_snip_over_several_batches_is_snip_of_all() -> None:
    model, (x, y) = network(5, 7, 3), batch()
    parts = [(x[:5], y[:5]), (x[5:], y[5:])]
    found = gs.sparsify(model, method="snip", data=parts, loss=F.cross_entropy)
    assert largest_difference(found.scores.values(), masks_of(model, "snip").scores.values()) < EXACT


def test_grasp_against_the_full_hessian() -> None:
    model, (x, y) = network(5, 4, 3), batch(13)
    weights = {name: w.detach() for name, w in model.named_parameters() if w.dim() == 2}
    rest = {name: w.detach() for name, w in model.named_parameters() if w.dim() == 1}
    sizes = [w.numel() for w in weights.values()]

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split(sizes)
        shaped = {name: p.reshape(w.shape) for (name, w), p in zip(weights.items(), pieces, strict=True)}
        return F.cross_entropy(functional_call(model, {**rest, **shaped}, (x,)) / 200, y)

    flat = torch.cat([w.reshape(-1) for w in weights.values()])
    expected = -flat * (jacrev(grad(loss))(flat) @ grad(loss)(flat))
    found = gs.sparsify(model, method="grasp", sparsity=0.5, data=(x, y), loss=F.cross_entropy)
    scores = torch.cat([values.reshape(-1) for values in found.scores.values()])
    assert float((scores - expected).abs().max()) < EXACT * float(expected.abs().max())
    kept = torch.cat([mask.reshape(-1) for mask in found.masks.values()])
    assert expected[kept].max() <= expected[~kept].min(), "those whose removal lowers the gradient norm stay"


def test_what_flows_into_a_unit_flows_out_of_it() -> None:
    """Conservation (Tanaka et al., theorem 1): for a net of ReLUs without biases, sums of ``g ⊙ w``."""
    model, (x, y) = network(5, 8, 6, 3, bias=False, activation=nn.ReLU), batch()
    loss = F.cross_entropy(model(x), y)
    flows = [
        g * w
        for g, w in zip(torch.autograd.grad(loss, [*model.parameters()]), model.parameters(), strict=True)
    ]
    for before, after in itertools.pairwise(flows):
        assert float((before.sum(1) - after.sum(0)).detach().abs().max()) < EXACT
    found = masks_of(model, "snip").scores
    assert largest_difference(found.values(), [flow.detach().abs() for flow in flows]) < EXACT


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.8])
def test_synaptic_flow_is_the_same_in_every_layer(sparsity: float, norm: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.ReLU(), nn.Conv2d(4, 6, 3),
        nn.ReLU(), nn.Flatten(), nn.Linear(24, 8), nn.GELU(), nn.Linear(8, 3), nn.Softmax(1),
    )  # fmt: skip
    found = gs.sparsify(model, torch.randn(2, 2, 6, 6), method="synflow", sparsity=sparsity)
    sums = [float(values.sum()) for values in found.scores.values()]
    assert len(sums) == 4 and min(sums) > 0
    assert max(sums) - min(sums) < 1e-10 * max(sums)
    assert all((values >= 0).all() for values in found.scores.values())


def test_synflow_in_rounds_cuts_no_layer_where_one_round_does() -> None:
    model = network(64, 300, 100, 10, activation=nn.ReLU)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        once = gs.sparsify(model, torch.randn(2, 64), method="magnitude", sparsity=0.99)
    rounds = gs.sparsify(model, torch.randn(2, 64), method="synflow", sparsity=0.99)
    assert once.cut and not rounds.cut


# -- masks ---------------------------------------------------------------------------------------------------


@CUT
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9])
def test_sparsity_is_met_to_one_weight(method: Any, sparsity: float) -> None:
    found = masks_of(network(5, 40, 3), method, sparsity)
    size = 5 * 40 + 40 * 3
    assert sum(row.kept for row in found.report()) == size - round(size * sparsity)
    assert abs(found.sparsity - sparsity) <= 0.5 / size


def test_ties_are_broken_by_place() -> None:
    model = network(5, 40, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    found = gs.sparsify(model, torch.randn(2, 5), method="magnitude", sparsity=0.25)
    assert sum(row.kept for row in found.report()) == 240
    assert found.masks["0.weight"].all()
    assert found.masks["2.weight"].reshape(-1).tolist() == [True] * 40 + [False] * 80


def test_each_layer_for_itself() -> None:
    found = masks_of(network(5, 40, 3), "snip", 0.9, scope="layer")
    assert [row.kept for row in found.report()] == [20, 12]
    assert [row.density for row in found.report()] == [0.1, 0.1]


def test_what_is_pruned() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4), nn.Flatten(), nn.Linear(16, 3))
    program = gs.trace(model, torch.randn(2, 1, 4, 4))
    assert prunable(program) == ("0.weight", "4.weight")
    assert prunable(program, biases=True) == ("0.weight", "0.bias", "4.weight", "4.bias")
    assert prunable(program, norms=True) == ("0.weight", "1.weight", "1.bias", "4.weight")
    for method in ("synflow", "magnitude"):
        found = gs.sparsify(program, method=method, sparsity=0.3, biases=True, norms=True)
        assert len(found.masks) == 6 and abs(found.sparsity - 0.3) < 0.01


class Tied(nn.Module):
    """One matrix used three times: looked up, applied, and transposed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(9, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = F.linear(self.head(x), self.embed.weight.t())
        return self.head(torch.tanh(self.body(x))).mean(1)


def test_tied_and_functional_weights_count_once() -> None:
    torch.manual_seed(0)
    model, ids = Tied(), torch.randint(0, 9, (8, 4))
    found = gs.sparsify(model, method="snip", sparsity=0.5, data=(ids, torch.arange(8)), loss=F.cross_entropy)
    assert list(found.masks) == ["embed.weight", "body.weight"]
    assert found.aliases == {"head.weight": "embed.weight"}
    expected = torch.autograd.grad(F.cross_entropy(model(ids), torch.arange(8)), model.embed.weight)[0]
    value = (expected * model.embed.weight).abs().detach().double()
    assert largest_difference([found.scores["embed.weight"]], [value]) < 1e-6
    pruned = found.apply(copy.deepcopy(model))
    named = dict(pruned.named_parameters(remove_duplicate=False))
    assert named["embed.weight_orig"] is named["head.weight_orig"]
    assert_trains_masked(pruned, found, ids)


def assert_trains_masked(model: nn.Module, masks: gs.Masks, *inputs: Tensor) -> None:
    """Two steps: the masked weights have no gradient, and the function stays that of the masked graph."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        sum(t.square().sum() for t in _tensors(model(*inputs))).backward()  # type: ignore[union-attr]
        for name, mask in masks.masks.items():
            gradient = dict(model.named_parameters(remove_duplicate=False))[f"{name}_orig"].grad
            assert gradient is not None and not gradient[~mask].any()
        optimizer.step()
    graph = masks.module()
    graph.load_state_dict(model.state_dict())
    model.eval(), graph.eval()
    assert largest_difference(_tensors(graph(*inputs)), _tensors(model(*inputs))) < 1e-5


def _tensors(value: Any) -> list[Tensor]:
    return [item for item in (value if isinstance(value, tuple) else (value,)) if isinstance(item, Tensor)]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


class Attention(nn.Module):
    """Multi-head attention uses the weights of its output layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x, x, x, need_weights=False)[0].mean(1))


@pytest.mark.parametrize("kind", [Recurrent, Attention])
def test_masks_hold_in_modules_that_use_weights_by_themselves(kind: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind()
    x = torch.randn(6, 5, 4 if kind is Recurrent else 8)
    found = gs.sparsify(
        model, method="snip", sparsity=0.6, data=(x, torch.arange(6) % 3), loss=F.cross_entropy
    )
    assert len(found.masks) == 3
    assert_trains_masked(found.apply(copy.deepcopy(model)), found, x)
    assert_trains_masked(found.apply(gs.emit(found.program)), found, x)


@pytest.mark.parametrize(
    "name", ["resnet_basic", "gpt", "mobilenet_v2", "lstm_bidirectional", "llama_two_kv_heads"]
)
def test_models_of_the_zoo(name: str) -> None:
    model = ZOO[name].build().eval()
    call = call_of(name)
    found = gs.sparsify(model, *call, method="synflow", sparsity=0.5, iterations=3)
    args, kwargs = call
    expected = found.module().eval()(*args, **kwargs)
    with torch.no_grad():
        folded = gs.emit(found.folded_program()).eval()(*args, **kwargs)
        pruned = found.apply(copy.deepcopy(model))(*args, **kwargs)
    for other in (folded, pruned):
        pairs = [torch.utils._pytree.tree_leaves(value) for value in (other, expected)]
        assert largest_difference(*[[x for x in leaves if isinstance(x, Tensor)] for leaves in pairs]) < 1e-5


def test_controls() -> None:
    model = network(5, 40, 3)
    found = masks_of(model, "snip", 0.8)
    mixed = found.shuffled(3)
    assert [row.kept for row in mixed.report()] == [row.kept for row in found.report()]
    assert not all(torch.equal(mask, mixed.masks[name]) for name, mask in found.masks.items())
    assert all(torch.equal(mask, found.shuffled(3).masks[name]) for name, mask in mixed.masks.items())
    for again in (found.reinitialised(model, seed=4), found.reinitialised(seed=4)):
        state = again.state_dict()
        for name, mask in found.masks.items():
            fresh = state[f"{name}_orig"]
            assert torch.equal(state[f"{name}_mask"].bool(), mask)
            assert not torch.equal(fresh, model.state_dict()[name])
            assert float(fresh.abs().max()) <= fresh.shape[1] ** -0.5
    assert not hasattr(model[0], "weight_mask")


# -- nothing of the user's is changed ------------------------------------------------------------------------


@CUT
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_model_its_statistics_and_its_mode_stay(method: Any, mode: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.ReLU(), nn.Linear(8, 3))
    model.eval()
    before = copy.deepcopy(model.state_dict())
    x, y = batch()
    drawn = torch.random.get_rng_state()
    found = gs.sparsify(model, method=method, mode=mode, data=(x.float(), y), loss=F.cross_entropy)
    again = gs.sparsify(model, method=method, mode=mode, data=(x.float(), y), loss=F.cross_entropy)
    assert not model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(drawn, torch.random.get_rng_state())
    assert all(torch.equal(mask, again.masks[name]) for name, mask in found.masks.items())


def test_train_and_eval_mode_of_batch_norm_score_differently() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    train, evaluated = (masks_of(model, "snip", mode=mode).scores for mode in ("train", "eval"))
    assert not torch.allclose(train["0.weight"], evaluated["0.weight"])


# -- storing -------------------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path: Path) -> None:
    found = masks_of(network(5, 40, 3), "grasp", 0.8)
    gs.save(found, tmp_path / "bundle")
    loaded = gs.load(tmp_path / "bundle")
    assert isinstance(loaded, gs.Masks) and repr(loaded) == repr(found)
    assert list(loaded.masks) == list(found.masks)
    assert all(torch.equal(mask, loaded.masks[name]) for name, mask in found.masks.items())
    assert all(torch.equal(score, loaded.scores[name]) for name, score in found.scores.items())
    x = batch()[0]
    assert torch.equal(loaded.module()(x), found.module()(x))


def test_exported_with_its_zeros(tmp_path: Path) -> None:
    model = network(5, 40, 3).float()
    found = gs.sparsify(model, torch.randn(2, 5), method="synflow", sparsity=0.8)
    gs.export_onnx(found, tmp_path / "model.onnx")
    x = torch.randn(7, 5)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert largest_difference([torch.from_numpy(output)], [found.apply(model)(x).detach()]) < 1e-5


def test_masked_modules_fuse() -> None:
    modules = [masks_of(network(5, 40, 3), "random", 0.8, seed=seed).module() for seed in (0, 1)]
    fused = gs.fuse(modules)
    x = batch()[0]
    assert largest_difference(fused(x), [module(x) for module in modules]) < EXACT


def test_masks_for_another_model() -> None:
    found = masks_of(network(5, 40, 3), "snip")
    with pytest.raises(PlanError, match=r"no parameter 0\.weight of shape \[40, 5\]"):
        found.apply(network(5, 41, 3))
    pruned = found.apply(network(5, 40, 3))
    with pytest.raises(PlanError, match="no parameter"):
        found.apply(pruned)
    for module in (pruned[0], pruned[2]):  # type: ignore[index]
        prune.remove(module, "weight")
    assert not pruned.get_parameter("0.weight")[~found.masks["0.weight"]].any()


# -- the pass ------------------------------------------------------------------------------------------------


def test_pass_obeys_the_laws() -> None:
    program = gs.trace(network(5, 40, 3), batch()[0])
    with program_unchanged(program):
        result = Sparsify(sparsity=0.7).run(Programs((program,)))
        again = Sparsify(sparsity=0.7).run(Programs((program,)))
    assert result.modified and not result.reason
    (found,) = result.programs.items
    check(found)
    assert str(found) == str(again.programs.single())
    masks = [entry.tensor for entry in found.state.values() if entry.kind == "buffer"]
    assert sum(int(mask.sum()) for mask in masks) == 320 - round(320 * 0.7)
    assert all(torch.equal(mask, mask.bool().to(mask)) for mask in masks)


def test_in_a_pipeline_on_submodels() -> None:
    program = gs.trace(network(5, 40, 3), batch()[0])
    pipeline = Pipeline.parse(
        "partition(k=2) | sparsify(method='magnitude', sparsity=0.5, scope='layer') | fuse"
    )
    fused = gs.emit(pipeline(program).single())
    assert fused(batch()[0]).shape == (2, 12, 3)
    assert str(Pipeline.parse("sparsify(sparsity=0.5)")) == "sparsify(sparsity=0.5)"
    with pytest.raises(UserError, match="snip scores by gradients of a loss, and no data and loss is given"):
        Pipeline.parse("sparsify(method='snip')")(program)


def test_pass_names_what_is_cut() -> None:
    program = gs.trace(network(64, 300, 100, 10), torch.randn(2, 64, dtype=torch.float64))
    result = Sparsify(method="magnitude", sparsity=0.99).run(Programs((program,)))
    assert "nothing is left of 2.weight" in result.reason


def test_submodels_and_layer_groups() -> None:
    model, x = network(5, 40, 20, 3), batch()[0]
    for piece in gs.partition(model, x, k=2).submodels:
        assert abs(gs.sparsify(piece, method="synflow", sparsity=0.5).sparsity - 0.5) < 0.01
    first = gs.layer_groups(model, x, n=2).modules[0]
    assert abs(gs.sparsify(first, method="magnitude", sparsity=0.5).sparsity - 0.5) < 0.01


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [1, 1.0, -0.1, float("nan"), True, "0.5", None])
def test_sparsity_out_of_range(sparsity: Any) -> None:
    with pytest.raises(UserError, match="expected a number of at least 0 and below 1"):
        masks_of(network(5, 4, 3), "magnitude", sparsity)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "snap"}, "method is 'snap', expected one of snip, grasp"),
        ({"method": "snip"}, "no data and loss is given"),
        ({"method": "grasp", "loss": F.cross_entropy}, "no data is given"),
        ({"method": "magnitude", "scope": "all"}, "scope is 'all'"),
        ({"method": "magnitude", "mode": "test"}, "mode is 'test'"),
        (
            {"method": "grasp", "data": batch(), "loss": F.cross_entropy, "temperature": 0},
            "the temperature is 0",
        ),
        ({"method": "synflow", "iterations": 0}, "0 iterations"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        gs.sparsify(network(5, 4, 3), batch()[0], **options)


def test_scores_that_say_nothing() -> None:
    model = network(5, 4, 3)
    x, y = batch()
    with pytest.raises(InputError, match=r"the scores of 0\.weight by snip are not all numbers"):
        gs.sparsify(model, data=(x / 0, y), loss=F.cross_entropy)
    with pytest.raises(InputError, match="the scores by snip are zero everywhere"):
        gs.sparsify(model, data=(x, y), loss=lambda outputs, targets: outputs.sum() * 0)
    with pytest.raises(InputError, match="the loss does not depend on the weights"):
        gs.sparsify(model, data=(x, y), loss=lambda outputs, targets: outputs.detach().sum())
    with pytest.raises(InputError, match=r"the loss gives shape \(12,\)"):
        gs.sparsify(model, data=(x, y), loss=lambda o, t: F.cross_entropy(o, t, reduction="none"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for method in ("magnitude", "synflow"):
        with pytest.raises(InputError, match=f"the scores by {method} are zero everywhere"):
            masks_of(model, method)


def test_data_that_give_nothing() -> None:
    model = network(5, 4, 3)
    for method in ("snip", "grasp"):
        with pytest.raises(InputError, match="the data gave no batch"):
            gs.sparsify(model, batch()[0], method=method, data=iter([]), loss=F.cross_entropy)
    with pytest.raises(UserError, match="a batch is a Tensor"):
        gs.sparsify(model, batch()[0], data=[batch()[0]], loss=F.cross_entropy)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


def test_a_loss_that_is_not_twice_differentiable() -> None:
    with pytest.raises(UnsupportedError, match="grasp differentiates the loss twice, and that fails"):
        gs.sparsify(network(5, 4, 3), method="grasp", data=batch(), loss=lambda o, t: Once.apply(o).mean())
    linear = nn.Sequential(nn.Linear(5, 3)).double()
    with pytest.raises(InputError, match="the scores by grasp are zero everywhere"):
        gs.sparsify(linear, method="grasp", data=batch(), loss=lambda o, t: o.mean())


@CUT
def test_a_batch_that_lacks_a_class() -> None:
    x, y = batch(classes=2)
    with pytest.warns(UserWarning, match=r"the data lack 1 of 3 classes \(2\).*gs\.data\.balanced"):
        gs.sparsify(network(5, 4, 3), method="grasp", sparsity=0.1, data=(x, y), loss=F.cross_entropy)


def test_halves_of_a_balanced_batch_are_balanced() -> None:
    x, y = torch.randn(60, 5, dtype=torch.float64), torch.arange(60) % 7 % 3
    seen = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(targets.bincount().tolist())
        return F.cross_entropy(outputs, targets)

    data = gs.data.balanced((x, y), per_class=4)
    gs.sparsify(network(5, 4, 3), method="grasp", sparsity=0.1, data=data, loss=loss)
    assert seen == [[2, 2, 2]] * 4, "both halves, for the gradient and for its product with the Hessian"


def test_a_layer_that_is_cut_through_is_named() -> None:
    model = network(5, 40, 3)
    with torch.no_grad():
        model.get_parameter("2.weight").mul_(1e-3)
    with pytest.warns(UserWarning, match=r"nothing is left of 2\.weight"):
        found = gs.sparsify(model, batch()[0], method="magnitude", sparsity=0.5)
    assert found.cut == ("2.weight",)


def test_nothing_to_prune() -> None:
    with pytest.raises(PartitionError, match="no weight to prune"):
        gs.sparsify(nn.Sequential(nn.BatchNorm1d(5)), batch()[0].float(), method="magnitude")


def test_no_values_to_score() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 3))
    with pytest.raises(InputError, match="meta device"):
        gs.sparsify(model, torch.empty(2, 5, device="meta"), method="magnitude")


# -- the command ---------------------------------------------------------------------------------------------

FILE = """
import torch
from torch import nn
model = nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 3))
example_inputs = torch.randn(2, 5)
"""
DATA = """
def data():
    return torch.randn(12, 5), torch.arange(12) % 3
loss = nn.functional.cross_entropy
"""


def test_command(tmp_path: Path) -> None:
    file, out = tmp_path / "model.py", tmp_path / "out"
    file.write_text(FILE)
    done = run("sparsify", file, "--sparsity", 0.75, "-o", out, "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["sparsity"] == 0.75 and report["method"] == "synflow" and not report["cut"]
    assert sum(row["kept"] for row in report["layers"]) == 80
    loaded = gs.load(out)
    assert isinstance(loaded, gs.Masks) and loaded.sparsity == 0.75
    assert run("export", out, "-o", tmp_path / "onnx").exit_code == 0
    refused = run("sparsify", file, "--method", "snip", "-o", out, "--force")
    assert refused.exit_code == 3 and "defines no `data`" in refused.stderr and "hint" in refused.stderr
    file.write_text(FILE + DATA)
    done = run("sparsify", file, "--method", "snip", "-o", out, "--force")
    assert done.exit_code == 0 and "80" not in done.stderr and "left, by snip" in done.stdout
    done = run("sparsify", file, "--method", "grasp", "--per-class", 2, "-o", out, "--force")
    assert done.exit_code == 0 and "left, by grasp" in done.stdout
    done = run("sparsify", file, "--method", "grasp", "--per-class", 5, "-o", out, "--force")
    assert done.exit_code != 0 and "fewer than 5 examples of 3 of 3 classes" in done.stderr
    assert run("sparsify", file, "--per-class", 2, "-o", out, "--force").exit_code == 2
    assert run("sparsify", file, "--sparsity", 1.5, "-o", out, "--force").exit_code == 2


def test_the_example() -> None:
    found = script("sparse_from_the_start").main(["--epochs", "3"])
    assert list(found) == ["dense", "masked", "masked, shuffled", "half of the units"]
    assert found["dense"] < 0.2 and found["half of the units"] < 0.25
    assert found["masked"] < found["masked, shuffled"]
