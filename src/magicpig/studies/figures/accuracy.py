"""What the evaluation runner is to measure for figure 1 and for the centring ablation, and the rows it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from magicpig.studies.evaluation.matrix import Matrix, Method, parse_methods
from magicpig.studies.evaluation.results import Results
from magicpig.studies.evaluation.table import AVERAGE, summarise

SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
TABLES = ((10, 75), (10, 150), (9, 120), (9, 200), (8, 150))  # K, L: about 0.5 to 15 % of the keys
CENTRED = ((10, 150), (9, 120), (8, 75))  # the paper's settings
COMPARED = ("full", "topk", "quest", "uniform-tail", "oracle", "lsh", "sketch")


def methods(samplers: Sequence[str] | None = None, **settings: Any) -> tuple[Method, ...]:
    """The settings that make up a curve of each sampler, by default of all that there are to compare.

    settings: of `Config`, the same for all. Raises MatrixError for a sampler that is not there.
    """
    names = []
    for sampler in COMPARED if samplers is None else samplers:
        (method,) = parse_methods(sampler)
        if method.config.hashes:
            names += [f"{sampler}:K={K},L={L}" for K, L in TABLES]
        elif method.config.named_by:
            names += [f"{sampler}:{share}" for share in SHARES]
        else:
            names.append(sampler)
    return parse_methods(",".join(names), **settings)


def centring_methods(**settings: Any) -> tuple[Method, ...]:
    """Full attention, and lsh with its keys centred before they are hashed and not."""
    names = [f"lsh:K={K},L={L},centre={centre}" for K, L in CENTRED for centre in ("true", "false")]
    return parse_methods(",".join(["full", *names]), **settings)


def accuracy_rows(results: Results, matrix: Matrix) -> list[dict[str, Any]]:
    """One row per task and method: accuracy with its interval, and the share of the keys read."""
    configs = {method.name: method.config for method in matrix.methods}
    return [
        asdict(cell) | {"sampler": configs[cell.sampler].sampler, "method": cell.sampler}
        for cell in summarise(results)
        if cell.task != AVERAGE
    ]


def centring_rows(results: Results, matrix: Matrix) -> list[dict[str, Any]]:
    """One row per method, all tasks together, with the setting of its tables.

    centre: whether keys were centred; None for full attention.
    """
    configs = {method.name: method.config for method in matrix.methods}
    rows = []
    for cell in summarise(results):
        if cell.task == AVERAGE:
            config = configs[cell.sampler]
            row = asdict(cell) | {"sampler": config.sampler, "method": cell.sampler, "setting": None, "centre": None}
            if config.hashes:
                row |= {"setting": f"K = {config.K}, L = {config.L}", "centre": config.centre}
            rows.append(row)
    return rows
