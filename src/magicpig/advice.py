"""What a user should know of a setting that did not work: said once, with what to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from magicpig.config import Config
from magicpig.wording import counted

WORST_ERROR = 0.3  # of a layer's output: from there on, the answer may be another one
FEWEST_ROWS = 16  # drawn by a head in a step
LARGEST_SHARE = 0.5  # of the keys, read for an epsilon: then full attention would be faster
MOST_UNKNOWN = 0.25  # share of steps and heads that drew nothing to judge by
_NAMED = 8  # layers in a sentence


class SamplingWarning(UserWarning):
    """Attention was sampled in a way that can hardly have worked: too few keys, too many, or errors too large."""


class SampledLayer(Protocol):
    """What steps say of a layer; the fields are those of a `LayerReport`."""

    @property
    def layer(self) -> int: ...
    @property
    def indexed(self) -> int: ...
    @property
    def sampled_share_mean(self) -> float | None: ...
    @property
    def predicted_error_mean(self) -> float | None: ...
    @property
    def predicted_error_unknown(self) -> float | None: ...


def advice(layers: Iterable[SampledLayer], config: Config) -> str | None:
    """One paragraph on what sampled steps say of themselves: what is wrong, and what to do. None where nothing is.

    config: the settings of the cache that was reported on.
    """
    every = list(layers)
    wrong = [layer for layer in every if _error(layer) > WORST_ERROR]
    thin = [layer for layer in every if layer not in wrong and _is_thin(layer)]
    if not wrong and not thin:
        return _too_much(every, config)
    parts = []
    if wrong:
        worst = max(_error(layer) for layer in wrong)
        parts.append(f"the samples of {_names(wrong)} predict errors of {WORST_ERROR:.0%} to {worst:.0%} of the output")
    if thin:
        rows = min(_rows(layer) for layer in thin)
        parts.append(f"{_names(thin)} drew next to nothing, as few as {counted(round(rows), 'key')} a step")
    return f"sampled attention is too coarse here: {'; '.join(parts)}. {_remedy(config, [*wrong, *thin])}"


def _too_much(layers: list[SampledLayer], config: Config) -> str | None:
    """What to say where an epsilon asks for so many keys that all might as well be read."""
    full = [
        layer
        for layer in layers
        if config.of_layer(layer.layer).epsilon is not None and (layer.sampled_share_mean or 0.0) > LARGEST_SHARE
    ]
    if not full:
        return None
    shares = [layer.sampled_share_mean or 0.0 for layer in full]
    epsilon = config.of_layer(full[0].layer).epsilon
    return (
        f"an epsilon of {epsilon:g} is nearly full attention here: {_names(full)} read {min(shares):.0%} to "
        f"{max(shares):.0%} of the keys, which sampling makes slower. To mend it, raise epsilon, or keep these layers "
        "exact (dense_layers), or let `magicpig tune` choose."
    )


def _remedy(config: Config, layers: list[SampledLayer]) -> str:
    exact = ", ".join(str(layer.layer) for layer in layers[:_NAMED])
    more = (
        f"lower K (now {config.K}), raise L (now {config.L}), or take sampler='sketch'"
        if config.hashes
        else f"raise the budget (now {config.budget:g})"
    )
    every = len(layers) > _NAMED
    rest = "" if every else f", keep these layers exact (dense_layers={exact})"
    return f"To mend it, {more}{rest}, or let `magicpig tune` choose."


def _error(layer: SampledLayer) -> float:
    return layer.predicted_error_mean or 0.0


def _rows(layer: SampledLayer) -> float:
    return (layer.sampled_share_mean or 0.0) * layer.indexed


def _is_thin(layer: SampledLayer) -> bool:
    # Those that predict nothing draw what they were told to.
    if layer.sampled_share_mean is None or layer.predicted_error_unknown is None:
        return False
    few = _rows(layer) < min(FEWEST_ROWS, layer.indexed)
    return few or layer.predicted_error_unknown > MOST_UNKNOWN


def _names(layers: list[SampledLayer]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0].layer}"
    named = ", ".join(str(layer.layer) for layer in layers[:_NAMED])
    return f"layers {named}" + (f" and {len(layers) - _NAMED} more" if len(layers) > _NAMED else "")
