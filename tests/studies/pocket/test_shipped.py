"""The model in the package: small, readable by transformers, and able to look something up."""

import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import magicpig
from magicpig.studies import pocket
from magicpig.studies.evaluation import tasks
from magicpig.studies.pocket import tokenizer

LARGEST = 12 * 2**20  # bytes


def test_it_is_small_and_complete():
    files = {file.name: file.stat().st_size for file in pocket.path().iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files)
    assert sum(files.values()) <= LARGEST
    assert "niah_single_1" in (pocket.path() / "README.md").read_text()


def test_its_tokenizer_is_the_one_that_is_built():
    shipped, built = AutoTokenizer.from_pretrained(pocket.path()), tokenizer.build()
    assert shipped.get_vocab() == built.get_vocab()
    prompt = tasks.generate("niah_multikey_3", built, 1024, index=0).prompt
    assert shipped.encode(prompt) == built.encode(prompt)


def test_its_heads_are_grouped_and_wide_enough_for_the_samplers():
    config = json.loads((pocket.path() / "config.json").read_text())
    assert config["head_dim"] >= 64
    assert config["num_attention_heads"] > config["num_key_value_heads"]


def test_it_finds_a_needle_with_full_and_with_sampled_attention():
    words = AutoTokenizer.from_pretrained(pocket.path())
    model = AutoModelForCausalLM.from_pretrained(pocket.path())
    right = {}
    for sampler in ("full", "lsh"):
        magicpig.attach(model, magicpig.Config(sampler=sampler, exact_below=0))
        right[sampler] = 0.0
        for index in range(4):
            sample = tasks.generate("niah_single_1", words, 2048, index=index, seed=11)
            ids = torch.tensor([words.encode(sample.prompt)])
            new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6)[0, ids.shape[1] :]
            right[sampler] += tasks.score("niah_single_1", words.decode(new, skip_special_tokens=True), sample.answers)
    assert right == {"full": 4.0, "lsh": 4.0}
