"""Which settings of each sampler `magicpig bench frontier` measures."""

from __future__ import annotations

from magicpig.studies.evaluation.matrix import Method, parse_methods

TABLES = ((11, 300), (10, 75), (10, 150), (10, 220), (9, 75), (9, 120), (8, 75))  # K, L
BUDGETS = (64, 128, 256, 512, 1024, 2048, 4096)
BITS = (1, 2, 3, 4)


def settings(samplers: str) -> list[Method]:
    """The settings that are measured: all of a sampler, or of one that says its own, as "lsh:K=9,L=120", that alone.

    Raises MatrixError for what there is not.
    """
    asked = parse_methods(samplers, exact_below=0)
    names: list[str] = []
    for method in asked:
        budgets = [f"{method.name}:{budget}" for budget in BUDGETS]
        if method.name != method.config.sampler or not method.config.named_by:
            names.append(method.name)
        elif method.config.hashes:
            names += [f"{method.name}:K={K},L={L}" for K, L in TABLES]
        elif method.config.sketches:
            names += [f"{budget},bits={bits}" for bits in BITS for budget in budgets]
        else:
            names += budgets
    return list(parse_methods(",".join(names), exact_below=0))
