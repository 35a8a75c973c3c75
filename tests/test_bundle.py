"""Bundles: exact round trips, all or nothing on writing, and one sentence for what is wrong on reading."""

import dataclasses
import errno
import functools
import hashlib
import json
import os
import pickle
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import prune

import graphsplit as gs
from graphsplit.bundle import PartitionBundle, load, program_of, save, without_weights
from graphsplit.bundle import folder as bundle_folder
from graphsplit.bundle import reader as bundle_reader
from graphsplit.emission import ProgramModule, emit
from graphsplit.errors import BundleError
from graphsplit.program import Program, StateEntry
from zoo import call_of, traced

MODELS = ("mlp", "resnet_basic", "gpt", "auxiliary_head", "dataclass_output", "lifted_constant", "hub_bert")
CERTIFICATE = {
    "ok": True,
    "dtype": "float64",
    "max_error": 3.5e-16,
    "rows": [{"name": "output", "error": 0.0}],
}


@functools.cache
def partitioned() -> PartitionBundle:
    part = gs.partition(traced("mlp"), k=2)
    return PartitionBundle(
        source=part.program,
        plan=part.plan,
        submodels=part.programs,
        merged=part.merged_program(),
        certificate=CERTIFICATE,
        files={"submodel_0.onnx": b"onnx 0", "submodel_0.onnx.data": b"weights"},
    )


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def assert_same(found: Program, expected: Program) -> None:
    assert str(found) == str(expected)
    assert found.signature == expected.signature
    assert (found.notes, found.names) == (expected.notes, expected.names)
    assert list(found.state) == list(expected.state)
    for ours, theirs in zip(found.state.values(), expected.state.values(), strict=True):
        assert dataclasses.replace(ours, tensor=theirs.tensor) == theirs
        assert ours.requires_grad == theirs.requires_grad
        torch.testing.assert_close(ours.tensor, theirs.tensor.detach(), rtol=0, atol=0, equal_nan=True)


def assert_same_outputs(found: ProgramModule, expected: ProgramModule, name: str) -> None:
    args, kwargs = call_of(name)
    torch.manual_seed(0)
    theirs = expected(*args, **kwargs)
    torch.manual_seed(0)
    ours = found(*args, **kwargs)
    assert type(ours) is type(theirs)
    for one, other in zip(*(torch.utils._pytree.tree_leaves(value) for value in (ours, theirs)), strict=True):
        assert torch.equal(one, other) if isinstance(other, Tensor) else one == other


# -- round trips ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_program_comes_back(name: str, tmp_path: Path) -> None:
    save(traced(name), tmp_path / "b")
    found = load(tmp_path / "b")
    assert isinstance(found, Program)
    assert_same(found, traced(name))
    assert_same_outputs(emit(found).eval(), emit(traced(name)).eval(), name)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_module_comes_back(name: str, training: bool, tmp_path: Path) -> None:
    module = emit(traced(name)).train(training)
    save(module, tmp_path / "b")
    found = load(tmp_path / "b")
    assert isinstance(found, ProgramModule)
    assert found.training is training
    assert found.program_name == module.program_name
    ours, theirs = found.state_dict(), module.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [key for key, _ in found.named_parameters()] == [key for key, _ in module.named_parameters()]
    assert_same_outputs(found, module, name)


def test_a_partition_comes_back(tmp_path: Path) -> None:
    expected = partitioned()
    save(expected, tmp_path / "b")
    found = load(tmp_path / "b")
    assert isinstance(found, PartitionBundle)
    assert found.plan == expected.plan
    assert found.certificate == CERTIFICATE
    programs = zip(
        (found.source, found.merged, *found.submodels),
        (expected.source, expected.merged, *expected.submodels),
        strict=True,
    )
    for ours, theirs in programs:
        assert ours is not None and theirs is not None
        assert_same(ours, theirs)
    assert {name: Path(str(path)).read_bytes() for name, path in found.files.items()} == expected.files


def test_submodels_that_were_saved_in_training_can_be_trained_on(tmp_path: Path) -> None:
    part = gs.partition(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)), torch.zeros(2, 3))
    part.submodels[0].get_parameter("0.bias").requires_grad_(False)
    gs.save(part, tmp_path / "out")
    again = gs.load(tmp_path / "out")
    assert isinstance(again, gs.Partition)
    frozen = [[name for name, p in m.named_parameters() if not p.requires_grad] for m in again.submodels]
    assert frozen == [["0.bias"], []]


def test_a_partition_needs_neither_weights_nor_a_merged_model(tmp_path: Path) -> None:
    given = dataclasses.replace(
        partitioned(),
        source=without_weights(partitioned().source),
        merged=None,
        certificate=None,
        files={},
    )
    save(given, tmp_path / "b")
    assert "source.safetensors" not in content(tmp_path / "b")
    found = load(tmp_path / "b")
    assert isinstance(found, PartitionBundle)
    assert found.merged is None and found.certificate is None and not found.files
    assert all(entry.tensor.is_meta for entry in found.source.state.values())
    assert str(found.source) == str(given.source)


def test_without_weights_keeps_constants(tmp_path: Path) -> None:
    program = without_weights(traced("lifted_constant"))
    kinds = {entry.kind: entry.tensor.is_meta for entry in program.state.values()}
    assert kinds == {"parameter": True, "constant": False}
    save(program, tmp_path / "b")
    found = load(tmp_path / "b")
    assert isinstance(found, Program)
    for name, entry in program.state.items():
        ours = found.state[name].tensor
        assert ours.is_meta if entry.tensor.is_meta else torch.equal(ours, entry.tensor)
        assert found.state[name].requires_grad == entry.requires_grad


def test_a_model_on_the_meta_device_is_saved_without_weights(tmp_path: Path) -> None:
    with torch.device("meta"):
        program = gs.trace(nn.Linear(3, 4), torch.zeros(2, 3))
    save(program, tmp_path / "b")
    assert sorted(content(tmp_path / "b")) == ["manifest.json", "program.graph.json"]
    found = load(tmp_path / "b")
    assert isinstance(found, Program)
    assert all(entry.tensor.is_meta for entry in found.state.values())


def test_a_further_file_may_be_given_by_its_place(tmp_path: Path) -> None:
    (tmp_path / "somewhere.onnx").write_bytes(b"onnx")
    given = dataclasses.replace(partitioned(), files={"merged.onnx": tmp_path / "somewhere.onnx"})
    save(given, tmp_path / "b")
    found = load(tmp_path / "b")
    assert isinstance(found, PartitionBundle)
    assert found.files["merged.onnx"] == tmp_path / "b" / "merged.onnx"
    save(found, tmp_path / "b")  # the file stands in the very folder that is replaced
    assert (tmp_path / "b" / "merged.onnx").read_bytes() == b"onnx"


@pytest.mark.parametrize("obj", [lambda: traced("hub_bert"), lambda: emit(traced("gpt")), partitioned])
def test_the_same_object_gives_the_same_bytes(obj: Callable[[], Any], tmp_path: Path) -> None:
    save(obj(), tmp_path / "one")
    save(obj(), tmp_path / "two")
    assert content(tmp_path / "one") == content(tmp_path / "two")
    save(load(tmp_path / "one"), tmp_path / "three")
    assert content(tmp_path / "three") == content(tmp_path / "one")


def test_certificates_may_hold_what_json_cannot(tmp_path: Path) -> None:
    save(dataclasses.replace(partitioned(), certificate={"max_error": float("inf")}), tmp_path / "b")
    found = load(tmp_path / "b")
    assert isinstance(found, PartitionBundle)
    assert found.certificate == {"max_error": float("inf")}


# -- tensors -------------------------------------------------------------------------------------------------


def with_tensors(**tensors: Tensor) -> Program:
    """A program that holds further buffers, which its graph does not read."""
    state = dict(traced("mlp").state) | {
        name: StateEntry(name, "buffer", value) for name, value in tensors.items()
    }
    return dataclasses.replace(traced("mlp"), state=state)


def reloaded(program: Program, path: Path) -> dict[str, Tensor]:
    save(program, path)
    found = load(path)
    assert isinstance(found, Program)
    return {name: entry.tensor for name, entry in found.state.items()}


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16,
    torch.complex64, torch.complex128,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (4, 3)])
def test_dtypes_and_shapes_survive(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    real = torch.randint(0, 2, shape).to(torch.float64) + 0.25
    tensor = torch.complex(real, -real).to(dtype) if dtype.is_complex else real.to(dtype)
    found = reloaded(with_tensors(extra=tensor), tmp_path / "b")["extra"]
    assert found.dtype == dtype and found.shape == tensor.shape
    assert (
        found.cpu().view(torch.uint8).equal(tensor.view(torch.uint8)) if shape else torch.equal(found, tensor)
    )


def test_views_and_shared_memory_survive(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    views = {
        "base": base,
        "whole": base.view(24),
        "transposed": base.T,
        "columns": base[:, 1:4],
        "backwards": torch.complex(base, base).conj(),
        "negative": torch.complex(base, base).conj().imag,
        "repeated": torch.ones(1).expand(5),
        "images": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    found = reloaded(with_tensors(**views), tmp_path / "b")
    for name, view in views.items():
        assert torch.equal(found[name], view), name
        assert found[name].stride() == view.clone().stride(), name


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    program = traced("gpt")
    tied = {entry.name: entry.aliases for entry in program.state.values() if entry.aliases}
    assert tied
    save(emit(program), tmp_path / "b")
    stored = load_file(tmp_path / "b" / "program.safetensors")
    for name, aliases in tied.items():
        assert len(stored.keys() & {name, *aliases}) == 1
    module = load(tmp_path / "b")
    assert isinstance(module, ProgramModule)
    names = dict(module.named_parameters(remove_duplicate=False))
    for name, aliases in tied.items():
        assert all(names[alias] is names[name] for alias in aliases)


def test_loaded_tensors_do_not_hang_on_the_files(tmp_path: Path) -> None:
    found = reloaded(traced("mlp"), tmp_path / "b")
    before = {name: tensor.detach().clone() for name, tensor in found.items()}
    weights = tmp_path / "b" / "program.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    shutil.rmtree(tmp_path / "b")
    assert all(torch.equal(found[name], before[name]) for name in before)


def test_tensors_are_put_where_they_are_wanted(tmp_path: Path) -> None:
    save(traced("mlp"), tmp_path / "b")
    found = load(tmp_path / "b", device="meta")
    assert isinstance(found, Program)
    assert all(entry.tensor.is_meta for entry in found.state.values())


def test_trained_and_frozen_parameters_of_a_module_are_kept(tmp_path: Path) -> None:
    module = emit(traced("mlp"))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    next(module.parameters()).requires_grad_(False)
    save(module, tmp_path / "b")
    found = load(tmp_path / "b")
    assert isinstance(found, ProgramModule)
    for ours, theirs in zip(found.parameters(), module.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.requires_grad == theirs.requires_grad


def test_a_module_that_lost_a_tensor_is_refused(tmp_path: Path) -> None:
    module = emit(traced("mlp"))
    name, _ = next(module.named_parameters())
    owner = module.get_submodule(name.rpartition(".")[0])
    prune.random_unstructured(owner, name.rpartition(".")[2], amount=0.5)
    with pytest.raises(BundleError, match=rf"no longer holds the tensor {name}, .*pruning masks"):
        save(module, tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_program_of_a_module_is_its_program() -> None:
    program = traced("resnet_basic")
    found = program_of(emit(program))
    assert str(found) == str(program)
    assert found.state.keys() == program.state.keys()
    assert all(found.state[name].persistent == entry.persistent for name, entry in program.state.items())
    assert found.names == program.names


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(2, 2).to_sparse(),
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8),
        lambda: torch.ones(2).as_subclass(type("Special", (Tensor,), {})),
    ],
    ids=["sparse", "quantized", "subclass"],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_tensors_without_a_written_form_are_refused_by_name(
    make: Callable[[], Tensor], tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=r"the state extra is no plain dense tensor"):
        save(with_tensors(extra=make()), tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_dtypes_that_safetensors_does_not_know_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        BundleError, match=r"the state extra is of torch.bits8, which safetensors cannot write"
    ):
        save(with_tensors(extra=torch.zeros(2, dtype=torch.uint8).view(torch.bits8)), tmp_path / "b")


# -- the place -----------------------------------------------------------------------------------------------


def test_folders_on_the_way_are_made(tmp_path: Path) -> None:
    save(traced("mlp"), tmp_path / "a" / "b" / "c")
    load(tmp_path / "a" / "b" / "c")


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save(traced("mlp"), tmp_path / "b")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "b").iterdir()} == {0o640}


@pytest.mark.parametrize(
    "prepare", [lambda b: b.mkdir(), lambda b: save(traced("gpt"), b)], ids=["empty", "bundle"]
)
def test_an_empty_folder_and_a_bundle_are_replaced(prepare: Callable[[Path], None], tmp_path: Path) -> None:
    prepare(tmp_path / "b")
    save(partitioned(), tmp_path / "b")
    assert isinstance(load(tmp_path / "b"), PartitionBundle)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_link_to_a_bundle_stays_a_link(tmp_path: Path) -> None:
    save(traced("mlp"), tmp_path / "b")
    (tmp_path / "link").symlink_to("b")
    save(traced("gpt"), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_same(load(tmp_path / "b"), traced("gpt"))  # type: ignore[arg-type]


def foreign(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")


def foreign_manifest(folder: Path) -> None:
    folder.mkdir()
    (folder / "manifest.json").write_text('{"name": "a web app"}')


def bundle_with_a_stranger(folder: Path) -> None:
    save(traced("mlp"), folder)
    (folder / "thesis.tex").write_text("years of work")


def bundle_with_a_folder(folder: Path) -> None:
    save(traced("mlp"), folder)
    (folder / "program.graph.json").unlink()
    (folder / "program.graph.json").mkdir()


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda path: path.write_text("years of work"), "is a file, where a folder is to be made"),
        (foreign, "is neither empty nor a graphsplit bundle"),
        (foreign_manifest, "is neither empty nor a graphsplit bundle"),
        (bundle_with_a_stranger, "holds thesis.tex, which is no part of the bundle"),
        (bundle_with_a_folder, "holds program.graph.json, which is no part of the bundle"),
    ],
    ids=["file", "folder", "manifest", "stranger", "subfolder"],
)
def test_nothing_foreign_is_replaced(
    prepare: Callable[[Path], Any], reason: str, overwrite: bool, tmp_path: Path
) -> None:
    prepare(tmp_path / "b")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BundleError, match=reason):
        save(traced("mlp"), tmp_path / "b", overwrite=overwrite)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bundle_is_kept_where_that_is_asked_for(tmp_path: Path) -> None:
    save(traced("mlp"), tmp_path / "b")
    before = content(tmp_path / "b")
    with pytest.raises(BundleError, match=r"is a bundle already"):
        save(traced("gpt"), tmp_path / "b", overwrite=False)
    assert content(tmp_path / "b") == before


def test_the_working_directory_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError, match=r"holds the working directory"):
        save(traced("mlp"), ".")
    assert tmp_path.exists()


def test_a_place_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match=r"cannot be written: (Not a directory|File exists)"):
        save(traced("mlp"), tmp_path / "file" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "obj", [nn.Linear(2, 2), {"weight": torch.zeros(1)}, None], ids=lambda obj: type(obj).__name__
)
def test_other_objects_are_refused(obj: Any, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=rf"a {type(obj).__name__} cannot be saved as a bundle"):
        save(obj, tmp_path / "b")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name",
    [
        "../x.onnx",
        "a/b.onnx",
        "/x.onnx",
        "",
        ".",
        "..",
        ".hidden",
        "manifest.json",
        "PLAN.json",
        "a\\b",
        "a\n",
    ],
)
def test_names_of_further_files_are_plain(name: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"a file of a bundle cannot be called"):
        save(dataclasses.replace(partitioned(), files={name: b""}), tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_a_further_file_that_is_missing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"cannot be written: No such file"):
        save(dataclasses.replace(partitioned(), files={"a.onnx": tmp_path / "nowhere"}), tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_a_plan_for_another_number_of_sub_models_is_refused(tmp_path: Path) -> None:
    given = dataclasses.replace(partitioned(), submodels=partitioned().submodels[:1])
    with pytest.raises(BundleError, match=r"1 sub-models for a plan of 2"):
        save(given, tmp_path / "b")


# -- interrupted ---------------------------------------------------------------------------------------------


def failing(function: Callable[..., Any], error: BaseException, after: int) -> Callable[..., Any]:
    """A writer that does half of its work and then fails, at the call after so many."""
    calls = 0

    def fail(path: Path, *rest: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls <= after:
            return function(path, *rest)
        if rest:
            path.write_bytes(b"half")
        raise error

    return fail


FAILURES: list[BaseException] = [
    OSError(errno.ENOSPC, "No space left on device"),
    KeyboardInterrupt(),
    MemoryError(),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    ("writer", "after"),
    [
        ("_write_bytes", 0),
        ("_write_bytes", 3),
        ("_write_tensors", 0),
        ("_write_tensors", 2),
        ("_sync", 0),
        ("_sync", 5),
    ],
)
@pytest.mark.parametrize("present", [True, False])
def test_an_interrupted_write_leaves_nothing(
    present: bool,
    writer: str,
    after: int,
    error: BaseException,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = tmp_path / "new" / "b"
    if present:
        save(traced("gpt"), place)
    before = sorted(tmp_path.rglob("*"))
    bytes_before = content(place) if present else None
    monkeypatch.setattr(bundle_folder, writer, failing(getattr(bundle_folder, writer), error, after))
    with pytest.raises(BundleError if isinstance(error, OSError) else type(error)):
        save(partitioned(), place)
    monkeypatch.undo()
    assert sorted(tmp_path.rglob("*")) == before
    if present:
        assert content(place) == bytes_before
        load(place)


def test_a_folder_that_appears_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = bundle_folder._write_tensors

    def slow(path: Path, tensors: Any) -> None:
        write(path, tensors)
        foreign(tmp_path / "b")

    monkeypatch.setattr(bundle_folder, "_write_tensors", slow)
    with pytest.raises(BundleError, match=r"is neither empty nor a graphsplit bundle"):
        save(traced("mlp"), tmp_path / "b")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "b", tmp_path / "b" / "thesis.tex"]


def test_a_full_disk_is_said_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_folder, "_write_bytes", failing(bundle_folder._write_bytes, FAILURES[0], 0))
    with pytest.raises(BundleError, match=r"the bundle .* cannot be written: No space left on device$"):
        save(traced("mlp"), tmp_path / "b")


@pytest.mark.parametrize(
    "error", [OSError(errno.EBUSY, "busy"), KeyboardInterrupt()], ids=["error", "interrupt"]
)
@pytest.mark.parametrize("at", [1, 2])
def test_an_interrupted_exchange_keeps_the_old_bundle(
    at: int, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(traced("gpt"), tmp_path / "b")
    before = content(tmp_path / "b")
    rename, calls = Path.rename, 0

    def fail(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises((BundleError, KeyboardInterrupt)):
        save(partitioned(), tmp_path / "b")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert content(tmp_path / "b") == before


def test_every_file_is_forced_to_disk_before_the_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, rename = bundle_folder._sync, Path.rename

    def noted_sync(path: Path) -> None:
        events.append(path.name)
        sync(path)

    def noted_rename(path: Path, to: Path) -> Path:
        events.append("rename")
        return rename(path, to)

    monkeypatch.setattr(bundle_folder, "_sync", noted_sync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    save(traced("mlp"), tmp_path / "b")
    first = events.index("rename")
    assert set(content(tmp_path / "b")) < set(events[:first])
    assert events[first + 1 :] == [tmp_path.name]


# -- damage --------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(partitioned(), tmp_path / "b")
    return tmp_path / "b"


def refusal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The one sentence with which a bundle is refused, before any of its files but the manifest is parsed."""

    def parse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("parsed before it was checked")

    monkeypatch.setattr(bundle_reader, "program_from_data", parse)
    monkeypatch.setattr(bundle_reader, "safe_open", parse)
    monkeypatch.setattr(gs.PartitionPlan, "from_json", parse)
    with pytest.raises(BundleError) as caught:
        load(folder)
    text = str(caught.value)
    assert "\n" not in text and str(folder) in text
    return text


def resealed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest so that it fits its own digest."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["digest"]
    change(manifest)
    (folder / "manifest.json").write_bytes(bundle_folder.sealed(manifest))


FILES = (
    "manifest.json", "plan.json", "source.graph.json", "source.safetensors", "submodel_0.graph.json",
    "submodel_1.safetensors", "merged.graph.json", "merged.safetensors", "submodel_0.onnx",
    "submodel_0.onnx.data",
)  # fmt: skip


def test_the_files_are_the_expected_ones(saved: Path) -> None:
    assert set(FILES) < set(content(saved))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 1.0])
def test_a_flipped_bit_is_found(
    saved: Path, name: str, place: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray((saved / name).read_bytes())
    data[int(place * (len(data) - 1))] ^= 4
    (saved / name).write_bytes(data)
    assert str(saved / name) in refusal(saved, monkeypatch)


def test_any_flipped_bit_of_the_manifest_is_found(saved: Path) -> None:
    path = saved / "manifest.json"
    data = path.read_bytes()
    for position in range(0, len(data), 3):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(BundleError, match=r"manifest.json"):
            load(saved)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, 1, -1])
def test_a_truncated_file_is_found(
    saved: Path, name: str, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (saved / name).write_bytes((saved / name).read_bytes()[:keep])
    message = refusal(saved, monkeypatch)
    assert str(saved / name) in message
    assert "damaged" in message if name == "manifest.json" else "is truncated" in message


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_grew_is_found(saved: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (saved / name).write_bytes((saved / name).read_bytes() + b" ")
    assert str(saved / name) in refusal(saved, monkeypatch)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(saved: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (saved / name).unlink()
    message = refusal(saved, monkeypatch)
    assert name in message
    assert ("has no manifest.json" if name == "manifest.json" else "is missing") in message


@pytest.mark.parametrize("name", FILES[1:])
def test_a_file_of_another_bundle_is_found(saved: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = (saved / name).read_bytes()
    (saved / name).write_bytes(bytes(reversed(original)))
    assert "its content is not what the manifest says" in refusal(saved, monkeypatch)


def test_a_link_in_place_of_a_file_is_found(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (saved / "plan.json").rename(tmp_path / "plan.json")
    (saved / "plan.json").symlink_to(tmp_path / "plan.json")
    assert "plan.json is no ordinary file" in refusal(saved, monkeypatch)


def test_a_newer_format_is_named(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved / "manifest.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    assert "is of format 2, and this graphsplit reads formats up to 1" in refusal(saved, monkeypatch)


@pytest.mark.parametrize("version", [0, -1, True, "1", 1.0, None])
def test_a_format_that_never_was_is_refused(
    saved: Path, version: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    resealed(saved, lambda manifest: manifest.update(version=version))
    assert "its format version is" in refusal(saved, monkeypatch)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is no JSON"),
        ("not JSON", "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
        ("\x80", "it is no JSON"),
        ('{"format": "graphsplit-bundle", "version": 1, "x": NaN}', "is damaged"),
        ("[]", "is not the manifest of a graphsplit bundle"),
        ('{"format": "other", "version": 1}', "is not the manifest of a graphsplit bundle"),
        ('{"format": "graphsplit-bundle", "version": 1}', "does not match its own digest"),
    ],
)
def test_a_manifest_that_is_none_is_refused(
    saved: Path, text: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (saved / "manifest.json").write_text(text, encoding="latin-1")
    assert reason in refusal(saved, monkeypatch)


def test_other_places_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    foreign(tmp_path / "folder")
    for name, reason in (
        ("nowhere", "there is no bundle at"),
        ("file", "is a file, and a bundle is a folder"),
        ("folder", "is no graphsplit bundle: it has no manifest.json"),
    ):
        with pytest.raises(BundleError, match=reason):
            load(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/b", "..", ".", "", "a\\..\\b", "C:x", "x\x00y"]
)
def test_paths_out_of_the_folder_are_refused(
    saved: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_text("secret")
    row = {"size": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    resealed(saved, lambda manifest: manifest["files"].update({name: row}))
    assert f"names the file {name!r}, which no bundle can hold" in refusal(saved, monkeypatch)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.pop("files"), "'files' is missing"),
        (lambda m: m.update(files=[]), "is damaged"),
        (lambda m: m.update(kind="virus"), "is of the kind 'virus'"),
        (lambda m: m.pop("kind"), "'kind' is missing"),
        (lambda m: m["files"].pop("plan.json"), "it names no digest for 'plan.json'"),
        (lambda m: m.update(plan="../plan.json"), "it names no digest for '../plan.json'"),
        (lambda m: m.update(plan=["plan.json"]), "is damaged"),
        (lambda m: m.update(submodels=[]), "is for 2 sub-models, the bundle has 0"),
        (lambda m: m.update(plan="source.graph.json"), "source.graph.json: not a plan"),
        (lambda m: m["source"].update(graph="plan.json"), "plan.json is damaged: "),
        (lambda m: m["source"].update(weights="plan.json"), "plan.json is damaged: "),
        (lambda m: m["source"].update(weights="submodel_0.safetensors"), "source.graph.json: the state"),
        (lambda m: m["source"].update(weights=None), "its tensor is missing"),
        (lambda m: m.update(extra=["nowhere.onnx"]), "it names no digest for 'nowhere.onnx'"),
        (lambda m: m["files"]["plan.json"].update(sha256=7), "is damaged"),
        (lambda m: m["files"]["plan.json"].update(size="7"), "which no bundle can hold"),
        (lambda m: m.update(certificate={"$code": 1}), "$code is no known kind of value"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_manifest_that_makes_no_sense_is_refused(saved: Path, change: Any, reason: str) -> None:
    resealed(saved, change)
    with pytest.raises(BundleError) as caught:
        load(saved)
    assert reason in str(caught.value) and str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_torch_is_named_where_an_operator_is_missing(tmp_path: Path) -> None:
    save(traced("mlp"), tmp_path / "b")
    graph = tmp_path / "b" / "program.graph.json"
    graph.write_text(graph.read_text().replace("aten.linear.default", "aten.linear.gone"))
    row = {"size": graph.stat().st_size, "sha256": hashlib.sha256(graph.read_bytes()).hexdigest()}
    resealed(tmp_path / "b", lambda manifest: manifest["files"].update({graph.name: row}))
    with pytest.raises(
        BundleError, match=r"program.graph.json: node .* calls aten.linear.gone, which is not"
    ):
        load(tmp_path / "b")


def test_files_that_the_manifest_does_not_name_are_not_read(saved: Path) -> None:
    (saved / "README.md").write_text("ours")
    load(saved)


# -- no pickle -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("obj", [lambda: traced("hub_bert"), lambda: emit(traced("gpt")), partitioned])
def test_nothing_is_pickled(obj: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = obj()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("pickle was used")

    for owner, name in (
        (torch, "load"), (torch, "save"), (pickle, "load"), (pickle, "loads"), (pickle, "dump"),
        (pickle, "dumps"), (pickle, "Unpickler"), (pickle, "Pickler"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, refuse)
    save(given, tmp_path / "b")
    load(tmp_path / "b")
    for name, data in content(tmp_path / "b").items():
        assert not data.startswith((b"\x80", b"PK", b"\x1f\x8b")), name
        if name.endswith(".json"):
            json.loads(data)
