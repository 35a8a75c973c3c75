"""What several commands share: their options, opening what the user names, and places to write to."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from graphsplit.bundle import MANIFEST
from graphsplit.cli import console
from graphsplit.errors import BundleError, VerificationError
from graphsplit.verification import Certificate


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
NoVerify = Annotated[
    bool, typer.Option("--no-verify", help="Do not check that the pieces compute what they should.")
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


# Certificates


def check_to_write(
    certificate: Certificate, report: Callable[[], Mapping[str, Any]], *, as_json: bool
) -> None:
    """Where a certificate does not hold, show it, and raise, as nothing is to be written then."""
    if certificate.ok:
        return
    if as_json:
        console.json(report())
    else:
        console.certificate(certificate.to_data())
    raise VerificationError(
        "a check of the certificate failed, so nothing was written",
        hint="please report it with the model; --no-verify writes the bundle all the same",
    )


# Where results go


def written(folder: Path) -> dict[str, Any]:
    """The files of a folder with their sizes, for a report as JSON."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return {"path": str(folder), "files": sizes}


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
