"""The layout of the repository, the import contract between its folders, and what wheel and sdist hold."""

import ast
import importlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKS = {"passes": "../passes", "cli": "../cli"}
# The only modules of the core that may look up: the public face reaches over all three folders.
PUBLIC_FACE = {
    Path("graphsplit/__init__.py"),
    Path("graphsplit/_api.py"),
    Path("graphsplit/_fuse.py"),
    Path("graphsplit/_layer_groups.py"),
    Path("graphsplit/_local_critics.py"),
    Path("graphsplit/_prune_units.py"),
    Path("graphsplit/_sparsify.py"),
    Path("graphsplit/_study.py"),
    Path("graphsplit/_synthetic_halves.py"),
    Path("graphsplit/_trials.py"),
}


# Layout


@pytest.mark.parametrize(("name", "target"), LINKS.items())
def test_folder_is_real_and_its_package_is_a_relative_link(name: str, target: str) -> None:
    assert (ROOT / name).is_dir() and not (ROOT / name).is_symlink()
    link = ROOT / "graphsplit" / name
    assert link.is_symlink(), f"{link} must be a link; set core.symlinks in git and check out again"
    assert link.readlink().as_posix() == target
    assert link.resolve() == ROOT / name


@pytest.mark.parametrize("name", LINKS)
def test_package_has_one_name(name: str) -> None:
    module = importlib.import_module(f"graphsplit.{name}")
    assert module.__name__ == f"graphsplit.{name}"
    assert module.__file__ is not None
    assert Path(module.__file__).resolve() == ROOT / name / "__init__.py"
    # Under the bare name nothing of ours has been loaded by anybody.
    bare = sys.modules.get(name)
    assert bare is None or not Path(bare.__file__ or "").resolve().is_relative_to(ROOT)


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for path in _modules(ROOT / "graphsplit") if path.name != "__init__.py"}
    for name in LINKS:
        folders |= {path.parent for path in _modules(ROOT / name) if path.name != "__init__.py"}
    missing = [str(folder) for folder in folders if not (folder / "__init__.py").is_file()]
    assert not missing, f"without __init__.py they would be left out of the wheel: {missing}"


def test_type_marker_is_there() -> None:
    assert (ROOT / "graphsplit" / "py.typed").is_file()


# Banned imports


def _ruff(source: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "ruff", "check", "--no-cache", "--config", str(ROOT / "pyproject.toml")),
            *("--select", "TID", "--output-format", "concise", "--stdin-filename", "snippet.py", "-"),
        ],
        input=source,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize(
    "statement", ["import {}", "import {}.x", "import {} as p", "from {} import x", "from {}.x import y"]
)
def test_ruff_refuses_the_bare_name(statement: str, name: str) -> None:
    result = _ruff(statement.format(name) + "\n")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "TID251" in result.stdout and f"graphsplit.{name}" in result.stdout


def test_ruff_refuses_relative_imports() -> None:
    result = _ruff("from . import graph\n")
    assert result.returncode == 1 and "TID252" in result.stdout


def test_ruff_accepts_the_public_names() -> None:
    result = _ruff(
        "import graphsplit.passes\nfrom graphsplit.cli import main\nfrom graphsplit import passes\n"
    )
    assert result.returncode == 0, result.stdout + result.stderr


# The import contract: cli -> passes -> graphsplit


def _modules(folder: Path) -> list[Path]:
    """All Python files under a real folder; what stands behind a link is not of the folder."""
    skipped = {folder / name for name in LINKS} if folder == ROOT / "graphsplit" else set()
    return sorted(path for path in folder.rglob("*.py") if not skipped & set(path.parents))


def _imports(source: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a module imports, wherever; a relative name keeps its dots."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield node.lineno, alias.name
            case ast.ImportFrom(module=module, names=names, level=level):
                base = "." * level + (module or "")
                for alias in names:
                    yield node.lineno, f"{base}.{alias.name}"
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def _breaches(source: str, *, forbidden: tuple[str, ...]) -> list[str]:
    """What in a module breaks the contract, a line each: relative, bare and forbidden imports."""
    found = []
    for line, name in _imports(source):
        if name.startswith("."):
            found.append(f"{line}: relative import of {name}")
        elif name.split(".")[0] in LINKS:
            found.append(f"{line}: {name}, which is imported as graphsplit.{name}")
        elif any(f"{name}.".startswith(f"{banned}.") for banned in forbidden):
            found.append(f"{line}: {name}")
    return found


def _breaches_in(paths: list[Path], *, forbidden: tuple[str, ...] = ()) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{breach}"
        for path in paths
        for breach in _breaches(path.read_text(encoding="utf-8"), forbidden=forbidden)
    ]


def test_core_imports_neither_passes_nor_cli() -> None:
    core = [path for path in _modules(ROOT / "graphsplit") if path.relative_to(ROOT) not in PUBLIC_FACE]
    breaches = _breaches_in(core, forbidden=("graphsplit.passes", "graphsplit.cli"))
    assert not breaches, "\n".join(["the core must not import what is built on it:", *breaches])


def test_passes_do_not_import_the_cli() -> None:
    breaches = _breaches_in(_modules(ROOT / "passes"), forbidden=("graphsplit.cli",))
    assert not breaches, "\n".join(["passes must not import the command line:", *breaches])


def test_imports_are_absolute_and_by_the_public_name() -> None:
    everywhere = [path for name in ("graphsplit", "passes", "cli") for path in _modules(ROOT / name)]
    breaches = _breaches_in(everywhere)
    assert not breaches, "\n".join(["import absolutely, from graphsplit:", *breaches])


@pytest.mark.parametrize(
    "source",
    [
        "import graphsplit.passes",
        "import graphsplit.passes.fuse as f",
        "from graphsplit import graph, passes",
        "from graphsplit.passes import Pipeline",
        "from graphsplit.passes.fuse import Fuse",
        "def f():\n    from graphsplit.passes import Pipeline",
        "if TYPE_CHECKING:\n    import graphsplit.passes",
        "importlib.import_module('graphsplit.passes')",
        "from . import graph",
        "from .passes import Pipeline",
        "from passes.fuse import Fuse",
        "import cli",
    ],
)
def test_contract_sees_a_breach(source: str) -> None:
    assert len(_breaches(source, forbidden=("graphsplit.passes",))) == 1


@pytest.mark.parametrize(
    "source",
    ["import graphsplit.passing", "from graphsplit import graph", "import torch.fx.passes", "import click"],
)
def test_contract_lets_the_nearest_neighbours_through(source: str) -> None:
    assert not _breaches(source, forbidden=("graphsplit.passes",))


# What is built


def _build(kind: str, source: Path, out: Path) -> Path:
    """The wheel or sdist of a source tree, built by the backend alone: no isolation, no network."""
    out.mkdir()
    script = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", script, str(out)], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.iterdir()
    return built


def _shipped() -> set[str]:
    """The files that an installation needs, by their path in site-packages."""
    files = {path.relative_to(ROOT).as_posix() for path in _modules(ROOT / "graphsplit")}
    for name in LINKS:
        files |= {f"graphsplit/{path.relative_to(ROOT).as_posix()}" for path in _modules(ROOT / name)}
    return files | {f"graphsplit/{name}" for name in ("py.typed", "drawing/page.css", "drawing/page.js")}


def _wheel_files(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


@pytest.mark.slow
def test_wheel_and_sdist_hold_all_modules(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, tree)
    for name in ("graphsplit", "passes", "cli", "tests"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))

    wheel = _build("wheel", tree, tmp_path / "wheel")
    assert _wheel_files(wheel) == _shipped()
    with zipfile.ZipFile(wheel) as archive:
        dist_info = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"
        assert f"{dist_info}/licenses/LICENSE" in archive.namelist()
        assert "graphsplit = graphsplit.cli:main" in archive.read(f"{dist_info}/entry_points.txt").decode()

    sdist = _build("sdist", tree, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    inside = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert _shipped() | {"pyproject.toml", "LICENSE", "CHANGELOG.md"} <= inside
    assert not {path for path in inside if path.split("/")[0] in {"passes", "cli", "tests"}}

    again = _build("wheel", unpacked, tmp_path / "again")
    assert again.name == wheel.name
    assert _wheel_files(again) == _shipped()
