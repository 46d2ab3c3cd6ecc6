"""Generation by sampling under the defaults that scripts set in their first lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from magicpig.integrations.transformers import attach, detach

SMALL: dict[str, Any] = {"sinks": 2, "recent": 6, "block": 8, "exact_below": 0, "dense_layers": ()}


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64, "meta"], ids=str)
def change_defaults(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    def change() -> None:
        if request.param == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(request.param)

    yield change
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("sampler", ["lsh", "sketch"])
def test_tokens_do_not_depend_on_the_defaults(
    sampler: str,
    change_defaults: Callable[[], None],
    tiny: Callable[[str], PreTrainedModel],
    tokens: Callable[..., Any],
) -> None:
    model, ids = tiny("llama"), tokens(1, 100)
    settings = SMALL | ({"K": 4, "L": 16} if sampler == "lsh" else {"budget": 20})

    def generate() -> list[int]:
        attach(model, sampler=sampler, **settings)
        found = model.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist()
        detach(model)
        return found

    right = generate()
    change_defaults()
    assert generate() == right
