"""What several commands share: their options, opening what the user names, and places to write to."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from graphsplit._api import Partition, partition
from graphsplit.bundle import MANIFEST, DepthBundle, PartitionBundle, Saved, load
from graphsplit.cli.console import Progress
from graphsplit.errors import BundleError, PartitionError
from graphsplit.loading import load_model
from graphsplit.program import Program


class Start(StrEnum):
    """Weights that sub-models start with."""

    slice = "slice"
    rescale = "rescale"
    fresh = "fresh"


class Who(StrEnum):
    """Which units go to which sub-model."""

    contiguous = "contiguous"
    interleaved = "interleaved"
    random = "random"
    cluster = "cluster"


def _set_verbose(ctx: typer.Context, wanted: bool) -> None:
    if ctx.obj is not None:
        ctx.obj.verbose = wanted


_MODEL_HELP = (
    "A Python file that defines `model` and `example_inputs`, package.module:attribute, or a name of an "
    "installed package with random weights: hf:CONFIG.json, hf:TYPE, hf:CLASS, timm:NAME, torchvision:NAME"
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help=f"{_MODEL_HELP}.", show_default=False)]
Target = Annotated[
    str, typer.Argument(metavar="MODEL|BUNDLE", help=f"{_MODEL_HELP}; or a bundle.", show_default=False)
]
OptionalK = Annotated[
    int | None,
    typer.Option("-k", metavar="K", help="Number of sub-models: 2 unless given; a bundle knows its own."),
]
Shares = Annotated[
    str | None,
    typer.Option("--shares", metavar="A,B,...", help="Relative sizes of the sub-models, such as 3,1."),
]
Strategy = Annotated[
    Who,
    typer.Option(
        "--strategy",
        help="Who goes where: neighbours together, in turn, by chance, or what weighs most together.",
    ),
]
Fit = Annotated[
    str | None,
    typer.Option(
        "--fit", metavar="BYTES", help="In place of -k: the smallest K whose sub-models train in 8GB, say."
    ),
]
Seed = Annotated[
    int, typer.Option("--seed", metavar="N", help="Of fresh weights, and of random and clustered units.")
]
Entry = Annotated[
    str | None, typer.Option("--entry", metavar="NAME", help="What gives the model, in place of `model`.")
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="[NAME=]SHAPE[:DTYPE]",
        help="An example input, such as 2x3x32x32 or ids=2x16:int64. Repeatable.",
    ),
]
Outputs = Annotated[
    list[str] | None,
    typer.Option("--keep-output", metavar="NAME", help="Keep only this output of the model. Repeatable."),
]
Out = Annotated[
    Path, typer.Option("-o", "--out", metavar="FOLDER", help="The bundle to write.", show_default=False)
]
Force = Annotated[bool, typer.Option("--force", help="Replace what an earlier run wrote.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print the report as JSON on stdout, and nothing else there.")
]
Verbose = Annotated[
    bool,
    typer.Option("-v", "--verbose", help="Show tracebacks of errors.", callback=_set_verbose, is_eager=True),
]


# What the user names


@dataclass(frozen=True)
class Asked:
    """A model or bundle as the user named it; ``allow_meta`` where weights are not needed."""

    target: str
    k: int | None = None
    entry: str | None = None
    inputs: Sequence[str] | None = None
    outputs: Sequence[str] | None = None
    allow_meta: bool = False

    @property
    def is_bundle(self) -> bool:
        """True for folders; all models are files or names."""
        return Path(self.target).is_dir()


@dataclass(frozen=True)
class Options:
    """How a model is divided, and what the sub-models start with."""

    shares: tuple[float, ...] | None = None
    strategy: Who = Who.contiguous
    fit: str | None = None
    init: Start = Start.slice
    seed: int = 0


def parse_shares(text: str | None) -> tuple[float, ...] | None:
    """The numbers of ``3,1``."""
    if text is None:
        return None
    try:
        return tuple(float(share) for share in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--shares {text}: expected numbers, such as 3,1") from None


@dataclass(frozen=True)
class Opened:
    """A division, of a model or from a bundle.

    Attributes:
        partition: The division.
        origin: Where it came from.
        states: State tensors of the sub-models where a bundle holds them, else None.
        example: The example inputs, where they are all by position or all by keyword.
    """

    partition: Partition
    origin: str
    states: list[Mapping[str, Tensor]] | None = None
    example: Any = None


def open_model(asked: Asked, progress: Progress, options: Options | None = None) -> Opened:
    """Load, trace and analyse a model."""
    options = options or Options()
    with progress.step("load"):
        loaded = load_model(
            asked.target, entry=asked.entry, inputs=asked.inputs or (), allow_meta=asked.allow_meta
        )
    with progress.step("trace and analyse"):
        divided = partition(
            loaded.model,
            loaded.args,
            loaded.kwargs,
            k=asked.k,
            shares=options.shares,
            strategy=options.strategy.value,
            fit=options.fit,
            init=options.init.value,
            seed=options.seed,
            outputs=asked.outputs or loaded.outputs,
        )
    example = None if loaded.args and loaded.kwargs else loaded.args or loaded.kwargs
    return Opened(divided, asked.target, example=example)


def open_either(asked: Asked, progress: Progress, options: Options | None = None) -> Opened:
    """The division of a bundle, or of a model."""
    if not asked.is_bundle:
        return open_model(asked, progress, options)
    if options not in (None, Options()):
        raise typer.BadParameter(
            "--shares, --strategy, --fit and --seed are for models; a bundle is divided already"
        )
    return open_partition(asked, read_any(asked, progress), progress)


def read_any(asked: Asked, progress: Progress) -> Saved:
    """What a bundle holds; options that are for models are refused."""
    if asked.entry or asked.inputs or asked.outputs:
        raise typer.BadParameter(
            "--entry, --input and --keep-output are for models; a bundle is traced already"
        )
    with progress.step("read"):
        return load(asked.target)


def open_partition(asked: Asked, bundle: Saved, progress: Progress) -> Opened:
    """The division that a bundle holds."""
    bundle = _as_partition(asked.target, bundle)
    if asked.k not in (None, bundle.plan.k):
        raise PartitionError(
            f"{asked.target} is for K = {bundle.plan.k}",
            hint=f"leave out -k, or partition the model for {asked.k}",
        )
    return open_bundle(bundle, asked.target, progress)


def read_bundle(path: str, progress: Progress) -> PartitionBundle:
    """A bundle that holds a partition."""
    return _as_partition(path, read_any(Asked(path), progress))


def _as_partition(path: str, bundle: Saved) -> PartitionBundle:
    if isinstance(bundle, PartitionBundle):
        return bundle
    what = "layer groups" if isinstance(bundle, DepthBundle) else "one program"
    raise BundleError(
        f"{path} holds {what} and no partition", hint="give a folder that `graphsplit partition` wrote"
    )


def open_bundle(bundle: PartitionBundle, path: str, progress: Progress) -> Opened:
    """The division that a bundle holds."""
    with progress.step("analyse"):
        divided = partition(bundle.source, plan=bundle.plan)
    return Opened(divided, path, [state_of(program) for program in bundle.submodels])


def state_of(program: Program) -> dict[str, Tensor]:
    """Every state tensor by name."""
    return {name: entry.tensor for name, entry in program.state.items()}


# Where results go


def refuse_taken(path: Path, *, force: bool) -> None:
    """Raise before a long run what would be raised at its end: the place for a bundle is taken."""
    _refuse_file(path)
    if path.is_dir() and any(path.iterdir()):
        if not (path / MANIFEST).is_file():
            raise BundleError(
                f"{path} is neither empty nor a graphsplit bundle, and is not replaced",
                hint="give another place",
            )
        if not force:
            raise BundleError(
                f"{path} is a bundle already", hint="give another place, or --force to replace it"
            )


def refuse_taken_onnx(path: Path, *, force: bool) -> None:
    """The same for a folder of ONNX files; only one that holds nothing else is ever replaced."""
    _refuse_file(path)
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    foreign = [name for name in names if not name.endswith((".onnx", ".onnx.data"))]
    if foreign:
        raise BundleError(f"{path} holds {foreign[0]}, and is not replaced", hint="give another place")
    if names and not force:
        raise BundleError(f"{path} is not empty", hint="give another place, or --force to replace it")


def _refuse_file(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise BundleError(f"{path} is a file, where a folder is to be made", hint="give another place")
    _check_reach(path)


def refuse_taken_file(path: Path, *, force: bool) -> None:
    """The same for a file."""
    if path.is_dir():
        raise BundleError(
            f"{path} is a folder, where a file is to be written", hint="give the name of a file"
        )
    if path.exists() and not force:
        raise BundleError(f"{path} exists already", hint="give another name, or --force to replace it")
    _check_reach(path)


def _check_reach(path: Path) -> None:
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise BundleError(f"{above} is a file, so {path} cannot be made in it", hint="give another place")
    if not os.access(above, os.W_OK):
        raise BundleError(f"{above} cannot be written to", hint="give another place")


@contextlib.contextmanager
def in_place_of(path: Path) -> Iterator[Path]:
    """A place beside ``path`` to write to, which takes its place when all went well and is gone when not."""
    beside = path.with_name(f".graphsplit-{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        if beside.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(beside, path)
    except OSError as error:
        raise BundleError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        with contextlib.suppress(OSError):
            beside.unlink()
