"""What a tuning found, as JSON has it: for the file of settings, the table, and whoever wants every number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from magicpig.config import Config
from magicpig.studies.tune.choose import LayerChoice, Tuning, p95, settings_of
from magicpig.studies.tune.measure import Measured


def summary(tuning: Tuning) -> dict[str, Any]:
    """What was wanted, what was reached on the steps that nothing was chosen by, and the time of all layers.

    one_setting: the fastest that is the same in all layers, those where it is not good enough read in full.
    """
    uniform, uniform_ms = tuning.uniform
    errors = tuning.held_out
    return {
        "goal": vars(tuning.goal),
        "reached": {"mean": rounded(float(errors.mean())), "p95": rounded(p95(errors))},
        "ms_per_token": {
            "full": rounded(tuning.full_ms),
            "one_setting": rounded(uniform_ms),
            "tuned": rounded(tuning.tuned_ms),
        },
        "one_setting": settings_of(uniform),
        "layers": [layer_row(each) for each in tuning.layers],
    }


def layer_row(choice: LayerChoice) -> dict[str, Any]:
    """The setting chosen in a layer, and its errors on the steps it was not chosen by."""
    return {"layer": choice.layer, "full_ms": rounded(choice.full_ms)} | setting_row(choice, choice.chosen)


def setting_row(choice: LayerChoice, measured: Measured) -> dict[str, Any]:
    """One setting in one layer. heads: mean error of each query head. See `Measured` for the others."""
    heads, predicted = measured.held_out.mean(0), measured.predicted
    return {
        "setting": settings_of(measured.config),
        "mean": rounded(float(heads.mean())),
        "p95": rounded(p95(measured.held_out)),
        "heads": [rounded(each) for each in heads.tolist()],
        "predicted": None if predicted is None else rounded(float(predicted.nanmean())),
        "foreseen": None if measured.foreseen is None else rounded(measured.foreseen),
        "share": rounded(measured.share),
        "ms": rounded(choice.ms(measured)),
        "index_bytes": measured.index_bytes,
    }


def all_rows(layers: Sequence[LayerChoice]) -> list[dict[str, Any]]:
    """Every setting in every layer."""
    return [{"layer": each.layer} | setting_row(each, one) for each in layers for one in each.measured]


def name(config: Config) -> str:
    """A setting in a few words."""
    if not config.samples:
        return "full attention"
    if config.hashes:
        return f"lsh {config.K},{config.L}"
    grows = "" if config.epsilon is None else f" to {100 * config.epsilon:g}%"
    return f"sketch {config.budget:g}, {config.bits} bit{grows}"


def rounded(value: float) -> float:
    """To five digits."""
    return float(f"{value:.5g}")
