"""How messages show numbers and values that others chose."""

from __future__ import annotations

LONGEST_VALUE = 120  # characters of a value that a message shows


def counted(count: int, what: str) -> str:
    """A number and what is counted, in the singular for one: 1 token, 2,000 tokens."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def shown(value: object) -> str:
    """A value as a message shows it: as Python writes it, in one printable line, and cut if it is long."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"{type(value).__name__} nested too deep"
    return printable(text, LONGEST_VALUE)


def printable(text: str, longest: int | None = None) -> str:
    """The text in one line: control characters are written as escapes, so that a file cannot move the cursor.

    longest: of more characters, only the first and the last ones, and how many there are.
    """
    if longest is not None and len(text) > longest:
        text = f"{text[: longest * 3 // 4]}... ({len(text):,} characters) ...{text[-longest // 4 :]}"
    return "".join(each if each.isprintable() else _escaped(each) for each in " ".join(text.split()))


def one_line(error: Exception) -> str:
    """What the error of another library says, as a part of a message."""
    return printable(str(error) or type(error).__name__, 200)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
