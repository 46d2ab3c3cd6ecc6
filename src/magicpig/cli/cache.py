"""`magicpig cache`: the files of prompts that `magicpig serve --cache-dir` keeps."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from magicpig.cli.commands import Command, CommandGroup
from magicpig.cli.errors import InputError
from magicpig.cli.files import read_text
from magicpig.cli.options import Dtype, ModelDtype, ModelOrPocket, TrustRemoteCode, checked, or_pocket
from magicpig.config import KVDtype
from magicpig.wording import counted, printable

cache = typer.Typer(cls=CommandGroup, help="See, fill, check and empty the folder of `magicpig serve --cache-dir`.")

Folder = Annotated[Path, typer.Option("--cache-dir", help="The folder.", show_default=False)]
DAMAGED = 1


@cache.command("ls", cls=Command)
def list_files(cache_dir: Folder) -> None:
    """List the prompts that are kept, those used last first."""
    from magicpig.engine.prompt_files import listed

    _check(cache_dir)
    files = list(listed(cache_dir))
    table = Table(box=box.SIMPLE_HEAD)
    for name, justify in (("name", "left"), ("model", "left"), ("tokens", "right"), ("MiB", "right"), ("used", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("begins with", overflow="ellipsis", no_wrap=True)
    for file in files:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(file.used))
        text = printable(file.begins if file.error is None else "cannot be read; see verify", 60)
        tokens = "" if file.error is not None else f"{file.tokens:,}"
        table.add_row(file.path.stem, file.model, tokens, f"{file.nbytes / 2**20:,.1f}", used, text)
    console = Console(highlight=False)
    if files:
        console.print(table)
    total = sum(file.nbytes for file in files)
    console.print(f"{counted(len(files), 'prompt')}, {total / 2**20:,.1f} MiB")


@cache.command(cls=Command)
def warm(
    file: Annotated[Path, typer.Argument(help="A UTF-8 text file; - is standard input.")],
    cache_dir: Folder,
    model: ModelOrPocket = None,
    kv_dtype: Annotated[KVDtype, typer.Option(help="What keys and values are kept in, as for serve.")] = "model",
    dtype: ModelDtype = Dtype.auto,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Read a document now, so that the first question about it comes to a server that knows it.

    The question must begin with the document, as `magicpig chat --doc` and the page of the server have it.
    """
    text = read_text(file)
    notes = Console(stderr=True, highlight=False)
    folder = or_pocket(model, notes)
    from magicpig import generation
    from magicpig.config import Config
    from magicpig.engine.llm import LLM
    from magicpig.engine.request import Request, SamplingParams
    from magicpig.engine.template import chat_prompt

    with notes.status("Loading the model"):
        generation.silence_transformers()
        opened = generation.open_model(folder, trust_remote_code=trust_remote_code)
        network = generation.load(opened, dtype=dtype.value)
    options: dict[str, Any] = {"cache_dir": cache_dir}
    config = Config(kv_dtype=kv_dtype)
    with checked(LLM, network, opened.tokenizer, config, **options) as llm:
        prompt = chat_prompt(opened.tokenizer, [{"role": "user", "content": text}])
        with notes.status(f"Reading {counted(len(prompt), 'token')}"):
            (done,) = llm.run([Request(prompt, SamplingParams(max_tokens=0))], progress=False)
        llm.engine.rest()
        files = llm.engine.prefixes.files
        if files is None or not files.find(prompt, len(prompt), config)[1]:
            raise InputError(f"{file}: {counted(len(prompt), 'token')} could not be kept in {cache_dir}")
    report = done.choices[0].report
    new = report.prompt_tokens - report.cached_tokens
    notes.print(f"{counted(report.prompt_tokens, 'token')}, {new:,} of them read now, are warm in {cache_dir}")


@cache.command("rm", cls=Command)
def remove(
    cache_dir: Folder,
    names: Annotated[list[str] | None, typer.Argument(help="Names that ls lists.", show_default=False)] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
) -> None:
    """Remove prompts. A server that uses them reads them again when it needs them."""
    from magicpig.engine.prompt_files import SUFFIX, listed

    _check(cache_dir)
    if everything == bool(names):
        raise InputError("name what to remove, or say --all")
    paths = (
        [file.path for file in listed(cache_dir)] if everything else [cache_dir / f"{n}{SUFFIX}" for n in names or ()]
    )
    for path in paths:
        if path.parent != cache_dir or not path.is_file():
            raise InputError(f"{path.stem}: there is no such prompt in {cache_dir}")
    for path in paths:
        path.unlink(missing_ok=True)
    print(f"{counted(len(paths), 'prompt')} removed")


@cache.command(cls=Command)
def verify(cache_dir: Folder) -> None:
    """Read all files and compare them with their checksums. Exit code 1 if any has changed since it was written."""
    from magicpig.engine.prompt_files import SUFFIX, listed
    from magicpig.store.disk import forget_abandoned

    _check(cache_dir)
    forget_abandoned(cache_dir, f"*{SUFFIX}")
    files = list(listed(cache_dir, verify=True))
    damaged = [file for file in files if file.error is not None]
    for file in damaged:
        print(f"{file.path.stem}: {printable(file.error or '', 300)}")
    print(f"{counted(len(files), 'prompt')}, {len(damaged)} of them damaged")
    if damaged:
        raise typer.Exit(DAMAGED)


def _check(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"--cache-dir {folder}: there is no such folder")
