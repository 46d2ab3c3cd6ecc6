"""The pocket model's tokenizer: one token for every word that the tasks can contain.

Numbers are cut into three digits each and uuids into pairs of letters, so that values drawn anew are a few known
tokens. Other text falls back to single characters. Decoding puts the spaces back where they belong.
"""

from __future__ import annotations

import string
from itertools import product

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from magicpig.studies.evaluation.tasks.vocabulary import vocabulary

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
_SPECIAL = (BEGIN, END, UNKNOWN)
_PIECE = r"[A-Za-z0-9]+|\.+|[^A-Za-z0-9.\s]"


def build() -> PreTrainedTokenizerFast:
    """The tokenizer, the same each time."""
    characters = string.digits + string.ascii_letters
    pairs = ["".join(pair) for pair in product("0123456789abcdef", repeat=2)]
    triples = ["".join(triple) for triple in product(string.digits, repeat=3)]
    parts = sorted({*characters, *pairs, *triples})
    words = sorted({*vocabulary(), *parts, *string.punctuation})
    pieces = [*_SPECIAL, *words, *(f"##{part}" for part in parts)]
    ids = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, ids[BEGIN])])
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(), decoders.Fuse(), decoders.Replace(" - ", "-")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, unk_token=UNKNOWN, pad_token=END
    )
