"""A start that knows the algorithms which the tasks need.

From random weights a small Llama spends hours on a plateau before it finds heads that look back, look up and count.
`initialise` lays such heads out by hand, as programs can be compiled into a transformer (Lindner et al., arXiv
2301.05062); training leaves them alone and learns the form of answers. Layer by layer:

0. Four heads copy sketches of the words 1 to 4 tokens back.
1. One head looks for the same word before, with the first token as a sink, which tells how common the word is. One
   follows ``VAR x = VAR y`` from y to x. Two remember the topic: the two words of the key that was named last.
2. Two heads look up what followed the last word under the same topic (induction heads: Olsson et al., arXiv
   2209.11895). Two average over all words to be counted, common ones more. Two subtract those that were just said.
   The MLP is left to training: it says when an answer's number, full stop or end comes instead of a word.

A head with nothing to do looks at the first token, which says nothing: an attention sink. The logit of a match is what
makes a head look at one token in 16K: its weights are sized by what a logit shall be, in units of which e^10 is 22,000.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaAttention

from magicpig.errors import ArgumentError
from magicpig.studies.evaluation.tasks import lexicon
from magicpig.studies.pocket.model import HEAD_DIM, ROPE_BASE

_FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the caller's defaults are
_HALF = HEAD_DIM // 2
# A head's dimensions. The first 16 frequencies tell distances; the others hardly rotate within 40,000 positions.
_DISTANCES = 16
# The last three of these turn within 16K tokens, so they are for what comes last in a comparison.
_MATCHING = [*range(16, 27), *range(48, 64), 47, 46, 45]  # for comparing what two tokens hold
_FLAGS = [27, 28, 29, 30, 31]  # one feature each

_SHORT = 16  # dimensions of a sketch
_LONG = 48  # of the one that is turned back into a word
_KEY = 8  # of the words of a topic
_COMMON = (":", ".", ",", "is", "are", "they")  # words without a sketch: comparing them would be noise
_FORM = (".", *(str(number) for number in range(1, 11)))  # and the end: what gives an answer its form
_SMALL = 0.3  # size of the features of a place: larger ones would change the norm and with it all else


class _Stream:
    """Dimensions of the residual stream: the word, sketches of other words, and features that are 0 or about 1."""

    word = slice(0, 128)
    back: ClassVar = {1: slice(128, 144), 2: slice(144, 160), 4: slice(160, 176), 3: slice(176, 224)}
    plain: ClassVar = {1: 240, 2: 241, 3: 242, 4: 243}  # an earlier word without a sketch
    told, asked = (slice(224, 232), slice(232, 240)), (slice(262, 270), slice(270, 278))  # topics
    # Of the word, and `common`. `aside`: nothing is looked up after it. `filler`: makes all norms the same.
    coded, listed, piece, asks, aside, first, mentioned, equals, colon, ordinal, hint, filler, one = range(244, 257)
    # Of its place: what stands one or two tokens back, and how common the word is here.
    after_equals, after_colon, after_ordinal, count = range(257, 261)
    common = 261
    form = slice(278, 288)  # which of `_FORM` comes next: written by the last MLP alone
    width = 288


@dataclass(frozen=True)
class _Distance:
    """A logit of the distance d = query - key: the sum of cosine cos(f d) + sine sin(f d) over the frequencies f."""

    cosine: Tensor
    sine: Tensor

    @staticmethod
    def exactly(back: int) -> _Distance:
        """39 at d = back, 8 less beside it, and near 0 far away."""
        amplitude = torch.tensor([14.0, 8, 5, 3, 2, *[0.8] * 9, 0, 0], **_FLOATS)
        angle = back * (torch.tensor(ROPE_BASE, **_FLOATS) ** (-torch.arange(_HALF, **_FLOATS) / _HALF))[:_DISTANCES]
        return _Distance(amplitude * angle.cos(), amplitude * angle.sin())


# Found by linear programming. Falls by 0.5 a token or more up to d = 26, from 56 to 37; at most 32.4 from 31 to 45,000.
_RECENT = _Distance(
    torch.tensor(
        [-0.01, 0.42, 1.72, 1.17, 7.56, 5.02, 7.15, 4.45, 5.88, 3.66, 4.18, 3.26, 3.1, 4.41, 2.35, 1.8], **_FLOATS
    ),
    torch.tensor([-0.05, -0.04, -0.83, 0, 0, 0, -2.94, *[0.0] * 9], **_FLOATS),
)
# Likewise. Within 0.2 of 0 at d = 2, 5, ..., 29, where the words of a numbered list are, and at most 1 between; at
# most -9.8 from 46 to 45,000. -0.9 at 1 and -1.4 at 0, for words in a row.
_JUST_SAID = _Distance(
    torch.tensor([-0.43, -0.08, -0.09, -0.33, 0.62, 3.8, 2.78, 2.26, 2.44, 2.62, 0, 0, 0, -0.12, -14.86, 0], **_FLOATS),
    torch.tensor(
        [0.09, 0.18, 0.41, -1.06, 3.02, 0, 0, -0.47, -0.01, -0.14, -0.82, -0.23, -0.46, -0.18, 0, -37.51], **_FLOATS
    ),
)


def form_tokens(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens that stand between the words of an answer or end it. Training is about when they come."""
    return [tokenizer.eos_token_id, *(tokenizer.convert_tokens_to_ids(token) for token in _FORM)]


def restrict(model: LlamaForCausalLM) -> None:
    """Lets training change the last MLP alone, and that write only which token of the form comes next.

    Whatever else it wrote would be noise in the words that the heads have found.
    """
    model.requires_grad_(False)
    last = model.model.layers[-1].mlp.requires_grad_(True)
    may_change = torch.zeros(model.config.hidden_size, 1, **_FLOATS)
    may_change[_Stream.form] = 1
    last.down_proj.weight.register_hook(lambda gradient: gradient * may_change.to(gradient.device))


@torch.no_grad()
def initialise(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Lays the heads out. Elsewhere weights are small and random, and zero where a layer writes into the stream:

    noise there would blur the look-ups. Raises ValueError for a model of another shape than six query and three
    key/value heads, three layers and at least 288 dimensions.
    """
    config = model.config
    shape = (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads)
    if shape != (3, 6, 3) or config.hidden_size < _Stream.width:
        raise ArgumentError(
            f"model has {shape} layers, heads and key/value heads and {config.hidden_size} dimensions; "
            f"laid out can be (3, 6, 3) and at least {_Stream.width}"
        )
    random = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for weight in (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight):
            weight.normal_(0, 0.1 * config.hidden_size**-0.5, generator=random)
        attention.o_proj.weight.zero_()
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
            weight.normal_(0, config.hidden_size**-0.5, generator=random)
        mlp.down_proj.weight.zero_()
    sketch = _embed(model.model.embed_tokens.weight, tokenizer, random)
    # What stands for the words before the first one, as long as their sketches.
    before_all = torch.cat(
        [
            F.normalize(torch.randn(_SHORT, 1, generator=random, **_FLOATS), dim=0),
            F.normalize(torch.randn(_LONG - _SHORT, 1, generator=random, **_FLOATS), dim=0) * 2**0.5,
        ]
    )
    # The squared norm of the stream before each layer, by construction.
    remember, understand, answer = (
        _Layer(layer.self_attn, config.hidden_size, norm, before_all)
        for layer, norm in zip(model.model.layers, (5, 9, 9.7), strict=True)
    )
    _remember(remember, sketch)
    _understand(understand, sketch)
    _answer(answer, sketch, random)
    # The last MLP decides by the features: next to them the words that the heads have added up are large.
    before_mlp = model.model.layers[-1].post_attention_layernorm.weight
    before_mlp.fill_(3.0)
    before_mlp[_Stream.word] = 0.3
    # Features are not words.
    model.model.norm.weight.zero_()
    model.model.norm.weight[_Stream.word] = 1.4
    model.model.norm.weight[_Stream.form] = 4.0


def _embed(weight: Tensor, tokenizer: PreTrainedTokenizerFast, random: torch.Generator) -> Tensor:
    """Fills the embedding; returns the (48, 128) map from words to sketches.

    Its first 6, 7, 8, 10, 14, 16, 30 and 48 rows give all words sketches of the same norm, 1 for the first 16.
    """

    def encode(word: str) -> int:
        return int(tokenizer.encode(word, add_special_tokens=False)[0])

    def mark(feature: int, words: Sequence[str], much: float = 1.0) -> None:
        weight[[encode(word) for word in words], feature] = much

    size = _Stream.word.stop
    basis = torch.linalg.qr(torch.randn(size, size, generator=random, **_FLOATS))[0]
    parts = torch.randn(len(weight), size, generator=random, **_FLOATS)
    for begin, end in pairwise((0, 6, 7, 8, 10, 14, _SHORT, len(_MATCHING), _LONG, size)):
        parts[:, begin:end] = F.normalize(parts[:, begin:end], dim=1) * ((end - begin) / size) ** 0.5
    parts[[encode(word) for word in _COMMON], :_LONG] = 0
    weight.zero_()
    weight[:, _Stream.word] = parts @ basis
    weight[:, _Stream.one] = 1
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(weight))))
    weight[[at for at, token in enumerate(tokens) if _is_piece(token)], _Stream.piece] = 1
    mark(_Stream.piece, ["-"])
    mark(_Stream.coded, lexicon.coded_words())
    mark(_Stream.listed, lexicon.english())
    mark(_Stream.aside, [*lexicon.variables(), *lexicon.example_variables(), *lexicon.coded_words(), ":", "."])
    # Counted words come after "words are:", after a coded word and after the full stop of a list's number.
    mark(_Stream.asks, [*lexicon.coded_words(), "."])
    mark(_Stream.asks, [":"], 0.2)
    mark(_Stream.hint, ["words"])
    mark(_Stream.common, _COMMON)
    mark(_Stream.mentioned, ["mentioned"])
    mark(_Stream.equals, ["="])
    mark(_Stream.colon, [":"])
    mark(_Stream.ordinal, [str(number) for number in range(1, 10)])
    form = form_tokens(tokenizer)
    codes = torch.linalg.qr(torch.randn(len(form), len(form), generator=random, **_FLOATS))[0][:, : _size(_Stream.form)]
    weight[form, _Stream.form] = F.normalize(codes, dim=1)
    first = tokenizer.bos_token_id
    weight[first, _Stream.word] = 0
    weight[first, _Stream.first] = 1
    weight[:, _Stream.filler] = (5 - (weight**2).sum(1)).clamp_min(0).sqrt()
    sketch: Tensor = basis[:_LONG] * (size / _SHORT) ** 0.5
    return sketch


def _is_piece(token: str) -> bool:
    """Of a number or a uuid."""
    pair = len(token) == 2 and set(token) <= set("0123456789abcdef")
    return pair or token.startswith("##") or (token.isdigit() and len(token) == 3)


class _Layer:
    """Lays heads out in a layer's attention, two to a group. What it reads is normalised; `scale` undoes that."""

    def __init__(self, attention: LlamaAttention, hidden: int, norm: float, before_all: Tensor) -> None:
        self.queries = attention.q_proj.weight.view(-1, HEAD_DIM, hidden)
        self.keys = attention.k_proj.weight.view(-1, HEAD_DIM, hidden)
        self.values = attention.v_proj.weight.view(-1, HEAD_DIM, hidden)
        self.output = attention.o_proj.weight.view(hidden, -1, HEAD_DIM)
        self.hidden, self.scale, self.before_all = hidden, (hidden / norm) ** 0.5, before_all

    def clear(self) -> None:
        for weight in (self.queries, self.keys, self.values):
            weight.zero_()

    def read(self, place: slice, what: Tensor | None = None) -> Tensor:
        """(n, hidden) what is seen of a place; all of it by default."""
        what = torch.eye(_size(place), **_FLOATS) if what is None else what
        rows = torch.zeros(len(what), self.hidden, **_FLOATS)
        rows[:, place] = what
        return rows

    def flag(self, feature: int, much: float = 1.0) -> Tensor:
        """(1, hidden) a feature."""
        return self.read(_only(feature), torch.tensor([[much]], **_FLOATS))

    def before(self, back: int) -> Tensor:
        """(n, hidden) the sketch of an earlier word, of which the first token has none."""
        place = _Stream.back[back]
        nothing = self.before_all[: _size(place)] * (_SHORT / _size(place)) ** 0.5
        rows: Tensor = self.read(place) - nothing @ self.flag(_Stream.first)
        return rows

    def by_distance(self, head: int, logit: _Distance) -> None:
        """A logit of the distance alone; the first token is exempt."""
        strength = (torch.hypot(logit.cosine, logit.sine) * HEAD_DIM**0.5).sqrt() / self.scale
        angle = torch.atan2(logit.sine, logit.cosine)
        query, key = self.queries[head], self.keys[head // 2]
        near, turned = slice(0, _DISTANCES), slice(_HALF, _HALF + _DISTANCES)
        for weight in (query, key):
            weight[near] = weight[turned] = 0
        key[near, _Stream.one] = strength
        key[near, _Stream.first] = -strength
        query[near, _Stream.one] = strength * angle.cos()
        query[turned, _Stream.one] = -strength * angle.sin()

    def match(self, head: int, pairs: list[tuple[float, Tensor, Tensor]]) -> None:
        """For each pair a logit where the key holds what the query holds, in dimensions of their own."""
        begin = 0
        for logit, query, key in pairs:
            at = _MATCHING[begin : begin + len(key)]
            begin += len(key)
            # Shared evenly by query and key.
            strength = (logit * HEAD_DIM**0.5) ** 0.5 / self.scale
            self.queries[head, at] = strength * query
            self.keys[head // 2, at] = strength * key

    def when(self, slot: int, key: Tensor, queries: dict[int, Tensor]) -> None:
        """A logit of (what the query reads) x (what the key reads), by head of one group."""
        most = max(query.abs().sum().item() for query in queries.values())
        strength = (most * HEAD_DIM**0.5) ** 0.5 / self.scale
        for head, query in queries.items():
            self.keys[head // 2, _FLAGS[slot]] = strength * key[0]
            self.queries[head, _FLAGS[slot]] = query[0] / most * strength

    def carry(self, group: int, what: list[Tensor]) -> None:
        """What the heads of a group bring, in order."""
        rows = torch.cat(what) / self.scale
        self.values[group] = 0
        self.values[group, : len(rows)] = rows

    def leave(self, head: int, begin: int, place: slice, how: Tensor) -> None:
        """Writes what was carried from `begin` on into a place."""
        self.output[place, head, begin : begin + how.shape[1]] = how


def _remember(layer: _Layer, sketch: Tensor) -> None:
    s = _Stream
    words = layer.read(s.word, sketch) + layer.before_all @ layer.flag(s.first)
    features = (s.equals, s.colon, s.ordinal, s.hint)
    common = layer.flag(s.common)
    layer.carry(0, [words[:_SHORT], *(layer.flag(feature) for feature in features), common])
    layer.carry(1, [words, common])
    for head, back in enumerate((1, 2, 3, 4)):
        layer.by_distance(head, _Distance.exactly(back))
        size = _size(s.back[back])
        layer.leave(head, 0, s.back[back], torch.eye(size, **_FLOATS) * (_SHORT / size) ** 0.5)
        # Keeps the norm.
        layer.leave(
            head, _LONG if head >= 2 else _SHORT + len(features), _only(s.plain[back]), torch.ones(1, 1, **_FLOATS)
        )
    for head, source, target, much in (
        (0, s.colon, s.after_colon, _SMALL),
        (1, s.equals, s.after_equals, _SMALL),
        (1, s.ordinal, s.after_ordinal, _SMALL),
        (1, s.hint, s.asks, 0.8),
    ):
        layer.leave(head, _SHORT + features.index(source), _only(target), torch.tensor([[much]], **_FLOATS))


def _understand(layer: _Layer, sketch: Tensor) -> None:
    s = _Stream
    layer.clear()
    first, one = layer.flag(s.first), layer.flag(s.one)
    word = layer.read(s.word, sketch[:_SHORT])
    # n equal words and a sink that weighs ten of them leave n / (n + 10).
    counted = layer.flag(s.coded) + layer.flag(s.listed)
    whole = layer.read(s.word, sketch[: len(_MATCHING)])
    layer.match(0, [(10.0, _stretched(whole), whole)])
    layer.when(0, counted, {0: 8.0 * one})
    layer.when(1, first, {0: (8.0 + 10.0 + math.log(10.0)) * one})
    layer.carry(0, [counted])
    layer.leave(0, 0, _only(s.count), torch.tensor([[_SMALL]], **_FLOATS))
    # From y in "VAR x = VAR y" to x, after ":" from the end of the number four tokens back. Both of two must hold.
    unit = 12.0
    asked = _stretched(layer.read(s.back[4])[:14])
    layer.match(2, [(unit, word, word), (0.9 * unit, asked, layer.read(s.word, sketch[:14]))])
    layer.when(0, layer.flag(s.after_equals, 1 / _SMALL), {2: 2 * unit * one})
    layer.when(1, first, {2: 2.45 * unit * one})
    layer.carry(1, [layer.before(3)])
    layer.leave(2, 0, s.word, 3.0 * sketch.T * (_SHORT / _LONG) ** 0.5)
    # "for adjective-noun is:" and "for adjective-noun mentioned".
    carried: list[Tensor] = []
    for head, here, topic, words in ((4, s.colon, s.told, (2, 4)), (5, s.mentioned, s.asked, (1, 3))):
        layer.by_distance(head, _RECENT)
        layer.when(head - 4, layer.flag(here), {head: 40 * one})
        for place, back in zip(topic, words, strict=True):
            layer.leave(
                head, len(carried) * _KEY, place, torch.eye(_KEY, **_FLOATS) * (_size(s.back[back]) / _SHORT) ** 0.5
            )
            carried.append(layer.before(back)[:_KEY])
    layer.when(2, first, {4: 75 * one, 5: 75 * one})
    layer.carry(2, carried)


def _answer(layer: _Layer, sketch: Tensor, random: torch.Generator) -> None:
    s = _Stream
    layer.clear()
    first, one, asks = layer.flag(s.first), layer.flag(s.one), layer.flag(s.asks)
    unit = 14.0
    pairs = [
        *(
            (unit, _stretched(layer.read(asked)[:n]), layer.read(told)[:n])
            for asked, told, n in zip(s.asked, s.told, (6, 6), strict=True)
        ),
        (1.2 * unit, _stretched(layer.read(s.word, sketch[:8])), layer.before(1)[:8]),
        (0.6 * unit, _stretched(layer.read(s.back[1])[:7]), layer.before(2)[:7]),
    ]
    part = torch.linalg.qr(torch.randn(_size(s.word), HEAD_DIM, generator=random, **_FLOATS))[0].T
    layer.carry(0, [layer.read(s.word, part)])
    for head in (0, 1):
        layer.match(head, pairs)
        layer.leave(head, 0, s.word, 3.0 * 2 * part.T)
    # A value begins after a colon, and goes on after its pieces.
    begin = 1.8 * unit * (one - layer.flag(s.piece))
    layer.when(0, layer.flag(s.after_colon, 1 / _SMALL), dict.fromkeys((0, 1), begin))
    layer.when(2, layer.flag(s.plain[2]), dict.fromkeys((0, 1), 0.3 * unit * layer.flag(s.plain[1])))
    layer.when(1, first, dict.fromkeys((0, 1), unit * (2.2 * one + 20 * layer.flag(s.aside))))
    # Two groups, each for half of the word.
    for group in (1, 2):
        mean, said = 2 * group, 2 * group + 1
        layer.by_distance(said, _JUST_SAID)
        layer.when(0, layer.flag(s.listed), {mean: 15 * asks})
        layer.when(1, layer.flag(s.coded), {mean: 15 * asks, said: 15.3 * asks})
        layer.when(2, layer.flag(s.count, 1 / _SMALL), {mean: 7.0 * asks})
        layer.when(3, layer.flag(s.after_ordinal, 1 / _SMALL), {said: 11.6 * asks})
        layer.when(4, first, {mean: 30 * one - 15 * asks, said: (30 + math.log(26.0)) * one - 18 * asks})
        half = torch.eye(_size(s.word), **_FLOATS)[HEAD_DIM * (group - 1) : HEAD_DIM * group]
        layer.carry(group, [layer.read(s.word, half)])
        # What was said is subtracted by about as much as it is counted.
        layer.leave(mean, 0, s.word, 30.0 * half.T)
        layer.leave(said, 0, s.word, -140.0 * half.T)


def _size(place: slice) -> int:
    return int(place.stop - place.start)


def _only(feature: int) -> slice:
    return slice(feature, feature + 1)


def _stretched(rows: Tensor) -> Tensor:
    """The first dimensions of a sketch, as long as the whole."""
    return rows * _SHORT / len(rows)
