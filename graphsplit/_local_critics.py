"""The public face of local critic training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphsplit import costs
from graphsplit._layer_groups import LayerGroups, layer_groups
from graphsplit.bundle import DepthBundle, program_of
from graphsplit.depth.anytime import Anytime
from graphsplit.depth.critics import CriticFactory, Form, build_critic, main_tensor
from graphsplit.depth.plan import Measure, Tied
from graphsplit.drawing import snippet
from graphsplit.drawing.division import Division
from graphsplit.emission import ProgramModule, emit
from graphsplit.errors import PartitionError, UserError
from graphsplit.passes.layer_groups import join, join_head
from graphsplit.program import Program, TensorMeta, meta_of
from graphsplit.signature import Outputs, as_call
from graphsplit.tracing import trace
from graphsplit.train.local import LocalEpoch, LocalLosses, LocalTraining
from graphsplit.train.loop import Batches, Metric
from graphsplit.train.losses import NAMED, Named, PerSample, per_sample
from graphsplit.train.stage import Recipe, Stage


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
        self._traced: dict[tuple[int, torch.device], Program] = {}

    @property
    def n(self) -> int:
        """Number of critics."""
        return len(self.critics)

    @property
    def mains(self) -> tuple[int, ...]:
        """Which of what a group gives its critic takes; of the last, which output is the answer (eval)."""
        return (*(main_tensor(frontier) for frontier in self.groups.frontiers), self._output[-1])

    @property
    def stages(self) -> list[Stage]:
        """Each group with its critic."""
        return self.training.stages

    @cached_property
    def training(self) -> LocalTraining:
        """What trains the stages."""
        found = []
        for number, group in enumerate(self.groups.modules):
            last = number == self.n
            main = self._output if last else (self.mains[number],)
            critic = None if last else self.critics[number]
            found.append(Stage(number, group, critic, main, self.loss, self._seed))
        output = _meta_of_output(self.groups.program, self._output[0])
        return LocalTraining(found, self.flatten, self.loss, output, self._seed)

    def flatten(self, inputs: Any) -> Sequence[Any]:
        """Values of the model's inputs, in order, of a tensor, a tuple of arguments or a mapping."""
        return self.groups.program.signature.flatten(*as_call(inputs, None))

    def configure(self, recipe: Recipe) -> None:
        """Choose optimizers, schedules, precision and clipping; states of earlier ones are dropped."""
        self.training.configure(recipe)

    def to(self, *devices: str | torch.device) -> LocalCritics:
        """Move every group with its critic to a device, or each to one of its own; optimizers are made anew.

        Args:
            devices: One for all, or one for each group. On several CUDA devices groups overlap, as nothing
                waits for what is behind it.
        """
        if len(devices) not in (1, len(self.stages)):
            raise UserError(f"{len(devices)} devices for {len(self.stages)} groups")
        for stage, device in zip(self.stages, devices * (len(self.stages) // len(devices)), strict=True):
            for module in stage.modules:
                module.to(device)
        self.configure(self.training.recipe)
        return self

    def backward(self, inputs: Any, targets: Any) -> LocalLosses:
        """Add the gradients of a batch to those of every group and critic, for a loop of one's own.

        Args:
            inputs: A tensor, a tuple of arguments or a mapping of keywords.
            targets: Of the loss.

        Raises:
            UserError: The loss does not fit, or is not finite; the group is named.
        """
        return self.training.step(inputs, targets, update=False)

    def step(self, inputs: Any, targets: Any) -> LocalLosses:
        """Train every group and critic on one batch, as `configure` says (Adam by default).

        Args:
            inputs: A tensor, a tuple of arguments or a mapping of keywords.
            targets: Of the loss.

        Raises:
            UserError: The loss does not fit, or is not finite; the group is named.
        """
        return self.training.step(inputs, targets)

    def fit(
        self,
        data: Batches,
        epochs: int,
        *,
        test: Batches | None = None,
        error: Metric | None = None,
        parallel: bool = False,
        queue: int = 1,
        checkpoint: str | Path | None = None,
        on_epoch: Callable[[LocalEpoch], None] | None = None,
    ) -> list[LocalEpoch]:
        """Train for some epochs.

        Args:
            data: Batches of inputs and targets, iterated over once in every epoch.
            epochs: How many; with a checkpoint, up to which number.
            test: Batches to evaluate every sub-model on after each epoch.
            error: A second number to record, such as `gs.train.misclassified`.
            parallel: One group in each process that torchrun started; all read the same data.
            queue: Batches that a group may be ahead of the losses that its critic learns from. With 1 all
                numbers are those of one process.
            checkpoint: A folder to save every epoch in, and to go on from.
            on_epoch: Called with the record of every epoch, in the first process; ``print`` shows progress.

        Returns:
            A record for each epoch.

        Raises:
            UserError: A group diverged, a process is missing or gone, or a checkpoint is of another training.
        """
        folder = None if checkpoint is None else Path(checkpoint)
        return self.training.fit(
            data, epochs, test=test, error=error, parallel=parallel, queue=queue, checkpoint=folder,
            on_epoch=on_epoch,
        )  # fmt: skip

    def evaluate(
        self, data: Batches, *, error: Metric | None = None
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Loss, and error where one is given, of every sub-model, in eval mode; one pass over the data."""
        return self.training.evaluate(data, error)

    def anytime(self) -> Anytime:
        """A module that answers within a budget of FLOPs, or once it is sure, with the present values.

        ``local.anytime()(x, confidence=0.9)``; see `Anytime.predict` for who left where.
        """
        complexity = self.complexity()
        return Anytime(
            groups=[emit(program) for program in self.groups.current_programs()],
            critics=[emit(self.critic_program(number)) for number in range(self.n)],
            mains=self.mains,
            flops=[item.flops for item in complexity],
            critic_flops=[item.critic_flops for item in complexity[:-1]],
            whole=self.groups.program,
        )

    def to_bundle(self) -> DepthBundle:
        """Groups and critics as they are now, to be saved; states of optimizers are not, see `state_dict`."""
        loss = next((name for name, function in NAMED.items() if function is self.loss), None)
        return replace(
            self.groups.to_bundle(),
            critics=tuple(self.critic_program(number) for number in range(self.n)),
            options={"loss": loss, "output": list(self._output), "seed": self._seed},
        )

    @classmethod
    def from_bundle(cls, found: DepthBundle) -> LocalCritics:
        """What a bundle holds; a loss of the user's own has to be set again."""
        options = found.options
        critics = [emit(program) for program in found.critics]
        loss = _unknown_loss if options["loss"] is None else per_sample(options["loss"])
        return cls(LayerGroups.from_bundle(found), critics, loss, options["output"], options["seed"])

    def submodel_program(self, i: int) -> Program:
        """Sub-model ``i`` as a program, with the values that it has now."""
        if not 0 <= i <= self.n:
            raise PartitionError(f"there is no sub-model {i}", hint=f"they are numbered from 0 to {self.n}")
        programs = self.groups.current_programs()[: i + 1]
        prefix = join(programs, self.groups.program)
        if i == self.n:
            return prefix
        return join_head(prefix, self.critic_program(i), self.mains[i], "critic")

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
        device = next((p.device for p in critic.parameters()), torch.device("cpu"))
        if (i, device) not in self._traced:
            features = self.groups.frontiers[i][self.mains[i]]
            x = torch.zeros(features.shape, dtype=features.dtype, device=device)
            self._traced[i, device] = trace(critic, (x,))
        values = dict(critic.named_parameters()) | dict(critic.named_buffers())
        program = self._traced[i, device]
        return program.with_state({name: values[name] for name in program.state if name in values})

    def drawn(self) -> tuple[Program, Division]:
        """What a figure shows: groups and critics."""
        critics = [self.critic_program(number) for number in range(self.n)]
        return self.groups.drawn(critics, self.mains[:-1])

    def _repr_html_(self) -> str:
        """A small figure, for notebooks."""
        return snippet(*self.drawn())

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
        return self.training.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, under the same recipe."""
        self.training.load_state_dict(state)

    def __repr__(self) -> str:
        counts = ", ".join(f"{item.parameters:,}" for item in self.complexity())
        return f"LocalCritics of {self.groups.program.name}: sub-models of {counts} parameters"


def _unknown_loss(outputs: Tensor, targets: Any) -> Tensor:
    raise UserError(
        "the loss was a function of one's own, which a bundle does not hold",
        hint="set it with local_critics(groups, loss=...), where groups are those of the bundle",
    )


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
    outputs: Sequence[str] | None = None,
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
        outputs: Names of the outputs to keep, as for `trace`.

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
        groups = layer_groups(
            model, args, kwargs, n=count, balance=balance, at=at, tied=tied, outputs=outputs
        )
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
