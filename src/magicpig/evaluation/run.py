"""The runner: every sample of a matrix, answered by every sampler under every protocol, into one results file.

A run that was stopped, however rudely, goes on where it was when it is started again with the same settings, and the
file ends up the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from magicpig.evaluation.answer import EXACT, Answer, answers, read_document
from magicpig.evaluation.matrix import Matrix, MatrixError
from magicpig.evaluation.results import Results, ResultsFile, read_results
from magicpig.evaluation.tasks import Sample, generate, score
from magicpig.generation import Model, encode, encode_in_two, load, stop_tokens
from magicpig.integrations.transformers import attach
from magicpig.integrations.transformers.shapes import layer_shapes
from magicpig.planner import check, plan
from magicpig.provenance import provenance
from magicpig.types import MemoryUse


def evaluate(
    model: Model,
    matrix: Matrix,
    path: Path,
    *,
    dtype: str = "auto",
    chunk: int = 1024,
    on_start: Callable[[int, int], None] = lambda done, total: None,
    on_step: Callable[[str, int], None] = lambda step, work: None,
) -> Results:
    """Run what is missing in the results file at ``path``, and return all that is in it.

    dtype: of the network, as in `generation.load`. chunk: tokens read at a time.
    on_start is called with the work that was done before and all work, on_step with what was just done and how much
    that was. Work is counted in tokens: each text once for reading it and once for each answer.
    Raises MatrixError, ResultsError or ModelError, one line each, and MemoryError.
    """
    check_matrix(model, matrix)
    cells, runs = list(matrix.cells()), list(matrix.runs())
    work = [length * (1 + len(runs)) for _, length, _ in cells]
    with ResultsFile(path, _settings(model, matrix, dtype, chunk), provenance(), group=len(runs)) as file:
        on_start(sum(work[: file.done]), sum(work))
        if file.done < len(cells):
            network = attach(load(model, dtype=dtype), EXACT)
            _check_memory(network, matrix)
            stop = stop_tokens(model, network)
        for task, length, index in cells[file.done :]:
            name = f"{task} {length} #{index}"
            on_step(name, 0)
            sample = make_sample(model, matrix, task, length, index)
            new_tokens = min(sample.tokens_to_generate, matrix.new_tokens or sample.tokens_to_generate)
            context, question = make_prompt(model, matrix, sample, new_tokens)
            document = read_document(network, context, chunk=chunk, on_chunk=partial(on_step, name))
            lines = []
            given = answers(network, document, question, runs, new_tokens=new_tokens, stop=stop)
            for (protocol, method), answer in zip(runs, given, strict=True):
                key = {"task": task, "length": length, "index": index, "protocol": protocol, "sampler": method.name}
                lines.append(key | {"prompt_tokens": len(context) + len(question)} | _judged(model, sample, answer))
                on_step(f"{name} {protocol} {method.name}", length)
            file.append(lines)
            on_step(name, length - len(context))
    return read_results(path)


def check_matrix(model: Model, matrix: Matrix) -> None:
    """Raise MatrixError or ModelError for what could never be evaluated, before anything is loaded or written."""
    if matrix.chat and not model.tokenizer.chat_template:
        raise MatrixError(f"{model.directory}: the tokenizer has no chat template")
    if model.limit is not None and matrix.lengths[-1] > model.limit:
        raise MatrixError(f"length {matrix.lengths[-1]} is beyond the model's limit of {model.limit} tokens")
    for task in matrix.tasks:
        make_sample(model, matrix, task, matrix.lengths[0], 0)


def make_sample(model: Model, matrix: Matrix, task: str, length: int, index: int) -> Sample:
    """A sample of the matrix, with room for what the chat template adds. Raises MatrixError."""
    reserve = len(encode(model, "x", chat=True)) - len(encode(model, "x")) if matrix.chat else 0
    try:
        return generate(
            task,
            model.tokenizer,
            length,
            index=index,
            seed=matrix.seed,
            sources=matrix.sources,
            reserve=max(0, reserve),
        )
    except ValueError as error:
        raise MatrixError(str(error)) from None


def make_prompt(model: Model, matrix: Matrix, sample: Sample, new_tokens: int) -> tuple[list[int], list[int]]:
    """Context and question as token ids. In a chat, the answer prefix is the beginning of the assistant's turn."""
    if not matrix.chat:
        return encode_in_two(model, sample.context, sample.question, new_tokens=new_tokens)
    question = sample.question.removesuffix(sample.answer_prefix)
    return encode_in_two(model, sample.context, question, chat=True, answer=sample.answer_prefix, new_tokens=new_tokens)


def _judged(model: Model, sample: Sample, answer: Answer) -> dict[str, Any]:
    text = model.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    cache = answer.cache
    return {
        "score": score(sample.task, text, sample.answers),
        "prediction": text,
        "answers": list(sample.answers),
        "new_tokens": len(answer.token_ids),
        "share_mean": cache.sampled_share_mean,
        "share_max": cache.sampled_share_max,
        "index_bytes": cache.index_bytes,
        "kv_bytes": cache.kv_bytes,
    }


def _settings(model: Model, matrix: Matrix, dtype: str, chunk: int) -> dict[str, Any]:
    """All that decides about the results. Files go by name and content, so that they may move."""
    files = {
        name: path and {"name": path.name, "sha256": _sha256([path])} for name, path in vars(matrix.sources).items()
    }
    return {
        "benchmark": "ruler",
        "settings": {
            "tasks": matrix.tasks,
            "lengths": matrix.lengths,
            "samplers": {method.name: method.config.model_dump(mode="json") for method in matrix.methods},
            "protocols": matrix.protocols,
            "samples": matrix.samples,
            "seed": matrix.seed,
            "chat": matrix.chat,
            "new_tokens": matrix.new_tokens,
            "sources": files,
            "dtype": dtype,
            "chunk": chunk,
        },
        "model": identity(model),
    }


def identity(model: Model) -> dict[str, str]:
    """Which weights these are: the name of their directory, and a checksum."""
    weights = sorted(model.directory.glob("*.safetensors"))
    return {"name": model.directory.resolve().name, "sha256": _sha256(weights)}


def _sha256(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _check_memory(network: Any, matrix: Matrix) -> None:
    """The longest text is held as it was read and, with the index of the hungriest sampler, once more."""
    tokens = matrix.lengths[-1]
    plans = [
        plan(
            layer_shapes(network.config, method.config), method.config, sequences=1, tokens=tokens, dtype=network.dtype
        )
        for method in matrix.methods
    ]
    worst = max(plans, key=lambda each: each.total)
    check(replace(worst, kept=MemoryUse(2 * worst.kept.rows, worst.kept.index)))
