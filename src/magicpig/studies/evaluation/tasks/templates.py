"""The wording of the tasks, as RULER defines it (arXiv 2404.06654; github.com/NVIDIA/RULER, Apache-2.0).

A prompt is context + question + answer prefix. The wording, misprints included, is the benchmark's definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Template:
    """The fixed text of one family of tasks; the three parts in the order in which a model reads them."""

    context: str
    question: str
    answer: str
    tokens_to_generate: int


NIAH = Template(
    context="Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}",
    question="\nWhat are all the special magic {kind} for {query} mentioned in the provided text?",
    answer=" The special magic {kind} for {query} mentioned in the provided text are",
    tokens_to_generate=128,
)
NIAH_ONE = Template(  # when there is one answer
    context="A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}",
    question="\nWhat is the special magic {kind} for {query} mentioned in the provided text?",
    answer=" The special magic {kind} for {query} mentioned in the provided text is",
    tokens_to_generate=128,
)
VT = Template(
    context="Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}",
    question="\nQuestion: Find all variables that are assigned the value {query} in the text above.",
    answer=" Answer: According to the chain(s) of variable assignment in the text above, {count} variables are "
    "assgined the value {query}, they are: ",
    tokens_to_generate=30,
)
CWE = Template(
    context="Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}",
    question="\nQuestion: What are the 10 most common words in the above list?",
    answer=" Answer: The top 10 words that appear most often in the list are:",
    tokens_to_generate=120,
)
FWE = Template(
    context="Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}",
    question="\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?",
    answer=" Answer: According to the coded text above, the three most frequently appeared words are:",
    tokens_to_generate=50,
)
QA = Template(
    context="Answer the question based on the given documents. Only give me the answer and do not output any other "
    "words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. "
    "Only give me the answer and do not output any other words.\n",
    question="\nQuestion: {query}",
    answer=" Answer:",
    tokens_to_generate=32,
)
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DOTS = "..."  # the most frequent coded word, which is none
KINDS = {"numbers": "number", "uuids": "uuid"}  # what a needle can hold: plural, singular

TEXTS = (
    *(
        text.format(context="", kind=kind, query="", count="")
        for template in (NIAH, NIAH_ONE, VT, CWE, FWE, QA)
        for text in (template.context, template.question, template.answer)
        for kind in (*KINDS, *KINDS.values())
    ),
    *(NEEDLE.format(kind=kind, key="", value="") for kind in KINDS),
    NOISE,
    DOTS,
    "Document VAR = , and",
)


def needle(kind: str, key: str, value: str) -> str:
    """The sentence that holds a fact. ``kind`` is one of `KINDS`."""
    return NEEDLE.format(kind=kind, key=key, value=value)


def niah(kind: str, keys: Sequence[str], answers: int) -> tuple[str, str, str]:
    """What stands before the text, the question for ``keys`` and the answer prefix; singular for one answer."""
    template, kind = (NIAH_ONE, KINDS[kind]) if answers == 1 else (NIAH, kind)
    query = f"{', '.join(keys[:-1])}, and {keys[-1]}" if len(keys) > 1 else keys[0]
    return (
        template.context.format(kind=kind, context=""),
        template.question.format(kind=kind, query=query),
        template.answer.format(kind=kind, query=query),
    )


def assignments(names: Sequence[str], value: str) -> list[str]:
    """A chain: the first variable gets the value, each further one its predecessor's."""
    first = f"VAR {names[0]} = {value}"
    return [first, *(f"VAR {name} = VAR {before} " for before, name in pairwise(names))]


def numbered(words: Sequence[str]) -> str:
    """The list of words as cwe shows it and as it wants its answer."""
    return " ".join(f"{place}. {word}" for place, word in enumerate(words, 1))
