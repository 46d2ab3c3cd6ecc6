"""Lessons hold what they ask for, fit their length, and do not give the answer away."""

import random

import pytest

from magicpig.studies.pocket import lessons, tokenizer


@pytest.fixture(scope="module")
def words():
    return tokenizer.build()


@pytest.mark.parametrize("length", [224, 511, 1024, 2048])
@pytest.mark.parametrize("kind", lessons.KINDS)
def test_lessons_fit_and_teach(words, kind, length):
    writer = lessons.Writer(words)
    for index in range(12):
        lesson = lessons.lesson(kind, writer, length, random.Random(index))
        assert len(lesson.ids) <= length
        assert lesson.ids[0] == words.bos_token_id
        assert words.unk_token_id not in lesson.ids
        assert lesson.targets
        for target in lesson.targets:
            # What stands next is one of the right tokens, and what is asked for stands in the text before.
            assert lesson.ids[target.at + 1] in target.right
            known = {*lesson.ids[: target.at + 1]}
            assert all(token in known or _made_by_the_answer(words, token) for token in target.right)


def _made_by_the_answer(words, token):
    text = words.convert_ids_to_tokens(token)
    return token == words.eos_token_id or text in {",", "."} or text.lstrip("#").isdigit()


def test_lessons_are_the_same_for_the_same_seed(words):
    first, second = (lessons.Writer(words) for _ in range(2))
    for kind in lessons.KINDS:
        assert lessons.lesson(kind, first, 512, random.Random(3)) == lessons.lesson(kind, second, 512, random.Random(3))


def test_common_words_may_come_in_any_order(words):
    writer = lessons.Writer(words)
    writer.begin(100)
    writer.answer_in_any_order(["cat", "dog"])
    cat, dog = words.convert_tokens_to_ids(["cat", "dog"])
    choices = [target.right for target in writer.finished().targets]
    assert (cat, dog) in choices
    assert (dog,) in choices
    assert choices[-1] == (words.eos_token_id,)
