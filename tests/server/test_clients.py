"""Clients that people use, unmodified: LangChain, lm-evaluation-harness; and requests made of the schema."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

from magicpig.studies import pocket

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{target}}}}"
"""
OFTEN = settings(
    max_examples=15, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
CHOICE = 'doc_to_choice: ["the sea", "the cat"]\nmetric_list: [{metric: acc}]\n'
WRITTEN = (
    'generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}\nmetric_list: [{metric: exact_match}]\n'
)


def test_langchain_chats_whole_and_in_pieces(live):
    client = ChatOpenAI(
        base_url=f"{live.url}/v1", api_key="unused", model="pocket", temperature=0, max_tokens=8, seed=1,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    messages = [SystemMessage("the sea"), HumanMessage("the cat of rome")]
    answer = client.invoke(messages)
    assert answer.content
    assert answer.usage_metadata["output_tokens"] == 8
    assert answer.response_metadata["finish_reason"] == "length"
    assert "".join(chunk.content for chunk in client.stream(messages)) == answer.content
    assert [each.content for each in client.batch([messages, messages])] == [answer.content] * 2


@pytest.mark.parametrize(
    ("model", "route", "kind", "rest", "more"),
    [
        ("local-completions", "completions", "multiple_choice", CHOICE, ["tokenizer={pocket}"]),
        ("local-completions", "completions", "generate_until", WRITTEN, ["tokenizer={pocket}"]),
        ("local-chat-completions", "chat/completions", "generate_until", WRITTEN, []),
    ],
)
def test_lm_evaluation_harness(model, route, kind, rest, more, live, tmp_path):
    (tmp_path / "data.json").write_text(
        "".join(json.dumps({"text": f"the map of {i} shows", "target": 0}) + "\n" for i in range(4))
    )
    task = TASK.format(name="mine", data=tmp_path / "data.json", kind=kind) + rest
    (tmp_path / "mine.yaml").write_text(task)
    arguments = [f"model=pocket,base_url={live.url}/v1/{route},num_concurrent=2,max_retries=1"]
    arguments += [each.format(pocket=pocket.path()) for each in more]
    command = [sys.executable, "-m", "lm_eval", "run", "--model", model, "--model_args", ",".join(arguments)]
    command += ["--tasks", "mine", "--include_path", str(tmp_path)]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    if "chat" in model:
        command.append("--apply_chat_template")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    env = {**os.environ, **offline, "OPENAI_API_KEY": "unused"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "out").glob("**/samples_mine*.jsonl")
    answers = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(answers) == 4
    for answer in answers:
        said = [response[0] for response in answer["resps"]]
        if kind == "multiple_choice":
            assert all(float(loglikelihood[0]) < 0 for loglikelihood in said)
        else:
            assert all(isinstance(text, str) for text in said)


@pytest.fixture
def session():
    with requests.Session() as session:
        yield session


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
def test_whatever_the_schema_allows_or_forbids_is_answered_properly(mode, live, session):
    """Some requests that schemathesis makes of the OpenAPI schema, right ones and wrong ones: no 500."""
    schema, sent = schemathesis.openapi.from_url(f"{live.url}/openapi.json"), 0
    for found in schema.get_all_operations():
        strategy = found.ok().as_strategy(generation_mode=mode)

        @OFTEN
        @given(strategy)
        def send(case):
            nonlocal sent
            if isinstance(case.body, dict) and isinstance(case.body.get("max_tokens", 99), int):
                case.body["max_tokens"] = min(4, case.body.get("max_tokens", 4))  # long answers tell nothing more
            answer = case.call(session=session, timeout=60)
            sent += 1
            assert answer.status_code < 500, (case.body, answer.text)

        with contextlib.suppress(Unsatisfiable):  # nothing can be wrong with a request that has no parameters
            send()
    assert sent > 40
    assert session.get(f"{live.url}/health").status_code == 200
