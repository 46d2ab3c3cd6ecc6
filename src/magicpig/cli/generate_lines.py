"""`magicpig generate --jsonl`: many prompts from a file, their answers into another; goes on where it was stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from magicpig.cli.errors import InputError
from magicpig.cli.files import read_text
from magicpig.cli.options import checked
from magicpig.strict_json import parse
from magicpig.where import Where
from magicpig.wording import counted, printable

if TYPE_CHECKING:
    from rich.console import Console

    from magicpig.config import Config
    from magicpig.engine.llm import LLM
    from magicpig.engine.request import Completion, Request, SamplingParams
    from magicpig.errors import MagicPigError

KNOWN = ("id", "prompt", "messages", "magicpig")  # and the settings of SamplingParams


@dataclass(frozen=True)
class Line:
    """A line of the input: its number, from 0, what it says, and what tells it from others."""

    number: int
    said: dict[str, Any]
    digest: str


def read_lines(path: Path, settings: dict[str, Any]) -> list[Line]:
    """The lines of a file, checked; empty ones do not count. settings: of all answers. Raises InputError."""
    lines = []
    for number, text in enumerate(read_text(path).splitlines()):
        if not text.strip():
            continue
        try:
            said = parse(text)
        except ValueError as error:
            raise InputError(f"{path}:{number + 1}: {printable(str(error), 200)}") from None
        if not isinstance(said, dict) or ("prompt" in said) == ("messages" in said):
            raise InputError(f"{path}:{number + 1}: must be an object with either prompt or messages")
        digest = hashlib.sha256(json.dumps([settings, said], sort_keys=True).encode()).hexdigest()[:16]
        lines.append(Line(number, said, digest))
    return lines


class Answers:
    """The output: a JSON object a line, in the order in which answers end. What is there when it is opened is kept.

    A last line that was torn is taken away. Raises InputError for a file of other prompts or other settings.
    """

    def __init__(self, path: Path, lines: Sequence[Line]) -> None:
        self.path = path
        expected = {line.number: line.digest for line in lines}
        self.done: set[int] = set()
        try:
            self._file = open(path, "a+b")  # noqa: SIM115
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from None
        try:
            self._take_over(expected)
        except BaseException:
            self._file.close()
            raise

    def _take_over(self, expected: dict[int, str]) -> None:
        whole = 0
        self._file.seek(0)
        for text in self._file:
            number, digest = _said(text)
            if digest is None:
                if self._file.read(1):
                    raise InputError(f"{self.path}: has something else than answers; choose another file")
                break  # torn
            if expected.get(number) != digest:
                raise InputError(
                    f"{self.path}: has answers to other prompts, or by other settings; choose another file"
                )
            self.done.add(number)
            whole += len(text)
        self._file.truncate(whole)

    def add(self, line: Line, answer: dict[str, Any]) -> None:
        """Appends a line, which is in the file when this returns."""
        known = {"line": line.number, "input": line.digest}
        named = {"id": line.said["id"]} if "id" in line.said else {}
        self._file.write((json.dumps({**known, **named, **answer}, ensure_ascii=False) + "\n").encode())
        self._file.flush()

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def answer_file(
    path: Path,
    out: Path,
    directory: Path,
    config: Config,
    notes: Console,
    *,
    asked: dict[str, Any],
    opening: dict[str, Any],
    dtype: str,
    system: str | None,
    chat: bool,
    where: Where,
) -> None:
    """Answers the lines of `path` that `out` has not got. asked: settings of `SamplingParams` that lines may overrule.

    opening: of `generation.open_model`. system, chat, where: as of `magicpig generate`. Raises InputError, before
    anything is computed, for a line that asks for what does not exist.
    """
    given = {"model": directory.resolve().name, "config": config.nondefault(), **asked, "system": system, "chat": chat}
    lines = read_lines(path, given)
    failed = 0
    with Answers(out, lines) as answers:
        left = [line for line in lines if line.number not in answers.done]
        if left:
            from magicpig import generation
            from magicpig.engine.llm import LLM
            from magicpig.engine.request import SamplingParams

            with notes.status("Loading the model"):
                generation.silence_transformers()
                opened = generation.open_model(directory, **opening)
                network = generation.load(opened, dtype=dtype, device=where.device)
            options = where.model_dump() | {"max_length": opening["max_length"]}
            with checked(LLM, network, opened.tokenizer, config, **options) as llm:
                params = checked(SamplingParams, **asked)
                requests = [_request(llm, line, params, path, system, chat=chat) for line in left]
                with Progress(console=notes, transient=True, disable=not notes.is_terminal) as progress:
                    bar = progress.add_task("Answering", total=len(lines), completed=len(lines) - len(left))
                    for index, done in llm.complete(requests):
                        answer = _answer(done)
                        failed += "error" in answer
                        answers.add(left[index], answer)
                        progress.advance(bar)
    before = len(lines) - len(left)
    again = f", {before:,} of them before" if before else ""
    notes.print(f"{counted(len(lines), 'prompt')} answered{again}; {counted(failed, 'error')}", highlight=False)


def _request(llm: LLM, line: Line, params: SamplingParams, path: Path, system: str | None, *, chat: bool) -> Request:
    from magicpig.engine.request import Request
    from magicpig.engine.template import chat_prompt

    said = line.said
    own = {name: value for name, value in said.items() if name not in KNOWN}
    unknown = sorted(set(own) - {field.name for field in fields(params)})
    try:
        if unknown:
            raise ValueError(f"{unknown[0]}: there is no such setting")
        if isinstance(own.get("stop"), str):
            own["stop"] = [own["stop"]]
        own |= {name: tuple(own[name]) for name in ("stop", "stop_token_ids") if name in own}
        config = llm.engine.config.changed(said["magicpig"]) if said.get("magicpig") else None
        messages = said.get("messages")
        if messages is None and (chat or system is not None):
            messages = [{"role": "user", "content": said["prompt"]}]
        if messages is not None:
            first = [] if system is None else [{"role": "system", "content": system}]
            prompt = chat_prompt(llm.tokenizer, first + messages)
        else:
            prompt = tuple(llm.tokenizer(said["prompt"], verbose=False)["input_ids"])
        return Request(prompt, replace(params, **own), config)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"{path}:{line.number + 1}: {printable(str(error), 300)}") from None


def _answer(done: Completion | MagicPigError) -> dict[str, Any]:
    from magicpig.errors import MagicPigError

    if isinstance(done, MagicPigError):
        return {"error": {"code": done.code, "message": str(done)}}
    texts = [choice.text for choice in done.choices]
    first = done.choices[0]
    many: dict[str, Any] = {} if len(texts) == 1 else {"texts": texts}
    return {"text": first.text, **many, "finish_reason": first.finish, "report": asdict(first.report)}


def _said(text: bytes) -> tuple[int, str | None]:
    """Number and digest of a line of the output; None if it is no whole line of ours."""
    try:
        said = json.loads(text)
        return (int(said["line"]), str(said["input"])) if text.endswith(b"\n") else (-1, None)
    except (ValueError, TypeError, KeyError):
        return -1, None
