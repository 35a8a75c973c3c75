"""The public face of ensembles."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from graphsplit._fuse import fuse, listed
from graphsplit.answers import Answers, checked_answers
from graphsplit.bundle import EnsembleBundle, program_of
from graphsplit.emission import ProgramModule, emit
from graphsplit.ensembles import (
    Average,
    Averaged,
    Ensemble,
    InTurn,
    Rule,
    averaged,
    check_alike,
    check_averaged,
    least_squares,
)
from graphsplit.errors import PlanError, UnsupportedError, UserError
from graphsplit.program import Program
from graphsplit.tracing import trace
from graphsplit.train.loop import Batches, evaluating

Weights = Literal["simple", "regression", "margin"]


def ensemble(
    models: Sequence[nn.Module | Program],
    weights: Weights | Tensor | Sequence[float] = "simple",
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    data: Batches | None = None,
    average: Average = "outputs",
    answers: Answers | None = None,
) -> Ensemble:
    """K models as one module, whose output is the weighted sum of theirs; it takes over a copy of them.

    Members are run as one fused module where their architectures agree and they are traced, or can be; else
    one after the other. Sub-models of a partition are members like any others, also those of unlike shares.

    Args:
        models: Modules, which are not changed, or programs.
        weights: ``"simple"`` (1 / K, EC-DNN eq. 5), ``"regression"`` (least squares on ``data``, eq. 7),
            ``"margin"`` (1 / K, but each example's own in training where the targets are known, eq. 8: see
            `Ensemble.for_targets`), or K numbers.
        args: Example inputs, for modules that are not traced yet. Without them the ensemble works, but cannot
            be fused, verified, exported or saved as a bundle.
        kwargs: Further example inputs by keyword.
        data: Batches of inputs and targets, for regression.
        average: ``"outputs"``, as they are; or ``"probabilities"``: those that the first tensor of outputs
            stands for are averaged, and scores are given, their logarithm. Weights are not negative there.
        answers: What outputs are, where targets and shapes cannot tell: ``"classes"``, scores with classes
            in dimension 1, as `torch.nn.functional.cross_entropy` has them (softmax); ``"classes_last"``, in
            the last one, as sequence models have them; ``"binary"``, a score of yes or no in every number
            (sigmoid); or ``"values"``.

    Raises:
        PlanError: There are no models, or not as many weights.
        UserError: Weights need data, or cannot be used so; what is given is no list of models; it is not
            known what outputs are, or they give nothing to average.
        InputError: The models differ in inputs or outputs.
        TraceError, UnsupportedError: A model cannot be traced.

    Example::

        team = gs.ensemble([m1, m2, m3], weights="regression", args=x, data=loader)
        team.verify(); gs.export_onnx(team, "team.onnx"); gs.save(team, "team/")
    """
    models = listed(models)
    if not models:
        raise PlanError("there are no models to make an ensemble of")
    if average not in get_args(Average):
        raise UserError(f"average is {average!r}, expected 'outputs' or 'probabilities'")
    checked_answers(answers)
    if isinstance(weights, str) and weights not in get_args(Weights):
        raise UserError(
            f"there are no weights {weights!r}", hint=f"give {', '.join(get_args(Weights))}, or K numbers"
        )
    given = bool(kwargs) or not (args is None or (isinstance(args, (tuple, list)) and not args))
    settled = averaged("outputs" if weights == "regression" else average, answers)  # else the data tell
    body = _body(models, args, kwargs, settled, given=given)
    k = len(models)
    rule: Rule = "given"
    if not isinstance(weights, str):
        values = _checked(_numbers(weights), k, average)
        untraced = not given and not all(isinstance(model, (Program, ProgramModule)) for model in models)
        if isinstance(weights, Tensor) and untraced and abs(float(values.sum()) - 1) > 1e-3:
            warnings.warn(
                f"a tensor of sum {float(values.sum()):.3g} is taken as weights; example inputs are args=",
                stacklevel=2,
            )
    else:
        rule = weights
        values = torch.full((k,), 1 / k, dtype=torch.float64)
        if weights == "regression":
            if data is None:
                raise UserError(
                    "regression weights need data", hint="give data=, batches of inputs and targets"
                )
            with evaluating(body):
                sums = least_squares(body, data, k, average, answers)
            values, answers = sums.weights(), sums.answers
    made = Ensemble(body, values, rule, average, answers)
    return made.train(all(model.training for model in models if isinstance(model, nn.Module)))


def _numbers(weights: Any) -> Tensor:
    """Weights that the user gave, in float64.

    Raises:
        UserError: They are no numbers.
    """
    try:
        found = torch.as_tensor(weights)
        if not found.is_complex():
            return found.to(torch.float64)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise UserError(
        f"weights are a {type(weights).__name__}, and no list of real numbers",
        hint=f"give one for each model, or {', '.join(get_args(Weights))}; example inputs are args=",
    )


def _checked(weights: Tensor, k: int, average: Average) -> Tensor:
    if weights.shape != (k,):
        raise PlanError(
            f"weights of shape {tuple(weights.shape)} for {k} models",
            hint="give one number for each; example inputs are args=",
        )
    if not all(map(math.isfinite, weights.tolist())):
        raise UserError(f"weights are {weights.tolist()}, and have to be finite")
    if average == "probabilities" and (bool((weights < 0).any()) or not float(weights.sum()) > 0):
        raise UserError("weights of probabilities cannot be negative, nor all zero")
    return weights


def _body(
    models: Sequence[nn.Module | Program],
    args: Any,
    kwargs: Mapping[str, Any] | None,
    average: Averaged,
    *,
    given: bool,
) -> nn.Module:
    """The members, fused where that can be."""
    traced = [_traced(model, args, kwargs, given=given) for model in models]
    programs = [_program(model) for model in traced]
    known = [program for program in programs if program is not None]
    if len(known) < len(models):
        return InTurn(traced)
    check_alike(known)
    check_averaged(known[0], average)
    try:
        return fuse(known)
    except UnsupportedError:  # they are of different architectures
        return InTurn(traced)


def _traced(
    model: nn.Module | Program, args: Any, kwargs: Mapping[str, Any] | None, *, given: bool
) -> nn.Module:
    """A copy of a model as a module that runs a program, where example inputs are known."""
    if isinstance(model, Program):
        return emit(model)
    if type(model) is ProgramModule:
        return emit(program_of(model)).train(model.training)
    if given:
        return emit(trace(model, args, kwargs)).train(model.training)
    return copy.deepcopy(model)


def _program(model: nn.Module) -> Program | None:
    return program_of(model) if isinstance(model, ProgramModule) else None


def from_bundle(found: EnsembleBundle) -> Ensemble:
    """What a bundle holds."""
    options = found.options
    body = fuse(found.members) if options["fused"] else InTurn([emit(program) for program in found.members])
    weights = torch.tensor(found.weights, dtype=torch.float64)
    made = Ensemble(body, weights, options["rule"], options["average"], options.get("answers"))
    return made.train(options["training"] is True)
