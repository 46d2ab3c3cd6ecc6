"""A setting that cannot work is told to the user: once, with what to do."""

import warnings
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from magicpig import SamplingWarning, attach
from magicpig.advice import advice
from magicpig.config import Config
from magicpig.report import LayerReport

GOOD = LayerReport(3, "sampled", 8192, 8000, 0.06, 0.1, 0.03, 0.08, 0.2, 0.0, 10**6, 10**5, 10**6, 10**5)
DENSE = LayerReport(0, "dense", 8192, 0, None, None, None, None, None, None, 10**6, 0, 10**6, 10**6)
SKETCH, LSH = Config(), Config(sampler="lsh")


def said(*layers, config=SKETCH):
    return advice(layers, config)


def test_what_works_is_passed_over():
    assert said(DENSE, GOOD, GOOD) is None
    assert said(replace(GOOD, predicted_error_mean=0.29)) is None
    assert said() is None


def test_a_large_predicted_error_names_its_layers_and_what_to_do():
    bad = [replace(GOOD, layer=layer, predicted_error_mean=error) for layer, error in ((7, 0.45), (20, 0.31))]
    assert said(DENSE, GOOD, *bad) == (
        "sampled attention is too coarse here: the samples of layers 7, 20 predict errors of 30% to 45% of the output. "
        "To mend it, raise the budget (now 512), keep these layers exact (dense_layers=7, 20), or let `magicpig tune` "
        "choose."
    )


def test_a_sample_of_next_to_nothing():
    thin = replace(GOOD, sampled_share_mean=0.001)
    assert "layer 3 drew next to nothing, as few as 8 keys a step" in said(thin, config=LSH)
    assert "lower K (now 10), raise L (now 150), or take sampler='sketch'" in said(thin, config=LSH)
    assert "next to nothing" in said(replace(GOOD, predicted_error_unknown=0.4))
    assert said(replace(thin, indexed=8, sampled_share_mean=1.0)) is None  # there are no more


def test_an_epsilon_that_asks_for_most_keys_is_said_to():
    greedy = [replace(GOOD, layer=layer, sampled_share_mean=share) for layer, share in ((4, 0.96), (5, 1.0), (6, 0.3))]
    assert said(*greedy) is None  # so they were told
    assert said(*greedy, config=Config(epsilon=0.05)) == (
        "an epsilon of 0.05 is nearly full attention here: layers 4, 5 read 96% to 100% of the keys, which sampling "
        "makes slower. To mend it, raise epsilon, or keep these layers exact (dense_layers), or let `magicpig tune` "
        "choose."
    )
    assert said(greedy[2], DENSE, config=Config(epsilon=0.05)) is None
    assert "layer 4 read 96%" in said(greedy[0], config=Config(layers={4: {"epsilon": 0.05}}))


def test_samplers_that_predict_nothing_are_left_alone():
    silent = {"predicted_error_mean": None, "predicted_error_p95": None, "predicted_error_max": None}
    assert said(replace(GOOD, **silent, predicted_error_unknown=None, sampled_share_mean=1e-4)) is None


def test_many_layers_are_not_all_named():
    bad = [replace(GOOD, layer=layer, predicted_error_mean=0.5) for layer in range(30)]
    line = said(*bad)
    assert "layers 0, 1, 2, 3, 4, 5, 6, 7 and 22 more" in line
    assert "dense_layers" not in line


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def warned(model, **settings):
    ids = torch.arange(700)[None] % 50
    attach(model, exact_below=0, **settings)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0)
    return [each for each in found if each.category is SamplingWarning]


def test_generate_of_an_attached_model_warns_once(model):
    (one,) = warned(model, K=16, L=2, min_hits=2)  # two of two tables of 65536 buckets: nothing is ever drawn
    assert "layers 0, 1 drew next to nothing" in str(one.message)
    assert "take sampler='sketch'" in str(one.message)
    assert warned(model, budget=400) == []
    assert warned(model, sampler="full") == []
