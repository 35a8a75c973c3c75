"""What training did: one record for each epoch of each model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Epoch:
    """One pass over the data.

    Attributes:
        part: Number of the sub-model; None for the full model.
        number: Counted from 0 over the whole schedule, so that the full model goes on where
            its parts stopped.
        loss: Mean over the training examples, in train mode, while they were learned.
        error: What the error function gives, averaged in the same way; None without one.
        test_loss: Mean over the test data after the epoch, in eval mode; None without test data.
        test_error: The same for the error.
        seconds: Wall time of training, without the test.
        examples: Training examples seen.
        learning_rate: Of the first parameter group, at the end of the epoch.
    """

    part: int | None
    number: int
    loss: float
    error: float | None
    test_loss: float | None
    test_error: float | None
    seconds: float
    examples: int
    learning_rate: float

    @property
    def examples_per_second(self) -> float:
        """Training examples by seconds of wall time."""
        return self.examples / self.seconds if self.seconds else float("inf")

    def __str__(self) -> str:
        who = "full model" if self.part is None else f"sub-model {self.part}"
        text = f"epoch {self.number + 1}, {who}: loss {self.loss:.4f}"
        if self.error is not None:
            text += f", error {self.error:.2%}"
        if self.test_loss is not None:
            text += f", test loss {self.test_loss:.4f}"
        if self.test_error is not None:
            text += f", test error {self.test_error:.2%}"
        return f"{text} ({self.examples_per_second:,.0f} examples/s)"


@dataclass
class History:
    """The epochs of a schedule, sub-models first, in the order of their numbers.

    Attributes:
        epochs: One record for each.
        merge_seconds: Time of merging weights and optimizer states.
    """

    epochs: list[Epoch] = field(default_factory=list)
    merge_seconds: float = 0.0

    def of(self, part: int | None) -> Sequence[Epoch]:
        """Epochs of one sub-model; None: of the full model."""
        return [epoch for epoch in self.epochs if epoch.part == part]

    @property
    def parts(self) -> list[int]:
        """Numbers of the sub-models that were trained."""
        return sorted({epoch.part for epoch in self.epochs if epoch.part is not None})

    def seconds(self, *, parallel: bool = False) -> float:
        """Training time: sub-models one after the other, or as if each had a machine of its own.

        Args:
            parallel: Count the slowest sub-model alone, which is the paper's speed-up in parallel.
        """
        apart = [sum(epoch.seconds for epoch in self.of(part)) for part in self.parts]
        before = (max(apart, default=0.0) if parallel else sum(apart)) + self.merge_seconds
        return before + sum(epoch.seconds for epoch in self.of(None))
