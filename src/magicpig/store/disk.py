"""Stores that outlive a process: one safetensors file, written aside and renamed, mapped when it is read.

Its metadata has the manifest, JSON; its last tensor is a checksum of every byte before it. Rows that were read from a
file stay there until something is written behind them: a store shares them with the file as forks share blocks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magicpig.config import Config
from magicpig.errors import MagicPigError
from magicpig.kernels.arena import UNLIMITED, Arena
from magicpig.settings import DrawPolicy
from magicpig.store.blocks import Block
from magicpig.store.store import KVStore, Tail

CHECKSUM = "checksum"  # sorts nowhere: it is the last tensor because it is written last
PIECE = 8 << 20  # bytes that are hashed at a time
ALIGNMENT = 64

# Names of safetensors.
_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "I32": torch.int32,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "I64": torch.int64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class StoreFileError(MagicPigError, ValueError):
    """A file of keys and values that cannot be read, or is not what it should be."""

    code = "bad_cache_file"


class DamagedFileError(StoreFileError):
    """A file of keys and values that has changed since it was written, or has lost its end."""

    code = "damaged_cache_file"


def write_tensors(path: Path | str, format: str, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes a file that appears whole or not at all. Raises OSError.

    format: a name of what is in it, for `read_tensors`. manifest: as JSON has it. tensors: on the CPU.
    """
    path = Path(os.path.realpath(path))
    # Rows and the like first: then all of them are aligned.
    order = sorted(tensors, key=lambda name: (tensors[name].nbytes % ALIGNMENT > 0, -tensors[name].element_size()))
    header: dict[str, Any] = {"__metadata__": {format: json.dumps(manifest, sort_keys=True)}}
    at = 0
    for name in order:
        tensor = tensors[name]
        header[name] = _entry(tensor.dtype, list(tensor.shape), at, at + tensor.nbytes)
        at += tensor.nbytes
    header[CHECKSUM] = _entry(torch.uint8, [hashlib.sha256().digest_size], at, at + hashlib.sha256().digest_size)
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    forget_abandoned(path.parent, path.name)
    try:
        with open(aside, "w+b") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                file.write(memoryview(_as_bytes(tensors[name])))
            file.flush()
            file.write(_digest(file.fileno(), 8 + len(text) + at))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
    _sync_folder(path.parent)


def read_tensors(path: Path | str, format: str, *, verify: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest and the tensors of a file, mapped: what is not looked at is not in memory.

    verify: False leaves out the checksum, and with it the time to read all of the file; nothing is certain then.
    Raises StoreFileError where there is no such file, and DamagedFileError where it is not as it was written.
    """
    checksum = hashlib.sha256().digest_size
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            # Private: whoever writes into a tensor gets pages of his own.
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if size else b""
            if size < 8 + checksum:
                raise DamagedFileError(f"{path}: {size} bytes are no file of keys and values")
            if verify and _digest(file.fileno(), size - checksum) != bytes(memory[size - checksum :]):
                raise DamagedFileError(f"{path}: the checksum does not match: it has been changed, or has lost its end")
    except OSError as error:
        raise StoreFileError(f"cannot read {path}: {error.strerror or error}") from None
    length = int.from_bytes(memory[:8], "little")
    try:
        header = json.loads(bytes(memory[8 : 8 + length]))
        manifest = json.loads(header.pop("__metadata__")[format])
        del header[CHECKSUM]
        tensors = {name: _mapped(memory, 8 + length, entry) for name, entry in header.items()}
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError):
        raise StoreFileError(f"{path}: not a file of {format}") from None
    return manifest, tensors


def pack(store: KVStore, name: str, tensors: dict[str, Tensor], seen: dict[Any, str] | None = None) -> dict[str, Any]:
    """Puts what a store holds into `tensors`, under names that begin with `name`. Returns the rest, as JSON has it.

    seen: one dictionary for all stores of a file, so that blocks which they share are written once.
    """
    store.tidy()
    blocks: list[str] = []
    seen = {} if seen is None else seen
    for rows, centre in store.pieces(0, store.flushed):
        at = seen.setdefault((rows.data_ptr(), rows.shape), f"{name}.rows.{len(blocks)}")
        blocks.append(at)
        tensors[at] = rows
        if centre is not None:
            tensors[f"{at}.centre"] = centre
    own = {"tail": store.tail, "previous": store.previous}
    for part, tail in own.items():
        if tail is not None:
            tensors[f"{name}.{part}"] = tail.rows
    tensors |= {f"{name}.index.{part}": tensor for part, tensor in store.index.tensors().items()}
    return {
        "kv_heads": store.kv_heads,
        "head_dim": store.head_dim,
        "dtype": _NAMES[store.dtype],
        "layer": store.layer,
        "first_head": store.first_head,
        "config": store.config.model_dump(mode="json"),
        "sampled": store.policy.sampled,
        "draw": vars(store.draw),
        "length": store.length,
        "flushed": store.flushed,
        "indexed_to": store.indexed_to,
        "blocks": blocks,
    }


def unpack(
    packed: Mapping[str, Any],
    name: str,
    tensors: Mapping[str, Tensor],
    arena: Arena = UNLIMITED,
    seen: dict[str, Block] | None = None,
) -> KVStore:
    """The store that `pack` was given. seen: as there."""
    seen = {} if seen is None else seen
    store = KVStore(
        packed["kv_heads"],
        packed["head_dim"],
        _DTYPES[packed["dtype"]],
        Config(**packed["config"]),
        sampled=packed["sampled"],
        layer=packed["layer"],
        first_head=packed["first_head"],
        arena=arena,
    )
    store.draw = DrawPolicy(**packed["draw"])
    blocks = []
    for at in packed["blocks"]:
        if at not in seen:
            seen[at] = Block(arena.hold(tensors[at]), tensors[at].shape[1], tensors.get(f"{at}.centre"))
            seen[at].shared = True  # with the file
        blocks.append(seen[at])
    tails = [
        Tail(arena.hold(tensor), shared=True) if (tensor := tensors.get(f"{name}.{part}")) is not None else None
        for part in ("tail", "previous")
    ]
    own = f"{name}.index."
    index = {part.removeprefix(own): tensor for part, tensor in tensors.items() if part.startswith(own)}
    end = packed["indexed_to"]
    store.hold(
        blocks,
        *tails,
        flushed=packed["flushed"],
        length=packed["length"],
        index=store.sampler.restored(index, end, arena) if end else store.sampler.empty(),
    )
    return store


def token_chain(tokens: Iterable[int], stride: int) -> list[str]:
    """A hash for every stride of token ids, the last one perhaps incomplete, that depends on all tokens before, too.

    So two texts share as many strides as their chains do.
    """
    ids, chain, link = list(tokens), [], b""
    for first in range(0, len(ids), stride):
        piece = torch.tensor(ids[first : first + stride], dtype=torch.int64, device="cpu").numpy().tobytes()
        link = hashlib.sha256(link + piece).digest()
        chain.append(link.hex())
    return chain


def _entry(dtype: torch.dtype, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}


def _as_bytes(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()


def _mapped(memory: Any, base: int, entry: Mapping[str, Any]) -> Tensor:
    dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")
    mapped = torch.frombuffer(memory, dtype=dtype, count=count, offset=base + entry["data_offsets"][0])
    return mapped.view(shape)


def _digest(fd: int, size: int) -> bytes:
    """SHA-256 of the SHA-256 of each piece of a file's first `size` bytes: pieces are hashed side by side."""

    def piece(begin: int) -> bytes:
        return hashlib.sha256(os.pread(fd, min(PIECE, size - begin), begin)).digest()

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return hashlib.sha256(b"".join(pool.map(piece, range(0, size, PIECE)))).digest()


def forget_abandoned(folder: Path, name: str = "*") -> None:
    """Removes what processes left in a folder that were stopped while they wrote a file or directory of that name."""
    for aside in list(folder.glob(f".{name}.*.part")):
        number = aside.name.removesuffix(".part").rpartition(".")[2]
        if number.isdigit() and not _alive(int(number)):
            if aside.is_dir():
                shutil.rmtree(aside, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    aside.unlink()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync_folder(folder: Path) -> None:
    """Makes a renaming last. Not every file system can."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
