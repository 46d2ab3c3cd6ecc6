import math

import pytest

from magicpig.strict_json import JsonError, parse


def test_plain_json_is_read():
    assert parse('{"a": [1, 2.5, null, true, "é"]}') == parse('{"a": [1, 2.5, null, true, "é"]}'.encode())
    assert parse("3") == 3


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", r"not JSON: Expecting value \(line 1, column 1\)"),
        ("{", "not JSON"),
        (b"\xff", r"not UTF-8 text \(byte 0\)"),
        ("[" * 100_000, "nested too deep"),
        ('{"a":' * 100_000, "nested too deep"),
        ('{"a": 1, "b": 2, "a": 1}', "'a' stands twice in one object"),
        ('[{"x": {"a\\u001b": 1, "a\\u001b": 2}}]', r"'a\\x1b' stands twice"),
        ("NaN", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("9" * 5000, "too many digits"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_what_is_not_usable_is_one_error(text, cause):
    with pytest.raises(JsonError, match=cause) as caught:
        parse(text)
    assert len(str(caught.value)) < 200
    assert caught.value.code == "invalid_json"


def test_lenient_takes_what_python_takes():
    assert parse('{"a": 1, "a": 2}', lenient=True) == {"a": 2}
    assert math.isinf(parse("Infinity", lenient=True))
    with pytest.raises(JsonError, match="nested too deep"):
        parse("[" * 100_000, lenient=True)
