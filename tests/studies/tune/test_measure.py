"""Trials of one layer: errors, predictions and shares are those of the settings, and the store is left as it was."""

from __future__ import annotations

import pytest
import torch

from magicpig.config import EXACT, Config
from magicpig.studies.bench.synthetic import synthetic_context
from magicpig.studies.capture import AttentionSet
from magicpig.studies.figures.study import estimate, exact_outputs
from magicpig.studies.tune import Trials, candidates

STEPS = 4
SKETCH = Config(sampler="sketch", budget=100, bits=3, exact_below=0)


@pytest.fixture(scope="module")
def attention() -> AttentionSet:
    return synthetic_context(2500, heads=4, kv_heads=2, head_dim=32, steps=STEPS)


def test_full_attention_costs_one_and_errs_by_rounding(attention):
    full = Trials(attention).full()
    assert full.config == EXACT
    assert full.errors.shape == (STEPS, 4)
    assert float(full.errors.max()) < 1e-5  # float32 sums of 2500 terms
    assert (full.predicted, full.share, full.cost) == (None, 1.0, 1.0)


@pytest.mark.parametrize("config", [SKETCH, Config(K=6, L=40, exact_below=0)], ids=["sketch", "lsh"])
def test_errors_and_shares_are_those_of_the_study(config, attention):
    # The study decodes the same tokens on a store of its own; but it settles with the first of them in it.
    tried = Trials(attention).sampled(config)
    expected = estimate(attention, config, exact_outputs(attention))
    assert tried.predicted is not None
    assert tried.predicted.shape == tried.errors.shape == (STEPS, 4)
    assert tried.share == pytest.approx(sum(each.share for each in expected) / 4, rel=0.05)
    assert float(tried.errors.mean()) == pytest.approx(sum(each.error for each in expected) / 4, rel=0.5)
    assert tried.index_bytes > 0
    assert tried.cost > 0


def test_the_same_trial_twice_gives_the_same_errors(attention):
    trials = Trials(attention)
    first, again = trials.sampled(SKETCH), trials.sampled(SKETCH)
    assert torch.equal(first.errors, again.errors)
    assert first.share == again.share


def test_finalists_keep_everything_but_their_time(attention):
    trials = Trials(attention)
    tried = [trials.sampled(SKETCH), trials.sampled(Config(K=6, L=40, exact_below=0))]
    for before, now in zip(tried, trials.again(tried), strict=True):
        assert now.errors is before.errors
        assert now.config == before.config
        assert now.cost > 0
    assert trials.again([]) == []
    assert trials.full_ms > 0


def test_softcap_and_sink_logits_are_the_layers(attention):
    special = AttentionSet(
        attention.keys, attention.values, attention.queries, attention.scale, softcap=20.0, sink_logits=torch.ones(4)
    )
    trials = Trials(special)
    assert float(trials.full().errors.max()) < 1e-5
    assert float(trials.sampled(Config(sampler="sketch", budget=2400, exact_below=0)).errors.max()) < 0.05


def test_candidates_are_sampling_settings_without_repetition():
    tried = candidates(0.05, 10_000)
    assert len({config.model_dump_json() for config in tried}) == len(tried)
    assert {config.sampler for config in tried} == {"lsh", "sketch"}
    assert all(config.exact_below == 0 for config in tried)
    assert {config.epsilon for config in tried} >= {None, 0.05, 0.075}


def test_no_candidate_reads_more_than_half_of_a_short_context():
    budgets = [config.budget for config in candidates(0.05, 700) if config.sampler == "sketch"]
    assert max(budgets) == 256
