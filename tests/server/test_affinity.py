"""Prompts that begin alike go to one replica; how many replicas a load asks for."""

from __future__ import annotations

import json

import pytest

from magicpig.server.affinity import PIECE, Affinity, prompt_keys, wanted_replicas

DOCUMENT = "All happy families are alike. " * 200


def completion(prompt):
    return prompt_keys(json.dumps({"prompt": prompt}).encode())


def chat(*messages):
    said = [{"role": role, "content": content} for role, content in messages]
    return prompt_keys(json.dumps({"model": "m", "messages": said}).encode())


def test_prompts_that_begin_alike_have_their_first_keys_in_common():
    first, second = completion(DOCUMENT + "Who?"), completion(DOCUMENT + "Where, then? " * 80)
    assert len(first) == (len(DOCUMENT) + 4) // PIECE
    assert second[: len(first)] == first
    assert len(second) > len(first)
    assert completion("x" + DOCUMENT)[0] != first[0]
    one, other = (chat(("system", "Be brief."), ("user", DOCUMENT + question)) for question in ("Who?", "Where?"))
    assert one == other != ()
    assert chat(("user", DOCUMENT))[0] != one[0]


@pytest.mark.parametrize(
    "prompt", [[DOCUMENT, "another"], [{"type": "text", "text": DOCUMENT}], list(range(2000)), [list(range(2000)), [1]]]
)
def test_all_forms_of_a_prompt_have_keys(prompt):
    assert len(completion(prompt)) > 5


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b'{"prompt": 3}', b'{"messages": [3, {"role": 1}]}', b"\xff", b"[" * 9999]
)
def test_what_cannot_be_read_has_none(body):
    assert prompt_keys(body) == ()


def test_the_replica_that_read_most_of_a_prompt_is_found():
    affinity: Affinity[str] = Affinity()
    affinity.remember(completion(DOCUMENT + "Who?"), "a")
    affinity.remember(completion("Another text. " * 500), "b")
    assert affinity.find(completion(DOCUMENT + "Where?")) == "a"
    assert affinity.find(completion("Another text. " * 400)) == "b"
    assert affinity.find(completion(DOCUMENT + "but most of it is new " * 600)) is None, "less than half is known"
    assert affinity.find(completion("short")) is None
    affinity.remember(completion(DOCUMENT + "Who?"), "b")
    assert affinity.find(completion(DOCUMENT + "Where?")) == "b", "the last one counts"


def test_what_was_not_used_for_long_is_forgotten():
    affinity: Affinity[int] = Affinity(most=20)
    for i in range(10):
        affinity.remember(completion(f"{i} " * 1000), i)
    assert affinity.find(completion("0 " * 1000)) is None
    assert affinity.find(completion("9 " * 1000)) == 9


@pytest.mark.parametrize(
    ("loads", "current", "wanted"),
    [([], 2, 2), ([0, 0], 2, 1), ([0.7, 0.7], 2, 2), ([1.0], 1, 2), ([4.0], 1, 6), ([1.0], 3, 5), ([0.2, 0.2], 2, 1)],
)
def test_replicas_follow_the_load(loads, current, wanted):
    assert wanted_replicas(loads, current) == wanted
