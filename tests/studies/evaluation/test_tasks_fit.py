"""Fitting a prompt to a length, with tokenizers unlike any other."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magicpig.studies.evaluation.tasks.fit import Draft, Meter, Recipe, fit, padded

TOKENIZERS = {
    "letters": lambda text: len(text),
    "words": lambda text: len(text.split()),
    "words after two special tokens": lambda text: len(text.split()) + 2,
    # Of the pieces of a text, most are shorter than a token.
    "seven letters": lambda text: math.ceil(len(text) / 7),
    "letters but for spaces": lambda text: sum(letter.isalpha() for letter in text),
}


class Fake:
    def __init__(self, name):
        self.count = TOKENIZERS[name]
        self.texts = 0

    def __call__(self, text, **options):
        if isinstance(text, list):
            return {"input_ids": [[0] * self.count(part) for part in text]}
        self.texts += 1
        return {"input_ids": [0] * self.count(text)}


def recipe(seed, **bounds):
    rng = random.Random(seed)
    units = [" ".join("x" * rng.randint(1, 12) for _ in range(rng.randint(1, 30))) for _ in range(4000)]

    def build(count, paddings):
        return Draft("before " + " ".join(padded(units[:count], paddings)), " question?", " answer:", ())

    return Recipe(build, **bounds)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(name=st.sampled_from(sorted(TOKENIZERS)), limit=st.integers(300, 4000), seed=st.integers(0, 100))
def test_prompts_fill_the_limit(name, limit, seed):
    tokenizer = Fake(name)
    made = recipe(seed)
    draft, tokens = fit(made, Meter(tokenizer), limit)
    assert tokens == tokenizer.count(draft.prompt)
    # The longest word of the noise has six letters and a space.
    longest = {"letters": 7, "letters but for spaces": 6}.get(name, 1)
    assert limit - longest < tokens <= limit
    assert tokenizer.texts < 40


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_the_smallest_prompt_may_be_too_long(name):
    made = recipe(0, minimum=50)
    smallest = Fake(name).count(made.build(50, 0).prompt)
    assert fit(made, Meter(Fake(name)), smallest - 1) == (made.build(50, 0), smallest)
    assert fit(made, Meter(Fake(name)), smallest) == (made.build(50, 0), smallest)
    assert fit(made, Meter(Fake(name)), -3)[1] == smallest


def test_bounds_hold():
    draft, tokens = fit(recipe(1, maximum=10, paddings=5), Meter(Fake("words")), 5000)
    assert draft == recipe(1).build(10, 5)
    assert tokens < 5000


def test_padding_is_noise_on_the_last_line():
    assert padded(["one", "two"], 0) == ["one", "two"]
    assert padded(["one", "two"], 5) == ["one", "two The grass is green."]
    assert padded(["one"], 6) == ["one The grass is green. The"]
    whole = padded(["one"], 24)
    assert whole == ["one The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."]
    assert padded(["one"], 26) == [whole[0] + " The grass"]
