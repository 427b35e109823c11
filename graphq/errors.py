"""Errors a user can act on: what failed, where, what was expected, what to do.

Every error that graphq raises on purpose is a `GraphqError`; the command line prints it without a traceback and exits with
its `exit_code`. Anything else that escapes is a bug.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from graphq.report import Report


class GraphqError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: What failed, one sentence.
        where: The file, node (with its shapes) or option at fault.
        expected: What would have been accepted.
        hint: What the user can do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", expected: str = "", hint: str = "") -> None:
        self.what, self.where, self.expected, self.hint = what, where, expected, hint
        rows = (("where", where), ("expected", expected), ("try", hint))
        super().__init__("\n".join([what, *(f"  {label}: {text}" for label, text in rows if text)]))


class ModelError(GraphqError):
    """The model file cannot be read, or is not a model that graphq can work on."""


class DataError(GraphqError):
    """The calibration or evaluation data does not fit the model."""


class RecipeError(GraphqError):
    """The recipe, a pass name or a pass option is wrong; also a pass that was asked for and matched nothing."""


class TargetError(GraphqError):
    """The target runtime cannot express what the recipe asks for, or refused the result."""


class UsageError(GraphqError):
    """The call itself is wrong: paths that cannot be used, options that exclude each other."""

    exit_code = 2


class VerifyError(GraphqError):
    """The result is not a valid model, or misses a gate.

    Attributes:
        report: What there is to say about a result that misses a gate; None of others.
    """

    exit_code = 3
    report: Report | None = None
