"""`load_model`: a Python file, or a name in a package, as a module and the inputs to call it with.

Names are ``package.module:attribute``, or those of `graphsplit.named_models`: ``hf:bert``, ``timm:resnet18``.

The file defines ``model`` (a module, or a class or function without arguments that gives one) and
``example_inputs`` (a tensor, a tuple by position, a dict by keyword, or a function without arguments that
gives one of them).
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.util
import inspect
import itertools
import re
import sys
import sysconfig
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from graphsplit import named_models
from graphsplit.errors import InputError, LoadError, UserCodeError
from graphsplit.signature import as_call

MODEL = "model"
EXAMPLE_INPUTS = "example_inputs"

INTEGER_BOUND = 2
"""Integer inputs are 0 or 1 unless a spec says otherwise: indices that nearly every table holds."""

_PREFIX = "_graphsplit_"
_counter = itertools.count()
_folders: set[Path] = set()
_SPEC = re.compile(r"(?:(?P<name>\w+)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?(?::(?P<bound>\d+))?")
_DOTTED = re.compile(r"(?P<module>[^\W\d]\w*(?:\.[^\W\d]\w*)*)(?::(?P<attribute>\w+))?")


@dataclass(frozen=True)
class Loaded:
    """A model, ready to be traced.

    Attributes:
        model: The user's module, in the mode in which it was made.
        args: Example inputs by position.
        kwargs: Example inputs by keyword.
        name: A short name: of the file, or of the attribute where it is not ``model``.
        origin: Where the model came from: ``path/to/file.py:attribute``, ``package.module:attribute``, or its
            name in a package.
        outputs: What to keep of the outputs where nothing else is asked for; None for all of them.
        module: The user's file or module, where there is one.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str
    origin: str
    outputs: tuple[str, ...] | None = None
    module: ModuleType | None = None

    def defined(self, name: str) -> Any:
        """What else the file defines under a name, or None; a function without arguments is called."""
        return _defined(self.module, self.origin, name)

    def function(self, name: str) -> Defined | None:
        """A function of outputs and targets that the file defines, or None.

        It can be sent to other processes.

        Raises:
            LoadError: It is none.
        """
        value = self.defined(name)
        if value is None or self.module is None:
            return None
        if not callable(value):
            raise LoadError(
                f"`{name}` of {self.origin} is {_a(type(value).__name__)}, expected a function",
                hint="of outputs and targets, such as torch.nn.functional.cross_entropy",
            )
        file = self.module.__file__ if self.module.__name__.startswith(_PREFIX) else None
        return Defined(self.module.__name__, file, self.origin, name)

    @property
    def example(self) -> Any:
        """The inputs where all are by position or all by keyword, else None."""
        return None if self.args and self.kwargs else self.args or self.kwargs


@dataclass(frozen=True)
class Defined:
    """What a user's file or module defines under a name, to be called.

    Another process cannot import a file that is no module of a package, so that pickle fails on what is
    defined there. This is pickled as a place: a process to which it comes loads the file itself, once.

    Attributes:
        module: Name of the module in ``sys.modules``.
        file: Of the module; None for one that can be imported.
        origin: As of `Loaded`.
        name: Of the attribute.
    """

    module: str
    file: str | None
    origin: str
    name: str

    def __call__(self, *args: Any) -> Any:
        """Call it."""
        return _value_of(self)(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        """Load the file where this arrives: at a call it would run inside of what calls, such as a vmap."""
        return _arrived, (self.module, self.file, self.origin, self.name)


def _arrived(*place: Any) -> Defined:
    defined = Defined(*place)
    _value_of(defined)
    return defined


@functools.cache
def _value_of(defined: Defined) -> Any:
    module = sys.modules.get(defined.module)
    if module is None and defined.file is not None:
        module = _run_file(Path(defined.file), defined.module)
    return _defined(module or _import(defined.module), defined.origin, defined.name)


def _defined(module: ModuleType | None, origin: str, name: str) -> Any:
    """What a module defines under a name, or None; a function without arguments is called."""
    value = getattr(module, name, None)
    if inspect.isfunction(value) and not inspect.signature(value).parameters:
        with _users_code(origin, sys.argv):
            value = value()
    return value


def load_model(
    spec: str, *, entry: str | None = None, inputs: Sequence[str] = (), allow_meta: bool = False
) -> Loaded:
    """Load a model and its example inputs.

    A file is run under a name of its own, with its folder first on ``sys.path``; both stay, because classes
    are looked up, and modules imported, later too. What it prints goes to stderr.

    Args:
        spec: A path to a Python file, ``package.module:attribute``, or a name of an installed package with
            random weights: ``hf:`` (a config.json, a model type or a class), ``timm:``, ``torchvision:``.
        entry: The attribute that is the model, or gives it, in place of ``model``; for ``hf:`` the class.
        inputs: Example inputs in place of those of the file, each as ``[name=]SHAPE[:dtype[:bound]]``:
            ``2x3x32x32``, ``2x16:int64``, ``mask=2x16:bool``. See `make_input`.
        allow_meta: Give what memory does not hold on the meta device, without weights.

    Raises:
        LoadError: The file, the model or the inputs cannot be used.
        UserCodeError: (a `LoadError`) The user's code raised an exception.
    """
    if named_models.is_name(spec):
        given = make_inputs(inputs) if inputs else None
        named = named_models.build(spec, entry=entry, given=given, allow_meta=allow_meta)
        name = type(named.model).__name__
        return Loaded(named.model, named.args, named.kwargs, name, spec, named.outputs)
    attribute = None
    if spec.endswith(".py") or "/" in spec or (spec and Path(spec).exists()):
        module, place, name = _run_file(_checked_path(spec)), spec, Path(spec).stem
    else:
        dotted = _DOTTED.fullmatch(spec)
        if dotted is None:
            raise LoadError(f"cannot find {spec!r}", hint=_SPEC_HINT)
        module, place = _import(dotted["module"]), dotted["module"]
        attribute, name = dotted["attribute"], place.rpartition(".")[2]
    wanted = entry or attribute or MODEL
    model = _model(module, place, wanted, given=bool(entry or attribute))
    args, kwargs = make_inputs(inputs) if inputs else _example_inputs(module, place)
    name = name if wanted == MODEL else wanted
    return Loaded(model, args, kwargs, name, f"{place}:{wanted}", module=module)


_SPEC_HINT = "give the path of a Python file, package.module:attribute, or a name such as hf:bert"


# Running the user's code


def _checked_path(spec: str) -> Path:
    path = Path(spec)
    if path.is_dir():
        files = sorted(file.name for file in path.glob("*.py"))
        raise LoadError(
            f"{spec} is a folder",
            hint=f"give a Python file{f' in it: {_some(files)}' if files else '; it holds none'}",
        )
    before, colon, attribute = spec.rpartition(":")
    if not path.exists() and colon and before.endswith(".py"):
        raise LoadError(
            f"there is no file {spec}", hint=f"name the attribute apart: {before} --entry {attribute}"
        )
    if not path.exists():
        siblings = [str(file) for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(spec, siblings, n=3)
        raise LoadError(
            f"there is no file {spec}", hint=f"did you mean {_some(near)}?" if near else _SPEC_HINT
        )
    if path.suffix != ".py":
        raise LoadError(
            f"{spec} is no Python file",
            hint="weights alone are not enough: give a .py file that defines `model` and `example_inputs`",
        )
    return path.resolve()


def _run_file(path: Path, name: str | None = None) -> ModuleType:
    """The file as a module of its own; it stays in ``sys.modules``, where pickle and inspect look it up.

    A ``name`` is given where another process has loaded the file under it.
    """
    stem = re.sub(r"\W", "_", path.stem)
    name = name or f"{_PREFIX}{stem}_{next(_counter)}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise LoadError(f"Python cannot import {path}", hint="is its name unusual?")
    code = _compiled(path)
    module = importlib.util.module_from_spec(spec)
    _enter(path.parent)
    sys.modules[name] = module
    try:
        with _users_code(str(path), [str(path)]):
            exec(code, module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _compiled(path: Path) -> Any:
    try:
        return compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
    except OSError as error:
        raise LoadError(
            f"cannot read {path}: {error.strerror or error}", hint="check its permissions"
        ) from error
    except SyntaxError as error:
        raise _syntax_error(error, str(path)) from error
    except ValueError as error:
        raise LoadError(f"{path} is no Python source: {error}", hint="is it a text file?") from error


def _syntax_error(error: SyntaxError, place: str) -> UserCodeError:
    return UserCodeError(
        f"{type(error).__name__}: {error.msg}" + (f": `{error.text.strip()}`" if error.text else ""),
        traceback_text="".join(traceback.format_exception_only(error)),
        where=f"{error.filename or place}:{error.lineno or 0}",
        hint="correct the file",
    )


def _enter(folder: Path) -> None:
    """Put a folder first on ``sys.path``, and forget what its modules would otherwise be mistaken for.

    Those are the modules of the same name that came from the folder of a model loaded before.
    """
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        root = name.partition(".")[0]
        here = (folder / f"{root}.py").exists() or (folder / root).is_dir()
        if file and here and _inside(Path(file), _folders - {folder}) and not _inside(Path(file), {folder}):
            del sys.modules[name]
    _folders.add(folder)
    if str(folder) in sys.path:
        sys.path.remove(str(folder))
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()


def _inside(file: Path, folders: set[Path]) -> bool:
    return any(folder in file.parents for folder in folders)


def _import(name: str) -> ModuleType:
    """A module of a package that is installed, or lies in the working folder."""
    working = str(Path.cwd())
    if working not in sys.path and "" not in sys.path:
        sys.path.insert(0, working)
    importlib.invalidate_caches()
    try:
        with _users_code(name, sys.argv):
            return importlib.import_module(name)
    except UserCodeError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and cause.name and f"{name}.".startswith(f"{cause.name}."):
            raise LoadError(f"there is no module {cause.name}", hint=_SPEC_HINT) from cause
        raise


@contextlib.contextmanager
def _users_code(place: str, argv: list[str]) -> Iterator[None]:
    """Run code of the user: prints go to stderr, exceptions become `UserCodeError`."""
    before = sys.argv
    sys.argv = argv
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except SyntaxError as error:
        raise _syntax_error(error, place) from error
    except SystemExit as error:
        raise _user_error(
            error, f"{place} exits with {error.code!r} while it is loaded", _SCRIPT_HINT
        ) from error
    except Exception as error:
        text = textwrap.shorten(str(error), 500, placeholder=" …")
        message = f"{type(error).__name__}: {text}" if text else type(error).__name__
        raise _user_error(error, message, _hint(error)) from error
    finally:
        sys.argv = before


_SCRIPT_HINT = 'put what is only for running the file as a script under `if __name__ == "__main__":`'


def _hint(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"install {error.name.partition('.')[0]} in this environment, or put it beside the file"
    if isinstance(error, FileNotFoundError) and error.filename:
        return "a relative path starts at the working folder: build it from `Path(__file__).parent`"
    return "the error is in the user's code: see its traceback"


def _user_error(error: BaseException, message: str, hint: str) -> UserCodeError:
    report = traceback.TracebackException.from_exception(error)
    _drop_our_frames(report)
    return UserCodeError(
        message, traceback_text="".join(report.format()), where=_deepest(report.stack), hint=hint
    )


def _drop_our_frames(report: traceback.TracebackException) -> None:
    kept = [frame for frame in report.stack if frame.filename != __file__ and "<frozen" not in frame.filename]
    report.stack = traceback.StackSummary.from_list(kept)
    for chained in (report.__cause__, report.__context__):
        if chained is not None:
            _drop_our_frames(chained)


def _deepest(stack: traceback.StackSummary) -> str | None:
    """``file:line`` of the innermost frame that is no library's."""
    paths = sysconfig.get_paths()
    libraries = tuple(f"{paths[key]}/" for key in ("stdlib", "platstdlib", "purelib", "platlib"))
    own = [frame for frame in stack if not frame.filename.startswith(libraries)] or list(stack)
    return f"{own[-1].filename}:{own[-1].lineno}" if own else None


# The model


def _model(module: ModuleType, place: str, wanted: str, *, given: bool) -> nn.Module:
    value = _attribute(module, place, wanted, given=given)
    made = value
    if not isinstance(value, nn.Module) and callable(value):
        _check_no_arguments(value, place, wanted)
        with _users_code(place, sys.argv):
            made = value()
    if isinstance(made, nn.Module):
        return made
    how = f"`{wanted}` of {place}" if made is value else f"`{wanted}()` of {place}"
    hint = f"let it be a module, or a function that gives one{_choices(module)}"
    if isinstance(made, Mapping) and all(isinstance(item, Tensor) for item in made.values()):
        hint = "a state dict holds weights only: build the module and load them into it"
    raise LoadError(f"{how} is {_a(type(made).__name__)}, expected a torch.nn.Module", hint=hint)


def _attribute(module: ModuleType, place: str, wanted: str, *, given: bool) -> Any:
    if hasattr(module, wanted):
        return getattr(module, wanted)
    near = difflib.get_close_matches(wanted, [name for name in vars(module) if not name.startswith("_")], n=3)
    if given and near:
        raise LoadError(f"{place} defines no `{wanted}`", hint=f"did you mean {_some(near)}?")
    choices = _choices(module)
    hint = f"name what gives the model by --entry{choices}" if choices else "define `model` in it"
    raise LoadError(f"{place} defines no `{wanted}`", hint=hint)


def _choices(module: ModuleType) -> str:
    """What in the user's module could be the model: modules, and classes and functions that it defines."""
    public = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    found = [f"{name} (module)" for name, value in public.items() if isinstance(value, nn.Module)]
    own = {
        name: value for name, value in public.items() if getattr(value, "__module__", "") == module.__name__
    }
    found += [f"{name} (class)" for name, value in own.items() if _is_module_class(value)]
    found += [
        f"{name} (function)"
        for name, value in own.items()
        if inspect.isfunction(value) and name != EXAMPLE_INPUTS
    ]
    return f": {_some(found, 8)}" if found else ""


def _module_of(value: Any) -> str | None:
    return getattr(value, "__module__", None)


def _is_module_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def _check_no_arguments(value: Callable[..., Any], place: str, name: str) -> None:
    """Refuse what cannot be called without arguments, naming those that it needs."""
    try:
        parameters = inspect.signature(value).parameters.values()
    except ValueError:
        return
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]
    if needed:
        kind = "class" if isinstance(value, type) else "function"
        raise LoadError(
            f"the {kind} `{name}` of {place} needs arguments: {', '.join(needed)}",
            hint=f"add a function that gives it, `def build(): return {name}(...)`, and name that by --entry",
        )


# Example inputs


def _example_inputs(module: ModuleType, place: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not hasattr(module, EXAMPLE_INPUTS):
        raise LoadError(
            f"{place} defines no `{EXAMPLE_INPUTS}`",
            hint="define it (a tensor, a tuple, or a dict by keyword), or give --input, such as 2x3x32x32",
        )
    value = getattr(module, EXAMPLE_INPUTS)
    if callable(value) and not isinstance(value, (Tensor, Mapping)):
        _check_no_arguments(value, place, EXAMPLE_INPUTS)
        with _users_code(place, sys.argv):
            value = value()
    try:
        args, kwargs = as_call(value, None) if value is not None else ((), {})
    except InputError as error:
        _refuse_inputs(place, value, error)
    if not args and not kwargs:
        _refuse_inputs(place, value, None)
    if not all(isinstance(key, str) for key in kwargs):
        raise LoadError(
            f"`{EXAMPLE_INPUTS}` of {place} is a dict with keys that are no names",
            hint="its keys are the names of forward's parameters",
        )
    return args, kwargs


def _refuse_inputs(place: str, value: Any, error: InputError | None) -> NoReturn:
    what = f"is {_a(type(value).__name__)}" if error or value is None else "is empty"
    raise LoadError(
        f"`{EXAMPLE_INPUTS}` of {place} {what}",
        hint="let it be a tensor, a tuple of positional arguments, or a dict of keyword arguments",
    ) from error


def make_inputs(specs: Sequence[str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs from their specs: in order by position, those with a name by keyword.

    Raises:
        LoadError: A spec cannot be read, or a name stands twice.
    """
    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    for seed, spec in enumerate(specs):
        name, tensor = make_input(spec, seed)
        if name is None:
            args.append(tensor)
        elif name in kwargs:
            raise LoadError(f"the input {name} is given twice", hint="give each keyword once")
        else:
            kwargs[name] = tensor
    return tuple(args), kwargs


def make_input(spec: str, seed: int = 0) -> tuple[str | None, Tensor]:
    """One example input.

    Args:
        spec: ``[name=]SHAPE[:dtype[:bound]]``. Floating-point inputs (``float32`` unless named) are normal;
            integer ones are drawn from 0 to ``bound - 1``, which is 0 or 1 unless a bound is given.
        seed: Of the random values.

    Returns:
        The keyword, or None for an input by position, and the tensor.

    Raises:
        LoadError: The spec cannot be read.
    """
    parts = _SPEC.fullmatch(spec)
    if parts is None:
        raise LoadError(f"cannot read the input {spec!r}", hint=_INPUT_HINT)
    shape = tuple(int(size) for size in parts["shape"].split("x"))
    if 0 in shape:
        raise LoadError(
            f"the input {spec!r} has a size of 0", hint="give at least one element, and two examples"
        )
    dtype = getattr(torch, parts["dtype"] or "float32", None)
    if not isinstance(dtype, torch.dtype):
        near = difflib.get_close_matches(parts["dtype"], _DTYPES, n=1)
        raise LoadError(
            f"the input {spec!r} has the unknown dtype {parts['dtype']}",
            hint=f"did you mean {near[0]}?" if near else f"use one of {', '.join(_DTYPES)}",
        )
    generator = torch.Generator().manual_seed(seed)
    try:
        return parts["name"], _filled(spec, shape, dtype, parts["bound"], generator)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise LoadError(f"cannot make the input {spec!r}: {reason}", hint=_INPUT_HINT) from error


_INPUT_HINT = "write [name=]SHAPE[:dtype[:bound]], such as 2x3x32x32, 2x16:int64 or ids=2x16:int64:1000"
_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def _filled(
    spec: str, shape: tuple[int, ...], dtype: torch.dtype, bound: str | None, generator: torch.Generator
) -> Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        if bound is not None:
            raise LoadError(f"the input {spec!r} has a bound, which only integers have", hint=_INPUT_HINT)
        wide = torch.complex64 if dtype.is_complex else torch.float32
        return torch.randn(shape, generator=generator, dtype=wide).to(dtype)
    high = int(bound) if bound is not None else INTEGER_BOUND
    largest = 2 if dtype is torch.bool else torch.iinfo(dtype).max
    if not 1 <= high <= largest:
        raise LoadError(f"the input {spec!r} has the bound {high}, expected 1 to {largest}", hint=_INPUT_HINT)
    return torch.randint(high, shape, generator=generator).to(dtype)


# Words


def _some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _a(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
