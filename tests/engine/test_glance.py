"""Who watches an answer sees what attention reads, token by token."""

from __future__ import annotations

import pytest

from magicpig import Config
from magicpig.engine.request import Request, SamplingParams

FULL = Config(sampler="full")
SKETCH = Config(exact_below=32, block=8, recent=8, budget=16, dense_layers=(0,))
LSH = Config(K=4, L=20, exact_below=32, block=8, recent=8, dense_layers=(0,))
PARAMS = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)


def glances(llm, config, prompt, kind="llama", **request):
    engine, deltas = llm(kind, config).engine, []
    engine.submit(Request(tuple(prompt), PARAMS, **request), deltas.append)
    while engine.unfinished:
        if not engine.step():
            engine.wait()
    return [delta.glance for delta in deltas if delta.tokens]


@pytest.mark.parametrize("config", [SKETCH, LSH], ids=lambda config: config.sampler)
def test_shares_of_sampled_layers_are_what_was_read(config, llm, prompts):
    first, *rest = glances(llm, config, prompts[-1], watch=True)
    assert first.rows_share == (1.0, 1.0), "the prompt is read exactly"
    assert first.predicted_error is None
    for seen in rest:
        assert seen.rows_share[0] == 1.0, "a dense layer"
        assert 8 / 130 < seen.rows_share[1] < 1.0
        assert seen.predicted_error > 0
        assert seen.full_bytes / 2 < seen.read_bytes < seen.full_bytes
        assert 0 < seen.index_bytes < seen.kv_bytes
    rows = 2 * 2 * 16 * 4  # of a token in a layer: kv heads, key and value, numbers, bytes
    assert [seen.full_bytes for seen in (first, *rest)] == [2 * rows * (130 + i) for i in range(5)]


def test_exact_attention_and_windows_read_all(llm, prompts):
    for seen in glances(llm, FULL, prompts[-1], watch=True):
        assert (seen.rows_share, seen.predicted_error) == ((1.0, 1.0), None)
        assert seen.read_bytes == seen.full_bytes
    assert all(seen.rows_share[0] == 1.0 for seen in glances(llm, SKETCH, prompts[-1], "gemma2", watch=True))


def test_nobody_is_shown_what_he_does_not_ask_for(llm, prompts):
    assert glances(llm, SKETCH, prompts[-1]) == [None] * 5
