"""A model reads a text, and every setting is tried in each of its layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from magicpig.config import EXACT, Config
from magicpig.integrations.transformers.shapes import layer_shapes
from magicpig.store.planner import check, plan
from magicpig.studies.bench.layer import Shape, verify_kernels
from magicpig.studies.capture import AttentionSet
from magicpig.studies.capture.record import full_layers, record
from magicpig.studies.tune.choose import Goal, LayerChoice, Tuning, good_enough
from magicpig.studies.tune.measure import Trials
from magicpig.types import MemoryUse

FINALISTS = 3


def tune(
    network: Any,
    ids: Sequence[int],
    configs: Sequence[Config],
    goal: Goal,
    *,
    steps: int = 16,
    repeats: int = 1,
    chunk: int = 1024,
    on_prefill: Callable[[int], None] = lambda tokens: None,
    on_setting: Callable[[int, int, int], None] = lambda layer, done, total: None,
) -> Tuning:
    """Find the settings that a model needs on a text.

    ids: the text. Its last ``steps`` tokens are decoded again, by each of ``configs`` in each layer, ``repeats`` times
    against the clock. on_prefill is called with the tokens of each chunk that was read; on_setting before and after
    each setting, with the layer and how many settings of all are done.
    Raises CaptureError, ModelError and UnsupportedModelError as `record` does, MemoryError if there is no room for the
    keys and values of the text and a copy of them, and WrongResultError if the kernels are wrong on this machine.
    """
    layers = full_layers(network.config)
    _check_memory(network, len(ids), configs, layers)
    sets = record(network, ids, layers=layers, steps=steps, chunk=chunk, on_prefill=on_prefill)
    for shape in {_shape(each) for each in sets.values()}:
        verify_kernels(shape)
    choices, done, total = [], 0, len(sets) * (1 + len(configs))
    for layer in layers:
        on_setting(layer, done, total)
        trials = Trials(sets.pop(layer), repeats=repeats)
        measured = [trials.full()]
        for config in configs:
            on_setting(layer, done := done + 1, total)
            measured.append(trials.sampled(config))
        *good, _ = good_enough(measured, goal)
        for before, now in zip(good, trials.again(good[:FINALISTS]), strict=False):
            measured[measured.index(before)] = now
        choices.append(LayerChoice(layer, trials.full_ms, measured, good_enough(measured, goal)[0]))
        on_setting(layer, done := done + 1, total)
    return Tuning(goal, choices)


def _shape(attention: AttentionSet) -> Shape:
    return Shape(attention.heads, attention.kv_heads, attention.keys.shape[2], dtype=attention.keys.dtype)


def _check_memory(network: Any, tokens: int, configs: Sequence[Config], layers: Sequence[int]) -> None:
    """What was read, what is kept of it, and one layer as often as there are finalists of the hungriest setting."""
    shapes = layer_shapes(network.config, EXACT)
    whole = plan(shapes, EXACT, sequences=1, tokens=tokens, dtype=network.dtype)
    sampled = [replace(shapes[layer], sampled=True) for layer in layers]
    single = [
        plan([shape], config, sequences=1, tokens=tokens, dtype=network.dtype)
        for shape in sampled
        for config in configs
    ]
    worst = max(single, key=lambda each: each.total)
    kept = MemoryUse(2 * whole.kept.rows + FINALISTS * worst.kept.rows, FINALISTS * worst.kept.index)
    check(replace(whole, kept=kept, transient=worst.transient))
