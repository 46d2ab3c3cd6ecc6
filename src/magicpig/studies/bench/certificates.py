"""Whether predicted errors can be believed: each against the true error of the same output, over heads and steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from magicpig.attention.step import attend_stores
from magicpig.config import Config
from magicpig.studies.bench.layer import Layer
from magicpig.studies.capture import AttentionSet
from magicpig.studies.evaluation.matrix import Method

SLACK = 1.5  # a prediction is one standard error; the truth should hardly ever be larger than this many
ROUNDING = 1e-5  # relative error below which an output differs from exact attention in float32 by rounding alone


@dataclass(frozen=True)
class Certificate:
    """How a sampler's predictions held on contexts of one source.

    cases: query heads times steps. error, error_p95: true relative L2 error of the output against float64.
    predicted: mean of the predicted errors. kept: of the cases with one, the share whose error is at most
    SLACK times that. Both None where none was. below, nearly_below: shares at most epsilon, and at most
    SLACK times epsilon; None without one. rows: drawn per kv head and step; share: of the body.
    heads: for every context, such as a layer of a capture, the mean error of each query head over the steps.
    """

    source: str
    tokens: int
    name: str
    cases: int
    error: float
    error_p95: float
    predicted: float | None
    kept: float | None
    epsilon: float | None
    below: float | None
    nearly_below: float | None
    rows: float
    share: float
    heads: tuple[tuple[float, ...], ...]


def measure(
    source: str, contexts: Iterable[AttentionSet], methods: Sequence[Method], on_context: Callable[[], None]
) -> list[Certificate]:
    """A `Certificate` per method that leaves something out, over all contexts: layers, or draws of a synthetic one.

    Computed in float32, whatever the contexts are kept in, so that errors are those of sampling alone.
    """
    cases: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    tokens = body = 0
    for context in contexts:
        layer = Layer([_in_float32(context)])
        tokens = layer.context
        for method in methods:
            if layer.leaves_out(method.config):
                body = layer.body(method.config)
                cases.setdefault(method.name, []).append(_steps(layer, method.config))
        on_context()
    configs = {method.name: method.config for method in methods}
    return [_certificate(source, tokens, body, name, configs[name], found) for name, found in cases.items()]


def _in_float32(context: AttentionSet) -> AttentionSet:
    return replace(context, keys=context.keys.float(), values=context.values.float(), queries=context.queries.float())


def _steps(layer: Layer, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """True and predicted errors (T, H) and rows drawn (T, G), step by step."""
    stores = layer.stores(config)
    for store in stores:
        store.settle()
    (data,) = layer.data
    outputs, predicted, rows = [], [], []
    for step in range(layer.steps):
        layer.step(stores, step)  # appends the token; attended to once more for what was drawn
        state, info = attend_stores(
            layer.queries[step], stores, scale=data.scale, softcap=data.softcap, sink_logits=data.sink_logits
        )
        outputs.append(state.output)
        predicted.append(info.predicted_error)
        rows.append(info.rows)
    errors = layer.errors(lambda step: outputs[step])
    return errors[:, 0], torch.stack(predicted)[:, 0].double(), torch.stack(rows)[:, 0].double()


def _certificate(
    source: str, tokens: int, body: int, name: str, config: Config, found: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> Certificate:
    errors, predicted, rows = (torch.cat([part.flatten() for part in parts]) for parts in zip(*found, strict=True))

    def share_within(limit: Tensor | float, of: Tensor | slice = slice(None)) -> float:
        return float((errors <= limit + ROUNDING)[of].double().mean())

    known, epsilon = ~predicted.isnan(), config.epsilon
    predicts = bool(known.any())
    return Certificate(
        source=source,
        tokens=tokens,
        name=name,
        cases=errors.numel(),
        error=float(errors.mean()),
        error_p95=float(errors.quantile(0.95)),
        predicted=float(predicted[known].mean()) if predicts else None,
        kept=share_within(SLACK * predicted, known) if predicts else None,
        epsilon=epsilon,
        below=None if epsilon is None else share_within(epsilon),
        nearly_below=None if epsilon is None else share_within(SLACK * epsilon),
        rows=float(rows.mean()),
        share=float(rows.mean()) / body,
        heads=tuple(tuple(round(error, 5) for error in each[0].mean(0).tolist()) for each in found),
    )
