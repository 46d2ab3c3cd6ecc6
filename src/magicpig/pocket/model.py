"""The shape of the pocket model, and a start that knows how to look things up.

From random weights a small Llama spends most of its training on a plateau before it finds heads that look back a fixed
distance and heads that find what followed the same token before (induction heads: Olsson et al., arXiv 2209.11895).
`initialise` builds such heads, soft enough for training to change them, which takes the plateau away.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

HEAD_DIM = 64
ROPE_BASE = 1e9
_WORD = 128  # dimensions of the residual stream that hold the word itself
_SKETCH = 24  # dimensions that hold a smaller copy of an earlier word
_ASKED = 15  # dimensions that hold a still smaller copy of a word of the question
_LOOK_BACK = (1, 3, 2, 5)  # layer 0, head by head: so many tokens back
_LOOK_BACK_TO_KEY = (6, 8)  # layer 1: from the end of a question to the two words of its key


def make(vocabulary: int, *, hidden: int, intermediate: int, heads: int, groups: int) -> LlamaForCausalLM:
    """A model of three layers, `heads` query and `groups` key/value heads of 64 dimensions; weights to be laid out."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=3,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=HEAD_DIM,
            max_position_embeddings=131072,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


@torch.no_grad()
def initialise(model: LlamaForCausalLM, seed: int) -> None:
    """Random weights with look-back heads in layer 0, induction heads in layer 1 and look-up heads in layer 2.

    The residual stream starts as the word (128 dimensions) and a constant 1 (the last dimension) which the look-back
    heads need as their query and key. They leave smaller copies of earlier words in dimensions of their own.
    Needs a model of four query and two key/value heads and at least 255 dimensions.
    """
    random = torch.Generator().manual_seed(seed)
    config, layers = model.config, model.model.layers
    hidden = config.hidden_size
    one = hidden - 1
    word = slice(0, _WORD)
    places, begin = {}, _WORD
    for back, size in (*((b, _SKETCH) for b in (1, 2, 3, 5)), *((b, _ASKED) for b in _LOOK_BACK_TO_KEY)):
        places[back] = slice(begin, begin + size)
        begin += size
    # What RMSNorm makes of a component of size 1: before layer 0 two of them stand, before layers 1 and 2 about six.
    early, late = (hidden / 2) ** 0.5, (hidden / 6) ** 0.5

    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        for weight in (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight):
            weight.normal_(0, 0.1 * hidden**-0.5, generator=random)
        # Noise in the residual stream would blur the look-ups; training finds its own use of what starts at zero.
        attention.o_proj.weight.zero_()
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
            weight.normal_(0, hidden**-0.5, generator=random)
        mlp.down_proj.weight.zero_()

    embedding = model.model.embed_tokens.weight
    embedding.normal_(0, 0.02, generator=random)
    embedding[:, word] = F.normalize(torch.randn(len(embedding), _WORD, generator=random), dim=1)
    embedding[:, one] = 1

    # Every copy of a word is made by the same map, so that copies of different heads can be compared.
    sketch = _orthogonal(_SKETCH, _WORD, random) * (_WORD / _SKETCH) ** 0.5
    asked = dict.fromkeys(_LOOK_BACK_TO_KEY, sketch[:_ASKED])
    for head, back in enumerate(_LOOK_BACK):
        _look_back(layers[0].self_attn, head, back, one, early)
        _write(layers[0].self_attn, head, word, sketch / early, places[back])
    for head, back in zip((2, 3), _LOOK_BACK_TO_KEY, strict=True):
        _look_back(layers[1].self_attn, head, back, one, early, sharper=1.6)
        _write(layers[1].self_attn, head, word, asked[back] / early, places[back])

    # Layer 1: what followed the last words before? Layer 2: what followed the key that is asked for?
    same = torch.eye(_SKETCH)
    pairs = [((word, sketch), places[1]), ((places[1], same / 2), places[2]), ((places[2], same / 2), places[3])]
    _match(layers[1].self_attn, pairs, late, random)
    part = torch.eye(_ASKED)
    keys = [((places[6], part), _first(places[3], _ASKED)), ((places[8], part), _first(places[5], _ASKED))]
    _match(layers[2].self_attn, keys, late, random, sharper=4)
    _copy(layers[1].self_attn, 0, word, late, (0.7, 0.7), random)
    _copy(layers[2].self_attn, 0, word, late, (1.0, 1.0), random)
    # The last two heads: all words alike, which counts them, less the word that was just said.
    _look_back(layers[2].self_attn, 3, 0, one, early, sharper=1.6)
    _copy(layers[2].self_attn, 1, word, late, (1.0, -1.0), random)


def _orthogonal(rows: int, columns: int, random: torch.Generator) -> Tensor:
    q: Tensor = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns), generator=random))[0]
    return q if rows >= columns else q.T


def _first(place: slice, size: int) -> slice:
    return slice(place.start, place.start + size)


def _look_back(attention: LlamaAttention, head: int, back: int, one: int, scale: float, sharper: float = 1.0) -> None:
    """A head whose logit is a sum of cosines of (distance - back), by the rotation of its query."""
    half = HEAD_DIM // 2
    theta = ROPE_BASE ** (-torch.arange(half) / half)
    amplitude = torch.full((half,), 0.4)
    amplitude[:5] = torch.tensor([7, 4, 2.5, 1.5, 1.0])
    amplitude[14:] = 0
    amplitude = sharper * (amplitude * HEAD_DIM**0.5) ** 0.5 / scale
    query, key = head * HEAD_DIM, head // 2 * HEAD_DIM
    attention.k_proj.weight[key : key + half, one] = amplitude
    attention.q_proj.weight[query : query + half, one] = amplitude * torch.cos(theta * back)
    attention.q_proj.weight[query + half : query + HEAD_DIM, one] = -amplitude * torch.sin(theta * back)


def _write(attention: LlamaAttention, head: int, source: slice, what: Tensor, place: slice) -> None:
    """The head leaves `what` of the source where it looks in `place`. The heads of a group use halves of its values."""
    size, half = len(what), head % 2 * (HEAD_DIM // 2)
    value, output = head // 2 * HEAD_DIM + half, head * HEAD_DIM + half
    attention.v_proj.weight[value : value + size] = 0
    attention.v_proj.weight[value : value + size, source] = what
    attention.o_proj.weight[place, output : output + size] = torch.eye(size)


def _match(
    attention: LlamaAttention,
    pairs: list[tuple[tuple[slice, Tensor], slice]],
    scale: float,
    random: torch.Generator,
    sharper: float = 1.0,
) -> None:
    """Group 0 looks for tokens whose places hold what the query's hold, in the dimensions that hardly rotate."""
    slow = [*range(HEAD_DIM // 4, HEAD_DIM // 2), *range(3 * HEAD_DIM // 4, HEAD_DIM)]
    query = torch.zeros(len(slow), attention.q_proj.weight.shape[1])
    key = torch.zeros_like(query)
    for (source, what), place in pairs:
        mix = _orthogonal(len(slow), len(what), random)
        query[:, source] += mix @ what
        key[:, place] += mix
    attention.q_proj.weight[: 2 * HEAD_DIM] = 0
    attention.k_proj.weight[:HEAD_DIM] = 0
    gain = (sharper * HEAD_DIM) ** 0.5 / scale  # for both alike: a step of Adam moves large and small weights as far
    for head in (0, 1):
        attention.q_proj.weight[[head * HEAD_DIM + i for i in slow]] = gain * query
    attention.k_proj.weight[slow] = gain * key


def _copy(
    attention: LlamaAttention,
    group: int,
    word: slice,
    scale: float,
    gains: tuple[float, float],
    random: torch.Generator,
) -> None:
    """The two heads of a group write the word where they look, as far as 64 dimensions can hold it."""
    what = _orthogonal(HEAD_DIM, _WORD, random)
    rows = slice(group * HEAD_DIM, (group + 1) * HEAD_DIM)
    attention.v_proj.weight[rows] = 0
    attention.v_proj.weight[rows, word] = what / scale
    for head, gain in zip((2 * group, 2 * group + 1), gains, strict=True):
        attention.o_proj.weight[word, head * HEAD_DIM : (head + 1) * HEAD_DIM] = gain * what.T * (_WORD / HEAD_DIM)
