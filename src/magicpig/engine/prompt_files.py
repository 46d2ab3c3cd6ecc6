"""Prompts that were read, in files: they stay warm when the process ends.

A file per prompt, as store/disk.py writes them: it is there whole, or not at all, and whatever changes it is found when
it is read. Its name says whose it is, its time of change when it was last used. The folder has nothing else, so a
process may be killed at any moment, and processes and models may share it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magicpig.config import Config
from magicpig.engine.prompts import SHORTEST, Prompts
from magicpig.engine.runner import SequenceState, Window
from magicpig.errors import ArgumentError
from magicpig.integrations.transformers.saved import identity
from magicpig.store.disk import (
    DamagedFileError,
    StoreFileError,
    forget_abandoned,
    pack,
    read_tensors,
    token_chain,
    unpack,
    write_tensors,
)

FORMAT = "magicpig.prompt"
VERSION = 1
SUFFIX = ".safetensors"
WORTH = 16  # a prompt is written if more than one in so many of its tokens is in no file
PENDING = 4  # prompts that may wait to be written
BEGINNING = 24  # tokens that a listing shows

logger = logging.getLogger("magicpig.engine")


@dataclass(frozen=True)
class PromptFile:
    """A file of the model at hand, as it says itself; only `read_prompt` makes sure."""

    path: Path
    tokens: tuple[int, ...]
    config: Config
    has_windows: bool


@dataclass(frozen=True)
class Listed:
    """A file of any model: its kind, the number of tokens and the text they begin with, as it says itself.

    used: when it last was, in seconds since 1970. error: why it cannot be read, then all else is empty.
    """

    path: Path
    nbytes: int
    used: float
    model: str = ""
    tokens: int = 0
    begins: str = ""
    error: str | None = None


def write_prompt(path: Path, state: SequenceState, tokens: Sequence[int], model: dict[str, str], begins: str) -> None:
    """Writes the state of a prompt that was read. The state must be nobody else's. Raises OSError."""
    tensors: dict[str, Tensor] = {"tokens": torch.tensor(tokens, dtype=torch.int32, device="cpu")}
    seen: dict[Any, str] = {}
    layers: list[dict[str, Any]] = []
    for index, layer in enumerate(state.layers):
        assert layer is not None
        if isinstance(layer, Window):
            tensors |= {f"{index}.{name}": tensor.cpu() for name, tensor in layer.tensors().items()}
            layers.append({"kind": "window", "size": layer.size})
        else:
            layers.append({"kind": "store", **pack(layer, str(index), tensors, seen)})
    manifest = {
        "version": VERSION,
        "model": model,
        "config": state.config.model_dump(mode="json"),
        "layers": layers,
        "begins": begins,
    }
    write_tensors(path, FORMAT, manifest, tensors)


def read_prompt(path: Path, model: dict[str, str], device: torch.device) -> tuple[tuple[int, ...], SequenceState]:
    """The tokens and the state that were written. Raises StoreFileError, of a damaged file DamagedFileError."""
    manifest, tensors = read_tensors(path, FORMAT)
    if manifest["version"] != VERSION or manifest["model"] != model:
        raise StoreFileError(f"{path}: has keys and values of another model, or of another version of this package")
    seen: dict[str, Any] = {}
    layers: list[Any] = []
    for index, packed in enumerate(manifest["layers"]):
        if packed["kind"] == "window":
            rows = (tensors[f"{index}.{name}"].to(device, copy=True) for name in ("keys", "values"))
            layers.append(Window.of(packed["size"], *rows))
        else:
            layers.append(unpack(packed, str(index), tensors, seen=seen))
    return tuple(tensors["tokens"].tolist()), SequenceState(Config(**manifest["config"]), layers)


def listed(folder: Path, *, verify: bool = False) -> Iterator[Listed]:
    """The files of a folder, those used last first. verify: read all of each, and find damaged ones."""
    for path, status in sorted(_files(folder), key=lambda file: -file[1].st_mtime):
        try:
            manifest, tensors = read_tensors(path, FORMAT, verify=verify)
            own = manifest["model"]["type"], len(tensors["tokens"]), manifest["begins"]
            yield Listed(path, status.st_size, status.st_mtime, *own)
        except (StoreFileError, LookupError, TypeError) as error:
            yield Listed(path, status.st_size, status.st_mtime, error=str(error))


class PromptFiles:
    """The files of one model in a folder, which is made if it is not there. May be used from any thread.

    limit: bytes of all files in it, the least recently used going first; None for half of what is free.
    network: whose keys and values these are. tokenizer: its own, for listings. Raises ArgumentError for a folder that
    cannot be used.
    """

    def __init__(self, folder: Path, limit: int | None, network: Any, tokenizer: Any) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(13, "no permission to write there")
            free = shutil.disk_usage(folder).free
        except OSError as error:
            raise ArgumentError(f"cache_dir={folder}: cannot be used: {error.strerror}") from None
        self.limit = (free + sum(status.st_size for _, status in _files(folder))) // 2 if limit is None else limit
        self._model, self._device, self._tokenizer = identity(network), network.device, tokenizer
        self._lock = threading.Lock()
        self._prompts: Prompts[PromptFile] = Prompts()
        self._pending: dict[tuple[int, ...], tuple[SequenceState, Future[None]]] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="magicpig-files")
        forget_abandoned(folder, f"*{SUFFIX}")
        for file in self._own():
            self._prompts.add(file)
        self._trim()

    def find(self, tokens: Sequence[int], most: int, config: Config) -> tuple[PromptFile | None, int]:
        """The file that shares the longest beginning with `tokens`, up to `most`, and how many it shares; or None."""
        with self._lock:
            return self._prompts.find(tokens, most, config)

    def read(self, file: PromptFile) -> SequenceState | None:
        """What it has; None if that cannot be used. Then it is forgotten, and if it is damaged removed with a warning.

        Takes as long as it takes to read all of it: what has changed on the disk is never served.
        """
        try:
            tokens, state = read_prompt(file.path, self._model, self._device)
            if (tokens, state.config) != (file.tokens, file.config):
                raise StoreFileError(f"{file.path}: another process has replaced it")
        except DamagedFileError as error:
            logger.warning("a file of the prompt cache is removed, its prompt will be read again: %s", error)
            self._remove(file.path)
        except StoreFileError as error:
            logger.info("a file of the prompt cache is of no use any more: %s", error)
        else:
            _use(file.path)
            return state
        with self._lock:
            self._forget(file)
        return None

    def offer(self, tokens: tuple[int, ...], state: SequenceState) -> None:
        """Writes a prompt soon, if most of it is in no file yet."""
        with self._lock:
            if tokens in self._pending or not self._worth(tokens, state.config):
                return
            if len(self._pending) >= PENDING:
                for waiting in list(self._pending)[: len(self._pending) - PENDING + 2]:  # the first is being written
                    self._withdraw(waiting)
            own = state.fork()  # made here, where the state is at rest
            self._pending[tokens] = own, self._writer.submit(self._write, tokens, own)

    def withdraw(self, tokens: tuple[int, ...]) -> None:
        """Does not write it, unless that has begun: there is no memory for what waits."""
        with self._lock:
            if tokens in self._pending:
                self._withdraw(tokens)

    def flush(self) -> None:
        """Waits until all is written."""
        with self._lock:
            futures = [written for _, written in self._pending.values()]
        wait(futures)

    def close(self) -> None:
        """Writes what waits. Nothing may be offered afterwards."""
        self._writer.shutdown(wait=True)

    def _withdraw(self, tokens: tuple[int, ...]) -> None:
        if self._pending[tokens][1].cancel():
            del self._pending[tokens]

    def _worth(self, tokens: Sequence[int], config: Config) -> bool:
        file, known = self._prompts.find(tokens, len(tokens), config)
        if file is not None:
            _use(file.path)
        return len(tokens) - known >= max(SHORTEST, len(tokens) // WORTH)

    def _write(self, tokens: tuple[int, ...], state: SequenceState) -> None:
        path = self.folder / self._name(tokens, state.config)
        file = PromptFile(path, tokens, state.config, state.has_windows)
        size = sum(store.nbytes().rows + store.nbytes().index for store in state.stores)
        try:
            with self._lock:
                if size > self.limit or not self._worth(tokens, state.config):
                    return
            begins = self._tokenizer.decode(tokens[:BEGINNING])
            write_prompt(path, state, tokens, self._model, begins)
            with self._lock:
                for older in self._prompts.needless(tokens, state.config, has_windows=state.has_windows):
                    self._forget(older)
                    if older.path != path:
                        self._remove(older.path)
                self._prompts.add(file)
                self._trim(path)
        except Exception as error:  # a full disk, for example; the prompt is warm in memory all the same
            logger.warning("a prompt of %d tokens could not be written to %s: %s", len(tokens), self.folder, error)
        finally:
            with self._lock:
                self._pending.pop(tokens, None)

    def _trim(self, new: Path | None = None) -> None:
        """Removes files, least recently used first, until the limit holds; `new` last of all."""
        files = sorted(_files(self.folder), key=lambda file: (file[0] == new, file[1].st_mtime))
        total = sum(status.st_size for _, status in files)
        gone = set()
        for path, status in files:
            if total <= self.limit:
                break
            self._remove(path)
            gone.add(path)
            total -= status.st_size
        for file in [file for file in self._prompts if file.path in gone]:
            self._forget(file)

    def _forget(self, file: PromptFile) -> None:
        with contextlib.suppress(KeyError):
            self._prompts.remove(file)

    def _own(self) -> Iterator[PromptFile]:
        for path, _ in sorted(_files(self.folder), key=lambda file: file[1].st_mtime):
            if not path.name.startswith(self._owner()):
                continue
            try:
                manifest, tensors = read_tensors(path, FORMAT, verify=False)
            except StoreFileError as error:
                logger.warning("a file of the prompt cache is removed, it cannot be read: %s", error)
                self._remove(path)
                continue
            if manifest.get("version") != VERSION or manifest.get("model") != self._model:
                continue
            with contextlib.suppress(LookupError, TypeError, ValueError):  # of another version all the same
                windows = any(layer["kind"] == "window" for layer in manifest["layers"])
                tokens = tuple(tensors["tokens"].tolist())
                yield PromptFile(path, tokens, Config(**manifest["config"]), windows)

    def _owner(self) -> str:
        return f"{self._model['config'][:8]}{self._model['weights'][:8]}-"

    def _name(self, tokens: tuple[int, ...], config: Config) -> str:
        chain = token_chain(tokens, len(tokens))[-1]
        text = hashlib.sha256(f"{chain} {config.model_dump_json()}".encode()).hexdigest()
        return f"{self._owner()}{text[:32]}{SUFFIX}"

    def _remove(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink()


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for entry in os.scandir(folder):
        if entry.name.endswith(SUFFIX) and not entry.name.startswith("."):
            with contextlib.suppress(OSError):  # another process has removed it
                yield Path(entry.path), entry.stat()


def _use(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.utime(path, (time.time(), time.time()))
