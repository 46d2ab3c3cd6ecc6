"""Why a request is refused, or ends before its time."""

from __future__ import annotations

from magicpig.errors import ArgumentError, InsufficientMemoryError, MagicPigError


class QueueFullError(MagicPigError, RuntimeError):
    """As many requests wait as may. Try again later."""

    code = "queue_full"


class ContextLengthError(ArgumentError):
    """Prompt and answer together are longer than the model reads."""

    code = "context_length_exceeded"


class RequestTooLargeError(InsufficientMemoryError):
    """The request alone needs more memory than there is for all."""

    code = "request_too_large"


class ShuttingDownError(MagicPigError, RuntimeError):
    """The engine takes no more requests, or ends before this one is done."""

    code = "shutting_down"


class RequestTimeoutError(MagicPigError, TimeoutError):
    """The request was not done in the time it was given."""

    code = "timeout"


class StepError(MagicPigError, RuntimeError):
    """A step of the model failed, for no fault of the request. The log has the traceback."""

    code = "internal_error"
