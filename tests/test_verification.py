"""The inputs that certificates are made with."""

import math

import pytest
import torch
from torch import Tensor, nn

import graphsplit as gs
from graphsplit.verification import Example, flat_inputs, other_batch


class Block(nn.Module):
    """Batch norms over nothing but the batch, as on maps of 1 x 1."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.norm = nn.Linear(8, 16), nn.BatchNorm1d(16)
        self.narrow, self.last = nn.Linear(16, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.narrow(torch.relu(self.norm(self.wide(x)))))


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "x",
    [drawn(2, 8), drawn(1, 8), torch.zeros(2, 8), torch.ones(1, 8)],
    ids=["two-examples", "one-example", "zeros", "ones"],
)
def test_certificate_through_batch_norms(x: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), *(Block() for _ in range(12)), nn.Linear(8, 3))
    certificate = gs.prune_units(model, x).verify()
    assert certificate.ok, certificate


class Sum(nn.Module):
    """Takes anything of one batch size."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.stack([x.double().flatten(1).sum(1) for x in inputs]).sum(0)


def grown(*inputs: Tensor) -> list[Tensor]:
    """The second batch of a certificate, of these as example inputs."""
    signature = gs.trace(Sum(), inputs).signature
    found = other_batch(signature, flat_inputs(signature, Example(None, inputs, {})))
    assert found is not None
    assert [x.shape for x in found] == [(len(x) + 1, *x.shape[1:]) for x in inputs]
    return found


def all_differ(x: Tensor) -> bool:
    return len(x.flatten(1).unique(dim=0)) == len(x)


def test_second_batch_has_no_equal_examples() -> None:
    for count in (2, 3, 7):
        x = drawn(count, 3, 4)
        (found,) = grown(x)
        assert all_differ(torch.cat([found, x.double()])), "and none of the first batch"
        assert 0.6 < float(found.std() / x.std()) < 1.4


def test_mixtures_keep_what_holds_for_every_example() -> None:
    boxes = torch.tensor([[0.1, 0.2, 0.3, 0.9], [0.0, 0.7, 0.4, 1.0]])
    shares = torch.softmax(drawn(3, 5), 1)
    times = torch.arange(12.0).reshape(3, 4).cumsum(1)
    (found,) = grown(boxes)
    assert (found[:, 0] < found[:, 2]).all() and (found[:, 1] < found[:, 3]).all()
    assert (found >= 0).all() and (found <= 1).all()
    (found,) = grown(shares)
    assert (found > 0).all() and torch.allclose(found.sum(1), torch.ones(4, dtype=torch.float64))
    (found,) = grown(times)
    assert (found.diff(dim=1) > 0).all()
    x = drawn(2, 3)
    x[:, 1] = -math.inf
    (found,) = grown(x)
    assert (found[:, 1] == -math.inf).all() and found[:, [0, 2]].isfinite().all()


def test_what_has_no_mixtures_is_repeated() -> None:
    tokens = torch.arange(6).reshape(2, 3)
    hot = torch.eye(3)[:2]
    added = torch.zeros(2, 3).masked_fill(
        torch.tensor([[False, True, True], [False, False, True]]), -math.inf
    )
    flags = torch.tensor([[True, False], [True, True]])
    grid = torch.linspace(0, 1, 5).expand(2, 5)
    x = drawn(2, 3)
    *others, mixed = grown(tokens, hot, added, flags, grid, x)
    for own, found in zip((tokens, hot, added, flags, grid), others, strict=True):
        assert torch.equal(found, own[[0, 1, 0]].to(found.dtype))
    assert all_differ(mixed)


def test_one_example_is_varied_where_it_stands_twice() -> None:
    x, mask, tokens = drawn(1, 5), torch.ones(1, 5), torch.arange(5)[None]
    signature = gs.trace(Sum(), (x, mask)).signature
    first = flat_inputs(signature, Example(None, (x, mask), {}))
    assert torch.equal(first[0][:1], x.double()) and all_differ(first[0])
    assert (first[0].sign() == x.sign()).all() and (first[0].abs() <= x.abs()).all()
    assert torch.equal(first[1], mask.expand(2, 5).double())
    signature = gs.trace(Sum(), (tokens, mask)).signature
    first = flat_inputs(signature, Example(None, (tokens, mask), {}))
    assert torch.equal(first[0], tokens.expand(2, 5)), "there is no telling which tokens there are"
    assert torch.equal(first[1], mask.expand(2, 5).double()), "a mask beside tokens stays one"
    x = drawn(3, 5)
    signature = gs.trace(Sum(), (x,)).signature
    assert torch.equal(flat_inputs(signature, Example(None, (x,), {}))[0], x.double())


def test_numbers_of_the_default_dtype_that_are_made_from_whole_ones() -> None:
    """Timesteps times frequencies from ``arange``: in float64 they were float32 beside float64 weights."""

    class Timed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

        def forward(self, t: Tensor) -> Tensor:
            rates = torch.exp(torch.arange(4) * -0.7)
            angles = t[:, None] * rates
            return self.layers(torch.cat((angles.sin(), (t[:, None] / 3).expand(-1, 4)), -1))

    part = gs.partition(Timed(), torch.arange(5), k=2)
    certificate = part.verify()
    assert certificate.ok, certificate
    merged = part.merge().double()
    assert merged(torch.arange(5)).dtype == torch.float64
    nodes = len(merged.graph_of("eval").nodes)
    merged.float().double()
    assert len(merged.graph_of("eval").nodes) == nodes
    assert merged(torch.arange(5)).dtype == torch.float64
