"""Optimizers of fused models in which every model has settings of its own.

A setting is a number for all models, or one for each. What is computed is what ``torch.optim.SGD`` and
``torch.optim.AdamW`` compute for each model by itself. The learning rate of a parameter group, ``lr``, is a
factor on all rates, 1 at the start, so that the schedulers of ``torch.optim.lr_scheduler`` work as ever.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphsplit._fuse import FusedModule, known
from graphsplit.errors import UserError

Setting = float | Sequence[float]


class _PerModel(Optimizer, ABC):
    """Settings as vectors of K."""

    def __init__(self, module: FusedModule, settings: dict[str, Setting]) -> None:
        if not isinstance(module, FusedModule):
            raise UserError(
                f"a fused module is expected, and a {type(module).__name__} was given",
                hint="give what gs.fuse or partition.fuse() made, not its parameters",
            )
        parameters = list(module.parameters())
        if not parameters:
            raise UserError("there are no parameters to train")
        self.k = known(module).k
        vectors = {name: self._vector(name, value) for name, value in settings.items()}
        super().__init__(parameters, {"lr": 1.0, **vectors})

    def _vector(self, name: str, value: Setting) -> Tensor:
        try:
            found = torch.as_tensor(value, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{name} is {value!r}, expected a number, or one for each model") from error
        if found.dim() and found.shape != (self.k,):
            raise UserError(f"{len(found)} values of {name} for {self.k} models")
        if bool((found < 0).any()):
            raise UserError(f"{name} is below zero")
        return found.expand(self.k).clone()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group, self.state[parameter])
        return loss

    @abstractmethod
    def _update(self, p: nn.Parameter, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        """Change one parameter by its gradient."""


def _along(vector: Tensor, like: Tensor) -> Tensor:
    """An entry for each model as often as it has rows: the first dimension is K, or a multiple of it."""
    rows = vector.to(like).repeat_interleave(len(like) // len(vector))
    return rows.view(-1, *[1] * (like.dim() - 1))


class PerModelSGD(_PerModel):
    """``torch.optim.SGD`` for each of K fused models.

    Args:
        module: All of whose parameters are trained.
        rate: Learning rate.
        momentum: Of the running sum of gradients.
        weight_decay: Added to the gradient, times the parameter.
        nesterov: Look ahead along the running sum, for all models.

    Raises:
        UserError: A setting is negative, or has another number of values than there are models.
    """

    def __init__(
        self,
        module: FusedModule,
        rate: Setting = 1e-3,
        momentum: Setting = 0.0,
        weight_decay: Setting = 0.0,
        nesterov: bool = False,
    ) -> None:
        self.nesterov = nesterov
        settings = {"rate": rate, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(module, settings)

    def _update(self, p: nn.Parameter, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        g = g + _along(group["weight_decay"], p) * p
        if bool(group["momentum"].any()):
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = g.clone()
            else:
                state["momentum_buffer"].mul_(_along(group["momentum"], p)).add_(g)
            buffer = state["momentum_buffer"]
            g = g + _along(group["momentum"], p) * buffer if self.nesterov else buffer
        p.sub_(group["lr"] * _along(group["rate"], p) * g)


class PerModelAdamW(_PerModel):
    """``torch.optim.AdamW`` for each of K fused models (Loshchilov & Hutter, arXiv 1711.05101).

    Args:
        module: All of whose parameters are trained.
        rate: Learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Share of a parameter, times the rate, that every step takes off.

    Raises:
        UserError: A setting is negative, or has another number of values than there are models.
    """

    def __init__(
        self,
        module: FusedModule,
        rate: Setting = 1e-3,
        beta1: Setting = 0.9,
        beta2: Setting = 0.999,
        eps: Setting = 1e-8,
        weight_decay: Setting = 1e-2,
    ) -> None:
        settings = {"rate": rate, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
        super().__init__(module, settings)

    def _update(self, p: nn.Parameter, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        step = float(state["step"])
        rate = group["lr"] * _along(group["rate"], p)
        beta1, beta2 = _along(group["beta1"], p), _along(group["beta2"], p)
        first, second = state["exp_avg"], state["exp_avg_sq"]
        p.mul_(1 - rate * _along(group["weight_decay"], p))
        first.mul_(beta1).add_((1 - beta1) * g)
        second.mul_(beta2).add_((1 - beta2) * g.square())
        root = (second / (1 - beta2**step)).sqrt() + _along(group["eps"], p)
        p.sub_(rate / (1 - beta1**step) * first / root)
