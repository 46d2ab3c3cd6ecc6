"""A model attached to an accelerator generates as without one: on a simulated device, the model on the processor."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from magicpig import Config, attach, detach
from magicpig.errors import ArgumentError, ArgumentTypeError
from magicpig.integrations.transformers import MagicPigCache
from magicpig.integrations.transformers.compat import CACHE, cache_of
from magicpig.placement.device import DeviceError
from magicpig.placement.simulated import Simulated

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("one_thread")

SKETCH = Config(exact_below=32, block=8, recent=8, budget=16)
LSH = Config(K=4, L=20, exact_below=32, block=8, recent=8)


def generated(model: Any, ids: Any, mask: Any, **settings: Any) -> Any:
    settings = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, **settings}
    return model.generate(ids, attention_mask=mask, **settings)


@pytest.mark.parametrize(("name", "config"), [("llama", SKETCH), ("gpt_oss", LSH)])
def test_padded_batches_are_generated_as_on_the_processor(name, config, tiny, tokens):
    model, ids = tiny(name), tokens(2, 60)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    usual = generated(attach(model, config), ids, mask)
    device = Simulated()
    own = generated(attach(model, config, device=device, placement="host"), ids, mask)
    detach(model)
    assert torch.equal(own.sequences, usual.sequences)
    for a, b in zip(cache_of(own).report().layers, cache_of(usual).report().layers, strict=True):
        assert (a.tokens, a.indexed, a.kv_bytes) == (b.tokens, b.indexed, b.kv_bytes)
        if b.sampled_share_mean is not None:
            assert a.sampled_share_mean == pytest.approx(b.sampled_share_mean, rel=1e-4)
            assert a.predicted_error_mean == pytest.approx(b.predicted_error_mean, rel=1e-2)
    assert {"prefill", "sample"} <= {span.what for span in device.spans}


def test_a_cache_goes_on_after_forks_crops_and_chunks(tiny, tokens):
    model, ids = attach(tiny("llama"), SKETCH), tokens(1, 50)

    def run(**place: Any) -> list[Any]:
        cache, out = MagicPigCache(model.config, SKETCH, **place), []
        with torch.no_grad():
            for piece in (ids[:, :20], ids[:, 20:48]):
                model(piece, **{CACHE: cache})
            out.append(model(ids[:, 48:49], **{CACHE: cache}).logits)
            other = cache.fork()
            cache.crop(-2)
            for each in (cache, other):
                out.append(model(ids[:, 49:50], **{CACHE: each}).logits)
        return out

    for own, usual in zip(run(device=Simulated(), placement="host"), run(), strict=True):
        torch.testing.assert_close(own, usual, rtol=1e-3, atol=1e-3)
    detach(model)


def test_an_error_on_the_device_is_raised_by_generate(tiny, tokens):
    model, ids = attach(tiny("llama"), SKETCH, device=Simulated(fail=["window"]), placement="host"), tokens(1, 40)
    with pytest.raises(DeviceError, match="window failed on the device"):
        generated(model, ids, torch.ones_like(ids))
    detach(model)


def test_copies_share_the_device_and_pickles_are_refused(tiny):
    model = attach(copy.deepcopy(tiny("llama")), SKETCH, device=Simulated(), placement="host")
    other = copy.deepcopy(model)
    assert other._magicpig.place is model._magicpig.place
    with pytest.raises(ArgumentTypeError, match="attach the model again"):
        pickle.dumps(model._magicpig)  # of a model, hooks of transformers may refuse before


def test_what_does_not_go_together_is_said(tiny, monkeypatch):
    model = tiny("llama")
    with pytest.raises(ArgumentError, match="placement=gpu needs a GPU"):
        attach(model, SKETCH, placement="gpu")
    with pytest.raises(ArgumentError, match=r"device='tpu' is not a device; allowed: cpu, cuda"):
        attach(model, SKETCH, device="tpu")
    with pytest.raises(ArgumentError, match="placement='there' is not a placement; allowed: auto, cpu, host"):
        MagicPigCache(model.config, SKETCH, device=Simulated(), placement="there")
    with pytest.raises(ArgumentError, match=r"the model is on cpu, its placement needs it on meta: model.to\('meta'\)"):
        attach(model, SKETCH, device=Simulated(tensors="meta"), placement="host")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArgumentError, match=r"device=cuda:1, but torch .* finds no CUDA"):
        attach(model, SKETCH, device="cuda:1")
