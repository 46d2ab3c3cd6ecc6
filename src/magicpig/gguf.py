"""GGUF files, as llama.cpp has them, become model directories: once, into a cache.

transformers reads them (its list of architectures is the limit); what it unpacks is written as safetensors, so that
everything that works on a model directory works on a file, and the second start is as fast as with any directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from magicpig import machine
from magicpig.model_dir import ModelError, checksum
from magicpig.store.disk import forget_abandoned
from magicpig.wording import one_line

ABOUT = "gguf.json"  # beside the weights: which file they are from
MAGIC = b"GGUF"
_BEGINNING = 1 << 20  # bytes: names and settings, and the first weights
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")  # how llama.cpp names the parts of a split file
_KEPT = {"F32": "float32", "F16": "float16"}  # the others fit into bfloat16, which is half as large as float32


def cache_directory() -> Path:
    """Where converted files are kept: what the environment says, else as the desktop has it."""
    if chosen := os.environ.get("MAGICPIG_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "magicpig"


def converted(file: Path, on_stage: Callable[[str], None] = lambda stage: None) -> Path:
    """The model directory that ``file`` was converted to; converts it if there is none yet.

    It is found by what the file begins with, its size and when it was changed: to read all of it takes longer than to
    open the model. on_stage is called with a sentence at each stage of a conversion. Raises ModelError as `convert`.
    """
    check(file)
    # The last part is what the model is called.
    directory = cache_directory() / "gguf" / _identity(file) / (file.stem or "model")
    if not (directory / ABOUT).is_file():
        on_stage(f"Converting {file.name}, which is done once, into {directory}")
        convert(file, directory, on_stage=on_stage)
    return directory


def _identity(file: Path) -> str:
    with file.open("rb") as opened:
        known = opened.read(_BEGINNING)
    about = file.stat()
    return hashlib.sha256(known + f"{about.st_size} {about.st_mtime_ns}".encode()).hexdigest()[:16]


def convert(file: Path, directory: Path, *, on_stage: Callable[[str], None] = lambda stage: None) -> None:
    """Write a GGUF file as a model directory, which appears whole or not at all.

    Weights of whole numbers are unpacked to bfloat16, those in float32 and float16 stay what they are.
    Raises ModelError, in one line, for files that cannot be read, and without the package that reads them;
    MemoryError.
    """
    check(file)
    if directory.exists():
        raise ModelError(f"{directory} is there already; choose another place for what {file.name} becomes")
    # transformers takes a file in a directory, and a name without its folder.
    place: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    dtype = _dtype(file)
    try:
        config = _said(file, "configuration", AutoConfig.from_pretrained, file.parent, **place)
        on_stage("Reading the tokenizer")
        tokenizer = _said(file, "tokenizer", AutoTokenizer.from_pretrained, file.parent, **place)
        on_stage("Unpacking the weights")
        network = _said(
            file,
            "weights",
            AutoModelForCausalLM.from_pretrained,
            file.parent,
            config=config,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            **place,
        )
        # They are plain numbers now, which transformers would not write while these are there.
        network.hf_quantizer = None
        vars(network.config).pop("quantization_config", None)
        about = {
            "source": file.name,
            "sha256": checksum([file]),
            "dtype": dtype,
            "versions": machine.versions(),
        }
        on_stage("Writing the model directory")
        _write(network, tokenizer, about, directory)
    except OSError as error:
        raise ModelError(f"cannot write {directory}: {error.strerror or error}") from None


def check(file: Path) -> None:
    """Raise ModelError unless this is a whole GGUF file and the package that reads it is there."""
    try:
        with file.open("rb") as opened:
            start = opened.read(len(MAGIC))
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror}") from None
    if start != MAGIC:
        raise ModelError(f"{file}: not a GGUF file, it does not begin with {MAGIC.decode()}")
    if _PART.search(file.name):
        raise ModelError(f"{file}: one part of a split file; join the parts by `llama-gguf-split --merge`")
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise ModelError(
                f"{file}: reading a GGUF file takes the package {package}, which is not installed: "
                "pip install 'magicpig[gguf]'"
            )


def _dtype(file: Path) -> str:
    """What the weights become, by the type that most of their numbers have."""
    from gguf import GGUFReader

    counts: dict[str, int] = {}
    try:
        for tensor in GGUFReader(file).tensors:
            counts[tensor.tensor_type.name] = counts.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    except Exception as error:  # a damaged file surfaces as many types
        raise ModelError(f"{file}: a damaged GGUF file: {one_line(error)}") from error
    if not counts:
        raise ModelError(f"{file}: a GGUF file without weights, such as those of a vocabulary")
    return _KEPT.get(max(counts, key=lambda name: counts[name]), "bfloat16")


def _write(network: Any, tokenizer: Any, about: dict[str, Any], directory: Path) -> None:
    aside = directory.with_name(f".{directory.name[:100]}.{os.getpid()}.part")
    forget_abandoned(aside.parent, directory.name[:100])
    aside.mkdir(parents=True)
    try:
        network.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        (aside / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
        try:
            aside.rename(directory)
        except OSError:
            if not (directory / ABOUT).is_file():  # another process may have been faster with the same
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _said(file: Path, what: str, reader: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What the reader returns; its errors, of whatever type, name the file."""
    try:
        return reader(*arguments, **options)
    except MemoryError:
        raise
    except Exception as error:
        raise ModelError(f"{file}: cannot read the {what}: {one_line(error)}") from error
