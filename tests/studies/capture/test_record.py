import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from magicpig.studies.capture import CaptureError
from magicpig.studies.capture.record import record, spread_layers

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": None,
}
IDS = [(7 * i) % 50 for i in range(150)]


def llama(layers=3) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=layers, initializer_range=0.3)).eval()


@pytest.fixture
def eager_outputs():
    """What each layer of a model attends to while eager attention reads `IDS`: the output before its projection."""

    def run(network, layers):
        outputs = {}
        hooks = [
            network.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(
                lambda _, arguments, layer=layer: outputs.__setitem__(layer, arguments[0][0])
            )
            for layer in layers
        ]
        network.set_attn_implementation("eager")
        with torch.inference_mode():
            network(torch.tensor([IDS]))
        for hook in hooks:
            hook.remove()
        return {layer: output.unflatten(-1, (4, -1)) for layer, output in outputs.items()}

    return run


# 150 tokens in pieces of 150, 75 and 5, and one by one: the last queries come from one piece, or from several
@pytest.mark.parametrize("chunk", [1000, 75, 5, 1])
def test_exact_attention_over_a_capture_is_what_the_model_computed(chunk, eager_outputs):
    network = llama()
    expected = eager_outputs(network, (0, 2))
    sets = record(network, IDS, layers=[2, 0], steps=8, chunk=chunk)
    assert list(sets) == [0, 2]
    for layer, each in sets.items():
        assert (each.tokens, each.steps, each.heads, each.kv_heads) == (150, 8, 4, 2)
        for step in range(8):
            torch.testing.assert_close(
                each.exact(step).output.float(), expected[layer][142 + step], rtol=1e-4, atol=1e-5
            )


def test_softcap_is_captured(eager_outputs):
    sizes = SIZES | {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 1.0, "num_hidden_layers": 2}
    from transformers import Gemma2Config

    torch.manual_seed(0)
    config = Gemma2Config(**sizes, layer_types=["sliding_attention", "full_attention"], initializer_range=0.3)
    network = AutoModelForCausalLM.from_config(config).eval()
    expected = eager_outputs(network, (1,))
    (each,) = record(network, IDS).values()
    assert each.softcap == 1.0
    torch.testing.assert_close(each.exact(3).output.float(), expected[1][145], rtol=1e-4, atol=1e-5)
    with pytest.raises(CaptureError, match=r"layers=0: attends to a sliding window; those that see all are \[1\]"):
        record(network, IDS, layers=[0])


def test_some_heads_alone():
    both, one = record(llama(), IDS, layers=[1])[1], record(llama(), IDS, layers=[1], kv_heads=[1])[1]
    assert torch.equal(one.keys, both.keys[1:])
    assert torch.equal(one.queries, both.queries[:, 2:])


def test_the_model_is_left_as_it_was():
    network = llama()
    before = network.config._attn_implementation
    record(network, IDS)
    assert network.config._attn_implementation == before
    assert "generate" not in vars(network)


def test_tokens_the_model_writes_are_asked_for_by_the_last_queries():
    network = llama()
    alone = record(network, IDS, layers=[2], steps=1)[2]
    written = record(network, IDS, layers=[2], steps=5, new_tokens=5)[2]
    assert (alone.tokens, written.tokens) == (150, 154)  # the last new token is never read
    torch.testing.assert_close(written.queries[0], alone.queries[0])
    with torch.inference_mode():
        first = int(network(torch.tensor([IDS])).logits[0, -1].argmax())
    stopped = record(network, IDS, layers=[2], steps=5, new_tokens=5, stop=[first])[2]
    assert stopped.tokens == 150


def test_progress_counts_every_token():
    seen = []
    record(llama(), IDS, chunk=40, on_prefill=seen.append)
    assert sum(seen) == 150
    assert len(seen) == 4


@pytest.mark.parametrize(("layers", "spread"), [(1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (12, [0, 4, 7, 11])])
def test_layers_are_spread_evenly(layers, spread):
    assert spread_layers(llama(layers).config) == spread


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [3]}, "layers=3: the model has layers 0 to 2"),
        ({"layers": [-1]}, "layers=-1: the model has layers 0 to 2"),
        ({"layers": []}, "layers is empty"),
        ({"kv_heads": [2]}, "kv_heads=2: the layers have key/value heads 0 to 1"),
        ({"steps": 151}, "steps=151 must be between 1 and the 150 tokens"),
    ],
)
def test_what_is_not_there_cannot_be_captured(settings, message):
    with pytest.raises(CaptureError, match=message):
        record(llama(), IDS, **settings)
