import pytest

from magicpig.wording import counted, printable, shown


@pytest.mark.parametrize(
    ("count", "expected"), [(0, "0 tokens"), (1, "1 token"), (2, "2 tokens"), (20000, "20,000 tokens")]
)
def test_one_is_singular(count, expected):
    assert counted(count, "token") == expected


def test_control_characters_are_escaped_and_lines_joined():
    assert printable("a\x1b[31mb\nc\t d\x00é") == r"a\x1b[31mb c d\x00é"


def test_long_text_keeps_both_ends():
    text = printable("a" * 50_000 + "b" * 50_000, 100)
    assert text.startswith("aaa")
    assert text.endswith("bbb")
    assert "(100,000 characters)" in text
    assert len(text) < 150


def test_a_value_is_shown_however_deep_or_long():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "list nested too deep"
    assert len(shown("x" * 100_000)) < 200
    while deep:  # else Python's own recursion takes it apart
        deep = deep[0]
