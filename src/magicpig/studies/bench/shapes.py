"""The sizes of models that people run, as their published config.json gives them. Weights are not needed for speed."""

from __future__ import annotations

from typing import Any

from magicpig.errors import ArgumentError

_LLAMA = {"model_type": "llama", "vocab_size": 128256, "rms_norm_eps": 1e-5}
_QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "rms_norm_eps": 1e-6, "head_dim": 128}

SHAPES: dict[str, dict[str, Any]] = {
    # config.json of meta-llama/Llama-3.2-1B
    "llama-3.2-1b": {
        **_LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    # config.json of meta-llama/Llama-3.2-3B
    "llama-3.2-3b": {
        **_LLAMA,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    # config.json of meta-llama/Llama-3.1-8B
    "llama-3.1-8b": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    # config.json of Qwen/Qwen3-0.6B
    "qwen3-0.6b": {
        **_QWEN3,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    # config.json of Qwen/Qwen3-1.7B
    "qwen3-1.7b": {
        **_QWEN3,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    # config.json of Qwen/Qwen3-4B
    "qwen3-4b": {
        **_QWEN3,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    # config.json of Qwen/Qwen3-8B
    "qwen3-8b": {
        **_QWEN3,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    # no model: to see that something runs
    "tiny": {
        **_LLAMA,
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
    },
}


def settings(name: str, layers: int | None = None) -> dict[str, Any]:
    """What `AutoConfig.for_model` needs to know of a shape, cut to its first ``layers``. Raises ValueError."""
    if name not in SHAPES:
        raise ArgumentError(f"shape={name!r} is not known; allowed: {', '.join(SHAPES)}")
    found = SHAPES[name]
    if layers is not None and not 1 <= layers <= found["num_hidden_layers"]:
        raise ArgumentError(f"layers={layers} is out of range; {name} has {found['num_hidden_layers']}")
    return found | ({} if layers is None else {"num_hidden_layers": layers})
