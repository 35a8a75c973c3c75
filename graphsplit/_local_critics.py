"""The public face of local critic training."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from graphsplit import costs
from graphsplit._layer_groups import LayerGroups, layer_groups
from graphsplit.bundle import program_of
from graphsplit.depth.critics import CriticFactory, Form, build_critic, main_tensor
from graphsplit.depth.cuts import Tied
from graphsplit.depth.plan import Measure
from graphsplit.emission import ProgramModule, emit
from graphsplit.errors import PartitionError, UserError
from graphsplit.passes.layer_groups import join, join_head
from graphsplit.program import Program, TensorMeta, meta_of
from graphsplit.signature import Outputs, as_call
from graphsplit.tracing import trace
from graphsplit.train.local import LocalEpoch, LocalLosses, Recipe, Stage, Watch
from graphsplit.train.loop import Batches, Metric, read_batch, seed_epoch
from graphsplit.train.losses import Named, PerSample, checked, per_sample


@dataclass(frozen=True)
class Complexity:
    """What a sub-model takes.

    Attributes:
        parameters: Number of scalars, the critic's included.
        critic_parameters: The critic's share of them.
        flops: Of the forward pass of one example, the critic's included.
        critic_flops: The critic's share of them.
    """

    parameters: int
    critic_parameters: int
    flops: float
    critic_flops: float


class LocalCritics:
    """Layer groups that train by local critics, each prefix a model of its own. Made by `local_critics`.

    Sub-model ``i`` is groups 0 to ``i`` with critic ``i``; sub-model ``n`` is the model itself. All share the
    modules of ``groups.modules`` and ``critics``, which `step` and `fit` train.

    Attributes:
        groups: The n + 1 layer groups.
        critics: The n critics.
        loss: One number for each example, of outputs and targets.
    """

    def __init__(
        self,
        groups: LayerGroups,
        critics: Sequence[nn.Module],
        loss: PerSample,
        output: Sequence[int],
        seed: int,
    ) -> None:
        self.groups = groups
        self.critics = list(critics)
        self.loss = loss
        self._output = tuple(output)
        self._seed = seed
        self._recipe = Recipe()
        self._steps = 0

    @property
    def n(self) -> int:
        """Number of critics."""
        return len(self.critics)

    @cached_property
    def stages(self) -> list[Stage]:
        """Each group with its critic."""
        found = []
        for number, group in enumerate(self.groups.modules):
            last = number == self.n
            main = self._output if last else (main_tensor(self.groups.frontiers[number]),)
            critic = None if last else self.critics[number]
            found.append(Stage(number, group, critic, main, self.loss, self._seed))
        return found

    def configure(self, recipe: Recipe) -> None:
        """Choose optimizers, schedules, precision and clipping; states of earlier ones are dropped."""
        self._recipe = recipe
        for stage in self.stages:
            stage.configure(recipe)

    def to(self, device: str | torch.device) -> LocalCritics:
        """Move every group and critic; optimizers are made anew."""
        for stage in self.stages:
            stage.group.to(device)
            if stage.critic is not None:
                stage.critic.to(device)
        self.configure(self._recipe)
        return self

    def backward(self, inputs: Any, targets: Any) -> LocalLosses:
        """Add the gradients of a batch to those of every group and critic, for a loop of one's own.

        Args:
            inputs: A tensor, a tuple of arguments or a mapping of keywords.
            targets: Of the loss.

        Raises:
            UserError: The loss does not fit, or is not finite; the group is named.
        """
        return self._run(inputs, targets, update=False)

    def step(self, inputs: Any, targets: Any) -> LocalLosses:
        """Train every group and critic on one batch, as `configure` says (Adam by default).

        Args:
            inputs: A tensor, a tuple of arguments or a mapping of keywords.
            targets: Of the loss.

        Raises:
            UserError: The loss does not fit, or is not finite; the group is named.
        """
        if not self.stages[0].learners:
            self.configure(self._recipe)
        return self._run(inputs, targets, update=True)

    def _run(self, inputs: Any, targets: Any, *, update: bool) -> LocalLosses:
        args, kwargs = as_call(inputs, None)
        values: Sequence[Any] = self.groups.program.signature.flatten(args, kwargs)
        losses: list[Tensor] = []
        differences: list[Tensor] = []
        for stage in self.stages:
            passed = stage.forward(values, targets, self._steps)
            losses.append(passed.losses.mean())
            if stage.number:
                before = self.stages[stage.number - 1]
                differences.append(before.learn(passed.losses))
                if update:
                    before.learners[1].update()
            if update:
                stage.learners[0].update()
            values = passed.handed
        self._steps += 1
        return LocalLosses(torch.stack(losses), torch.stack(differences) if differences else torch.zeros(0))

    def fit(
        self,
        data: Batches,
        epochs: int,
        *,
        test: Batches | None = None,
        error: Metric | None = None,
        device: str | torch.device = "cpu",
        on_epoch: Callable[[LocalEpoch], None] | None = None,
    ) -> list[LocalEpoch]:
        """Train for some epochs; call it again to go on.

        Args:
            data: Batches of inputs and targets, iterated over once in every epoch.
            epochs: How many.
            test: Batches to evaluate every sub-model on after each epoch.
            error: A second number to record, such as `gs.train.misclassified`.
            device: Where batches are sent, and where the modules are.
            on_epoch: Called with the record of every epoch; ``print`` shows progress.

        Returns:
            A record for each epoch.
        """
        if not self.stages[0].learners:
            self.configure(self._recipe)
        watch = Watch()
        records = []
        for number in range(epochs):
            with torch.random.fork_rng():
                seed_epoch(self._seed, None, number, data)
                record = self._epoch(data, number, torch.device(device))
            watch.look(record.losses)
            if test is not None:
                losses, errors = self.evaluate(test, error=error, device=device)
                record = replace(record, test_losses=losses, test_errors=errors)
            records.append(record)
            if on_epoch is not None:
                on_epoch(record)
        return records

    def _epoch(self, data: Batches, number: int, device: torch.device) -> LocalEpoch:
        for stage in self.stages:
            stage.train()
        totals = torch.zeros(2 * self.n + 1, dtype=torch.float64)
        examples = 0
        start = time.perf_counter()
        for batch in data:
            inputs, targets, size = read_batch(device, batch)
            found = self.step(inputs, targets)
            totals += size * torch.cat([found.groups, found.critics]).double().cpu()
            examples += size
            self._schedule(every_batch=True)
        if not examples:
            raise UserError(
                "the data gave no batch in this epoch",
                hint="give a DataLoader or a list: an iterator is empty after one epoch",
            )
        seconds = time.perf_counter() - start
        self._schedule(every_batch=False)
        means = (totals / examples).tolist()
        return LocalEpoch(
            number, tuple(means[: self.n + 1]), tuple(means[self.n + 1 :]), seconds=seconds, examples=examples
        )

    def _schedule(self, *, every_batch: bool) -> None:
        if self._recipe.step_every_batch == every_batch:
            for stage in self.stages:
                for learner in stage.learners:
                    if learner.scheduler is not None:
                        learner.scheduler.step()

    def evaluate(
        self, data: Batches, *, error: Metric | None = None, device: str | torch.device = "cpu"
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Loss, and error where one is given, of every sub-model, in eval mode; one pass over the data."""
        totals = torch.zeros(2, self.n + 1, dtype=torch.float64)
        examples = 0
        modes = [stage.group.training for stage in self.stages]
        for stage in self.stages:
            stage.train(False)
        with torch.no_grad():
            for batch in data:
                inputs, targets, size = read_batch(torch.device(device), batch)
                args, kwargs = as_call(inputs, None)
                values: Sequence[Any] = self.groups.program.signature.flatten(args, kwargs)
                for stage in self.stages:
                    values = stage.group.run_flat(values)
                    scores = stage.scores(values)
                    totals[0, stage.number] += (
                        size * checked(self.loss, scores, targets).double().mean().cpu()
                    )
                    if error is not None:
                        totals[1, stage.number] += size * error(scores, targets).double().cpu()
                examples += size
        for stage, mode in zip(self.stages, modes, strict=True):
            stage.train(mode)
        if not examples:
            raise UserError("the test data gave no batch", hint="an iterator is empty after it was read once")
        losses, errors = (tuple(row.tolist()) for row in totals / examples)
        return losses, errors if error is not None else ()

    def submodel_program(self, i: int) -> Program:
        """Sub-model ``i`` as a program, with the values that it has now."""
        if not 0 <= i <= self.n:
            raise PartitionError(f"there is no sub-model {i}", hint=f"they are numbered from 0 to {self.n}")
        programs = self.groups.current_programs()[: i + 1]
        prefix = join(programs, self.groups.program)
        if i == self.n:
            return prefix
        position = main_tensor(self.groups.frontiers[i])
        return join_head(prefix, self.critic_program(i), position, "critic")

    def submodel(self, i: int) -> ProgramModule:
        """Sub-model ``i``: groups 0 to ``i`` and critic ``i``, with the values that they have now.

        It takes the model's inputs and gives its critic's scores; sub-model ``n`` is the model. The
        parameters of the critic are called ``critic.*``.
        """
        return emit(self.submodel_program(i))

    def critic_program(self, i: int) -> Program:
        """Critic ``i`` as a program, with the values that it has now."""
        critic = self.critics[i]
        if isinstance(critic, ProgramModule):
            return program_of(critic)
        features = self.groups.frontiers[i][main_tensor(self.groups.frontiers[i])]
        device = next((p.device for p in critic.parameters()), torch.device("cpu"))
        return trace(critic, (torch.zeros(features.shape, dtype=features.dtype, device=device),))

    def complexity(self) -> tuple[Complexity, ...]:
        """Parameters and FLOPs of every sub-model, with the share of its critic."""
        batch = self._batch()
        found = []
        for i in range(self.n + 1):
            program = self.submodel_program(i)
            critic = self.critic_program(i) if i < self.n else None
            found.append(
                Complexity(
                    parameters=program.parameter_count(),
                    critic_parameters=critic.parameter_count() if critic else 0,
                    flops=costs.graph_flops(program.graph()) / batch,
                    critic_flops=costs.graph_flops(critic.graph()) / batch if critic else 0.0,
                )
            )
        return tuple(found)

    def _batch(self) -> int:
        """Examples in the traced batch."""
        graph = self.groups.program.graph("train")
        (closing,) = graph.find_nodes(op="output")
        return meta_of(closing.args[0][self._output[0]]).shape[0]

    def state_dict(self) -> dict[str, Any]:
        """Everything that training needs to go on: modules, optimizers, schedules, number of steps."""
        if not self.stages[0].learners:
            self.configure(self._recipe)
        return {
            "steps": self._steps,
            "stages": [[learner.state_dict() for learner in stage.learners] for stage in self.stages],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, under the same recipe."""
        if not self.stages[0].learners:
            self.configure(self._recipe)
        if len(state["stages"]) != len(self.stages):
            raise UserError(f"a state of {len(state['stages'])} groups for {len(self.stages)}")
        self._steps = int(state["steps"])
        for stage, states in zip(self.stages, state["stages"], strict=True):
            for learner, own in zip(stage.learners, states, strict=True):
                learner.load_state_dict(own)

    def __repr__(self) -> str:
        counts = ", ".join(f"{item.parameters:,}" for item in self.complexity())
        return f"LocalCritics of {self.groups.program.name}: sub-models of {counts} parameters"


def local_critics(
    model: nn.Module | Program | LayerGroups,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    n: int | None = None,
    balance: Measure = "flops",
    at: Sequence[str] | None = None,
    critic: Form | CriticFactory | None = None,
    loss: Named | PerSample = "cross_entropy",
    output: str | None = None,
    tied: Tied = "refuse",
    seed: int = 0,
) -> LocalCritics:
    """Cut a model into n + 1 layer groups with n local critics (Lee & Lee, arXiv 2102.01963).

    Args:
        model: The user's module, which is not changed, a traced `Program`, or layer groups made before.
        args: Example inputs: a tensor, a tuple by position or a dict by keyword.
        kwargs: Further example inputs by keyword.
        n: Number of critics, one less than groups; 1 unless ``at`` is given.
        balance: See `layer_groups`.
        at: Paths of the modules at whose start a new group begins, in place of balancing.
        critic: ``"conv"``, ``"conv3"`` or ``"linear"``, by the features if None, or a factory that makes a
            critic of the shapes of the features and of the output.
        loss: ``"cross_entropy"``, ``"mse"``, or a function of outputs and targets that gives one number for
            each example.
        output: Name of the output that the loss takes; needed where a model has several.
        tied: See `layer_groups`.
        seed: Of the critics' weights, of the order of the data and of dropout.

    Raises:
        PartitionError: The model cannot be cut so, or there is no critic for what crosses a cut.
        UserError: The output is not clear.
        TraceError, UnsupportedError, InputError: The model cannot be traced.
    """
    if isinstance(model, LayerGroups):
        groups = model
    else:
        count = None if at else (1 if n is None else n) + 1
        if at and n is not None and n != len(at):
            raise PartitionError(f"{len(at)} places make {len(at)} critics, and n is {n}", hint="leave out n")
        groups = layer_groups(model, args, kwargs, n=count, balance=balance, at=at, tied=tied)
    function = per_sample(loss)
    positions = [_output_position(groups.program, mode, output) for mode in range(len(groups.program.graphs))]
    wanted = _meta_of_output(groups.program, positions[0])
    critics = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for number, frontier in enumerate(groups.frontiers):
            features = frontier[main_tensor(frontier)]
            place = f"cut {number} ({groups.plan.groups[number + 1].source})"
            critics.append(build_critic(features, wanted, critic, place))
    return LocalCritics(groups, critics, function, positions, seed)


def _output_position(program: Program, mode: int, name: str | None) -> int:
    """The output that the loss takes: of that name, the only one of numbers, or the one called logits."""
    outputs: Outputs = program.signature.outputs[mode]
    (closing,) = program.graphs[mode].find_nodes(op="output")
    values = [
        position
        for position, node in enumerate(closing.args[0])
        if isinstance(node, torch.fx.Node)
        and isinstance(node.meta.get("value"), TensorMeta)
        and node.meta["value"].dtype.is_floating_point
    ]
    names = [outputs.names[position] for position in values]
    if name is not None:
        chosen = [place for place, known in zip(values, names, strict=True) if name in (known, _leaf(known))]
    else:
        chosen = values if len(values) == 1 else [p for p in values if _leaf(outputs.names[p]) == "logits"]
    if len(chosen) != 1:
        asked = f"an output called {name!r}" if name is not None else "one output"
        raise UserError(
            f"the loss takes {asked}, and the model gives {', '.join(names) or 'none of numbers'}",
            hint="give output= with one of these names",
        )
    return chosen[0]


def _leaf(name: str) -> str:
    """``logits`` of ``output.logits`` and of ``output['logits']``."""
    return name.replace("']", "").replace("['", ".").rpartition(".")[2]


def _meta_of_output(program: Program, position: int) -> TensorMeta:
    (closing,) = program.graph("train").find_nodes(op="output")
    return meta_of(closing.args[0][position])
