"""The tasks: length, needles, and that a slow reader finds the answer in the text."""

import hashlib
import json
import random
import re
from collections import Counter
from contextlib import nullcontext
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from magicpig.studies.evaluation.tasks import (
    TASKS,
    Sources,
    TaskError,
    check_minimum,
    filler,
    generate,
    lexicon,
    minimum_length,
    score,
    templates,
)
from magicpig.studies.evaluation.tasks.vocabulary import vocabulary

GENERATED = [name for name, task in TASKS.items() if task.source is None]
NIAH = [name for name in GENERATED if name.startswith("niah")]
TOKENIZERS = ["words", "bpe"]


@cache
def tokenizer(name):
    """Whole words with a token in front of each text, and pairs of bytes merged from little text."""
    if name == "words":
        known = ["<s>", "<unk>", "\n", *vocabulary(), *"bcdef"]
        made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(known)}, "<unk>"))
        split = Regex(r"[A-Za-z]+|[0-9]|\.+|\n|[^A-Za-z0-9.\s]")
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(" +"), "removed"), pre_tokenizers.Split(split, "isolated")]
        )
        made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
        return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([*islice(filler.sentences(random.Random(0)), 500), *templates.TEXTS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made)


def count(name, text, **options):
    return len(tokenizer(name)(text, **options)["input_ids"])


def needles(text):
    return re.findall(r"One of the special magic (?:numbers|uuids) for (\S+) is: (\S+)\.", text)


def solve(sample):
    """The answers, from the prompt alone."""
    if sample.task in NIAH:
        asked = re.search(r" for (\S+(?:, \S+)*) mentioned", sample.question.replace(", and ", ", "))[1].split(", ")
        return {value for key, value in needles(sample.context) if key in asked}
    if sample.task == "vt":
        wanted = re.search(r"assigned the value (\d+) in", sample.question)[1]
        holds = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", sample.context))
        for _ in range(len(holds)):
            holds = {name: holds.get(value, value) for name, value in holds.items()}
        return {name for name, value in holds.items() if value == wanted}
    if sample.task == "cwe":
        listed = re.findall(r"\d+\. (\w+)", sample.context.split("Below is a numbered list")[-1])
        return _top(listed, 10)
    assert sample.task == "fwe"
    coded = sample.context.removeprefix(templates.FWE.context.format(context="")).split()
    return _top([word for word in coded if word != "..."], 3)


def _top(words, count):
    ranked = Counter(words).most_common(count + 1)
    assert ranked[count - 1][1] > ranked[count][1], "the last answer ties with a word that is none"
    return {word for word, _ in ranked[:count]}


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    task=st.sampled_from(GENERATED),
    name=st.sampled_from(TOKENIZERS),
    extra=st.integers(60, 5000),
    index=st.integers(0, 1000),
    seed=st.integers(0, 1000),
)
def test_length_is_met_and_answers_follow_from_the_text(task, name, extra, index, seed):
    length = minimum_length(task, tokenizer(name)) + extra
    sample = generate(task, tokenizer(name), length, index=index, seed=seed)

    assert (sample.task, sample.index, sample.length) == (task, index, length)
    assert sample.prompt_tokens == count(name, sample.prompt)
    assert sample.tokens_to_generate == TASKS[task].tokens_to_generate
    short = length - sample.prompt_tokens - sample.tokens_to_generate
    # The rest is filled with entries of the list, dots, or words of the noise.
    fill = {"cwe": [f" 1234. {word}" for word in lexicon.english()[::50]], "fwe": [" ..."]}
    noise = re.findall(r" ?[A-Za-z]+|\.", templates.NOISE)
    assert 0 <= short <= max(count(name, piece, add_special_tokens=False) for piece in fill.get(task, noise))
    if name == "words" and task != "cwe":
        assert short == 0

    assert sample.prompt == sample.context + sample.question
    assert re.match(r"\n(What is|What are|Question:) ", sample.question)
    assert sample.question.endswith(sample.answer_prefix)
    assert len(set(sample.answers)) == len(sample.answers)
    assert solve(sample) == set(sample.answers)


@pytest.mark.parametrize("task", NIAH)
def test_needles_are_unique(task):
    sample = generate(task, tokenizer("words"), 8192, index=0)
    found = needles(sample.context)
    values = [value for _, value in found]
    keys = {key for key, _ in found}
    assert len(set(values)) == len(values)
    expected = {"niah_multikey_1": 4, "niah_multiquery": 4, "niah_multivalue": 1}.get(task, 1)
    if task in ("niah_multikey_2", "niah_multikey_3"):
        assert len(keys) == len(found) > 80
    else:
        assert len(keys) == expected
        assert len(found) == max(expected, len(sample.answers))


def test_answers_stand_in_the_order_of_the_question():
    sample = generate("niah_multiquery", tokenizer("words"), 2048, index=5)
    asked = re.search(r"magic numbers for (.+?) mentioned", sample.question)[1]
    values = dict(needles(sample.context))
    keys = re.findall(r"[a-z]+-[a-z]+", asked)
    assert asked == f"{keys[0]}, {keys[1]}, {keys[2]}, and {keys[3]}"
    assert [values[key] for key in keys] == list(sample.answers)


@pytest.mark.parametrize("task", GENERATED)
def test_words_are_in_the_vocabulary(task):
    known = {*vocabulary()}
    words = generate(task, tokenizer("words"), 6000, index=1).prompt
    words = re.sub(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", "", words)
    assert {*lexicon.pieces(words)} <= known
    assert len(known) < 12000


def test_vocabulary_has_no_word_twice():
    english = {*lexicon.english()}
    assert {word.lower() for word in (*lexicon.coded_words(), *lexicon.variables())}.isdisjoint(english)
    for words, size, form in (
        (lexicon.coded_words(), 2700, "[a-z]{6}"),
        (lexicon.variables(), 512, "[A-Z]{5}"),
        (lexicon.example_variables(), 128, "[A-Z]{3}"),
    ):
        assert len({*words}) == len(words) == size
        assert all(re.fullmatch(form, word) for word in words)
    assert len({*vocabulary()}) == len(vocabulary())


def test_words_are_those_of_every_other_installation():
    # A tokenizer of whole words, and with it a model, is made for these.
    digest = hashlib.sha256("\n".join(vocabulary()).encode()).hexdigest()
    assert digest[:16] == "c0f19a707790e181"


DIGESTS = {
    "niah_single_1": "b23e11d94b4e8e25",
    "niah_single_2": "9c2b16779c0161e5",
    "niah_single_3": "1de160c59b6e521c",
    "niah_multikey_1": "983d81f0ea29d002",
    "niah_multikey_2": "94143fd9c4607700",
    "niah_multikey_3": "69d53205497a5b01",
    "niah_multivalue": "44c5de29ee902ea2",
    "niah_multiquery": "fc75c55dcf265acd",
    "vt": "0c123b88832a9feb",
    "cwe": "e17dbac38392fd3f",
    "fwe": "8811f5aa47fecdb5",
}


@pytest.mark.parametrize("task", GENERATED)
def test_samples_are_those_of_every_other_installation(task):
    prompt = generate(task, tokenizer("words"), 1500, index=7, seed=3).prompt
    assert hashlib.sha256(prompt.encode()).hexdigest()[:16] == DIGESTS[task]


def test_samples_depend_on_their_arguments_alone():
    def made(**other):
        options = {"task": "niah_multikey_1", "tokenizer": tokenizer("bpe"), "length": 1200, "index": 3, "seed": 1}
        return generate(**(options | other))

    first = made()
    others = [made(index=4), made(seed=2), made(length=1201), made(task="niah_multiquery")]
    assert made() == first
    assert len({first.answers, *(other.answers for other in others)}) == 5


@pytest.mark.parametrize("name", TOKENIZERS)
def test_reserve_leaves_room_for_a_chat_template(name):
    plain = generate("fwe", tokenizer(name), 2048, index=0)
    tight = generate("fwe", tokenizer(name), 2048, index=0, reserve=100)
    assert abs(plain.prompt_tokens - tight.prompt_tokens - 100) <= 6


def test_long_prompts_are_exact_too():
    sample = generate("niah_multikey_3", tokenizer("bpe"), 50_001, index=0)
    assert 0 <= 50_001 - sample.prompt_tokens - 128 <= 2


@pytest.mark.parametrize("length", [4095, 4096])
def test_common_words_repeat_as_ruler_says(length):
    sample = generate("cwe", tokenizer("words"), length, index=0)
    example, asked = (Counter(re.findall(r"\d+\. (\w+)", part)) for part in sample.context.split("\nBelow is"))
    common, rare, example_common, example_rare = (6, 1, 3, 1) if length < 4096 else (30, 3, 10, 3)
    assert {asked[word] for word in sample.answers} == {common}
    assert {times for word, times in asked.items() if word not in sample.answers} <= {*range(1, rare + 1)}
    # The solved example ends with its ten answers.
    assert Counter(example.values()) == (
        {example_common + 1: 10, example_rare: 10} if length < 4096 else {example_common + 1: 10, example_rare: 30}
    )
    assert example.keys().isdisjoint(asked)


def test_frequent_words_fall_with_the_square_of_the_rank():
    text = generate("fwe", tokenizer("words"), 20_000, index=0).context
    counts = [times for _, times in Counter(re.findall(r" (\.\.\.|[a-z]{6})(?= )", text)).most_common(8)]
    for rank, times in enumerate(counts[1:], 2):
        assert times == pytest.approx(counts[0] / rank**2, rel=0.15)


def test_chain_is_laid_out_in_order():
    sample = generate("vt", tokenizer("words"), 2000, index=0)
    chain = re.findall(r"VAR (\w{5}) = (?:VAR )?(\w{5})\b", sample.context)
    value = re.search(r"value (\d{5}) in", sample.question)[1]
    assert [right for _, right in chain] == [value, *sample.answers[:-1]]
    assert [left for left, _ in chain] == list(sample.answers)
    assert "5 variables" in sample.answer_prefix


def test_filler_can_be_a_text_of_the_user(tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("Die Katze schläft. Der Hund nicht!\nUnd wer wacht?", encoding="utf-8")
    sample = generate("niah_single_2", tokenizer("bpe"), 1000, index=2, sources=Sources(filler=own))
    assert solve(sample) == {*sample.answers}
    assert sample.context.count("Die Katze schläft. ") > 5
    assert "Der Hund nicht! Und wer wacht?" in sample.context


SQUAD = {
    "data": [
        {
            "title": f"article {article}",
            "paragraphs": [
                {
                    "context": f"Town {article}{paragraph} lies in land {paragraph}. " * 5,
                    "qas": [
                        {
                            "question": f"Where is town {article}{paragraph}?",
                            "is_impossible": False,
                            "answers": [{"text": f"land {paragraph}"}, {"text": f"in land {paragraph}"}],
                        },
                        {"question": "Why?", "is_impossible": True, "answers": []},
                    ],
                }
                for paragraph in range(5)
            ],
        }
        for article in range(30)
    ]
}
HOTPOTQA = [
    {
        "question": f"Which colour has house {item}?",
        "answer": f"colour {item}",
        "context": [
            [f"title {item} {place}", [f"House {item} has colour {item}.", " It is old."]] for place in range(10)
        ],
    }
    for item in range(20)
]


@pytest.fixture
def sources(tmp_path):
    for name, data in (("squad", SQUAD), ("hotpotqa", HOTPOTQA)):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    return Sources(squad=tmp_path / "squad.json", hotpotqa=tmp_path / "hotpotqa.json")


@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_questions_come_with_their_documents(task, name, sources):
    asked = set()
    for index in range(12):
        sample = generate(task, tokenizer(name), 2500, index=index, sources=sources)
        assert 0 <= 2500 - sample.prompt_tokens - 32 <= 3
        question = re.fullmatch(r"\nQuestion: (.+\?) Answer:", sample.question)[1]
        asked.add(question)
        shown = re.findall(r"Document (\d+):\n(.+)", sample.context)
        assert [int(place) for place, _ in shown] == [*range(1, len(shown) + 1)]
        if task == "qa_1":
            town = re.search(r"town (\d+)\?", question)[1]
            assert re.search(rf"Town {town} lies (in land \d)", sample.context)[1] == sample.answers[1]
            # The other paragraphs of the article come before those of others.
            assert {f"Town {town[:-1]}{paragraph} lies" for paragraph in range(5)} <= {*_towns(sample.context)}
        else:
            house = re.search(r"house (\d+)\?", question)[1]
            assert sample.context.count(f"House {house} has {sample.answers[0]}.") == 10
    assert len(asked) == 12


def _towns(text):
    return re.findall(r"Town \d+ lies", text)


def test_question_of_an_index_is_the_same_at_all_lengths(sources):
    first, second = (generate("qa_1", tokenizer("words"), length, index=4, sources=sources) for length in (1000, 3000))
    assert first.question == second.question
    assert len(first.context) < len(second.context)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("niah_singel_1", {}, r"task='niah_singel_1' is unknown; did you mean niah_single_1 "),
        ("books", {}, r"task='books' is unknown; there are niah_single_1, .*, qa_2"),
        ("vt", {"length": 300}, r"length=300 is below the minimum of task vt, \d+ tokens"),
        ("vt", {"length": -5}, r"length=-5 is below the minimum of task vt"),
        ("cwe", {"index": -1}, r"index=-1 is negative"),
        ("cwe", {"reserve": -1}, r"reserve=-1 is negative"),
        ("qa_1", {}, r"task qa_1 needs the file dev-v2.0.json of SQuAD: squad is not given"),
        ("qa_2", {}, r"task qa_2 needs the file hotpot_dev_distractor_v1.json of HotpotQA: hotpotqa is not given"),
        ("qa_1", {"sources": Sources(squad=Path("no/such"))}, r"squad='no/such' cannot be read: No such file"),
        ("niah_single_2", {"sources": Sources(filler=Path("no/such"))}, r"filler='no/such' cannot be read: No such"),
    ],
)
def test_bad_input_is_refused(task, options, message):
    with pytest.raises(ValueError, match=message):
        generate(task, tokenizer("words"), **({"length": 2048, "index": 0} | options))


@pytest.mark.parametrize("task", GENERATED)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_minimum_is_the_shortest_that_works(task, name):
    least = minimum_length(task, tokenizer(name))
    # Samples differ in the tokens of their keys, values and words.
    some = 60
    with pytest.raises(ValueError, match=f"length={least - some} is below the minimum of task {task}") as refused:
        generate(task, tokenizer(name), least - some, index=0)
    named = int(re.search(r"minimum of task \w+, (\d+) tokens", str(refused.value))[1])
    assert abs(named - least) < some
    assert generate(task, tokenizer(name), least + some, index=0).length == least + some


def test_the_minimum_is_that_of_all_samples():
    task, some, samples = "niah_multikey_1", tokenizer("bpe"), 5
    longer_than_the_first = 0
    for length in range(least := minimum_length(task, some) - 20, least + 40, 2):
        fits = []
        for index in range(samples):
            try:
                generate(task, some, length, index=index)
            except TaskError:
                fits.append(False)
            else:
                fits.append(True)
        longer_than_the_first += fits[0] and not all(fits)
        with nullcontext() if all(fits) else pytest.raises(TaskError, match=f"length={length} is below the minimum"):
            check_minimum(task, some, length, samples=samples)
    assert longer_than_the_first > 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[1, 2]", "is not in the form of"),
        (b'{"data": [{"paragraphs": [{"context": 3}]}]}', "is not in the form of"),
        (b'{"data": []}', "has no question with an answer"),
    ],
)
def test_files_that_are_something_else_are_refused(tmp_path, content, message):
    path = tmp_path / "squad.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        generate("qa_1", tokenizer("words"), 2048, index=0, sources=Sources(squad=path))


@pytest.mark.parametrize(("content", "message"), [(b"", "has no text"), (b"\xff", "is not UTF-8 text .byte 0.")])
def test_filler_without_text_is_refused(tmp_path, content, message):
    path = tmp_path / "filler.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        generate("niah_single_2", tokenizer("words"), 2048, index=0, sources=Sources(filler=path))


def test_too_few_documents_for_the_length(sources):
    with pytest.raises(ValueError, match=r"length=65536 is beyond what task qa_2 has text for, \d+ tokens"):
        generate("qa_2", tokenizer("words"), 65536, index=0, sources=sources)


@pytest.mark.parametrize(
    ("task", "prediction", "answers", "expected"),
    [
        ("niah_single_1", " 1234567.\nOne more", ["1234567"], 1.0),
        ("niah_single_1", "123456", ["1234567"], 0.0),
        ("niah_multivalue", "1111111, 2222222 and 4444444", ["1111111", "2222222", "3333333", "4444444"], 0.75),
        ("vt", "abcde XYZXY", ["ABCDE", "xyzxy"], 1.0),
        ("fwe", "", ["abcdef"], 0.0),
        ("cwe", "1. dog\x002. cat", ["dog", "cat", "cow", "hen"], 0.5),
        ("qa_1", "It is in Land 3", ["land 3", "in the land"], 1.0),
        ("qa_2", "no idea", ["land 3"], 0.0),
    ],
)
def test_score(task, prediction, answers, expected):
    assert score(task, prediction, answers) == expected


def test_wording_is_rulers():
    sample = generate("niah_single_3", tokenizer("words"), 1024, index=0)
    key = re.search(r"uuid for (\S+) mentioned", sample.question)[1]
    assert sample.context.startswith(
        "A special magic uuid is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the uuid afterwards.\n"
    )
    assert f"One of the special magic uuids for {key} is: {sample.answers[0]}." in sample.context
    assert sample.question == (
        f"\nWhat is the special magic uuid for {key} mentioned in the provided text?"
        f" The special magic uuid for {key} mentioned in the provided text is"
    )
    plural = generate("niah_multivalue", tokenizer("words"), 1024, index=0)
    assert plural.context.startswith("Some special magic numbers are hidden within the following text.")
    assert plural.question.startswith("\nWhat are all the special magic numbers for ")
    assert plural.answer_prefix.endswith(" mentioned in the provided text are")
