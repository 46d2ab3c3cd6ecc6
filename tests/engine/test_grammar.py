"""Answers follow their JSON schema whatever the model would rather say."""

from __future__ import annotations

import json
import sys

import pytest

from magicpig.engine.grammar import GrammarError
from magicpig.engine.llm import LLM
from magicpig.engine.request import SamplingParams
from magicpig.errors import ArgumentError

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["rome", "oslo"]}, "people": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["city", "people"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def bytes_llm(byte_model):
    with LLM(*byte_model(), memory=1 << 30) as llm:
        yield llm


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_follow_the_schema(temperature, bytes_llm):
    params = SamplingParams(max_tokens=60, temperature=temperature, seed=1, n=4, json_schema=SCHEMA)
    for choice in bytes_llm.generate(["where?"], params, progress=False)[0].choices:
        answer = json.loads(choice.text)
        assert answer["city"] in ("rome", "oslo")
        assert 0 <= answer["people"] <= 99
        assert choice.finish == "stop"


def test_what_cannot_be_followed_is_refused(bytes_llm, llm, monkeypatch):
    for schema in ({"type": "nonsense"}, {"$ref": "http://nowhere/x"}):
        with pytest.raises(GrammarError, match="the JSON schema cannot be followed"):
            bytes_llm.generate(["a"], SamplingParams(max_tokens=5, json_schema=schema), progress=False)
    for settings in ({"ignore_eos": True}, {"min_tokens": 2}):
        with pytest.raises(ArgumentError, match="json_schema says where an answer ends"):
            SamplingParams(max_tokens=5, json_schema=SCHEMA, **settings)
    with pytest.raises(GrammarError, match="with this tokenizer"):  # its tokens are words, not bytes
        llm("llama").generate([[5, 6]], SamplingParams(max_tokens=5, json_schema=SCHEMA), progress=False)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(GrammarError, match="pip install 'magicpig\\[structured\\]'"):
        bytes_llm.generate(["a"], SamplingParams(max_tokens=5, json_schema={"type": "array"}), progress=False)
