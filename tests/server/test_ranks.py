"""A server of two ranks: what becomes of it when one of them is killed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import httpx
import psutil
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from magicpig.studies import pocket


def _save_tiny_model(folder):
    """With as many kv heads as ranks; the pocket model has three."""
    tokenizer = AutoTokenizer.from_pretrained(pocket.path())
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), num_attention_heads=4, num_key_value_heads=2, **sizes
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _wait_until_healthy(url, seconds=180.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"the server was not there after {seconds} s")


def _rank(torchrun, rank):
    for child in psutil.Process(torchrun.pid).children(recursive=True):
        if child.environ().get("RANK") == str(rank) and "serve" in child.cmdline():
            return child
    raise AssertionError(f"there is no rank {rank}")


def _answer(url, **more):
    body = {"prompt": list(range(2, 60)), "max_tokens": 24, "ignore_eos": True, "seed": 5, "logprobs": 0, **more}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]


@pytest.mark.slow
def test_a_killed_rank_ends_the_group_with_a_message_and_it_starts_again(tmp_path):
    _save_tiny_model(tmp_path / "tiny")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    ask = {"prompt": list(range(2, 60)), "max_tokens": 1500, "ignore_eos": True, "stream": True}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "-m", "magicpig", "serve", str(tmp_path / "tiny"), "--port", str(port)]
    log = tmp_path / "log"
    with log.open("w") as stderr, subprocess.Popen(command, stderr=stderr, env={**os.environ}) as torchrun:
        try:
            _wait_until_healthy(url)
            before = _answer(url)
            for turn in range(2):
                first = _rank(torchrun, 0)
                with httpx.stream("POST", f"{url}/v1/completions", json=ask, timeout=60) as answer:
                    lines = answer.iter_lines()
                    assert next(lines).startswith("data: ")
                    _rank(torchrun, 1).kill()
                    rest = list(lines)
                assert '"group_ended"' in "".join(rest)
                assert rest[-2] == "data: [DONE]"
                first.wait(60)
                if turn == 0:  # torchrun may start it again once
                    _wait_until_healthy(url)
                    assert _answer(url) == before
            assert torchrun.wait(60) != 0
        finally:
            for child in [*psutil.Process(torchrun.pid).children(recursive=True)] if torchrun.poll() is None else []:
                child.kill()
            torchrun.kill()
    assert log.read_text().count("magicpig: error: rank 0 of 2 ends, since another one has ended") == 2
