"""What outputs mean: the kind of answer that they give, and where its classes are.

The one place that turns outputs into probabilities, for averages, weights, labels and errors alike. Targets
tell the kind by dtype and shape; where they cannot, the user says it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from graphsplit.errors import UserError

Answers = Literal["classes", "classes_last", "binary", "values"]
"""Scores of classes in dimension 1, as `torch.nn.functional.cross_entropy` has them, or in the last one, as
sequence models give them; a score of yes or no in every number; or values as they are."""

IGNORED = -100
"""The class of a position that does not count, as in `torch.nn.functional.cross_entropy`."""


def checked_answers(answers: str | None) -> None:
    """Refuse a kind of answer that there is not.

    Raises:
        UserError: It is none of them.
    """
    if answers is not None and answers not in get_args(Answers):
        raise UserError(f"answers is {answers!r}, expected one of {', '.join(get_args(Answers))}")


def answers_for(outputs: Tensor, targets: Any) -> Answers:
    """What outputs ``[N, ...]`` are, as targets tell.

    Whole numbers of the shape of the outputs without their dimension of classes are classes; whole numbers,
    or bools, of the very shape of the outputs are yes and no. All else makes outputs values.

    Raises:
        UserError: Targets are whole numbers, and fit in no way, or in two.
    """
    if not is_whole(targets):
        return "values"
    if targets.shape != outputs.shape:
        kind = classes_in(outputs.shape, targets.shape)
        check_shape(kind, outputs.shape)
        return kind
    if bool(((targets != 0) & (targets != 1)).any()):
        raise UserError(
            f"targets are whole numbers of the shape {tuple(outputs.shape)} of the outputs, not only 0 and 1",
            hint="classes have the shape without the dimension of classes; for numbers give answers='values'",
        )
    return "binary"


def classes_in(
    scores: Sequence[int],
    targets: Sequence[int],
    hint: str = "say which it is: answers='classes', or answers='classes_last'",
) -> Literal["classes", "classes_last"]:
    """Which dimension of scores of a shape is that of the classes, for targets of a shape.

    Raises:
        UserError: The shapes do not fit, or fit in two ways; the hint is what to do then.
    """
    shape, places = tuple(scores), tuple(targets)
    last = shape[:-1] == places
    second = len(shape) > 1 and (shape[0], *shape[2:]) == places
    if not last and not second:
        raise UserError(
            f"targets {places} do not fit scores {shape}",
            hint="targets have the shape of the scores without the dimension of classes",
        )
    if last and second and len(shape) > 2:
        raise UserError(f"classes of scores {shape} may be in dimension 1 or in the last one", hint=hint)
    return "classes" if second else "classes_last"


def answers_by_shape(shape: Sequence[int]) -> Answers:
    """What scores of a shape are where no targets tell: classes in dimension 1, unless that is not sure.

    Raises:
        UserError: The shape has no dimension of several classes, or may have it in two places.
    """
    check_shape("classes", shape)
    if len(shape) == 3:
        raise UserError(
            f"classes of scores {tuple(shape)} may be in dimension 1 or in the last one",
            hint="say which it is: answers='classes', or answers='classes_last'",
        )
    return "classes"


def check_shape(answers: Answers, shape: Sequence[int]) -> None:
    """Refuse outputs of a shape that cannot give such answers.

    Raises:
        UserError: There is no dimension of classes, or one of a single class.
    """
    if answers in ("binary", "values"):
        return
    if len(shape) < 2:
        raise UserError(
            f"outputs {tuple(shape)} have no dimension of classes",
            hint="give average='outputs', or answers='binary' for scores of yes or no",
        )
    if shape[classes_dim(answers)] == 1:
        raise UserError(
            f"scores {tuple(shape)} are of a single class, whose probability is always one",
            hint="give answers='binary' for scores of yes or no, answers='values' for numbers; or targets of "
            "the same shape",
        )


def classes_dim(answers: Answers) -> int:
    """The dimension of classes in scores ``[N, ...]``."""
    return 1 if answers == "classes" else -1


def probabilities(outputs: Tensor, answers: Answers) -> Tensor:
    """The answers of outputs ``[N, ...]``: probabilities where they are scores, else the outputs."""
    if answers == "values":
        return outputs
    if answers == "binary":
        return outputs.sigmoid()
    return outputs.softmax(classes_dim(answers))


def answer_count(answers: Tensor, kind: Answers) -> int:
    """How many answers there are in ``[N, ...]``: a vector of classes is one."""
    if kind in ("binary", "values"):
        return answers.numel()
    return answers.numel() // answers.shape[classes_dim(kind)]


def two_classes(scores: Tensor) -> Tensor:
    """Scores of yes or no ``[...]`` as those of two classes, ``[..., 2]``."""
    return torch.stack([torch.zeros_like(scores), scores], -1)


def checked_classes(targets: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Targets as indices of classes, with 0 where they do not count, and which of them count.

    Raises:
        UserError: One names a class that there is not.
    """
    targets = targets.long()
    counted = targets != IGNORED
    wrong = counted & ((targets < 0) | (targets >= classes))
    if bool(wrong.any()):
        raise UserError(
            f"targets name class {int(targets[wrong][0])} of {classes}",
            hint=f"classes are numbered from 0; positions of {IGNORED} do not count",
        )
    return targets.masked_fill(~counted, 0), counted


def is_whole(targets: Any) -> bool:
    """True for a tensor of whole numbers or bools."""
    return isinstance(targets, Tensor) and not (targets.is_floating_point() or targets.is_complex())


def log_sum(logs: Tensor) -> Tensor:
    """``logsumexp`` over dimension 0, whose gradient is zero, and not NaN, where all are minus infinity."""
    never = (logs == -math.inf).all(0)
    return torch.logsumexp(logs.masked_fill(never, 0.0), 0).masked_fill(never, -math.inf)
