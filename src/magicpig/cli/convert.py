"""`magicpig convert`: a GGUF file becomes a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from magicpig.cli.errors import InputError
from magicpig.cli.options import say
from magicpig.model_dir import gguf_file


def convert(
    file: Annotated[Path, typer.Argument(help="A GGUF file, or a directory that holds one.", show_default=False)],
    directory: Annotated[Path, typer.Argument(help="The model directory to make.", show_default=False)],
) -> None:
    """Turn a GGUF file into the directory of a transformers model.

    --model of all commands takes a GGUF file as it is, and keeps what it becomes in a cache; this is for those who want
    it elsewhere. Weights of 8 bits and fewer become bfloat16. Needs the extra: pip install 'magicpig[gguf]'.
    """
    found = gguf_file(file)
    if found is None:
        raise InputError(f"{file}: neither a GGUF file nor a directory that holds one")
    from magicpig import gguf, model_dir

    gguf.convert(found, directory, on_stage=say)
    model_dir.check_directory(directory)
    print(directory)
