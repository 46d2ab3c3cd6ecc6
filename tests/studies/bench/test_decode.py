import math

import pytest
import torch
from transformers import AttentionInterface

from magicpig.config import EXACT
from magicpig.integrations.transformers import NAME, MagicPigCache
from magicpig.integrations.transformers.attention import magicpig_attention
from magicpig.kernels import _native
from magicpig.store import KVStore
from magicpig.studies.bench import decode, shapes
from magicpig.studies.bench.clocks import PARTS, Clocks
from magicpig.studies.bench.decode import Decoder
from magicpig.studies.evaluation.matrix import parse_methods

TINY = {
    "model_type": "qwen3",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
}
METHODS = parse_methods("full,lsh:K=6,L=40,sketch:32", exact_below=0, dense_layers=(0,))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)


def decoder(**changes):
    return Decoder("tiny", **{"layers": 2, "dtype": torch.float32, "longest": 600, "steps": 3} | changes)


def test_one_result_per_sampler_whose_parts_add_up():
    rounds = []
    full, lsh, sketch = decoder().measure(600, METHODS, repeats=2, on_round=lambda: rounds.append(1))
    assert [each.name for each in (full, lsh, sketch)] == ["full", "lsh:K=6,L=40", "sketch:32"]
    assert len(rounds) == 6
    for each in (full, lsh, sketch):
        assert each.context == 600
        assert each.tokens_per_s == pytest.approx(1e3 / each.token_ms)
        assert each.ratio_full == pytest.approx(full.token_ms / each.token_ms)
        parts = (each.weights_ms, each.attention_ms, each.python_ms, each.generate_ms)
        assert min(parts) > 0
        assert each.python_us_per_layer == pytest.approx(each.python_ms * 1e3 / 2)
        assert 0 < each.token_min_ms <= each.token_ms
    assert full.sampled_share is None
    assert full.read_ms > 0
    assert lsh.read_ms is sketch.read_ms is None
    assert full.index_ms == full.index_bytes == 0
    assert 0 < lsh.sampled_share < 1
    assert sketch.sampled_share == pytest.approx(32 / 532, rel=0.1)
    assert 0 < sketch.index_bytes < lsh.index_bytes
    assert lsh.index_ms > 0
    assert lsh.kv_bytes == full.kv_bytes


def test_rows_of_each_kind_are_there_once():
    methods = parse_methods("full,full:kv_dtype=int8,sketch:32,kv_dtype=int8", exact_below=0, dense_layers=())
    full, small, sketch = decoder().measure(600, methods, repeats=1)
    assert small.kv_bytes == sketch.kv_bytes < 0.9 * full.kv_bytes  # the newest rows are not yet whole numbers
    assert full.ratio_full == 1


def test_requests_that_are_answered_together():
    turns, made = [], decoder()
    one = made.measure(600, METHODS, repeats=1, beside=[lambda: turns.append(1)])
    assert len(turns) == 2  # the first warms up
    four = made.measure(600, METHODS, repeats=1, batch=4)
    for alone, together in zip(one, four, strict=True):
        assert (alone.batch, together.batch) == (1, 4)
        assert together.tokens_per_s == pytest.approx(4e3 / together.token_ms)
        assert together.kv_bytes == 4 * alone.kv_bytes
        assert together.index_bytes == 4 * alone.index_bytes


def test_the_parts_of_a_token_are_all_of_it():
    made = decoder()
    made.measure(300, METHODS[:1], repeats=1)
    cache = made.filled(300, EXACT)
    clock = Clocks()
    made._generate(cache, 300, clock)
    assert cache.get_seq_length() == 300
    assert len(clock.tokens) == 3  # steps, without the first token of an answer
    for token in clock.tokens:
        assert set(token) == set(PARTS)
        assert min(token[part] for part in PARTS if part != "index") > 0


def test_clocks_are_taken_away_again():
    before = KVStore.make_room, KVStore.index_due, MagicPigCache.update, _native.decode_step
    model = decode.random_model(decode.model_config("tiny", 1, 10), torch.float32)
    forward = model.forward
    with Clocks().running(model):
        assert _native.decode_step is not before[-1]
        assert AttentionInterface()[NAME] is not magicpig_attention
    assert before == (KVStore.make_room, KVStore.index_due, MagicPigCache.update, _native.decode_step)
    assert AttentionInterface()[NAME] is magicpig_attention
    assert model.forward == forward


def test_a_clock_inside_another_stops_it(monkeypatch):
    clock, now = Clocks(), iter([0.0, 1.0, 3.0, 10.0])
    monkeypatch.setattr("magicpig.studies.bench.clocks.time.perf_counter", lambda: next(now))
    inner = clock.around("attention", lambda: None)
    clock.around("python", inner)()
    assert clock._spent["attention"] == 2.0
    assert clock._spent["python"] == 8.0


def test_samplers_take_turns_with_full_attention_when_memory_is_short(monkeypatch):
    made = decoder()
    monkeypatch.setattr(decode, "free_memory", lambda: 1 << 40)
    assert made.check(600, METHODS) == [list(METHODS)]
    needs = [made._cache_bytes(600, method.config) for method in METHODS]
    fixed = 2 * 600 * 2 * 16 * 4 + needs[0] + made.weight_bytes()
    monkeypatch.setattr(decode, "free_memory", lambda: int((fixed + sum(needs[1:])) / 0.75) - 1)
    assert made.check(600, METHODS) == [[METHODS[0], METHODS[1]], [METHODS[0], METHODS[2]]]
    monkeypatch.setattr(decode, "free_memory", lambda: fixed + max(needs[1:]) - 1)
    with pytest.raises(MemoryError, match=r"context=600 needs about .* fewer layers than 2 need less"):
        made.check(600, METHODS)


def test_results_are_in_order_when_memory_is_short(monkeypatch):
    made = decoder()
    monkeypatch.setattr(made, "check", lambda *_: [[METHODS[0], METHODS[1]], [METHODS[0], METHODS[2]]])
    results = made.measure(600, METHODS, repeats=1)
    assert [each.name for each in results] == [method.name for method in METHODS]


def test_random_weights_keep_activations_of_order_one():
    model = decode.random_model(decode.model_config("tiny", None, 64), torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {weights.dtype for weights in model.parameters()} == {torch.bfloat16}
    gate = model.model.layers[2].mlp.gate_proj.weight.detach().float()
    assert float(gate.std()) == pytest.approx(1 / math.sqrt(32), rel=0.1)
    logits = model(torch.arange(20)[None]).logits.detach().float()
    assert bool(torch.isfinite(logits).all())
    assert 0.1 < float(logits.std()) < 10


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_shapes_are_models(name):
    config = decode.model_config(name, None, 1000)
    assert config.max_position_embeddings == 1000
    assert config.hidden_size % config.num_attention_heads == 0
    assert config.num_attention_heads % config.num_key_value_heads == 0


# Parameters as the models' pages state them, embeddings counted once where they are tied.
@pytest.mark.parametrize(
    ("name", "billions"), [("llama-3.2-1b", 1.24), ("llama-3.2-3b", 3.21), ("llama-3.1-8b", 8.03), ("qwen3-0.6b", 0.6)]
)
def test_shapes_have_the_weights_of_their_models(name, billions):
    made = Decoder(name, layers=None, dtype=torch.bfloat16, longest=100, steps=1)
    assert made.weight_bytes() / 2e9 == pytest.approx(billions, abs=0.006)


def test_bad_shapes():
    with pytest.raises(ValueError, match=r"shape='gpt' is not known; allowed: llama-3\.2-1b"):
        shapes.settings("gpt")
    with pytest.raises(ValueError, match="layers=4 is out of range; tiny has 3"):
        shapes.settings("tiny", 4)
    with pytest.raises(ValueError, match="layers=0 is out of range"):
        shapes.settings("tiny", 0)


def test_too_short_to_sample():
    with pytest.raises(ValueError, match="context=68 has nothing to sample; it must exceed 68"):
        decoder().check(68, METHODS)
