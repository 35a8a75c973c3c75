"""The one error tree of graphsplit.

`UserError` and its children are mistakes that a user can mend: they carry one sentence that says what is
wrong and where, and a hint with the way out. `InternalError` is a bug of ours and says so.
"""

from __future__ import annotations

import functools
from typing import Any


class GraphsplitError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: One sentence: what was expected, what was found.
        where: Module path and source line of the user's code, or the file, that the message speaks of.
        hint: What the user can do.
    """

    exit_code = 1

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        text = self.message
        if self.where:
            text += f" (at {self.where})"
        if self.hint:
            text += f" — {self.hint}"
        return text


class UserError(GraphsplitError):
    """Something outside graphsplit is not as it has to be."""

    exit_code = 2


class LoadError(UserError):
    """The user's file, or what it defines, cannot be used."""

    exit_code = 3


class UserCodeError(LoadError):
    """The user's file raised an exception.

    Attributes:
        traceback_text: The traceback as Python prints it, without the frames of graphsplit.
    """

    def __init__(self, message: str, *, traceback_text: str, where: str | None, hint: str | None) -> None:
        super().__init__(message, where=where, hint=hint)
        self.traceback_text = traceback_text

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, as other processes run the user's file, too, and have to say what it raised."""
        again = functools.partial(
            UserCodeError, traceback_text=self.traceback_text, where=self.where, hint=self.hint
        )
        return again, (self.message,)


class InputError(UserError):
    """Inputs or tensors do not fit the model they are given to."""

    exit_code = 3


class TraceError(UserError):
    """torch.export refused the model; its reason is passed on."""

    exit_code = 4


class UnsupportedError(UserError):
    """An operation, or a use of it, for which there is no rule."""

    exit_code = 5


class PartitionError(UserError):
    """The model cannot be divided as asked."""

    exit_code = 5


class PlanError(UserError):
    """A plan, or the tensors given to it, are not consistent."""

    exit_code = 6


class BundleError(UserError):
    """A bundle is damaged, truncated, foreign or of a newer format."""

    exit_code = 6


class VerificationError(GraphsplitError):
    """A rewrite was checked and does not compute what it should."""

    exit_code = 7


class InternalError(GraphsplitError):
    """A bug in graphsplit: please report it with the message."""

    exit_code = 70


def first_line(error: BaseException) -> str:
    """The first line of another library's message, or the name of its class where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
