"""What can go wrong, said once for the library, the command line and a server.

Each error is a `MagicPigError` with a `code`: a short name that programs may rely on, where messages are for people.
Each also is the built-in exception that Python users expect (ValueError, MemoryError), so plain `except` clauses work.
"""

from __future__ import annotations

from typing import ClassVar


class MagicPigError(Exception):
    """Base of every error that this package raises on purpose.

    code: snake_case, the same for all instances of a class. The message is one or two sentences without a traceback:
    what is wrong, with the name and the value of the parameter, and what is allowed.
    """

    code: ClassVar[str] = "error"


class ArgumentError(MagicPigError, ValueError):
    """An argument has a value, a shape or a dtype that is not allowed."""

    code = "invalid_argument"


class ArgumentTypeError(MagicPigError, TypeError):
    """An argument is of a kind that is not allowed."""

    code = "invalid_type"


class NotFiniteError(ArgumentError):
    """Numbers that must be finite are not, or do not fit into the type that they are kept in."""

    code = "not_finite"


class EnvironmentVariableError(ArgumentError):
    """An environment variable of this package has a value that is not allowed."""

    code = "invalid_environment"


class InsufficientMemoryError(MagicPigError, MemoryError):
    """A request needs more memory than there is, or than it may have."""

    code = "insufficient_memory"
