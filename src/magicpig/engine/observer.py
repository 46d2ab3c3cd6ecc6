"""What the engine tells whoever watches it: metrics, logs, benchmarks. All calls come from the engine's thread."""

from __future__ import annotations

from dataclasses import dataclass

from magicpig.engine.request import FinishReason, Report, Request


@dataclass(frozen=True)
class StepRecord:
    """One step. seconds: of the model and of sampling. prefill_tokens, decode_tokens: computed in it.

    running, waiting: sequences after it. reserved: bytes that the running ones may come to hold; cached: bytes that the
    prefix cache holds.
    """

    seconds: float
    prefill_tokens: int
    decode_tokens: int
    running: int
    waiting: int
    reserved: int
    cached: int


class Observer:
    """Does nothing; override what matters. Must not raise, and must be quick."""

    def on_step(self, record: StepRecord) -> None:
        """After each step that computed something."""

    def on_rest(self, record: StepRecord) -> None:
        """When requests have come or gone, and there was nothing to compute."""

    def on_first_token(self, seconds: float) -> None:
        """After the first token of an answer, so long after its request came."""

    def on_next_token(self, seconds: float) -> None:
        """After each later token, so long after the one before."""

    def on_indexed(self, seconds: float) -> None:
        """After the index of a prompt was built, beside the steps, in so long."""

    def on_preempted(self, request: Request) -> None:
        """When an answer gives way to others."""

    def on_end(self, request: Request, index: int, finish: FinishReason, report: Report) -> None:
        """When an answer has come to its end, however."""
