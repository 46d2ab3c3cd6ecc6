"""Conversations become prompts, by the template of the model's tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from magicpig.errors import ArgumentError
from magicpig.wording import printable


def chat_prompt(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **variables: Any) -> tuple[int, ...]:
    """The token ids of a conversation, up to where the next answer begins.

    messages: {"role": ..., "content": text} and what else the template knows. variables: further ones of the template.
    A tokenizer without a template is that of a model which continues text: it gets the contents, a blank line between
    them. Raises ArgumentError for conversations that the template refuses.
    """
    if not messages:
        raise ArgumentError("messages is empty")
    if not tokenizer.chat_template:
        text = "\n\n".join(str(message["content"]) for message in messages if message.get("content"))
        return tuple(tokenizer(text, verbose=False)["input_ids"])
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, tokenize=False, **variables
        )
    except (TemplateError, TypeError, KeyError, IndexError, ValueError) as error:
        raise ArgumentError(
            f"messages: the model's chat template refuses them: {printable(str(error), 200)}"
        ) from error
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
