"""Models by name: built with random weights from installed packages, never fetched; refusals in one sentence."""

import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import graphsplit as gs
from graphsplit import named_models
from graphsplit.cli.root import app
from graphsplit.errors import LoadError

BERT = (
    "hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=50, "
    "max_position_embeddings=12, bos_token_id=1, eos_token_id=2, pad_token_id=0"
)
GPT2 = "n_embd=16, n_layer=1, n_head=2, n_positions=8, vocab_size=50, bos_token_id=1, eos_token_id=2"
T5 = "d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2, vocab_size=50"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError("something connects to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def refused(spec: str, *words: str, **options: Any) -> LoadError:
    """Return the error, whose text must hold the words; it has a hint, and is one line."""
    with pytest.raises(LoadError) as caught:
        gs.load_model(spec, **options)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {str(caught.value)!r}"
    assert caught.value.hint and "\n" not in str(caught.value)
    return caught.value


# transformers

CASES = [
    (f"hf:bert({BERT})", "BertForMaskedLM", {"input_ids": (2, 12)}),
    (f"hf:BertForSequenceClassification({BERT})", "BertForSequenceClassification", {"input_ids": (2, 12)}),
    (f"hf:GPT2Config({GPT2})", "GPT2LMHeadModel", {"input_ids": (2, 8)}),
    (f"hf:t5({T5})", "T5ForConditionalGeneration", {"input_ids": (2, 16), "decoder_input_ids": (2, 16)}),
    (
        "hf:vit(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, "
        "image_size=16, patch_size=8, num_channels=1)",
        "ViTForImageClassification",
        {"pixel_values": (2, 1, 16, 16)},
    ),
    (
        "hf:whisper(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, "
        "decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=50, num_mel_bins=8, "
        "max_source_positions=6, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)",
        "WhisperForConditionalGeneration",
        {"input_features": (2, 8, 12), "decoder_input_ids": (2, 16)},
    ),
    (
        "hf:wav2vec2(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, "
        "conv_dim=[8, 8], conv_kernel=[10, 3], conv_stride=[5, 2], vocab_size=20, "
        "num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)",
        "Wav2Vec2ForCTC",
        {"input_values": (2, 180)},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "kind", "shapes"), CASES, ids=[kind for _, kind, _ in CASES])
def test_hf_names_are_built_and_divided(spec: str, kind: str, shapes: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    loaded = gs.load_model(spec)
    assert (type(loaded.model).__name__, loaded.name, loaded.origin) == (kind, kind, spec)
    tensors = {name: tuple(value.shape) for name, value in loaded.kwargs.items() if hasattr(value, "shape")}
    assert loaded.args == () and tensors == shapes
    assert loaded.model.training
    part = gs.partition(loaded.model, loaded.args, loaded.kwargs, k=2, outputs=loaded.outputs)
    assert max(part.plan.parameter_counts()) < 0.75 * part.plan.full_parameter_count()
    assert part.verify().ok


def test_the_weights_are_random_and_the_same_each_time() -> None:
    pytest.importorskip("transformers")
    state = torch.get_rng_state()
    first, second = (gs.load_model(f"hf:gpt2({GPT2})").model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(state, torch.get_rng_state())


def test_hidden_states_beside_the_result_are_left_out() -> None:
    pytest.importorskip("transformers")
    assert gs.load_model(f"hf:t5({T5})").outputs == ("logits",)
    assert gs.load_model(f"hf:bert({BERT})").outputs is None


def test_a_file_and_its_folder_and_its_architectures(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    config.architectures = ["BertForTokenClassification"]
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    for spec in (f"hf:{path}", f"hf:{tmp_path}"):
        loaded = gs.load_model(spec)
        assert type(loaded.model).__name__ == "BertForTokenClassification"
        assert loaded.model.config.hidden_size == 16
    small = gs.load_model(f"hf:{path}(hidden_size=8)", entry="BertForMaskedLM").model
    assert type(small).__name__ == "BertForMaskedLM" and small.config.hidden_size == 8
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "architectures": ["NoSuchClass"]}))
    assert type(gs.load_model(f"hf:{path}").model).__name__ == "BertForMaskedLM"


def test_given_inputs_come_in_place_of_made_ones() -> None:
    pytest.importorskip("transformers")
    loaded = gs.load_model(f"hf:gpt2({GPT2})", inputs=["input_ids=3x5:int64:50"])
    assert loaded.kwargs["input_ids"].shape == (3, 5) and loaded.kwargs["use_cache"] is False
    loaded = gs.load_model(f"hf:gpt2({GPT2})", inputs=["3x5:int64:50"])
    assert loaded.args[0].shape == (3, 5) and list(loaded.kwargs) == ["use_cache"]


def test_unknown_hf_names(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    refused("hf:bertt", "no model type or class 'bertt'", "did you mean hf:bert")
    refused("hf:bert-base-uncased", "did you mean hf:bert?", "nothing is downloaded")
    refused("hf:some-one/gpt2-tuned", "did you mean hf:gpt2?")
    refused("hf:GPT2LMHeadModell", "hf:GPT2LMHeadModel")
    refused("hf:no/such.json", "there is no file no/such.json")
    refused("hf:", "cannot read the name")
    refused("hf:bert(3)", "not all by name")
    refused("hf:bert(hidden_size=", "cannot read the name")
    refused("hf:bert(hidden_size=x)", "hidden_size of", "is no literal")
    refused("hf:bert(hidden=3)", "BertConfig has no option 'hidden'", "hidden_size")
    refused("hf:bert(hidden_size=30)", "cannot be built: ValueError")
    refused("hf:bert", "no model class 'BertMaskedLM'", "BertForMaskedLM", entry="BertMaskedLM")
    for text, words in (("{", "cannot read"), ("[]", "no model_type"), ('{"model_type": "berd"}', "berd")):
        path = tmp_path / "config.json"
        path.write_text(text)
        refused(f"hf:{path}", words)


def test_what_memory_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(named_models, "available_memory", lambda: 10_000)
    spec = f"hf:gpt2({GPT2})"
    refused(spec, "has weights of", "a smaller configuration", "graphsplit inspect")
    loaded = gs.load_model(spec, allow_meta=True)
    assert all(tensor.is_meta for tensor in (*loaded.model.parameters(), loaded.kwargs["input_ids"]))
    done = CliRunner().invoke(app, ["inspect", spec, "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["parameters"] == sum(p.numel() for p in loaded.model.parameters())
    done = CliRunner().invoke(app, ["partition", spec, "-o", "nowhere"])
    assert done.exit_code == 3 and "a smaller configuration" in done.stderr


def test_memory_is_known_on_linux() -> None:
    if not Path("/proc/meminfo").is_file():
        pytest.skip("no /proc/meminfo")
    free = named_models.available_memory()
    assert free is not None and free > 0


def test_the_hub_is_closed_while_a_model_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    from huggingface_hub import constants

    seen = []
    built = transformers.GPT2LMHeadModel.__init__

    def watch(self: Any, *args: Any, **kwargs: Any) -> None:
        seen.append((os.environ["HF_HUB_OFFLINE"], constants.HF_HUB_OFFLINE))
        built(self, *args, **kwargs)

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "__init__", watch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    gs.load_model(f"hf:gpt2({GPT2})")
    assert seen and set(seen) == {("1", True)}
    assert "HF_HUB_OFFLINE" not in os.environ and constants.HF_HUB_OFFLINE is False


def test_cli_partitions_a_name(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["partition", f"hf:gpt2({GPT2})", "-k", "2", "-o", str(out), "--json"])
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["origin"].startswith("hf:gpt2") and (out / "manifest.json").is_file()
    t5 = CliRunner().invoke(app, ["run", f"hf:t5({T5})", "partition(k=2) | merge", "--json"])
    assert t5.exit_code == 0, t5.stderr


# timm and torchvision, of which the tests need no more than these names


class Net(nn.Module):
    def __init__(self, channels: int = 3, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3)
        self.fc = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.fc(self.conv(x).relu().mean((-1, -2)))


class Video(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.conv(x).mean((-1, -2, -3))


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Stands for timm."""
    module = ModuleType("timm")

    def create_model(name: str, pretrained: bool = True, in_chans: int = 3, width: int = 8) -> nn.Module:
        assert name == "resnet18" and not pretrained
        net = Net(in_chans, width)
        net.pretrained_cfg = {"input_size": (3, 20, 24)}
        return net

    vars(module).update(list_models=lambda: ["resnet18", "resnet34"], create_model=create_model)
    monkeypatch.setitem(sys.modules, "timm", module)
    return module


def test_timm(timm: ModuleType) -> None:
    loaded = gs.load_model("timm:resnet18(width=6)")
    assert isinstance(loaded.model, Net) and loaded.model.conv.out_channels == 6
    assert [tuple(x.shape) for x in loaded.args] == [(2, 3, 20, 24)] and loaded.kwargs == {}
    assert gs.partition(loaded.model, loaded.args, k=2).verify().ok
    assert gs.load_model("timm:resnet18(in_chans=1)").args[0].shape == (2, 1, 20, 24)
    assert gs.load_model("timm:resnet18", inputs=["4x3x9x9"]).args[0].shape == (4, 3, 9, 9)
    refused("timm:resnet19", "timm has no model 'resnet19'", "did you mean resnet18")
    refused("timm:xyz", "list_models()")
    refused("timm:resnet18(pretrained=True)", "random weights", "nothing is downloaded")
    refused("timm:resnet18(depth=3)", "cannot be built: TypeError")
    refused("timm:resnet18", "--entry", entry="Net")


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Stands for torchvision, with one model of each kind."""
    package, models = ModuleType("torchvision"), ModuleType("torchvision.models")

    def plain(*, weights: Any = "default", width: int = 8) -> nn.Module:
        assert weights is None
        return Net(width=width)

    def segmenter(*, weights: Any = "default", weights_backbone: Any = "trained") -> nn.Module:
        assert weights is None and weights_backbone is None
        return Net()

    def video(*, weights: Any = "default") -> nn.Module:
        return Video()

    def detector(*, weights: Any = "default") -> nn.Module:
        raise AssertionError("is not built")

    families = {
        "resnet18": (plain, "resnet"), "fcn": (segmenter, "segmentation.fcn"),
        "r3d_18": (video, "video.resnet"), "ssd": (detector, "detection.ssd"),
    }  # fmt: skip
    for function, family in families.values():
        function.__module__ = f"torchvision.models.{family}"

    def get_model_weights(name: str) -> Any:
        if name == "fcn":
            raise ValueError("no weights")
        size: Any = (32, 40) if name == "r3d_18" else [48]
        return SimpleNamespace(
            DEFAULT=SimpleNamespace(transforms=SimpleNamespace(keywords={"crop_size": size}))
        )

    vars(models).update(
        list_models=lambda: list(families),
        get_model_builder=lambda name: families[name][0],
        get_model_weights=get_model_weights,
    )
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    return package


def test_torchvision(torchvision: ModuleType) -> None:
    loaded = gs.load_model("torchvision:resnet18(width=6)")
    assert isinstance(loaded.model, Net) and loaded.model.conv.out_channels == 6
    assert [tuple(x.shape) for x in loaded.args] == [(2, 3, 48, 48)]
    assert gs.partition(loaded.model, loaded.args, k=2).verify().ok
    assert gs.load_model("torchvision:fcn").args[0].shape == (2, 3, 224, 224)
    assert gs.load_model("torchvision:r3d_18").args[0].shape == (2, 3, 16, 32, 40)
    refused("torchvision:ssd", "lists of images", "write a file")
    refused("torchvision:resnet81", "torchvision has no model", "did you mean resnet18")
    refused("torchvision:resnet18(weights='DEFAULT')", "random weights")


# Packages that are not there


@pytest.mark.parametrize(
    ("spec", "package"),
    [("hf:bert", "transformers"), ("timm:resnet18", "timm"), ("torchvision:resnet18", "torchvision")],
)
def test_missing_packages_are_named(spec: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    refused(spec, f"the package {package}, which is not installed", f"install {package}")


def test_a_package_that_lacks_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "timm.py").write_text("import nothing_like_this\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    refused("timm:resnet18", "timm cannot be imported without nothing_like_this")


def test_the_file_and_the_attribute_come_as_before(tmp_path: Path) -> None:
    refused("hg:bert", "there is no module hg")
