"""Answers of full attention, drafted by sampling: a cheap step guesses some tokens, one exact pass judges them all.

A cycle drafts k tokens with sampled attention, takes their keys and values back, and feeds them again in one pass
that attends exactly, each token to the bit as full attention computes it alone. Greedy tokens are kept as long as they
are those of the exact pass. Others are kept by the rejection rule of speculative sampling (Leviathan, Kalman and Matias
2023, arXiv 2211.17192), which leaves the distribution that of the exact pass. Its last row gives one token more.

What is computed by rows of its own is in rowwise.py and in `Phase.VERIFY` of attention/step.py. Knows nothing of text.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.utils import GenerateDecoderOnlyOutput

from magicpig.config import Config
from magicpig.errors import ArgumentError
from magicpig.generation.rowwise import MOST_ROWS, foreign_products, rowwise
from magicpig.integrations.transformers import MagicPigCache, UnsupportedModelError
from magicpig.integrations.transformers.compat import cache_argument, take_cache
from magicpig.integrations.transformers.layer import MagicPigLayer

MODES = ("sampled", "lossless")
"""How an answer is written: "sampled" attends by samples, "lossless" only drafts by them."""

MOST_DRAFTED = MOST_ROWS - 1
MEMORY = 32  # drafted tokens that the share of accepted ones is an average over, about

# Of what a pass of one row spends on the part in question (docs/results/lossless.md: how they were measured).
SAMPLED_KEYS = 0.25  # what a drafted token spends on keys and values
ROW_OF_KEYS = 0.62  # what one more row of an exact pass adds there
ROW_OF_WEIGHTS = 0.06  # what it adds where weights are read


@dataclass
class Drafts:
    """What came of a draft: tokens drafted, accepted, and exact passes, among which are those that had no draft."""

    drafted: int = 0
    accepted: int = 0
    passes: int = 0

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that were accepted; None if none was drafted."""
        return self.accepted / self.drafted if self.drafted else None


@dataclass(frozen=True)
class Cost:
    """What things take, in exact passes of one row. draft: a drafted token. row: each row of a pass after the first."""

    draft: float
    row: float


def costs_of(network: nn.Module, cache: MagicPigCache) -> Callable[[int], Cost]:
    """The cost behind a number of tokens, from the bytes that a pass reads of the weights and of keys and values.

    A function of sizes alone, measured on one machine, so that a seed gives the same answer on every one.
    """
    weights = sum(_own_bytes(each) for each in network.modules() if not isinstance(each, nn.Embedding))
    stores = [store for layer in cache.layers if isinstance(layer, MagicPigLayer) for store in layer.stores]
    token = sum(2 * each.kv_heads * each.head_dim * each.dtype.itemsize for each in stores)

    def cost(length: int) -> Cost:
        keys = token * length / (weights + token * length)
        return Cost(1 - keys + keys * SAMPLED_KEYS, keys * ROW_OF_KEYS + (1 - keys) * ROW_OF_WEIGHTS)

    return cost


def _own_bytes(module: nn.Module) -> int:
    return sum(x.nbytes for own in (module.parameters(recurse=False), module.buffers(recurse=False)) for x in own)


class Pace:
    """How many tokens are worth drafting: what would have been best if each is accepted as often as those before.

    With a share `a` accepted, k tokens of cost c and a pass of k + 1 rows, of cost 1 + k r, make
    (1 - a^(k+1)) / (1 - a) tokens for k (c + r) + 1. A function of the acceptances and of sizes, so that a seed gives
    the same answer on a busy machine.
    """

    def __init__(self, cost: Callable[[int], Cost]) -> None:
        self._cost = cost
        self._share = 0.95
        self._idle = 0

    @property
    def share(self) -> float:
        """The share that is accepted, as far as is known."""
        return self._share

    def next(self, length: int) -> int:
        """Tokens to draft behind `length`; 0 where drafts do not pay.

        Where they would if more were accepted, now and then one is tried, to see whether that has changed.
        """
        cost = self._cost(length)
        k = _best(self._share, cost)
        if k == 0 and _best(1.0, cost) > 0:
            self._idle += 1
            k = int(self._idle % MEMORY == 0)
        return k

    def learn(self, drafted: int, accepted: int) -> None:
        """Tells what became of a draft. Tokens behind the first that was refused say nothing."""
        judged = min(drafted, accepted + 1)
        keep = (1 - 1 / MEMORY) ** judged
        self._share = self._share * keep + (1 - keep) * (accepted / judged if judged else 0.0)


def _best(share: float, cost: Cost) -> int:
    def gain(k: int) -> float:
        return sum(share**i for i in range(k + 1)) / (k * (cost.draft + cost.row) + 1)

    return max(range(MOST_DRAFTED + 1), key=gain)


def check(config: Config, model_config: Any) -> None:
    """Raises ArgumentError where nothing is sampled, UnsupportedModelError where a draft could not be taken back."""
    if not config.samples:
        raise ArgumentError(
            f"mode='lossless' drafts by sampling, but sampler={config.sampler!r} reads every key: choose another "
            "sampler, or mode='sampled', which is full attention then"
        )
    if not all(isinstance(layer, MagicPigLayer) for layer in MagicPigCache(model_config, config).layers):
        raise UnsupportedModelError(
            model_config.model_type,
            "some of its layers attend to a sliding window, which forgets what a refused draft would need: "
            "mode='lossless' is not for it",
        )


def why_not_to_the_bit(network: Any) -> str | None:
    """Why tokens may differ from those of full attention where two are nearly as likely; None where they do not."""
    if parts := foreign_products(network):
        return (
            f"{', '.join(parts)} of this model may round otherwise with several tokens at a time: where two tokens are "
            "nearly as likely, full attention may choose the other one."
        )
    rope = getattr(network.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        return (
            "the rotary embeddings of this model depend on the newest token of a pass: where two tokens are nearly as "
            "likely, full attention may choose the other one."
        )
    return None


class Decoding:
    """What `generate(custom_generate=...)` of transformers takes, for one sequence. drafts: what became of them.

    streamer: of transformers, which does not hand on its own. cost: what drafts and passes are taken to cost, as a
    function of the tokens before them; of the network, by default.
    """

    def __init__(self, streamer: Any = None, cost: Callable[[int], Cost] | None = None) -> None:
        self.drafts = Drafts()
        self.streamer = streamer
        self._cost = cost

    @torch.no_grad()
    def __call__(
        self,
        network: Any,
        input_ids: Tensor,
        *,
        logits_processor: Callable[[Tensor, Tensor], Tensor],
        stopping_criteria: Any,
        generation_config: Any,
        **kwargs: Any,
    ) -> GenerateDecoderOnlyOutput:
        """input_ids: (1, n). The rest as transformers' own ways of decoding take them."""
        if input_ids.shape[0] != 1:
            raise ArgumentError(f"mode='lossless' answers one sequence at a time, got {input_ids.shape[0]}")
        cache = take_cache(kwargs)
        assert isinstance(cache, MagicPigCache)
        with rowwise(network):
            ids = self._answer(network, input_ids, cache, logits_processor, stopping_criteria, generation_config)
        if self.streamer is not None:
            self.streamer.end()
        return GenerateDecoderOnlyOutput(sequences=ids, **cache_argument(cache))  # type: ignore[arg-type]

    def _answer(
        self,
        network: Any,
        ids: Tensor,
        cache: MagicPigCache,
        process: Callable[[Tensor, Tensor], Tensor],
        criteria: Any,
        settings: Any,
    ) -> Tensor:
        choose = _sampled if settings.do_sample else _likeliest
        pace = Pace(self._cost or costs_of(network, cache))
        for piece in ids[:, cache.get_seq_length() :].split(settings.prefill_chunk_size or ids.shape[1], 1):
            with cache.verifying() if piece.shape[1] == 1 else nullcontext():  # one token would be decoded
                logits = _logits(network, piece, cache, 1)
        found = choose(process(ids, logits))
        while True:
            for token in found:
                ids = torch.cat([ids, token[None, None]], 1)
                ended = bool(criteria(ids, None).all())  # in this order elsewhere, too
                if self.streamer is not None:
                    self.streamer.put(token[None].cpu())
                if ended:
                    _take_back(cache, cache.get_seq_length() - ids.shape[1] + 1)
                    return ids
            # Where nothing is sampled, a draft would cost what it saves.
            k = min(pace.next(ids.shape[1]), settings.max_length - ids.shape[1] - 1) if cache.samples else 0
            drafted, guesses = self._draft(network, ids, cache, process, choose, k)
            with cache.verifying():
                rows = _logits(network, drafted[:, ids.shape[1] - 1 :], cache, k + 1)
            scores = torch.cat([process(drafted[:, : ids.shape[1] + t], rows[t : t + 1]) for t in range(k + 1)])
            tokens = drafted[0, ids.shape[1] :]
            found = _judged_by_chance(tokens, guesses, scores) if settings.do_sample else _judged(tokens, scores)
            accepted = len(found) - 1
            _take_back(cache, k - accepted)
            self.drafts.drafted += k
            self.drafts.accepted += accepted
            self.drafts.passes += 1
            pace.learn(k, accepted)

    def _draft(
        self,
        network: Any,
        ids: Tensor,
        cache: MagicPigCache,
        process: Callable[[Tensor, Tensor], Tensor],
        choose: Callable[[Tensor], Tensor],
        k: int,
    ) -> tuple[Tensor, list[Tensor]]:
        """The tokens with k more, and the scores (1, vocabulary) that each was chosen by. The cache is as before."""
        guesses = []
        for _ in range(k):
            guesses.append(process(ids, _logits(network, ids[:, -1:], cache, 1)))
            ids = torch.cat([ids, choose(guesses[-1])[None]], 1)
        _take_back(cache, k)
        return ids, guesses


def _logits(network: Any, ids: Tensor, cache: MagicPigCache, rows: int) -> Tensor:
    """A forward pass of ids (1, T): the logits (rows, vocabulary) of the last of them, in float32."""
    kept = {"logits_to_keep": rows} if network._supports_logits_to_keep() else {}
    output = network(input_ids=ids.to(network.device), **cache_argument(cache), **kept)
    logits: Tensor = output.logits[0, -rows:]
    return logits.to(ids.device, torch.float32, copy=True)


def _take_back(cache: MagicPigCache, tokens: int) -> None:
    if tokens > 0:
        cache.crop(-tokens)


def _likeliest(scores: Tensor) -> Tensor:
    return scores.argmax(-1)


def _sampled(scores: Tensor) -> Tensor:
    return torch.multinomial(scores.softmax(-1), 1)[:, 0]


def _judged(tokens: Tensor, scores: Tensor) -> Tensor:
    """The drafted tokens (k,) that are those of the exact scores (k + 1, vocabulary), and the exact one behind them."""
    exact = scores.argmax(-1)
    accepted = int((tokens == exact[:-1]).long().cumprod(0).sum())
    return exact[: accepted + 1]


def _judged_by_chance(tokens: Tensor, guesses: list[Tensor], scores: Tensor) -> Tensor:
    """As `_judged`, so that what comes is distributed as by the exact scores; the drafted were drawn by `guesses`.

    A token drawn from q is kept with probability min(1, p / q), else one is drawn from what p has more than q.
    """
    wanted = scores.double().softmax(-1)
    for t, token in enumerate(tokens):
        drawn_from = guesses[t][0].double().softmax(-1)
        chance = wanted[t, token] / drawn_from[token]
        if not bool(torch.rand((), dtype=torch.float64, device=chance.device) < chance):
            rest = (wanted[t] - drawn_from).clamp_min(0)
            # Where rounding leaves nothing, p and q are the same.
            other = torch.multinomial(rest if bool(rest.sum() > 0) else wanted[t], 1)
            return torch.cat([tokens[:t], other])
    return torch.cat([tokens, torch.multinomial(wanted[-1], 1)])
