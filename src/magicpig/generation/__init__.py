"""A local model directory and a prompt become text, measured. Knows nothing about terminals.

`open_model` -> `encode` -> `load` -> `generate`. Everything that can be wrong with the directory or the prompt is a
`ModelError` of one line. `read` and `greedy` are the same in two steps, for those who do more with the cache between
them.
"""

from magicpig.generation.answer import Generation, generate
from magicpig.generation.lossless import MODES, Drafts
from magicpig.generation.lossless import check as check_lossless
from magicpig.generation.model import Model, end_tokens, load, open_model, silence_transformers, stop_tokens
from magicpig.generation.passes import fill, greedy, read
from magicpig.generation.prompt import encode, encode_in_two

__all__ = [
    "MODES",
    "Drafts",
    "Generation",
    "Model",
    "check_lossless",
    "encode",
    "encode_in_two",
    "end_tokens",
    "fill",
    "generate",
    "greedy",
    "load",
    "open_model",
    "read",
    "silence_transformers",
    "stop_tokens",
]
