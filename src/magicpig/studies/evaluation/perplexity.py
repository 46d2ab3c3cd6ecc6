"""How much a sampler changes what a model says next: along real texts, against full attention.

A text is read exactly up to some place; from there on, each token is decoded by every sampler in turn, given the true
tokens before it. What the model then gives the next token is compared with what it gives it with full attention: this
sees every error, where tasks only see those that change an answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magicpig.config import EXACT
from magicpig.generation import Model, encode, load
from magicpig.integrations.transformers import MagicPigCache, attach
from magicpig.integrations.transformers.compat import cache_argument
from magicpig.model_dir import checksum
from magicpig.studies.evaluation.answer import read_document
from magicpig.studies.evaluation.matrix import MatrixError, Method
from magicpig.studies.evaluation.results import Results, ResultsError, ResultsFile, read_results
from magicpig.studies.evaluation.run import identity
from magicpig.studies.evaluation.table import Table, short_length
from magicpig.studies.provenance import provenance

BENCHMARK = "perplexity"
PIECE = 64  # tokens of which the logits are there at once
TEXTS = tuple(sorted((Path(__file__).parent / "texts").glob("*.txt")))
"""Those that come with the package."""


@dataclass(frozen=True)
class Plan:
    """What is compared. texts: UTF-8 files. lengths: tokens of a text, with the last ``decoded`` that are decoded."""

    texts: tuple[Path, ...]
    lengths: tuple[int, ...]
    methods: tuple[Method, ...]
    decoded: int = 256

    def __post_init__(self) -> None:
        names = [path.name for path in self.texts]
        if len(set(names)) < len(names):
            raise MatrixError(f"texts {', '.join(names)}: each needs a name of its own")
        if self.lengths[0] <= self.decoded:
            raise MatrixError(
                f"length {self.lengths[0]} must be more than the {self.decoded} tokens that are decoded at its end"
            )


def evaluate(
    model: Model,
    plan: Plan,
    path: Path,
    *,
    dtype: str = "auto",
    chunk: int = 1024,
    on_start: Callable[[int, int], None] = lambda done, total: None,
    on_step: Callable[[str, int], None] = lambda step, work: None,
) -> Results:
    """Run what is missing in the results file at ``path``, and return all that is in it.

    One line per text, length and sampler: `nll`, of the true tokens, and `kl`, the divergence from full attention, are
    means over the decoded tokens in nats; `kl_p95` its 95th percentile; `top1` the share of tokens where both have the
    same favourite; `kl_tokens` that of each token.
    dtype, chunk, on_start, on_step: as in `run.evaluate`; work is counted in tokens.
    Raises MatrixError for a text that is too short or too long for the model, ResultsError, ModelError, MemoryError.
    """
    ids = {text: beginning(model, text, plan.lengths[-1]) for text in plan.texts}
    cells = [(text, length) for length in plan.lengths for text in plan.texts]
    work = [length + plan.decoded * (1 + len(plan.methods)) for _, length in cells]
    with ResultsFile(path, _settings(model, plan, dtype, chunk), provenance(), group=len(plan.methods)) as file:
        on_start(sum(work[: file.done]), sum(work))
        network: Any = None
        for text, length in cells[file.done :]:
            if network is None:
                network = attach(load(model, dtype=dtype), EXACT)
            name = f"{text.stem} {short_length(length)}"
            on_step(name, 0)
            found = compare(
                network,
                ids[text][:length],
                plan.methods,
                decoded=plan.decoded,
                chunk=chunk,
                on_step=lambda step, count, name=name: on_step(f"{name} {step}", count),  # type: ignore[misc]
            )
            file.append([{"text": text.name, "length": length, **line} for line in found])
    return read_results(path)


@torch.inference_mode()
def compare(
    network: Any,
    ids: Sequence[int],
    methods: Sequence[Method],
    *,
    decoded: int,
    chunk: int = 1024,
    on_step: Callable[[str, int], None] = lambda step, work: None,
) -> list[dict[str, Any]]:
    """The lines of one text for an attached network, as in `evaluate`: the last ``decoded`` of ``ids`` are decoded."""
    begin = len(ids) - decoded
    # The token before them is the first to be decoded: it says the first of them.
    document = read_document(
        network, list(ids[: begin - 1]), chunk=chunk, on_chunk=lambda count: on_step("reading", count)
    )
    given, true = list(ids[begin - 1 : -1]), torch.tensor(ids[begin:], dtype=torch.int64, device="cpu")
    exact = _log_probabilities(network, document.fork(EXACT), given)
    on_step("full attention", decoded)
    lines = []
    for method in methods:
        cache = document.fork(method.config)
        said = _log_probabilities(network, cache, given) if method.config.samples else exact
        kl = (exact.exp() * (exact - said)).sum(-1).clamp(min=0.0)
        report = cache.report()
        lines.append(
            {
                "sampler": method.name,
                "nll": round(float(-said.gather(1, true[:, None]).mean()), 6),
                "kl": float(f"{float(kl.mean()):.4g}"),
                "kl_p95": float(f"{float(kl.quantile(0.95)):.4g}"),
                "top1": round(float((said.argmax(-1) == exact.argmax(-1)).float().mean()), 6),
                "share_mean": report.sampled_share_mean,
                "predicted_error_mean": report.predicted_error_mean,
                "predicted_error_p95": report.predicted_error_p95,
                "index_bytes": report.index_bytes,
                "kv_bytes": report.kv_bytes,
                "kl_tokens": [float(f"{float(each):.3g}") for each in kl],
            }
        )
        on_step(method.name, decoded)
    return lines


def _log_probabilities(network: Any, cache: MagicPigCache, ids: list[int]) -> Tensor:
    """(T, vocabulary) float32: of the next token, behind each of ``ids``, which are decoded one after the other."""
    parts = []
    with cache.decoding():
        for piece in torch.tensor([ids], device=network.device, dtype=torch.int64).split(PIECE, 1):
            logits = network(piece, **cache_argument(cache)).logits[0]
            parts.append(logits.float().log_softmax(-1).cpu())
    return torch.cat(parts)


def beginning(model: Model, text: Path, length: int) -> list[int]:
    """The first ``length`` tokens of a UTF-8 file. Raises MatrixError if it cannot be read or has fewer."""
    try:
        content = text.read_text(encoding="utf-8")
    except OSError as error:
        raise MatrixError(f"cannot read {text}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise MatrixError(f"{text} is not UTF-8 text (byte {error.start})") from None
    ids = encode(model, content, most=length)
    if len(ids) < length:
        raise MatrixError(f"{text} has {len(ids)} tokens, length {length} needs more")
    return ids


def _settings(model: Model, plan: Plan, dtype: str, chunk: int) -> dict[str, Any]:
    return {
        "benchmark": BENCHMARK,
        "settings": {
            "texts": {text.name: checksum([text]) for text in plan.texts},
            "lengths": plan.lengths,
            "samplers": {method.name: method.config.model_dump(mode="json") for method in plan.methods},
            "decoded": plan.decoded,
            "dtype": dtype,
            "chunk": chunk,
        },
        "model": identity(model),
    }


NUMBERS = ("nll", "kl", "kl_p95", "top1")


def table(results: Results) -> Table:
    """Length by sampler: means over all texts, the percentile over all their tokens. Raises ResultsError."""
    cells: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for number, line in enumerate(results.lines, 1):
        if not _is_whole(line):
            raise ResultsError(f"line {number} of the results is damaged: {json.dumps(line)[:200]}")
        cells.setdefault((line["length"], line["sampler"]), []).append(line)
    lengths = dict.fromkeys(length for length, _ in cells)
    blocks = [[_row(*key, lines) for key, lines in cells.items() if key[0] == length] for length in lengths]
    texts = len({line["text"] for line in results.lines})
    decoded = results.header["settings"].get("decoded")
    title = f"next tokens against full attention: {texts} texts, {decoded} tokens decoded behind each"
    head = ["length", "sampler", "keys read", "nll", "kl", "kl, 95 %", "same favourite", "predicted error"]
    return Table(title, head, blocks)


def _row(length: int, sampler: str, lines: list[dict[str, Any]]) -> list[str]:
    def mean(name: str) -> float | None:
        known = [line[name] for line in lines if line[name] is not None]
        return sum(known) / len(known) if known else None

    tokens = torch.tensor([kl for line in lines for kl in line["kl_tokens"]], dtype=torch.float64, device="cpu")
    share, predicted = mean("share_mean"), mean("predicted_error_mean")
    return [
        short_length(length),
        sampler,
        "all" if share is None else f"{share:.1%}",
        f"{mean('nll'):.3f}",
        f"{mean('kl'):.2g}",
        f"{float(tokens.quantile(0.95)):.2g}",
        f"{mean('top1'):.1%}",
        "" if predicted is None else f"{predicted:.1%}",
    ]


def _is_whole(line: dict[str, Any]) -> bool:
    numbers = all(isinstance(line.get(name), (int, float)) for name in (*NUMBERS, "length"))
    texts = all(isinstance(line.get(name), str) for name in ("text", "sampler"))
    tokens = line.get("kl_tokens")
    each = isinstance(tokens, list) and tokens and all(isinstance(kl, (int, float)) for kl in tokens)
    return numbers and texts and bool(each) and "share_mean" in line and "predicted_error_mean" in line
