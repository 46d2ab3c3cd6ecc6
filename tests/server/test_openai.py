"""The official client, unmodified, gets what OpenAI's interface promises."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

DOCUMENT = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "number afterwards.\nOne of the special magic numbers for uppity-gopher is: 4267939. Some people verify when they "
    "see an air; others consider at once. You should heal the plastic revival while it is still slow. The grass is"
)
QUESTION = (
    "\nWhat is the special magic number for uppity-gopher mentioned in the provided text? The special magic number for "
    "uppity-gopher mentioned in the provided text is"
)
PROMPT = DOCUMENT + QUESTION


@pytest.fixture(scope="module")
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def ask(client, prompt=PROMPT, **options):
    return client.completions.create(
        **{"model": "pocket", "prompt": prompt, "max_tokens": 8, "temperature": 0, **options}
    )


def chat(client, content=PROMPT, **options):
    messages = [{"role": "user", "content": content}]
    options = {"model": "pocket", "messages": messages, "max_tokens": 8, "temperature": 0, **options}
    return client.chat.completions.create(**options)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["pocket", "other-name"]
    assert client.models.retrieve("other-name").owned_by == "magicpig"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-7")
    assert caught.value.code == "model_not_found"


def test_completion_and_usage(client, live):
    done = ask(client)
    tokens = len(live.tokenizer(PROMPT)["input_ids"])
    assert done.object == "text_completion"
    assert done.choices[0].text.strip().startswith("4267939")
    assert done.choices[0].finish_reason in ("stop", "length")
    assert (done.usage.prompt_tokens, done.usage.total_tokens) == (tokens, tokens + done.usage.completion_tokens)
    assert done.usage.prompt_tokens_details.cached_tokens == 0
    assert done.usage.magicpig["kv_bytes"] > 0


def test_prompts_of_all_four_kinds_are_answered_alike(client, live):
    ids = live.tokenizer(PROMPT)["input_ids"]
    text = ask(client).choices[0].text
    assert ask(client, ids).choices[0].text == text
    for prompts in ([PROMPT, "The number is"], [ids, live.tokenizer("The number is")["input_ids"]]):
        done = ask(client, prompts)
        assert [choice.index for choice in done.choices] == [0, 1]
        assert done.choices[0].text == text
        assert done.usage.prompt_tokens == len(ids) + len(live.tokenizer("The number is")["input_ids"])


def test_streams_say_the_same_in_pieces(client):
    whole = ask(client, [PROMPT, "The number is"], n=2, temperature=1.0, seed=5)
    texts = {0: "", 1: "", 2: "", 3: ""}
    ends = {}
    chunks = list(
        ask(
            client, [PROMPT, "The number is"], n=2, temperature=1.0, seed=5, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        texts[chunk.choices[0].index] += chunk.choices[0].text
        ends[chunk.choices[0].index] = chunk.choices[0].finish_reason or ends.get(chunk.choices[0].index)
    assert [texts[choice.index] for choice in whole.choices] == [choice.text for choice in whole.choices]
    assert [ends[choice.index] for choice in whole.choices] == [choice.finish_reason for choice in whole.choices]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.magicpig["preemptions"] == 0


def test_chat_whole_and_in_pieces(client):
    done = chat(client)
    assert (done.object, done.choices[0].message.role) == ("chat.completion", "assistant")
    assert done.choices[0].message.content.strip().startswith("4267939")
    parts = [{"type": "text", "text": PROMPT[:20]}, {"type": "text", "text": PROMPT[20:]}]
    assert chat(client, parts).choices[0].message.content == done.choices[0].message.content
    chunks = list(chat(client, stream=True, max_completion_tokens=8))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == done.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == done.choices[0].finish_reason
    assert all(chunk.usage is None for chunk in chunks)


def test_same_seed_same_text_whatever_else_runs(client):
    alone = ask(client, temperature=1.2, seed=11, max_tokens=12, extra_body={"ignore_eos": True}).choices[0].text
    with ThreadPoolExecutor(6) as pool:
        seeds = [11, 12, 13, 11, 14, 11]
        done = pool.map(
            lambda seed: ask(client, temperature=1.2, seed=seed, max_tokens=12, extra_body={"ignore_eos": True}), seeds
        )
        texts = [one.choices[0].text for one in done]
    assert [text == alone for text in texts] == [seed == 11 for seed in seeds]


def test_stop_strings_and_bias(client, live):
    text = ask(client).choices[0].text
    cut = ask(client, stop=["nothing of the kind", text[2:4]])
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (text[: text.index(text[2:4])], "stop")
    word = live.tokenizer("grass", add_special_tokens=False)["input_ids"][0]
    assert ask(client, logit_bias={str(word): 100}, max_tokens=2).choices[0].text.split() == ["grass", "grass"]


def test_logprobs(client):
    done = chat(client, logprobs=True, top_logprobs=2, max_tokens=3).choices[0]
    pieces = "".join(entry.token for entry in done.logprobs.content)
    assert pieces.replace("##", "") == done.message.content  # WordPiece marks what goes on
    for entry in done.logprobs.content:
        assert entry.logprob <= 0
        assert entry.top_logprobs[0].token == entry.token
        assert bytes(entry.bytes).decode() == entry.token
    streamed = [chunk.choices[0] for chunk in chat(client, logprobs=True, max_tokens=3, stream=True)]
    told = [entry.token for piece in streamed if piece.logprobs for entry in piece.logprobs.content]
    assert told == [entry.token for entry in done.logprobs.content]


def test_echo_with_logprobs_as_evaluation_harnesses_ask(client, live):
    """lm-evaluation-harness scores a continuation by the log-probabilities of an echoed prompt."""
    ids = live.tokenizer(PROMPT + " 4267939")["input_ids"]
    done = ask(client, [ids], echo=True, logprobs=1, max_tokens=1, seed=1).choices[0]
    logprobs = done.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(ids) + 1
    assert (logprobs.token_logprobs[0], logprobs.top_logprobs[0]) == (None, None)
    assert all(logprob <= 0 for logprob in logprobs.token_logprobs[1:])
    given = len(live.tokenizer(PROMPT)["input_ids"])
    for token, top in zip(logprobs.tokens[given:-1], logprobs.top_logprobs[given:-1], strict=True):
        assert token == max(top, key=top.get), "the number is what the model would say"
    assert done.text.startswith("<s>")
    assert "4267939" in done.text
    whole = ask(client, echo=True, max_tokens=0).choices[0]
    assert (whole.text, whole.finish_reason) == (PROMPT, "length")
    streamed = [chunk.choices[0] for chunk in ask(client, echo=True, logprobs=0, max_tokens=2, stream=True)]
    assert "".join(piece.text for piece in streamed).startswith(PROMPT)
    assert sum(len(piece.logprobs.tokens) for piece in streamed if piece.logprobs) == given + 2


def test_settings_of_sampled_attention_for_one_request(client):
    long = DOCUMENT + " green. The grass is" * 40 + QUESTION
    full = ask(client, long, extra_body={"magicpig": {"sampler": "full"}})
    assert full.usage.magicpig["rows_share_mean"] is None
    drawn = ask(client, long, extra_body={"magicpig": {"sampler": "sketch:16"}})
    assert 0 < drawn.usage.magicpig["rows_share_mean"] < 1
    assert drawn.usage.magicpig["predicted_error_p95"] > 0
    assert drawn.usage.magicpig["index_bytes"] > 0
    with pytest.raises(openai.BadRequestError, match="colour") as caught:
        ask(client, extra_body={"magicpig": {"colour": "red"}})
    assert caught.value.param == "magicpig"


def test_errors_are_openais(client):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, max_tokens=200_000)
    assert (caught.value.code, caught.value.type) == ("context_length_exceeded", "invalid_request_error")
    assert "maximum context length is 131072 tokens" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, temperature=3)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        ask(client, model="gpt-7")
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="required")
    assert caught.value.code == "unsupported_schema", "the pocket model's tokens are no bytes"
    with pytest.raises(openai.BadRequestError, match="top_logprobs needs logprobs"):
        chat(client, top_logprobs=2)
    with pytest.raises(openai.BadRequestError, match="stream_options"):
        ask(client, stream_options={"include_usage": True})
