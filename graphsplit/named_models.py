"""Models by their names in installed packages: ``hf:``, ``timm:`` and ``torchvision:``, with random weights.

``hf:`` takes a file ``config.json`` (or the folder that holds one), a model type (``bert``) or a class
(``GPT2LMHeadModel``); the others take what their packages list. Options follow in parentheses, as in
pipelines: ``hf:llama(num_hidden_layers=2)``. Nothing is ever downloaded.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import inspect
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphsplit.errors import LoadError, first_line

BATCH = 2
LENGTH = 16
SEED = 0

ROOM = 2
"""Copies of the weights that memory has to hold: the model's and those of its sub-models together."""

HEADS = (
    "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM", "CAUSAL_LM", "IMAGE_TEXT_TO_TEXT",
    "ZERO_SHOT_IMAGE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "CTC", "AUDIO_CLASSIFICATION",
    "VIDEO_CLASSIFICATION", "SEMANTIC_SEGMENTATION", "UNIVERSAL_SEGMENTATION", "OBJECT_DETECTION",
    "DEPTH_ESTIMATION", "VISUAL_QUESTION_ANSWERING", "SEQUENCE_CLASSIFICATION", "PRETRAINING",
)  # fmt: skip
"""Tasks of transformers in the order in which a model type is given a head."""

FOR_TRACING = {"apply_spec_augment": False, "layerdrop": 0.0, "use_pretrained_backbone": False}
"""Options of transformers that draw in NumPy or would fetch weights; set where neither file nor name does."""

INTERNAL = re.compile(
    r"hidden_state|past_key_values|attentions|_embeds|_model_output|extract_features|pooler_output|_cache"
)
"""Outputs of transformers that are the inside of a model: kept, their units would be shared by all parts."""

WEIGHT_OPTIONS = {"weights", "weights_backbone", "pretrained", "pretrained_cfg", "checkpoint_path"}
"""Options of timm and torchvision that ask for trained weights."""

PICTURE = (3, 224, 224)
FRAMES = 16

_NAME = re.compile(r"(?P<source>hf|timm|torchvision):(?P<name>[^()]*)(?P<options>\(.*\))?", re.DOTALL)
_NAME_HINT = "write hf:bert, hf:path/to/config.json, timm:resnet18 or torchvision:resnet18(num_classes=10)"


@dataclass(frozen=True)
class NamedModel:
    """A model of a package, with random weights.

    Attributes:
        model: The module, in train mode; on the meta device where memory does not hold it.
        args: Example inputs by position.
        kwargs: Example inputs by keyword, and settings of the call.
        outputs: What to keep of the outputs where nothing else is asked for; None for all.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[str, ...] | None = None


@dataclass(frozen=True)
class _Recipe:
    """How a model is made and called.

    Attributes:
        make: Makes the module.
        inputs: Gives example inputs for it.
        settings: Keywords of the call that are no tensors.
        leaves_out: True where outputs are named and some are the inside of the model.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], tuple[tuple[Tensor, ...], dict[str, Tensor]]]
    settings: Mapping[str, Any]
    leaves_out: bool = False


def is_name(spec: str) -> bool:
    """True where a spec names a model of a package."""
    return spec.partition(":")[0] in _RECIPES and ":" in spec


def build(
    spec: str,
    *,
    entry: str | None = None,
    given: tuple[tuple[Tensor, ...], dict[str, Tensor]] | None = None,
    allow_meta: bool = False,
) -> NamedModel:
    """Build a model from its name.

    Args:
        spec: ``hf:NAME``, ``timm:NAME`` or ``torchvision:NAME``, with options in parentheses.
        entry: The class to build from a configuration of transformers.
        given: Inputs in place of those that are made.
        allow_meta: Give a model without weights, on the meta device, where memory does not hold it.

    Raises:
        LoadError: The package, the name, an option or memory is lacking, or the package refuses to build it.
    """
    found = _NAME.fullmatch(spec)
    if found is None or not found["name"]:
        raise LoadError(f"cannot read the name {spec!r}", hint=_NAME_HINT)
    source, name = found["source"], found["name"]
    if entry is not None and source != "hf":
        raise LoadError(
            f"--entry chooses a class of transformers and means nothing for {source}:{name}",
            hint="leave it out",
        )
    with _offline():
        recipe = _RECIPES[source](name, _options(spec, found["options"]), entry)
        light = _on_meta(recipe)
        too_big = _too_big(spec, light)
        if too_big is not None and not allow_meta:
            raise too_big
        if too_big is not None and light is not None:
            model = light
        else:
            with _refusing(spec), torch.random.fork_rng(devices=[]):
                torch.manual_seed(SEED)
                model = recipe.make()
        args, kwargs = recipe.inputs(model) if given is None else given
        kwargs = {**recipe.settings, **kwargs}
        if model is light:
            args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        outputs = _results(model, args, kwargs) if recipe.leaves_out else None
    return NamedModel(model.train(), tuple(args), kwargs, outputs)


def _options(spec: str, text: str | None) -> dict[str, Any]:
    """The keywords between the parentheses of a name."""
    if text is None:
        return {}
    try:
        call = ast.parse(f"options{text}", mode="eval").body
    except SyntaxError:
        raise LoadError(f"cannot read the options of {spec!r}", hint=_NAME_HINT) from None
    if not isinstance(call, ast.Call) or call.args or any(word.arg is None for word in call.keywords):
        raise LoadError(f"the options of {spec!r} are not all by name", hint=_NAME_HINT)
    options = {}
    for word in call.keywords:
        try:
            options[str(word.arg)] = ast.literal_eval(word.value)
        except ValueError:
            raise LoadError(
                f"the option {word.arg} of {spec!r} is no literal",
                hint="write a number, True, False, None, a list, a dict or a string in quotes",
            ) from None
    return options


def _package(name: str, prefix: str) -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] != name:
            raise LoadError(
                f"{name} cannot be imported without {error.name}, which is not installed",
                hint=f"install {error.name}",
            ) from error
        raise LoadError(
            f"{prefix}: names need the package {name}, which is not installed",
            hint=f"install {name} in this environment",
        ) from error
    except ImportError as error:
        raise LoadError(
            f"{name} cannot be imported: {first_line(error)}", hint=f"install {name} anew"
        ) from error


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Close the ways by which packages fetch weights and configurations."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    constants = sys.modules.get("huggingface_hub.constants")
    was = getattr(constants, "HF_HUB_OFFLINE", None)
    if constants is not None:
        vars(constants)["HF_HUB_OFFLINE"] = True
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        if constants is not None:
            vars(constants)["HF_HUB_OFFLINE"] = was


@contextlib.contextmanager
def _refusing(spec: str) -> Iterator[None]:
    """What a package raises while it builds a model, in one sentence."""
    try:
        yield
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(
            f"{spec} cannot be built: {type(error).__name__}: {first_line(error)}",
            hint="change its options or its configuration",
        ) from error


# Memory


def _on_meta(recipe: _Recipe) -> nn.Module | None:
    """The model without weights; None where it needs values while it is built."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return recipe.make()
    except Exception:
        return None


def _too_big(spec: str, light: nn.Module | None) -> LoadError | None:
    """The refusal of a model that memory does not hold."""
    free = available_memory()
    if light is None or free is None:
        return None
    needed = sum(tensor.nbytes for tensor in {*light.parameters(), *light.buffers()})
    if ROOM * needed <= free:
        return None
    return LoadError(
        f"{spec} has weights of {needed / 1e9:.1f} GB, and to split it takes {ROOM} times as much memory, "
        f"of which {free / 1e9:.1f} GB are free",
        hint="choose a smaller configuration by options such as (num_hidden_layers=2), or a larger machine; "
        "`graphsplit inspect` needs no weights",
    )


def available_memory() -> int | None:
    """Bytes of main memory that a process can still take; None where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s*(\d+) kB$", text, re.MULTILINE)
    free = int(found[1]) * 1024 if found is not None else None
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        free = max(limit - used, 0) if free is None else min(free, max(limit - used, 0))
    return free


def _results(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names of the outputs that are results, where others show the inside of the model; None for all."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = model.eval()(*args, **kwargs)
    except Exception:  # the trace will say why, in its own words
        return None
    if not isinstance(found, Mapping):
        return None
    results = tuple(str(name) for name in found if not INTERNAL.search(str(name)))
    return results if results and len(results) < len(found) else None


# transformers


def _transformers(name: str, options: Mapping[str, Any], entry: str | None) -> _Recipe:
    package = _package("transformers", "hf")
    config, kind = _configured(package, name, dict(options))
    if entry is not None:
        kind = _architecture(package, entry)
    if kind is None:
        kind = _with_head(package, config)
    if kind is None:
        raise LoadError(
            f"transformers has no model for the configuration {type(config).__name__}",
            hint="name a class by --entry, such as --entry BertForMaskedLM",
        )
    chosen = kind
    parameters = inspect.signature(chosen.forward).parameters
    settings: dict[str, Any] = {}
    if "use_cache" in parameters:
        settings["use_cache"] = (
            False  # the cache is for generation; as an output it would hold heads together
        )
    elif hasattr(config, "use_cache"):
        config.use_cache = False

    def make() -> nn.Module:
        model: nn.Module = chosen(config)
        return model

    def inputs(model: nn.Module) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        return (), _inputs(model, config, list(parameters))

    return _Recipe(make, inputs, settings, leaves_out=True)


def _configured(package: ModuleType, name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """A configuration, and the class that its name or its file asks for."""
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        data = _read_config(path)
        kind = _config_class(package, str(data.get("model_type")), path)
        listed = data.get("architectures") or []
        built = _config(kind, {**FOR_TRACING, **data}, options, name)
        known = [getattr(package, text) for text in listed if _is_model(getattr(package, text, None))]
        return built, known[0] if known else None
    if name.endswith(".json") or path.parts[:1] in (("/",), (".",), ("..",)):
        raise LoadError(f"there is no file {path}", hint="give the path of a config.json of transformers")
    types = package.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    if name in types:
        return _config(_config_class(package, name, None), FOR_TRACING, options, name), None
    found: Any = getattr(package, name, None) if name.isidentifier() else None
    if isinstance(found, type) and issubclass(found, package.PreTrainedConfig):
        return _config(found, FOR_TRACING, options, name), None
    if _is_model(found):
        return _config(found.config_class, FOR_TRACING, options, name), found
    raise _unknown(package, name, list(types))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LoadError(f"cannot read {path}: {first_line(error)}", hint="is it a config.json?") from error
    if not isinstance(data, dict) or "model_type" not in data:
        raise LoadError(
            f"{path} has no model_type",
            hint="give a config.json as save_pretrained of transformers writes it",
        )
    return data


def _config_class(package: ModuleType, model_type: str, path: Path | None) -> Any:
    types = package.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    if model_type not in types:
        near = difflib.get_close_matches(model_type, types, n=3)
        raise LoadError(
            f"{path}: transformers {package.__version__} knows no model type {model_type!r}",
            hint=f"did you mean {', '.join(near)}?" if near else "a newer transformers may know it",
        )
    with _refusing(f"hf:{model_type}"):
        return package.CONFIG_MAPPING[model_type]


def _config(kind: Any, data: Mapping[str, Any], options: dict[str, Any], name: str) -> Any:
    with _refusing(f"hf:{name}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        default = kind()
        foreign = [option for option in options if not hasattr(default, option)]
        if foreign:
            near = difflib.get_close_matches(foreign[0], vars(default), n=3)
            raise LoadError(
                f"{kind.__name__} has no option {foreign[0]!r}",
                hint=f"did you mean {', '.join(near)}?" if near else "see its documentation for the names",
            )
        known = {key: value for key, value in data.items() if key not in FOR_TRACING or hasattr(default, key)}
        return kind.from_dict({**known, **options})


def _is_model(value: Any) -> bool:
    """True for a class of models that knows its configuration."""
    return (
        isinstance(value, type)
        and issubclass(value, nn.Module)
        and bool(getattr(value, "config_class", None))
    )


def _architecture(package: ModuleType, name: str) -> Any:
    found = getattr(package, name, None) if name.isidentifier() else None
    if not _is_model(found):
        near = difflib.get_close_matches(name, dir(package), n=3)
        raise LoadError(
            f"transformers has no model class {name!r}",
            hint=f"did you mean {', '.join(near)}?" if near else "such as BertForMaskedLM",
        )
    return found


def _with_head(package: ModuleType, config: Any) -> Any:
    """The class for a configuration: the first task that has one, else the bare model."""
    mappings = [f"MODEL_FOR_{task}_MAPPING" for task in HEADS] + ["MODEL_MAPPING"]
    for name in mappings:
        mapping = getattr(package, name, {})
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, (tuple, list)) else found
    return None


def _unknown(package: ModuleType, name: str, types: Sequence[str]) -> LoadError:
    last = name.rpartition("/")[2].lower()
    near = sorted((kind for kind in types if last.startswith(kind)), key=len, reverse=True)[:1]
    near += difflib.get_close_matches(name, [*types, *dir(package)], n=3)
    near = [f"hf:{text}" for text in dict.fromkeys(near)]
    return LoadError(
        f"transformers {package.__version__} has no model type or class {name!r}, and there is no such file",
        hint=(f"did you mean {', '.join(near)}? " if near else "")
        + "nothing is downloaded: a model of the hub is named by a local copy of its config.json",
    )


def _inputs(model: nn.Module, config: Any, parameters: Sequence[str]) -> dict[str, Tensor]:
    """Inputs that a forward cannot do without, in the sizes of the model's configuration."""
    text = config.get_text_config()
    main = str(getattr(model, "main_input_name", "input_ids"))
    media = [key for key in vars(config) if re.fullmatch(r"(image|video|audio)_token_(id|index)", key)]
    makers: dict[str, Callable[[], Tensor]] = {
        "input_ids": lambda: _ids(config, text),
        "bbox": lambda: torch.zeros(BATCH, _length(text), 4, dtype=torch.long),
        "decoder_input_ids": lambda: _ids(config, text, seed=1),
        "pixel_values": lambda: _pixels(model, config),
        "pixel_values_videos": lambda: _pixels(model, config),
        "input_features": lambda: _features(config),
        "input_values": lambda: _waves(config),
    }
    wanted = [main]
    if main in ("input_ids", "inputs") and "input_ids" in parameters:
        wanted = ["input_ids"]
    if "bbox" in parameters:
        wanted.append("bbox")
    if main == "input_ids" and not media:
        wanted += [name for name in ("pixel_values", "input_features") if name in parameters]
    if main == "pixel_values" and "input_ids" in parameters:
        wanted.append("input_ids")
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        wanted.append("decoder_input_ids")
    lacking = [name for name in wanted if name not in makers or name not in parameters]
    if lacking:
        raise LoadError(
            f"no example input is made for {type(model).__name__}, whose main input is {lacking[0]}",
            hint=f"give it by --input, such as --input {lacking[0]}=2x16x8",
        )
    return {name: makers[name]() for name in wanted}


def _size(config: Any, *names: str, default: int) -> int:
    """The first size that a configuration has under one of these names, or its part for images or sound."""
    parts = [config, *(getattr(config, f"{part}_config", None) for part in ("vision", "audio", "encoder"))]
    for part in parts:
        for name in names:
            value = getattr(part, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
            if isinstance(value, (list, tuple)) and value and isinstance(value[0], int):
                return int(value[0])
    return default


def _length(text: Any) -> int:
    positions = getattr(text, "max_position_embeddings", None)
    return min(LENGTH, positions) if isinstance(positions, int) and positions > 1 else LENGTH


def _ids(config: Any, text: Any, seed: int = 0) -> Tensor:
    """Token ids, none of which stands for an image or a sound."""
    special = [
        value
        for key, value in vars(config).items()
        if re.fullmatch(r"(image|video|audio|vision).*_token_(id|index)", key) and isinstance(value, int)
    ]
    high = min([int(getattr(text, "vocab_size", 2)), *(value for value in special if value > 1)])
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(high, (BATCH, _length(text)), generator=generator)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED))


def _pixels(model: nn.Module, config: Any) -> Tensor:
    size = _size(config, "image_size", "input_size", "crop_size", default=PICTURE[-1])
    shape = [_size(config, "num_channels", "in_channels", "in_chans", default=PICTURE[0]), size, size]
    frames = _size(config, "num_frames", "frames_per_clip", default=0)
    video = frames > 0 and "Video" in type(model).__name__
    return _normal(BATCH, frames, *shape) if video else _normal(BATCH, *shape)


def _features(config: Any) -> Tensor:
    """Mel spectra: ``[N, bins, time]`` of a fixed length in Whisper's family, else ``[N, time, bins]``."""
    bins = _size(config, "num_mel_bins", "input_feat_per_channel", "feature_size", "input_dim", default=80)
    positions = getattr(config, "max_source_positions", None)
    if isinstance(positions, int) and hasattr(config, "num_mel_bins"):
        return _normal(BATCH, bins, 2 * positions)
    return _normal(BATCH, 8 * LENGTH, bins)


def _waves(config: Any) -> Tensor:
    """Sound as samples, long enough for ``LENGTH`` frames, or as spectra ``[N, time, bins]``."""
    strides = getattr(config, "conv_stride", None)
    if strides is None and hasattr(config, "num_mel_bins"):
        return _normal(BATCH, _size(config, "max_length", default=1024), config.num_mel_bins)
    return _normal(BATCH, (LENGTH + 2) * math.prod(strides) if strides else 16000)


# timm and torchvision


def _timm(name: str, options: Mapping[str, Any], entry: str | None) -> _Recipe:
    package = _package("timm", "timm")
    _refuse_weights("timm", name, options)
    known = package.list_models()
    if name.partition(".")[0] not in known:
        raise _no_such("timm", name, known)

    def make() -> nn.Module:
        model: nn.Module = package.create_model(name.partition(".")[0], pretrained=False, **options)
        return model

    def inputs(model: nn.Module) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        settings = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
        channels, height, width = settings.get("input_size") or PICTURE
        side = options.get("img_size", (height, width))
        height, width = side if isinstance(side, (tuple, list)) else (side, side)
        return (_normal(BATCH, int(options.get("in_chans", channels)), int(height), int(width)),), {}

    return _Recipe(make, inputs, {})


def _torchvision(name: str, options: Mapping[str, Any], entry: str | None) -> _Recipe:
    package = _package("torchvision", "torchvision")
    _refuse_weights("torchvision", name, options)
    models = importlib.import_module("torchvision.models")
    known = models.list_models()
    if name not in known:
        raise _no_such("torchvision", name, known)
    builder = models.get_model_builder(name)
    family = str(builder.__module__).removeprefix(f"{package.__name__}.models.").partition(".")[0]
    if family == "detection":
        raise LoadError(
            f"torchvision:{name} takes lists of images of several sizes, which is no input of a graph",
            hint="write a file with a `model` that takes a batch of images, and its `example_inputs`",
        )
    without = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        without["weights_backbone"] = None

    def make() -> nn.Module:
        model: nn.Module = builder(**without, **options)
        return model

    def inputs(model: nn.Module) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        channels, height, width = PICTURE
        side = _crop(models, name) or (height, width)
        if family == "video":
            return (_normal(BATCH, channels, FRAMES, *side),), {}
        pictures = 2 if family == "optical_flow" else 1
        return tuple(_normal(BATCH, channels, *side) for _ in range(pictures)), {}

    return _Recipe(make, inputs, {})


def _crop(models: ModuleType, name: str) -> tuple[int, int] | None:
    """Height and width of the pictures that a model was trained on, where torchvision says so."""
    try:
        transforms = models.get_model_weights(name).DEFAULT.transforms
    except (AttributeError, ValueError):
        return None
    size = getattr(transforms, "keywords", {}).get("crop_size")
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[-1])) if isinstance(size, (tuple, list)) and size else None


def _refuse_weights(source: str, name: str, options: Mapping[str, Any]) -> None:
    asked = sorted(WEIGHT_OPTIONS & options.keys())
    if asked:
        raise LoadError(
            f"{source}:{name} is built with random weights, so {asked[0]} cannot be given",
            hint="nothing is downloaded: load trained weights in a file of your own that defines `model`",
        )


def _no_such(source: str, name: str, known: Sequence[str]) -> LoadError:
    near = difflib.get_close_matches(name, known, n=3)
    return LoadError(
        f"{source} has no model {name!r}",
        hint=f"did you mean {', '.join(near)}?"
        if near
        else f"{source} lists {len(known)} names by list_models()",
    )


_RECIPES: dict[str, Callable[[str, Mapping[str, Any], str | None], _Recipe]] = {
    "hf": _transformers,
    "timm": _timm,
    "torchvision": _torchvision,
}
