"""A module with what updates it: optimizer, learning-rate schedule, scaling of losses, clipping."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

if TYPE_CHECKING:
    from collections.abc import Iterator

OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], LRScheduler]


def adam(module: nn.Module) -> torch.optim.Optimizer:
    """Adam with a learning rate of 0.001."""
    return torch.optim.Adam(module.parameters(), lr=1e-3)


@dataclass(frozen=True)
class Learning:
    """How a module is trained.

    Attributes:
        optimizer: Makes the optimizer of a module.
        scheduler: Makes the learning-rate schedule of an optimizer, stepped after every epoch.
        step_every_batch: Step schedules after every batch instead.
        amp: Run forward passes under autocast in this dtype; float16 scales losses.
        clip: Largest norm of the gradient of a module.
    """

    optimizer: OptimizerFactory = adam
    scheduler: SchedulerFactory | None = None
    step_every_batch: bool = False
    amp: torch.dtype | None = None
    clip: float | None = None


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast in this dtype, or nothing."""
    if dtype is None:
        yield
        return
    with torch.autocast(device.type, dtype):
        yield


class Learner:
    """A module with what updates it; one without parameters is never updated."""

    def __init__(self, module: nn.Module, make: OptimizerFactory, recipe: Learning) -> None:
        self.module = module
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = make(module) if self.trained else None
        self.scheduler = recipe.scheduler(self.optimizer) if recipe.scheduler and self.optimizer else None
        device = self.trained[0].device.type if self.trained else "cpu"
        self.scaler = torch.amp.GradScaler(device, enabled=recipe.amp == torch.float16)
        self.clip = recipe.clip
        self.updates = 0

    def update(self) -> None:
        """One step of the optimizer with the gradients that are there, which are then dropped."""
        if self.optimizer is None:
            return
        self.updates += 1
        if self.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.trained, self.clip)
        if any(parameter.grad is not None for parameter in self.trained):
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Everything that has to be known to go on."""
        parts = {"module": self.module, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return {name: part.state_dict() for name, part in parts.items() if part is not None} | {
            "scaler": self.scaler.state_dict()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.module.load_state_dict(state["module"])
        self.scaler.load_state_dict(state["scaler"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # which would share tensors
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
