"""Every model of the zoo is divided, or refused by name and reason: never wrong."""

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphsplit as gs
from graphsplit.errors import PartitionError, UserError
from graphsplit.plan import PartitionPlan
from graphsplit.program import op_name
from graphsplit.signature import as_call
from laws import model_unchanged
from zoo import ZOO, call_of, traced

BOUND = 1e-9


def partition(name: str, k: int) -> gs.Partition:
    return gs.partition(traced(name), *call_of(name), k=k)


# Why these are refused, in the words of the message.
REFUSED = {
    "hidden_output": "there is nothing to split: every unit reaches an output",
    "lstm_loop": "there is nothing to split: every unit reaches an output",
    "hub_bloom": r"the custom torch\.autograd\.Function GeLUFunction",
    "hub_mixtral_grouped": r"the custom torch\.autograd\.Function GeneratedBackwardFor_transformers_grouped_mm",
    "hub_recurrent_gemma": r"the custom torch\.autograd\.Function SqrtBoundDerivative",
}
# Fractions of the parameters that the largest sub-model holds, at most: 1 / K^2 is 0.25 and 0.0625.
FRACTIONS: dict[tuple[str, int], float] = {
    ("lenet", 2): 0.255,
    ("vgg_bn", 2): 0.26,
    ("vgg_bn", 4): 0.07,
    ("resnet_basic", 2): 0.265,
    ("resnet_bottleneck", 2): 0.27,
    ("resnet_bottleneck", 4): 0.08,
    ("densenet", 2): 0.33,
    ("googlenet", 2): 0.35,
    ("mobilenet_v2", 2): 0.36,
    ("mobilenet_v3", 2): 0.31,
    ("shufflenet_v2", 2): 0.34,
    ("regnet", 2): 0.36,
    ("convnext", 2): 0.32,
    ("efficientnet", 2): 0.32,
    ("unet", 2): 0.26,
    ("unet", 4): 0.07,
    ("vit", 2): 0.34,
    ("swin", 2): 0.29,
    ("gpt", 2): 0.29,
    ("gpt", 4): 0.1,
    ("llama_expand", 2): 0.31,
    ("hub_bert", 2): 0.31,
    ("hub_roberta", 2): 0.31,
    ("hub_gpt2_no_cache", 2): 0.3,
    ("hub_llama_tied_eager", 2): 0.28,
    ("hub_resnet", 2): 0.27,
    ("hub_vit", 2): 0.34,
    ("lstm", 2): 0.33,
    ("gru", 2): 0.34,
    ("slot_attention", 2): 0.29,
    ("slot_attention", 4): 0.09,
    ("vector_quantizer", 2): 0.33,
    ("kolmogorov_arnold", 2): 0.37,
    ("fourier_operator", 2): 0.27,
}

# What `make test` tries, beside the models above: together they have every operation of the zoo.
SOME = (
    {name for name, _ in FRACTIONS}
    | REFUSED.keys()
    | {
        "aspp", "vae", "norm_local_response", "norm_instance", "fourier_mixing", "encoder_decoder",
        "text_cnn", "rnn", "prelu_channels", "glu", "cbam", "maxout", "weight_standardization",
        "channel_slices", "where", "pixel_shuffle", "patch_merging", "softmax_closing", "conv3d",
        "bilinear", "no_bias", "radiance_field", "mixture_density", "message_passing", "triplet_embedding",
        "discriminator", "hub_modernbert", "hub_deberta_v2", "hub_fnet", "hub_convbert", "hub_xlnet",
        "hub_roformer", "hub_esm", "hub_llama_loss", "hub_bitnet", "hub_diffllama", "hub_xglm",
        "hub_falcon_grouped", "hub_deepseek_v2", "hub_olmoe", "hub_beit", "hub_focalnet", "hub_patchtst",
        "hub_siglip", "hub_llava", "hub_wavlm", "hub_clip",
    }
)  # fmt: skip

CASES = [
    pytest.param(name, k, id=f"{name}-{k}", marks=() if name in SOME else pytest.mark.zoo)
    for name, entry in ZOO.items()
    for k in entry.k
]


@functools.cache
def operations(name: str) -> frozenset[str]:
    if name in REFUSED:
        return frozenset()
    return frozenset(op_name(node) for node in traced(name).nodes() if node.op == "call_function")


@pytest.mark.zoo
@pytest.mark.parametrize("name", [name for name in ZOO if name not in SOME])
def test_some_have_every_operation(name: str) -> None:
    missing = operations(name) - frozenset[str]().union(*map(operations, SOME))
    assert not missing, f"no model of SOME has them: put {name} there"


@pytest.mark.parametrize(("name", "k"), CASES)
def test_partition_is_exact_or_refused(name: str, k: int) -> None:
    if name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]) as caught:
            partition(name, k)
        assert caught.value.hint
        return
    part = partition(name, k)
    assert part.plan.k == k == len(part.programs)
    certificate = part.verify()
    assert certificate.ok, str(certificate)
    assert certificate.max_error < BOUND
    assert certificate.dtype == "float64"
    counts, full = part.plan.parameter_counts(), part.plan.full_parameter_count()
    assert full == part.program.parameter_count()
    assert full / k**2 <= min(counts) and max(counts) < full
    assert max(counts) <= FRACTIONS.get((name, k), 1.0) * full
    assert PartitionPlan.from_json(part.plan.to_json()) == part.plan


FAMILIES = [
    "lenet", "resnet_basic", "convnext_stochastic_depth", "unet", "gpt_dropout", "lstm_stacked", "glu",
    "auxiliary_head", "running_statistic", "hub_bert", "hub_t5",
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_certificate_compares_with_the_model_itself(name: str) -> None:
    entry = ZOO[name]
    model = entry.build()
    part = gs.partition(model, *as_call(entry.inputs()), k=2)
    certificate = part.verify()
    assert certificate.ok, str(certificate)
    checks = {row.check: row for row in certificate.rows}
    for mode in ("eval", "train"):
        row = checks[f"K = 1 emitted equals the model ({mode})"]
        assert row.error == 0
        assert row.dtype == "float32"


# ---------------------------------------------------------------------------------------------------------
# The numbers of the paper


@pytest.mark.parametrize(("k", "parameters"), [(1, 431_080), (2, 109_295), (5, 18_224), (10, 4_867)])
def test_lenet_has_the_parameters_of_the_paper(k: int, parameters: int) -> None:
    part = partition("lenet", k)
    assert part.plan.parameter_counts() == (parameters,) * k
    assert [sum(p.numel() for p in submodel.parameters()) for submodel in part.submodels] == [parameters] * k
    certificate = part.verify()
    assert certificate.ok and certificate.max_error < BOUND


# ---------------------------------------------------------------------------------------------------------
# Hidden sizes that K divides


def widths() -> dict[str, tuple[nn.Module, Any]]:
    """Models of which K divides every hidden size, for K up to 4."""
    torch.manual_seed(0)
    mlp = nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(6, 16),
            relu1=nn.ReLU(),
            fc2=nn.Linear(16, 24),
            relu2=nn.ReLU(),
            fc3=nn.Linear(24, 5),
        )
    )
    vgg = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 5),
    )  # fmt: skip
    gpt = ZOO["gpt"]
    return {
        "mlp": (mlp, (torch.zeros(2, 6),)),
        "vgg": (vgg, (torch.zeros(2, 3, 8, 8),)),
        "gpt": (gpt.build(), gpt.inputs()),
    }


def outer_layers(model: nn.Module) -> set[str]:
    """Parameters of the first and the last layer, and vectors: they have one dimension of units."""
    weights = [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
    vectors = {name for name, parameter in model.named_parameters() if parameter.dim() == 1}
    return vectors | {name for name in weights if "wte" in name or "wpe" in name} | {weights[0], weights[-1]}


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("name", ["mlp", "vgg", "gpt"])
def test_hidden_sizes_that_k_divides(name: str, k: int) -> None:
    model, inputs = widths()[name]
    part = gs.partition(model, *as_call(inputs), k=k)
    outer = outer_layers(model)
    if name == "gpt":  # the last weight in order is inside of a block, its head is tied to the embedding
        outer.discard([n for n, p in model.named_parameters() if p.dim() > 1][-1])
    full = dict(model.named_parameters())
    biases_of_outputs = {"fc3.bias", "9.bias"}
    assert {n for n, p in full.items() if p.dim() > 1} - outer, "there are inner layers"
    for submodel in part.submodels:
        for parameter_name, parameter in submodel.named_parameters():
            whole = full[parameter_name].numel()
            if parameter_name in biases_of_outputs:
                assert parameter.numel() == whole
            elif parameter_name in outer:
                assert parameter.numel() * k == whole, parameter_name
            else:
                assert parameter.numel() * k**2 == whole, parameter_name


# ---------------------------------------------------------------------------------------------------------
# What cannot be divided


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


class Function(nn.Module):
    """Calls a function of itself."""

    def __init__(self, function: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


@pytest.mark.parametrize("k", [0, -1, 2.0, True, "2"])
def test_k_has_to_be_a_whole_number(k: Any) -> None:
    with pytest.raises(PartitionError, match="expected a whole number of at least 1"):
        gs.partition(mlp(), torch.zeros(2, 6), k=k)
    with pytest.raises(PartitionError, match="expected a whole number of at least 1"):
        gs.partition(gs.trace(mlp(), torch.zeros(2, 6)), k=k)


def test_k_larger_than_every_axis() -> None:
    with pytest.raises(
        PartitionError, match=r"K = 9 is larger than every axis: the widest, 0\.weight\[0\], has 8 units"
    ) as caught:
        gs.partition(mlp(), torch.zeros(2, 6), k=9)
    assert caught.value.hint == "choose K of at most 8"
    assert gs.partition(mlp(), torch.zeros(2, 6), k=8).verify().ok


NOTHING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no parameters": (lambda: nn.ReLU(), "the model has no parameters, so there is nothing to divide"),
    "only buffers": (
        lambda: nn.BatchNorm1d(6, affine=False), "the model has no parameters, so there is nothing to divide"
    ),
    "one layer": (lambda: nn.Linear(6, 3), "there is nothing to split: every unit reaches an output"),
    "the hidden state": (
        lambda: Function(lambda s, x: s.fc2(s.fc1(x).relu()), fc1=nn.Linear(6, 1), fc2=nn.Linear(1, 8)),
        "K = 2 is larger than every axis|there is nothing to split",
    ),
    "an output of all": (
        lambda: Function(lambda s, x: (s.fc1(x), s.fc2(s.fc1(x))), fc1=nn.Linear(6, 8), fc2=nn.Linear(8, 2)),
        "there is nothing to split: every unit reaches an output",
    ),
    "an unused layer": (
        lambda: Function(lambda s, x: x * 2, fc=nn.Linear(6, 8)), "there is nothing to split"
    ),
    "complex weights": (
        lambda: Function(lambda s, x: (x @ s.w).abs(), w=nn.Parameter(torch.ones(6, 4, dtype=torch.complex64))),
        "the parameter w is complex",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_to_divide(name: str) -> None:
    make, words = NOTHING[name]
    model = make()
    inputs = torch.zeros(2, 6, dtype=torch.complex64 if name == "complex weights" else torch.float32)
    with model_unchanged(model), pytest.raises(PartitionError, match=words):
        gs.partition(model, inputs, k=2)


def test_an_operation_without_a_rule_is_named() -> None:
    model = Function(
        lambda s, x: s.fc2(torch.renorm(s.fc1(x), 2, 0, 1.0)),
        fc1=nn.Linear(6, 8),
        fc2=nn.Linear(8, 3),
    )
    with pytest.raises(PartitionError, match=r"renorm.* has no rule") as caught:
        gs.partition(model, torch.randn(2, 6), k=2)
    assert __file__ in str(caught.value)


def test_integer_weights_are_kept() -> None:
    model = Function(
        lambda s, x: s.net(x) + s.table,
        net=mlp(), table=nn.Parameter(torch.arange(3), requires_grad=False),
    )  # fmt: skip
    part = gs.partition(model, torch.randn(2, 6), k=2)
    assert part.verify().ok
    assert all(torch.equal(submodel.table, model.table) for submodel in part.submodels)


def test_integer_inputs_are_no_problem() -> None:
    model = Function(lambda s, x: s.net(x.float() / 10), net=mlp())
    assert gs.partition(model, torch.ones(2, 6, dtype=torch.long), k=2).verify().ok


def test_complex_values_inside() -> None:
    model = Function(lambda s, x: s.net(torch.fft.fft(x).real), net=mlp())
    assert gs.partition(model, torch.randn(2, 6), k=2).verify().ok
