"""The pocket model's tokenizer knows every word of the tasks, and decodes what the scoring compares."""

import random

import pytest

from magicpig.studies.evaluation import tasks
from magicpig.studies.evaluation.tasks import lexicon
from magicpig.studies.pocket import tokenizer

GENERATED = [name for name, task in tasks.TASKS.items() if task.source is None]


@pytest.fixture(scope="module")
def words():
    return tokenizer.build()


@pytest.mark.parametrize("task", GENERATED)
def test_a_prompt_has_no_unknown_token(words, task):
    sample = tasks.generate(task, words, 2048, index=1)
    assert words.unk_token_id not in words.encode(sample.prompt)
    assert sample.prompt_tokens == 2048 - sample.tokens_to_generate


@pytest.mark.parametrize("task", GENERATED)
def test_a_decoded_answer_scores_fully(words, task):
    sample = tasks.generate(task, words, 2048, index=2)
    decoded = words.decode(words.encode(", ".join(sample.answers)), skip_special_tokens=True)
    assert tasks.score(task, decoded, sample.answers) == 1.0


def test_every_word_is_one_token(words):
    for word in (*lexicon.english(), *lexicon.coded_words(), *lexicon.variables()):
        assert len(words.encode(word, add_special_tokens=False)) == 1


def test_numbers_and_uuids_come_back_whole(words):
    rng = random.Random(0)
    for make in (lexicon.number, lexicon.uuid4, lexicon.key):
        for _ in range(200):
            text = make(rng)
            assert words.decode(words.encode(text, add_special_tokens=False)) == text


def test_parts_can_be_encoded_one_by_one(words):
    sample = tasks.generate("niah_multikey_3", words, 2048, index=0)
    parts = words.encode(sample.context) + words.encode(sample.question, add_special_tokens=False)
    assert parts == words.encode(sample.prompt)
