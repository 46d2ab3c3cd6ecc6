"""Lossless answers are those of full attention: to the bit where they are greedy, else in distribution."""

from __future__ import annotations

import json

import pytest
import torch
from scipy import stats
from torch import nn
from typer.testing import CliRunner

from magicpig import Config, MagicPigCache, attach, detach, generation
from magicpig.cli import app
from magicpig.cli.options import Mode
from magicpig.errors import ArgumentError
from magicpig.generation import lossless
from magicpig.generation.lossless import (
    Cost,
    Decoding,
    Pace,
    _judged,
    _judged_by_chance,
    check,
    costs_of,
    why_not_to_the_bit,
)
from magicpig.generation.rowwise import MOST_ROWS, foreign_products, rowwise
from magicpig.integrations.transformers import UnsupportedModelError
from magicpig.integrations.transformers.compat import cache_argument
from magicpig.studies import pocket
from magicpig.weights import use_weights

WORDS = ["<unk>", "<eos>", *(f"w{i}" for i in range(58))]
SMALL = {"recent": 8, "block": 16, "exact_below": 0, "sinks": 2}


@pytest.fixture(scope="module")
def directory(tmp_path_factory, save_tiny_llama):
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", WORDS, split=None, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def opened(directory):
    return generation.open_model(directory)


@pytest.fixture(autouse=True)
def drafts_that_pay(monkeypatch):
    """Behind the short contexts of tests they never would."""
    monkeypatch.setattr(lossless, "costs_of", lambda network, cache: lambda length: Cost(0.5, 0.0))


def answer(opened, network, ids, config, **settings):
    return generation.generate(network, opened.tokenizer, ids, config, **{"max_new_tokens": 40, **settings})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "settings",
    [
        {"budget": 24},
        {"budget": 0.9},
        {"sampler": "lsh", "K": 4, "L": 20},
        {"budget": 16, "kv_dtype": "int8"},
        {"sampler": "topk", "budget": 8},
    ],
    ids=["sketch", "nearly all", "lsh", "int8", "topk"],
)
def test_greedy_tokens_are_those_of_full_attention(settings, dtype, opened):
    """Answers cross the ends of several strides, and accept some drafts and refuse others."""
    network = generation.load(opened, dtype=dtype)
    config = Config(**SMALL, **settings)
    full = config.changed({"sampler": "full"})
    for seed in range(3):
        ids = torch.randint(2, 60, (150 + 31 * seed,), generator=torch.Generator().manual_seed(seed)).tolist()
        expected = answer(opened, network, ids, full, chunk=64)
        found = answer(opened, network, ids, config, chunk=64, mode="lossless")
        assert found.token_ids == expected.token_ids
        assert found.text == expected.text
        assert found.drafts.drafted >= found.drafts.accepted
        assert found.drafts.accepted + found.drafts.passes == len(found.token_ids) - 1
        assert found.drafts.drafted > 0
        assert expected.drafts is None


def test_the_cache_holds_what_full_attention_would_have_written(opened):
    network = generation.load(opened, dtype="bfloat16")
    config = Config(**SMALL, budget=16)
    ids = torch.randint(2, 60, (1, 90), generator=torch.Generator().manual_seed(5))
    caches = [MagicPigCache(network.config, each) for each in (config, config.changed({"sampler": "full"}))]
    attach(network, config)
    options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    lossless = network.generate(ids, **options, **cache_argument(caches[0]), custom_generate=Decoding())
    full = network.generate(ids, **options, **cache_argument(caches[1]))
    assert torch.equal(lossless.sequences, full)
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        stores = [layer.stores[0] for layer in layers]
        assert stores[0].length == stores[1].length == 90 + 29
        held = [[torch.cat(x, 1) for x in zip(*store.blocks(), strict=True)] for store in stores]
        assert all(torch.equal(x, y) for x, y in zip(*held, strict=True))
    detach(network)


def test_an_answer_ends_where_full_attention_ends_it(opened):
    network = generation.load(opened)
    config = Config(**SMALL, budget=0.9)
    ids = torch.randint(2, 60, (120,), generator=torch.Generator().manual_seed(2)).tolist()
    whole = answer(opened, network, ids, config.changed({"sampler": "full"}))
    for new in (1, 2, 7):
        assert (
            answer(opened, network, ids, config, max_new_tokens=new, mode="lossless").token_ids
            == (whole.token_ids[:new])
        )
    word = whole.text.split()[5]
    expected = answer(opened, network, ids, config.changed({"sampler": "full"}), stop=[word])
    found = answer(opened, network, ids, config, stop=[word], mode="lossless")
    assert (found.text, found.token_ids) == (expected.text, expected.token_ids)


def test_short_contexts_draft_nothing(opened):
    network = generation.load(opened)
    found = answer(opened, network, [3, 4, 5] * 9, Config(), mode="lossless")
    assert found.drafts.drafted == 0
    assert found.drafts.acceptance is None
    assert found.drafts.passes == len(found.token_ids) - 1


# --- chance -----------------------------------------------------------------------------------------------------------


def test_judged_tokens_are_distributed_as_the_exact_scores_say():
    """Three drafted tokens: the first of what comes is distributed by the first exact scores, and so on."""
    torch.manual_seed(1)
    vocabulary, draws = 7, 20_000
    exact, guessed = torch.randn(3, vocabulary), torch.randn(2, vocabulary)
    exact[0, 2] = -torch.inf  # a processor forbids it
    counts = [torch.zeros(vocabulary), torch.zeros(vocabulary, vocabulary)]
    for _ in range(draws):
        tokens = torch.stack([torch.multinomial(scores.softmax(-1), 1)[0] for scores in guessed])
        found = _judged_by_chance(tokens, [scores[None] for scores in guessed], exact)
        counts[0][found[0]] += 1
        if len(found) > 1:
            counts[1][found[0], found[1]] += 1
    first = exact[0].softmax(-1)
    seen = first > 0
    assert counts[0][~seen].sum() == 0
    assert stats.chisquare(counts[0][seen], (first * draws)[seen]).pvalue > 1e-3
    for row in counts[1]:  # whatever the first was, the second is distributed by the second scores
        if row.sum() > 200:
            assert stats.chisquare(row, exact[1].softmax(-1) * row.sum()).pvalue > 1e-3


def test_answers_are_distributed_as_those_of_full_attention(tmp_path, save_tiny_llama):
    """The second and third new token of a vocabulary of eight, drafted by a sample that is often wrong."""
    words = ["<unk>", "<eos>", *(f"w{i}" for i in range(6))]
    opened = generation.open_model(save_tiny_llama(tmp_path / "tiny", words, num_hidden_layers=1))
    network = generation.load(opened)
    config = Config(**SMALL, budget=4)
    attach(network, config)
    prompt = torch.randint(2, 8, (1, 100), generator=torch.Generator().manual_seed(3))
    base = MagicPigCache(network.config, config)
    with torch.no_grad(), base.prefilling():
        network(prompt[:, :-1], **cache_argument(base))
    expected = torch.zeros(8, 8, 8)
    full = base.fork(config.changed({"sampler": "full"}))
    with torch.no_grad():
        logits = network(prompt[:, -1:], **cache_argument(full)).logits[0, -1]
        for i, p in enumerate(logits.softmax(-1).tolist()):
            one = full.fork()
            second = network(torch.tensor([[i]]), **cache_argument(one)).logits[0, -1].softmax(-1)
            for j in range(8):
                two = one.fork()
                third = network(torch.tensor([[j]]), **cache_argument(two)).logits[0, -1].softmax(-1)
                expected[i, j] = p * second[j] * third
    draws, counts, drafts = 500, torch.zeros(8, 8, 8), [0, 0]
    for _ in range(draws):
        decoding, cache = Decoding(), base.fork()
        tokens = network.generate(
            prompt, **cache_argument(cache), custom_generate=decoding, max_new_tokens=3, do_sample=True, pad_token_id=0
        ).sequences[0, 100:]
        counts[tuple(tokens.tolist())] += 1
        drafts[0] += decoding.drafts.drafted
        drafts[1] += decoding.drafts.accepted
    assert 0.05 < drafts[1] / drafts[0] < 0.995  # both ways are taken
    likely = expected * draws >= 5
    seen = torch.cat([counts[likely], counts[~likely].sum()[None]])
    wanted = torch.cat([expected[likely], expected[~likely].sum()[None]]) * draws
    assert stats.chisquare(seen, wanted / wanted.sum() * draws).pvalue > 1e-3


def test_greedy_judgement_keeps_the_longest_prefix_that_agrees():
    scores = torch.eye(5)[[3, 1, 4, 2]]
    for tokens, expected in (([3, 1, 4], [3, 1, 4, 2]), ([3, 0, 4], [3, 1]), ([0, 1, 4], [3]), ([], [3])):
        found = _judged(torch.tensor(tokens, dtype=torch.int64), scores[: len(tokens) + 1])
        assert found.tolist() == expected


def test_as_much_is_drafted_as_is_accepted():
    pace = Pace(lambda length: Cost(0.5, 0.0))
    for _ in range(60):
        pace.learn(k := pace.next(100), k)
    assert pace.next(100) >= 6
    assert pace.share > 0.95
    asked = []
    for _ in range(200):
        asked.append(pace.next(100))
        pace.learn(asked[-1], 0)
    assert pace.share < 0.5
    assert 0 < sum(asked[-64:]) <= 2  # now and then one is tried
    for _ in range(400):
        pace.learn(k := pace.next(100), k)
    assert pace.next(100) >= 2


def test_nothing_is_drafted_where_that_could_not_pay():
    """A draft as dear as a pass, or rows that are; were all accepted, it would take as long."""
    for cost in (Cost(1.0, 0.01), Cost(0.1, 0.95)):
        pace = Pace(lambda length, cost=cost: cost)
        for _ in range(200):
            assert pace.next(1000) == 0
            pace.learn(0, 0)
    pace = Pace(lambda length: Cost(0.5, 0.0) if length > 1000 else Cost(1.0, 0.1))
    assert pace.next(1000) == 0
    assert pace.next(1001) > 0


def test_the_cost_of_a_draft_falls_with_the_length_and_that_of_a_row_rises(opened):
    network = generation.load(opened)
    config = Config(**SMALL)
    attach(network, config)
    cache = MagicPigCache(network.config, config)
    with torch.no_grad(), cache.prefilling():
        network(torch.tensor([[3, 4, 5]]), **cache_argument(cache))
    cost = costs_of(network, cache)
    detach(network)
    near, far = cost(1), cost(10**9)
    assert near.draft == pytest.approx(1, abs=0.01)
    assert near.row == pytest.approx(lossless.ROW_OF_WEIGHTS, abs=0.01)
    assert far.draft == pytest.approx(lossless.SAMPLED_KEYS, abs=0.01)
    assert far.row == pytest.approx(lossless.ROW_OF_KEYS, abs=0.01)


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (250, 96), (96, 1536), (520, 2048)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", [None, "auto", "bf16", "int8"])
@torch.no_grad()
def test_rows_of_a_linear_layer_are_what_they_are_alone(shape, dtype, bias, form):
    network = nn.Sequential(nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype))
    if form is not None:
        use_weights(network, form)
    layer = network[0]
    x = torch.randn(1, MOST_ROWS + 3, shape[1]).to(dtype)
    alone, all_of_them = torch.cat([layer(row[None, None].clone()) for row in x[0]], 1), layer(x)
    assert foreign_products(network) == []
    with rowwise(network):
        for rows in range(1, MOST_ROWS + 1):
            assert torch.equal(layer(x[:, :rows]), alone[:, :rows]), rows
        assert torch.equal(layer(x), all_of_them)  # as ever
    assert "forward" not in vars(layer)


def test_what_may_round_otherwise_is_known():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 8, 8))

    network = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.LayerNorm(8))
    assert foreign_products(network) == []
    network.append(Experts())
    assert foreign_products(network) == ["Experts"]
    network.config = None
    assert "Experts of this model" in why_not_to_the_bit(network)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused_before_anything_is_read(opened):
    from transformers import MistralConfig

    network = generation.load(opened)
    with pytest.raises(ArgumentError, match="mode='fast': must be one of sampled, lossless"):
        answer(opened, network, [3, 4], Config(), mode="fast")
    with pytest.raises(ArgumentError, match="drafts by sampling, but sampler='full' reads every key"):
        answer(opened, network, [3, 4], Config(sampler="full"), mode="lossless")
    with pytest.raises(UnsupportedModelError, match="a sliding window"):
        check(Config(), MistralConfig(sliding_window=64, num_hidden_layers=2))
    attach(network, Config())
    with pytest.raises(ArgumentError, match="one sequence at a time, got 2"):
        network.generate(torch.full((2, 9), 3), custom_generate=Decoding(), max_new_tokens=2, pad_token_id=0)
    detach(network)


# --- the command ------------------------------------------------------------------------------------------------------


def command(directory, *arguments):
    prompt = " ".join(f"w{(i * i) % 50}" for i in range(200))
    words = ["generate", "--model", directory, "--prompt", prompt, "--max-new-tokens", 20, *arguments]
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_gives_the_same_text_and_says_what_was_drafted(directory):
    settings = ["--exact-below", 0, "--recent", 8, "--block", 16, "--budget", 0.8]
    full = command(directory, *settings, "--sampler", "full")
    lossless = command(directory, *settings, "--mode", "lossless")
    assert lossless.stdout == full.stdout
    assert "exact passes" in lossless.stderr
    object_ = json.loads(command(directory, *settings, "--mode", "lossless", "--json").stdout)
    assert object_["settings"]["mode"] == "lossless"
    assert object_["drafts"]["accepted"] + object_["drafts"]["passes"] == 19
    assert json.loads(command(directory, "--json").stdout)["drafts"] is None


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--mode", "fast"], "fast"),
        (["--mode", "lossless", "--sampler", "full"], "drafts by sampling, but --sampler full reads every key"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, cause, directory):
    result = command(directory, *arguments)
    assert result.exit_code == 2
    assert cause in " ".join(result.stderr.split())


def test_modes_of_the_command_are_those_of_the_library():
    assert tuple(mode.value for mode in Mode) == generation.MODES


@pytest.mark.slow
def test_answers_of_the_pocket_model():
    """128 tokens each, behind prompts of which most keys are sampled."""
    opened = generation.open_model(pocket.path())
    network = generation.load(opened)
    config = Config(exact_below=0, recent=32, budget=64, block=64)
    accepted = drafted = 0
    for seed in range(40):  # of 200, all were equal on 2026-11-28, in five minutes
        vocabulary = len(opened.tokenizer)
        ids = torch.randint(0, vocabulary, (400 + seed,), generator=torch.Generator().manual_seed(seed)).tolist()
        options = {"max_new_tokens": 128}
        expected = answer(opened, network, ids, config.changed({"sampler": "full"}), **options)
        found = answer(opened, network, ids, config, mode="lossless", **options)
        assert found.token_ids == expected.token_ids, seed
        accepted, drafted = accepted + found.drafts.accepted, drafted + found.drafts.drafted
    assert accepted > drafted / 2
