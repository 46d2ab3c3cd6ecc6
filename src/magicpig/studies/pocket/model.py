"""The shape of the pocket model: a small Llama of three layers, two of three weights of which are its many words'."""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM

HEAD_DIM = 64
ROPE_BASE = 1e9


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
