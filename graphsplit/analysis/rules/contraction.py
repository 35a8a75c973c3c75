"""Weighted sums: linear layers, matrix products, einsum.

Dimensions are named by letters, as in einsum. A letter that is in no output is contracted; one that both
operands and the output have is a batch dimension (heads); the others are free.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import fx

from graphsplit.analysis.facts import Facts, Path, argument, place_of, rule
from graphsplit.analysis.inference import Inference, whole
from graphsplit.analysis.units import Factors, Ids, seen_by, varying
from graphsplit.graphs import node_arg, node_list_arg


@dataclass
class Operand:
    """One operand of a contraction.

    Attributes:
        path: Its place among the node's arguments.
        node: The operand, or None for an intermediate result.
        labels: A letter for each dimension.
        shape: Sizes.
        factors: Its units.
        common: It is the same in all sub-models, so that units of another operand may cut it.
        data: It depends on the model's inputs.
        dims: The state dimension behind each letter, for parameters that can take the ids they meet.
    """

    path: Path | None
    node: fx.Node | None
    labels: str
    shape: tuple[int, ...]
    factors: Factors
    common: bool
    data: bool
    wanted: list[Ids] = field(default_factory=list)

    def size(self, label: str) -> int:
        """Size along a letter; 1 where the operand lacks it."""
        return self.shape[self.labels.index(label)] if label in self.labels else 1

    def varies(self, label: str) -> list[Ids]:
        """Factors that vary along a letter."""
        if label not in self.labels:
            return []
        dim = self.labels.index(label)
        return [ids for ids in self.factors if ids.shape[dim] > 1]

    def spread(self, ids: Ids, labels: str) -> Ids:
        """A factor of this operand with its dimensions at the places of ``labels``."""
        kept = [label for label in labels if label in self.labels]
        dropped = [dim for dim, label in enumerate(self.labels) if label not in labels]
        moved = np.transpose(ids, [self.labels.index(label) for label in kept] + dropped)
        for _ in dropped:
            moved = moved[..., 0]
        return moved.reshape([moved.shape[kept.index(label)] if label in kept else 1 for label in labels])


def operand_of(inference: Inference, path: Path, node: fx.Node, labels: str) -> Operand:
    """An operand with its facts; a parameter's new dimensions stay unset until it is clear what they meet."""
    unset = node.op == "get_attr" and node not in inference.common
    shape = inference.shape(node)
    factors = inference.known_factors(node) if unset else inference.factors(node)
    return Operand(path, node, labels, shape, factors, inference.is_common(node), node in inference.data)


@dataclass
class Contraction:
    """What `contract` found: the result as an operand for further steps, and its share of the facts."""

    result: Operand
    facts: Facts


def contract(inference: Inference, operands: list[Operand], output: str) -> Contraction:
    """Units of ``einsum(operands -> output)``."""
    units = inference.units
    facts = Facts(())
    labels = sorted({label for operand in operands for label in operand.labels})
    summed = [label for label in labels if label not in output]
    for operand in operands:
        _settle(inference, operand, operands, output)
    for label in labels:
        holders = [operand for operand in operands if operand.size(label) > 1]
        found = [(operand, ids) for operand in holders for ids in operand.varies(label)]
        if not found:
            _leave_whole(inference, holders, label)
            continue
        if label in summed and len(holders) == 1:
            # A kernel, or a plain sum: nothing on the other side could be divided with it.
            _share_along(inference, holders[0], label)
            continue
        meets_data = any(operand.data for operand in holders)
        if label in output and meets_data and not any(operand.data for operand, _ in found):
            # What is made of parameters has no units where an activation has none.
            for operand, _ in found:
                _share_along(inference, operand, label)
            continue
        plain = next((ids.ravel() for operand, ids in found if len(varying(ids)) == 1), None)
        for operand in holders:
            if operand.varies(label):
                continue
            if _unset(inference, operand, label):
                _meet(inference, operand, label, plain, found)
            elif _can_slice(operand, found) or label not in summed:
                lead, ids = found[0]
                met = [dim for dim in varying(ids) if operand.size(lead.labels[dim]) > 1]
                settled = units.settle(ids, met)
                if settled is not ids:
                    lead.factors = tuple(settled if own is ids else own for own in lead.factors)
                    found = [(holder, own) for holder in holders for own in holder.varies(label)]
                    if not lead.varies(label):
                        break
                operand.wanted.append(lead.spread(settled, operand.labels))
            else:
                facts.whole = "a sum over units against a tensor that has none"
                for holder, _ in found:
                    _share_along(inference, holder, label)
                break
        found = [(operand, ids) for operand in holders for ids in operand.varies(label)]
        if not found:
            continue
        lead, first = found[0]
        together = "".join(labels)
        for operand, ids in found[1:]:
            units.couple(lead.spread(first, together), operand.spread(ids, together))
    _free_dimensions(inference, operands, output)
    factors: list[Ids] = []
    # Where a weight is divided along a letter its cross weights are zero: the full sum is that of the part.
    weighted = {
        label for operand in operands if not operand.data for label in operand.labels if operand.varies(label)
    }
    for operand in operands:
        for ids in operand.factors:
            dims = tuple(dim for dim in varying(ids) if operand.labels[dim] in summed)
            if dims:
                covered = all(operand.labels[dim] in weighted for dim in dims)
                (facts.contracts if covered else facts.mixes).append((ids, dims))
            kept = operand.spread(ids, output)
            if varying(kept) and not any(_same_dims(kept, other) for other in factors):
                factors.append(kept)
        if operand.wanted and operand.path is not None:
            facts.expects[operand.path] = (*operand.factors, *operand.wanted)
    facts.outputs = tuple(factors)
    shape = tuple(max(operand.size(label) for operand in operands) for label in output)
    result = Operand(
        None, None, output, shape, facts.outputs,
        common=all(operand.common for operand in operands), data=any(operand.data for operand in operands),
    )  # fmt: skip
    return Contraction(result, facts)


def _same_dims(a: Ids, b: Ids) -> bool:
    return bool(set(varying(a)) & set(varying(b)))


def _settle(inference: Inference, operand: Operand, operands: list[Operand], output: str) -> None:
    """Decide what carries the units where a factor spans summed and kept, or batch and free letters."""
    settled = []
    for ids in operand.factors:
        mixed = [dim for dim in varying(ids) if operand.labels[dim] not in output]
        ids = inference.units.settle(ids, mixed)
        partners = [other for other in operands if other is not operand]
        batch = [
            dim for dim in varying(ids)
            if operand.labels[dim] in output and any(other.varies(operand.labels[dim]) for other in partners)
        ]  # fmt: skip
        if batch:
            free = [dim for dim in varying(ids) if dim not in batch and operand.labels[dim] in output]
            if _has_batch_units_only(partners, operand, batch, output):
                ids = inference.units.tie(ids, free)
            else:
                ids = inference.units.settle(ids, free)
        if varying(ids):
            settled.append(ids)
    operand.factors = tuple(settled)


def _share_along(inference: Inference, operand: Operand, label: str) -> None:
    for ids in operand.varies(label):
        inference.units.share(ids)
    dim = operand.labels.index(label)
    operand.factors = tuple(ids for ids in operand.factors if ids.shape[dim] == 1)


def _can_slice(operand: Operand, found: list[tuple[Operand, Ids]]) -> bool:
    """May units of the other operands cut this one?

    A value that all sub-models have may be cut, but for the model's inputs under a weight: every sub-model
    sees all of them.
    """
    if not operand.common:
        return False
    return not operand.data or any(other.data for other, _ in found)


def _has_batch_units_only(partners: list[Operand], operand: Operand, batch: list[int], output: str) -> bool:
    """True where another operand has units along the batch letters and nowhere else: they carry the units."""
    for dim in batch:
        for partner in partners:
            for ids in partner.varies(operand.labels[dim]):
                others = [d for d in varying(ids) if partner.labels[d] != operand.labels[dim]]
                if not any(partner.labels[d] in output for d in others):
                    return True
    return False


def _unset(inference: Inference, operand: Operand, label: str) -> bool:
    return operand.node is not None and inference.unset(operand.node, operand.labels.index(label))


def _refresh(inference: Inference, operand: Operand) -> None:
    """Take the factors of a parameter whose dimensions have been set so far."""
    assert operand.node is not None
    operand.factors = inference.known_factors(operand.node)


def _meet(
    inference: Inference, operand: Operand, label: str, plain: Ids | None, found: list[tuple[Operand, Ids]]
) -> None:
    """A parameter's dimension takes the ids of what it is multiplied with."""
    assert operand.node is not None
    dim = operand.labels.index(label)
    if plain is not None:
        inference.adopt(operand.node, dim, plain)
    else:
        lead, ids = found[0]
        fresh = inference.units.fresh(operand.shape[dim])
        inference.adopt(operand.node, dim, fresh)
        inference.units.couple(lead.spread(ids, label).ravel(), fresh)
    _refresh(inference, operand)


def _leave_whole(inference: Inference, holders: list[Operand], label: str) -> None:
    """Share a parameter along a letter that another operand has too, and no operand has units along."""
    if len(holders) < 2:
        return
    for operand in holders:
        if _unset(inference, operand, label):
            assert operand.node is not None
            inference.adopt(operand.node, operand.labels.index(label), None)
            _refresh(inference, operand)


def _free_dimensions(inference: Inference, operands: list[Operand], output: str) -> None:
    """New units along the free dimensions of a weight.

    Where an activation brings units of its own into the output (a layer over time or tokens of a tensor whose
    channels are units), the weight is kept whole: each sub-model applies its own copy to its slice.
    """
    for operand in operands:
        for dim, label in enumerate(operand.labels):
            if not _unset(inference, operand, label):
                continue
            assert operand.node is not None
            taken = any(
                other.data and varying(other.spread(ids, output))
                for other in operands if other is not operand
                for ids in other.factors
            )  # fmt: skip
            if taken or label not in output:
                inference.adopt(operand.node, dim, None)
            else:
                inference.adopt(operand.node, dim, inference.units.fresh(operand.shape[dim]))
            _refresh(inference, operand)


def add_bias(
    inference: Inference, facts: Facts, path: Path, bias: fx.Node | None, output: Operand, label: str
) -> None:
    """A bias along one letter of the output."""
    if bias is None:
        return
    position = output.labels.index(label)
    if inference.is_common(bias):
        found = [ids for ids in output.factors if ids.shape[position] > 1]
        if found:
            facts.expects[path] = (output.spread(found[0], label),)
        return
    for ids in output.factors:
        if varying(ids) == (position,):
            if bias.op == "get_attr":
                inference.adopt(bias, 0, ids.ravel())
            else:
                for own in inference.factors(bias):
                    inference.units.couple(own, ids.ravel())
            return
        if position in varying(ids):
            for own in inference.factors(bias):
                lifted = own.reshape([-1 if place == position else 1 for place in range(len(output.labels))])
                inference.units.couple(output.spread(ids, output.labels), lifted)
            return
    if inference.factors(bias):
        facts.whole = "a bias of units is added to a product that has none"
        inference.share(bias)


def _linear_operands(
    node: fx.Node, inference: Inference, multiplied: list[fx.Node], added: list[fx.Node]
) -> tuple[fx.Node, ...]:
    """Operands in which a product plus a sum is jointly linear."""
    varied = [operand for operand in multiplied if not inference.is_common(operand)]
    if len(varied) > 1:
        return ()
    return (*varied, *(operand for operand in added if not inference.is_common(operand)))


LETTERS = "abcdefghijklmnopqrstuvwxyz"


@rule("linear.default")
def linear(inference: Inference, node: fx.Node) -> Facts:
    """``y[..., o] = x[..., i] w[o, i] + b[o]``."""
    x, weight = node.args[:2]
    bias = argument(node, 2, "bias")
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    lead = LETTERS[: len(inference.shape(x)) - 1]
    if len(inference.shape(weight)) == 1:
        return whole(inference, node, "linear with a vector for a weight")
    found = contract(
        inference,
        [operand_of(inference, (0,), x, lead + "y"), operand_of(inference, (1,), weight, "zy")],
        lead + "z",
    )
    facts = found.facts
    add_bias(inference, facts, place_of(node, 2, "bias"), bias, found.result, "z")
    facts.linear = _linear_operands(node, inference, [x, weight], [bias] if bias is not None else [])
    return facts


def _matmul_labels(left: int, right: int) -> tuple[str, str, str]:
    """Letters of a ``matmul`` of operands with so many dimensions."""
    rank = max(left, right) - 2 if max(left, right) > 2 else 0
    batch = LETTERS[:rank]
    row = "" if left == 1 else "x"
    column = "" if right == 1 else "z"
    left_batch = batch[rank - (left - 2) :] if left > 2 else ""
    right_batch = batch[rank - (right - 2) :] if right > 2 else ""
    return left_batch + row + "y", right_batch + "y" + column, batch + row + column


@rule(
    "matmul.default",
    "bmm.default",
    "mm.default",
    "mv.default",
    "dot.default",
    "vdot.default",
    "__matmul__.default",
)
def matmul(inference: Inference, node: fx.Node) -> Facts:
    """``y[..., m, n] = a[..., m, k] b[..., k, n]``."""
    a, b = node.args[:2]
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
    left, right, output = _matmul_labels(len(inference.shape(a)), len(inference.shape(b)))
    found = contract(
        inference, [operand_of(inference, (0,), a, left), operand_of(inference, (1,), b, right)], output
    )
    found.facts.linear = _linear_operands(node, inference, [a, b], [])
    return found.facts


@rule("addmm.default", "addmv.default", "baddbmm.default", "addbmm.default")
def addmm(inference: Inference, node: fx.Node) -> Facts:
    """``y = beta c + alpha a b``; ``c`` is broadcast."""
    c, a, b = node.args[:3]
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node) and isinstance(c, fx.Node)
    if "addbmm" in str(node.target).replace("baddbmm", ""):
        return whole(inference, node, "addbmm sums over its batch")
    left, right, output = _matmul_labels(len(inference.shape(a)), len(inference.shape(b)))
    found = contract(
        inference, [operand_of(inference, (1,), a, left), operand_of(inference, (2,), b, right)], output
    )
    facts = found.facts
    _add_broadcast(inference, facts, (0,), c, found.result)
    facts.linear = _linear_operands(node, inference, [a, b], [c])
    return facts


def _add_broadcast(inference: Inference, facts: Facts, path: Path, c: fx.Node, result: Operand) -> None:
    shape = inference.shape(c)
    labels = result.labels[len(result.labels) - len(shape) :]
    if len(shape) == 1:
        if shape[0] > 1:
            add_bias(inference, facts, path, c, result, labels)
        return
    offset = len(result.labels) - len(shape)
    outputs = list(result.factors)
    divided = {dim - offset for ids in outputs for dim in varying(ids)}
    for dim in range(len(shape)):
        if dim not in divided and inference.unset(c, dim):
            inference.adopt(c, dim, None)
    for own in inference.factors(c):
        lifted = own.reshape((1,) * offset + own.shape)
        match = [ids for ids in outputs if _same_dims(ids, lifted)]
        for ids in match:
            inference.units.couple(ids, lifted)
        if not match:
            inference.units.share(own)
    own_dims = {dim for own in inference.factors(c) for dim in varying(own)}
    cuts = [seen_by(ids, shape) for ids in outputs]
    wanted = [cut for cut in cuts if varying(cut)]
    if any(dim not in own_dims for cut in wanted for dim in varying(cut)):
        facts.expects[path] = tuple(wanted)


def _without_ellipsis(terms: list[str], output: str, ranks: list[int]) -> tuple[list[str], str]:
    """Letters of their own for the dimensions that an ellipsis stands for, aligned from the right."""
    free = [
        letter for letter in LETTERS + LETTERS.upper() if not any(letter in term for term in (*terms, output))
    ]
    counts = [
        rank - len(term.replace("...", "")) if "..." in term else 0
        for term, rank in zip(terms, ranks, strict=True)
    ]
    batch = "".join(free[: max(counts, default=0)])
    named = [
        term.replace("...", batch[len(batch) - count :]) for term, count in zip(terms, counts, strict=True)
    ]
    return named, output.replace("...", batch)


@rule("tensordot.default")
def tensordot(inference: Inference, node: fx.Node) -> Facts:
    """A product summed over given dimensions of both operands."""
    a, b = node_arg(node), node_arg(node, 1)
    over: tuple[Any, Any] = (node.args[2], node.args[3])
    ranks = [len(inference.shape(operand)) for operand in (a, b)]
    left = list(LETTERS[: ranks[0]])
    right = list(LETTERS.upper()[: ranks[1]])
    summed = set()
    for first, second in zip(*over, strict=True):
        right[second] = left[first]
        summed.add(left[first])
    output = "".join(letter for letter in (*left, *right) if letter not in summed)
    found = contract(
        inference,
        [operand_of(inference, (0,), a, "".join(left)), operand_of(inference, (1,), b, "".join(right))],
        output,
    )
    found.facts.linear = _linear_operands(node, inference, [a, b], [])
    return found.facts


@rule("cdist.default", "_euclidean_dist.default")
def distances(inference: Inference, node: fx.Node) -> Facts:
    """``y[p, r]`` from ``a[p, m]`` and ``b[r, m]``: over units each sub-model has distances of its own."""
    a, b = node_arg(node), node_arg(node, 1)
    ranks = [len(inference.shape(operand)) for operand in (a, b)]
    lead = LETTERS[: max(ranks) - 2]
    first, second = (lead[len(lead) - rank + 2 :] for rank in ranks)
    found = contract(
        inference,
        [operand_of(inference, (0,), a, first + "xm"), operand_of(inference, (1,), b, second + "ym")],
        lead + "xy",
    )
    found.facts.mixes += found.facts.contracts
    found.facts.contracts = []
    return found.facts


@rule("bilinear.default")
def bilinear(inference: Inference, node: fx.Node) -> Facts:
    """``y[..., o] = a[..., i] w[o, i, j] b[..., j] + c[o]``."""
    a, b, weight = (node_arg(node, place) for place in range(3))
    bias = argument(node, 3, "bias")
    lead = LETTERS[: len(inference.shape(a)) - 1]
    operands = [
        operand_of(inference, (0,), a, lead + "w"),
        operand_of(inference, (2,), weight, "zwx"),
        operand_of(inference, (1,), b, lead + "x"),
    ]
    found = contract(inference, operands, lead + "z")
    add_bias(inference, found.facts, (3,), bias, found.result, "z")
    return found.facts


@rule("einsum.default")
def einsum(inference: Inference, node: fx.Node) -> Facts:
    """Any einsum without a letter twice in one operand."""
    equation: str = str(node.args[0]).replace(" ", "")
    tensors = node_list_arg(node, 1)
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    if not arrow:
        letters = sorted(set(inputs) - {",", "."})
        output = "".join(letter for letter in letters if inputs.count(letter) == 1)
    ranks = [len(inference.shape(tensor)) for tensor in tensors]
    terms, output = _without_ellipsis(terms, output, ranks)
    if any(len(set(term)) != len(term) for term in terms):
        return whole(inference, node, f"einsum {equation!r} with a diagonal")
    operands = [
        operand_of(inference, (1, position), tensor, term)
        for position, (tensor, term) in enumerate(zip(tensors, terms, strict=True))
    ]
    found = contract(inference, operands, output)
    found.facts.linear = _linear_operands(node, inference, tensors, [])
    return found.facts
