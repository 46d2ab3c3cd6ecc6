"""What can go wrong before the first token."""


class UnsupportedModelError(ValueError):
    """The model computes attention in a way that keys cannot be sampled in. One line with the reason."""

    def __init__(self, model_type: str | None, reason: str) -> None:
        name = "this model" if model_type is None else f"model type {model_type!r}"
        super().__init__(f"{name} is not supported: {reason}")
