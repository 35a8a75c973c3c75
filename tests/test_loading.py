"""Loading a user's file: what it may define, and one sentence with a way out for all that can be wrong."""

import inspect
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import nn

from graphsplit.errors import LoadError, UserCodeError
from graphsplit.loading import Loaded, load_model, make_input

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.fc = nn.Linear(3, width)

    def forward(self, x):
        return self.fc(x)


"""
INPUTS = "example_inputs = torch.ones(2, 3)\n"
GOOD = f"{NET}model = Net()\n{INPUTS}"


@pytest.fixture(autouse=True)
def _same_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what loading does on purpose: modules and the import path that stay."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("_graphsplit_") or name in ("parts", "shop"):
            del sys.modules[name]


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Return a function that writes a file and gives its path."""

    def _write(text: str, name: str = "net.py") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))
        return str(path)

    return _write


def refused(spec: str, *words: str, entry: str | None = None, inputs: tuple[str, ...] = ()) -> LoadError:
    """Return the error, whose text must hold the words; it has a hint, and its message is one line."""
    with pytest.raises(LoadError) as caught:
        load_model(spec, entry=entry, inputs=inputs)
    error = caught.value
    for word in words:
        assert word in str(error), f"{word!r} is not in {str(error)!r}"
    assert error.hint and "\n" not in str(error)
    return error


# What a file may define


def test_a_module_and_a_tensor(write: Any) -> None:
    path = write(GOOD)
    loaded = load_model(path)
    assert isinstance(loaded, Loaded) and type(loaded.model).__name__ == "Net"
    assert torch.equal(loaded.args[0], torch.ones(2, 3)) and loaded.kwargs == {}
    assert (loaded.name, loaded.origin) == ("net", f"{path}:model")


@pytest.mark.parametrize(
    "definition",
    [
        "model = Net",
        "def model(): return Net()",
        "model = lambda width=5: Net(width)",
        "def model(*args): return Net()",
    ],
)
def test_a_class_or_a_function(write: Any, definition: str) -> None:
    assert isinstance(load_model(write(f"{NET}{definition}\n{INPUTS}")).model, nn.Module)


@pytest.mark.parametrize(
    ("definition", "positional", "keywords"),
    [
        ("torch.ones(2, 3)", 1, []),
        ("(torch.ones(2, 3), 2)", 2, []),
        ("[torch.ones(2, 3)]", 1, []),
        ("{'x': torch.ones(2, 3)}", 0, ["x"]),
        ("lambda: {'x': torch.ones(2, 3)}", 0, ["x"]),
        ("lambda: torch.ones(2, 3)", 1, []),
    ],
)
def test_example_inputs(write: Any, definition: str, positional: int, keywords: list[str]) -> None:
    loaded = load_model(write(f"{NET}model = Net()\nexample_inputs = {definition}\n"))
    assert len(loaded.args) == positional and list(loaded.kwargs) == keywords


def test_entry_names_another_attribute(write: Any) -> None:
    loaded = load_model(write(f"{GOOD}small = Net(1)\n"), entry="small")
    assert loaded.model.fc.out_features == 1
    assert loaded.name == "small" and loaded.origin.endswith("net.py:small")


def test_given_inputs_come_before_those_of_the_file(write: Any) -> None:
    loaded = load_model(write(GOOD), inputs=["5x3", "mask=5x7:bool"])
    assert loaded.args[0].shape == (5, 3)
    assert loaded.kwargs["mask"].dtype == torch.bool


def test_dotted_name(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(GOOD.replace("model = ", "net = "), "shop/nets.py")
    write("", "shop/__init__.py")
    monkeypatch.chdir(tmp_path)
    loaded = load_model("shop.nets:net")
    assert type(loaded.model).__module__ == "shop.nets"
    assert (loaded.name, loaded.origin) == ("net", "shop.nets:net")
    for name in ("shop.nets", "shop"):
        del sys.modules[name]


# How a file is run


def test_file_runs_as_python_would_run_it(write: Any, tmp_path: Path) -> None:
    write("width = 7\n", "parts.py")
    text = "import parts\nfrom pathlib import Path\nhere = Path(__file__)\nmodel = Net(parts.width)\n"
    loaded = load_model(write(f"{NET}{text}{INPUTS}"))
    assert loaded.model.fc.out_features == 7
    module = sys.modules[type(loaded.model).__module__]
    assert module.here == tmp_path / "net.py"


def test_classes_can_be_pickled_and_inspected(write: Any) -> None:
    model = load_model(write(GOOD)).model
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again.fc.weight, model.fc.weight)
    assert inspect.getsource(type(model)).startswith("class Net")


def test_functions_of_a_file_reach_other_processes(write: Any) -> None:
    path = write(f"{GOOD}loss = lambda a, b: a + b\nother = 3\n")
    loaded = load_model(path)
    assert loaded.module is not None and loaded.function("error") is None
    with pytest.raises(LoadError, match="is an int, expected a function"):
        loaded.function("other")
    sent = pickle.dumps(loaded.function("loss"))
    del sys.modules[loaded.module.__name__]  # as where it arrives
    assert pickle.loads(sent)(1, 2) == 3
    assert sys.modules[loaded.module.__name__].__file__ == path


def test_exceptions_come_back_from_other_processes(write: Any) -> None:
    error = refused(write("1 / 0\n"), "ZeroDivisionError")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(error, UserCodeError) and isinstance(again, UserCodeError)
    assert str(again) == str(error) and again.traceback_text == error.traceback_text


def test_two_files_of_one_name_stay_apart(write: Any) -> None:
    first = load_model(write(GOOD, "a/net.py")).model
    second = load_model(write(GOOD, "b/net.py")).model
    assert type(first) is not type(second)


def test_imports_of_one_name_stay_apart(write: Any) -> None:
    for folder, width in (("a", 5), ("b", 6)):
        write(f"width = {width}\n", f"{folder}/parts.py")
        text = f"{NET}import parts\nmodel = Net(parts.width)\n{INPUTS}"
        assert load_model(write(text, f"{folder}/net.py")).model.fc.out_features == width


def test_future_annotations_and_dataclasses(write: Any) -> None:
    text = """
    from __future__ import annotations
    from dataclasses import dataclass
    import torch
    from torch import nn

    @dataclass
    class Config:
        width: int = 4

    model = nn.Linear(3, Config().width)
    example_inputs = torch.ones(2, 3)
    """
    assert isinstance(load_model(write(text)).model, nn.Linear)


def test_prints_go_to_stderr_and_arguments_are_the_files_own(
    write: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["graphsplit", "partition", "-k", "2"])
    text = "import argparse\nargparse.ArgumentParser().parse_args()\nprint('hello')\n"
    load_model(write(f"{GOOD}{text}"))
    assert sys.argv == ["graphsplit", "partition", "-k", "2"]
    captured = capsys.readouterr()
    assert captured.out == "" and "hello" in captured.err


# Wrong paths


def test_no_such_file(write: Any, tmp_path: Path) -> None:
    path = write(GOOD)
    refused(path.replace("net.py", "nett.py"), "there is no file", f"did you mean {path}?")
    refused(str(tmp_path / "nowhere" / "model.py"), "there is no file", "give the path of a Python file")


def test_attribute_behind_the_path(write: Any) -> None:
    path = write(GOOD)
    refused(f"{path}:net", "there is no file", f"{path} --entry net")


def test_folder(write: Any, tmp_path: Path) -> None:
    refused(str(tmp_path), "is a folder", "give a Python file")
    write(GOOD)
    refused(str(tmp_path), "is a folder", "net.py")


def test_no_python_file(write: Any) -> None:
    refused(write("", "weights.pt"), "is no Python file", "weights alone are not enough")


def test_not_text(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_bytes(b"\x00\x80\xff")
    refused(str(path), "net.py")


def test_nothing_like_a_path_or_a_name() -> None:
    refused("what is this", "cannot find 'what is this'", "package.module:attribute")
    refused("", "cannot find ''")


def test_no_such_module() -> None:
    refused(
        "no_such_package.nets:net", "there is no module no_such_package", "give the path of a Python file"
    )


# Wrong models


def test_no_model(write: Any) -> None:
    rest = (
        "def build(): return Net()\ndef example_inputs(): return torch.ones(2)\nfull = Net()\n_hidden = 1\n"
    )
    error = refused(write(f"{NET}{rest}"), "defines no `model`", "--entry")
    assert error.hint is not None
    assert error.hint.endswith(": full (module), Net (class), build (function)")


def test_no_model_and_nothing_instead(write: Any) -> None:
    refused(write("import torch\nfrom torch import nn\n"), "defines no `model`", "define `model` in it")


def test_no_such_entry(write: Any) -> None:
    path = write(f"{GOOD}teacher = Net()\n")
    refused(path, "defines no `techer`", "did you mean teacher?", entry="techer")
    refused(path, "defines no `zzz`", "teacher (module)", entry="zzz")


@pytest.mark.parametrize(
    ("definition", "words"),
    [
        ("3", "is an int, expected a torch.nn.Module"),
        ("None", "is a NoneType"),
        ("Net().state_dict()", "a state dict holds weights only"),
        ("lambda: 'net'", "`model()` of"),
        ("dict", "`model()` of"),
    ],
)
def test_no_module(write: Any, definition: str, words: str) -> None:
    refused(write(f"{NET}model = {definition}\n{INPUTS}"), words)


@pytest.mark.parametrize("kind", ["class", "function"])
def test_arguments_needed(write: Any, kind: str) -> None:
    text = "class model(Net):\n    def __init__(self, depth, *, width): super().__init__()\n"
    if kind == "function":
        text = "def model(depth, *, width): return Net()\n"
    refused(write(f"{NET}{text}{INPUTS}"), f"the {kind} `model`", "needs arguments: depth, width", "--entry")


# Wrong inputs


def test_no_inputs(write: Any) -> None:
    path = write(f"{NET}model = Net()\n")
    refused(path, "defines no `example_inputs`", "--input")
    assert load_model(path, inputs=["2x3"]).args[0].shape == (2, 3)


@pytest.mark.parametrize(
    ("definition", "words"),
    [
        ("3", "is an int"),
        ("None", "is a NoneType"),
        ("()", "is empty"),
        ("{}", "is empty"),
        ("{1: torch.ones(2)}", "keys that are no names"),
        ("lambda batch: torch.ones(batch)", "needs arguments: batch"),
    ],
)
def test_bad_inputs(write: Any, definition: str, words: str) -> None:
    refused(write(f"{NET}model = Net()\nexample_inputs = {definition}\n"), "`example_inputs`", words)


@pytest.mark.parametrize(
    ("spec", "name", "shape", "dtype"),
    [
        ("2x3x32x32", None, (2, 3, 32, 32), torch.float32),
        ("7", None, (7,), torch.float32),
        ("2x16:int64", None, (2, 16), torch.int64),
        ("2x16:int64:100", None, (2, 16), torch.int64),
        ("ids=2x10:int32", "ids", (2, 10), torch.int32),
        ("2x3:float64", None, (2, 3), torch.float64),
        ("2x3:bfloat16", None, (2, 3), torch.bfloat16),
        ("2x3:complex64", None, (2, 3), torch.complex64),
        ("mask=2x3:bool", "mask", (2, 3), torch.bool),
    ],
)
def test_input_spec(spec: str, name: str | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    got, tensor = make_input(spec)
    assert (got, tuple(tensor.shape), tensor.dtype) == (name, shape, dtype)
    assert torch.equal(tensor, make_input(spec)[1])


def test_input_values() -> None:
    assert set(make_input("1000:int64")[1].tolist()) == {0, 1}
    assert set(make_input("1000:int64:5")[1].tolist()) == {0, 1, 2, 3, 4}
    assert not torch.equal(make_input("9", 0)[1], make_input("9", 1)[1])


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("2x3x", "cannot read the input"),
        ("2,3", "cannot read the input"),
        ("", "cannot read the input"),
        ("2x0", "a size of 0"),
        ("2x3:int46", "did you mean int64?"),
        ("2x3:zzz", "use one of float32"),
        ("2x3:nn", "use one of float32"),
        ("2x3:float32:5", "which only integers have"),
        ("2x3:int64:0", "expected 1 to"),
        ("2x3:int8:1000", "expected 1 to 127"),
        ("999999999999x999999999999", "cannot make the input"),
    ],
)
def test_bad_input_spec(write: Any, spec: str, words: str) -> None:
    refused(write(GOOD), words, inputs=(spec,))


def test_input_given_twice(write: Any) -> None:
    refused(write(GOOD), "the input x is given twice", inputs=("x=2x3", "x=2x3"))


# Exceptions in the user's code


def test_syntax_error(write: Any) -> None:
    path = write("import torch\nmodel = (\n")
    error = refused(path, "SyntaxError", f"at {path}:2")
    assert isinstance(error, UserCodeError) and "model = (" in error.traceback_text


@pytest.mark.parametrize("place", ["file", "model", "inputs"])
def test_exception_is_the_users_own(write: Any, place: str) -> None:
    write("def fail():\n    raise KeyError('no\\nwidth')\n", "parts.py")
    lines = {
        "file": "parts.fail()",
        "model": "def model(): parts.fail()",
        "inputs": "def example_inputs(): parts.fail()",
    }
    text = f"{GOOD}import parts\n{lines[place]}\n"
    path = write(text)
    error = refused(path, "KeyError: 'no\\nwidth'", "parts.py:2")
    assert isinstance(error, UserCodeError)
    assert error.where == f"{Path(path).with_name('parts.py')}:2"
    assert "loading.py" not in error.traceback_text
    assert "net.py" in error.traceback_text and "parts.fail()" in error.traceback_text


def test_place_is_the_users_line_when_a_library_raises(write: Any) -> None:
    error = refused(
        write("import torch\nmodel = torch.nn.Linear(3, 4)\nmodel(torch.ones(2, 5))\n"), "RuntimeError"
    )
    assert error.where is not None and error.where.endswith("net.py:3")


def test_chained_exceptions_lose_our_frames_too(write: Any) -> None:
    text = "try:\n    {}['a']\nexcept KeyError as error:\n    raise ValueError('b') from error\n"
    error = refused(write(text), "ValueError: b")
    assert isinstance(error, UserCodeError)
    assert "KeyError: 'a'" in error.traceback_text and "loading.py" not in error.traceback_text


def test_long_message_is_shortened(write: Any) -> None:
    error = refused(write("raise ValueError('word ' * 1000)\n"), "ValueError: word word")
    assert len(error.message) < 600


def test_import_that_fails(write: Any) -> None:
    refused(write("import no_such_package.part\n"), "ModuleNotFoundError", "install no_such_package")


def test_file_that_is_missing(write: Any) -> None:
    refused(write("open('weights_of_nothing.pt')\n"), "FileNotFoundError", "Path(__file__).parent")


def test_exception_in_a_package(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("import no_such_package\n", "shop.py")
    monkeypatch.chdir(tmp_path)
    refused("shop:net", "ModuleNotFoundError", "install no_such_package", "shop.py:1")


@pytest.mark.parametrize("statement", ["import sys; sys.exit(2)", "raise SystemExit(2)"])
def test_exit(write: Any, statement: str) -> None:
    refused(write(f"{statement}\n"), "exits with 2", "__main__")


def test_interrupt_passes_through(write: Any) -> None:
    path = write("raise KeyboardInterrupt\n")
    before = set(sys.modules)
    with pytest.raises(KeyboardInterrupt):
        load_model(path)
    assert set(sys.modules) == before
