"""Attention of a model at work on tasks or texts: captured text by text, for figures 2 and 3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from magicpig.generation import Model, encode, stop_tokens
from magicpig.studies.capture import AttentionSet
from magicpig.studies.capture.record import record
from magicpig.studies.evaluation.matrix import Method
from magicpig.studies.evaluation.perplexity import beginning
from magicpig.studies.evaluation.tasks import generate
from magicpig.studies.figures.anatomy import attention_mass, geometry, sink_moves
from magicpig.studies.figures.study import estimate, exact_outputs

MOST_KV_HEADS = 4  # per layer; of more, four evenly spread
Rows = list[dict[str, Any]]


def measure_attention(
    model: Model,
    network: Any,
    *,
    tasks: Sequence[str],
    length: int,
    samples: int,
    steps: int,
    methods: Sequence[Method],
    texts: Sequence[Path] = (),
    layers: Sequence[int] | None = None,
    seed: int = 0,
    on_step: Callable[[str, float], None] = lambda step, texts: None,
) -> tuple[Rows, Rows, Rows]:
    """The rows of figure 2 (mass, cosines) and of figure 3 (errors), over ``samples`` texts of each task.

    texts: files to read the beginnings of, instead of tasks. layers: by default a few, evenly spread.
    steps: queries per text, those that the answer's first tokens come from, or a text's last ones. methods: for figure
    3; may be none.
    on_step is called with each piece of work as it begins, and how many texts are done by then.
    Raises TaskError for tasks and lengths that cannot be had, ModelError for those the model cannot read.
    """
    mass: Rows = []
    cosines: Rows = []
    errors: Rows = []
    stop = stop_tokens(model, network)
    sources: list[tuple[Path | str, int]] = [(text, 0) for text in texts] or [*product(tasks, range(samples))]
    for done, (source, index) in enumerate(sources):
        task = source.stem if isinstance(source, Path) else source
        on_step(f"{task} #{index}: reading {length} tokens", done)
        if isinstance(source, Path):
            ids, written = beginning(model, source, length), 0
        else:
            sample = generate(task, model.tokenizer, length, index=index, seed=seed)
            ids, written = encode(model, sample.prompt, new_tokens=steps), steps
        found = record(network, ids, layers=layers, steps=steps, new_tokens=written, stop=stop)
        for number, (layer, everything) in enumerate(found.items()):
            on_step(f"{task} #{index}: layer {layer}", done + (number + 1) / (len(found) + 1))
            attention = _few_heads(everything)
            where = {"task": task, "index": index, "layer": layer}
            heads = attention_mass(attention)
            mass += [where | head for head in heads]
            cosines += [where | head for head in geometry(attention)]
            exact = exact_outputs(attention) if methods else []
            for method in methods:
                known = where | {"sampler": method.config.sampler, "method": method.name}
                for each in estimate(attention, method.config, exact):
                    errors.append(known | {"long_tailed": heads[each.head]["long_tailed"]} | vars(each))
    return mass, _compare_sinks(cosines), errors


def _few_heads(attention: AttentionSet) -> AttentionSet:
    G = attention.kv_heads
    if G <= MOST_KV_HEADS:
        return attention
    return attention.only([round(i * (G - 1) / (MOST_KV_HEADS - 1)) for i in range(MOST_KV_HEADS)])


def _compare_sinks(cosines: Rows) -> Rows:
    """Instead of each text's sink, on the first row of a head: how alike those of all texts are."""
    keys: dict[tuple[int, int], list[list[float]]] = {}
    for row in cosines:
        keys.setdefault((row["layer"], row["kv_head"]), []).append(row.pop("sink_key"))
    for row in cosines:
        found = keys.pop((row["layer"], row["kv_head"]), [])
        if len(found) > 1:
            row["sink_moves"] = sink_moves(found)
    return cosines
