"""Answers that follow a JSON schema, and calls of tools, through the official client."""

from __future__ import annotations

import json

import openai
import pytest
from fastapi.testclient import TestClient

from magicpig.engine.engine import Engine
from magicpig.engine.options import EngineOptions
from magicpig.server.answers import tool_calls
from magicpig.server.app import ServerOptions, create_app
from magicpig.server.metrics import Metrics

SCHEMA = {"type": "object", "properties": {"city": {"enum": ["rome", "oslo"]}}, "required": ["city"],
          "additionalProperties": False}  # fmt: skip
WEATHER = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": SCHEMA}}
TIME = {"type": "function", "function": {"name": "time"}}
ASKED = [{"role": "user", "content": "the city?"}]
FORMAT = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def client(byte_model):
    engine = Engine(*byte_model(), options=EngineOptions(memory=1 << 30))
    engine.start()
    with TestClient(create_app(engine, ServerOptions(("tiny",)), Metrics())) as http:
        yield openai.OpenAI(base_url="http://testserver/v1", api_key="unused", http_client=http, max_retries=0)


def ask(client, **settings):
    return client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=80, temperature=0, **settings)


def test_answers_follow_a_schema_whole_and_in_pieces(client):
    whole = ask(client, response_format=FORMAT).choices[0]
    assert (json.loads(whole.message.content)["city"] in ("rome", "oslo"), whole.finish_reason) == (True, "stop")
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(client, response_format=FORMAT, stream=True)]
    assert "".join(pieces) == whole.message.content
    free = ask(client, response_format={"type": "json_object"}).choices[0]
    assert free.message.content.startswith("{")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
def test_a_tool_is_called_whole_and_in_pieces(choice, client):
    tools = [WEATHER] if choice == "required" else [TIME, WEATHER]
    whole = ask(client, tools=tools, tool_choice=choice).choices[0]
    assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
    (call,) = whole.message.tool_calls
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments)["city"] in ("rome", "oslo")
    chunks = [chunk.choices[0] for chunk in ask(client, tools=tools, tool_choice=choice, stream=True)]
    (piece,) = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert (piece.index, piece.function) == (0, type(piece.function)(**call.function.model_dump()))
    assert chunks[-1].finish_reason == "tool_calls"


def test_without_need_tools_are_only_told(client):
    said = ask(client, tools=[WEATHER], logit_bias={}).choices[0]
    assert (said.message.tool_calls, said.finish_reason in ("stop", "length")) == (None, True)
    again = ask(client, tools=[WEATHER], tool_choice="none").choices[0]
    assert again.message.content == said.message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(client, tools=[WEATHER], stream=True)]
    assert "".join(pieces) == said.message.content


def test_what_cannot_be_followed_is_refused(client):
    for wrong in (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}},
        {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}},
        {"tools": [WEATHER], "tool_choice": "required", "extra_body": {"min_tokens": 3}},
    ):
        with pytest.raises(openai.BadRequestError):
            ask(client, **wrong)


def test_calls_are_found_in_what_models_say():
    call = '{"name": "weather", "arguments": {"city": "rome"}}'
    one = ("weather", {"city": "rome"})
    assert tool_calls(call) == [one]
    assert tool_calls(f"<tool_call>\n{call}\n</tool_call>") == [one]
    assert tool_calls(f"Let me see. <tool_call>{call}</tool_call> <tool_call>{call}") == [one, one]
    for text in ("", "the city", "<tool_call>{", '{"name": "weather"}', "[1]", "[" * 5000):
        assert tool_calls(text) == []
