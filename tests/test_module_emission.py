"""Sub-models of the user's own class: equal to the graph form, usable as the user's class is, or refused."""

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphsplit as gs
from graphsplit.errors import PartitionError, UnsupportedError
from graphsplit.module_emission import layer_sizes
from graphsplit.signature import as_call
from laws import model_unchanged
from zoo import ZOO

IDS = torch.randint(3, 50, (2, 8), generator=torch.Generator().manual_seed(0))
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def equal_to_graph(model: nn.Module, *call: Any, k: int = 2, **options: Any) -> gs.Partition:
    """Return a partition into modules of the user's class, whose values and gradients are the graph form's."""
    with model_unchanged(model):
        part = gs.partition(model, *call, k=k, emit="module", **options)
    args, kwargs = as_call(call[0], call[1] if len(call) > 1 else None)
    for module, program in zip(part.submodels, part.programs, strict=True):
        assert type(module) is type(model) and module.training
        graph = gs.emit(program)
        assert {n: p.shape for n, p in module.named_parameters()} == {
            n: p.shape for n, p in graph.named_parameters()
        }
        for mode in (True, False):
            outputs = []
            for each in (module.train(mode), graph.train(mode)):
                torch.manual_seed(1)
                outputs.append(_floats(each(*copy.deepcopy(args), **copy.deepcopy(kwargs))))
            for one, other in zip(*outputs, strict=options.get("outputs") is None):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        for each in (module, graph):
            torch.manual_seed(1)
            sum(out.sum() for out in _floats(each.train()(*args, **kwargs))[:1]).backward()
        gradients = dict(graph.named_parameters())
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-3, atol=1e-4)
    return part


def _floats(value: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


# Families


@pytest.mark.parametrize(
    "name",
    [
        "vgg_bn",
        "resnet_basic",
        "convnext",
        "gpt",
        "vit",
        "lstm",
        "gru",
        "swin",
        "auxiliary_head",
        "two_in_two_out",
        "transformer_sinusoidal",
    ],
)
def test_hand_written_models(name: str) -> None:
    entry = ZOO[name]
    equal_to_graph(entry.build(), *as_call(entry.inputs()))


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 5), nn.Conv2d(4, 8, 5)
        self.fc1, self.fc2 = nn.Linear(32, 20), nn.Linear(20, 5)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(self.drop(F.relu(self.fc1(x.flatten(1)))))


@pytest.mark.parametrize("k", [2, 4])
def test_lenet(k: int) -> None:
    part = equal_to_graph(LeNet(), torch.randn(2, 1, 20, 20), k=k)
    first = part.submodels[0]
    assert (first.conv2.in_channels, first.conv2.out_channels) == (4 // k, 8 // k)
    assert (first.fc1.in_features, first.fc1.out_features) == (32 // k, 20 // k)
    assert f"out_features={20 // k}" in repr(first)


class Layers(nn.Module):
    """Every kind of layer whose sizes follow from its weights, or from those of others."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.rnn = nn.LSTM(16, 12, num_layers=2, batch_first=True)
        self.inner = nn.Linear(12, 16)
        self.attend = nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.plain = nn.LayerNorm(16, elementwise_affine=False)
        self.conv = nn.Conv1d(16, 16, 3, groups=4, padding=1)
        self.groups = nn.GroupNorm(4, 16)
        self.batch = nn.BatchNorm1d(16)
        self.slope = nn.PReLU(16)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.inner(self.rnn(self.embed(ids))[0])
        x = self.norm(x + self.attend(x, x, x, need_weights=False)[0])
        x = self.plain(x).transpose(1, 2)
        x = self.slope(self.batch(self.groups(self.conv(x))))
        return self.head(x.mean(-1))


def test_torchs_own_layers_have_the_sizes_of_their_weights() -> None:
    part = equal_to_graph(Layers(), torch.randint(20, (2, 6)))
    module: Any = part.submodels[1]
    assert module.rnn.hidden_size == 6 and module.rnn.input_size == 8
    assert (module.attend.embed_dim, module.attend.num_heads, module.attend.head_dim) == (8, 2, 4)
    assert module.plain.normalized_shape == (8,) and module.norm.normalized_shape == (8,)
    assert (module.conv.groups, module.conv.in_channels) == (2, 8)
    assert (module.groups.num_groups, module.groups.num_channels) == (2, 8)
    assert module.slope.num_parameters == module.batch.num_features == 8
    assert module.embed.embedding_dim == 8 and module.embed.num_embeddings == 20


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(3, 5), nn.Bilinear(3, 4, 5), nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose1d(4, 6, 3, groups=2),
        nn.LSTM(3, 8, proj_size=4), nn.GRU(3, 5), nn.RNN(3, 5), nn.GRUCell(3, 5), nn.LSTMCell(3, 5),
        nn.BatchNorm2d(4), nn.BatchNorm1d(4, affine=False), nn.InstanceNorm1d(4, affine=True), nn.InstanceNorm1d(4),
        nn.LayerNorm((3, 4)), nn.RMSNorm(4), nn.GroupNorm(2, 4), nn.Embedding(5, 3), nn.EmbeddingBag(5, 3), nn.PReLU(3),
        nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, kdim=3, vdim=5), nn.ReLU(),
    ],
    ids=repr,
)  # fmt: skip
def test_sizes_of_a_layer_as_it_was_made_are_its_own(layer: Any) -> None:
    for name, size in layer_sizes(layer).items():
        assert getattr(layer, name) == size, name


# Whole numbers of the user's code


@dataclass
class Sizes:
    """A configuration; the number of layers happens to be the number of heads."""

    width: int = 16
    heads: int = 4
    num_layers: int = 4
    positions: int = 16


class Block(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.options = {"shape": (sizes.heads, sizes.width // sizes.heads)}
        self.qkv, self.out = nn.Linear(sizes.width, 3 * sizes.width), nn.Linear(sizes.width, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split(self.sizes.width, -1)
        q, k, v = (t.unflatten(-1, self.options["shape"]).transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return x + self.out(mixed.reshape(x.shape))


class Stack(nn.Module):
    """Scales by a width that has to stay, as T5 does, and loops over a depth that equals a width."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes, self.model_width = sizes, sizes.width
        self.embed = nn.Embedding(20, sizes.width)
        self.place = nn.Embedding(sizes.positions, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.num_layers))
        self.head = nn.Linear(sizes.width, 20, bias=False)
        self.head.weight = self.embed.weight
        self.notes = SimpleNamespace(owner="user")

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks[: self.sizes.num_layers]:
            x = block(x)
        return self.head(x * self.model_width**-0.5)


def test_numbers_of_the_users_code_are_found_by_trial() -> None:
    torch.manual_seed(0)
    model = Stack(Sizes())
    part = equal_to_graph(model, torch.randint(20, (2, 5)))
    for module in part.submodels:
        assert module.sizes == Sizes(width=8, heads=2, num_layers=4, positions=16)
        assert module.model_width == 16
        assert module.blocks[0].options["shape"] == (2, 4)
        assert module.head.weight is module.embed.weight
        assert module.blocks[0].sizes is module.sizes
    assert model.sizes == Sizes() and model.blocks[0].options["shape"] == (4, 4)


class Heads(nn.Module):
    """Attention whose number of heads and whose width of a head stand under short names."""

    def __init__(self, width: int, h: int) -> None:
        super().__init__()
        self.h, self.d_k = h, width // h
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(4)])
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        n = x.size(0)
        q, k, v = (layer(x).view(n, -1, self.h, self.d_k).transpose(1, 2) for layer in self.layers[:3])
        p = self.dropout((q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))).softmax(-1))
        return self.layers[3]((p @ v).transpose(1, 2).contiguous().view(n, -1, self.h * self.d_k))


def test_two_numbers_that_have_to_change_together() -> None:
    """With one of them alone both reshape without an error, and give other values."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), Heads(16, 4), nn.Tanh(), nn.Linear(16, 2))
    part = equal_to_graph(model, torch.randn(2, 5, 3))
    assert {(module[1].h, module[1].d_k) for module in part.submodels} == {(2, 4)}


class Translator(nn.Module):
    """One table of positions for both streams, sequence first, as in PyTorch's tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(20, 16), nn.Embedding(20, 16)
        self.register_buffer("table", torch.randn(50, 1, 16))
        self.transformer = nn.Transformer(16, 4, 1, 1, 32, 0.1)
        self.head = nn.Linear(16, 20)

    def forward(self, a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
        assert isinstance(self.table, Tensor)
        a, b = (each + self.table[: each.size(0), :] for each in (self.source(a), self.target(b)))
        return self.head(self.transformer(a, b, tgt_mask=mask))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_a_table_of_positions_for_two_streams() -> None:
    torch.manual_seed(0)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    part = equal_to_graph(Translator(), (torch.randint(20, (7, 2)), torch.randint(20, (6, 2)), mask))
    assert part.analysis.kept_whole == ()
    assert {module.table.shape for module in part.submodels} == {(50, 1, 8)}


SHARED = Sizes(width=8, heads=2)


class Atomic(Sizes):
    def __deepcopy__(self, memo: Any) -> "Atomic":
        return self


def test_what_a_copy_shares_with_the_users_module_is_never_written() -> None:
    sizes = Atomic()
    model = Stack(sizes)
    with pytest.raises(UnsupportedError):
        gs.partition(model, torch.randint(20, (2, 5)), emit="module")
    assert sizes == Atomic()


# Refusals


class View(nn.Module):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.fc1, self.fc2, self.run = nn.Linear(6, 8), nn.Linear(8, 3), run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def split_by_eight(self: View, x: Tensor) -> Any:
    return self.fc2(self.fc1(x).relu().view(len(x), 8))


def scaled_by_its_width(self: View, x: Tensor) -> Any:
    hidden = self.fc1(x).relu()
    return self.fc2(hidden / hidden.shape[-1])


def test_a_width_in_the_code_is_named_with_its_line() -> None:
    with pytest.raises(UnsupportedError, match="raises RuntimeError: shape") as caught:
        gs.partition(View(split_by_eight), torch.randn(4, 6), emit="module")
    assert "sub-model 0" in str(caught.value) and __file__ in str(caught.value)
    assert "view(len(x), 8)" in str(caught.value)
    assert caught.value.hint is not None and 'emit="graph"' in caught.value.hint
    assert gs.partition(View(split_by_eight), torch.randn(4, 6)).verify().ok


def test_other_values_are_refused_with_the_first_module_that_differs() -> None:
    with pytest.raises(UnsupportedError, match=r"module fc2 \(Linear\) gives other values .*\de-\d"):
        gs.partition(View(scaled_by_its_width), torch.randn(4, 6), emit="module")


def test_bad_values() -> None:
    model = View(lambda self, x: self.fc2(self.fc1(x).relu()))
    with pytest.raises(PartitionError, match="emit is 'modules', expected 'graph' or 'module'"):
        gs.partition(model, torch.randn(4, 6), emit="modules")  # type: ignore[arg-type]
    with pytest.raises(PartitionError, match="needs the user's own module"):
        gs.partition(gs.trace(model, torch.randn(4, 6)), emit="module")
    with pytest.raises(UnsupportedError, match="without weights"):
        gs.partition(copy.deepcopy(model).to("meta"), torch.randn(4, 6, device="meta"), emit="module")


def test_a_module_that_cannot_be_copied() -> None:
    model = View(lambda self, x: self.fc2(self.fc1(x).relu()))
    model.lock = (number for number in range(3))
    with pytest.raises(UnsupportedError, match="View cannot be copied: TypeError"):
        gs.partition(model, torch.randn(4, 6), emit="module")


# What the rest of graphsplit makes of them


def test_merge_verify_save_and_init(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LeNet()
    x = torch.randn(3, 1, 20, 20)
    part = gs.partition(model, x, emit="module", init="fresh", seed=3)
    with torch.no_grad():
        for module in part.submodels:
            module.fc1.bias.add_(1.0)
        mean = sum(module.eval()(x) for module in part.submodels) / 2
        torch.testing.assert_close(part.merge(part.submodels).eval()(x), mean)
        torch.testing.assert_close(part.merge().eval()(x), mean)
        assert part.verify(part.submodels).ok
        gs.save(part, tmp_path / "bundle")
        loaded = gs.load(tmp_path / "bundle")
        assert isinstance(loaded, gs.Partition)
        torch.testing.assert_close(loaded.merge().eval()(x), mean)


def test_no_weight_is_shared_with_the_users_module_or_another_part() -> None:
    model = LeNet()
    part = gs.partition(model, torch.randn(2, 1, 20, 20), emit="module")
    owners = [model, *part.submodels, *(gs.emit(program, copy=False) for program in part.programs)]
    pointers = [{p.data_ptr() for p in owner.parameters()} for owner in owners[:3]]
    assert not pointers[0] & pointers[1] and not pointers[1] & pointers[2]


# transformers


def transformers() -> Any:
    return pytest.importorskip("transformers")


def gpt2() -> nn.Module:
    package = transformers()
    config = package.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=32, vocab_size=50, **SPECIAL)
    return package.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    package = transformers()
    config = package.LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, intermediate_size=96,
        vocab_size=50, max_position_embeddings=32, **SPECIAL,
    )  # fmt: skip
    return package.LlamaForCausalLM(config)


def bert() -> nn.Module:
    package = transformers()
    config = package.BertConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, vocab_size=50,
        max_position_embeddings=32, **SPECIAL,
    )  # fmt: skip
    return package.BertForMaskedLM(config)


def vit() -> nn.Module:
    package = transformers()
    config = package.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
    )
    return package.ViTForImageClassification(config)


HUB: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, tuple[int, int]]]] = {
    "gpt2": (gpt2, {"input_ids": IDS, "use_cache": False}, {"n_embd": (32, 16), "n_head": (4, 2)}),
    "llama": (
        llama,
        {"input_ids": IDS, "use_cache": False},
        {
            "hidden_size": (64, 32), "num_attention_heads": (8, 4), "num_key_value_heads": (4, 2),
            "intermediate_size": (96, 48),
        },
    ),
    "bert": (
        bert,
        {"input_ids": IDS},
        {"hidden_size": (32, 16), "num_attention_heads": (4, 2), "intermediate_size": (64, 32)},
    ),
    "vit": (
        vit,
        {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))},
        {"hidden_size": (32, 16), "num_attention_heads": (4, 2), "intermediate_size": (64, 32)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_hub_models_work_as_before(name: str, tmp_path: Path) -> None:
    make, inputs, changes = HUB[name]
    model: Any = make()
    part = equal_to_graph(model, (), inputs)
    for number, module in enumerate(part.submodels):
        submodel: Any = module.eval()
        before, after = model.config.to_dict(), submodel.config.to_dict()
        assert {key: (before[key], after[key]) for key in before if before[key] != after[key]} == changes
        submodel.save_pretrained(tmp_path / str(number))
        again = type(model).from_pretrained(tmp_path / str(number), local_files_only=True).eval()
        with torch.no_grad():
            torch.testing.assert_close(again(**inputs).logits, submodel(**inputs).logits)
        if "use_cache" in inputs:
            tokens = submodel.generate(IDS[:1], max_new_tokens=6, do_sample=False, eos_token_id=None)
            assert tokens.shape == (1, 14)
            plain = submodel.generate(
                IDS[:1], max_new_tokens=6, do_sample=False, eos_token_id=None, use_cache=False
            )
            assert torch.equal(tokens, plain)


def test_t5_works_but_no_configuration_builds_it_again() -> None:
    package = transformers()
    config = package.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=50, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = package.T5ForConditionalGeneration(config)
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :5], "use_cache": False}
    with pytest.warns(UserWarning, match="no configuration of T5ForConditionalGeneration was found"):
        part = gs.partition(model, inputs, outputs=["logits"], emit="module")
    submodel: Any = part.submodels[1].eval()
    assert submodel.model_dim == 32 and submodel.encoder.block[0].layer[0].SelfAttention.n_heads == 2
    graph = gs.emit(part.programs[1]).eval()
    with torch.no_grad(), warnings.catch_warnings():
        torch.testing.assert_close(submodel(**inputs).logits, graph(**inputs)["logits"])
    assert submodel.generate(IDS, max_new_tokens=4, do_sample=False).shape[0] == 2
