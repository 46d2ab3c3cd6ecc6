"""The words of the tasks. A closed list: vocabulary.py has every word and sign that a generator can emit.

English words are those of the package wonderwords, as in RULER. Coded words and variable names are letters drawn once,
the same for everyone, so that a tokenizer of whole words can know them. Numbers and uuids are drawn anew each time.
"""

from __future__ import annotations

import random
import re
import string
import uuid
from functools import cache
from importlib.resources import files

CODED_WORDS = 2700
VARIABLES = 512
EXAMPLE_VARIABLES = 128

_PIECE = re.compile(r"[A-Za-z]+|[0-9]|\.+|[^A-Za-z0-9.\s]")


def pieces(text: str) -> list[str]:
    """The words, single digits, runs of dots and other signs of a text, without the white space."""
    return _PIECE.findall(text)


@cache
def nouns() -> tuple[str, ...]:
    """6663 nouns, sorted."""
    return _read("nounlist.txt")


@cache
def adjectives() -> tuple[str, ...]:
    """900 adjectives, sorted."""
    return _read("adjectivelist.txt")


@cache
def verbs() -> tuple[str, ...]:
    """1037 verbs in their base form, sorted."""
    return _read("verblist.txt")


@cache
def english() -> tuple[str, ...]:
    """The nouns, adjectives and verbs, each once, sorted."""
    return tuple(sorted({*nouns(), *adjectives(), *verbs()}))


@cache
def coded_words() -> tuple[str, ...]:
    """2700 words of six random lower-case letters, for counting words that mean nothing (fwe)."""
    return _letters("coded words", string.ascii_lowercase, 6, CODED_WORDS)


@cache
def variables() -> tuple[str, ...]:
    """512 names of five random capitals (vt)."""
    return _letters("variables", string.ascii_uppercase, 5, VARIABLES)


@cache
def example_variables() -> tuple[str, ...]:
    """128 names of three random capitals, for the solved example in front of vt."""
    return _letters("example variables", string.ascii_uppercase, 3, EXAMPLE_VARIABLES)


def number(rng: random.Random) -> str:
    """Seven digits, the first not zero."""
    return str(rng.randint(10**6, 10**7 - 1))


def key(rng: random.Random) -> str:
    """An adjective and a noun, joined by a hyphen."""
    return f"{rng.choice(adjectives())}-{rng.choice(nouns())}"


def uuid4(rng: random.Random) -> str:
    """A random uuid, as 36 characters."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


@cache
def _read(name: str) -> tuple[str, ...]:
    folder = files("wonderwords.assets")
    lines = (folder / name).read_text(encoding="utf-8").splitlines()
    rude = {line.strip() for line in (folder / "profanitylist.txt").read_text(encoding="utf-8").splitlines()}
    words = {line.strip() for line in lines} - rude
    return tuple(sorted(word for word in words if re.fullmatch("[a-z]+", word)))


def _letters(name: str, alphabet: str, length: int, count: int) -> tuple[str, ...]:
    rng = random.Random(f"magicpig {name}")
    known = {*english(), *adjectives(), "var"}
    words: dict[str, None] = {}
    while len(words) < count:
        word = "".join(rng.choice(alphabet) for _ in range(length))
        if word.lower() not in known:
            words[word] = None
    return tuple(words)
