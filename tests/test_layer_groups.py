"""Layer groups: any graph cut by depth, each group a program, put together bit for bit."""

import copy

import pytest
import torch
from torch import Tensor, nn

import graphsplit as gs
from graphsplit.depth.plan import DepthPlan
from graphsplit.errors import PartitionError, PlanError, UserError
from graphsplit.passes import Pipeline
from graphsplit.program import check
from laws import assert_same_step, model_unchanged, step
from zoo import ZOO, call_of, traced


class Skips(nn.Module):
    """A tensor skips over two layers; a mask is used by all of them; a table of constants by two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("table", torch.arange(6.0))

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        ramp = torch.arange(x.shape[0], dtype=x.dtype)[:, None] / x.shape[0]
        early = torch.relu(self.a(x)) * mask
        middle = self.drop(self.norm(self.b(early + ramp))) * mask + self.table
        late = self.c(middle) + early + ramp + self.table
        return {"logits": self.head(late), "early": early}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.embedding(tokens))))


class Branches(nn.Module):
    """Takes another way in training."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.side = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        for layer in self.layers:
            x = torch.relu(layer(x))
            if self.training:
                x = x * (torch.rand(x.shape[0], 1) > 0.2)
        return (x, self.side(x)) if self.training else (x,)


def skips() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return Skips(), (torch.randn(4, 6), torch.rand(4, 6))


def tower(depth: int = 4) -> nn.Sequential:
    return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(6, 6), nn.Tanh())))


# What is cut


def test_a_frontier_holds_what_skips_a_group() -> None:
    model, inputs = skips()
    with model_unchanged(model):
        groups = gs.layer_groups(model, inputs, at=["b", "c", "head"])
        names = [[item.name for item in group.crossing] for group in groups.plan.groups]
        assert groups.n == 4 and groups.verify().ok
    # The mask is an input, `early` is an output and a skip; ramps and tables are made again.
    assert [len(row) for row in names] == [3, 2, 2, 0]
    assert "mask" in names[0] and "mask" not in names[1]
    assert {name for row in groups.plan.groups for name in row.state} >= {"table", "norm.running_mean"}
    assert "table" in groups.plan.groups[1].state and "table" in groups.plan.groups[2].state


def test_groups_run_one_after_the_other_as_ordinary_modules() -> None:
    model, (x, mask) = skips()
    groups = gs.layer_groups(model, (x, mask), at=["b", "head"])
    first, second, third = (module.eval() for module in groups.modules)
    found = third(*second(*first(x, mask)))
    expected = model.eval()(x, mask)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    for program in groups.programs:
        check(program)
    with pytest.raises(UserError, match="expected"):
        second(torch.randn(4, 7), *first(x, mask)[1:])


@pytest.mark.parametrize("training", [True, False])
def test_recomposed_does_what_the_model_does(training: bool) -> None:
    model, inputs = skips()
    found = gs.layer_groups(model, inputs, n=3).recompose().train(training)
    assert list(found.state_dict()) == list(model.state_dict())
    assert_same_step(step(found, (inputs, {})), step(copy.deepcopy(model).train(training), (inputs, {})))


def test_recomposed_has_what_the_groups_learned() -> None:
    model, inputs = skips()
    groups = gs.layer_groups(model, inputs, at=["c"])
    with torch.no_grad():
        groups.modules[1].get_parameter("c.bias").fill_(3.0)
    assert bool((groups.recompose().get_parameter("c.bias") == 3).all())
    assert not bool((model.get_parameter("c.bias") == 3).any())
    with pytest.raises(PlanError, match="group 0 does not take"):
        groups.recompose(groups.modules[::-1])
    with pytest.raises(PlanError, match="1 modules for 2"):
        groups.recompose(groups.modules[:1])


def test_a_model_that_branches_on_training_is_cut_in_both_graphs() -> None:
    torch.manual_seed(0)
    model, x = Branches(), torch.randn(4, 6)
    program = gs.trace(model, (x,))
    assert program.branches_on_training
    groups = gs.layer_groups(model, (x,), n=4, balance="params")
    assert groups.verify().ok and [group.parameters for group in groups.plan.groups] == [42, 42, 42, 56]
    for training in (True, False):
        found, expected = groups.recompose().train(training), copy.deepcopy(model).train(training)
        assert_same_step(step(found, ((x,), {})), step(expected, ((x,), {})))


def test_a_stacked_recurrent_network_is_cut_between_its_layers() -> None:
    model, x = nn.LSTM(5, 8, num_layers=4, dropout=0.3, batch_first=True), torch.randn(2, 7, 5)
    groups = gs.layer_groups(model, (x,), n=4, balance="params")
    assert groups.verify().ok
    assert [group.parameters for group in groups.plan.groups] == [480, 576, 576, 576]


def test_what_training_writes_is_read_by_the_same_group_in_evaluation() -> None:
    entry = ZOO["running_statistic"]
    groups = gs.layer_groups(entry.build(), entry.inputs(), n=4)
    assert groups.program.branches_on_training
    assert [("average" in program.state) for program in groups.programs].count(True) == 1
    certificate = groups.verify()
    assert certificate.ok, str(certificate)


RECOMPOSED = (
    "lenet", "vgg_bn", "resnet_basic", "densenet", "googlenet", "shufflenet_v2", "unet", "vit", "swin", "gpt",
    "lstm", "gru", "hub_bert", "hub_gpt2_no_cache", "hub_t5", "hub_llama_tied_eager", "hub_resnet",
)  # fmt: skip


@pytest.mark.parametrize("name", RECOMPOSED)
def test_zoo_is_recomposed_exactly(name: str) -> None:
    """The whole zoo: ``python benchmarks/layer_groups.py``."""
    call = call_of(name)
    program = traced(name)
    text = str(program)
    made = 0
    for n in (2, 4, 8):
        try:
            groups = gs.layer_groups(program, *call, n=n, tied="copy")
        except PartitionError as refusal:
            assert "pieces at most" in str(refusal)
            continue
        made += 1
        certificate = groups.verify()
        assert certificate.ok, str(certificate)
        assert max(groups.costs) >= groups.bound
    assert made and str(program) == text


# Balance


def test_measures() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 64), nn.Linear(64, 8)
    )
    x = torch.randn(2, 1, 8, 8)
    flops = gs.layer_groups(wide, x, n=2, balance="flops")
    assert flops.costs == (2.0 * 2 * 64 * 4 * 9, 2.0 * 2 * (256 * 64 + 64 * 8))
    params = gs.layer_groups(wide, x, n=2, balance="params")
    assert params.costs == (40 + 16448, 520) and params.bound == 16448
    memory = gs.layer_groups(wide, x, n=2, balance="memory")
    assert sum(memory.costs) > 4 * 4 * (40 + 16448 + 520)
    timed = gs.layer_groups(wide, x, n=2, balance="time")
    assert all(cost > 0 for cost in timed.costs) and timed.plan.measure == "time"


def test_bytes_across_a_cut_can_be_limited() -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2), nn.Linear(2, 64), nn.Linear(64, 8))
    x = torch.randn(4, 8)
    narrow = gs.layer_groups(model, x, n=2, max_crossing=4 * 2 * 4)
    assert [meta.shape for meta in narrow.frontiers[0]] == [(4, 2)]
    with pytest.raises(PartitionError, match=r"no more than 31 bytes.*the narrowest place has 32"):
        gs.layer_groups(model, x, n=2, max_crossing=31)


def test_a_tolerance_buys_fewer_bytes() -> None:
    model = nn.Sequential(nn.Linear(8, 40), nn.Linear(40, 4), nn.Linear(4, 48), nn.Linear(48, 8))
    x = torch.randn(4, 8)
    exact = gs.layer_groups(model, x, n=2, balance="params")
    loose = gs.layer_groups(model, x, n=2, balance="params", tolerance=0.2)
    assert exact.frontiers[0][0].shape == loose.frontiers[0][0].shape == (4, 4)
    other = nn.Sequential(nn.Linear(8, 40), nn.Linear(40, 4), nn.Linear(4, 40), nn.Linear(40, 16))
    exact = gs.layer_groups(other, x, n=2, balance="params")
    loose = gs.layer_groups(other, x, n=2, balance="params", tolerance=0.3)
    assert (exact.frontiers[0][0].shape, loose.frontiers[0][0].shape) == ((4, 40), (4, 4))
    assert max(exact.costs) < max(loose.costs) <= 1.3 * max(exact.costs)


def test_published_sizes_of_resnet_50() -> None:
    """The stages: 0.22, 1.44 and 8.54 million parameters before each cut, 25.56 in all."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))
        inputs = {"pixel_values": torch.randn(2, 3, 64, 64)}
    stages = [f"resnet.encoder.stages.{number}" for number in (1, 2, 3)]
    groups = gs.layer_groups(model, inputs, at=stages)
    counts = torch.tensor([group.parameters for group in groups.plan.groups]).cumsum(0).tolist()
    assert counts == [225_344, 1_444_928, 8_543_296, 25_557_032]


# Tied weights


def test_a_tied_weight_is_refused_by_name() -> None:
    with pytest.raises(PartitionError, match=r"embedding\.weight must not be in two groups.*tied='copy'"):
        gs.layer_groups(Tied(), torch.randint(0, 11, (2, 5)), n=2)
    with pytest.raises(PartitionError, match=r"at inner: embedding\.weight would be in two groups"):
        gs.layer_groups(Tied(), torch.randint(0, 11, (2, 5)), at=["inner"])


def test_a_view_of_a_weight_belongs_to_its_user() -> None:
    class Transposed(Tied):
        def forward(self, tokens: Tensor) -> Tensor:
            head = self.embedding.weight.T
            return torch.tanh(self.inner(self.embedding(tokens))) @ head

    tokens = torch.randint(0, 11, (2, 5))
    with pytest.raises(PartitionError, match=r"embedding\.weight must not be in two groups"):
        gs.layer_groups(Transposed(), tokens, n=2)
    groups = gs.layer_groups(Transposed(), tokens, n=2, tied="copy")
    assert groups.verify().ok and [len(frontier) for frontier in groups.frontiers] == [1]


def test_copies_of_a_tied_weight_have_both_its_names() -> None:
    model = Tied()
    groups = gs.layer_groups(model, torch.randint(0, 11, (2, 5)), n=3, tied="copy")
    assert groups.verify().ok and groups.plan.tied == "copy"
    found = groups.recompose()
    assert sorted(found.state_dict()) == sorted(model.state_dict())
    assert found.get_parameter("head.weight") is not found.get_parameter("embedding.weight")
    tokens = torch.randint(0, 11, (3, 5))
    assert torch.equal(found.eval()(tokens), model.eval()(tokens))


def test_a_module_called_twice_stays_in_one_group() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.shared(torch.relu(self.shared(x)))))

    groups = gs.layer_groups(Twice(), torch.randn(2, 6), n=2)
    assert [group.parameters for group in groups.plan.groups] == [42, 42]
    with pytest.raises(PartitionError, match=r"shared\.weight, shared\.bias must not be in two groups"):
        gs.layer_groups(Twice(), torch.randn(2, 6), n=6)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": ["4.x"]}, r"there is no module '4\.x'"),
        ({"at": ["0"]}, "0 comes first, which leaves an empty group"),
        ({"at": ["2", "2"]}, "2 and 2 start at the same place, which leaves an empty group"),
        ({"n": 99}, "has 8 pieces at most"),
        ({"n": 0}, "n = 0 groups"),
        ({"n": 3, "at": ["2"]}, "1 places make 2 groups, and n is 3"),
        ({"balance": "size"}, "balance is 'size'.*flops, params, memory, time"),
        ({"tied": "split"}, "tied is 'split'"),
        ({"tolerance": -1.0}, "the tolerance is -1.0"),
        ({"max_crossing": "many"}, "no size of memory"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        gs.layer_groups(tower(), torch.randn(2, 6), **options)


def test_near_names_are_offered() -> None:
    model, inputs = skips()
    with pytest.raises(PartitionError, match="did you mean head"):
        gs.layer_groups(model, inputs, at=["heads"])


# As data, and as passes


def test_plan_as_json() -> None:
    model, inputs = skips()
    plan = gs.layer_groups(model, inputs, n=3).plan
    assert DepthPlan.from_json(plan.to_json()) == plan
    for text in (
        "",
        "[]",
        plan.to_json().replace("flops", "size"),
        plan.to_json().replace('"version": 1', '"version": 9'),
    ):
        with pytest.raises(PlanError, match="no depth plan"):
            DepthPlan.from_json(text)


def test_passes() -> None:
    program = gs.trace(tower(), torch.randn(2, 6))
    found = Pipeline.parse("layer-groups(n=3) | recompose")(program).single()
    check(found)
    x = torch.randn(5, 6)
    assert torch.equal(gs.emit(found)(x), gs.emit(program)(x))
    with pytest.raises(PartitionError, match="no layer groups"):
        Pipeline.parse("recompose")(program)


def test_same_cuts_every_time() -> None:
    model, inputs = skips()
    first, second = (gs.layer_groups(model, inputs, n=3) for _ in range(2))
    assert first.plan == second.plan
    assert [str(program) for program in first.programs] == [str(program) for program in second.programs]


def test_a_size_that_nothing_else_has_is_carried_across_every_cut() -> None:
    """The batch is lost in between: the tensor that has it crosses the first cut for the second one's sake."""

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            total = self.a(x).sum(0)
            total = self.c(torch.relu(self.b(total)))
            return total.expand(x.shape[0], 6) + torch.arange(x.shape[0])[:, None]

    model, x = Sums(), torch.randn(5, 6)
    groups = gs.layer_groups(model, torch.randn(3, 6), n=3, balance="params")
    assert groups.verify().ok and [len(frontier) for frontier in groups.frontiers] == [2, 2]
    assert torch.equal(groups.recompose()(x), model(x))
