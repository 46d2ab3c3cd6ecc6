"""Vision-language models: the text part is sampled, images in the prompt included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from magicpig import Config
from magicpig.integrations.transformers import MagicPigCache, attach, detach

IMAGE = 90  # the token that stands for a piece of an image
TEXT: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": None,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 28,
    "patch_size": 14,
}
SIGLIP = {**CLIP, "model_type": "siglip_vision_model"}
SIGHT = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
MODELS: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": CLIP,
        "image_token_index": IMAGE,
        "vision_feature_layer": -1,
    },
    "qwen2_5_vl": {"text_config": {**TEXT, **ROPE}, "vision_config": SIGHT, **QWEN_IDS},
    "gemma3": {
        "text_config": {
            **TEXT,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 16,
        },
        "vision_config": SIGLIP,
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
        "image_token_id": IMAGE,
        "boi_token_index": 91,
        "eoi_token_index": 92,
    },
}


def build(kind: str) -> PreTrainedModel:
    config = AutoConfig.for_model(kind, **MODELS[kind])
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim >= 2:
                weights.normal_(0, 0.15)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def prompt(kind: str, images: int = 2) -> dict[str, Tensor]:
    """A prompt of some 60 tokens with images of four tokens each in it."""
    generator = torch.Generator().manual_seed(0)
    words = lambda n: torch.randint(2, 80, (n,), generator=generator)  # noqa: E731
    pieces = [words(11)]
    for _ in range(images):
        pieces += [torch.tensor([92]), torch.full((4,), IMAGE), words(17)]
    ids = torch.cat(pieces)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if images and kind == "qwen2_5_vl":
        pixels = torch.randn(images * 16, 3 * 2 * 14 * 14, generator=generator)
        inputs |= {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]] * images)}
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    elif images:
        inputs["pixel_values"] = torch.randn(images, 3, 28, 28, generator=generator)
    if kind == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    return inputs


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    options = {"max_new_tokens": 16, "do_sample": False, **options}
    return model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)


@pytest.mark.parametrize("images", [0, 2], ids=["text", "images"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_text_part_generates_what_eager_attention_does(kind: str, images: int) -> None:
    model, inputs = build(kind), prompt(kind, images)
    expected = generate(model, inputs)
    assert attach(model) is model
    found = generate(model, inputs)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, eager in zip(found.logits, expected.logits, strict=True):
        assert (ours - eager).abs().max() < 1e-4
    without = {name: x for name, x in inputs.items() if "pixel" not in name and "grid" not in name}
    if images:
        without["input_ids"] = inputs["input_ids"].where(inputs["input_ids"] != IMAGE, 5)
        other = generate(model, without)
        assert (other.logits[0] - expected.logits[0]).abs().max() > 1e-2  # the images matter
    detach(model)
    assert torch.equal(generate(model, inputs).sequences, expected.sequences)


@pytest.mark.parametrize("kind", MODELS)
def test_images_in_a_batch_with_padding_and_on_a_cache_of_their_own(kind: str) -> None:
    model, inputs = build(kind), prompt(kind)
    rows = {name: torch.cat([x, x]) for name, x in inputs.items()}
    rows["attention_mask"][0, :5] = 0
    rows["input_ids"][0, :5] = 0
    expected = generate(model, rows)
    attach(model)
    settings: dict[str, Any] = {"sinks": 2, "recent": 6, "block": 8, "exact_below": 0, "dense_layers": ()}
    cache = MagicPigCache(model.config, Config(sampler="sketch", budget=1e9, **settings))  # every row is drawn
    found = generate(model, rows, cache=cache)
    assert torch.equal(found.sequences, expected.sequences)
    assert cache.report().sampled_share_mean is not None
