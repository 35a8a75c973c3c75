"""Emitted modules are ordinary modules: they copy, pickle, compile, export, move and train like any other."""

import copy
import functools
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graphsplit as gs
from graphsplit.emission import ProgramModule
from graphsplit.errors import UserError
from laws import (
    Step,
    assert_faithful,
    assert_same_step,
    largest_difference,
    owned,
    step,
    tensors,
    uneven,
    wide,
)
from zoo import ZOO, call_of, traced

MODELS = [
    "mlp_batchnorm_dropout", "resnet_basic", "convnext_stochastic_depth", "unet", "swin", "gpt_dropout", "llama_expand",
    "lstm_stacked", "auxiliary_head", "dataclass_output", "nested_input", "lifted_constant", "mask_buffers",
    "running_statistic", "tied_autoencoder", "attention_baddbmm_alibi", "hub_bert", "hub_t5",
]  # fmt: skip
COMPILED = [
    "mlp_batchnorm_dropout", "resnet_basic", "convnext_stochastic_depth", "gpt_dropout", "lstm_stacked", "auxiliary_head",
    "dataclass_output", "running_statistic", "hub_bert",
]  # fmt: skip


@functools.cache
def partition_of(name: str) -> gs.Partition:
    return gs.partition(traced(name), k=2)


def submodel_of(name: str) -> ProgramModule:
    return gs.emit(partition_of(name).programs[1])


def run(module: Any, call: Any) -> list[Tensor]:
    """Outputs under one seed."""
    args, kwargs = owned(call)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tensors(module(*args, **kwargs))


def in_both_modes(module: nn.Module, call: Any) -> list[Step]:
    """A step in train and in eval mode, without a trace in the module."""
    return [step(copy.deepcopy(module).train(mode), call) for mode in (True, False)]


def assert_same(found: list[Step], expected: list[Step]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert_same_step(a, b)


# ---------------------------------------------------------------------------------------------------------
# Copies


@pytest.mark.parametrize("name", MODELS)
def test_deepcopy(name: str) -> None:
    module = submodel_of(name)
    twin = copy.deepcopy(module)
    mine = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    assert not any(id(tensor) in mine for tensor in (*twin.parameters(), *twin.buffers()))
    assert len(list(twin.parameters())) == len(list(module.parameters())), "tied parameters stay tied"
    assert_same(in_both_modes(twin, call_of(name)), in_both_modes(module, call_of(name)))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert any(bool(parameter.any()) for parameter in module.parameters())


def test_deepcopy_keeps_the_mode_and_the_hooks() -> None:
    module = submodel_of("gpt_dropout").eval()
    module.register_forward_hook(lambda module, args, output: [0 * tensor for tensor in tensors(output)])
    twin = copy.deepcopy(module)
    assert not twin.training
    assert not any(bool(output.any()) for output in run(twin, call_of("gpt_dropout")))


@pytest.mark.parametrize("name", MODELS)
def test_pickle(name: str) -> None:
    module = submodel_of(name)
    twin = pickle.loads(pickle.dumps(module))
    assert type(twin) is ProgramModule
    assert_same(in_both_modes(twin, call_of(name)), in_both_modes(module, call_of(name)))


def test_torch_save() -> None:
    module = partition_of("gpt_dropout").merge().eval()
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert not twin.training
    assert torch.equal(run(twin, call_of("gpt_dropout"))[0], run(module, call_of("gpt_dropout"))[0])


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_round_trip(name: str) -> None:
    part = partition_of(name)
    for module, other in [(submodel_of(name), submodel_of(name)), (part.merge(), part.merge())]:
        state = {key: value.clone() for key, value in module.state_dict().items()}
        with torch.no_grad():
            for tensor in other.state_dict().values():
                tensor.zero_()
        other.load_state_dict(state, strict=True)
        assert_same(in_both_modes(other, call_of(name)), in_both_modes(module, call_of(name)))


@pytest.mark.parametrize("name", MODELS)
def test_names_are_those_of_the_model(name: str) -> None:
    model = ZOO[name].build()
    for module in (*partition_of(name).submodels, partition_of(name).merge()):
        assert module.state_dict().keys() == model.state_dict().keys()
        assert list(dict(module.named_parameters())) == list(dict(model.named_parameters()))
        for (key, mine), (_, theirs) in zip(module.named_parameters(), model.named_parameters(), strict=True):
            assert mine.requires_grad == theirs.requires_grad, key
            assert mine.dtype == theirs.dtype, key
            assert isinstance(mine, nn.Parameter) and mine.is_leaf, key
            assert mine.is_contiguous(), key


def test_sub_models_are_independent() -> None:
    model = ZOO["gpt_dropout"].build()
    part = gs.partition(model, *call_of("gpt_dropout"), k=2)
    before = owned(model.state_dict())
    first, second = part.submodels
    merged = part.merge()
    expected = [run(second.eval(), call_of("gpt_dropout")), run(merged.eval(), call_of("gpt_dropout"))]
    with torch.no_grad():
        for tensor in (*first.parameters(), *first.buffers()):
            tensor.fill_(0)
    found = [run(second, call_of("gpt_dropout")), run(merged, call_of("gpt_dropout"))]
    assert all(
        torch.equal(a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_emission_without_copies_shares_memory() -> None:
    program = partition_of("gpt_dropout").programs[0]
    shared, own = gs.emit(program, copy=False), gs.emit(program)
    for name, parameter in shared.named_parameters():
        tensor = program.state[name].tensor
        assert parameter.data_ptr() == tensor.data_ptr()
        assert own.get_parameter(name).data_ptr() != tensor.data_ptr()


# ---------------------------------------------------------------------------------------------------------
# Other types and devices


@pytest.mark.parametrize("name", MODELS)
def test_double(name: str) -> None:
    part = partition_of(name)
    for module in (submodel_of(name), part.merge()):
        expected = run(module.eval(), call_of(name))
        found = run(copy.deepcopy(module).double(), wide(call_of(name)))
        floats = [(a, b) for a, b in zip(found, expected, strict=True) if b.dtype.is_floating_point]
        assert floats
        for a, b in floats:
            assert a.dtype == torch.float64
            assert largest_difference([a], [b.double()]) < 1e-5
        # Once there and back: the same bits, because float64 holds every float32.
        back = run(module.double().float(), call_of(name))
        assert all(torch.equal(a, b) for a, b in zip(back, expected, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_double_trains(name: str) -> None:
    module = submodel_of(name).double()
    step(module, wide(call_of(name)))
    trained = [parameter for parameter in module.parameters() if parameter.grad is not None]
    assert trained and all(parameter.grad.dtype == torch.float64 for parameter in trained)


@pytest.mark.parametrize("name", ["resnet_basic", "gpt_dropout", "llama_expand"])
def test_bfloat16(name: str) -> None:
    module = submodel_of(name).eval()
    expected = run(module, call_of(name))[0]
    args, kwargs = pytree.tree_map(
        lambda x: x.bfloat16() if isinstance(x, Tensor) and x.dtype.is_floating_point else x, call_of(name)
    )
    found = run(module.to(torch.bfloat16), (args, kwargs))[0]
    assert found.dtype == torch.bfloat16
    assert largest_difference([found.float()], [expected]) < 0.1


@pytest.mark.parametrize("name", MODELS)
def test_meta(name: str) -> None:
    module = submodel_of(name)
    shapes = [output.shape for output in run(module, call_of(name))]
    call = pytree.tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, call_of(name))
    module = module.to("meta")
    assert all(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    args, kwargs = call
    outputs = tensors(module(*args, **kwargs))
    assert [output.shape for output in outputs] == shapes
    assert all(output.is_meta for output in outputs)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", MODELS)
def test_cuda(name: str) -> None:
    for module in (submodel_of(name), partition_of(name).merge()):
        expected = run(module.double().eval(), wide(call_of(name)))
        call = pytree.tree_map(lambda x: x.cuda() if isinstance(x, Tensor) else x, wide(call_of(name)))
        found = run(module.cuda(), call)
        assert all(output.is_cuda for output in found)
        assert largest_difference([output.cpu() for output in found], expected) < 1e-9
        args, kwargs = call
        sum(
            output.sum() for output in tensors(module.train()(*args, **kwargs)) if output.requires_grad
        ).backward()


# ---------------------------------------------------------------------------------------------------------
# Compiled and exported


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", COMPILED)
def test_compile(name: str, training: bool) -> None:
    torch._dynamo.reset()
    module = submodel_of(name).train(training)
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    expected, found = step(module, call_of(name)), step(compiled, call_of(name))
    assert pytree.tree_structure(found.outputs) == pytree.tree_structure(expected.outputs)
    if not training:  # aot_eager draws other random numbers
        assert largest_difference(tensors(found.outputs), tensors(expected.outputs)) < 1e-5
    mine, theirs = dict(module.named_parameters()), dict(twin.named_parameters())
    for key, parameter in mine.items():
        assert (parameter.grad is None) == (theirs[key].grad is None), key
        if not training and parameter.grad is not None:
            assert largest_difference([theirs[key].grad], [parameter.grad]) < 1e-4, key


@pytest.mark.parametrize("name", COMPILED)
def test_compile_is_exact_in_train_mode(name: str) -> None:
    torch._dynamo.reset()
    module = submodel_of(name)
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, fullgraph=True, backend="eager")
    expected, found = step(module, call_of(name)), step(compiled, call_of(name))
    assert largest_difference(tensors(found.outputs), tensors(expected.outputs)) == 0
    found = step(twin.zero_grad() or twin, call_of(name))
    assert found.buffers.keys() == expected.buffers.keys()


def test_compile_follows_the_mode_and_the_batch() -> None:
    torch._dynamo.reset()
    module = submodel_of("mlp_batchnorm_dropout")
    compiled = torch.compile(module, fullgraph=True, backend="eager", dynamic=True)
    for batch in (2, 5, 3):
        x = torch.randn(batch, 64, generator=torch.Generator().manual_seed(batch))
        compiled.eval()
        assert torch.equal(compiled(x), module(x))
        compiled.train()
        assert module.training
        torch.manual_seed(1)
        assert compiled(x).shape == (batch, 8)


def test_compile_of_a_merged_model() -> None:
    torch._dynamo.reset()
    merged = partition_of("gpt_dropout").merge().eval()
    compiled = torch.compile(merged, fullgraph=True, backend="aot_eager")
    found, expected = run(compiled, call_of("gpt_dropout")), run(merged, call_of("gpt_dropout"))
    assert largest_difference(found, expected) < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script:DeprecationWarning"
)  # inductor's own use of TorchScript
def test_compile_to_machine_code() -> None:
    torch._dynamo.reset()
    module = submodel_of("mlp_batchnorm_dropout").eval()
    compiled = torch.compile(module, fullgraph=True)
    call = call_of("mlp_batchnorm_dropout")
    assert largest_difference(run(compiled, call), run(module, call)) < 1e-5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", COMPILED)
def test_export(name: str, training: bool) -> None:
    module = submodel_of(name).train(training)
    args, kwargs = owned(call_of(name))
    exported = torch.export.export(module, args, kwargs, strict=False)
    expected = run(copy.deepcopy(module), call_of(name))
    assert largest_difference(run(exported.module(), call_of(name)), expected) < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_trace_again(name: str) -> None:
    module = submodel_of(name)
    again = gs.emit(gs.trace(module, *call_of(name)))
    assert_same(in_both_modes(again, call_of(name)), in_both_modes(module, call_of(name)))


# ---------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_every_parameter(name: str) -> None:
    model = ZOO[name].build()
    step(model, call_of(name))
    reached = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    for module in (*partition_of(name).submodels, partition_of(name).merge()):
        module.zero_grad()
        for seed in range(4):  # stochastic depth and dropout leave some out
            step(module, call_of(name), seed)
        assert {key for key, p in module.named_parameters() if p.grad is not None} == reached
        dead = {key for key, p in module.named_parameters() if p.grad is not None and not bool(p.grad.any())}
        assert len(dead) <= len(reached) // 10, dead


@pytest.mark.parametrize("name", ["frozen_backbone", "lora"])
def test_frozen_parameters_stay_frozen(name: str) -> None:
    model = ZOO[name].build()
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    assert len(set(flags.values())) == 2
    for duplicate in (True, False):
        for module in (*partition_of(name).submodels, partition_of(name).merge(duplicate=duplicate)):
            assert {key: parameter.requires_grad for key, parameter in module.named_parameters()} == flags
            step(module, call_of(name))
            assert all(p.requires_grad or p.grad is None for p in module.parameters())


@pytest.mark.parametrize(
    "name", ["mlp_batchnorm_dropout", "resnet_basic", "gpt_dropout", "lstm_stacked", "hub_bert"]
)
def test_sub_models_train(name: str) -> None:
    module = submodel_of(name)
    args, kwargs = call_of(name)
    goal = torch.zeros_like(tensors(module(*args, **kwargs))[0])
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (tensors(module(*args, **kwargs))[0] - goal).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_statistics_move_in_train_mode_only() -> None:
    module = submodel_of("mlp_batchnorm_dropout")
    before = owned(dict(module.named_buffers()))
    run(module.eval(), call_of("mlp_batchnorm_dropout"))
    assert all(torch.equal(value, before[key]) for key, value in module.named_buffers())
    run(module.train(), call_of("mlp_batchnorm_dropout"))
    assert not any(torch.equal(value, before[key]) for key, value in module.named_buffers())


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(
    "name", ["resnet_basic", "swin", "gpt_dropout", "lstm_stacked", "hub_bert", "hub_t5"]
)
def test_other_batches(name: str, batch: int) -> None:
    model = ZOO[name].build().eval()
    call = pytree.tree_map(
        lambda x: x[:1].expand(batch, *x.shape[1:]) if isinstance(x, Tensor) and x.dim() else x, call_of(name)
    )
    one = gs.emit(partition_of(name).program).eval()
    assert largest_difference(run(one, call), run(model, call)) == 0
    for module in (submodel_of(name), partition_of(name).merge()):
        outputs = run(module.eval(), call)
        single = run(
            module, pytree.tree_map(lambda x: x[:1] if isinstance(x, Tensor) and x.dim() else x, call)
        )
        assert outputs[0].shape[0] == batch
        assert largest_difference([outputs[0][-1:]], [single[0]]) < 1e-5


# ---------------------------------------------------------------------------------------------------------
# Odds and ends of modules


def test_children_have_the_names_of_the_model() -> None:
    module = submodel_of("gpt_dropout")
    block = module.get_submodule("transformer.h.0.attn.c_attn")
    assert block.weight is module.get_parameter("transformer.h.0.attn.c_attn.weight")
    module.train()
    assert block.training
    assert not module.eval().get_submodule("transformer.h.0").training


def test_functional_call() -> None:
    module = submodel_of("mlp_batchnorm_dropout").eval()
    values = {key: torch.zeros_like(value) for key, value in module.named_parameters()}
    args, _ = call_of("mlp_batchnorm_dropout")
    assert not bool(torch.func.functional_call(module, values, args).any())
    assert bool(module(*args).any())


def test_code_and_graph_of_each_mode() -> None:
    module = submodel_of("convnext_stochastic_depth")
    assert module.graph is module.graph_of("train")
    assert "bernoulli" in module.code
    module.eval()
    assert module.graph is module.graph_of("eval")
    assert "bernoulli" not in module.code
    assert "ConvNeXt" in repr(module)


def test_errors_show_the_generated_code() -> None:
    module = submodel_of("mlp_batchnorm_dropout")
    module.fc1.weight = nn.Parameter(torch.zeros(2, 2))
    args, _ = call_of("mlp_batchnorm_dropout")
    with pytest.raises(RuntimeError) as caught:
        module(*args)
    assert any(
        "linear" in str(entry.statement) for entry in caught.traceback if "<graphsplit" in str(entry.path)
    )


def test_uneven_weights_differ() -> None:
    # The scalar that gradients are taken of must not hide an exchange of two outputs.
    weights = uneven(torch.zeros(4, 3))
    assert weights.unique().numel() == 12


class Named(nn.Module):
    """A layer under a name of the user's choice, and a parameter under another."""

    def __init__(self, layer: str, parameter: str) -> None:
        super().__init__()
        self.names = layer, parameter
        setattr(self, layer, nn.Linear(4, 8))
        setattr(self, parameter, nn.Parameter(torch.ones(8)))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        layer, parameter = self.names
        return self.head(torch.relu(getattr(self, layer)(x)) * getattr(self, parameter))


@pytest.mark.parametrize(("layer", "parameter"), [("code", "graph"), ("graph", "code")])
def test_parts_of_the_model_may_be_called_as_properties_of_the_module(layer: str, parameter: str) -> None:
    model, x = Named(layer, parameter), torch.randn(3, 4)
    part = gs.partition(model, (x,), k=2)
    assert part.verify().ok
    module = gs.emit(part.program)
    assert module.state_dict().keys() == model.state_dict().keys()
    assert module.get_parameter(f"{layer}.weight").shape == (8, 4)
    assert torch.equal(module(x), model(x))
    assert torch.equal(copy.deepcopy(module)(x), model(x))
    assert module.graph_of("train").nodes


KEYWORDS = [("lambda", "is"), ("in", "None"), ("0", "class"), ("print", "torch"), ("def-1", "import")]


@pytest.mark.parametrize(("layer", "parameter"), KEYWORDS)
def test_parts_of_the_model_may_be_called_as_words_of_python(layer: str, parameter: str) -> None:
    model, x = Named(layer, parameter), torch.randn(3, 4)
    assert_faithful(model, x)
    part = gs.partition(model, (x,), k=2)
    assert part.verify().ok
    for module in (*part.submodels, part.merge(), part.fuse()):
        module(x)
    module = gs.emit(part.program)
    assert module.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(copy.deepcopy(module)(x), model(x))
    assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x), model(x))
    compile(module.code, "code", "exec")


def test_modules_of_a_dictionary_may_be_called_as_words_of_python() -> None:
    layers = nn.ModuleDict({"in": nn.Linear(4, 8), "is": nn.Linear(8, 8)})

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = layers, nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layers["is"](self.layers["in"](x).relu()).relu())

    assert_faithful(Chain(), torch.randn(3, 4))
    part = gs.partition(Chain(), torch.randn(3, 4), k=2)
    assert part.verify().ok and part.submodels


def test_a_part_called_as_a_method_of_the_module_is_refused() -> None:
    with pytest.raises(UserError, match="a part called run_flat"):
        gs.emit(gs.trace(Named("run_flat", "scale"), (torch.randn(3, 4),)))
