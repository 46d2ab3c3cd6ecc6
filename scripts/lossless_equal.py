"""Whether greedy answers of lossless mode are those of full attention, token by token, on prompts from real texts.

Each prompt is a piece of the texts that ship with the package, read once; both answers go on from forks of its cache.
Prints a line for every prompt and what came of all of them; exit code 1 if a token differs anywhere.

    python scripts/lossless_equal.py                                   # the pocket model
    python scripts/lossless_equal.py --model DIRECTORY --prompts 50    # another one
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from magicpig import Config, MagicPigCache, attach, generation
from magicpig.generation.lossless import Cost, Decoding, why_not_to_the_bit
from magicpig.integrations.transformers.compat import cache_argument
from magicpig.studies import pocket
from magicpig.studies.evaluation.perplexity import TEXTS


def main() -> int:
    """What the module says; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=pocket.path())
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first prompt")
    parser.add_argument("--tokens", type=int, default=2048, help="of a prompt")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no other prompt begins")
    given = parser.parse_args()

    opened = generation.open_model(given.model)
    network = generation.load(opened, dtype=given.dtype)
    config = Config(budget=given.budget, exact_below=0, recent=64)
    attach(network, config)
    if why := why_not_to_the_bit(network):
        print(why)
    words = [torch.tensor(opened.tokenizer.encode(p.read_text("utf-8"))) for p in TEXTS]
    start, same, counts = time.monotonic(), 0, [0, 0, 0]
    numbers = range(given.first, given.first + given.prompts)
    for done, number in enumerate(numbers):
        if time.monotonic() - start > given.seconds:
            numbers = numbers[:done]
            break
        text = words[number % len(words)]
        at = 977 * number % (len(text) - given.tokens)
        ids = text[at : at + given.tokens][None]
        base = MagicPigCache(network.config, config)
        with torch.no_grad(), base.prefilling():
            for piece in ids[:, :-1].split(1024, 1):
                network(piece, **cache_argument(base))
        options = {"max_new_tokens": given.new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        options["attention_mask"] = torch.ones_like(ids)
        full = network.generate(ids, **options, **cache_argument(base.fork(config.changed({"sampler": "full"}))))
        decoding, cache = Decoding(cost=lambda _: Cost(0.5, 0.0)), base.fork()  # whether it pays or not
        found = network.generate(ids, **options, **cache_argument(cache), custom_generate=decoding).sequences
        share, drafts = cache.report().sampled_share_mean, decoding.drafts
        equal = torch.equal(full, found)
        same += equal
        counts = [x + y for x, y in zip(counts, (drafts.drafted, drafts.accepted, drafts.passes), strict=True)]
        print(
            f"{number}: {'equal' if equal else 'DIFFERENT'}, {drafts.accepted} of {drafts.drafted} drafted accepted, "
            f"{drafts.passes} passes, {share or 0:.1%} of keys sampled, {time.monotonic() - start:.0f} s",
            flush=True,
        )
    drafted, accepted, passes = counts
    print(
        f"{same} of {len(numbers)} answers of {given.new_tokens} tokens behind {given.tokens} equal full attention's; "
        f"{accepted} of {drafted} drafted tokens accepted ({accepted / max(1, drafted):.1%}), {passes} passes"
    )
    return int(same < len(numbers))


if __name__ == "__main__":
    sys.exit(main())
