"""What each node of a graph costs: FLOPs, bytes kept for the backward pass, seconds.

A FLOP is half a multiply-add of a matrix product, a convolution, an attention or a recurrent layer, as
``torch.utils.flop_counter`` counts them; ops without products count nothing. The counter sees no fused
kernels (attention on the CPU, LSTM, GRU): here they are counted from shapes, before a kernel is chosen.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from graphsplit.errors import UserError
from graphsplit.graphs import base_name
from graphsplit.program import TRAINING, Program, meta_of

Shape = tuple[int, ...]


def flops(node: fx.Node) -> int:
    """FLOPs of one call of a node in the forward pass, with the sizes of the traced example."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return 0
    count = _FORMULAS.get(base_name(node))
    return 0 if count is None else 2 * count(node)


def is_contraction(node: fx.Node) -> bool:
    """True for ops that multiply and sum, which are those that cost FLOPs."""
    return isinstance(node.target, torch._ops.OpOverload) and base_name(node) in _FORMULAS


def graph_flops(graph: fx.Graph) -> int:
    """FLOPs of a forward pass, with the sizes of the traced example."""
    return sum(flops(node) for node in graph.nodes)


def _shape(node: fx.Node, position: int) -> Shape:
    argument = node.args[position]
    assert isinstance(argument, fx.Node), node
    return meta_of(argument).shape


def _products(node: fx.Node) -> int:
    """``[..., n, m] @ [..., m, p]``; vectors and broadcasting included."""
    return math.prod(meta_of(node).shape) * _shape(node, 0)[-1]


def _linear(node: fx.Node) -> int:
    return math.prod(_shape(node, 0)) * math.prod(_shape(node, 1)[:-1])


def _added_product(node: fx.Node) -> int:
    return math.prod(meta_of(node).shape) * _shape(node, 1)[-1]


def _bilinear(node: fx.Node) -> int:
    batch = math.prod(_shape(node, 0)[:-1])
    outputs, left, right = _shape(node, 2)
    return batch * outputs * left * (right + 1)


def _convolution(node: fx.Node) -> int:
    """Every output entry takes a kernel's worth; transposed: every input entry gives one."""
    transposed = "transpose" in base_name(node) or (len(node.args) > 6 and node.args[6] is True)
    weight = _shape(node, 1)
    entries = math.prod(_shape(node, 0)) if transposed else math.prod(meta_of(node).shape)
    return entries * math.prod(weight[1:])


def _attention(node: fx.Node) -> int:
    """Scores ``[..., L, S]`` from vectors of E, and their sums of vectors of V."""
    query, key, value = (_shape(node, position) for position in range(3))
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _einsum(node: fx.Node) -> int:
    """Operands are joined from the left to the right; an index that nothing later needs is summed."""
    equation, operands = node.args[0], node.args[1]
    assert isinstance(equation, str) and isinstance(operands, Sequence)
    inputs, _, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    sizes: dict[str, int] = {}
    named: list[set[str]] = []
    for term, operand in zip(terms, operands, strict=True):
        assert isinstance(operand, fx.Node)
        shape = meta_of(operand).shape
        letters = _letters(term, len(shape))
        sizes |= dict(zip(letters, shape, strict=True))
        named.append(set(letters))
    if "->" in equation:
        kept = set(output.replace("...", "")) | {name for name in sizes if name.isdigit()}
    else:
        kept = {name for name in sizes if sum(name in letters for letters in named) == 1 or name.isdigit()}
    total, current = 0, named[0]
    for number, following in enumerate(named[1:], 1):
        joined = current | following
        later = kept.union(*named[number + 1 :])
        if joined - later:  # something is summed over, so that it is a product of matrices
            total += math.prod(sizes[name] for name in joined)
        current = joined & later
    return total


def _letters(term: str, rank: int) -> list[str]:
    """Names of the dimensions; those of an ellipsis are numbered from the right."""
    before, dots, after = term.partition("...")
    if not dots:
        return list(term)
    hidden = rank - len(before) - len(after)
    return [*before, *(str(number) for number in range(hidden, 0, -1)), *after]


def _recurrent(node: fx.Node) -> int:
    """Each step multiplies the input and the hidden state with every weight once."""
    weights: Any = next(item for item in node.args if _is_weights(item))
    shapes = [meta_of(weight).shape for weight in weights]
    steps = math.prod(_shape(node, 0)[:-1])
    return steps * sum(math.prod(shape) for shape in shapes if len(shape) == 2)


def _is_weights(item: Any) -> bool:
    return (
        isinstance(item, Sequence)
        and bool(item)
        and isinstance(item[0], fx.Node)
        and meta_of(item[0]).ndim == 2
    )


def _cell(node: fx.Node) -> int:
    shapes = [_shape(node, position) for position in (2, 3)]
    return _shape(node, 0)[0] * sum(math.prod(shape) for shape in shapes)


_FORMULAS: Mapping[str, Callable[[fx.Node], int]] = {
    "linear": _linear,
    "matmul": _products,
    "mm": _products,
    "bmm": _products,
    "mv": _products,
    "dot": lambda node: math.prod(_shape(node, 0)),
    "addmm": _added_product,
    "baddbmm": _added_product,
    "addbmm": lambda node: math.prod(_shape(node, 1)) * _shape(node, 2)[-1],
    "addmv": _added_product,
    "bilinear": _bilinear,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(
        (
            "conv1d", "conv2d", "conv3d", "convolution", "_convolution",
            "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
        ),
        _convolution,
    ),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _cell),
}  # fmt: skip


class Watched(fx.Interpreter):
    """Runs a graph node by node over a program's state; ``watch`` may look at each."""

    def __init__(self, graph: fx.Graph, state: Mapping[str, Tensor]) -> None:
        super().__init__(nn.Module(), graph=graph)
        self.state = state
        self.training = True

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """State by its name; the flag of the mode."""
        return self.training if target == TRAINING else self.state[str(target)]


class _Saved(Watched):
    """Which bytes autograd keeps because of which node, each storage once."""

    def __init__(self, graph: fx.Graph, state: Mapping[str, Tensor]) -> None:
        super().__init__(graph, state)
        self.bytes: dict[fx.Node, int] = {}
        self._known: dict[int, Tensor] = {storage_of(tensor): tensor for tensor in state.values()}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and write down what is new among what it saves."""
        self.bytes[n] = 0

        def pack(tensor: Tensor) -> Tensor:
            key = storage_of(tensor)
            if key not in self._known:
                self._known[key] = tensor  # kept, so that no address is used twice
                self.bytes[n] += tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return super().run_node(n)


def storage_of(tensor: Tensor) -> int:
    """Identity of the memory of a tensor, fake ones included; good while the tensor lives."""
    address: int = tensor.untyped_storage()._cdata
    return address


def saved_bytes(program: Program, graph: fx.Graph) -> dict[fx.Node, int]:
    """Bytes that autograd keeps for the backward pass because of each node, with the traced sizes.

    The forward pass runs on fake tensors, which have shapes and no memory. A tensor that several nodes save
    is counted where it is saved first.
    """
    mode = FakeTensorMode()
    state = {
        name: mode.from_tensor(entry.tensor.detach()).requires_grad_(entry.requires_grad)
        for name, entry in program.state.items()
    }
    with mode:
        run = _Saved(graph, _leaves(state))
        run.run(*(meta.zeros() for meta in program.signature.inputs))
    return run.bytes


def _leaves(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Buffers may be written: each run has its own."""
    return {name: tensor if tensor.requires_grad else tensor.clone() for name, tensor in state.items()}


class _Timed(Watched):
    """Seconds of each node: its forward and its backward."""

    def __init__(self, graph: fx.Graph, state: Mapping[str, Tensor]) -> None:
        super().__init__(graph, state)
        self.seconds: dict[fx.Node, float] = {}
        self._waits = any(tensor.device.type != "cpu" for tensor in state.values())

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, and go backward through it alone."""
        start = now(waits=self._waits)
        result = super().run_node(n)
        if n.op != "call_function":
            self.seconds[n] = now(waits=self._waits) - start
            return result
        outputs = with_gradient([result])
        inputs = with_gradient([self.env.get(used) for used in n.all_input_nodes])
        if outputs and inputs:
            ones = [torch.ones_like(output) for output in outputs]
            torch.autograd.grad(outputs, inputs, ones, allow_unused=True)
        self.seconds[n] = now(waits=self._waits) - start
        return pytree.tree_map_only(Tensor, _cut_off, result)


def now(*, waits: bool) -> float:
    """Seconds of a clock; where the device ``waits`` to be asked, once all that was asked of it is done."""
    if waits:
        torch.accelerator.synchronize()
    return time.perf_counter()


def with_gradient(values: Any) -> list[Tensor]:
    """Tensors, at any depth, that need a gradient."""
    leaves = pytree.tree_leaves(values)
    return [value for value in leaves if isinstance(value, Tensor) and value.requires_grad]


def _cut_off(tensor: Tensor) -> Tensor:
    """The same values, from which the backward pass goes no further."""
    return tensor.detach().requires_grad_() if tensor.requires_grad else tensor


def seconds(
    program: Program, graph: fx.Graph, inputs: Sequence[Tensor], runs: int = 5
) -> dict[fx.Node, float]:
    """Measured seconds of each node, forward and backward, the median of several runs after one to warm up.

    Args:
        program: Whose state is used; buffers stay as they are.
        graph: One of its graphs.
        inputs: Example inputs in the order of the placeholders.
        runs: How many are timed.

    Raises:
        UserError: The program is on the meta device, which computes nothing.
    """
    if any(entry.tensor.is_meta for entry in program.state.values()):
        raise UserError("a model on the meta device takes no time", hint="balance by flops, params or memory")
    found: list[dict[fx.Node, float]] = []
    with torch.random.fork_rng():
        for _ in range(runs + 1):
            state = {
                name: entry.tensor.detach().requires_grad_(entry.requires_grad)
                for name, entry in program.state.items()
            }
            run = _Timed(graph, _leaves(state))
            run.run(*inputs)
            found.append(run.seconds)
    return {node: statistics.median(times[node] for times in found[1:]) for node in found[0]}
