"""Our tasks for lm-evaluation-harness, and its tasks for a model with our attention.

`export` writes task files that any lm_eval can run; `run` evaluates a local model on those and on lm_eval's own.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from magicpig.config import Config
from magicpig.errors import ArgumentError
from magicpig.generation import Model, load
from magicpig.studies.evaluation.matrix import Matrix, MatrixError, parse_tasks
from magicpig.studies.evaluation.run import check_matrix
from magicpig.studies.evaluation.tasks import TASKS, Sources, generate, score

PREFIX = "magicpig_"  # of the names that our tasks have there; its own RULER tasks have the names of RULER
GROUP = f"{PREFIX}ruler"
SAMPLES = 100

_CODE = '''"""Made by `magicpig eval lm-eval --export`; needs the package magicpig."""

from magicpig.studies.evaluation.harness import dataset, process_results
'''

_TASK = """task: {name}
custom_dataset: !function magicpig_tasks.dataset
dataset_kwargs: {kwargs}
metadata: {metadata}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
gen_prefix: "{{{{answer_prefix}}}}"
doc_to_target: "{{{{answers}}}}"
process_results: !function magicpig_tasks.process_results
metric_list: {metrics}
generation_kwargs: {generation}
num_fewshot: 0
"""


def export(
    directory: Path,
    *,
    lengths: Sequence[int] = (4096,),
    samples: int = SAMPLES,
    seed: int = 0,
    sources: Sources = Sources(),  # noqa: B008
) -> list[str]:
    """Write task files into ``directory`` (made if missing), for `lm_eval --include_path`, and return their names.

    One task each for those of RULER whose files are in ``sources``, and the group of them all. A task has a score for
    each length, called by the number of tokens. Raises MatrixError if the files cannot be written.
    """
    names = {name: PREFIX + name for name, task in TASKS.items() if not task.source or getattr(sources, task.source)}
    settings = {"lengths": list(lengths), "samples": samples, "seed": seed}
    # They may be read from elsewhere.
    paths = {name: str(path.absolute()) for name, path in vars(sources).items() if path is not None}
    metrics = [{"metric": str(length), "aggregation": "mean", "higher_is_better": True} for length in lengths]
    files = {"magicpig_tasks.py": _CODE}
    for task, name in names.items():
        generation = {"do_sample": False, "max_gen_toks": TASKS[task].tokens_to_generate, "until": []}
        files[f"{name}.yaml"] = _TASK.format(
            name=name,
            kwargs=json.dumps({"task": task}),
            metadata=json.dumps({"version": 1.0, **settings, **paths}),
            metrics=json.dumps(metrics),
            generation=json.dumps(generation),
        )
    averages = [{"metric": str(length), "weight_by_size": False} for length in lengths]
    group = {
        "group": GROUP,
        "task": list(names.values()),
        "aggregate_metric_list": averages,
        "metadata": {"version": 1},
    }
    files[f"{GROUP}.yaml"] = json.dumps(group, indent=2) + "\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (directory / file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise MatrixError(f"cannot write {error.filename}: {error.strerror}") from None
    return [*names.values(), GROUP]


def dataset(
    task: str,
    *,
    lengths: Iterable[int],
    samples: int,
    seed: int = 0,
    tokenizer: str | None = None,
    pretrained: str | None = None,
    filler: str | None = None,
    squad: str | None = None,
    hotpotqa: str | None = None,
    **others: Any,
) -> Mapping[str, Any]:
    """What the exported files call: the samples of a task, as lm_eval wants them. Lengths are those of the tokenizer.

    tokenizer, pretrained: its name or directory, from lm_eval's model arguments or ``--metadata``; other names that
        come along are ignored. Raises TaskError as `generate` does, and without a tokenizer.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer

    name = tokenizer or pretrained
    if not name:
        raise ArgumentError("tokenizer is not given: lengths are counted in its tokens; name it in --metadata")
    loaded = AutoTokenizer.from_pretrained(name)
    given = {"filler": filler, "squad": squad, "hotpotqa": hotpotqa}
    sources = Sources(**{option: Path(path) for option, path in given.items() if path})
    made = [
        generate(task, loaded, length, index=index, seed=seed, sources=sources)
        for length in lengths
        for index in range(samples)
    ]
    rows = [
        {
            "task": task,
            "length": sample.length,
            "prompt": sample.prompt.removesuffix(sample.answer_prefix),
            # The harness puts a space in between.
            "answer_prefix": sample.answer_prefix.strip(),
            "answers": list(sample.answers),
        }
        for sample in made
    ]
    return {"test": Dataset.from_list(rows)}


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """What the exported files call: the score of one answer, named by the length of its text."""
    return {str(doc["length"]): score(doc["task"], results[0], doc["answers"])}


def run(
    model: Model,
    tasks: str,
    *,
    config: Config,
    lengths: Sequence[int] = (4096,),
    samples: int = SAMPLES,
    seed: int = 0,
    sources: Sources = Sources(),  # noqa: B008
    limit: int | None = None,
    fewshot: int | None = None,
    chat: bool = False,
    dtype: str = "auto",
) -> dict[str, Any]:
    """Evaluate an opened model, attending by ``config``, and return lm_eval's results with that config.

    tasks: names separated by commas: our tasks and their groups, and lm_eval's own, which may download their data.
    lengths, samples, seed, sources: of our tasks. limit: of questions per task. fewshot: solved examples in front of a
    question, where lm_eval's task allows it. chat: wrap prompts as a user's message. dtype: as in `generation.load`.
    Raises MatrixError if lm_eval is not installed or there is no such task, TaskError if one of ours cannot be
    generated, ModelError if the model cannot be loaded.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from magicpig.integrations.lm_eval import SamplingLM
    except ImportError as error:
        raise MatrixError(f"{error.name} is not installed; pip install 'magicpig[eval]'") from None
    ours, others = _split(tasks)
    matrix = Matrix(ours, tuple(sorted(lengths)), (), samples=samples, seed=seed, chat=chat, sources=sources)
    check_matrix(model, matrix)
    with tempfile.TemporaryDirectory() as folder:
        export(Path(folder), lengths=matrix.lengths, samples=samples, seed=seed, sources=sources)
        manager = TaskManager(
            include_path=folder,
            include_defaults=bool(others),  # there are thousands; finding them takes its time
            metadata={"tokenizer": str(model.directory)},
        )
        for name in others:
            if name not in manager.all_tasks:
                raise MatrixError(f"task {name!r} is neither ours nor one of lm_eval")
        results = simple_evaluate(
            SamplingLM(load(model, dtype=dtype), model.tokenizer, config),
            tasks=[*(PREFIX + task for task in ours), *others],
            task_manager=manager,
            limit=limit,
            num_fewshot=fewshot,
            apply_chat_template=chat,
            bootstrap_iters=0,
            log_samples=False,
        )
    return {"config": config.model_dump(mode="json"), "results": results["results"], "versions": results["versions"]}


def _split(tasks: str) -> tuple[tuple[str, ...], list[str]]:
    """Our tasks and those that only lm_eval can know."""
    ours: set[str] = set()
    others = []
    for name in tasks.split(","):
        try:
            ours.update(parse_tasks(name))
        except MatrixError:
            others.append(name.strip())
    return tuple(task for task in TASKS if task in ours), others
