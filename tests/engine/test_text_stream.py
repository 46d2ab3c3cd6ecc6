"""Text in pieces is the text as a whole, and stop strings are found wherever tokens are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from magicpig.text_stream import Detokenizer, StopStrings, rewrites


def byte_tokenizer(decoder: object = None) -> PreTrainedTokenizerFast:
    """One token for each byte, as the smallest pieces of byte-level BPE are."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel() if decoder is None else decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


BYTES = byte_tokenizer()
HARD = st.text(st.sampled_from("ab é漢字🙂👩‍🚀-.\n"), max_size=120)


def pieces(tokenizer: object, tokens: list[int]) -> list[str]:
    text = Detokenizer(tokenizer)
    return [*(text.push(token) for token in tokens), text.flush()]


@given(HARD)
def test_characters_of_several_tokens_come_whole(text):
    got = pieces(BYTES, BYTES(text)["input_ids"])
    assert "".join(got) == text
    assert not any("\ufffd" in piece for piece in got)


@given(st.lists(st.integers(0, 255), max_size=150))
def test_bytes_that_are_no_text_are_shown_in_the_end(tokens):
    assert "".join(pieces(BYTES, tokens)) == BYTES.decode(tokens, clean_up_tokenization_spaces=False)


@given(st.lists(st.integers(0, 14175), max_size=100))
def test_a_decoder_that_rewrites_is_waited_for(tokenizer, tokens):
    assert rewrites(tokenizer)
    got = "".join(pieces(tokenizer, tokens))
    assert got == tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_numbers_with_hyphens_are_never_taken_back(tokenizer):
    tokens = tokenizer("one 12-ab-34 two", add_special_tokens=False)["input_ids"]
    assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(tokens)
    assert "-" in tokenizer.decode(tokens)


@pytest.mark.parametrize(
    ("decoder", "expected"),
    [
        (decoders.ByteLevel(), False),
        (decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]), False),
        (decoders.Sequence([decoders.Fuse(), decoders.Replace(" - ", "-")]), True),
        (decoders.WordPiece(), True),
    ],
)
def test_which_decoders_rewrite(decoder, expected):
    assert rewrites(byte_tokenizer(decoder)) is expected


@given(
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.text("abc", max_size=5), max_size=10),
    st.booleans(),
)
def test_stop_strings_are_found_wherever_text_is_cut(stops, parts, include):
    text = "".join(parts)
    matcher, shown = StopStrings(stops, include=include), ""
    for part in parts:
        shown += matcher.push(part)
        if matcher.found:
            break
    shown += matcher.flush()
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert matcher.found == bool(ends)
    expected = text
    if ends:
        end, at = min(ends)
        # Of several that are whole in the same piece, the one that ends first.
        expected = text[:end] if include else text[:at]
    assert shown == expected


def test_nothing_is_shown_that_may_be_taken_back():
    matcher = StopStrings(["<end>"])
    assert [matcher.push(part) for part in ("a <", "en", "glish", " <end", "> b")] == [
        "a ",
        "",
        "<english"[:8],
        " ",
        "",
    ]
    assert matcher.found
