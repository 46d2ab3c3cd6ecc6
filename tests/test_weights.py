"""Linear layers that keep their weights in another form: what they compute, and what networks of them still can."""

import copy
import io

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from magicpig import generation, weights
from magicpig.config import Config
from magicpig.errors import ArgumentError
from magicpig.integrations.transformers import MagicPigCache, attach
from magicpig.integrations.transformers.compat import cache_argument
from magicpig.kernels import library
from magicpig.kernels.base import DTYPES, MAX_LINEAR, load_kernels
from magicpig.weights import FORMS, FastLinear, PackedLinear, use_weights

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {"auto": FastLinear, "bf16": FastLinear, "int8": PackedLinear}


def layer(dtype: torch.dtype = torch.bfloat16, *, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(70, 50, bias=bias)).to(dtype).eval()


def network(dtype: torch.dtype = torch.bfloat16, **settings: object) -> LlamaForCausalLM:
    shape = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**shape | settings)).to(dtype).eval()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5, MAX_LINEAR, MAX_LINEAR + 1])
def test_a_layer_computes_what_it_did(rows, bias, dtype, form):
    plain = layer(dtype, bias=bias)
    kept = use_weights(copy.deepcopy(plain), form)
    x = torch.randn(1, rows, 70).to(dtype)
    with torch.inference_mode():
        y, right = kept(x), plain.double()(x.double())
    assert y.shape == (1, rows, 50)
    assert y.dtype == dtype
    # Of int8 a weight errs by its scale / sqrt(12), of bfloat16 by 2^-9 of itself; sums by their own dtype.
    limit = {"auto": 0.0, "bf16": 0.003, "int8": 0.006}[form] + 4 * torch.finfo(dtype).eps
    assert float((y.double() - right).norm() / right.norm()) <= limit


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [MAX_LINEAR + 1, 2 * MAX_LINEAR, 95, 96, 131])
def test_a_prompt_is_multiplied_as_floats_where_torch_is_slow(monkeypatch, rows, bias, dtype, form):
    multiplied = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *rest: multiplied.append(x.dtype) or linear(x, *rest))
    monkeypatch.setattr(library, "torch_multiplies", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(weights, "_NUMBERS_AT_ONCE", 7 * 70 + 1)  # seven rows, and one in the end
    monkeypatch.setattr(weights, "_VECTORS_AT_ONCE", 50)
    plain = layer(dtype, bias=bias)
    kept = use_weights(copy.deepcopy(plain), form)
    x = torch.randn(2, rows, 70).to(dtype)[:1].transpose(0, 1)
    with torch.inference_mode():
        y, right = kept(x), plain.double()(x.double())
    assert (y.shape, y.dtype) == ((rows, 1, 50), dtype)
    limit = {"auto": 0.0, "bf16": 0.003, "int8": 0.006}[form] + 4 * torch.finfo(dtype).eps
    assert float((y.double() - right).norm() / right.norm()) <= limit
    # One for `right`.
    assert set(multiplied) == ({torch.float32, torch.float64} if dtype == torch.float32 else {torch.float64})


@pytest.mark.parametrize("form", FORMS)
def test_what_more_than_a_product_is_asked_of_stays_torchs(monkeypatch, form):
    monkeypatch.setattr(library, "torch_multiplies", lambda dtype: False)
    monkeypatch.setattr(weights, "_multiplied_as_floats", lambda *given: pytest.fail("not differentiable"))
    kept = use_weights(layer(), form)
    x = torch.randn(MAX_LINEAR + 1, 70, dtype=torch.bfloat16, requires_grad=True)
    kept(x).sum().backward()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert kept(x.detach()).dtype == torch.bfloat16


def test_torch_always_multiplies_floats():
    assert library.torch_multiplies(torch.float32)
    assert library.torch_multiplies(torch.float64)


def test_few_and_many_rows_agree_about_int8():
    kept = use_weights(layer(torch.float32), "int8")
    x = torch.randn(MAX_LINEAR + 4, 70)
    with torch.inference_mode():
        torch.testing.assert_close(kept(x)[:3], kept(x[:3]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_which_layers_take_part(form):
    model = use_weights(network(), form)
    kinds = {type(module) for name, module in model.named_modules() if name.endswith(("proj", "lm_head"))}
    assert kinds == {KINDS[form]}
    assert type(model.model.embed_tokens) is nn.Embedding
    assert use_weights(model, form) is model


def test_layers_in_float32_change_only_where_they_are_rounded():
    assert type(use_weights(layer(torch.float32))[0]) is FastLinear
    assert type(use_weights(layer(torch.float32), "bf16")[0]) is PackedLinear


@pytest.mark.parametrize("few", [0, 3, MAX_LINEAR])
def test_as_many_rows_go_to_the_kernels_as_they_are_faster_with(monkeypatch, few):
    kernels, given = load_kernels(), []
    linear = kernels.linear
    monkeypatch.setattr(kernels, "few_vectors", lambda dtype: few)
    monkeypatch.setattr(kernels, "linear", lambda x, *rest: given.append(x.shape[-2]) or linear(x, *rest))
    kept = use_weights(layer(torch.float32))
    with torch.inference_mode():
        for rows in range(1, MAX_LINEAR + 2):
            kept(torch.randn(1, rows, 70))
    assert given == list(range(1, few + 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_how_many_rows_the_kernels_are_faster_with_on_each_level(isa, dtype):
    assert 0 <= load_kernels().few_vectors(dtype) <= MAX_LINEAR


def test_an_unknown_form():
    with pytest.raises(ArgumentError, match="weights='int3' is not one of auto, bf16, int8"):
        use_weights(layer(), "int3")


def test_shared_weights_stay_shared_until_they_are_rounded():
    model = use_weights(network(tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    embeddings = model.model.embed_tokens.weight.clone()
    use_weights(model, "int8")
    assert torch.equal(model.model.embed_tokens.weight, embeddings)


def test_weights_that_change_are_read_anew():
    kept = use_weights(layer(bias=False))
    x = torch.randn(1, 70).to(torch.bfloat16)
    with torch.inference_mode():
        before = kept(x)
        kept[0].weight.data = kept[0].weight.data * 2
        torch.testing.assert_close(kept(x), 2 * before)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_torchs(form):
    kept = use_weights(layer(torch.bfloat16), form)
    x = torch.randn(1, 70, dtype=torch.bfloat16, requires_grad=True)
    kept(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_another_dtype_is_for_what_is_computed_in(form):
    kept = use_weights(layer(torch.bfloat16), form).to(torch.float32)
    y = kept(torch.randn(1, 70))
    assert y.dtype == torch.float32
    if form == "int8":
        assert kept[0].numbers.dtype == torch.int8
        assert kept[0].scales.dtype == torch.float32
        kept.to(torch.bfloat16)
        assert kept[0].scales.dtype == torch.float32


@pytest.mark.parametrize("form", FORMS)
def test_copies_and_pickles(form):
    kept = use_weights(layer(), form)
    x = torch.randn(2, 70).to(torch.bfloat16)
    file = io.BytesIO()
    torch.save(kept, file)
    file.seek(0)
    with torch.inference_mode():
        for other in (copy.deepcopy(kept), torch.load(file, weights_only=False)):
            assert torch.equal(other(x), kept(x))


def test_odd_inputs_are_torchs_affair():
    kept = use_weights(layer())
    with torch.inference_mode():
        assert kept(torch.empty(0, 70, dtype=torch.bfloat16)).shape == (0, 50)
        assert kept(torch.ones(70, dtype=torch.bfloat16)).shape == (50,)
        with pytest.raises(RuntimeError):
            kept(torch.ones(1, 71, dtype=torch.bfloat16))
        with pytest.raises(RuntimeError):
            kept(torch.ones(1, 70, dtype=torch.float32))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert kept(torch.ones(1, 70)).dtype == torch.bfloat16


@pytest.mark.parametrize(("form", "limit"), [("bf16", 0.02), ("int8", 0.03)])
def test_a_model_says_nearly_the_same_when_it_decodes(form, limit):
    plain = network(torch.float32)
    kept = use_weights(copy.deepcopy(plain), form)
    ids = torch.arange(40).reshape(1, -1) % 97
    said = []
    for model in (plain, kept):
        attach(model, Config(sampler="full"))
        with torch.inference_mode():
            cache = MagicPigCache(model.config, Config(sampler="full"))
            model(ids[:, :-1], **cache_argument(cache))
            said.append(model(ids[:, -1:], **cache_argument(cache)).logits)
    assert 0 < float((said[1] - said[0]).norm() / said[0].norm()) <= limit


@pytest.fixture
def directory(tmp_path, save_tiny_llama):
    return save_tiny_llama(tmp_path / "model", ["<unk>", "<eos>", "a", "b"])


@pytest.mark.parametrize("form", FORMS)
def test_models_that_are_opened_with_it(directory, form):
    opened = generation.open_model(directory, weights=form)
    assert opened.settings["weights"] == form
    loaded = generation.load(opened, dtype="bfloat16")
    assert type(loaded.lm_head) is KINDS[form]


def test_a_model_is_not_opened_with_anything_else(directory):
    with pytest.raises(ArgumentError, match="weights='q4' is not one of auto, bf16, int8"):
        generation.open_model(directory, weights="q4")


def test_processes_that_share_a_model_take_weights_as_they_are(directory):
    opened = generation.open_model(directory, weights="int8")
    with pytest.raises(ArgumentError, match="weights='int8': 2 processes share weights as they are stored"):
        generation.load(opened, ranks=2)
