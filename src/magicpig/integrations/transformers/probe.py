"""One pass through a model without numbers, to see what it does with the keys and values before anything is read."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from magicpig.errors import MagicPigError
from magicpig.integrations.transformers import compat
from magicpig.integrations.transformers.attention import NAME
from magicpig.integrations.transformers.cache import MagicPigCache
from magicpig.integrations.transformers.errors import UnsupportedModelError
from magicpig.integrations.transformers.layer import MagicPigLayer, PendingTokens

# Cannot run without numbers before they come to their attention.
NAMED = {"jetmoe": "its attention repeats the keys for each of its experts"}

# By class and configuration: what is wrong with a model, or None. A handful of models per process.
_known: dict[tuple[type[PreTrainedModel], str], str | None] = {}


def probe(model: PreTrainedModel, kind: str) -> None:
    """Raises UnsupportedModelError if the model's attention needs of keys and values what `MagicPigCache` has not got.

    Runs a few tokens through an empty model of the same class on torch's meta device: shapes without memory or
    arithmetic, some milliseconds per layer. What cannot run there for other reasons is not refused.
    """
    if kind in NAMED:
        raise UnsupportedModelError(kind, NAMED[kind])
    key = type(model), model.config.to_json_string(use_diff=False)
    if key not in _known:
        _known[key] = _reason(type(model), copy.deepcopy(model.config))
    if (reason := _known[key]) is not None:
        raise UnsupportedModelError(kind, reason)


def _reason(model_class: type[PreTrainedModel], config: Any) -> str | None:
    cache = MagicPigCache(config)
    cache.layers = [
        _ProbeLayer(layer.config, layer.index) if isinstance(layer, MagicPigLayer) else layer for layer in cache.layers
    ]
    try:
        with warnings.catch_warnings(), torch.device("meta"), torch.no_grad():
            warnings.simplefilter("ignore")
            config._attn_implementation = NAME
            with no_init_weights():
                model = model_class(config).eval()
            for tokens in (2, 1):
                model(torch.zeros(1, tokens, dtype=torch.int64, device="meta"), **compat.cache_argument(cache))
    except UnsupportedModelError as error:
        return error.reason
    except MagicPigError as error:
        return str(error)
    except Exception:  # of operations that have no meaning without numbers
        return None
    return None


class _ProbeLayer(MagicPigLayer):
    """Checks what it is given, as its base does, and holds nothing."""

    def attend(self, query: Tensor, pending: PendingTokens, mask: Tensor | None, **rule: Any) -> Tensor:
        self.check_pending(pending)
        self._pending = None
        return query.new_empty(query.shape).transpose(1, 2).contiguous()
