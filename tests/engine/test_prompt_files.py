"""Prompts in files serve the next process, and what is wrong with a file is never served."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from magicpig import Config
from magicpig.engine import prompt_files
from magicpig.engine.prompt_files import PromptFiles, listed
from magicpig.engine.request import Request, SamplingParams
from magicpig.engine.runner import SequenceState
from magicpig.errors import ArgumentError
from magicpig.store import KVStore

FULL = Config(sampler="full")
SKETCH = Config(exact_below=32, block=8, recent=8, budget=16)
LSH = Config(K=4, L=20, exact_below=32, block=8, recent=8)
INT8 = Config(**SKETCH.model_dump() | {"kv_dtype": "int8"})
DRAWN = SamplingParams(max_tokens=16, seed=3, ignore_eos=True, temperature=0.9, top_k=20, top_p=0.95)


def answer(many, prompt, config=None):
    return many.generate([prompt], DRAWN, config=config, progress=False)[0].choices[0]


@pytest.fixture
def again(llm, tmp_path):
    """`again("llama", config)`: an engine that has only the files that those before have left."""
    made = []

    def start(kind, config, **options):
        while made:
            before = made.pop()
            before.engine.rest()
            before.close()
        made.append(llm(kind, config, cache_dir=tmp_path / "cache", **options))
        return made[-1]

    return start


def files(folder: Path) -> list[Path]:
    return [file.path for file in listed(folder / "cache")]


@pytest.mark.parametrize("config", [FULL, SKETCH, LSH, INT8], ids=lambda c: f"{c.sampler}-{c.kv_dtype}")
def test_the_next_process_reads_the_question_only(config, again, prompts, alone, reading):
    document = prompts[-1]
    answer(again("llama", config), document + prompts[1])
    many = again("llama", config)
    many.engine.observer = reading
    asked = document + prompts[3]
    done = answer(many, asked)
    known = len(document) // 8 * 8 if config.kv_dtype == "int8" else len(document)  # rounded rows: whole strides
    assert (list(done.tokens), done.report.cached_tokens) == (alone("llama", config, asked), known)
    assert reading.tokens == len(asked) - known


def test_the_next_process_may_attend_otherwise(again, prompts, alone):
    answer(again("llama", SKETCH), prompts[-1])
    for config in (LSH, FULL):
        done = answer(again("llama", config), prompts[-1] + prompts[1])
        assert list(done.tokens) == alone("llama", config, prompts[-1] + prompts[1])
        assert done.report.cached_tokens == len(prompts[-1])
    assert answer(again("llama", INT8), prompts[-1]).report.cached_tokens == 0, "its rows are other ones"


def test_windows_go_on_from_whole_prompts_only(again, prompts, alone):
    answer(again("gemma2", SKETCH), prompts[-1])
    longer, other = prompts[-1] + prompts[1], prompts[-1][:-9] + prompts[1]
    done = answer(again("gemma2", SKETCH), longer)
    assert (done.report.cached_tokens, list(done.tokens)) == (len(prompts[-1]), alone("gemma2", SKETCH, longer))
    done = answer(again("gemma2", SKETCH), other)
    assert (done.report.cached_tokens, list(done.tokens)) == (0, alone("gemma2", SKETCH, other))


def test_another_model_misses_and_leaves_the_file(again, prompts, tmp_path):
    answer(again("llama", FULL), prompts[-1])
    assert answer(again("qwen3", FULL), prompts[-1]).report.cached_tokens == 0
    many = again("llama", FULL)
    assert answer(many, prompts[-1] + [5]).report.cached_tokens == len(prompts[-1])
    assert len(files(tmp_path)) == 2
    assert {file.model for file in listed(tmp_path / "cache")} == {"llama", "qwen3"}


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99, 1.0])
def test_a_changed_byte_is_found_and_the_file_removed_with_a_warning(share, again, prompts, alone, tmp_path, caplog):
    answer(again("llama", SKETCH), prompts[-1])
    many = again("llama", SKETCH)  # has seen the file before it changes
    (path,) = files(tmp_path)
    content = bytearray(path.read_bytes())
    content[round(share * (len(content) - 1))] ^= 8
    path.write_bytes(content)
    assert [file.error is None for file in listed(tmp_path / "cache", verify=True)] == [False]
    with caplog.at_level(logging.WARNING, "magicpig.engine"):
        done = answer(many, prompts[-1])
    assert (list(done.tokens), done.report.cached_tokens) == (alone("llama", SKETCH, prompts[-1]), 0)
    assert "the checksum does not match" in caplog.text
    many.engine.rest()
    assert [file.error for file in listed(tmp_path / "cache", verify=True)] == [None], "it was written anew"


def test_a_file_that_cannot_be_opened_as_one_is_removed_at_the_start(again, prompts, tmp_path, caplog):
    answer(again("llama", FULL), prompts[-1])
    again("llama", FULL)
    (path,) = files(tmp_path)
    path.write_bytes(path.read_bytes()[:30])
    again("llama", FULL)
    assert (files(tmp_path), "cannot be read" in caplog.text) == ([], True)


def test_a_file_that_is_gone_is_a_miss(again, prompts, tmp_path):
    answer(again("llama", FULL), prompts[-1])
    many = again("llama", FULL)
    files(tmp_path)[0].unlink()
    assert answer(many, prompts[-1]).report.cached_tokens == 0
    many.engine.rest()
    assert len(files(tmp_path)) == 1


def test_what_a_file_nearly_has_is_not_written_again(again, prompts, tmp_path):
    many = again("llama", FULL)
    answer(many, prompts[-1])
    many.engine.rest()
    (first,) = files(tmp_path)
    os.utime(first, (1, 1))
    answer(many, prompts[-1] + prompts[1])  # five more tokens
    many.engine.rest()
    assert files(tmp_path) == [first]
    assert first.stat().st_mtime > 1e9, "it was used"
    answer(many, prompts[-1] + prompts[0])  # goes on for long: the first is not needed beside it
    many.engine.rest()
    (second,) = files(tmp_path)
    assert second != first
    answer(many, prompts[-1][:70] + prompts[0] + prompts[2])  # shares half of it
    many.engine.rest()
    assert len(files(tmp_path)) == 2


def test_the_least_recently_used_file_goes_first(again, tmp_path):
    many = again("llama", FULL)
    for token in (5, 6, 7):
        answer(many, [token] * 80)
        many.engine.rest()
        time.sleep(0.01)
    size = files(tmp_path)[0].stat().st_size
    many = again("llama", FULL, cache_limit=3 * size + size // 2)
    assert len(files(tmp_path)) == 3
    assert answer(many, [5] * 90).report.cached_tokens == 80
    answer(many, [8] * 80)
    many.engine.rest()
    kept = again("llama", FULL, cache_limit=3 * size + size // 2)
    assert [answer(kept, [token] * 81).report.cached_tokens for token in (5, 7, 8, 6)] == [80, 80, 80, 0]
    too_small = again("llama", FULL, cache_limit=size // 2)
    assert files(tmp_path) == []
    answer(too_small, [9] * 80)
    too_small.engine.rest()
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_used_is_refused(llm, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match=r"^cache_dir=.*file.*: cannot be used: (File exists|Not a directory)$"):
        llm("llama", FULL, cache_dir=tmp_path / "file")


def test_a_full_disk_costs_nothing_but_the_file(again, prompts, alone, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prompt_files, "write_prompt", full)
    many = again("llama", SKETCH)
    assert list(answer(many, prompts[-1]).tokens) == alone("llama", SKETCH, prompts[-1])
    many.engine.rest()
    assert "No space left on device" in caplog.text
    assert answer(many, prompts[-1]).report.cached_tokens == len(prompts[-1]) - 1


def test_others_are_answered_while_a_file_is_read(again, prompts, alone, monkeypatch):
    answer(again("llama", SKETCH), prompts[-1])
    many = again("llama", SKETCH)
    going, read = threading.Event(), PromptFiles.read
    monkeypatch.setattr(PromptFiles, "read", lambda self, file: (going.wait(30), read(self, file))[1])
    engine, said = many.engine, {"long": [], "other": []}
    engine.submit(Request(tuple(prompts[-1]), DRAWN), lambda delta: said["long"].append(delta))
    engine.submit(Request(tuple(prompts[0]), DRAWN), lambda delta: said["other"].append(delta))
    while not said["other"] or said["other"][-1].finish is None:
        engine.step()
    assert (said["long"], engine.unfinished) == ([], 1)
    going.set()
    while engine.unfinished:
        if not engine.step():
            engine.wait()
    assert [token for delta in said["long"] for token in delta.tokens] == alone("llama", SKETCH, prompts[-1])
    assert said["long"][-1].report.cached_tokens == len(prompts[-1]) - 1


class _Network:
    def __init__(self) -> None:
        self.config, self.device = LlamaConfig(), torch.device("cpu")

    def named_parameters(self):
        return [("weights", torch.arange(9.0))]


class _Words:
    def decode(self, tokens):
        return " ".join(map(str, tokens))


def _state(length: int) -> SequenceState:
    store = KVStore(1, 16, torch.float32, SKETCH)
    store.append(*torch.full((2, 1, length, 16), float(length)))
    store.settle()
    return SequenceState(SKETCH, [store])


def _fill(folder: Path, seed: int, begun: Any) -> None:
    """Writes prompts and uses them until it is killed."""
    torch.set_num_threads(1)
    draw, own = random.Random(seed), PromptFiles(folder, 200_000, _Network(), _Words())
    while True:
        length = draw.randrange(100, 1000)
        own.offer((length,) * length, _state(length))
        own.flush()
        begun.set()
        file, known = own.find((length,) * length, length, SKETCH)
        if file is not None and known == length:
            own.read(file)


@pytest.mark.parametrize("kills", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_a_folder_verifies_clean_after_kills_at_any_moment(kills, tmp_path):
    draw, context, seen = random.Random(0), multiprocessing.get_context("fork"), set()
    for i in range(kills):
        begun = context.Event()
        process = context.Process(target=_fill, args=(tmp_path, i, begun))
        process.start()
        assert begun.wait(60)
        time.sleep(draw.uniform(0.0, 0.1))
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        found = list(listed(tmp_path, verify=True))
        assert [file.error for file in found if file.error is not None] == []
        seen |= {file.path for file in found}
    assert len(seen) > 3, "something was written at all"
    own = PromptFiles(tmp_path, 200_000, _Network(), _Words())
    assert not list(tmp_path.glob(".*")), "what was begun is cleared away"
    for file in own._prompts:
        state = own.read(file)
        assert state is not None
        assert state.length == len(file.tokens)
        (keys, _), *_ = state.stores[0].blocks()
        assert keys.eq(len(file.tokens)).all()
    own.close()
