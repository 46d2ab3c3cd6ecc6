"""The attention and mask functions that transformers calls under the name "magicpig".

Importing this module registers both. The mask stays two-dimensional, (B, positions), or None: the attention functions
are causal by themselves, and a T x N mask of a long prompt would be larger than the keys.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from magicpig.attention.prefill import causal_attention
from magicpig.errors import ArgumentError
from magicpig.integrations.transformers import compat
from magicpig.integrations.transformers.blocks import find_blocks, see_blocks
from magicpig.integrations.transformers.errors import UnsupportedModelError
from magicpig.integrations.transformers.layer import PendingTokens, refuse_gradients

NAME = "magicpig"


@compat.opaque
def magicpig_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | PendingTokens,
    value: Tensor | PendingTokens,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in the form of transformers' `AttentionInterface`.

    query: (B, H, T, D). key and value: what `MagicPigCache.update` returned, then attention is sampled where it may be;
    or (B, G, N, D) tensors of a sliding layer, another cache or none at all, then it is exact.
    attention_mask: (B, N) with zeros for padding, or None. s_aux: (H,) sink logits (gpt-oss).
    Returns ((B, T, H, D), None). Raises ValueError for what cannot be had: attention weights, dropout, other masks.
    """
    for name in compat.CACHE_NAMES:
        if kwargs.get(name) is not None:  # the model has handed on what it does not know, and makes a cache of its own
            raise ArgumentError(f"{name}= is not a name that this model knows; it calls its cache {compat.CACHE}")
    if kwargs.get("output_attentions"):
        raise ArgumentError("output_attentions=True: attention weights are never computed; unset it or detach(model)")
    if dropout:
        raise ArgumentError(f"dropout={dropout} of attention is not supported; call model.eval() or set it to 0")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise UnsupportedModelError(None, f"{type(module).__name__} is not causal")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ArgumentError(f"attention_mask has shape {tuple(attention_mask.shape)}; expected (batch, positions)")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, PendingTokens):
        refuse_gradients(query)
        rule: dict[str, Any] = {"scale": scale, "softcap": softcap, "sink_logits": s_aux}
        return key.layer.attend(query, key, attention_mask, **rule), None
    assert isinstance(value, Tensor)
    window = None if _layer_type(module) == "full_attention" else sliding_window
    if window is None and key.shape[2] > query.shape[2]:
        warnings.warn(
            f"the cache in use is not a MagicPigCache, so attention is exact; pass {compat.CACHE}=MagicPigCache(...)",
            stacklevel=2,
        )
    rule = {"scale": scale, "window": window, "softcap": softcap, "sink_logits": s_aux}
    return _attend_tensors(query, key, value, attention_mask, rule), None


@compat.opaque
def magicpig_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    *,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """None, or the two-dimensional mask of the last kv_length positions, which says where padding is and where blocks.

    Refuses what is not causal but for blocks of tokens that see each other (blocks.py).
    """
    if int(q_offset) + q_length != kv_offset + kv_length:
        raise ArgumentError(
            f"a cache of fixed size ({kv_length} positions) is not supported; use a MagicPigCache "
            "and leave cache_implementation unset"
        )
    groups = None
    device = torch.device(kwargs.get("device") or "cpu")
    if not allow_is_causal_skip and device.type != "meta":  # there, masks have no entries to look at
        queries, keys = range(int(q_offset), int(q_offset) + q_length), range(kv_offset, kv_offset + kv_length)
        window = getattr(kwargs.get("config"), "sliding_window", None)
        groups = find_blocks(kwargs["mask_function"], batch_size, queries, keys, window, device)
        if groups is None:
            raise ArgumentError(
                "the model asks for a mask that is not causal (packed sequences, or a cache for torch.compile), which "
                "is not supported"
            )
    mask: Tensor | None = compat.flash_attention_mask(
        batch_size, q_length, kv_length, int(q_offset), kv_offset, attention_mask=attention_mask
    )
    if mask is not None and mask.shape[1] != kv_length:
        raise ArgumentError(
            f"attention_mask has {mask.shape[1]} columns; expected {kv_length}, one per token seen so far"
        )
    if groups is not None and bool((groups > 1).any()):
        groups = torch.nn.functional.pad(groups, (kv_length - q_length, 0), value=1)
        return groups if mask is None else groups.where(mask.bool(), 0)
    return mask


def _attend_tensors(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: dict[str, Any]) -> Tensor:
    """Sequence by sequence, without the padding, with the blocks. Differentiable.

    Returns (B, T, H, D); zeros where there is padding.
    """
    T, N = query.shape[2], key.shape[2]
    if mask is not None and mask.shape[1] != N:
        raise ArgumentError(f"attention_mask has {mask.shape[1]} columns for {N} keys; a static cache is not supported")
    rows = []
    for row in range(len(query)):
        blocks = mask is not None and bool((mask[row] > 1).any())
        if mask is None or (not blocks and bool(mask[row].all())):
            rows.append(causal_attention(query[row], key[row], value[row], **rule).output)
            continue
        positions = mask[row].nonzero()[:, 0]
        new = positions[positions >= N - T] - (N - T)
        output = torch.zeros_like(query[row])
        if len(new) > 0:
            q, k, v = query[row][:, new], key[row][:, positions], value[row][:, positions]
            state = causal_attention(q, k, v, positions=positions, **rule)
            if blocks:
                n = len(new)
                state = see_blocks(state, q, k[:, -n:], v[:, -n:], mask[row, positions[-n:]], rule)
            output = output.index_copy(1, new, state.output)
        rows.append(output)
    return torch.stack(rows).transpose(1, 2).contiguous()  # as of transformers' own


def _layer_type(module: nn.Module) -> str | None:
    types = getattr(getattr(module, "config", None), "layer_types", None)
    index = getattr(module, "layer_idx", None)
    return None if types is None or index is None else str(types[index])


AttentionInterface.register(NAME, magicpig_attention)
AttentionMaskInterface.register(NAME, magicpig_mask)
