"""A text becomes the tokens of a prompt, in the model's own chat template where that is asked for."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from magicpig.generation.model import Model
from magicpig.model_dir import ModelError
from magicpig.wording import counted, one_line

TEMPLATE_SECONDS = 10  # for a chat template, which takes milliseconds


def encode(
    model: Model,
    text: str,
    *,
    chat: bool = False,
    system: str | None = None,
    answer: str = "",
    new_tokens: int = 0,
    most: int | None = None,
    truncate: bool = False,
    on_note: Callable[[str], None] = lambda note: None,
) -> list[int]:
    """Token ids of ``text``, or with ``chat`` of a user's message with that text, in the model's own template.

    system: what the model is told before the message. answer: how the answer begins; the model goes on from there.
    most: of more tokens, only so many. truncate: leave out the middle of a prompt that does not fit the model, which
    on_note is told; instructions and questions stand at the ends.
    Raises ModelError if nothing is left to read, or if the prompt and ``new_tokens`` do not fit the model.
    """
    tokenizer = model.tokenizer
    if chat and not tokenizer.chat_template:
        raise ModelError("the tokenizer has no chat template; leave out --chat")
    if chat:
        message = [] if system is None else [{"role": "system", "content": system}]
        message.append({"role": "user", "content": text})
        try:
            with _time_limit(TEMPLATE_SECONDS):
                prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        except _TimeIsUpError:
            raise ModelError(
                f"{model.directory}: the chat template fails: it was not done after {TEMPLATE_SECONDS} seconds"
            ) from None
        except Exception as error:  # a template is a program: it may fail in any way
            raise ModelError(f"{model.directory}: the chat template fails: {one_line(error)}") from error
    else:
        prompt = text
    # A prompt may be longer than the tokenizer's own idea of a limit; the model's is checked below.
    ids = tokenizer(prompt + answer, add_special_tokens=not chat, verbose=False)["input_ids"][:most]
    if not ids or not text:
        raise ModelError("the prompt is empty")
    if model.limit is not None and len(ids) + new_tokens > model.limit:
        kept = model.limit - new_tokens
        if not truncate or kept < 1:
            raise ModelError(
                f"the prompt has {len(ids)} tokens and {new_tokens} are to be generated, "
                f"but the model's limit is {model.limit} tokens (max_length overrules it)"
            )
        on_note(f"{counted(len(ids) - kept, 'token')} in the middle of the prompt do not fit the model, left out.")
        ids = ids[: kept - kept // 2] + ids[len(ids) - kept // 2 :]
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    if max(ids) >= vocabulary:
        raise ModelError(
            f"{model.directory}: the tokenizer makes token {max(ids)}, but the model knows {vocabulary} tokens"
        )
    return list(ids)


def encode_in_two(
    model: Model, context: str, question: str, *, chat: bool = False, answer: str = "", new_tokens: int = 0
) -> tuple[list[int], list[int]]:
    """The token ids of ``context + question`` as `encode` makes them, cut where the question begins.

    A token that reaches from one into the other belongs to the second part, and so does all that follows.
    """
    ids = encode(model, context + question, chat=chat, answer=answer, new_tokens=new_tokens)
    alone = encode(model, context, chat=chat)
    same = (i for i, (token, other) in enumerate(zip(ids, alone, strict=False)) if token != other)
    cut = next(same, min(len(ids), len(alone)))
    return ids[:cut], ids[cut:]


class _TimeIsUpError(Exception):
    """Raised by a signal."""


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """Raises _TimeIsUpError in what takes longer. Only where signals arrive: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _TimeIsUpError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
