"""The public face of ensembles."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from graphsplit._fuse import fuse, listed
from graphsplit.bundle import EnsembleBundle, program_of
from graphsplit.emission import ProgramModule, emit
from graphsplit.ensembles import Average, Body, Ensemble, InTurn, Rule, check_alike, least_squares
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
        average: ``"outputs"``, as they are; or ``"probabilities"``: the softmax of the outputs is averaged,
            and scores are given, its logarithm. Weights are not negative there.

    Raises:
        PlanError: There are no models, or not as many weights.
        UserError: Weights need data, or cannot be used so; what is given is no list of models.
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
    if isinstance(weights, str) and weights not in get_args(Weights):
        raise UserError(
            f"there are no weights {weights!r}", hint=f"give {', '.join(get_args(Weights))}, or K numbers"
        )
    given = bool(kwargs) or not (args is None or (isinstance(args, (tuple, list)) and not args))
    body = _body(models, args, kwargs, given=given)
    k = len(models)
    rule: Rule = "given"
    if not isinstance(weights, str):
        values = _checked(torch.as_tensor(weights, dtype=torch.float64), k, average)
    else:
        rule = weights
        values = torch.full((k,), 1 / k, dtype=torch.float64)
        if weights == "regression":
            if data is None:
                raise UserError(
                    "regression weights need data", hint="give data=, batches of inputs and targets"
                )
            with evaluating(body):
                values = least_squares(cast(Body, body), data, k, average)
    first = next((tensor for tensor in body.parameters() if tensor.dtype.is_floating_point), torch.zeros(()))
    made = Ensemble(body, values.to(first), rule, average)
    return made.train(all(model.training for model in models if isinstance(model, nn.Module)))


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
    models: Sequence[nn.Module | Program], args: Any, kwargs: Mapping[str, Any] | None, *, given: bool
) -> nn.Module:
    """The members, fused where that can be."""
    traced = [_traced(model, args, kwargs, given=given) for model in models]
    programs = [_program(model) for model in traced]
    known = [program for program in programs if program is not None]
    if len(known) < len(models):
        return InTurn(traced)
    check_alike(known)
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
    first = next((tensor for tensor in body.parameters() if tensor.dtype.is_floating_point), torch.zeros(()))
    made = Ensemble(body, weights.to(first), options["rule"], options["average"])
    return made.train(options["training"] is True)
