"""Two processes that share a model answer as one does, and end together."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from torch.distributed import TCPStore

from magicpig import Config
from magicpig.store.planner import LayerShape

FULL = Config(sampler="full")
SKETCH = Config(exact_below=32, block=8, recent=8, budget=16)
LSH = Config(K=4, L=20, exact_below=32, block=8, recent=8)
CASES = [("llama", SKETCH), ("llama", LSH), ("qwen3", FULL), ("gemma2", SKETCH), ("gpt_oss", LSH)]

# What each rank does. The same prompts come three times: first memory is so short that requests give way, the last time
# they are warm.
WORKER = """
import json, sys
from pathlib import Path

from magicpig import Config, generation
from magicpig.engine.engine import Engine
from magicpig.engine.options import EngineOptions
from magicpig.engine.ranks import Group, follow
from magicpig.engine.request import Collector, Request, SamplingParams

folder = Path(sys.argv[1])
cases = json.loads((folder / "cases.json").read_text())
group = Group.of_environment()
found = []
for kind, settings, prompts in cases:
    config, opened = Config(**settings), generation.open_model(folder / kind)
    network = generation.load(opened, ranks=group.size)
    if group.rank:
        follow(group, network, config, max_length=1024)
        continue
    options = EngineOptions(memory=1 << 30, token_budget=16, running=4, max_length=1024)
    engine = Engine(network, opened.tokenizer, config, options, group=group)
    params = SamplingParams(max_tokens=16, seed=3, ignore_eos=True, temperature=0.9, top_k=20, top_p=0.95, n=2)
    tokens, cached, preempted = [], [], 0
    for turn, memory in enumerate((engine.size(config, 200), 1 << 30, 1 << 30)):
        engine.scheduler.limits = type(engine.scheduler.limits)(memory=memory, token_budget=16, running=4)
        # The longest prompt comes first, and has to give way.
        late = [turn == 0 and len(prompt) == max(map(len, prompts)) for prompt in prompts]
        requests = [Request(tuple(prompt), params, priority=int(is_late)) for prompt, is_late in zip(prompts, late)]
        collectors, said = [Collector(request) for request in requests], []
        pairs = sorted(zip(requests, collectors), key=lambda pair: -pair[0].priority)
        for i, (request, collector) in enumerate(pairs):
            engine.submit(request, lambda delta, collector=collector: (collector.add(delta), said.append(delta)))
            while turn == 0 and i == 0 and len(said) < 5:
                engine.step()
        while engine.unfinished:
            if not engine.step():
                engine.wait()
        done = [collector.completion() for collector in collectors]
        tokens.append([[list(choice.tokens) for choice in one.choices] for one in done])
        cached.append(sum(choice.report.cached_tokens for one in done for choice in one.choices))
        preempted += sum(choice.report.preemptions for one in done for choice in one.choices)
    engine.close()
    found.append({"tokens": tokens, "cached": cached, "preempted": preempted})
if group.rank == 0:
    (folder / "found.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_two_ranks_answer_as_one_process(tmp_path, build, alone, prompts, tokenizer):
    expected = []
    for kind, config in CASES:
        build(kind).save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        expected.append([[alone(kind, config, prompt, seed=3 + i) for i in range(2)] for prompt in prompts])
    (tmp_path / "cases.json").write_text(
        json.dumps([(kind, config.model_dump(mode="json"), prompts) for kind, config in CASES])
    )
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, str(worker), str(tmp_path)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for (kind, config), got, wanted in zip(CASES, found, expected, strict=True):
        assert got["tokens"] == [wanted] * 3, (kind, config.sampler)
    assert any(got["preempted"] for got in found)
    # Layers with windows go on from whole prompts only.
    assert all(
        got["cached"][2] > 100 for (kind, _), got in zip(CASES, found, strict=True) if kind in ("llama", "qwen3")
    )


# Rank 0 comes first, and would find on the store where rank 1 of the start before has listened.
MEETING = """
import os, time
from magicpig.engine.ranks import Group

if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "1":
    time.sleep(3)
group = Group(patience=30)
print(group.any([group.rank == 1]))
os._exit(0)  # as if it had been killed
"""


@pytest.mark.slow
def test_ranks_that_are_started_again_do_not_wait_for_those_before():
    store = TCPStore("127.0.0.1", 0, is_master=True)
    agent = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    for start in range(2):
        env = os.environ | agent | {"TORCHELASTIC_RESTART_COUNT": str(start)}
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", MEETING], env=env | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True
            )
            for rank in range(2)
        ]
        try:
            assert [rank.communicate(timeout=120)[0] for rank in ranks] == ["[True]\n"] * 2, f"start {start}"
        finally:
            for rank in ranks:
                rank.kill()
                rank.communicate()


def test_a_rank_has_its_part_of_each_layer():
    assert LayerShape(4, 16, sampled=True, query_heads=8).part(2) == LayerShape(2, 16, sampled=True, query_heads=4)
