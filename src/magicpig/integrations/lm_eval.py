"""lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness) with sampled attention."""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from magicpig.config import Config
from magicpig.integrations.transformers import MagicPigCache, attach
from magicpig.integrations.transformers.compat import cache_argument

Request = tuple[Any, list[int], list[int]]  # what the harness calls it, context, answer


class SamplingLM(HFLM):  # type: ignore[misc]
    """The harness' transformers model, attached.

    Generated texts are sampled as everywhere: the prompt is read exactly, what follows is not. Likelihoods of an answer
    go the same way: the context is read exactly, the tokens of the answer are sampled.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, config: Config, **options: Any) -> None:
        """Attach to a model that is loaded already. ``options`` are those of the harness' own class.

        Raises UnsupportedModelError for a model whose attention cannot be sampled.
        """
        super().__init__(pretrained=attach(model, config), tokenizer=tokenizer, **options)
        self._sampling = config

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = []
        before: list[int] = []
        for name, context, answer in tqdm(requests, "Computing likelihoods", disable=disable_tqdm):
            # The last token of an answer is not read.
            context = (context + answer)[-self.max_length - 1 : -len(answer)]
            # The answers of a multiple choice follow each other, and have one context.
            if context != before:
                before, read = context, MagicPigCache(self.model.config, self._sampling)
                with read.prefilling():
                    first = self._logits(context, read, 1)
                read.settle()
            logits = first
            if len(answer) > 1:
                fork = read.fork()
                with fork.decoding():
                    logits = torch.cat([first, self._logits(answer[:-1], fork, len(answer) - 1)])
            result = _judge(logits, torch.tensor(answer, dtype=torch.int64, device="cpu"))
            found.append(result)
            if name is not None:
                self.cache_hook.add_partial("loglikelihood", name, result)
        return found

    def _logits(self, tokens: list[int], cache: MagicPigCache, keep: int) -> Tensor:
        only = {"logits_to_keep": keep} if self.model._supports_logits_to_keep() else {}
        ids = torch.tensor([tokens], dtype=torch.int64, device="cpu")
        logits: Tensor = self.model(ids, **cache_argument(cache), **only).logits[0, -keep:]
        return logits


def _judge(logits: Tensor, answer: Tensor) -> tuple[float, bool]:
    """The log-likelihood of an answer, and whether it is the likeliest one."""
    chances = logits.float().log_softmax(-1)
    return float(chances.gather(-1, answer[:, None]).sum()), bool((chances.argmax(-1) == answer).all())
