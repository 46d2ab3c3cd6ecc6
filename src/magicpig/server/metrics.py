"""What Prometheus scrapes at /metrics, counted by an observer of the engine. Names begin with `magicpig_`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from magicpig.engine.observer import Observer, StepRecord
from magicpig.engine.request import FinishReason, Report, Request

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


class Metrics(Observer):
    """The metrics of one engine, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"magicpig_{name}", what, labels, registry=registry)

        def gauge(name: str, what: str) -> Gauge:
            return Gauge(f"magicpig_{name}", what, registry=registry)

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"magicpig_{name}", what, buckets=buckets, registry=registry)

        self.answers = counter("answers", "Answers that have ended, by how", "finish")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts, of answers that have ended")
        self.cached_tokens = counter("cached_tokens", "Of these, those that did not have to be read")
        self.new_tokens = counter("new_tokens", "Tokens of answers, of those that have ended")
        self.preemptions = counter("preemptions", "Answers that gave way to others and were computed again")
        self.steps = counter("steps", "Steps of the engine")
        self.step_tokens = counter("step_tokens", "Tokens computed in steps", "phase")
        self.running = gauge("running", "Answers that are computed now")
        self.waiting = gauge("waiting", "Answers that wait")
        self.reserved = gauge("reserved_bytes", "Memory that running answers may come to hold")
        self.cached = gauge("cached_bytes", "Memory of documents that are kept warm")
        self.first_token = histogram("first_token_seconds", "From a request to its first token", SECONDS)
        self.next_token = histogram("next_token_seconds", "Between two tokens of an answer", SECONDS)
        self.total = histogram("request_seconds", "From a request to the end of an answer", SECONDS)
        self.queue = histogram("queue_seconds", "From a request to when it is let in", SECONDS)
        self.step_seconds = histogram("step_seconds", "One step", SECONDS)
        self.index_seconds = histogram("index_seconds", "Building the index of a prompt", SECONDS)
        self.rows_share = histogram(
            "rows_share", "Share of the indexed keys that a head reads, mean of an answer", SHARES
        )
        self.predicted_error = histogram(
            "predicted_error", "Predicted relative error of heads, mean of an answer", SHARES
        )
        self.kv_bytes = histogram("kv_bytes", "Keys and values of an answer", tuple(4.0**i for i in range(8, 20)))
        self.index_bytes = histogram("index_bytes", "Index of an answer", tuple(4.0**i for i in range(8, 20)))

    def render(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)

    def on_step(self, record: StepRecord) -> None:
        self.steps.inc()
        self.step_seconds.observe(record.seconds)
        self.step_tokens.labels("prefill").inc(record.prefill_tokens)
        self.step_tokens.labels("decode").inc(record.decode_tokens)
        self.on_rest(record)

    def on_rest(self, record: StepRecord) -> None:
        self.running.set(record.running)
        self.waiting.set(record.waiting)
        self.reserved.set(record.reserved)
        self.cached.set(record.cached)

    def on_first_token(self, seconds: float) -> None:
        self.first_token.observe(seconds)

    def on_next_token(self, seconds: float) -> None:
        self.next_token.observe(seconds)

    def on_indexed(self, seconds: float) -> None:
        self.index_seconds.observe(seconds)

    def on_preempted(self, request: Request) -> None:
        self.preemptions.inc()

    def on_end(self, request: Request, index: int, finish: FinishReason, report: Report) -> None:
        self.answers.labels(finish).inc()
        if index == 0:
            self.prompt_tokens.inc(report.prompt_tokens)
            self.cached_tokens.inc(report.cached_tokens)
        self.new_tokens.inc(report.new_tokens)
        self.total.observe(report.total_s)
        self.queue.observe(report.queue_s)
        self.kv_bytes.observe(report.kv_bytes)
        self.index_bytes.observe(report.index_bytes)
        if report.rows_share_mean is not None:
            self.rows_share.observe(report.rows_share_mean)
        if report.predicted_error_mean is not None:
            self.predicted_error.observe(report.predicted_error_mean)
