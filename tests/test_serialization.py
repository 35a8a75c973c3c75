"""Programs as JSON data: exact round trips, and what is refused on the way out and on the way in."""

import copy
import json
import math
import operator
import subprocess
import sys
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import graphsplit as gs
from graphsplit.emission import emit
from graphsplit.errors import BundleError
from graphsplit.program import Dim, Program, Source, StateEntry, TensorMeta, op_name
from graphsplit.serialization import (
    FUNCTIONS,
    decode,
    encode,
    program_from_data,
    program_to_data,
    spec_from_data,
    spec_to_data,
)
from graphsplit.signature import Outputs, Signature
from zoo import call_of, traced

MODELS = (
    "mlp",  # the plainest
    "resnet_basic",  # buffers, the training flag
    "gpt",  # integer inputs, tied weights, symbolic sizes
    "auxiliary_head",  # two graphs with different outputs
    "efficientnet",  # two graphs
    "dataclass_output",
    "two_in_two_out",  # a dict
    "fpn",  # a list
    "nested_input",
    "optional_input",  # a constant among the inputs
    "lifted_constant",
    "tied_autoencoder",
    "mask_buffers",  # masked_fill with -inf
    "frozen_backbone",
    "shufflenet_v2",
    "hub_bert",  # a ModelOutput, inputs by keyword
)


def tensors_of(program: Program) -> dict[str, Tensor]:
    return {name: entry.tensor for name, entry in program.state.items()}


def through_json(program: Program) -> Program:
    data = json.loads(json.dumps(program_to_data(program), allow_nan=False))
    return program_from_data(data, tensors_of(program))


def damaged(program: Program, change: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(program_to_data(program)))
    change(data)
    return data


def outputs_of(program: Program, name: str, training: bool) -> tuple[list[Any], Any]:
    args, kwargs = call_of(name)
    torch.manual_seed(0)
    result = emit(program).train(training)(*args, **kwargs)
    leaves, spec = pytree.tree_flatten(result)
    return leaves, spec


def node_row(data: dict[str, Any], op: str = "call_function") -> dict[str, Any]:
    row: dict[str, Any] = next(row for row in data["graphs"][0] if row["op"] == op)
    return row


# -- round trips ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_program_is_the_same_after_a_round_trip(name: str) -> None:
    program = traced(name)
    back = through_json(program)
    assert str(back) == str(program)
    assert back.signature == program.signature
    assert (back.name, back.notes, back.names) == (program.name, program.notes, program.names)
    assert list(back.state) == list(program.state)
    for ours, theirs in zip(back.state.values(), program.state.values(), strict=True):
        assert replace(ours, tensor=theirs.tensor) == theirs
        assert ours.requires_grad == theirs.requires_grad
    for node, same in zip(back.nodes(), program.nodes(), strict=True):
        assert (node.op, node.name, op_name(node)) == (same.op, same.name, op_name(same))
        assert node.meta.get("value") == same.meta.get("value")
        assert node.meta.get("source") == same.meta.get("source")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_the_module_gives_the_same_bits_after_a_round_trip(name: str, training: bool) -> None:
    program = traced(name)
    expected, spec = outputs_of(program, name, training)
    found, found_spec = outputs_of(through_json(program), name, training)
    assert found_spec == spec
    for ours, theirs in zip(found, expected, strict=True):
        if isinstance(theirs, Tensor):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        else:
            assert ours == theirs


def test_sub_models_and_the_merged_model_survive() -> None:
    part = gs.partition(traced("shufflenet_v2"), k=2)
    for program in (*part.programs, part.merged_program()):
        assert str(through_json(program)) == str(program)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Program, "name graphs state signature notes names"),
        (Signature, "inputs input_names in_spec in_leaves outputs parameter_names defaults"),
        (Outputs, "spec leaves names"),
        (StateEntry, "name kind tensor persistent aliases"),
        (TensorMeta, "dims dtype device"),
        (Dim, "hint symbol"),
        (Source, "module file line code"),
    ],
)
def test_every_field_is_written(kind: Any, names: str) -> None:
    """A field that is new has to be written too; then add it here."""
    assert [item.name for item in fields(kind) if item.init] == names.split()


def test_the_data_says_the_same_twice() -> None:
    program = traced("hub_bert")
    text = json.dumps(program_to_data(program))
    assert json.dumps(program_to_data(program)) == text
    assert json.dumps(program_to_data(through_json(program))) == text


def test_strides_that_choose_the_kernel_are_kept() -> None:
    model = nn.Conv2d(4, 8, 3)
    model.weight = nn.Parameter(model.weight.to(memory_format=torch.channels_last))
    program = gs.trace(model, torch.randn(2, 4, 8, 8))
    data = program_to_data(program)
    back = program_from_data(data, {name: t.contiguous() for name, t in tensors_of(program).items()})
    assert back.state["weight"].tensor.stride() == model.weight.stride()
    assert torch.equal(back.state["weight"].tensor, model.weight)


def test_reading_leaves_the_given_tensors_as_they_are() -> None:
    program = traced("mlp")
    given = {name: tensor.detach().clone() for name, tensor in tensors_of(program).items()}
    back = program_from_data(program_to_data(program), given)
    assert all(entry.requires_grad for entry in back.state.values() if entry.kind == "parameter")
    assert not any(tensor.requires_grad for tensor in given.values())


def test_tensors_on_the_meta_device_come_back_there() -> None:
    with torch.device("meta"):
        program = gs.trace(nn.Linear(3, 4), torch.zeros(2, 3))
    back = program_from_data(program_to_data(program), {})
    assert all(entry.tensor.is_meta and entry.requires_grad for entry in back.state.values())
    assert str(back) == str(program)


# -- values --------------------------------------------------------------------------------------------------

VALUES = [
    None, True, 0, -3, 2**70, 0.1, 1e-320, -0.0, math.inf, -math.inf, 1 + 2j, complex(math.inf, 0), "",
    "$tuple", "ü\n", [], (), [1, (2.0, [None])], ((),), slice(None, 3, None), ..., {}, {"a": (1, 2)},
    {"$a": 1}, {1: "b", (2, 3): None}, torch.float32, torch.bfloat16, torch.device("cpu"),
    torch.device("cuda:1"), torch.strided, torch.sparse_csr, torch.channels_last, torch.preserve_format,
    Dim(3), Dim(2, "s0*2"), TensorMeta((Dim(2, "s0"), Dim(5)), torch.int64, "cuda:0"),
    (TensorMeta((), torch.bool), None),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_survive(value: Any) -> None:
    text = json.dumps(encode(value, "here"), allow_nan=False)
    back = decode(json.loads(text))
    assert back == value
    assert repr(back) == repr(value)  # -0.0 and True are not 0.0 and 1


def test_not_a_number_survives() -> None:
    assert math.isnan(decode(encode(math.nan, "here")))


def test_plain_data_is_written_as_it_is() -> None:
    plain = {"rows": [{"name": "a", "error": 1e-9}], "ok": True}
    assert encode(plain, "here") == plain


@pytest.mark.parametrize(
    "value", [object(), torch.zeros(1), {1, 2}, b"bytes", torch.ops.aten.add.Tensor, range(3)]
)
def test_what_has_no_written_form_is_refused_by_name(value: Any) -> None:
    with pytest.raises(
        BundleError, match=f"node relu holds a {type(value).__name__}, which has no written form"
    ):
        encode([1, value], "node relu")


# -- nesting -------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    x: Any
    y: Any


class Registered(NamedTuple):
    x: Any


pytree._register_namedtuple(Registered, serialized_type_name="test_serialization.Registered")


@dataclass
class Pair:
    left: Any
    right: Any = None


pytree.register_dataclass(Pair)

NESTED = [
    0,
    (1, [2, {"a": 3, "b": (4,)}]),
    (),
    {3: 1, (1, 2): 2, None: 3},
    OrderedDict(b=1, a=2),
    defaultdict(list, a=[1]),
    defaultdict(None, a=1),
    deque([1, 2], maxlen=4),
    Registered(1),
    Pair(1),
    torch.Size([1, 2]),
    torch.return_types.max((torch.ones(()), torch.ones(()))),
    [Pair(1, (2, 3))],
]


@pytest.mark.parametrize("value", NESTED, ids=repr)
def test_nesting_survives(value: Any) -> None:
    leaves, spec = pytree.tree_flatten(value)
    notes: list[str] = []
    back = spec_from_data(json.loads(json.dumps(spec_to_data(spec, "the outputs"))), notes, "an output")
    assert back == spec
    assert pytree.tree_unflatten(leaves, back) == value
    assert not notes


def test_a_namedtuple_that_is_not_registered_is_made_anew() -> None:
    data = spec_to_data(pytree.tree_structure([Point(1, 2), Point(3, 4)]), "the outputs")
    notes: list[str] = []
    first, second = pytree.tree_unflatten([1, 2, 3, 4], spec_from_data(data, notes, "an output"))
    assert (first, second) == ((1, 2), (3, 4))
    assert first.y == 2 and type(first) is type(second)
    assert notes == [
        f"an output of type {Point.__module__}.Point is a new namedtuple here: the type is not registered"
    ]


@pytest.mark.parametrize("fields", [["x", "def"], ["x", "y()"], ["x"], ["x", "x"]])
def test_a_namedtuple_has_no_foreign_fields(fields: list[str]) -> None:
    data = spec_to_data(pytree.tree_structure(Point(1, 2)), "the outputs")
    with pytest.raises(ValueError, match=r"."):
        spec_from_data(data | {"fields": fields}, [], "an output")


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        (["a", "b"], {"a": 1, "b": 2}),
        ([["a", "b"], ["c"]], {"a": 1, "b": 2}),
        (None, [1, 2]),
        (["a"], [1, 2]),
    ],
)
def test_a_type_that_is_not_registered_becomes_a_dict_or_a_list(context: Any, expected: Any) -> None:
    leaf = {"type": "leaf"}
    data = {"type": "custom", "name": "os.system", "context": context, "children": [leaf, leaf]}
    notes: list[str] = []
    assert pytree.tree_unflatten([1, 2], spec_from_data(data, notes, "an output")) == expected
    kind = type(expected).__name__
    assert notes == [f"an output of type os.system is a {kind} here: the type is not registered"]


def test_a_context_without_a_written_form_is_refused() -> None:
    spec = pytree.TreeSpec(Pair, object(), [])
    with pytest.raises(BundleError, match=r"Pair in the outputs holds a object"):
        spec_to_data(spec, "the outputs")


def test_a_model_output_is_a_dict_where_transformers_was_not_imported(tmp_path: Path) -> None:
    program = traced("hub_bert")
    (tmp_path / "data.json").write_text(json.dumps(program_to_data(program)))
    script = """
import json, sys
import torch
from graphsplit.serialization import program_from_data
data = json.load(open(sys.argv[1]))
for row in data["state"]:
    row["meta"] = True
program = program_from_data(data, {})
assert not [name for name in sys.modules if name.startswith("transformers")]
print(program.notes)
print(program.signature.outputs[0].unflatten(["value"]))
"""
    run = [sys.executable, "-c", script, str(tmp_path / "data.json")]
    root = Path(__file__).parents[1]
    out = subprocess.run(run, capture_output=True, text=True, check=True, cwd=root).stdout.splitlines()
    name = "transformers.modeling_outputs.SequenceClassifierOutput"
    assert f"an output of type {name} is a dict here: the type is not registered" in out[0]
    assert out[1] == "{'logits': 'value'}"


# -- what is not written -------------------------------------------------------------------------------------


def program_with(target: Any, *args: Any) -> Program:
    """A program of one call."""
    program = traced("mlp")
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["value"] = program.signature.inputs[0]
    call = graph.call_function(target, (x, *args), name="the_call")
    call.meta["value"] = x.meta["value"]
    graph.output((call,))
    return replace(program, graphs=(graph,), state={})


def test_a_function_that_cannot_be_found_by_name_is_refused() -> None:
    def mine(x: Tensor) -> Tensor:
        return x

    with pytest.raises(
        BundleError, match=r"node the_call .*mine\) calls something that cannot be found again"
    ):
        program_to_data(program_with(mine))


def test_a_tensor_among_the_arguments_is_refused_with_the_place() -> None:
    with pytest.raises(BundleError, match=r"node the_call \(add.Tensor\) holds a Tensor, .*unknown place"):
        program_to_data(program_with(torch.ops.aten.add.Tensor, torch.zeros(1)))


@pytest.mark.parametrize("name", ['a"]; x', "a'b", "a\nb", "a\\b", "a..b", "", "__class__"])
def test_names_that_code_cannot_spell_are_refused(name: str) -> None:
    program = replace(traced("mlp"), state={name: StateEntry(name, "buffer", torch.zeros(1))})
    with pytest.raises(BundleError, match=r"a name that cannot be written"):
        program_to_data(program)


# -- what is not read ----------------------------------------------------------------------------------------


def refusal(change: Any, name: str = "mlp") -> str:
    program = traced(name)
    with pytest.raises(BundleError) as caught:
        program_from_data(damaged(program, change), tensors_of(program))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "target",
    [
        "aten.no_such_op.default", "aten.linear.no_such_overload", "aten.linear", "os.system",
        "builtins.eval", "import_module.os.default", "load_library.x.default", "nowhere.linear.default",
        "aten.from_file.default", "aten.__class__.default", "aten.linear.__init__", "operator.attrgetter", "",
    ],
)  # fmt: skip
def test_only_registered_operators_are_called(target: str) -> None:
    modules = set(sys.modules)
    message = refusal(lambda data: node_row(data).update(target=target))
    assert f"calls {target}, which is not registered in this process" in message
    assert set(sys.modules) == modules


def test_an_operator_of_an_unknown_namespace_leaves_no_trace() -> None:
    refusal(lambda data: node_row(data).update(target="never_heard_of.linear.default"))
    assert "never_heard_of" not in torch.ops


def test_a_registered_custom_operator_is_found() -> None:
    @torch.library.custom_op("graphsplit_test::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return x * 2

    @twice.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = twice(x)
            return y

    program = gs.trace(Twice(), torch.ones(2, 3))
    back = through_json(program)
    assert str(back) == str(program)
    assert torch.equal(emit(back)(torch.ones(2, 3)), torch.full((2, 3), 2.0))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d.update(format="graphsplit-program/9"), "not a program of format"),
        (lambda d: d.pop("name"), "'name' is missing"),
        (lambda d: d.update(graphs=[]), "0 graphs"),
        (lambda d: d.update(graphs=d["graphs"] * 2), "argument 2 is shorter"),
        (lambda d: d["graphs"][0].pop(), "does not end with its one output"),
        (lambda d: d["graphs"][0].pop(0), "is not computed before"),
        (lambda d: d["graphs"][0].reverse(), "is not computed before"),
        (lambda d: node_row(d).update(op="call_module"), "the opcode 'call_module' is not known"),
        (lambda d: node_row(d).update(name="x = exec"), "none that Python can have"),
        (lambda d: node_row(d).update(args=[{"$node": "nobody"}]), "uses 'nobody'"),
        (lambda d: node_row(d).update(args=[{"$code": "1"}]), "$code is no known kind of value"),
        (lambda d: node_row(d).update(args=[{"$dtype": "onnx"}]), "there is no torch.onnx"),
        (lambda d: node_row(d).update(args=[{"$device": "nowhere"}]), "is damaged"),
        (lambda d: node_row(d).update(kwargs={"a=exec('1'), b": 1}), "is no name that Python can have"),
        (
            lambda d: node_row(d, "placeholder").update(target="x=exec('1')"),
            "is no name that Python can have",
        ),
        (lambda d: node_row(d, "placeholder").update(value={"$tensor": 3}), "is damaged"),
        (lambda d: node_row(d, "get_attr").update(target='w"]; exec("1")'), "a name that cannot be written"),
        (lambda d: node_row(d, "get_attr").update(target="forward"), "which the program does not hold"),
        (lambda d: node_row(d, "output").update(args=[1]), "does not return a tuple"),
        (lambda d: node_row(d).update(source=10**6), "is damaged"),
        (lambda d: d["state"][0].update(shape=[1]), "expected float32[1]"),
        (lambda d: d["state"][0].update(dtype="float64"), "expected float64"),
        (lambda d: d["state"][0].update(dtype="save"), "there is no torch.save"),
        (lambda d: d["state"][0].update(kind="code"), "the kind 'code' is not known"),
        (lambda d: d["state"][0].update(name="elsewhere"), "its tensor is missing"),
        (lambda d: d["state"][0].update(stride=[10**12, 1]), "the strides"),
        (lambda d: d["state"][0].update(meta=True, shape=[-1]), "is damaged"),
        (lambda d: d["signature"].update(in_leaves=[]), "0 leaves for a nesting of 1"),
        (lambda d: d["signature"].update(in_leaves=[7]), "7 is no position of a tensor"),
        (
            lambda d: d["signature"].update(in_spec={"type": "leaf"}),
            "not positional ones and ones by keyword",
        ),
        (lambda d: d["signature"].update(inputs=[3]), "an input is no tensor"),
        (lambda d: d["signature"]["outputs"][0].update(names=[]), "is no position of a tensor"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_damaged_data_is_refused_in_one_sentence(change: Any, reason: str) -> None:
    assert reason in refusal(change)


def test_deep_nesting_is_refused() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    data = copy.copy(program_to_data(traced("mlp")))
    data["signature"] = data["signature"] | {"defaults": [["x", deep]]}
    with pytest.raises(BundleError, match=r"the signature is damaged: maximum recursion depth"):
        program_from_data(data, tensors_of(traced("mlp")))


def test_the_functions_are_those_that_torch_export_leaves() -> None:
    from torch._export.serde import serialize

    assert set(serialize._SYM_OPS) <= set(FUNCTIONS.values())
    assert FUNCTIONS["operator.getitem"] is operator.getitem


def test_a_namedtuple_is_refused_as_an_argument() -> None:
    with pytest.raises(BundleError, match=r"holds a Registered, which has no written form"):
        encode(Registered(1), "here")
