"""The runner: every sample of a matrix, answered by every sampler under every protocol, into one results file.

A run that was stopped, however rudely, goes on where it was when it is started again with the same settings, and the
file ends up the same. One that has ended goes on if more samples are wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from magicpig.config import EXACT
from magicpig.generation import Model, encode, encode_in_two, load, open_model, silence_transformers, stop_tokens
from magicpig.integrations.transformers import attach
from magicpig.integrations.transformers.shapes import layer_shapes
from magicpig.model_dir import checksum
from magicpig.store.planner import check, plan
from magicpig.studies.evaluation.answer import Answer, answers, read_document
from magicpig.studies.evaluation.matrix import Matrix, MatrixError
from magicpig.studies.evaluation.results import Results, ResultsFile, read_results
from magicpig.studies.evaluation.tasks import Sample, check_minimum, generate, score
from magicpig.studies.evaluation.workers import in_order
from magicpig.studies.provenance import provenance
from magicpig.types import MemoryUse


def evaluate(
    model: Model,
    matrix: Matrix,
    path: Path,
    *,
    dtype: str = "auto",
    chunk: int = 1024,
    jobs: int = 1,
    on_start: Callable[[int, int], None] = lambda done, total: None,
    on_step: Callable[[str, int], None] = lambda step, work: None,
) -> Results:
    """Run what is missing in the results file at ``path``, and return all that is in it.

    dtype: of the network, as in `generation.load`. chunk: tokens read at a time. jobs: processes that share the samples
    and the processors; small models gain, as Python takes much of their time and runs on one processor.
    on_start is called with the work that was done before and all work, on_step with what was just done and how much
    that was. Work is counted in tokens: each text once for reading it and once for each answer.
    Raises MatrixError, TaskError, ResultsError or ModelError, one line each, and MemoryError.
    """
    check_matrix(model, matrix)
    cells, runs = list(matrix.cells()), list(matrix.runs())
    work = [length * (1 + len(runs)) for _, length, _ in cells]
    made = provenance() | {"jobs": jobs}
    with ResultsFile(path, _settings(model, matrix, dtype, chunk), made, group=len(runs)) as file:
        on_start(sum(work[: file.done]), sum(work))
        todo = cells[file.done :]
        if todo and jobs == 1:
            examiner = Examiner(model, matrix, dtype, chunk)
            for cell in todo:
                file.append(examiner.lines(cell, on_step))
        elif todo:
            prepare = partial(_examine, model.directory, model.settings, matrix, dtype, chunk, jobs)
            for (task, length, index), lines in zip(todo, in_order(prepare, todo, jobs), strict=True):
                file.append(lines)
                on_step(f"{task} {length} #{index}", length * (1 + len(runs)))
    return read_results(path)


class Examiner:
    """A loaded model that is asked the samples of a matrix. copies: how many of it share the memory."""

    def __init__(self, model: Model, matrix: Matrix, dtype: str, chunk: int, *, copies: int = 1) -> None:
        self.model, self.matrix, self.chunk = model, matrix, chunk
        self.network = attach(load(model, dtype=dtype), EXACT)
        self.stop = stop_tokens(model, self.network)
        _check_memory(self.network, matrix, copies)

    def lines(
        self, cell: tuple[str, int, int], on_step: Callable[[str, int], None] = lambda step, work: None
    ) -> list[dict[str, Any]]:
        """The lines of one sample in the results file. on_step: as in `evaluate`."""
        model, matrix, (task, length, index) = self.model, self.matrix, cell
        name = f"{task} {length} #{index}"
        on_step(name, 0)
        sample = make_sample(model, matrix, task, length, index)
        new_tokens = min(sample.tokens_to_generate, matrix.new_tokens or sample.tokens_to_generate)
        context, question = make_prompt(model, sample, new_tokens, chat=matrix.chat)
        document = read_document(self.network, context, chunk=self.chunk, on_chunk=partial(on_step, name))
        on_step(name, length - len(context))
        lines, runs = [], list(matrix.runs())
        given = answers(self.network, document, question, runs, new_tokens=new_tokens, stop=self.stop)
        for (protocol, method), answer in zip(runs, given, strict=True):
            key = {"task": task, "length": length, "index": index, "protocol": protocol, "sampler": method.name}
            lines.append(key | {"prompt_tokens": len(context) + len(question)} | _judged(model, sample, answer))
            on_step(f"{name} {protocol} {method.name}", length)
        return lines


def _examine(
    directory: Path, settings: dict[str, Any], matrix: Matrix, dtype: str, chunk: int, jobs: int
) -> Callable[[tuple[str, int, int]], list[dict[str, Any]]]:
    silence_transformers()
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    model = open_model(directory, **settings)
    return Examiner(model, matrix, dtype, chunk, copies=jobs).lines


def check_matrix(model: Model, matrix: Matrix) -> None:
    """Raise MatrixError, TaskError or ModelError for what cannot be evaluated, before anything is loaded or written."""
    if matrix.chat and not model.tokenizer.chat_template:
        raise MatrixError(f"{model.directory}: the tokenizer has no chat template")
    if model.limit is not None and matrix.lengths[-1] > model.limit:
        raise MatrixError(f"length {matrix.lengths[-1]} is beyond the model's limit of {model.limit} tokens")
    for task in matrix.tasks:
        make_sample(model, matrix, task, matrix.lengths[0], 0)
        check_minimum(
            task,
            model.tokenizer,
            matrix.lengths[0],
            samples=matrix.samples,
            seed=matrix.seed,
            sources=matrix.sources,
            reserve=_reserve(model, matrix),
        )


def make_sample(model: Model, matrix: Matrix, task: str, length: int, index: int) -> Sample:
    """A sample of the matrix, with room for what the chat template adds. Raises TaskError."""
    return generate(
        task,
        model.tokenizer,
        length,
        index=index,
        seed=matrix.seed,
        sources=matrix.sources,
        reserve=_reserve(model, matrix),
    )


def _reserve(model: Model, matrix: Matrix) -> int:
    return template_tokens(model) if matrix.chat else 0


def template_tokens(model: Model) -> int:
    """How many tokens the chat template adds to a message."""
    return max(0, len(encode(model, "x", chat=True)) - len(encode(model, "x")))


def make_prompt(model: Model, sample: Sample, new_tokens: int, *, chat: bool) -> tuple[list[int], list[int]]:
    """Context and question as token ids. In a chat, the answer prefix is the beginning of the assistant's turn."""
    if not chat:
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
    """All that decides about the results but their number. Files go by name and content, so that they may move."""
    files = {
        name: path and {"name": path.name, "sha256": checksum([path])} for name, path in vars(matrix.sources).items()
    }
    return {
        "benchmark": "ruler",
        "settings": {
            "tasks": matrix.tasks,
            "lengths": matrix.lengths,
            "samplers": {method.name: method.config.model_dump(mode="json") for method in matrix.methods},
            "protocols": matrix.protocols,
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
    """Which weights these are: the name of their directory, a checksum, and what is changed about them."""
    known = {"name": model.directory.resolve().name, "sha256": checksum(sorted(model.directory.glob("*.safetensors")))}
    if model.adapter is not None:
        known["adapter"] = checksum(sorted(model.adapter.glob("adapter_model.*")))
    if model.rope_scaling is not None:
        known["rope_scaling"] = model.rope_scaling
    if model.weights != "auto":
        known["weights"] = model.weights
    return known


def _check_memory(network: Any, matrix: Matrix, copies: int) -> None:
    """The longest text is held as it was read and, with the index of the hungriest sampler, once more."""
    tokens = matrix.lengths[-1]
    plans = [
        plan(
            layer_shapes(network.config, method.config), method.config, sequences=1, tokens=tokens, dtype=network.dtype
        )
        for method in matrix.methods
    ]
    worst = max(plans, key=lambda each: each.total)
    kept = MemoryUse(2 * copies * worst.kept.rows, copies * worst.kept.index)
    check(replace(worst, sequences=copies, kept=kept, transient=copies * worst.transient))
