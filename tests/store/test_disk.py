"""Stores in files: as they were, or a named error."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from magicpig import Config
from magicpig.attention.step import decode_step
from magicpig.kernels.arena import Arena
from magicpig.store import KVStore
from magicpig.store.disk import (
    DamagedFileError,
    StoreFileError,
    pack,
    read_tensors,
    token_chain,
    unpack,
    write_tensors,
)

FORMAT = "magicpig.test"


def tensors(fill: float, count: int = 2000) -> dict[str, torch.Tensor]:
    return {"a": torch.full((3, count), fill), "b": torch.full((5,), 7, dtype=torch.int8), "none": torch.empty(0, 2)}


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "file"
    own = {
        str(dtype): torch.arange(24).view(2, 3, 4).to(dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint16, torch.int32, torch.bool)
    }
    own["strided"] = torch.arange(24).view(4, 6).T
    write_tensors(path, FORMAT, {"x": [1, "two"]}, own)
    manifest, read = read_tensors(path, FORMAT)
    assert manifest == {"x": [1, "two"]}
    assert read.keys() == own.keys()
    assert all(torch.equal(read[name], own[name]) and read[name].dtype == own[name].dtype for name in own)
    from safetensors.torch import load_file

    assert torch.equal(load_file(path)["strided"], own["strided"])
    read["torch.int8"].zero_()  # writes into memory of its own
    assert torch.equal(read_tensors(path, FORMAT)[1]["torch.int8"], own["torch.int8"])


def test_every_changed_byte_and_every_lost_end_is_found(tmp_path: Path) -> None:
    path, draw = tmp_path / "file", random.Random(0)
    write_tensors(path, FORMAT, {"x": 1}, tensors(1.0, 500))
    content = path.read_bytes()
    for _ in range(200):
        at = draw.randrange(len(content))
        damaged = bytearray(content)
        damaged[at] ^= draw.randrange(1, 256)
        path.write_bytes(damaged)
        with pytest.raises(DamagedFileError):
            read_tensors(path, FORMAT)
    for size in [0, 1, 7, 8, 39, 40, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(DamagedFileError):
            read_tensors(path, FORMAT)
    path.write_bytes(content + b"x")
    with pytest.raises(DamagedFileError):
        read_tensors(path, FORMAT)


def test_what_is_no_such_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreFileError, match=r"^cannot read .*: No such file or directory$"):
        read_tensors(tmp_path / "none", FORMAT)
    with pytest.raises(StoreFileError, match=r"^cannot read .*: Is a directory$"):
        read_tensors(tmp_path, FORMAT)
    write_tensors(tmp_path / "file", "magicpig.other", {}, tensors(1.0))
    with pytest.raises(StoreFileError, match=rf"not a file of {FORMAT}$"):
        read_tensors(tmp_path / "file", FORMAT)


def _write_again_and_again(path: Path) -> None:
    for fill in range(1, 10**6):
        write_tensors(path, FORMAT, {"fill": fill}, tensors(float(fill), 20_000))


def test_a_process_that_is_killed_leaves_an_old_file_a_new_one_or_none(tmp_path: Path) -> None:
    path, draw, fork = tmp_path / "file", random.Random(0), multiprocessing.get_context("fork")
    for _ in range(20):  # 200 of them: `test_200_kills`
        _kill_while_writing(path, draw, fork)
        if path.exists():
            manifest, read = read_tensors(path, FORMAT)
            assert read["a"].eq(manifest["fill"]).all()
    write_tensors(path, FORMAT, {}, tensors(0.0))
    assert [each.name for each in tmp_path.iterdir()] == ["file"]  # nothing that was begun is left


@pytest.mark.slow
def test_200_kills(tmp_path: Path) -> None:
    path, draw, fork = tmp_path / "file", random.Random(1), multiprocessing.get_context("fork")
    for _ in range(200):
        _kill_while_writing(path, draw, fork)
        if path.exists():
            manifest, read = read_tensors(path, FORMAT)
            assert read["a"].eq(manifest["fill"]).all()


def _kill_while_writing(path: Path, draw: random.Random, context: multiprocessing.context.ForkContext) -> None:
    process = context.Process(target=_write_again_and_again, args=(path,))
    process.start()
    time.sleep(draw.uniform(0.0, 0.02))
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()


@pytest.mark.parametrize("kv_dtype", ["model", "int8"])
@pytest.mark.parametrize("sampler", [{"budget": 60}, {"K": 5, "L": 20}, {"sampler": "quest", "budget": 50}], ids=str)
def test_a_store_goes_on_from_a_file(tmp_path: Path, kv_dtype: str, sampler: dict) -> None:
    if "sampler" in sampler and kv_dtype == "int8":
        return
    config, arena = Config(**sampler, kv_dtype=kv_dtype, block=64, recent=30), Arena()
    store = KVStore(2, 40, torch.bfloat16, config, layer=4, first_head=2)
    store.append(*torch.randn(2, 2, 4500, 40))
    store.settle()
    own: dict[str, torch.Tensor] = {}
    packed = pack(store, "0", own)
    write_tensors(tmp_path / "file", FORMAT, packed, own)
    loaded = unpack(*read_first(tmp_path / "file"), arena)
    assert loaded.nbytes().rows <= store.nbytes().rows
    assert arena.used == loaded.nbytes().total
    for _ in range(100):  # into new blocks, and with new strides in the index
        new = [torch.randn(1, heads, 40).bfloat16() for heads in (4, 2, 2)]
        a, b = (decode_step(*new, [each], scale=0.2).output for each in (store, loaded))
        assert torch.equal(a, b)


def read_first(path: Path) -> tuple[dict, str, dict[str, torch.Tensor]]:
    manifest, read = read_tensors(path, FORMAT)
    return manifest, "0", read


def test_a_chain_of_tokens_says_how_far_two_texts_agree() -> None:
    a, b = token_chain(range(1000), 64), token_chain([*range(700), 5, *range(701, 1000)], 64)
    assert len(a) == 16
    assert a[:10] == b[:10]
    assert not set(a[10:]) & set(b[10:])
    assert token_chain(range(640), 64) == a[:10]
