"""What lossless mode costs and gains on a model's shape: a drafted token, exact passes of one to eight rows, answers.

Weights are random, keys and values made up, as for `magicpig bench decode`; so the share of accepted tokens is that of
no real text, and the times of the parts say for any share what would come of it. All variants in turns, medians.

    python scripts/lossless_speed.py --context 32768
    python scripts/lossless_speed.py --context 131072 --passes 3
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from magicpig.config import EXACT, Config
from magicpig.generation.lossless import MOST_DRAFTED, Decoding, costs_of
from magicpig.generation.rowwise import rowwise
from magicpig.integrations.transformers.compat import cache_argument
from magicpig.studies.bench.decode import Decoder

SHARES = (0.9, 0.95, 0.98, 1.0)


def main() -> None:
    """What the module says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--passes", type=int, default=5, help="of each kind")
    parser.add_argument("--new-tokens", type=int, default=32, help="of an answer; 0: none are written")
    given = parser.parse_args()
    decoder = Decoder(
        given.shape, layers=given.layers, dtype=torch.bfloat16, longest=given.context, steps=given.new_tokens + 8
    )
    model, config = decoder.model(), Config()
    base = decoder.filled(given.context, EXACT)
    sampled = base.fork(config)
    sampled.settle()

    def timed(rows: int, exact: bool) -> float:
        ids = torch.arange(1, rows + 1)[None]
        start = time.perf_counter()
        with torch.no_grad(), rowwise(model):
            if exact:
                with sampled.verifying():
                    model(input_ids=ids, **cache_argument(sampled))
            else:
                model(input_ids=ids, **cache_argument(sampled))
        took = time.perf_counter() - start
        sampled.crop(-rows)
        return took

    kinds: dict[str, Callable[[], float]] = {"drafted token": lambda: timed(1, exact=False)}
    for rows in range(1, MOST_DRAFTED + 2):
        kinds[f"pass of {rows}"] = lambda rows=rows: timed(rows, exact=True)  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(given.passes + 1):
        for name, measure in kinds.items():
            took = measure()
            if turn > 0:
                times[name].append(took)
    median = {name: statistics.median(each) for name, each in times.items()}
    one, draft = median["pass of 1"], median["drafted token"]
    assumed = costs_of(model, sampled)(given.context)
    print(f"{given.shape}, {given.context} tokens: ms, of a pass of one row, and what Pace takes it for")
    for name, took in median.items():
        rows = int(name.split()[-1]) if name.startswith("pass") else 0
        taken = 1 + (rows - 1) * assumed.row if rows else assumed.draft
        print(f"{name:>14} {1e3 * took:7.1f} {took / one:6.2f} {taken:6.2f}")
    for share in SHARES:
        speeds = [
            sum(share**i for i in range(k + 1)) * one / (k * draft + median[f"pass of {k + 1}"])
            for k in range(1, MOST_DRAFTED + 1)
        ]
        best = max(range(len(speeds)), key=speeds.__getitem__)
        print(f"{share:.0%} accepted: {speeds[best]:.2f} times full attention's tokens per second, drafting {best + 1}")
    if given.new_tokens == 0:
        return
    prompt = torch.zeros(1, given.context + 1, dtype=torch.int64)
    prompt[0, -1] = 1 + given.context % 7
    options = {"max_new_tokens": given.new_tokens, "do_sample": False}
    answers, spent, decoding = {}, {}, Decoding()
    for name, cache, own in (
        ("full", base.fork(EXACT), {}),
        ("lossless", sampled.fork(), {"custom_generate": decoding}),
    ):
        start = time.perf_counter()
        answers[name] = model.generate(prompt, **cache_argument(cache), **options, **own)  # type: ignore[operator]
        spent[name] = time.perf_counter() - start
    found = answers["lossless"] if torch.is_tensor(answers["lossless"]) else answers["lossless"].sequences
    drafts = decoding.drafts
    print(
        f"answers of {given.new_tokens} tokens, {'equal' if torch.equal(found, answers['full']) else 'DIFFERENT'}: "
        f"full {given.new_tokens / spent['full']:.2f} tokens/s, lossless {given.new_tokens / spent['lossless']:.2f}; "
        f"{drafts.accepted} of {drafts.drafted} drafted accepted in {drafts.passes} passes"
    )


if __name__ == "__main__":
    main()
