"""Tracing: a program does what its model does, in both modes, or the model is refused with the reason."""

import copy
import functools
import random
import re
import subprocess
import sys
import warnings
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

import graphsplit as gs
from graphsplit.errors import GraphsplitError, InputError, LoadError, TraceError, UnsupportedError, UserError
from graphsplit.program import Program, Source, TensorMeta, op_name
from graphsplit.signature import as_call
from laws import assert_faithful, assert_same_step, model_unchanged, owned, step
from zoo import ZOO, call_of, traced

HERE = Path(__file__)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, X5 = normal(2, 6, seed=1), normal(5, 6, seed=2)
Body = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """``fc2(body(self, fc1(x)))`` in float64: the body is what a test is about, the layers show its gradient."""

    def __init__(self, body: Body, **members: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 4)
        self.body = body
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.body(self, self.fc1(x)))


def emitted(model: nn.Module, *args: Any, **kwargs: Any) -> gs.ProgramModule:
    return gs.emit(gs.trace(model, args, kwargs))


# ---------------------------------------------------------------------------------------------------------
# Train and eval in one graph


def lstm(self: Any, h: Tensor) -> Tensor:
    return self.rnn(h.unflatten(1, (4, 2)))[0].flatten(1)[:, :8]


def attention(self: Any, h: Tensor) -> Tensor:
    h = h.unsqueeze(1).unflatten(2, (4, 2))
    p = 0.25 if self.training else 0.0
    return F.scaled_dot_product_attention(h, h.flip(2), h, dropout_p=p).flatten(1)


ONE_GRAPH: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: Net(lambda s, h: s.drop(h), drop=nn.Dropout(0.4)),
    "dropout in place": lambda: Net(lambda s, h: s.drop(h), drop=nn.Dropout(0.4, inplace=True)),
    "dropout of channels": lambda: Net(lambda s, h: s.drop(h[:, :, None])[..., 0], drop=nn.Dropout1d(0.4)),
    "alpha dropout": lambda: Net(lambda s, h: s.drop(h), drop=nn.AlphaDropout(0.4)),
    "feature alpha dropout": lambda: Net(
        lambda s, h: s.drop(h[:, :, None])[..., 0], drop=nn.FeatureAlphaDropout(0.4)
    ),
    "dropouts as functions": lambda: Net(
        lambda s, h: F.alpha_dropout(F.dropout(h, 0.3, s.training), 0.2, s.training, inplace=True)
    ),
    "dropout that is always on": lambda: Net(lambda s, h: F.dropout(h, 0.3)),
    "dropout that is always off": lambda: Net(lambda s, h: F.dropout(h, 0.3, training=False)),
    "batch norm": lambda: Net(lambda s, h: s.norm(h), norm=nn.BatchNorm1d(8)),
    "batch norm, two on one way": lambda: Net(
        lambda s, h: s.b(torch.relu(s.a(h))), a=nn.BatchNorm1d(8), b=nn.BatchNorm1d(8, momentum=0.3)
    ),
    "batch norm called twice": lambda: Net(lambda s, h: s.norm(s.norm(h)), norm=nn.BatchNorm1d(8)),
    "batch norm without statistics": lambda: Net(
        lambda s, h: s.norm(h), norm=nn.BatchNorm1d(8, track_running_stats=False)
    ),
    "instance norm with statistics": lambda: Net(
        lambda s, h: s.norm(h.unflatten(1, (2, 4))).flatten(1),
        norm=nn.InstanceNorm1d(2, affine=True, track_running_stats=True),
    ),
    "lstm with dropout": lambda: Net(lstm, rnn=nn.LSTM(2, 2, 2, dropout=0.5, batch_first=True)),
    "gru with dropout": lambda: Net(lstm, rnn=nn.GRU(2, 2, 2, dropout=0.5, batch_first=True)),
    "rnn with dropout": lambda: Net(lstm, rnn=nn.RNN(2, 2, 2, dropout=0.5, batch_first=True)),
    "attention with dropout": lambda: Net(attention),
    "batch norm whose module stays in eval": lambda: FrozenNorm(),
    "noise in both modes": lambda: Net(lambda s, h: h + torch.randn_like(h) * torch.rand(8, dtype=h.dtype)),
}


class FrozenNorm(Net):
    """Its norm keeps its statistics in training, as in fine-tuning."""

    def __init__(self) -> None:
        super().__init__(lambda s, h: s.drop(s.norm(h)), norm=nn.BatchNorm1d(8), drop=nn.Dropout(0.5))

    def train(self, mode: bool = True) -> "FrozenNorm":
        super().train(mode)
        self.norm.eval()
        return self


@pytest.mark.parametrize("name", ONE_GRAPH)
def test_one_graph_serves_train_and_eval(name: str) -> None:
    program = assert_faithful(ONE_GRAPH[name](), (X,), (X5,))
    assert not program.branches_on_training


def test_eval_draws_nothing_and_train_does() -> None:
    module = emitted(Net(lambda s, h: F.dropout(h, 0.5, s.training)), X)
    torch.manual_seed(0)
    assert not torch.equal(module(X), module(X))
    state = torch.get_rng_state()
    assert torch.equal(module.eval()(X), module(X))
    assert torch.equal(torch.get_rng_state(), state)


def test_count_of_batches_grows_in_train_only() -> None:
    module = emitted(Net(lambda s, h: s.norm(s.norm(h)), norm=nn.BatchNorm1d(8)), X)
    module(X)
    assert int(module.norm.num_batches_tracked) == 2
    module.eval()(X)
    assert int(module.norm.num_batches_tracked) == 2
    module.train()(X)
    assert int(module.norm.num_batches_tracked) == 4


# ---------------------------------------------------------------------------------------------------------
# Python that branches on the training flag


def drop_path(self: Any, h: Tensor) -> Tensor:
    if not self.training:
        return h
    keep = torch.empty(h.shape[0], 1, dtype=h.dtype, device=h.device).bernoulli_(0.75)
    return h * keep.div_(0.75)


def drop_path_by_half(self: Any, h: Tensor) -> Tensor:
    return h * torch.empty_like(h[:, :1]).bernoulli_() * 2 if self.training else h


def moving_average(self: Any, h: Tensor) -> Tensor:
    if self.training:
        with torch.no_grad():
            self.average.mul_(0.9).add_(h.mean(0), alpha=0.1)
    return h - self.average


TWO_GRAPHS: dict[str, Callable[[], nn.Module]] = {
    "stochastic depth": lambda: Net(drop_path),
    "stochastic depth by half": lambda: Net(drop_path_by_half),
    "noise": lambda: Net(lambda s, h: h + 0.1 * torch.randn_like(h) if s.training else h),
    "another slice": lambda: Net(lambda s, h: h + h[:, : 4 if s.training else 8].sum(1, keepdim=True)),
    "another factor": lambda: Net(lambda s, h: h * (2.0 if s.training else 3.0)),
    "moving average": lambda: Net(moving_average, average=torch.zeros(8)),
    "count in eval only": lambda: Net(
        lambda s, h: h if s.training else h + s.count.add_(1), count=torch.tensor(0)
    ),
    "spectral norm": lambda: Net(lambda s, h: s.fc(h), fc=parametrizations.spectral_norm(nn.Linear(8, 8))),
}


@pytest.mark.parametrize("name", TWO_GRAPHS)
def test_branch_on_training_keeps_both_graphs(name: str) -> None:
    program = assert_faithful(TWO_GRAPHS[name](), (X,), (X5,))
    assert program.branches_on_training
    assert len(program.graphs) == 2


NUMBERS: dict[str, Body] = {
    "added": lambda s, h: h.relu() + (0.37 if s.training else 0.0),
    "added, a whole number in eval": lambda s, h: h.relu() + (0.37 if s.training else 0),
    "a factor": lambda s, h: h.relu() * (0.37 if s.training else 0.0),
    "a flag as a factor": lambda s, h: h.relu() * s.training,
    "a slope": lambda s, h: F.leaky_relu(h, 0.3 if s.training else 0.0),
    "alpha": lambda s, h: torch.add(h, h.relu(), alpha=0.3 if s.training else 0.0),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_follow_the_mode(name: str) -> None:
    model = Net(NUMBERS[name])
    assert_faithful(model, (X,), (X5,))
    assert gs.partition(model, X, k=2).verify().ok


def test_auxiliary_head_gives_other_outputs_in_train() -> None:
    entry = ZOO["auxiliary_head"]
    program = assert_faithful(entry.build(), entry.inputs())
    assert program.branches_on_training
    module = gs.emit(program)
    assert isinstance(module(*entry.inputs()), tuple)
    assert isinstance(module.eval()(*entry.inputs()), Tensor)


# ---------------------------------------------------------------------------------------------------------
# In-place operations and views


def write_masked(self: Any, h: Tensor) -> Tensor:
    h = h * 1
    h[h > 0] = 0.5
    h[:, [0, 2]] += 1
    return h.masked_fill_(h > 1, 2.0)


def write_scattered(self: Any, h: Tensor) -> Tensor:
    z = torch.zeros_like(h)
    z.scatter_(1, h.argsort(1), h)
    z.index_add_(1, torch.tensor([0, 1]), h[:, :2])
    z.index_copy_(1, torch.tensor([3]), h[:, :1])
    return z


def write_whole_numbers(self: Any, h: Tensor) -> Tensor:
    steps = torch.zeros(h.shape[0], 8, dtype=torch.long)
    steps += 1
    steps[:, 2:4] = 3
    steps[:, 0] *= 2
    return h * steps


def write_random(self: Any, h: Tensor) -> Tensor:
    noise = torch.empty_like(h).normal_() + torch.empty_like(h).uniform_(0, 1)
    return h + noise * torch.empty_like(h).exponential_() * torch.empty_like(h).bernoulli_(0.3)


def write_triangle(self: Any, h: Tensor) -> Tensor:
    return h @ torch.ones(8, 8, dtype=h.dtype).triu_(1)


def reshaped_in_place(self: Any, h: Tensor) -> Tensor:
    mask = (h > 0).to(h.dtype).unsqueeze_(1)
    wide = h * 2
    wide.unsqueeze_(-1).mul_(3)
    wide.transpose_(1, 2)
    return (mask + wide).squeeze_(1) + (h.detach() * 1).unsqueeze_(0)[0] * wide.squeeze_(1)


def transposed_in_place(self: Any, h: Tensor) -> Tensor:
    weight = torch.arange(64.0, dtype=h.dtype).view(8, 8).t_()
    weight[0] += 1
    return h @ weight.swapaxes_(0, 1).div_(8)


IN_PLACE: dict[str, Body] = {
    "shape": reshaped_in_place,
    "transpose": transposed_in_place,
    "relu": lambda s, h: h.relu_(),
    "activation in place": lambda s, h: F.relu(h, inplace=True) + F.elu(h + 1, inplace=True),
    "arithmetic": lambda s, h: h.add_(1).mul_(2).sub_(0.5).div_(3).neg_(),
    "operators": lambda s, h: _augmented(h),
    "clamp": lambda s, h: (h * 2).clamp_(-0.5, 0.5).clamp_min_(-0.3),
    "read by two": lambda s, h: _read_by_two(h),
    "zero and fill": lambda s, h: h + torch.empty_like(h).zero_() + torch.empty_like(h).fill_(2.0),
    "copy of another": lambda s, h: h + torch.empty_like(h).copy_(h * 2),
    "copy that broadcasts": lambda s, h: h + torch.empty_like(h).copy_(h[:1].detach().mean(0)),
    "copy to another type": lambda s, h: h * torch.empty(8, dtype=torch.long).copy_(torch.full((8,), 2.5)),
    "masks and indices": write_masked,
    "scatter": write_scattered,
    "whole numbers": write_whole_numbers,
    "random": write_random,
    "triangle": write_triangle,
    "out of a function": lambda s, h: h + torch.add(h.detach(), 1, out=torch.empty_like(h)),
}


def _augmented(h: Tensor) -> Tensor:
    h += 1
    h *= 2
    h -= h.detach()[:1].clone()
    h /= 3
    return h


def _read_by_two(h: Tensor) -> Tensor:
    same = h
    h.add_(1)
    return same * h


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_operations(name: str) -> None:
    assert_faithful(Net(IN_PLACE[name]), (X,), (X5,))


def through(view: Callable[[Tensor], Tensor]) -> Body:
    """Write through a view; the base is read afterwards, and so is the view."""

    def body(self: Any, h: Tensor) -> Tensor:
        part = view(h)
        part.mul_(2)
        result = h * 1
        h.add_(1)
        return result + h + view(h).detach().mean() + 0 * part.detach().amax()

    return body


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda h: h[:, 1:5],
    "slice with a step": lambda h: h[:, ::2],
    "slice from the end": lambda h: h[:, -3:],
    "slice of a slice": lambda h: h[:, 1:7][:, 2:4],
    "select": lambda h: h[:, 2],
    "transpose": lambda h: h.transpose(0, 1),
    "t": lambda h: h.t(),
    "permute and select": lambda h: h.permute(1, 0)[3],
    "view": lambda h: h.view(-1, 2, 4)[:, 1],
    "ravel": lambda h: h.ravel()[2:],
    "view, transpose, slice": lambda h: h.view(-1, 2, 4).transpose(1, 2)[:, 1:3],
    "unflatten": lambda h: h.unflatten(1, (4, 2))[..., 0],
    "flatten": lambda h: h.view(-1, 2, 4).flatten(),
    "reshape": lambda h: h.reshape(-1, 4, 2)[:, 0],
    "unsqueeze": lambda h: h[..., None],
    "squeeze": lambda h: h[:, None, :].squeeze(1),
    "diagonal": lambda h: h.diagonal(),
    "alias": lambda h: h.view_as(h),
    "narrow": lambda h: h.narrow(1, 2, 3),
    "movedim": lambda h: h.movedim(0, 1)[0],
    "swapaxes": lambda h: h.swapaxes(0, 1)[0],
    "T": lambda h: h.T[0],
    "same type": lambda h: h.to(torch.float64),
    "contiguous already": lambda h: h.contiguous(),
    # Taken apart along a dimension that is not contiguous, a tensor is a view all the same.
    "reshape of a slice": lambda h: h[:, :4].reshape(-1, 2, 2),
    "flatten of a slice": lambda h: h[:, :4].unflatten(1, (2, 2)).flatten(1),
    "reshape to the same": lambda h: h[:, ::2].reshape(-1, 4),
    "contiguous copy": lambda h: h[:, ::2].contiguous(),
    "reshaped copy": lambda h: h.t().reshape(4, -1),
}


def faithful_or_refused(model: nn.Module, *batches: Any) -> Program | None:
    """For what few models do: right, or refused by name, but never wrong."""
    try:
        return assert_faithful(model, *batches)
    except UnsupportedError as error:
        assert error.where and str(HERE) in error.where
        assert error.hint
        return None


@pytest.mark.parametrize("name", VIEWS)
def test_writes_through_a_view(name: str) -> None:
    program = faithful_or_refused(Net(through(VIEWS[name])), (X,), (X5,))
    rare = {"movedim", "T", "narrow"}
    assert program is not None or name in rare, "refused"


PIECES: dict[str, Callable[[Tensor], Any]] = {
    "chunk": lambda h: h.chunk(2, 1),
    "chunk, uneven": lambda h: h.chunk(3, -1),
    "split": lambda h: h.split(3, 1),
    "split by sizes": lambda h: h.split([2, 3, 3], 1),
    "unbind": lambda h: h.unbind(1),
    "unbind of a view": lambda h: h.view(-1, 2, 4).unbind(1),
    "tensor_split": lambda h: h.tensor_split(3, 1),
    "hsplit": lambda h: h.hsplit(2),
}


@pytest.mark.parametrize("name", PIECES)
def test_writes_into_pieces(name: str) -> None:
    # Autograd forbids to write into one of several views, so this is about tensors without gradient.
    def body(self: Any, h: Tensor) -> Tensor:
        base = h.detach() * 1
        pieces = PIECES[name](base)
        pieces[0].mul_(2)
        pieces[1].add_(3)
        return h + base * 2

    common = {"chunk", "chunk, uneven", "split", "split by sizes", "unbind", "unbind of a view"}
    program = faithful_or_refused(Net(body), (X,), (X5,))
    assert program is not None or name not in common, "refused"


def test_writes_through_views_that_overlap() -> None:
    def body(self: Any, h: Tensor) -> Tensor:
        left, right = h[:, :5], h[:, 3:]
        left.mul_(2)
        right.add_(1)
        left.copy_(right)
        return h + left[:, :1] + right[:, -1:]

    assert_faithful(Net(body), (X,), (X5,))


def test_slice_assignment_trains() -> None:
    def body(self: Any, h: Tensor) -> Tensor:
        out = torch.zeros_like(h)
        out[:, :4] = h[:, 4:]
        out[:, 4] = h[:, 0] * 3
        out[:, 5:] = 2.0
        return out

    assert_faithful(Net(body), (X,), (X5,))


# Results that share memory without a word of it in the operator's schema.
QUIET_ALIASES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "dropout, which is nothing in eval": lambda s, h: F.dropout(h, 0.5, s.training),
    "alpha dropout, which is nothing in eval": lambda s, h: F.alpha_dropout(h, 0.5, s.training),
    "type_as": lambda s, h: h.type_as(h),
    "positive": lambda s, h: torch.positive(h),
    "atleast_2d": lambda s, h: torch.atleast_2d(h),
    "expand_as": lambda s, h: h.expand_as(h),
    "identity": lambda s, h: nn.Identity()(h),
}


@pytest.mark.parametrize("name", QUIET_ALIASES)
def test_writes_through_a_quiet_alias(name: str) -> None:
    def body(self: Any, h: Tensor) -> Tensor:
        other = QUIET_ALIASES[name](self, h)
        other.relu_()
        return h + 2 * other

    faithful_or_refused(Net(body), (X,), (X5,))


def write_detached(self: Any, h: Tensor) -> Tensor:
    h.detach().clamp_(min=0)
    return h


def write_without_gradient(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        h.mul_(2)
    return h


def write_part_without_gradient(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        h[:, 0] = 0
    return h


def write_filled_without_gradient(self: Any, h: Tensor) -> Tensor:
    filled = torch.zeros_like(h)
    filled[:, :4] = h[:, 4:]
    with torch.no_grad():
        filled.mul_(2)
    return filled


HIDDEN = [write_detached, write_without_gradient, write_part_without_gradient, write_filled_without_gradient]


@pytest.mark.parametrize("body", HIDDEN)
def test_writes_that_autograd_does_not_see(body: Body) -> None:
    faithful_or_refused(Net(body), (X,), (X5,))


def test_program_does_not_write_to_the_example_inputs() -> None:
    given = X.clone()
    program = gs.trace(Net(lambda s, h: h), given)
    gs.emit(program)(given)
    assert torch.equal(given, X)
    gs.trace(InputWriter(), given)
    assert torch.equal(given, X)


class InputWriter(Net):
    def __init__(self) -> None:
        super().__init__(lambda s, h: h)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2))


def test_model_that_writes_to_its_input() -> None:
    model = InputWriter()
    assert torch.equal(emitted(model, X)(X.clone()), model(X.clone()))


# ---------------------------------------------------------------------------------------------------------
# Regions: no_grad, autocast


@torch.no_grad()
def without_gradient(h: Tensor) -> tuple[Tensor, Tensor]:
    return h.abs().mean(1, keepdim=True), h.exp()


def no_grad_region(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        scale = h.abs().mean(1, keepdim=True) + self.fc2.weight.abs().sum()
    return h / scale


def no_grad_function(self: Any, h: Tensor) -> Tensor:
    scale, factor = without_gradient(h)
    return h / scale * factor


def no_grad_by_call(self: Any, h: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    scale = h.abs()
    torch.set_grad_enabled(True)
    return h / (scale + 1)


def no_grad_view(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        seen = h.view(-1, 2, 4)
    return h * seen.flatten(1)


def grad_in_no_grad(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        a = h.abs()
        with torch.enable_grad():
            b = h.exp()
    return a * b


def autocast_off(self: Any, h: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        scores = h.float() @ h.float().t()
    return scores.softmax(-1).double() @ h


def no_grad_in_autocast_off(self: Any, h: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        with torch.no_grad():
            a = h.abs()
        b = h.exp()
    return a * b


def autocast_off_in_no_grad(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        a = h.abs()
    return a * h


REGIONS = [
    no_grad_region, no_grad_function, no_grad_by_call, no_grad_view, grad_in_no_grad, autocast_off,
    autocast_off_in_no_grad,
]  # fmt: skip


@pytest.mark.parametrize("body", REGIONS)
def test_regions_keep_their_gradients(body: Body) -> None:
    program = assert_faithful(Net(body), (X,), (X5,))
    assert not any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in program.nodes())


def test_no_grad_in_autocast_which_torch_loses() -> None:
    faithful_or_refused(Net(no_grad_in_autocast_off), (X,), (X5,))


def autocast_on(self: Any, h: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return h + F.linear(h.float(), self.fc2.weight.float()).double().sum()


def test_autocast_in_the_model_is_refused() -> None:
    with pytest.raises(
        UnsupportedError, match=r"wrap_with_autocast.*enter autocast outside of the model"
    ) as caught:
        gs.trace(Net(autocast_on), X)
    assert caught.value.where and str(HERE) in caught.value.where


# ---------------------------------------------------------------------------------------------------------
# Buffers that forward writes


def assign_buffer(self: Any, h: Tensor) -> Tensor:
    self.average = 0.9 * self.average + 0.1 * h.mean(0).detach()
    return h - self.average


def write_part_of_buffer(self: Any, h: Tensor) -> Tensor:
    self.average[0] = h.detach().mean()
    self.average[1:].add_(1)
    return h + self.average


def write_buffer_in_no_grad(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        self.average.lerp_(h.mean(0), 0.1)
    return h - self.average


def count_calls(self: Any, h: Tensor) -> Tensor:
    self.average += 1
    return h * self.average


@pytest.mark.parametrize("body", [assign_buffer, write_part_of_buffer, write_buffer_in_no_grad, count_calls])
def test_written_buffers(body: Body) -> None:
    try:
        program = assert_faithful(Net(body, average=torch.ones(8)), (X,), (X5,))
    except UnsupportedError as error:
        assert "average" in str(error)
        assert body is assign_buffer, "refused"
        return
    module = gs.emit(program)
    module(X)
    assert not torch.equal(module.average, torch.ones(8, dtype=torch.float64))


def copy_into(average: Tensor, mean: Tensor) -> None:
    average.copy_(mean)


def lerp_towards(average: Tensor, mean: Tensor) -> None:
    average.lerp_(mean, 0.1)


def scale_and_add(average: Tensor, mean: Tensor) -> None:
    average.mul_(0.9).add_(mean, alpha=0.1)


def set_one(average: Tensor, mean: Tensor) -> None:
    average[-1] = mean.sum()


def set_some(average: Tensor, mean: Tensor) -> None:
    average[torch.tensor([1, 5])] = mean[:2]


def set_slice_of_view(average: Tensor, mean: Tensor) -> None:
    average.view(2, 4)[1, 1:] = mean[5:]


def add_out(average: Tensor, mean: Tensor) -> None:
    torch.add(average, mean, out=average)


def copy_twice(average: Tensor, mean: Tensor) -> None:
    average.copy_(mean)
    average.copy_(average * mean)


def fill(average: Tensor, mean: Tensor) -> None:
    average.add_(1.0)


WHOLE_WRITES = [copy_into, lerp_towards, scale_and_add, add_out, copy_twice]
WRITES = [*WHOLE_WRITES, set_one, set_some, set_slice_of_view, fill]


def in_no_grad(write: Callable[[Tensor, Tensor], None]) -> Body:
    def body(self: Any, h: Tensor) -> Tensor:
        h = h.relu()
        seen = h + self.average
        with torch.no_grad():
            write(self.average, h.mean(0))
        return seen * self.average

    return body


def in_no_grad_function(write: Callable[[Tensor, Tensor], None]) -> Body:
    def body(self: Any, h: Tensor) -> Tensor:
        seen = h.relu() + self.average
        torch.no_grad()(write)(self.average, h.mean(0))
        return seen

    return body


def in_no_grad_by_call(write: Callable[[Tensor, Tensor], None]) -> Body:
    def body(self: Any, h: Tensor) -> Tensor:
        seen = h.relu() + self.average
        torch.set_grad_enabled(False)
        write(self.average, h.mean(0))
        torch.set_grad_enabled(True)
        return seen

    return body


def through_detach(write: Callable[[Tensor, Tensor], None]) -> Body:
    def body(self: Any, h: Tensor) -> Tensor:
        seen = h.relu() + self.average
        write(self.average.detach(), h.mean(0))
        return seen

    return body


def assert_same_steps(found: nn.Module, expected: nn.Module) -> None:
    """Two steps of training, of which the second meets what the first left in the buffers."""
    for number in range(2):
        found.zero_grad()
        expected.zero_grad()
        assert_same_step(step(found, as_call(X5)), step(expected, as_call(X5)), f" in step {number}")
        flags = {name: buffer.requires_grad for name, buffer in expected.named_buffers()}
        assert flags.items() <= {name: buffer.requires_grad for name, buffer in found.named_buffers()}.items()


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("around", [in_no_grad, in_no_grad_function, in_no_grad_by_call, through_detach])
def test_buffers_written_without_gradient(around: Callable[[Any], Body], write: Any) -> None:
    # What is in the buffer must not hold on to the graph of the step that wrote it.
    model = Net(around(write), average=torch.ones(8))
    if around is through_detach and write is add_out:
        pytest.skip("torch has no gradient of out=")
    assert_same_steps(emitted(model, X), copy.deepcopy(model))


@pytest.mark.parametrize("write", WHOLE_WRITES)
def test_parts_of_models_that_write_buffers_without_gradient(write: Any) -> None:
    parts = gs.partition(Net(in_no_grad(write), average=torch.ones(8)), X, k=2)
    fused = parts.fuse()
    for number in range(2):
        for module in (*parts.submodels, fused):
            step(module, as_call(X5))
            assert not any(buffer.requires_grad for buffer in module.buffers())
        for found, own in zip(fused.state_dicts(), parts.submodels, strict=True):
            for name, buffer in own.named_buffers():
                torch.testing.assert_close(found[name], buffer, msg=f"{name} in step {number}")


def test_gradient_in_a_buffer_stays_that_of_the_model() -> None:
    def body(self: Any, h: Tensor) -> Tensor:
        self.average.copy_(h.mean(0))
        return h + self.average

    model = Net(body, average=torch.ones(8))
    module = emitted(model, X)
    assert_same_step(step(module, as_call(X5)), step(own := copy.deepcopy(model), as_call(X5)))
    assert module.average.requires_grad and own.average.requires_grad


# ---------------------------------------------------------------------------------------------------------
# Batches


def test_batch_of_one_is_duplicated() -> None:
    model = Net(lambda s, h: torch.relu(h))
    program = gs.trace(model, X[:1])
    assert any("duplicated" in note for note in program.notes)
    module = gs.emit(program)
    for batch in (X[:1], X, X5):
        assert torch.equal(module(batch), model(batch))


def test_batch_of_one_beside_a_number() -> None:
    class Scaled(Net):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return super().forward(x) * scale

    model = Scaled(lambda s, h: h)
    module = emitted(model, X[:1], torch.tensor(2.0))
    assert torch.equal(module(X5, torch.tensor(3.0)), model(X5, torch.tensor(3.0)))


def test_a_first_dimension_of_one_that_is_no_batch_is_fixed() -> None:
    model = Net(lambda s, h: h.expand(5, -1))
    program = gs.trace(model, X[:1])
    assert any("fixed" in note for note in program.notes)
    assert torch.equal(gs.emit(program)(X[:1]), model(X[:1]))


def test_a_size_that_the_model_fixes_is_that_of_the_one_example() -> None:
    model = Net(lambda s, h: h * 2 if h.shape[0] == 2 else h)
    program = gs.trace(model, X[:1])
    assert torch.equal(gs.emit(program)(X[:1]), model(X[:1]))


def test_no_note_where_nothing_was_duplicated() -> None:
    assert gs.trace(Net(lambda s, h: h), X).notes == ()


def test_further_dimensions_may_be_dynamic() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh()).double()
    program = gs.trace(model, normal(2, 3, 6), dynamic={"args[0]": (0, 1)})
    other = normal(4, 5, 6)
    assert torch.equal(gs.emit(program)(other), model(other))
    with pytest.raises(InputError, match="size 5 in dimension 1, expected 3"):
        gs.emit(gs.trace(model, normal(2, 3, 6)))(other)


class FixedState(nn.Module):
    """The batch size is in the shape of a buffer."""

    h0: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 5, batch_first=True)
        self.register_buffer("h0", torch.zeros(1, 2, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x, (self.h0, self.h0))[0]


def test_batch_that_is_baked_in_is_guarded() -> None:
    module = emitted(FixedState(), torch.randn(2, 3, 4))
    module(torch.randn(2, 3, 4))
    with pytest.raises(InputError, match="has size 5 in dimension 0, expected 2"):
        module(torch.randn(5, 3, 4))


def test_inputs_that_do_not_fit_are_guarded() -> None:
    class Two(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x) + y

    module = emitted(Two(lambda s, h: h), X, normal(2, 4))
    with pytest.raises(InputError, match=r"args\[0\] has size 7 in dimension 1, expected 6"):
        module(normal(2, 7), normal(2, 4))
    with pytest.raises(InputError, match=r"args\[1\] has size 3 in dimension 0, expected 2"):
        module(X, normal(3, 4))
    with pytest.raises(InputError, match="has shape"):
        module(X[None], normal(2, 4))
    with pytest.raises(InputError, match="is a NoneType, expected a tensor"):
        module(X, None)
    with pytest.raises(InputError, match="nested as 1 positional, the model was traced with 2 positional"):
        module(X)
    with pytest.raises(InputError, match="more by keyword"):
        module(X, normal(2, 4), more=X)


def test_guards_follow_sizes_that_are_equal_in_the_trace() -> None:
    # Two inputs of one batch, and a third whose first dimension has the same size by chance.
    class Three(Net):
        def forward(self, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
            return (super().forward(x) + y) * scale.sum()

    model = Three(lambda s, h: h)
    module = emitted(model, X, normal(2, 4), normal(2))
    call = (X5, normal(5, 4), normal(7))
    assert torch.equal(module(*call), model(*call))


# ---------------------------------------------------------------------------------------------------------
# State: tied, shared, constant


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(2.0))
        self.other = nn.Module()
        self.other.register_buffer("scale", self.scale)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(self.embed(ids)))) * self.scale + self.other.scale


def test_tied_weights_keep_all_their_names() -> None:
    model = Tied()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    program = assert_faithful(model, (ids,), (torch.cat([ids, ids]),))
    module = gs.emit(program)
    assert module.state_dict().keys() == model.state_dict().keys()
    assert module.head.weight is module.embed.weight
    assert module.other.scale is module.scale
    assert len(list(module.parameters())) == len(list(model.parameters()))
    assert program.parameter_count() == sum(p.numel() for p in model.parameters())
    model.load_state_dict(module.state_dict())
    module.load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", ["gpt", "hub_t5", "hub_bert_mlm", "tied_autoencoder", "densenet"])
def test_parameters_keep_their_order(name: str) -> None:
    # States of optimizers go by position.
    entry = ZOO[name]
    model = entry.build()
    module = gs.emit(gs.trace(model, *as_call(entry.inputs())))
    assert list(dict(module.named_parameters())) == list(dict(model.named_parameters()))


def test_parameters_keep_their_order_where_a_tied_one_has_neighbours() -> None:
    model = Tied()
    module = emitted(model, torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert list(dict(module.named_parameters())) == list(dict(model.named_parameters()))


def test_emitted_modules_own_their_tensors() -> None:
    model = Tied()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    program = gs.trace(model, ids)
    one, two = gs.emit(program), gs.emit(program)
    expected = model(ids)
    with torch.no_grad():
        for tensor in (*one.parameters(), *one.buffers()):
            tensor.zero_()
    assert torch.equal(model(ids), expected)
    assert torch.equal(two(ids), expected)


class SharedLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.blocks = nn.ModuleList([nn.Sequential(self.first, nn.ReLU(inplace=True)), nn.Linear(6, 2)])
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.second(self.first(x))
        return self.blocks[1](self.blocks[0](x))


def test_shared_modules() -> None:
    model = SharedLayers()
    program = assert_faithful(model, (X,), (X5,))
    assert list(gs.emit(program).state_dict()) == list(model.state_dict())
    paths = {node.meta["source"].module for node in program.nodes() if node.op == "call_function"}
    assert all("@" not in path for path in paths)


class Constants(Net):
    def __init__(self) -> None:
        super().__init__(lambda s, h: h)
        self.plain = torch.linspace(-1, 1, 8, dtype=torch.float64)
        self.table = [torch.tensor([1.0, 2.0], dtype=torch.float64)]

    def forward(self, x: Tensor) -> Tensor:
        mean = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=torch.float64)
        steps = torch.arange(8) * torch.tensor([2])
        hidden = self.fc1(x - mean) * self.plain + steps
        return self.fc2(hidden) * self.table[0].sum() + torch.ones(4, dtype=x.dtype) * torch.tensor(3)


def test_constants_are_lifted_and_are_no_state() -> None:
    model = Constants()
    program = assert_faithful(model, (X,), (X5,))
    module = gs.emit(program)
    assert list(module.state_dict()) == list(model.state_dict())
    assert any(entry.kind == "constant" for entry in program.state.values())
    # An emitted module owns its constants.
    expected = module(X)
    model.plain.zero_()
    assert torch.equal(module(X), expected)


def test_buffers_that_are_not_saved_stay_so() -> None:
    entry = ZOO["mask_buffers"]
    model = entry.build()
    program = assert_faithful(model, entry.inputs())
    module = gs.emit(program)
    assert list(module.state_dict()) == list(model.state_dict())
    assert dict(module.named_buffers()).keys() == dict(model.named_buffers()).keys()


def test_unused_parameters_stay_in_the_state() -> None:
    model = Net(lambda s, h: h, spare=nn.Linear(3, 3), unused=torch.ones(2))
    module = emitted(model, X)
    assert list(module.state_dict()) == list(model.state_dict())
    module.load_state_dict(model.state_dict())


def test_frozen_parameters_stay_frozen() -> None:
    model = Net(lambda s, h: torch.relu(h))
    model.fc1.weight.requires_grad_(False)
    program = assert_faithful(model, (X,))
    flags = {name: parameter.requires_grad for name, parameter in gs.emit(program).named_parameters()}
    assert flags == {"fc1.weight": False, "fc1.bias": True, "fc2.weight": True, "fc2.bias": True}


def test_hooks_of_the_user_are_part_of_the_model() -> None:
    model = Net(lambda s, h: torch.relu(h))
    model.fc1.register_forward_hook(lambda module, args, output: output * 3)
    model.fc2.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert_faithful(model, (X,), (X5,))


def test_parametrized_weights() -> None:
    fc = parametrizations.weight_norm(nn.Linear(8, 8))
    assert_faithful(Net(lambda s, h: s.fc(h), fc=fc), (X,), (X5,))


# ---------------------------------------------------------------------------------------------------------
# Inputs and outputs of any nesting

Pair = namedtuple("Pair", ["a", "b"])


@dataclass
class Record:
    """Not registered with torch: an output all the same."""

    logits: Tensor
    extra: dict[str, Tensor] | None = None
    count: int = 3


@dataclass
class HubOutput(ModelOutput):
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class Wrapper(nn.Module):
    """Calls a function of itself: the nesting is what a test is about."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.net, *args, **kwargs)


NESTED: dict[str, tuple[Callable[..., Any], Callable[[Tensor, Tensor], Any]]] = {
    "two tensors": (lambda net, x, y: net(x) - 2 * net(y), lambda x, y: (x, y)),
    "tuple": (lambda net, p: (net(p[0]), [net(p[1])]), lambda x, y: ((x, y),)),
    "dict and list": (
        lambda net, d: {"z": net(d["x"]), "a": [net(d["y"][0]), {"b": net(d["x"])}]},
        lambda x, y: ({"x": x, "y": [y]},),
    ),
    "named tuple": (lambda net, p: Pair(net(p.a), {"b": net(p.b)}), lambda x, y: (Pair(x, y),)),
    "ordered dict": (lambda net, x, y: OrderedDict(z=net(x), a=net(y)), lambda x, y: (x, y)),
    "constants between": (
        lambda net, x, y: (net(x), None, 2, "word", 1.5, True, net(y)),
        lambda x, y: (x, y),
    ),
    "one tensor twice": (lambda net, x, y: (net(x), net(x)), lambda x, y: (x, y)),
    "the input itself": (lambda net, x, y: (x, net(y)), lambda x, y: (x, y)),
    "keywords": (lambda net, *, x, y: net(x) - 2 * net(y), lambda x, y: {"x": x, "y": y}),
    "hub output": (
        lambda net, x, y: HubOutput(logits=net(x), hidden_states=(net(y), x)),
        lambda x, y: (x, y),
    ),
    "hub output with gaps": (lambda net, x, y: HubOutput(logits=net(x) + net(y)), lambda x, y: (x, y)),
}


@pytest.mark.parametrize("name", NESTED)
def test_nested_inputs_and_outputs(name: str) -> None:
    function, nest = NESTED[name]
    model = Wrapper(function)
    assert_faithful(model, nest(X, X + 1), nest(X5, X5 * 2))


def test_dataclass_that_torch_does_not_know() -> None:
    module = emitted(Wrapper(lambda net, x: Record(net(x), {"double": net(2 * x)})), X)
    found = module(X)
    assert type(found) is Record
    assert found.count == 3
    expected = Wrapper(lambda net, x: Record(net(x), {"double": net(2 * x)}))(X)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.extra["double"], expected.extra["double"])


def test_hub_output_behaves_as_one() -> None:
    found = emitted(Wrapper(lambda net, x: HubOutput(logits=net(x))), X)(X)
    assert type(found) is HubOutput
    assert list(found.keys()) == ["logits"]
    assert found.hidden_states is None
    assert found["logits"] is found.logits and found[0] is found.logits


def test_model_of_the_hub_called_with_and_without_keywords() -> None:
    entry = ZOO["hub_bert"]
    model = entry.build().eval()
    program = gs.trace(model, *as_call(entry.inputs()))
    module = gs.emit(program).eval()
    call = entry.inputs()
    ids = call["input_ids"] if isinstance(call, dict) else call[0]
    if isinstance(call, dict):
        expected = model(**call)
        found = module(**dict(reversed(list(call.items()))))
    else:
        expected, found = model(*call), module(*call)
    assert type(found) is type(expected)
    assert torch.equal(found.logits, expected.logits)
    assert found.logits.shape[0] == ids.shape[0]


@pytest.mark.parametrize("nested", [False, True])
def test_one_tensor_given_as_two_inputs(nested: bool) -> None:
    if nested:
        model = Wrapper(lambda net, d: net(d["x"]) - 2 * net(d["y"][0]))
        module = emitted(model, {"x": X, "y": [X]})
        call = ({"x": X, "y": [X + 1]},)
    else:
        model = Wrapper(lambda net, x, y: net(x) - 2 * net(y))
        module = emitted(model, X, X)
        call = (X, X + 1)
    assert torch.equal(module(*call), model(*call))


def test_example_inputs_that_share_memory() -> None:
    model = Wrapper(lambda net, x, y: net(x) - 2 * net(y))
    module = emitted(model, X5[:2], X5[1:3])
    assert torch.equal(module(X, X + 1), model(X, X + 1))
    module = emitted(model, X[:1].expand(2, -1), X)
    assert torch.equal(module(X, X + 1), model(X, X + 1))


class Optional_(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(6, 3).double()

    def forward(
        self, x: Tensor, y: Tensor | None = None, *, z: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        out = self.net(x)
        if y is not None:
            out = out - 2 * self.net(y)
        if z is not None:
            out = out + 5 * self.net(z)
        return out * scale


CALLS: list[Callable[[nn.Module, Tensor, Tensor], Tensor]] = [
    lambda m, x, y: m(x, y),
    lambda m, x, y: m(x, y=y),
    lambda m, x, y: m(x=x, y=y),
    lambda m, x, y: m(y=y, x=x),
]


@pytest.mark.parametrize("traced", range(4))
@pytest.mark.parametrize("called", range(4))
def test_arguments_by_position_or_keyword(traced: int, called: int) -> None:
    model = Optional_()
    calls = [((X, X + 1), {}), ((X,), {"y": X + 1}), ((), {"x": X, "y": X + 1}), ((), {"y": X + 1, "x": X})]
    module = gs.emit(gs.trace(model, *calls[traced]))
    assert torch.equal(CALLS[called](module, X5, 2 * X5), CALLS[called](model, X5, 2 * X5))


def test_constants_among_the_arguments() -> None:
    model = Optional_()
    module = gs.emit(gs.trace(model, (X,), {"z": X + 1, "scale": 2.0}))
    expected = model(X5, z=X5 + 1, scale=2.0)
    assert torch.equal(module(X5, z=X5 + 1, scale=2.0), expected)
    assert torch.equal(module(X5, scale=2.0, z=X5 + 1), expected)
    assert torch.equal(module(X5, z=X5 + 1), expected)
    with pytest.raises(InputError, match=r"was 2\.0 in the trace is now 3\.0"):
        module(X5, z=X5 + 1, scale=3.0)


@pytest.mark.parametrize("given", [{"scale": 1.0}, {"z": None}, {"z": None, "scale": 1.0}])
def test_a_default_may_be_given(given: dict[str, Any]) -> None:
    model = Optional_()
    module = gs.emit(gs.trace(model, (X, X + 1)))
    assert torch.equal(module(X5, X5 * 2, **given), model(X5, X5 * 2, **given))


def test_outputs_that_are_no_tensors() -> None:
    class Foreign:
        pass

    program = gs.trace(Wrapper(lambda net, x: (net(x), Foreign())), X)
    assert program.notes == ("output[1] (Foreign) is no tensor and was left out of the outputs",)
    assert gs.emit(program)(X)[1] is None
    with pytest.raises(TraceError, match="the model gives no tensor"):
        gs.trace(Wrapper(lambda net, x: None), X)
    with pytest.raises(TraceError, match="the model gives no tensor"):
        gs.trace(Wrapper(lambda net, x: {"a": 3.0}), X)
    with pytest.raises(TraceError, match=r"the model gives no tensor; output \(Foreign\)"):
        gs.trace(Wrapper(lambda net, x: Foreign()), X)


def test_sizes_as_outputs() -> None:
    module = emitted(Wrapper(lambda net, x: (net(x), x.shape[0], x.shape[1])), X)
    assert module(X5)[1:] == (5, 6)


# ---------------------------------------------------------------------------------------------------------
# Refusals


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 7


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.sign(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() < 1)


class Sign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return StraightThrough.apply(x)


CUSTOM: dict[str, Callable[[], nn.Module]] = {
    "in the model": lambda: Net(lambda s, h: Doubled.apply(h)),
    "in a module": lambda: Net(lambda s, h: s.sign(h), sign=Sign()),
    "in a no_grad region beside": lambda: Net(lambda s, h: no_grad_region(s, Doubled.apply(h))),
    "reentrant checkpoint": lambda: Net(lambda s, h: checkpoint(torch.tanh, h, use_reentrant=True)),
}


@pytest.mark.parametrize("name", CUSTOM)
def test_custom_autograd_function_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"autograd\.Function") as caught:
        gs.trace(CUSTOM[name](), X)
    assert caught.value.hint
    assert caught.value.where and str(HERE) in caught.value.where


def reversed_by_hook(self: Any, h: Tensor) -> Tensor:
    h = h * 1
    h.register_hook(lambda gradient: -gradient)
    return h


def frozen_in_forward(self: Any, h: Tensor) -> Tensor:
    self.fc2.weight.requires_grad_(False)
    return h


def own_generator(self: Any, h: Tensor) -> Tensor:
    return h + torch.rand(8, generator=torch.Generator().manual_seed(0), dtype=h.dtype)


LOST: dict[str, tuple[Body, str, bool]] = {
    "hook on a tensor": (reversed_by_hook, r"Tensor\.register_hook", True),
    "requires_grad_": (frozen_in_forward, r"requires_grad of the parameter fc2\.weight", False),
    "generator": (own_generator, "Generator", True),
    "vmap": (lambda s, h: torch.vmap(lambda row: row * row.sum())(h), r"torch\.vmap", True),
    "grad": (lambda s, h: torch.func.grad(lambda r: (r**2).sum())(h), r"torch\.func", True),
}


@pytest.mark.parametrize("name", LOST)
def test_what_the_tracer_would_lose_is_refused_by_name(name: str) -> None:
    body, words, has_place = LOST[name]
    model = Net(body)
    with pytest.raises(UserError, match=words) as caught:
        gs.trace(model, X)
    assert caught.value.hint
    assert not has_place or (caught.value.where and str(HERE) in caught.value.where)
    (X * 1).requires_grad_().register_hook(lambda gradient: gradient)  # works as before
    assert model.fc2.weight.requires_grad


def test_vmap_whose_result_is_dropped_is_none_of_the_program() -> None:
    def body(self: Any, h: Tensor) -> Tensor:
        torch.vmap(torch.sum)(h)
        return h

    assert_faithful(Net(body), (X,), (X5,))


def test_hooks_on_gradients_are_refused_by_name() -> None:
    model = Net(lambda s, h: h)
    handle = model.fc2.register_full_backward_hook(lambda *_: None)
    with pytest.raises(TraceError, match=r"fc2 has a backward hook.*register_full_backward_hook"):
        gs.trace(model, X)
    handle.remove()
    for name in ("register_hook", "register_post_accumulate_grad_hook"):
        handle = getattr(model.fc1.weight, name)(lambda _: None)
        with pytest.raises(TraceError, match=r"fc1\.weight has a hook"):
            gs.trace(model, X)
        handle.remove()
    gs.trace(model, X)


def test_torchscript_in_a_model_is_named() -> None:
    model = Net(lambda s, h: s.inner(h), inner=nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.inner = torch.jit.script(model.inner)
    with pytest.raises(TraceError, match="TorchScript"):
        gs.trace(model, X)


def test_checkpoint_is_traced() -> None:
    assert_faithful(Net(lambda s, h: checkpoint(torch.tanh, h, use_reentrant=False)), (X,), (X5,))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line to be named
            x = x * 2
        return self.fc(x)


def line_of(text: str) -> int:
    """Number of the line of this file that ends in a comment."""
    lines = HERE.read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.endswith(f"# {text}"))


def checks_values(self: Any, h: Tensor) -> Tensor:
    lengths = (h > -100.0).sum(1)
    torch._check(lengths.max().item() <= h.shape[1])
    torch._check(h.detach().abs().amax().item() < 1e6)
    return h * lengths[:, None]


def test_checks_of_values_are_dropped() -> None:
    assert_faithful(Net(checks_values), (X,), (X5,))


def sampled(self: Any, h: Tensor) -> Tensor:
    mean, scale = h.chunk(2, 1)
    found = torch.distributions.Normal(mean, F.softplus(scale) + 0.1)
    z = found.rsample()
    return torch.cat([z, found.log_prob(z)], 1)


def test_distributions_are_traced_without_their_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch.compile turns the checks off for the whole process, in another test for one.
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)
    assert_faithful(Net(sampled), (X,), (X5,))
    assert torch.distributions.Distribution._validate_args is True


def test_data_dependent_control_flow_is_refused_with_the_line() -> None:
    with pytest.raises(TraceError, match="data-dependent") as caught:
        gs.trace(Branches(), X.float())
    assert caught.value.where
    assert caught.value.where.startswith(f"{HERE}:{line_of('the line to be named')} ")
    assert "if x.sum() > 0:" in caught.value.where
    assert caught.value.hint and "torch.where" in caught.value.hint


class Fails(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        raise self.error  # raised by the user


def test_exception_of_the_user_is_reported_as_such() -> None:
    own = KeyError("vocabulary")
    with pytest.raises(
        InputError, match="the model fails on the example inputs with KeyError: 'vocabulary'"
    ) as caught:
        gs.trace(Fails(own), X.float())
    assert caught.value.where
    assert caught.value.where.startswith(f"{HERE}:{line_of('raised by the user')} ")
    assert caught.value.__cause__ is own


def test_inputs_of_another_shape_are_reported_as_such() -> None:
    with pytest.raises(InputError, match="cannot be multiplied") as caught:
        gs.trace(Net(lambda s, h: h), normal(2, 7))
    assert caught.value.where and str(HERE) in caught.value.where
    assert caught.value.hint == "check that the example inputs fit the model"
    with pytest.raises(InputError, match="TypeError"):
        gs.trace(Net(lambda s, h: h), (X, X))


def test_handled_errors_leave_no_log_behind(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError):
        gs.trace(Net(lambda s, h: h), normal(2, 7))
    with pytest.raises(TraceError):
        gs.trace(Branches(), X.float())
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def write_parameter(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        self.fc2.weight.clamp_(-0.1, 0.1)
    return h


def write_data_of_parameter(self: Any, h: Tensor) -> Tensor:
    self.fc2.weight.data.clamp_(-0.1, 0.1)
    return h


def test_parameter_written_in_forward_is_refused() -> None:
    with pytest.raises(
        UnsupportedError, match=r"writes to the parameter fc2\.weight in the forward pass"
    ) as caught:
        gs.trace(Net(write_parameter), X)
    assert caught.value.hint
    with pytest.raises(UserError):
        gs.trace(Net(write_data_of_parameter), X)
    with pytest.raises(UnsupportedError, match=r"writes to the parameter embed\.weight"):
        gs.trace(
            Net(
                lambda s, h: h + s.embed(torch.zeros(1, dtype=torch.long)),
                embed=nn.Embedding(5, 8, max_norm=0.1),
            ),
            X,
        )


@pytest.mark.parametrize(
    ("model", "args", "words"),
    [
        ("text", X, "the model is a str, expected a torch.nn.Module"),
        (torch.relu, X, "expected a torch.nn.Module"),
        (None, X, "the model is a NoneType"),
    ],
)
def test_what_is_no_model(model: Any, args: Any, words: str) -> None:
    with pytest.raises(LoadError, match=words):
        gs.trace(model, args)


def test_torchscript_is_no_model() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Linear(6, 3))
    with pytest.raises(LoadError, match="TorchScript"):
        gs.trace(scripted, X)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "hold no tensor"),
        ((3, "a"), "hold no tensor"),
        (3, "example inputs are a int"),
        ((X, object()), r"input args\[1\] is a object, which torch cannot take apart"),
        ({"x": {1, 2}}, r"input kwargs\['x'\] is a set"),
    ],
)
def test_what_are_no_inputs(args: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        gs.trace(Net(lambda s, h: h), args)
    assert caught.value.hint


# ---------------------------------------------------------------------------------------------------------
# The user's model is not ours


def used_model() -> nn.Module:
    """A model in the middle of its life: gradients, hooks, mixed training flags, a tied weight."""
    torch.manual_seed(0)
    model = Net(
        lambda s, h: s.drop(s.norm(s.spare(h))),
        norm=nn.BatchNorm1d(8), drop=nn.Dropout(0.5), spare=nn.Linear(8, 8), average=torch.ones(8),
    )  # fmt: skip
    model.other = nn.Linear(8, 8)
    model.other.weight = model.spare.weight
    model.fc1.bias.requires_grad_(False)
    model.fc1.register_forward_hook(lambda module, args, output: output + 1)
    model(X).sum().backward()
    model.norm.eval()
    return model


@pytest.mark.parametrize("training", [True, False])
def test_model_is_unchanged(training: bool) -> None:
    model = used_model()
    model.train(training)
    model.drop.train(not training)
    torch.manual_seed(3)
    with model_unchanged(model):
        program = gs.trace(model, X)
    with model_unchanged(model), torch.random.fork_rng():
        module = gs.emit(program)
        module(X).sum().backward()
        module.eval()(X)


@pytest.mark.parametrize("model", [Branches(), Fails(ValueError("no")), Net(write_parameter).float()])
def test_model_is_unchanged_by_a_refusal(model: nn.Module) -> None:
    model.eval()
    with model_unchanged(model), pytest.raises(GraphsplitError):
        gs.trace(model, X.float())


def test_model_is_unchanged_where_forward_writes() -> None:
    for body in (write_part_of_buffer, moving_average, count_calls, write_buffer_in_no_grad):
        model = Net(body, average=torch.ones(8))
        with model_unchanged(model):
            gs.trace(model, X)


class Remembers(Net):
    """Keeps what it saw, as many models do for a look inside."""

    def __init__(self) -> None:
        super().__init__(lambda s, h: h)
        self.calls = 0
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = {"x": x}
        return super().forward(x)


def test_no_tensor_of_the_trace_is_left_in_the_model() -> None:
    model = Remembers()
    gs.trace(model, X)
    assert model.last is None or type(model.last["x"]) is Tensor
    assert torch.equal(model(X), model(X))


def test_gradient_mode_does_not_matter() -> None:
    model = Net(lambda s, h: torch.relu(h))
    with torch.no_grad():
        program = gs.trace(model, X)
    assert str(program) == str(gs.trace(model, X))


# ---------------------------------------------------------------------------------------------------------
# Meta device, provenance, determinism


def test_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    with model_unchanged(model):
        program = gs.trace(model, torch.empty(2, 6, device="meta"))
    assert program.parameter_count() == sum(p.numel() for p in model.parameters())
    module = gs.emit(program)
    assert all(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    assert module(torch.empty(5, 6, device="meta")).shape == (5, 3)


def test_meta_and_real_models_have_the_same_program() -> None:
    real = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    meta = copy.deepcopy(real).to("meta")
    image = torch.zeros(2, 3, 4, 4)
    assert str(gs.trace(real, image)) == str(gs.trace(meta, image.to("meta")))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)  # inner linear
        return torch.tanh(x)  # inner tanh


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Inner(), Inner()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.exp()  # outer exp


def test_nodes_know_their_module_and_line() -> None:
    program = gs.trace(Outer(), X.float())
    found = [
        (op_name(node), node.meta["source"].module, node.meta["source"].line)
        for node in program.nodes()
        if node.op == "call_function"
    ]
    assert found == [
        ("linear.default", "blocks.0.fc", line_of("inner linear")),
        ("tanh.default", "blocks.0", line_of("inner tanh")),
        ("linear.default", "blocks.1.fc", line_of("inner linear")),
        ("tanh.default", "blocks.1", line_of("inner tanh")),
        ("exp.default", "", line_of("outer exp")),
    ]
    sources = [node.meta["source"] for node in program.nodes() if node.op == "call_function"]
    assert {source.file for source in sources} == {str(HERE)}
    assert sources[-1].code == "return x.exp()  # outer exp"
    assert str(sources[0]) == f"module blocks.0.fc, {HERE}:{sources[0].line} `{sources[0].code}`"


@pytest.mark.parametrize(
    "name", ["resnet_basic", "swin", "gpt_dropout", "hub_llama", "convnext_stochastic_depth"]
)
def test_every_operation_knows_where_it_comes_from(name: str) -> None:
    for node in traced(name).nodes():
        if node.op == "call_function" and isinstance(node.meta["value"], TensorMeta):
            source = node.meta.get("source")
            if op_name(node) == "copy_.default":  # ours: the end of a write to a buffer
                continue
            assert isinstance(source, Source) and source.file and source.line, f"{node.name} of {name}"
            assert "/torch/" not in source.file and "/graphsplit/" not in source.file


class OtherName(Branches):
    def compute(self, x: Tensor, *, factor: float = 2.0) -> Tensor:
        return self.fc(x * factor).exp()  # the line of another name

    forward = compute


def patched(model: Branches) -> Branches:
    def compute(x: Tensor) -> Tensor:
        return model.fc(x * 2.0).exp()  # the line of a patch

    model.forward = compute  # type: ignore[method-assign]
    return model


def by_lambda(model: Branches) -> Branches:
    model.forward = lambda x: model.fc(x * 2.0).exp()  # the line of a lambda
    return model


FORWARDS: dict[str, Callable[[], nn.Module]] = {
    "another name": OtherName,
    "a patch": lambda: patched(Branches()),
    "a lambda": lambda: by_lambda(Branches()),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_nodes_know_the_line_of_a_forward_of_another_name(name: str) -> None:
    model = FORWARDS[name]()
    before = vars(model).get("forward")
    program = gs.trace(model, X.float())
    assert vars(model).get("forward") is before
    sources = [
        node.meta["source"] for node in program.nodes() if op_name(node) in ("mul.Tensor", "exp.default")
    ]
    assert {(source.file, source.line) for source in sources} == {(str(HERE), line_of(f"the line of {name}"))}
    assert torch.equal(gs.emit(program)(X.float()), model(X.float()))


@pytest.mark.parametrize("name", ["resnet_basic", "swin", "hub_llama"])
def test_modules_of_nodes_are_modules_of_the_model(name: str) -> None:
    entry = ZOO[name]
    model = entry.build()
    program = gs.trace(model, *as_call(entry.inputs()))
    sources = {node.meta["source"] for node in program.nodes() if node.meta.get("source")}
    assert {source.module for source in sources} <= dict(model.named_modules()).keys()


def test_text_of_a_program_is_readable() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(fc=nn.Linear(6, 8), drop=nn.Dropout(0.5)))
    text = str(gs.trace(model, X.float()))
    symbol = text.split("= input")[0].rpartition("float32[")[2].partition(",")[0]
    assert text.replace(symbol, "n") == "\n".join(
        [
            "program Sequential: 2 state tensors, 56 parameters",
            "graph (train and eval):",
            "  training = state training",
            "  fc_weight: float32[8, 6] = state fc.weight",
            "  fc_bias: float32[8] = state fc.bias",
            "  input_1: float32[n, 6] = input",
            "  linear_default: float32[n, 8] = linear.default(input_1, fc_weight, fc_bias)",
            "  dropout_default: float32[n, 8] = dropout.default(linear_default, 0.5, training)",
            "  return (dropout_default,)",
        ]
    )


@pytest.mark.parametrize(
    "name", ["resnet_basic", "gpt_dropout", "hub_t5", "convnext_stochastic_depth", "lstm"]
)
def test_two_traces_print_the_same(name: str) -> None:
    model = ZOO[name].build()
    first, second = (str(gs.trace(model, *call_of(name))) for _ in range(2))
    assert first == second == str(traced(name)), "of one model twice, and of another one like it"


SCRIPT = """
import hashlib, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
from zoo import ZOO, traced
import graphsplit as gs
for name in ("gpt", "swin", "densenet"):
    part = gs.partition(ZOO[name].build(), ZOO[name].inputs(), k=2)
    text = "".join([str(part.program), part.plan.to_json(), *map(str, part.programs), str(part.merged_program())])
    print(name, hashlib.sha256(text.encode()).hexdigest())
"""


@pytest.mark.slow
def test_another_process_prints_the_same() -> None:
    outputs = set()
    for seed in ("1", "2"):
        process = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(HERE.parent)],
            env={"PYTHONHASHSEED": seed, "PATH": ""}, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        outputs.add(process.stdout)
    assert len(outputs) == 1
    assert len(outputs.pop().splitlines()) == 3


class Table(nn.Module):
    """Makes a table at its first call and keeps it, as a buffer or as an attribute."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 4)
        self.kind, self.size = kind, -1
        self.tables: dict[int, list[Tensor]] = {}
        if kind != "attribute":
            sizes = {"buffer of another shape": 3, "buffer of the same shape": 8}
            self.register_buffer("table", torch.zeros(sizes[kind]) if kind in sizes else None)
        else:
            self.table = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        if self.size != h.shape[1]:
            self.size = h.shape[1]
            self.table = torch.arange(h.shape[1], dtype=h.dtype)
            self.tables.setdefault(self.size, []).append(self.table)
        return self.fc2((h * self.table).relu())


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize(
    "kind", ["buffer of another shape", "buffer of the same shape", "empty buffer", "attribute"]
)
def test_tables_that_forward_makes_at_its_first_call(kind: str, called: bool) -> None:
    model, fresh, x = Table(kind), Table(kind), torch.randn(3, 6)
    if called:
        model(x)
    kept = (model.size, model.table, {size: list(tables) for size, tables in model.tables.items()})
    with model_unchanged(model):
        part = gs.partition(model, x, k=2)
        certificate = part.verify()
    assert certificate.ok, str(certificate)
    assert (model.size, model.tables.keys()) == (kept[0], kept[2].keys())
    assert model.table is kept[1]
    assert torch.equal(gs.emit(part.program)(x), fresh(x))
    grown = "forward gives table another shape in its first call: traced as it is then"
    sized = "forward changes size from call to call: the graph has them as in the first"
    expected = grown if kind == "buffer of another shape" else sized
    assert part.program.notes == (() if called else (expected,))


class Carries(nn.Module):
    """Keeps a value of the last call, a running average and a count, as attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 4)
        self.last: Tensor | None = None
        self.average, self.calls = torch.zeros(8), 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x).relu()
        out = self.fc2(h + self.average) * (1.0 if self.calls % 2 else 0.5)
        self.last, self.average, self.calls = h.detach(), h.detach().mean(0), self.calls + 1
        return out


@pytest.mark.parametrize(
    ("dynamic", "words", "hint"),
    [
        ({"x": (0,)}, "an input x, which there is not", r"the inputs are args\[0\]"),
        ({"args[0]": (0, 2)}, r"dimension 2 of input args\[0\]", "0 to 1"),
        ({"args[0]": (-1,)}, r"dimension -1 of input args\[0\]", "0 to 1"),
    ],
)
def test_dynamic_dimensions_that_there_are_not(dynamic: Any, words: str, hint: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        gs.trace(nn.Linear(6, 2), torch.randn(2, 6), dynamic=dynamic)
    assert caught.value.hint and re.search(hint, caught.value.hint)


def test_outputs_that_there_are_not() -> None:
    entry = ZOO["hub_bert"]
    with pytest.raises(InputError, match=r"no output named logit\b") as caught:
        gs.trace(entry.build(), entry.inputs(), outputs="logit")
    assert caught.value.hint and "output['logits']" in caught.value.hint


def test_state_that_a_graph_cannot_follow_is_noted() -> None:
    program = gs.trace(Carries(), torch.randn(3, 6))
    assert program.notes == (
        "forward changes last, average, calls from call to call: the graph has them as in the first",
    )


class Memory:
    """A plain object of the user's."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.calls = 0


class KeepsState(nn.Module):
    """Keeps Python state in every way that users do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 4)
        self.recent: deque[Tensor] = deque(maxlen=4)
        self.nested: tuple[list[Tensor], dict[str, int]] = ([], {})
        self.memory = Memory()
        self.counts = np.zeros(2)
        self.total = torch.zeros(8)
        self.helpers = [nn.Linear(8, 8)]
        self.helpers[0].calls = 0

    @functools.lru_cache(maxsize=4)  # noqa: B019 - what users do
    def table(self, size: int) -> Tensor:
        return torch.arange(size, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x) * self.table(8)
        self.recent.append(h)
        self.nested[0].append(h)
        self.nested[1]["calls"] = self.nested[1].get("calls", 0) + 1
        self.memory.seen.append(h)
        self.memory.calls += 1
        self.counts += random.random()
        self.helpers[0].calls += 1
        return self.fc2(h.relu())


def test_python_state_of_the_user_stays() -> None:
    model, x = KeepsState(), torch.randn(3, 6)
    expected = model(x).detach()
    kept = (len(model.recent), len(model.nested[0]), dict(model.nested[1]), model.memory.calls)
    counts, state = model.counts.copy(), random.getstate()
    with model_unchanged(model):
        part = gs.partition(model, x, k=2)
        assert part.verify().ok
    assert kept == (len(model.recent), len(model.nested[0]), dict(model.nested[1]), model.memory.calls)
    assert [type(h) for h in (*model.recent, *model.nested[0], *model.memory.seen)] == [Tensor] * 3
    assert (model.counts == counts).all() and random.getstate() == state
    assert model.helpers[0].calls == 1
    assert type(model(x)) is Tensor and torch.equal(model(x), expected)


class Merging(nn.Linear):
    """Low-rank adaptation that is added to the weight in evaluation, as loralib's."""

    def __init__(self) -> None:
        super().__init__(6, 8)
        self.a, self.b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(8, 2))
        self.merged = False

    def train(self, mode: bool = True) -> "Merging":
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (self.b @ self.a) * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        return h if self.merged else h + x @ self.a.t() @ self.b.t()


def test_modes_that_write_to_weights_are_refused() -> None:
    model = nn.Sequential(Merging(), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(2, 6)
    with (
        model_unchanged(model),
        pytest.raises(UnsupportedError, match=r"Merging\.train\(False\) writes to weight.*module 0"),
    ):
        gs.trace(model, x)


class Clamps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.fc1.weight.data.clamp_(-0.05, 0.05)
        return self.fc2(self.fc1(x).relu())


def test_a_refused_model_keeps_its_weights() -> None:
    model, x = Clamps(), torch.randn(2, 6)
    with model_unchanged(model), pytest.raises(UserError):
        gs.trace(model, x)


class Counts(nn.Module):
    """Counts its calls, in evaluation too, and reads the count."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("decay", torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.decay.mul_(0.9)
        return self.fc2(self.fc1(x).relu()) / (1 + self.calls) * self.decay.float()


def test_certificates_do_not_count_as_calls() -> None:
    model, x = Counts(), torch.randn(3, 6)
    with model_unchanged(model):
        part = gs.partition(model, x, k=2)
        certificate = part.verify()
    assert certificate.ok, str(certificate)


def test_complex_inputs_are_widened_in_certificates() -> None:
    model = nn.Sequential(OrderedDict(real=Real(), fc1=nn.Linear(6, 8), relu=nn.ReLU(), fc2=nn.Linear(8, 3)))
    part = gs.partition(model, torch.randn(3, 6, dtype=torch.complex64), k=2)
    certificate = part.verify()
    assert certificate.ok and certificate.max_error < 1e-12, str(certificate)


class Real(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.real + x.imag


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types(dtype: torch.dtype) -> None:
    model = Net(lambda s, h: s.norm(torch.relu(h)), norm=nn.LayerNorm(8)).to(dtype)
    program = gs.trace(model, X.to(dtype))
    assert torch.equal(gs.emit(program)(X5.to(dtype)), model(X5.to(dtype)))


def test_a_second_step_follows_the_first() -> None:
    model = Net(lambda s, h: s.drop(s.norm(h)), norm=nn.BatchNorm1d(8), drop=nn.Dropout(0.5))
    module = emitted(model, X)
    for seed in range(3):
        found, expected = step(module, ((X5,), {}), seed), step(model, ((X5,), {}), seed)
        assert torch.equal(found.outputs, expected.outputs)
        for name, gradient in expected.gradients.items():
            torch.testing.assert_close(found.gradients[name], gradient, rtol=0, atol=1e-12)
    assert owned(module.state_dict()).keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name


@pytest.mark.parametrize("given", [False, True])
def test_a_mask_is_not_read_to_see_whether_it_is_causal(given: bool) -> None:
    """nn.Transformer does so where ``is_causal`` is left open, which torch.export cannot trace."""

    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = nn.Transformer(8, 2, 1, 1, 16, 0.0, batch_first=True)

        def forward(self, a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
            if mask is None:
                mask = nn.Transformer.generate_square_subsequent_mask(b.shape[1])
            return self.transformer(a, b, tgt_mask=mask)

    inputs = {"a": torch.randn(2, 5, 8), "b": torch.randn(2, 6, 8)}
    if given:
        inputs["mask"] = nn.Transformer.generate_square_subsequent_mask(6)
    certificate = gs.partition(Translator(), inputs, k=2).verify()
    assert certificate.ok, certificate


def test_packed_sequences_are_refused_with_what_to_write() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4, batch_first=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]

    with pytest.raises(TraceError) as caught:
        gs.trace(Tagger(), (torch.randn(2, 5, 3), torch.tensor([5, 3])))
    assert "padded sequences" in (caught.value.hint or "")
