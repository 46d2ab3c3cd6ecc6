"""What can go wrong before the first token."""

from __future__ import annotations

from magicpig.errors import ArgumentError, MagicPigError


class UnsupportedModelError(ArgumentError):
    """The model computes attention in a way that keys cannot be sampled in. One line with the reason."""

    code = "unsupported_model"

    def __init__(self, model_type: str | None, reason: str) -> None:
        super().__init__(model_type, reason)  # what a copy or a pickle of the error is made from
        self.model_type = model_type
        self.reason = reason

    def __str__(self) -> str:
        name = "this model" if self.model_type is None else f"model type {self.model_type!r}"
        return f"{name} is not supported: {self.reason}"


class OpaqueTokensError(UnsupportedModelError, AttributeError):
    """A model asks for what the keys and values of a MagicPigCache have not got."""

    code = "opaque_tokens"


class CacheMismatchError(ArgumentError):
    """The cache was filled by another model, or made for one."""

    code = "cache_mismatch"


class CacheStateError(MagicPigError, RuntimeError):
    """The cache cannot be used any more, because a forward pass was interrupted."""

    code = "cache_state"


class GradientError(MagicPigError, RuntimeError):
    """Gradients are asked for where attention is not differentiable."""

    code = "no_gradient"
