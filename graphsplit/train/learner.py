"""A module with what updates it: optimizer, learning-rate schedule, scaling of losses, clipping."""

from __future__ import annotations

import copy
import inspect
import numbers
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from graphsplit.errors import UserError
from graphsplit.train.checks import LEARNING, check

if TYPE_CHECKING:
    from collections.abc import Iterator

Given = TypeVar("Given")
Made = TypeVar("Made")
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

    Raises:
        UserError: A setting is out of range.
    """

    optimizer: OptimizerFactory = adam
    scheduler: SchedulerFactory | None = None
    step_every_batch: bool = False
    amp: torch.dtype | None = None
    clip: float | None = None

    def __post_init__(self) -> None:
        check(vars(self), LEARNING)


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast in this dtype, or nothing."""
    if dtype is None:
        yield
        return
    with torch.autocast(device.type, dtype):
        yield


class Learner:
    """A module with what updates it; one without parameters is never updated.

    Attributes:
        facts: Of optimizer and schedule before the first step, see `learning_facts`.

    Raises:
        UserError: The optimizer or the schedule cannot be used.
    """

    def __init__(self, module: nn.Module, make: OptimizerFactory, recipe: Learning) -> None:
        self.module = module
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = _checked(made("optimizer", make, module), self.trained) if self.trained else None
        self.scheduler = (
            made("scheduler", recipe.scheduler, self.optimizer)
            if recipe.scheduler and self.optimizer
            else None
        )
        check_scheduler(self.scheduler)
        self.facts = learning_facts(self.optimizer, self.scheduler)
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


def _checked(optimizer: Any, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    """What a user's function has made of a module.

    Raises:
        UserError: It is no optimizer, or none of this module, or one that needs more than gradients.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(
            f"optimizer makes a {type(optimizer).__name__}, expected an optimizer of torch",
            hint=_EXAMPLES["optimizer"],
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UserError("LBFGS computes the loss again in every step", hint="give one that takes gradients")
    own = {id(parameter) for parameter in trained}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise UserError(
            "the optimizer has no parameter of the module that it is made for",
            hint="use the module that the function is given, as models are copied",
        )
    return optimizer


_EXAMPLES = {
    "optimizer": "give a function of a module: lambda m: torch.optim.SGD(m.parameters(), lr=0.1)",
    "scheduler": "give a function of an optimizer: lambda o: torch.optim.lr_scheduler.StepLR(o, 10)",
}


def made(what: str, make: Callable[[Given], Made], given: Given) -> Made:
    """What a function of the user's makes.

    Raises:
        UserError: It takes other arguments than the one it is called with.
    """
    try:
        inspect.signature(make).bind(given)
    except TypeError as error:
        name = getattr(make, "__name__", type(make).__name__)
        raise UserError(f"{what} cannot be made by {name}: {error}", hint=_EXAMPLES[what]) from error
    except ValueError:  # one without a signature
        pass
    kind: Any = make
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer):
        raise UserError(f"optimizer is the class {kind.__name__}", hint=_EXAMPLES[what])
    return make(given)


def check_scheduler(scheduler: Any) -> None:
    """Refuse a schedule that follows what is trained.

    Raises:
        UserError: It does.
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        raise UserError(
            "ReduceLROnPlateau follows the loss of one model, so that those that train apart would part ways",
            hint="use a scheduler that counts steps",
        )


def learning_facts(optimizer: torch.optim.Optimizer | None, scheduler: LRScheduler | None) -> dict[str, Any]:
    """Classes and settings of an optimizer and a schedule that have not yet made a step, as plain data."""
    groups = [] if optimizer is None else optimizer.param_groups
    facts: dict[str, Any] = {"optimizer": _name(optimizer), "scheduler": _name(scheduler)}
    facts["number of parameter groups"] = len(groups)
    for place, group in enumerate(groups):
        where = f" of group {place}" if len(groups) > 1 else ""
        settings = {name: value for name, value in group.items() if name not in ("params", "param_names")}
        facts |= {f"optimizer's {name}{where}": _plain(value) for name, value in settings.items()}
    state = {} if scheduler is None else scheduler.state_dict()
    return facts | {f"scheduler's {name}": _plain(value) for name, value in state.items()}


def _name(value: object) -> str | None:
    return None if value is None else type(value).__name__


def _plain(value: Any) -> Any:
    """Numbers and texts as they are, also nested; of all else the kind."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, numbers.Real):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return type(value).__name__
