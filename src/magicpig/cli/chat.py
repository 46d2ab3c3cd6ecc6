"""`magicpig chat`: a conversation with a local model, about documents too."""

from __future__ import annotations

import queue
import sys
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from magicpig.cli.errors import InputError
from magicpig.cli.files import read_text
from magicpig.cli.options import (
    MOST_TOKENS,
    Dtype,
    ModelDtype,
    System,
    check_device,
    checked,
    or_pocket,
)
from magicpig.cli.settings import takes_config, takes_opening, takes_where
from magicpig.config import Config
from magicpig.errors import MagicPigError
from magicpig.where import Where

if TYPE_CHECKING:
    from magicpig.engine.engine import Engine
    from magicpig.engine.request import Delta, Report

HELP = """\
/doc FILE            the next question is about this text file; it stays warm for those after it
/sampler NAME        how answers attend from now on: full, sketch:256, lsh:K=9,L=120, ...
/stats               what the last answer took
/reset               forget the conversation
/quit                leave; so does Ctrl-D. Ctrl-C ends an answer and keeps what was said"""


@takes_config
@takes_where
@takes_opening
def chat(
    context: typer.Context,
    *,
    model: Annotated[
        Path | None,
        typer.Argument(help="Directory of a transformers model.", show_default="the pocket model"),
    ] = None,
    system: System = None,
    doc: Annotated[Path | None, typer.Option(help="A text file that the first question is about.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="The most tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 always takes the likeliest token.")] = 0.0,
    config: Config,
    where: Where,
    dtype: ModelDtype = Dtype.auto,
    opening: dict[str, Any],
) -> None:
    """Talk with a local model. Type /help for what else can be said."""
    check_device(where)
    folder = or_pocket(model)
    notes = Console(stderr=True)
    from magicpig import generation
    from magicpig.engine.engine import Engine
    from magicpig.engine.options import EngineOptions

    with notes.status("Loading the model"):
        generation.silence_transformers()
        opened = generation.open_model(folder, **opening)
        network = generation.load(opened, dtype=dtype.value, device=where.device)
        engine = checked(Engine, network, opened.tokenizer, config, EngineOptions(**where.model_dump()))
    session = Session(engine, system=system, max_tokens=max_tokens, temperature=temperature)
    if doc is not None:
        session.add_document(read_text(doc))
    engine.start()
    try:
        _talk(session, notes)
    finally:
        engine.close()


class Session:
    """A conversation: what was said, how answers attend, and what the last one took. Knows nothing of terminals."""

    def __init__(self, engine: Engine, *, system: str | None, max_tokens: int, temperature: float) -> None:
        self.engine, self.config = engine, engine.config
        self.max_tokens, self.temperature = max_tokens, temperature
        self.report: Report | None = None
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        """Forgets what was said."""
        self.messages: list[dict[str, str]] = list(self._first)
        self._documents: list[str] = []

    def add_document(self, text: str) -> None:
        """Comes before the next question."""
        self._documents.append(text)

    def use(self, sampler: str) -> None:
        """How answers attend from now on, as "lsh" or "sketch:256,bits=3". Raises ArgumentError."""
        self.config = self.config.changed({"sampler": sampler})

    def ask(self, question: str) -> Generator[str, None, None]:
        """The answer, piece by piece. Closing it early ends the answer and keeps what was said of it.

        Raises MagicPigError; then the question was not asked.
        """
        from magicpig.engine.request import Request, SamplingParams
        from magicpig.engine.template import chat_prompt

        asked = [*self.messages, {"role": "user", "content": "\n\n".join([*self._documents, question])}]
        request = Request(
            chat_prompt(self.engine.tokenizer, asked),
            SamplingParams(max_tokens=self.max_tokens, temperature=self.temperature),
            self.config,
        )
        deltas: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        self.engine.submit(request, deltas.put)
        said, error = "", None
        try:
            while error is None:
                delta = deltas.get()
                error = delta.error
                said += delta.text
                if delta.text:
                    yield delta.text
                if delta.finish is not None:
                    self.report = delta.report
                    break
        finally:
            self.engine.cancel(request.id)
            if error is None:
                self.messages, self._documents = [*asked, {"role": "assistant", "content": said}], []
        if error is not None:
            raise error


def _talk(session: Session, notes: Console) -> None:
    interactive = sys.stdin.isatty()
    if interactive:
        notes.print("Ask something; /help says what else there is.", highlight=False)
    while True:
        try:
            line = (input("> ") if interactive else _line()).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            notes.print()
            return
        if line in ("/quit", "/exit"):
            return
        try:
            if line.startswith("/"):
                _command(session, line, notes)
            elif line:
                _answer(session, line)
        except (ValueError, MagicPigError) as error:  # of what was typed, or of what cannot be answered
            notes.print(f"magicpig: {error}", style="red", markup=False, highlight=False)


def _line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _answer(session: Session, question: str) -> None:
    answer = session.ask(question)
    try:
        for piece in answer:
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        answer.close()
    finally:
        print()


def _command(session: Session, line: str, notes: Console) -> None:
    name, *words = line.split(maxsplit=2)
    if name == "/help":
        text = HELP
    elif name == "/doc" and words:
        document = read_text(Path(" ".join(words)).expanduser())
        session.add_document(document)
        text = f"{len(document):,} characters; now ask about them"
    elif name == "/sampler" and words:
        session.use("".join(words))
        text = f"from now on: {session.config.text()}"
    elif name == "/stats":
        text = _stats(session.report)
    elif name == "/reset":
        session.reset()
        text = "the conversation begins anew"
    else:
        raise InputError(f"{line!r} is not understood; /help says what is")
    notes.print(text, markup=False, highlight=False)


def _stats(report: Report | None) -> str:
    if report is None:
        return "nothing was answered yet"
    seconds = report.total_s - (report.first_token_s or 0.0)
    lines = [
        f"prompt         {report.prompt_tokens:,} tokens, {report.cached_tokens:,} of them warm",
        f"first token    after {report.first_token_s or 0.0:.2f} s",
        f"answer         {report.new_tokens:,} tokens, {(report.new_tokens - 1) / max(seconds, 1e-9):,.1f} a second",
        f"memory         {report.kv_bytes / 2**20:,.1f} MiB, and {report.index_bytes / 2**20:,.1f} MiB of index",
    ]
    if report.rows_share_mean is not None:
        lines.append(f"keys read      {report.rows_share_mean:.2%} on average, at most {report.rows_share_max:.2%}")
    if report.predicted_error_mean is not None:
        mean, p95 = f"{report.predicted_error_mean:.1%}", f"{report.predicted_error_p95:.1%}"
        lines.append(f"error          {mean} on average, {p95} at the 95th percentile, as predicted")
    return "\n".join(lines)
